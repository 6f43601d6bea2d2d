//! The real Prometheus, which scrapes agents and evaluates alert rules and dashboard, and promtool, which checks them. Used by the
//! tests of what the chart carries and by the demo.
//!
//! Prometheus runs in a namespace that reaches the agents, usually the underlay's, and ends with its guard.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::netns::Netns;
use crate::{http, leftovers, process};

/// Version that `cargo xtask setup` builds; `tests/prometheus/go.mod` names the same.
const PROMETHEUS: &str = "prometheus-3.16.0";
/// Between two scrapes, and two evaluations of the rules.
pub const INTERVAL: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(30);

/// An agent to scrape.
pub struct Target {
    /// Its label `instance`: the node's name, as the chart's PodMonitor has it.
    pub instance: String,
    /// Where it serves metrics.
    pub address: SocketAddr,
}

/// A running Prometheus.
pub struct Prometheus {
    netns: Netns,
    address: SocketAddr,
    dir: PathBuf,
    child: Child,
    keep: bool,
}

/// A series with its value at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// An alert whose expression holds.
#[derive(Clone, Debug)]
pub struct Active {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Has it held for as long as the rule asks for?
    pub fires: bool,
}

/// Finds `prometheus` or `promtool`.
pub fn program(name: &str) -> Result<PathBuf> {
    let cache = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/ebpf-proxy");
    let program = Some(cache.join(PROMETHEUS).join(name)).filter(|file| file.is_file());
    program.with_context(|| format!("{name} is missing: run `cargo xtask setup` (it needs Go)"))
}

/// What promtool says to these arguments; an error if it objects.
pub fn promtool(args: &[&str]) -> Result<String> {
    process::run(Command::new(program("promtool")?).args(args))
}

impl Prometheus {
    /// Starts it at `address` of a namespace, with the text of a rule file. With `keep` it outlives this process.
    pub fn start(netns: &Netns, address: SocketAddr, targets: &[Target], rules: &str, keep: bool) -> Result<Self> {
        let program = program("prometheus")?;
        let dir = leftovers::temp_dir("prometheus")?.keep();
        fs::write(dir.join("rules.yaml"), rules)?;
        fs::write(dir.join("prometheus.yaml"), configuration(targets).to_string())?;
        let mut command = netns.command(program);
        command
            .arg(format!("--config.file={}", dir.join("prometheus.yaml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn");
        let log = fs::File::create(dir.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = if keep {
            command.spawn()
        } else {
            process::spawn_bound(command)
        };
        let mut prometheus = Self {
            netns: netns.clone(),
            address,
            child: child.context("starting prometheus")?,
            dir,
            keep,
        };
        if keep {
            leftovers::record_process(&prometheus.dir, prometheus.child.id())?;
        }
        prometheus.wait_ready(targets.len())?;
        Ok(prometheus)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// It answers, and has scraped everybody.
    fn wait_ready(&mut self, targets: usize) -> Result<()> {
        let ready = process::wait_until(START, || {
            let exited = self.child.try_wait().is_ok_and(|status| status.is_some());
            let up = || self.query("sum(up)").ok()?.first().map(|sample| sample.value);
            (exited || up() == Some(targets as f64)).then_some(!exited)
        });
        if ready != Some(true) {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let up = self.query("up");
            bail!("Prometheus does not come up, or not all of its targets: {up:?}; it said\n{log}");
        }
        Ok(())
    }

    /// The series that an expression has now.
    pub fn query(&self, expression: &str) -> Result<Vec<Sample>> {
        let data = self.get(&format!("/api/v1/query?query={}", encoded(expression)))?;
        let series = data["result"].as_array().context("the answer is no vector")?;
        series.iter().map(sample).collect()
    }

    /// Values of a label, as Grafana asks for them to fill a variable.
    pub fn label_values(&self, label: &str, selector: &str) -> Result<Vec<String>> {
        let data = self.get(&format!("/api/v1/label/{label}/values?match[]={}", encoded(selector)))?;
        Ok(serde_json::from_value(data)?)
    }

    /// Alerts whose expression holds now.
    pub fn alerts(&self) -> Result<Vec<Active>> {
        let data = self.get("/api/v1/alerts")?;
        let alerts = data["alerts"].as_array().context("no list of alerts")?;
        let active = |alert: &Value| -> Result<Active> {
            let labels: BTreeMap<String, String> = serde_json::from_value(alert["labels"].clone())?;
            Ok(Active {
                name: labels.get("alertname").cloned().context("an alert has a name")?,
                labels,
                fires: alert["state"] == "firing",
            })
        };
        alerts.iter().map(active).collect()
    }

    /// Names of the rules that have been evaluated, without an error; an error if one had one.
    pub fn evaluated_rules(&self) -> Result<Vec<String>> {
        let data = self.get("/api/v1/rules")?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut evaluated = Vec::new();
        for rule in list(&data["groups"]).iter().flat_map(|group| list(&group["rules"])) {
            let name = rule["name"].as_str().unwrap_or_default();
            ensure!(rule["health"] != "err", "{name}: {}", rule["lastError"]);
            if rule["health"] == "ok" {
                evaluated.push(name.to_owned());
            }
        }
        Ok(evaluated)
    }

    fn get(&self, path: &str) -> Result<Value> {
        let answer = self.netns.run(|| http::get(self.address, path))?;
        let body: Value = serde_json::from_str(&answer.body).with_context(|| answer.body.clone())?;
        ensure!(body["status"] == "success", "{path}: {}", body["error"]);
        Ok(body["data"].clone())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        leftovers::remove_dir_with_mounts(&self.dir);
    }
}

/// JSON, which is YAML.
fn configuration(targets: &[Target]) -> Value {
    let interval = format!("{}s", INTERVAL.as_secs());
    let targets = targets
        .iter()
        .map(|target| json!({"targets": [target.address.to_string()], "labels": {"instance": target.instance}}));
    json!({
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "proxy-agent", "static_configs": targets.collect::<Vec<_>>()}],
    })
}

fn sample(series: &Value) -> Result<Sample> {
    let value = series["value"][1].as_str().context("a sample has a value")?;
    let mut labels: BTreeMap<String, String> = serde_json::from_value(series["metric"].clone())?;
    labels.remove("__name__");
    Ok(Sample {
        labels,
        value: value.parse().with_context(|| format!("{value} is no number"))?,
    })
}

fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            encoded.push(byte.into());
        } else {
            let _infallible = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}
