//! What the pinned maps say, for people and tools: services, backends and connections. Read-only, with or without a running agent;
//! `cli` calls these functions and prints what they return.
//!
//! What must stay true: JSON and YAML field names are stable; rows come in a stable order.

pub mod explain;
mod output;
mod planned;
mod rows;
mod top;
pub mod trace;

use std::path::{Path, PathBuf};

use proxy_common::addr::Protocol;
use serde::Serialize;

use crate::datapath::events::EventsError;
use crate::datapath::{self, Difference, TableError};
use crate::doctor::Check;

pub use output::Output;
pub(crate) use output::{Columns, render, serialize, yaml};
pub use planned::{PlannedFrontend, PlannedPort, PlannedSet, planned};
pub use rows::{BackendRow, ConnectionRow, FrontendRow, ServiceRow};
pub use top::{BackendRate, ServiceRate, Sort, Top, TopOptions};

/// Which rows are shown. What is not set does not restrict.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Namespace of the Service.
    pub namespace: Option<String>,
    /// Name of the Service.
    pub service: Option<String>,
    /// Protocol of the service port.
    pub protocol: Option<Protocol>,
}

impl Filter {
    fn accepts(&self, namespace: &str, service: &str, protocol: &str) -> bool {
        self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
            && self.service.as_deref().is_none_or(|wanted| wanted == service)
            && self.protocol.is_none_or(|wanted| wanted.to_string() == protocol)
    }
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// No agent has made maps there.
    #[error("there are no maps in {}: no agent has run with this --bpf-dir, or it was cleaned up", .0.display())]
    NoMaps(PathBuf),
    /// A map could not be read.
    #[error("the pinned maps cannot be read: {0}")]
    Read(String),
    /// There is no such service.
    #[error("service {namespace}/{name} is not programmed on this node")]
    NotFound {
        /// Namespace asked for.
        namespace: String,
        /// Name asked for.
        name: String,
    },
    /// An address is not of the family it should be.
    #[error("SRC and DST are of different families: give both as IPv4 or both as IPv6 addresses")]
    Families,
    /// The node has many addresses, and it counts which.
    #[error("the Service has source ranges, so it counts which address the node has: give SRC as one of its addresses")]
    WhichAddress,
    /// Nothing can be traced.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// The output could not be written.
    #[error("the output could not be formatted")]
    Format(#[from] serde_json::Error),
}

impl From<TableError> for InspectError {
    fn from(error: TableError) -> Self {
        Self::Read(error.to_string())
    }
}

/// `service list`: one row per service port.
pub fn services(bpf_dir: &Path, filter: &Filter, output: Output) -> Result<String, InspectError> {
    render(&service_rows(bpf_dir, filter)?, output)
}

/// `service get NAMESPACE/NAME`: the service's ports and their backends.
pub fn service(bpf_dir: &Path, namespace: &str, name: &str, output: Output) -> Result<String, InspectError> {
    #[derive(Serialize)]
    struct Details {
        services: Vec<ServiceRow>,
        backends: Vec<BackendRow>,
    }
    let filter = Filter {
        namespace: Some(namespace.to_owned()),
        service: Some(name.to_owned()),
        protocol: None,
    };
    let services = service_rows(bpf_dir, &filter)?;
    if services.is_empty() {
        return Err(InspectError::NotFound {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        });
    }
    let backends = backend_rows(bpf_dir, &filter)?;
    match output {
        Output::Json | Output::Yaml => serialize(&Details { services, backends }, output),
        Output::Table | Output::Wide => Ok(format!(
            "{}\n{}",
            render(&services, output)?,
            render(&backends, output)?
        )),
    }
}

/// `backend list`: one row per endpoint of a service port's set.
pub fn backends(bpf_dir: &Path, filter: &Filter, output: Output) -> Result<String, InspectError> {
    render(&backend_rows(bpf_dir, filter)?, output)
}

/// `connection list`: one row per connection, both directions joined.
pub fn connections(bpf_dir: &Path, filter: &Filter, output: Output) -> Result<String, InspectError> {
    render(&connection_rows(bpf_dir, filter)?, output)
}

/// `verify`: what differs, or that nothing does.
pub fn differences(found: &[Difference], output: Output) -> Result<String, InspectError> {
    match output {
        Output::Table | Output::Wide if found.is_empty() => Ok("the kernel holds what it should\n".to_owned()),
        _ => render(found, output),
    }
}

/// `doctor`: one row per check.
pub fn checks(found: &[Check], output: Output) -> Result<String, InspectError> {
    render(found, output)
}

/// The rows of [`services`].
pub fn service_rows(bpf_dir: &Path, filter: &Filter) -> Result<Vec<ServiceRow>, InspectError> {
    let mut rows = rows::services(&open(bpf_dir)?)?;
    rows.retain(|row| filter.accepts(&row.namespace, &row.name, &row.protocol));
    Ok(rows)
}

/// The rows of [`backends`].
pub fn backend_rows(bpf_dir: &Path, filter: &Filter) -> Result<Vec<BackendRow>, InspectError> {
    let mut rows = rows::backends(&open(bpf_dir)?)?;
    rows.retain(|row| filter.accepts(&row.namespace, &row.service, &row.protocol));
    Ok(rows)
}

/// The rows of [`connections`].
pub fn connection_rows(bpf_dir: &Path, filter: &Filter) -> Result<Vec<ConnectionRow>, InspectError> {
    let mut rows = rows::connections(&open(bpf_dir)?)?;
    rows.retain(|row| filter.accepts(&row.namespace, &row.service, &row.protocol));
    Ok(rows)
}

fn open(bpf_dir: &Path) -> Result<datapath::tables::BpfTables, InspectError> {
    if !datapath::Pins::new(bpf_dir).maps.exists() {
        return Err(InspectError::NoMaps(bpf_dir.to_owned()));
    }
    Ok(datapath::open_tables(bpf_dir)?)
}
