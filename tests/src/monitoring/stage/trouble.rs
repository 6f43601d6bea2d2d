//! Everything that an alert is about, made to happen, and undone.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_common::addr::Protocol;

use super::objects::{self, SILENT, address};
use super::{FRONTENDS, OPTIONS, REWRITES, Stage, datagrams};
use crate::monitoring::alerts;
use crate::monitoring::table::Findings;
use crate::monitoring::truth::{Truth, number};
use crate::prometheus::{Active, INTERVAL};
use crate::world::ARRIVAL;
use crate::{maps, process};

/// Until an alert fires: the agent looks at its connections every ten seconds.
const SOON: Duration = Duration::from_secs(30);
/// Longer than the alert about slow changes asks for.
const SLOW: Duration = Duration::from_secs(31);
/// Slow changes: more than one in a hundred.
const SLOW_CHANGES: usize = 20;
/// An alert, and the labels for which it fires.
type Expected = (&'static str, &'static [&'static str]);
/// Of what has happened. What node2 has no programs for it does not serve, and what it is not asked it does not answer.
const EVENTS: &[Expected] = &[
    ("EbpfProxyBadObjects", &["Service"]),
    ("EbpfProxyPacketsLost", &["node1 bad_range"]),
    ("EbpfProxyConnectionsForgotten", &["node1 IPv4"]),
    ("EbpfProxyConnectionTableNearlyFull", &["node1 REWRITES4"]),
    ("EbpfProxyNothingAttached", &["node2"]),
];
/// node2's agent is younger than the changes.
const SLOWNESS: &[Expected] = &[("EbpfProxyProgrammingSlow", &["node1"])];
const FULLNESS: &[Expected] = &[
    ("EbpfProxyNotHealthy", &["node1"]),
    ("EbpfProxyChangesWait", &["node1", "node2"]),
    ("EbpfProxyObjectsNotProgrammed", &["node1", "node2"]),
    ("EbpfProxyMapNearlyFull", &["node1 FRONTENDS4", "node2 FRONTENDS4"]),
];
/// Twice what the stage's TCP leaves in the ten seconds between two walks: two entries of ten connections a second.
const COLLECTED_BY_A_WALK: f64 = 400.0;
/// Labels that every alert of a rule has.
const COMMON: [&str; 2] = ["alertname", "severity"];

impl Stage<'_> {
    /// Provokes every alert and says which fire, for whom; then sets right what was wrong.
    pub fn troubled(&mut self) -> Result<Findings> {
        self.cast.manifests.write("bad", &objects::bad())?;
        self.lose_packets()?;
        self.fill_the_connection_table()?;
        self.take_interfaces_away()?;
        self.await_alerts(EVENTS)?;
        self.be_slow()?;
        self.await_alerts(SLOWNESS)?;
        self.cast.manifests.write("many", &objects::too_many(FRONTENDS))?;
        self.await_alerts(FULLNESS)?;
        let mut findings = self.panels(true)?;
        self.tell_alerts(&mut findings)?;
        self.set_right(&mut findings)?;
        Ok(findings)
    }

    /// A frontend that leads nowhere: the programs drop what is sent to it.
    fn lose_packets(&mut self) -> Result<()> {
        let agent = &self.cast.agents[0];
        maps::misdirect_frontend(&agent.bpf_dir(), address("lost"), Protocol::Udp)?;
        let client = self.cast.client;
        let there = |body: Box<dyn FnOnce() + Send>| client.netns.spawn(body);
        self.load
            .repeat("lost", 10, &there, datagrams(client, address("lost"), 4, false));
        Ok(())
    }

    /// More flows than there is room for, to somebody who does not answer.
    fn fill_the_connection_table(&self) -> Result<()> {
        let (backend, _) = self.cast.backends.first().context("there are backends")?;
        let _silent = backend.run(|| UdpSocket::bind((backend.v4, SILENT)))?;
        // Two entries each.
        let ports = 20_000..20_000 + REWRITES / 2 + REWRITES / 8;
        self.cast.client.run(|| {
            for port in ports {
                // Somebody may have the port.
                if let Ok(socket) = UdpSocket::bind(("0.0.0.0", port)) {
                    socket.send_to(b"one", address("mute"))?;
                }
            }
            Ok(())
        })
    }

    fn take_interfaces_away(&mut self) -> Result<()> {
        self.restart_second(&[&OPTIONS[..], &["--interfaces", "none"]].concat())
    }

    fn restart_second(&mut self, options: &[&str]) -> Result<()> {
        let agent = &mut self.cast.agents[1];
        agent.stop();
        agent.set_options(options);
        agent.launch()
    }

    /// Changes that arrive later than they may; those from before an agent's start do not count (S188).
    fn be_slow(&self) -> Result<()> {
        thread::sleep((SLOW + Duration::from_secs(1)).saturating_sub(self.began.elapsed().unwrap_or_default()));
        for change in 0..SLOW_CHANGES {
            let (backend, node) = self.cast.backends[change % self.cast.backends.len()];
            let slow = objects::stamped("slow", backend.v4.into(), node, self.began);
            self.cast.manifests.write("slow", &slow)?;
            let first = &self.cast.agents[0];
            let arrived = process::wait_until(ARRIVAL, || {
                let found = maps::backends(&first.bpf_dir(), address("slow"), Protocol::Udp);
                matches!(found, Ok(Some(backends)) if backends.iter().any(|found| found.ip() == backend.v4))
                    .then_some(())
            });
            arrived.context("a change does not arrive")?;
        }
        Ok(())
    }

    /// Not all have to fire at once: a full connection table is not full any more when what it forgot has been counted.
    fn await_alerts(&mut self, expected: &[Expected]) -> Result<()> {
        let (prometheus, fired) = (self.cast.prometheus, &mut self.fired);
        let all = process::wait_until(SOON, || {
            thread::sleep(INTERVAL / 4);
            let active = prometheus.alerts().unwrap_or_default();
            for active in active.iter().filter(|active| active.fires) {
                fired.entry(active.name.clone()).or_default().insert(whose(active));
            }
            let have = |name: &str| fired.get(name).cloned().unwrap_or_default();
            let each = expected.iter().all(|(name, whose)| have(name).is_superset(&set(whose)));
            each.then_some(())
        });
        all.with_context(|| {
            format!(
                "not all of these fire within {SOON:?}: {expected:?}; what does: {:?}",
                self.fired
            )
        })
    }

    fn tell_alerts(&self, findings: &mut Findings) -> Result<()> {
        let expected: Vec<Expected> = [EVENTS, SLOWNESS, FULLNESS].concat();
        for alert in alerts()? {
            let whose = expected.iter().find(|(name, _)| *name == alert.name);
            let (_, whose) = whose.with_context(|| format!("nothing provokes {}", alert.name))?;
            let found = self.fired.get(&alert.name).cloned().unwrap_or_default();
            let truth = set(whose);
            let text = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
            let is_true = found == truth;
            findings.add([alert.name, "fired for".into(), text(&found), text(&truth)], is_true);
        }
        Ok(())
    }

    /// What can end ends, and the connection table has what went in less what came out.
    fn set_right(&mut self, findings: &mut Findings) -> Result<()> {
        self.load.stop();
        for file in ["bad", "many"] {
            self.cast.manifests.remove(file)?;
        }
        self.restart_second(&OPTIONS)?;
        let over = [
            "EbpfProxyChangesWait",
            "EbpfProxyMapNearlyFull",
            "EbpfProxyNothingAttached",
        ];
        let mut left = Vec::new();
        process::wait_until(SOON, || {
            thread::sleep(INTERVAL / 4);
            let active = self.cast.prometheus.alerts().ok()?;
            left = active
                .into_iter()
                .map(|active| active.name)
                .filter(|name| over.contains(&name.as_str()))
                .collect();
            left.is_empty().then_some(())
        });
        for name in over {
            let is_over = !left.iter().any(|left| left == name);
            let says = if is_over { "silent" } else { "fires" };
            findings.add(
                [name.into(), "afterwards".into(), says.into(), "silent".into()],
                is_over,
            );
        }
        for (family, map) in [("IPv4", "REWRITES4"), ("IPv6", "REWRITES6")] {
            let (mut said, mut truth) = (f64::NAN, Truth::Exactly(0.0));
            process::wait_until(SOON, || {
                thread::sleep(INTERVAL / 4);
                said = self.remaining(family)?;
                let counted = maps::occupancy(&self.cast.agents[0].bpf_dir(), map).ok()?.0 as f64;
                // Ended TCP connections go with one walk or the next, and what is forgotten is behind by what a walk takes out.
                truth = Truth::Between(counted, counted + COLLECTED_BY_A_WALK);
                truth.holds(said).then_some(())
            });
            let cells = [
                "Entries of the connection tables".into(),
                format!("{family}, left at rest"),
                number(said),
                truth.to_string(),
            ];
            findings.add(cells, truth.holds(said));
        }
        Ok(())
    }

    /// What was put into the first node's connection table less what was removed and forgotten.
    fn remaining(&self, family: &str) -> Option<f64> {
        let of = |name: &str| {
            let selector =
                format!("sum(ebpf_proxy_rewrite_entries_{name}_total{{instance=\"node1\", ip_family=\"{family}\"}})");
            Some(self.cast.prometheus.query(&selector).ok()?.first()?.value)
        };
        Some(of("inserted")? - of("removed")? - of("evicted")?)
    }
}

/// The labels of an alert, without those that all have.
fn whose(active: &Active) -> String {
    let labels = active.labels.iter();
    let own = labels.filter(|(label, _)| !COMMON.contains(&label.as_str()));
    own.map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(" ")
}

fn set(whose: &[&str]) -> BTreeSet<String> {
    whose.iter().map(|whose| (*whose).to_owned()).collect()
}
