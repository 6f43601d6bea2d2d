//! The operator's tools against real agents: what they say is what happens.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_tests::agent::Agent;
use proxy_tests::echo::{self, Failure, Held};
use proxy_tests::service::{self, NODE_PORT, external};
use proxy_tests::topology::CLUSTER_CIDR;
use proxy_tests::world::{CLUSTER_IPS, ECHO, ENDPOINT_PORTS, SERVICE_PORTS, World, vips};
use proxy_tests::{manifests, maps};
use serde_json::{Value, json};

/// Longer than an answer takes, shorter than a test may.
const PATIENCE: Duration = Duration::from_millis(700);

fn text(output: &Output) -> String {
    format!(
        "exit {:?}\n{}{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn explain(agent: &Agent, source: &str, destination: SocketAddr) -> Value {
    let bpf_dir = agent.bpf_dir().display().to_string();
    let destination = format!("{destination}/tcp");
    let output = agent
        .tool(&["explain", source, &destination, "--bpf-dir", &bpf_dir, "-o", "json"])
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a client meets at an address, in the words of `explain`.
fn happens(destination: SocketAddr) -> &'static str {
    match echo::dial(destination, PATIENCE) {
        Ok(()) => "translated",
        Err(Failure::Refused) => "refused",
        Err(Failure::Timeout) => "dropped",
        Err(other) => panic!("{destination}: {other:?}"),
    }
}

/// Services that serve, have no endpoint at all (S122), and have none that their policy may use here (S58); ports that are not
/// defined (S77), addresses that nobody has (S78), and one that is no service.
#[test]
fn explain_says_what_happens() {
    let world = service::world(&[], &["pod1-1", "pod2-1"], |_| {}).unwrap();
    let others = |last: &str| [format!("10.96.0.{last}"), format!("fd00:96::{last}")];
    let mut objects = vec![json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]},
    })];
    for (name, last, local) in [("empty", "20", false), ("elsewhere", "21", true)] {
        let ips = others(last);
        let mut service = manifests::service(name, &[&ips[0], &ips[1]], &SERVICE_PORTS);
        if local {
            service["spec"]["internalTrafficPolicy"] = json!("Local");
            objects.extend(manifests::slices(
                name,
                &ENDPOINT_PORTS,
                &world.endpoints_of(&["pod2-1"]),
            ));
        }
        objects.push(service);
    }
    world.write("others", &objects).unwrap();
    let socket = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    for ip in ["20", "21"].iter().flat_map(|last| others(last)) {
        for agent in &world.agents {
            let has = || maps::backends(&agent.bpf_dir(), socket(&ip, 80), Protocol::Tcp).unwrap();
            proxy_tests::process::wait_until(Duration::from_secs(10), || has().map(|_| ())).unwrap();
        }
    }

    let pod = world.topology.pod(0, 0);
    let agent = &world.agents[0];
    for family in [0, 1] {
        let [empty, elsewhere, nobody] = ["20", "21", "22"].map(|last| others(last)[family].clone());
        for (destination, verdict, rule) in [
            (socket(CLUSTER_IPS[family], 80), "translated", Value::Null),
            (socket(&empty, 80), "refused", json!("S122")),
            (socket(&elsewhere, 80), "dropped", json!("S58")),
            (socket(&empty, 81), "refused", json!("S77")),
            (socket(&nobody, 80), "dropped", json!("S78")),
        ] {
            let source = pod.address(destination.ip()).to_string();
            let said = explain(agent, &source, destination);
            assert_eq!((&said["verdict"], &said["rule"]), (&json!(verdict), &rule), "{said:#}");
            assert_eq!(said["origin"], "pod");
            assert_eq!(pod.run(|| happens(destination)), verdict, "{destination} {said:#}");
        }
        let server = world.topology.pod(1, 0).sockets(ECHO)[family];
        let said = explain(agent, &pod.address(server.ip()).to_string(), server);
        assert_eq!(said["verdict"], "notAService", "{said:#}");

        // From outside to a node port: masqueraded. And from the node itself, which is not.
        let node_port = world.topology.node(0).sockets(NODE_PORT)[family];
        let outside = external(&world);
        let said = explain(agent, &outside.address(node_port.ip()).to_string(), node_port);
        let found = [&said["verdict"], &said["matched"], &said["origin"]];
        assert_eq!(found, ["translated", "nodePort", "external"], "{said:#}");
        assert_eq!(said["masquerade"], true, "{said:#}");
        let answer = outside.run(|| echo::tcp(node_port)).unwrap();
        assert_ne!(
            answer.client.ip(),
            outside.address(node_port.ip()),
            "masqueraded, as was said"
        );
        let said = explain(agent, "host", node_port);
        assert_eq!(
            (&said["origin"], &said["masquerade"]),
            (&json!("host"), &json!(false)),
            "{said:#}"
        );

        // An open connection is seen.
        let vip = vips()[family];
        let held = pod.run(|| Held::open(vip)).unwrap();
        let said = explain(agent, &pod.address(vip.ip()).to_string(), vip);
        let port = held.stream().local_addr().unwrap().port();
        let connections = said["connections"].as_array().unwrap();
        let client = SocketAddr::new(pod.address(vip.ip()), port).to_string();
        assert!(
            connections.iter().any(|open| open["client"] == json!(client)),
            "{said:#}"
        );
    }
}

/// The arguments of an agent, for `verify`.
fn verify(world: &World, options: &[&str]) -> Output {
    let agent = &world.agents[0];
    let (bpf_dir, cgroup) = (
        agent.bpf_dir().display().to_string(),
        agent.cgroup().display().to_string(),
    );
    let manifests = world.manifests.dir().display().to_string();
    let mut args = vec![
        "verify",
        "--node-name",
        agent.node(),
        "--bpf-dir",
        &bpf_dir,
        "--cgroup",
        &cgroup,
    ];
    args.extend(["--manifests", &manifests, "--cluster-cidr", CLUSTER_CIDR, "-o", "json"]);
    args.extend(options);
    agent.tool(&args).unwrap()
}

fn differences(output: &Output) -> Vec<Value> {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

/// Agrees; names what somebody removed; says when it cannot look.
#[test]
fn verify_names_what_differs() {
    let mut world = service::world(&[], &["pod1-1", "pod2-1"], |service| {
        service["spec"]["loadBalancerSourceRanges"] = json!(["192.0.2.0/24", "2001:db8::/32"]);
    })
    .unwrap();
    let output = verify(&world, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(differences(&output).is_empty());

    // With other options something else should be there.
    let output = verify(&world, &["--nodeport-addresses", "198.51.100.0/24,2001:db8:5::/64"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        differences(&output).iter().all(|one| one["kind"] == "nodeAddress"),
        "{}",
        text(&output)
    );

    // The agent would put things right before long.
    world.agents[0].stop();
    let bpf_dir = world.agents[0].bpf_dir();
    for vip in vips() {
        assert!(maps::remove_frontend(&bpf_dir, vip, Protocol::Tcp).unwrap());
    }
    let links = bpf_dir.join(format!("v{}/links", proxy_common::names::LAYOUT_VERSION));
    std::fs::remove_file(links.join("connect4")).unwrap();
    let output = verify(&world, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let found = differences(&output);
    for (kind, what) in [
        ("frontend", "default/web:tcp/TCP 10.96.0.10:80/TCP"),
        ("frontend", "default/web:tcp/TCP [fd00:96::a]:80/TCP"),
        ("program", "connect4 on the cgroup"),
    ] {
        let is_it = |one: &&Value| one["kind"] == kind && one["object"] == what && one["problem"] == "missing";
        assert_eq!(
            found.iter().filter(is_it).count(),
            1,
            "{kind} {what}: {}",
            text(&output)
        );
    }
    assert_eq!(found.len(), 3, "{}", text(&output));

    world.agents[0].command(&["cleanup"]).unwrap();
    let output = verify(&world, &[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}

/// `doctor` with an agent's own options and these: exit code and what it said of each check.
fn doctor(agent: &Agent, options: &[&str]) -> (Option<i32>, Vec<Value>) {
    let mut args = vec!["doctor", "-o", "json", "--healthz-bind-address", "127.0.0.1:10256"];
    args.extend(options);
    let output = agent.tool(&args).unwrap();
    (output.status.code(), differences(&output))
}

#[track_caller]
fn assert_said(found: &[Value], check: &str, status: &str, sentence: &str, remedy: &str) {
    let said = found
        .iter()
        .find(|one| one["check"] == check)
        .unwrap_or_else(|| panic!("{check}: {found:#?}"));
    let has = |field: &str, text: &str| said[field].as_str().unwrap().contains(text);
    assert!(
        said["status"] == status && has("found", sentence) && has("remedy", remedy),
        "{said:#}"
    );
}

/// Whatever is missing or in the way is named, with the remedy.
#[test]
fn doctor_names_what_is_wrong() {
    let mut world = service::world(&[], &["pod1-1"], |_| {}).unwrap();
    let manifests = world.manifests.dir().display().to_string();
    let agent = &world.agents[0];
    let (bpf_dir, cgroup) = (
        agent.bpf_dir().display().to_string(),
        agent.cgroup().display().to_string(),
    );
    let usual = ["--bpf-dir", &bpf_dir, "--cgroup", &cgroup, "--manifests", &manifests];
    let (code, found) = doctor(agent, &usual);
    assert!(found.iter().all(|one| one["status"] == "ok"), "{found:#?}");
    assert_eq!(code, Some(0));
    assert_said(&found, "pins", "ok", "an agent is running", "");

    // In the way of the agent, and of traffic.
    world.agents[0].stop();
    let agent = &world.agents[0];
    let netns = agent.netns().clone();
    let taken = netns.run(|| std::net::TcpListener::bind("127.0.0.1:10249").unwrap());
    netns.sysctl("net/ipv4/ip_forward", "0").unwrap();
    proxy_tests::firewall::load(&netns, "table ip kube-proxy {\n  chain services {\n  }\n}\n").unwrap();
    let (code, found) = doctor(agent, &usual);
    assert_eq!(code, Some(1), "{found:#?}");
    assert_said(
        &found,
        "metrics port",
        "fail",
        "127.0.0.1:10249 is taken",
        "--metrics-bind-address",
    );
    assert_said(&found, "healthz port", "ok", "is free", "");
    assert_said(
        &found,
        "IPv4 forwarding",
        "warn",
        "does not forward",
        "net.ipv4.ip_forward=1",
    );
    assert_said(
        &found,
        "kube-proxy nftables",
        "fail",
        "table kube-proxy",
        "proxy-agent migrate remove-rules",
    );
    assert_said(
        &found,
        "pins",
        "warn",
        "an agent that does not run",
        "proxy-agent cleanup",
    );
    drop(taken);

    // What an agent insists on.
    let nowhere = tempfile::tempdir().unwrap();
    let nowhere = nowhere.path().display().to_string();
    let missing = format!("{nowhere}/kubeconfig");
    let (code, found) = doctor(
        agent,
        &["--bpf-dir", &nowhere, "--cgroup", &nowhere, "--kubeconfig", &missing],
    );
    assert_eq!(code, Some(1), "{found:#?}");
    assert_said(&found, "BPF file system", "fail", "--bpf-dir", "mount -t bpf");
    assert_said(&found, "cgroup2", "fail", "--cgroup", "--socket-lb off");
    assert_said(&found, "API server", "fail", "kubeconfig", "--kubeconfig");

    // Root without the capability: what is not in the bounding set is lost when the program starts.
    let mut command = netns.command(proxy_tests::agent::binary().unwrap());
    command.args(["doctor", "-o", "json"]).args(usual);
    let drop_net_admin = || {
        // SAFETY: prctl with numbers; no pointers, and async-signal-safe.
        match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, 12, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes one system call.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, drop_net_admin) };
    let output = command.output().unwrap();
    assert_said(
        &differences(&output),
        "capabilities",
        "fail",
        "CAP_NET_ADMIN",
        "root or privileged",
    );
}
