//! What an agent was told, checked and with defaults filled in. Made once, from the file of `--config` and the flags; nothing else
//! reads them.
//!
//! The file is read into a [`document::Document`], flags are laid over it, the values are checked here and in `check` and `times`,
//! and `effective` turns the result into a document again.

pub(crate) mod changes;
mod check;
pub(crate) mod document;
mod effective;
mod file;
mod flags;
mod meaningless;
mod overlay;
#[cfg(test)]
mod tests;
mod times;
mod words;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::document::Document;
pub use self::flags::RunArgs;
pub use self::times::Intervals;
pub use self::words::{AttachArg, BpfLogLevelArg, DetectLocalModeArg, ModeArg, SocketLbArg, XdpModeArg};
use crate::datapath::Options;
use crate::gates::FeatureGates;

/// Where the maps are pinned unless said otherwise.
pub(crate) const DEFAULT_BPF_DIR: &str = "/sys/fs/bpf/ebpf-proxy";
/// Says it for all commands of a container, where the BPF file system is mounted elsewhere.
pub(crate) const BPF_DIR_VARIABLE: &str = "EBPF_PROXY_BPF_DIR";
/// Our `mode`, as `/proxyMode` and `/configz` say it.
pub(crate) const MODE: &str = "ebpf";

/// A value that cannot be used, or a file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A value.
    #[error("{place} {value:?}: {problem}; {remedy}")]
    Value {
        /// The flag, or the file and the field.
        place: String,
        /// What it says.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What would be right.
        remedy: Cow<'static, str>,
    },
    /// A file, or a value in it of another type.
    #[error("{place}: {problem}")]
    File {
        /// The file and, as far as it goes, the field.
        place: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl ConfigError {
    fn value(
        place: impl Into<String>,
        value: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Value {
            place: place.into(),
            value: value.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

/// Where the fields of a document come from, for errors.
#[derive(Debug, Default)]
struct Origin {
    file: Option<String>,
    /// The flag behind a field.
    given: BTreeMap<&'static str, &'static str>,
}

impl Origin {
    fn place(&self, field: &str) -> String {
        match (self.given.get(field), &self.file) {
            (Some(flag), _) => (*flag).to_owned(),
            (None, Some(file)) => format!("{file}: {field}"),
            (None, None) => field.to_owned(),
        }
    }

    fn error(&self, field: &str, value: &str, problem: &str, remedy: impl Into<Cow<'static, str>>) -> ConfigError {
        ConfigError::value(self.place(field), value, problem, remedy)
    }
}

/// Everything an agent needs to know to run.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Name of this node (S172).
    pub node_name: Arc<str>,
    /// Its address, if the Node object is not to be believed (S184).
    pub node_ip: Option<IpAddr>,
    /// Where objects come from.
    pub source: SourceConfig,
    /// Name of this proxy, if it serves only what is labelled with it (S1).
    pub service_proxy_name: Option<Arc<str>>,
    /// Kubernetes features that are switched.
    pub gates: FeatureGates,
    /// What the datapath is told.
    pub datapath: Options,
    /// Where health is served.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// An address of these two that cannot be bound is fatal (S179).
    pub bind_address_hard_fail: bool,
    /// When changes are applied.
    pub intervals: Intervals,
    /// How much is logged, in Kubernetes' numbers.
    pub verbosity: u32,
}

/// Where objects come from.
#[derive(Clone, PartialEq, Debug)]
pub enum SourceConfig {
    /// An API server.
    ApiServer(ApiServer),
    /// A folder of manifests.
    Manifests(PathBuf),
}

/// An API server and how it is talked to.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ApiServer {
    /// Address and credentials; `None`: as the pod's service account says.
    pub kubeconfig: Option<PathBuf>,
    /// Address, before what the kubeconfig or the environment says.
    pub master: Option<String>,
    /// Requests that may be made.
    pub rate: Option<Rate>,
}

/// Requests that may be made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// In a second, on average.
    pub qps: f64,
    /// At once.
    pub burst: u32,
}

/// What should be said about a configuration that can be used.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Remarks {
    /// What a user should change.
    pub warnings: Vec<String>,
    /// What goes without saying.
    pub details: Vec<String>,
}

impl RunConfig {
    /// Reads the file, if there is one, and checks everything.
    pub fn from_args(args: &RunArgs) -> Result<(Self, Remarks), ConfigError> {
        let mut remarks = Remarks::default();
        let mut document = match &args.config {
            Some(path) => read(path, &mut remarks)?,
            None => Document::default(),
        };
        let (origin, ignored) = overlay::lay_over(args, &mut document)?;
        if let Some(path) = args.config.as_ref().filter(|_| !ignored.is_empty()) {
            let (flags, file) = (ignored.join(", "), path.display());
            remarks.warnings.push(format!(
                "{flags} ignored: --config {file} counts instead, as with kube-proxy"
            ));
        }
        if !args.meaningless.0.is_empty() {
            let flags: Vec<String> = args.meaningless.0.iter().map(|name| format!("--{name}")).collect();
            remarks
                .warnings
                .push(format!("{} ignored: without meaning here", flags.join(", ")));
        }
        let config = check::check(&document, &origin, &mut remarks)?;
        Ok((config, remarks))
    }
}

fn read(path: &Path, remarks: &mut Remarks) -> Result<Document, ConfigError> {
    let file = file::read(path)?;
    remarks.warnings.extend(file.warnings);
    if !file.meaningless.is_empty() {
        let (name, fields) = (path.display(), file.meaningless.join(", "));
        remarks.details.push(format!("{name}: without meaning here: {fields}"));
    }
    Ok(file.document)
}
