//! The harness of `cargo xtask bench all` works: everybody is measured, the document is written, and nothing is left. What the figures
//! are is nobody's concern here.

use std::process::{Command, Stdio};

use proxy_tests::agent;
use proxy_tests::leftovers;
use proxy_tests::results::{Case, contender};

#[test]
fn measures_everybody_and_leaves_nothing() {
    let dir = leftovers::temp_dir("bench").unwrap();
    let (results, docs) = (dir.path().join("results"), dir.path().join("docs"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args([
        "--tiny",
        "--document",
        "--cases",
        "connections-clusterip,stream-nodeport,packets-nodeport",
    ]);
    command.arg("--results").arg(&results).arg("--docs").arg(&docs);
    command.env("PROXY_AGENT_BIN", agent::binary().unwrap());
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{said}");

    let cases = Case::read_all(&results).unwrap();
    assert_eq!(cases.len(), 3, "{said}");
    for case in &cases {
        for name in [
            contender::DIRECT,
            contender::TC,
            contender::NFTABLES,
            contender::IPTABLES,
        ] {
            let rows: Vec<_> = case.rows.iter().filter(|row| row.contender == name).collect();
            assert!(!rows.is_empty(), "{name} in {}", case.name);
            for row in rows {
                assert!(
                    row.samples.len() == 1 && row.samples[0] > 0.0,
                    "{}: {row:?}\n{said}",
                    case.name
                );
            }
        }
        assert!(text.contains(&case.title), "{text}");
    }
    let document = std::fs::read_to_string(docs.join("performance.md")).unwrap();
    assert!(document.contains("(performance/packets-nodeport.svg)"), "{document}");
    let left: Vec<_> = std::fs::read_dir(leftovers::NETNS_DIR)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains(&format!("-{pid}-")))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
