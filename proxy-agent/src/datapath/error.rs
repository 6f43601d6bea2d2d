//! What can go wrong in the datapath, with the object and the remedy. One type for start and clean-up, one for map writes.

use std::io;
use std::path::PathBuf;

/// Why the datapath could not be opened or removed.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The agent was built without programs.
    #[error("this agent was built without the eBPF object: run `cargo xtask build-ebpf` and build it again")]
    NoObject,
    /// Something that the kernel or the machine has to provide is missing.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// What is missing.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// Another agent uses the directory.
    #[error("another agent is running with --bpf-dir {}: give each agent a directory of its own", .0.display())]
    Busy(PathBuf),
    /// A pinned map is not the map we mean.
    #[error("the pinned map {} has another shape ({found}, wanted {wanted}): remove it with `proxy-agent cleanup`", path.display())]
    Shape {
        /// Where it is pinned.
        path: PathBuf,
        /// Its shape.
        found: String,
        /// The shape this agent works with.
        wanted: String,
    },
    /// A map of another version cannot become one of this version.
    #[error(
        "the pinned map {} cannot be taken over: its field {field} {what} in this version; go on with the version that made it, or remove \
         it with `proxy-agent cleanup`, which ends established connections",
        path.display()
    )]
    Layout {
        /// Where it is pinned.
        path: PathBuf,
        /// The field, by its path.
        field: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The maps of another version do not say what they consist of.
    #[error(
        "the maps in {} cannot be taken over: they do not say what they consist of (LAYOUTS is missing); start the version that made them \
         once more, or remove them with `proxy-agent cleanup`, which ends established connections",
        .0.display()
    )]
    Undescribed(PathBuf),
    /// The object could not be loaded.
    #[error("the eBPF object could not be loaded")]
    Load(#[from] Box<aya::EbpfError>),
    /// A program was rejected.
    #[error("program {name} could not be loaded")]
    Program {
        /// Name of the program.
        name: String,
        /// The kernel's reason, with the verifier's log if there is one.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A system call failed.
    #[error("{action} failed for {object}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The object embedded in the agent lacks something this agent relies on.
    #[error("the eBPF object of this agent has no {0}: run `cargo xtask build-ebpf` and build the agent again")]
    Incomplete(String),
}

impl DatapathError {
    /// Adds what was tried, and on what, to the kernel's error.
    pub(crate) fn call(action: &'static str, object: impl ToString) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Call { action, object, source }
    }
}

/// Why a map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    /// There is no room.
    #[error("{map} is full ({capacity} entries): raise {setting}")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Its capacity.
        capacity: u32,
        /// The setting to raise.
        setting: &'static str,
    },
    /// The kernel refused.
    #[error("{map}: {source}")]
    Call {
        /// Name of the map.
        map: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A range that is not in the table.
    #[error("{map}: slots {first}+{count} are outside the table")]
    OutOfBounds {
        /// Name of the map.
        map: &'static str,
        /// First slot.
        first: u32,
        /// Number of slots.
        count: u32,
    },
}
