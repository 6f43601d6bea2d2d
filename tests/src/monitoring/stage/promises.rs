//! What every line of the dashboard has to say: known from what was sent and written, and from the kernel.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{REWRITES, Stage, WINDOW};
use crate::agent::Agent;
use crate::monitoring::Query;
use crate::monitoring::table::Findings;
use crate::monitoring::truth::{Truth, number};
use crate::prometheus::Sample;
use crate::{attached, maps};

/// Maps that the kernel can count.
const COUNTABLE: [&str; 7] = [
    "FRONTENDS4",
    "FRONTENDS6",
    "SRC_RANGES4",
    "SERVICES",
    "LINKS",
    "NODE_ADDRS4",
    "NODE_ADDRS6",
];
/// Programs at the sockets of a node.
const AT_SOCKETS: usize = 8;

/// Truths by panel and line.
#[derive(Default)]
pub(super) struct Promises {
    truths: BTreeMap<(String, String), Truth>,
    /// What is true of a line without a truth; without, it is left out.
    others: Option<Truth>,
    seen: Vec<(String, String)>,
}

impl Promises {
    fn set(&mut self, panel: &str, line: &str, truth: Truth) {
        self.truths.insert((panel.to_owned(), line.to_owned()), truth);
    }

    /// Holds what was found against what is true.
    pub(super) fn compare(&mut self, query: &Query, found: &[Sample], findings: &mut Findings) {
        for sample in found {
            let line = (query.panel.clone(), query.line(&sample.labels));
            if let Some(truth) = self.truths.get(&line).copied().or(self.others) {
                let cells = [line.0.clone(), line.1.clone(), number(sample.value), truth.to_string()];
                findings.add(cells, truth.holds(sample.value));
            }
            self.seen.push(line);
        }
    }

    /// Lines that have a truth and were not found.
    pub(super) fn missing(self, findings: &mut Findings) {
        for (line, truth) in self.truths.into_iter().filter(|(line, _)| !self.seen.contains(line)) {
            findings.add([line.0, line.1, "nothing".into(), truth.to_string()], false);
        }
    }
}

impl Stage<'_> {
    pub(super) fn promises(&self, troubled: bool) -> Result<Promises> {
        let mut promises = Promises::default();
        if troubled {
            self.trouble_shows(&mut promises);
            return Ok(promises);
        }
        promises.others = Some(Truth::Exactly(0.0));
        self.changes(&mut promises)?;
        self.maps(&mut promises)?;
        self.connections(&mut promises)?;
        self.services(&mut promises)?;
        for reason in [
            "no_endpoints",
            "undefined_port",
            "no_local_endpoints",
            "source_not_allowed",
        ] {
            promises.set("Not served", reason, self.about(sent_for(reason), 1)?);
        }
        promises.set("Health answers", "healthz 200", self.about("/healthz", 1)?);
        promises.set("Health answers", "livez 200", self.about("/livez", 1)?);
        promises.set(
            "Service ports without an endpoint here",
            "internal IPv4",
            Truth::Exactly(1.0),
        );
        Ok(promises)
    }

    /// So many for each time that something was done.
    fn about(&self, what: &'static str, each: u32) -> Result<Truth> {
        Ok(Truth::About(self.load.rate(what, WINDOW)? * f64::from(each)))
    }

    fn changes(&self, promises: &mut Promises) -> Result<()> {
        let longest = *self.longest_arrival.lock().expect("nothing panics while holding it");
        // The first bucket of kube-proxy's ends at 0.25 s; a quantile may lie anywhere in its bucket.
        let within = Truth::Between(0.0, longest.as_secs_f64().max(0.125) * 2.0);
        for panel in ["Endpoint change to effect", "Time to apply changes"] {
            for line in ["p50", "p99"] {
                promises.set(panel, line, within);
            }
        }
        // Both nodes apply each.
        promises.set("Changes applied", "endpoints IPv4", self.about("endpoint changes", 2)?);
        promises.set("Changes applied", "services IPv4", self.about("service changes", 2)?);
        let since = self.load.since("endpoint changes").unwrap_or_default().as_secs_f64();
        for agent in &*self.cast.agents {
            // Those that came in just before the scrape.
            promises.set("Changes that wait", agent.node(), Truth::Between(0.0, 2.0));
            // The scrape is not older than two intervals.
            let panel = "Since changes were last applied";
            promises.set(panel, agent.node(), Truth::Between(0.0, since + 2.5));
        }
        Ok(())
    }

    fn maps(&self, promises: &mut Promises) -> Result<()> {
        for name in COUNTABLE {
            let mut fullest = 0.0_f64;
            for agent in &*self.cast.agents {
                let (entries, room) = maps::occupancy(&agent.bpf_dir(), name)?;
                fullest = fullest.max(entries as f64 / f64::from(room));
            }
            promises.set("Map usage", name, Truth::Exactly(fullest));
        }
        // Backends are slots of an array; connections are counted every ten seconds.
        for name in ["BACKENDS4", "BACKENDS6", "REWRITES4", "REWRITES6"] {
            promises.set("Map usage", name, Truth::Between(1e-6, 0.5));
        }
        let mut interfaces = 0;
        for agent in &*self.cast.agents {
            interfaces += attached::programs(agent.netns())?.len();
        }
        let at_sockets = AT_SOCKETS * self.cast.agents.len();
        promises.set("Programs attached", "interface", Truth::Exactly(interfaces as f64));
        promises.set("Programs attached", "cgroup", Truth::Exactly(at_sockets as f64));
        Ok(())
    }

    fn connections(&self, promises: &mut Promises) -> Result<()> {
        let rate = |what| self.load.rate(what, WINDOW);
        let moves = rate("endpoint changes")?;
        let opened = [
            rate("steady udp4")? + rate("steady tcp4")? + moves,
            rate("steady udp6")?,
        ];
        let panel = "Connection entries";
        // A flow that was moved is another one, and the agent removes the former.
        promises.set(panel, "UDP flows moved per second", Truth::About(moves));
        // The agent walks every ten seconds and collects what has been silent for three: one or two walks are in the window.
        let collected = 2.0 * (rate("steady udp4")? + rate("steady udp6")?);
        promises.set(
            panel,
            "collected per second",
            Truth::Between(0.2 * collected, 1.5 * collected),
        );
        for (index, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let map = format!("REWRITES{}", if index == 0 { 4 } else { 6 });
            promises.set(panel, &map, Truth::Between(1.0, f64::from(REWRITES) / 2.0));
            let entries = 2.0 * opened[index];
            let panel = "Entries of the connection tables";
            promises.set(panel, &format!("{family} inserted"), Truth::About(entries));
            let line = format!("{family} removed by agent");
            promises.set(panel, &line, Truth::Between(0.1 * entries, 1.5 * entries));
            let line = format!("{family} removed by program");
            promises.set(panel, &line, Truth::Between(0.0, 0.1 * entries));
        }
        Ok(())
    }

    fn services(&self, promises: &mut Promises) -> Result<()> {
        let rate = |what| self.load.rate(what, WINDOW);
        let (udp4, udp6, tcp4) = (rate("steady udp4")?, rate("steady udp6")?, rate("steady tcp4")?);
        let panel = "Connections of services";
        promises.set(panel, "default/steady", Truth::About(udp4 + udp6 + tcp4));
        promises.set(panel, "default/moving", self.about("endpoint changes", 1)?);
        let panel = "Traffic of services";
        promises.set(panel, "default/sized request", self.about("sized", 28 + 72)?);
        promises.set(panel, "default/moving request", self.about("moving", 28 + 4)?);
        // Answers name pods and addresses; TCP acknowledges as it likes.
        promises.set(
            panel,
            "default/sized reply",
            Truth::Between(110.0 * rate("sized")?, 200.0 * rate("sized")?),
        );
        promises.set(
            panel,
            "default/moving reply",
            Truth::Between(42.0 * rate("moving")?, 132.0 * rate("moving")?),
        );
        for (line, datagram) in [("default/steady request", 0.0), ("default/steady reply", 10.0)] {
            let least = udp4 * (30.0 + datagram) + udp6 * (50.0 + datagram) + tcp4 * 200.0;
            let most = udp4 * (30.0 + 10.0 * datagram) + udp6 * (50.0 + 10.0 * datagram) + tcp4 * 600.0;
            promises.set(panel, line, Truth::Between(least, most));
        }
        let panel = "Services that refuse or drop";
        promises.set(panel, "default/empty refused", self.about("empty", 1)?);
        promises.set(panel, "default/steady refused", self.about("undefined", 1)?);
        promises.set(panel, "default/local dropped: policy", self.about("local", 1)?);
        promises.set(panel, "default/ranges dropped: policy", self.about("ranges", 1)?);
        Ok(())
    }

    /// What was provoked is to be seen.
    fn trouble_shows(&self, promises: &mut Promises) {
        promises.set("Not served", "bad_range", Truth::Some);
        promises.set(
            "Services that refuse or drop",
            "default/lost dropped: failure",
            Truth::Some,
        );
        promises.set("Failures", "bad Service", Truth::Some);
        promises.set("Entries of the connection tables", "IPv4 forgotten", Truth::Some);
        promises.set("Health answers", "livez 503", Truth::Some);
        promises.set("Health answers", "healthz 503", Truth::Some);
        promises.set("Map usage", "FRONTENDS4", Truth::Exactly(1.0));
        // It was full, and has been looked through since.
        promises.set("Map usage", "REWRITES4", Truth::Between(0.3, 1.0));
        for agent in &*self.cast.agents {
            promises.set("Failures", &format!("not programmed {}", agent.node()), Truth::Some);
            promises.set("Changes that wait", agent.node(), Truth::Some);
        }
        let first = self.cast.agents.first().map(Agent::netns);
        let interfaces = first
            .and_then(|netns| attached::programs(netns).ok())
            .unwrap_or_default()
            .len();
        promises.set("Programs attached", "interface", Truth::Exactly(interfaces as f64));
    }
}

/// What is sent to be refused or dropped for this reason.
fn sent_for(reason: &str) -> &'static str {
    match reason {
        "no_endpoints" => "empty",
        "undefined_port" => "undefined",
        "no_local_endpoints" => "local",
        _ => "ranges",
    }
}
