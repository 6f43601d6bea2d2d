//! The only module that writes BPF maps and attaches programs. `run` owns one [`Datapath`] and calls it from one task; calls
//! block for as long as the system calls take and never wait for anything else.
//!
//! `loader` turns the embedded object into verified programs and pinned maps, `tables` are those maps, `ranges` and `sync` decide
//! what is written in which order, `links` attaches the programs, `gc` removes what has gone quiet.

mod error;
mod loader;
#[cfg(test)]
mod memory;
mod options;
mod probe;
mod ranges;
mod sync;
mod sys;
pub(crate) mod tables;

pub use error::DatapathError;
pub use sync::{SyncFailure, SyncReport};
pub use options::{AttachMode, BpfLogLevel, Capacities, InterfaceFilter, Options, SocketLb};

/// The setting that a full `FRONTENDS4/6` is about.
const FRONTENDS_SETTING: &str = "--frontends-capacity";
/// The setting that a full `BACKENDS4/6` is about.
const BACKENDS_SETTING: &str = "--backends-capacity";
/// The setting that a full `REWRITES4/6` is about.
const REWRITES_SETTING: &str = "--rewrites-capacity";
/// The setting that a full `SERVICES` is about.
const SERVICES_SETTING: &str = "--services-capacity";
