//! The alert rules and the dashboard of the chart as expressions, and a stage ([`stage`]) on which each of them has a value that is
//! known: used by the tests of what the chart carries and by the demo.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::helm::deploy;

mod load;
pub mod stage;
mod table;
mod truth;

/// A rule.
#[derive(Clone, Debug)]
pub struct Alert {
    /// Its name.
    pub name: String,
    /// Its expression.
    pub expression: String,
}

/// A line, or lines, of a panel.
#[derive(Clone, Debug)]
pub struct Query {
    /// Title of the panel.
    pub panel: String,
    /// What its lines are called; labels in double braces.
    pub legend: String,
    /// Its expression, with Grafana's variables.
    pub expression: String,
}

/// The file of the rules.
pub fn rules_file() -> PathBuf {
    deploy("chart/ebpf-proxy/monitoring/rules.yaml").into()
}

fn rules() -> Result<Value> {
    Ok(serde_saphyr::from_str(&fs::read_to_string(rules_file())?)?)
}

fn dashboard() -> Result<Value> {
    let text = fs::read_to_string(deploy("chart/ebpf-proxy/monitoring/dashboard.json"))?;
    Ok(serde_json::from_str(&text)?)
}

/// All alerts, in the order of the file.
pub fn alerts() -> Result<Vec<Alert>> {
    let rules = rules()?;
    let groups = list(&rules["groups"])?;
    let mut alerts = Vec::new();
    for group in groups {
        for rule in list(&group["rules"])? {
            alerts.push(Alert {
                name: text(&rule["alert"])?,
                expression: text(&rule["expr"])?,
            });
        }
    }
    Ok(alerts)
}

/// The expressions of all panels, in the order of the dashboard.
pub fn queries() -> Result<Vec<Query>> {
    let dashboard = dashboard()?;
    let mut queries = Vec::new();
    for panel in list(&dashboard["panels"])? {
        for target in list(&panel["targets"])? {
            queries.push(Query {
                panel: text(&panel["title"])?,
                legend: text(&target["legendFormat"])?,
                expression: text(&target["expr"])?,
            });
        }
    }
    Ok(queries)
}

/// The query that fills the dashboard's variable `instance`: a selector, and the label whose values are offered.
pub fn instances_query() -> Result<(String, String)> {
    let dashboard = dashboard()?;
    let variables = list(&dashboard["templating"]["list"])?;
    let variable = variables.iter().find(|variable| variable["name"] == "instance");
    let query = text(&variable.context("the dashboard has a variable instance")?["query"]["query"])?;
    let arguments = query
        .strip_prefix("label_values(")
        .and_then(|rest| rest.strip_suffix(')'))
        .and_then(|arguments| arguments.rsplit_once(", "));
    let (selector, label) = arguments.with_context(|| format!("{query} asks for the values of a label"))?;
    Ok((selector.to_owned(), label.to_owned()))
}

/// The rules with every `for` cut down, for those who cannot wait for minutes.
pub fn impatient_rules(patience: Duration) -> Result<String> {
    let mut rules = rules()?;
    let groups = rules["groups"].as_array_mut().context("the file has groups")?;
    for rule in groups
        .iter_mut()
        .filter_map(|group| group["rules"].as_array_mut())
        .flatten()
    {
        if !rule["for"].is_null() {
            rule["for"] = json!(format!("{}s", patience.as_secs()));
        }
    }
    Ok(rules.to_string())
}

impl Query {
    /// The expression with values in place of Grafana's variables. `instance` is `.*` for "All", or names in Grafana's way:
    /// `node1`, `(node1|node2)`.
    pub fn with(&self, instance: &str, rate_interval: Duration) -> String {
        self.expression
            .replace("$__rate_interval", &format!("{}s", rate_interval.as_secs()))
            .replace("$instance", instance)
    }

    /// What a line with these labels is called.
    pub fn line(&self, labels: &BTreeMap<String, String>) -> String {
        labels.iter().fold(self.legend.clone(), |text, (label, value)| {
            text.replace(&format!("{{{{{label}}}}}"), value)
        })
    }
}

fn list(value: &Value) -> Result<Vec<Value>> {
    value.as_array().cloned().with_context(|| format!("{value} is no list"))
}

fn text(value: &Value) -> Result<String> {
    let text = value.as_str().with_context(|| format!("{value} is no text"))?;
    Ok(text.to_owned())
}
