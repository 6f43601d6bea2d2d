//! Rows as text: aligned columns as kubectl prints them, JSON, or YAML.

use std::fmt::Write;

use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::Value;

use crate::datapath::Difference;
use crate::doctor::{Check, Status};

use super::{BackendRate, BackendRow, ConnectionRow, InspectError, ServiceRate, ServiceRow};

/// How rows are shown (`-o`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Output {
    /// Columns for people.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// An array of objects.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Columns of a kind of row.
pub(crate) trait Columns: Serialize {
    /// Headings; those after `narrow` are shown with `-o wide` only.
    const HEADINGS: &'static [&'static str];
    /// Columns of the plain table.
    const NARROW: usize;
    /// One cell per heading.
    fn cells(&self) -> Vec<String>;
}

pub(crate) fn render<R: Columns>(rows: &[R], output: Output) -> Result<String, InspectError> {
    let columns = match output {
        Output::Json | Output::Yaml => return serialize(&rows, output),
        Output::Table => R::NARROW,
        Output::Wide => R::HEADINGS.len(),
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(R::HEADINGS.iter().take(columns));
    for row in rows {
        table.add_row(row.cells().into_iter().take(columns));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    Ok(table.trim_fmt() + "\n")
}

pub(crate) fn serialize(value: &impl Serialize, output: Output) -> Result<String, InspectError> {
    if output == Output::Yaml {
        return Ok(yaml(&serde_json::to_value(value)?));
    }
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A value as YAML.
pub(crate) fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    text
}

/// Block style for objects and arrays; scalars as JSON writes them, which is YAML too.
fn write_yaml(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let start = text.len();
                write_yaml(item, depth + 1, text);
                // The first line of the item moves up to its dash.
                text.replace_range(start..start + 2 * depth + 2, &format!("{indent}- "));
            }
        }
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                let is_block = match field {
                    Value::Array(items) => !items.is_empty(),
                    Value::Object(fields) => !fields.is_empty(),
                    _ => false,
                };
                let _infallible = write!(text, "{indent}{name}:");
                if is_block {
                    text.push('\n');
                    write_yaml(field, depth + 1, text);
                } else {
                    let _infallible = writeln!(text, " {field}");
                }
            }
        }
        scalar => {
            let _infallible = writeln!(text, "{indent}{scalar}");
        }
    }
}

/// A rate or a number, short: three digits are enough to compare.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 1e9 => (value / 1e9, "G"),
        value if value >= 1e6 => (value / 1e6, "M"),
        value if value >= 1e4 => (value / 1e3, "k"),
        value => (value, ""),
    };
    if value == 0.0 || value >= 100.0 {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}

pub(super) fn or_none(text: &str) -> String {
    if text.is_empty() {
        "<none>".to_owned()
    } else {
        text.to_owned()
    }
}

impl Columns for Check {
    const HEADINGS: &'static [&'static str] = &["STATUS", "CHECK", "FOUND", "REMEDY"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        let status = match self.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        };
        vec![
            status.to_owned(),
            self.check.to_owned(),
            self.found.clone(),
            self.remedy.clone(),
        ]
    }
}

impl Columns for Difference {
    const HEADINGS: &'static [&'static str] = &["KIND", "OBJECT", "PROBLEM", "HELD", "WANTED"];
    const NARROW: usize = 5;

    fn cells(&self) -> Vec<String> {
        let (held, wanted) = (or_none(&self.held), or_none(&self.wanted));
        vec![
            self.kind.to_owned(),
            self.object.clone(),
            self.problem.to_owned(),
            held,
            wanted,
        ]
    }
}

impl Columns for ServiceRow {
    const HEADINGS: &'static [&'static str] = &[
        "NAMESPACE",
        "NAME",
        "PORT",
        "PROTOCOL",
        "FRONTENDS",
        "ENDPOINTS",
        "KEPT",
        "ID",
        "TYPE",
        "POLICY",
        "AFFINITY",
        "GENERATION",
    ];
    const NARROW: usize = 6;

    fn cells(&self) -> Vec<String> {
        let list = |show: &dyn Fn(&super::FrontendRow) -> String| {
            // What stands for undefined ports is nothing to dial; it is in the other formats.
            let dialled = self.frontends.iter().filter(|frontend| frontend.kind != "Undefined");
            let mut shown: Vec<String> = dialled.map(show).collect();
            shown.dedup();
            or_none(&shown.join(","))
        };
        vec![
            or_none(&self.namespace),
            self.name.clone(),
            or_none(&self.port_name),
            self.protocol.clone(),
            list(&|frontend| std::net::SocketAddr::new(frontend.address, frontend.port).to_string()),
            list(&|frontend| frontend.endpoints.to_string()),
            list(&|frontend| frontend.kept.to_string()),
            self.id.to_string(),
            list(&|frontend| frontend.kind.clone()),
            list(&|frontend| if frontend.local { "Local" } else { "Cluster" }.to_owned()),
            list(&|frontend| format!("{}s", frontend.affinity_seconds)),
            list(&|frontend| frontend.generation.to_string()),
        ]
    }
}

impl Columns for BackendRow {
    const HEADINGS: &'static [&'static str] = &[
        "NAMESPACE",
        "SERVICE",
        "PORT",
        "PROTOCOL",
        "ADDRESS",
        "STATE",
        "SET",
        "LOCAL",
        "TERMINATING",
    ];
    const NARROW: usize = 6;

    fn cells(&self) -> Vec<String> {
        vec![
            or_none(&self.namespace),
            self.service.clone(),
            or_none(&self.port_name),
            self.protocol.clone(),
            std::net::SocketAddr::new(self.address, self.port).to_string(),
            self.state.clone(),
            self.set.clone(),
            self.local.to_string(),
            self.terminating.to_string(),
        ]
    }
}

impl Columns for ConnectionRow {
    const HEADINGS: &'static [&'static str] = &[
        "PROTOCOL",
        "CLIENT",
        "FRONTEND",
        "BACKEND",
        "SERVICE",
        "STATE",
        "IDLE",
        "MASQUERADE",
        "PORT",
        "ORIGIN",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        vec![
            self.protocol.clone(),
            self.client.to_string(),
            self.frontend.to_string(),
            self.backend.to_string(),
            format!("{}/{}", self.namespace, self.service),
            self.state.clone(),
            format!("{}s", self.idle_seconds),
            self.masquerade
                .map_or_else(|| "<none>".to_owned(), |source| source.to_string()),
            or_none(&self.port_name),
            self.origin.clone(),
        ]
    }
}

impl Columns for ServiceRate {
    const HEADINGS: &'static [&'static str] = &[
        "NAMESPACE",
        "SERVICE",
        "PORT",
        "PROTOCOL",
        "CONN/S",
        "PKT/S",
        "BYTES/S",
        "REFUSED/S",
        "DROPPED/S",
        "REQUEST-PKT/S",
        "REPLY-PKT/S",
        "REQUEST-BYTES/S",
        "REPLY-BYTES/S",
        "CONNECTIONS",
        "PACKETS",
        "BYTES",
    ];
    const NARROW: usize = 9;

    fn cells(&self) -> Vec<String> {
        vec![
            or_none(&self.namespace),
            self.service.clone(),
            or_none(&self.port_name),
            self.protocol.clone(),
            short(self.connections_per_second),
            short(self.packets_per_second()),
            short(self.bytes_per_second()),
            short(self.refused_per_second),
            short(self.dropped_per_second),
            short(self.request_packets_per_second),
            short(self.reply_packets_per_second),
            short(self.request_bytes_per_second),
            short(self.reply_bytes_per_second),
            short(self.connections as f64),
            short(self.packets as f64),
            short(self.bytes as f64),
        ]
    }
}

impl Columns for BackendRate {
    const HEADINGS: &'static [&'static str] = &[
        "NAMESPACE",
        "SERVICE",
        "PORT",
        "PROTOCOL",
        "ADDRESS",
        "NEW/S",
        "ACTIVE",
        "KNOWN",
    ];
    const NARROW: usize = 8;

    fn cells(&self) -> Vec<String> {
        vec![
            or_none(&self.namespace),
            self.service.clone(),
            or_none(&self.port_name),
            self.protocol.clone(),
            self.address.to_string(),
            short(self.new_per_second),
            self.active.to_string(),
            self.known.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> BackendRow {
        BackendRow {
            namespace: "kube-system".to_owned(),
            service: "kube-dns".to_owned(),
            port_name: String::new(),
            protocol: "UDP".to_owned(),
            set: "cluster".to_owned(),
            address: "fd00::1".parse().unwrap(),
            port: 53,
            state: "selectable".to_owned(),
            local: true,
            terminating: false,
        }
    }

    #[test]
    fn columns_are_aligned() {
        assert_eq!(
            render(&[row()], Output::Table).unwrap(),
            "NAMESPACE     SERVICE    PORT     PROTOCOL   ADDRESS        STATE\n\
             kube-system   kube-dns   <none>   UDP        [fd00::1]:53   selectable\n"
        );
        assert!(render(&[row()], Output::Wide).unwrap().contains("TERMINATING"));
    }

    #[test]
    fn yaml_has_the_fields_of_json() {
        #[derive(Serialize)]
        struct Nested {
            backends: Vec<BackendRow>,
            none: Vec<u32>,
            numbers: Vec<u32>,
        }
        let nested = Nested {
            backends: vec![row()],
            none: Vec::new(),
            numbers: vec![1, 2],
        };
        let text = serialize(&nested, Output::Yaml).unwrap();
        assert!(text.starts_with("backends:\n  - "), "{text}");
        assert!(text.contains("\n    service: \"kube-dns\"\n"), "{text}");
        assert!(text.ends_with("none: []\nnumbers:\n  - 1\n  - 2\n"), "{text}");
        let json: Value = serde_json::from_str(&render(&[row()], Output::Json).unwrap()).unwrap();
        assert_eq!(json[0]["portName"], "");
        assert_eq!(json[0]["address"], "fd00::1");
    }
}
