//! Puts the compiled eBPF programs beside the agent's code, so that a release build is one file to ship.
//!
//! The object comes from `$EBPF_PROXY_OBJECT`, or from where `cargo xtask build-ebpf` leaves it. Without one a release build
//! fails; a development build goes on with an empty object, which `Datapath::open` refuses, so that code which needs no kernel can
//! be built and tested alone.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

/// Where `cargo xtask build-ebpf` leaves the object, under the home directory.
const DEFAULT_OBJECT: &str = ".cache/ebpf-proxy/ebpf/proxy-ebpf";

fn main() {
    println!("cargo::rerun-if-env-changed=EBPF_PROXY_OBJECT");
    println!("cargo::rerun-if-changed=build.rs");
    let object = env::var_os("EBPF_PROXY_OBJECT").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(DEFAULT_OBJECT),
        PathBuf::from,
    );
    // A path that does not exist makes cargo run this again the next time, which is what we want.
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = read(&object);
    let copy = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("proxy-ebpf");
    if let Err(error) = fs::write(&copy, bytes) {
        fail(&format!("cannot write {}: {error}", copy.display()));
    }
}

fn read(object: &Path) -> Vec<u8> {
    match fs::read(object) {
        Ok(bytes) => bytes,
        Err(error) => {
            let message = format!(
                "no eBPF object at {} ({error}): run `cargo xtask build-ebpf`",
                object.display()
            );
            if env::var("PROFILE").as_deref() == Ok("release") {
                fail(&message);
            }
            println!("cargo::warning={message}");
            Vec::new()
        }
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    process::exit(1);
}
