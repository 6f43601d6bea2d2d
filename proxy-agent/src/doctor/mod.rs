//! `doctor`: is this machine fit for an agent with these options, and is anything in its way? Every check gives one sentence and,
//! where something is wrong, the remedy. Called by `cli`; changes nothing.
//!
//! What must stay true: what an agent insists on at its start is asked by the same code (`datapath::probe`), so that a machine that
//! passes is one where an agent starts.

pub(crate) mod api;
mod interfaces;
mod kernel;
mod node;
mod others;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::{RunArgs, RunConfig};
use crate::datapath::DatapathError;

/// How it stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// An agent runs, but something is not served, or not well.
    Warn,
    /// An agent does not run, or traffic fails.
    Fail,
}

/// What was looked at, and what came out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// `ok`, `warn` or `fail`.
    pub status: Status,
    /// What was looked at; these words are stable.
    pub check: &'static str,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub remedy: String,
}

impl Check {
    fn new(status: Status, check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status,
            check,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(Status::Ok, check, found, "")
    }

    fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Warn, check, found, remedy)
    }

    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Fail, check, found, remedy)
    }

    /// Something that an agent insists on.
    fn needed<T>(check: &'static str, probed: Result<T, DatapathError>, show: impl FnOnce(T) -> String) -> Self {
        match probed {
            Ok(found) => Self::ok(check, show(found)),
            Err(DatapathError::Missing { what, remedy }) => Self::fail(check, format!("{what} is missing"), remedy),
            Err(error) => Self::fail(check, error.to_string(), "see the agent's log"),
        }
    }
}

/// Where the kernel says of itself what is in files; another place in tests.
struct Machine {
    proc: PathBuf,
    sys: PathBuf,
}

impl Machine {
    fn this() -> Self {
        Self {
            proc: PathBuf::from("/proc"),
            sys: PathBuf::from("/sys"),
        }
    }

    /// A file of /proc, empty if it is not there.
    fn proc(&self, path: impl AsRef<Path>) -> String {
        std::fs::read_to_string(self.proc.join(path)).unwrap_or_default()
    }

    /// A sysctl, `None` where the kernel does not have it.
    fn sysctl(&self, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.proc.join("sys").join(name)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// Is a kube-proxy running in this network namespace? Its process, if it can be seen from here.
pub(crate) fn kube_proxy() -> Option<u32> {
    others::kube_proxy(&Machine::this())
}

/// Looks at everything. Options that cannot be used are a finding of their own, and the rest is looked at without them.
pub fn examine(args: &RunArgs) -> Vec<Check> {
    let mut checks = Vec::new();
    let unusable =
        |error: &dyn std::fmt::Display| Check::fail("options", error.to_string(), "see proxy-agent run --help");
    let config = RunConfig::from_args(args).or_else(|error| {
        checks.push(unusable(&error));
        RunConfig::from_args(&RunArgs::default())
    });
    let config = match config {
        Ok((config, _)) => config,
        Err(error) => {
            checks.push(unusable(&error));
            return checks;
        }
    };
    let machine = Machine::this();
    checks.extend(kernel::checks(&machine, &config.datapath));
    checks.extend(node::checks(&machine, &config));
    checks.extend(others::checks(&machine, &config.datapath));
    checks.extend(interfaces::checks(&config.datapath));
    checks.extend(api::checks(&config));
    checks
}
