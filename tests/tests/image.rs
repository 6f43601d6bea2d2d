//! The container image that `cargo xtask image` writes: what runtimes check when they import it, and that what is inside runs.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use proxy_tests::kubernetes::image::{self, agent_archive};
use proxy_tests::{leftovers, process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

type Files = BTreeMap<String, Vec<u8>>;

/// Below this the image is to stay, unpacked.
const LARGEST: usize = 25 << 20;

fn archive() -> Vec<u8> {
    std::fs::read(agent_archive().unwrap()).unwrap()
}

fn unpack(archive: &[u8]) -> Files {
    let mut files = Files::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        assert_eq!(
            entry.header().mtime().unwrap(),
            0,
            "{path}: the same files make the same image"
        );
        assert!(files.insert(path.clone(), bytes).is_none(), "{path} is there twice");
    }
    files
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The blob that a descriptor describes, with everything it says checked.
fn blob<'a>(files: &'a Files, descriptor: &Value) -> &'a [u8] {
    let wanted = descriptor["digest"].as_str().unwrap();
    let blob = &files[&format!("blobs/{}", wanted.replace(':', "/"))];
    assert_eq!(digest(blob), wanted);
    assert_eq!(descriptor["size"], blob.len());
    blob
}

fn parse(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn layer(files: &Files) -> Vec<u8> {
    let index = parse(&files["index.json"]);
    let manifest = parse(blob(files, &index["manifests"][0]));
    let mut layer = Vec::new();
    flate2::read::GzDecoder::new(blob(files, &manifest["layers"][0]))
        .read_to_end(&mut layer)
        .unwrap();
    layer
}

#[test]
fn every_digest_is_right_and_nothing_is_left_over() {
    let files = unpack(&archive());
    assert_eq!(parse(&files["oci-layout"])["imageLayoutVersion"], "1.0.0");
    let index = parse(&files["index.json"]);
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    let entry = &index["manifests"][0];
    let manifest = parse(blob(&files, entry));
    assert_eq!(manifest["mediaType"], entry["mediaType"]);
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    let config = parse(blob(&files, &manifest["config"]));
    assert_eq!(config["architecture"], entry["platform"]["architecture"]);
    assert_eq!(config["os"], "linux");
    assert_eq!(config["config"]["Entrypoint"], json!(["/proxy-agent"]));
    assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer(&files))]));

    let docker = parse(&files["manifest.json"]);
    let path = |descriptor: &Value| format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"));
    assert_eq!(docker[0]["Config"], path(&manifest["config"]));
    assert_eq!(docker[0]["Layers"], json!([path(&manifest["layers"][0])]));
    let tag = format!("ebpf-proxy/proxy-agent:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(docker[0]["RepoTags"], json!([tag]));
    assert_eq!(
        entry["annotations"]["io.containerd.image.name"],
        format!("docker.io/{tag}")
    );
    assert_eq!(files.len(), 6, "{:?}", files.keys());
}

#[test]
fn it_holds_a_static_program_that_runs_and_the_licences() {
    let image = unpack(&archive());
    let layer = layer(&image);
    assert!(layer.len() < LARGEST, "{} bytes", layer.len());
    let files = unpack(&layer);
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "licenses/LICENSE-APACHE",
            "licenses/LICENSE-GPL2",
            "licenses/LICENSE-MIT",
            "proxy-agent"
        ]
    );
    let program = &files["proxy-agent"];
    assert!(has_no_interpreter(program), "a dynamic loader is asked for");
    let architecture = architecture_of(&image);
    assert_eq!(machine(program), architecture);
    let dir = leftovers::temp_dir("image").unwrap();
    tar::Archive::new(layer.as_slice()).unpack(dir.path()).unwrap();
    let program = dir.path().join("proxy-agent");
    assert_eq!(program.metadata().unwrap().permissions().mode() & 0o777, 0o755);
    if architecture != image::architecture() {
        // Given with PROXY_AGENT_IMAGE: nothing here runs it.
        return;
    }
    // Where there is nothing but the image.
    let alone = process::run(
        Command::new("chroot")
            .arg(dir.path())
            .args(["/proxy-agent", "--version"]),
    )
    .unwrap();
    assert_eq!(alone.trim(), format!("proxy-agent {}", env!("CARGO_PKG_VERSION")));
}

/// What the image says it is for.
fn architecture_of(files: &Files) -> String {
    let index = parse(&files["index.json"]);
    index["manifests"][0]["platform"]["architecture"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// What the program is for.
fn machine(elf: &[u8]) -> &'static str {
    match u16::from_le_bytes(elf[18..20].try_into().unwrap()) {
        62 => "amd64",
        183 => "arm64",
        other => panic!("a program for machine {other}"),
    }
}

/// No program header of a little-endian 64-bit ELF file is PT_INTERP.
fn has_no_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
    let u16_at = |at: usize| usize::from(u16::from_le_bytes(elf[at..at + 2].try_into().unwrap()));
    let headers = usize::try_from(u64::from_le_bytes(elf[32..40].try_into().unwrap())).unwrap();
    let (size, count) = (u16_at(54), u16_at(56));
    (0..count)
        .map(|i| headers + i * size)
        .all(|at| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap()) != PT_INTERP)
}
