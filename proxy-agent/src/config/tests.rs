use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::datapath::{NodePortAddresses, PodDetection, Timeouts};

mod files;
mod values;

/// A command line with these options of `run`.
fn load(options: &[&str]) -> Result<(RunConfig, Remarks), String> {
    use clap::Parser;
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }
    let line = Line::try_parse_from([&["run"], options].concat()).map_err(|error| error.to_string())?;
    RunConfig::from_args(&line.run).map_err(|error| error.to_string())
}

fn config(options: &[&str]) -> Result<RunConfig, String> {
    load(options).map(|(config, _)| config)
}

/// A file that goes with its guard.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// A configuration file with these lines behind its head, and further options. In what is said, `FILE` is its name.
fn with_file(text: &str, options: &[&str]) -> Result<(RunConfig, Remarks), String> {
    let file = file(&[HEAD, text].concat());
    let path = file.path().to_str().unwrap();
    let plain = |text: String| text.replace(path, "FILE");
    let (config, mut remarks) = load(&[&["--config", path], options].concat()).map_err(plain)?;
    for text in remarks.warnings.iter_mut().chain(&mut remarks.details) {
        *text = plain(std::mem::take(text));
    }
    Ok((config, remarks))
}
