//! Stand-in with the interface of inspect, until that is merged.

use std::path::Path;

/// Stand-in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// Columns.
    Table,
    /// More columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Stand-in.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// Only this namespace.
    pub namespace: Option<String>,
    /// Only the Service of this name.
    pub name: Option<String>,
}

/// Stand-in.
#[derive(Debug, thiserror::Error)]
#[error("stand-in")]
pub struct InspectError;

/// Stand-in.
pub fn services(_: &Path, _: &Filter, _: Output) -> Result<String, InspectError> {
    Err(InspectError)
}

/// Stand-in.
pub fn backends(_: &Path, _: &Filter, _: Output) -> Result<String, InspectError> {
    Err(InspectError)
}

/// Stand-in.
pub fn connections(_: &Path, _: &Filter, _: Output) -> Result<String, InspectError> {
    Err(InspectError)
}
