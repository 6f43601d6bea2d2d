//! A small cluster on which every panel of the dashboard and every alert has a value that is known: traffic of all kinds at a steady
//! pace ([`Stage::healthy`]), then everything that an alert is about ([`Stage::troubled`]). Needs two nodes whose agents were started
//! with [`OPTIONS`] and [`Agent::open_metrics`], and Prometheus ([`watch`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use proxy_common::addr::Protocol;

use super::load::{Action, Load};
use super::table::Findings;
use super::{alerts, impatient_rules, instances_query, queries};
use crate::agent::{Agent, METRICS_PORT};
use crate::manifests::Manifests;
use crate::prometheus::{INTERVAL, Prometheus, Target};
use crate::topology::{CLUSTER_CIDR, GATEWAY, Host, Topology};
use crate::world::ARRIVAL;
use crate::{echo, http, maps, process};

mod objects;
mod promises;
mod trouble;

use objects::address;

/// Options of the agents: small tables, so that they can be filled, and short times, so that nobody has to wait.
pub const OPTIONS: [&str; 12] = [
    "--cluster-cidr",
    CLUSTER_CIDR,
    "--frontends-capacity",
    "128",
    "--rewrites-capacity",
    "16384",
    "--sync-period",
    "1s",
    "--conntrack-udp-timeout-stream",
    "3s",
    "--conntrack-udp-timeout",
    "2m",
];
const FRONTENDS: u32 = 128;
const REWRITES: u16 = 16_384;
/// What the rules ask for with `for`, here.
const PATIENCE: Duration = Duration::from_secs(1);
/// In place of Grafana's `$__rate_interval`.
const WINDOW: Duration = Duration::from_secs(20);
/// The same for what happened once and is still to be seen.
const LONG_WINDOW: Duration = Duration::from_secs(120);
const PROMETHEUS_PORT: u16 = 9090;
const HEALTH: &str = "127.0.0.1:10256";

/// Who plays.
pub struct Cast<'a> {
    /// One per node.
    pub agents: &'a mut [Agent],
    /// A pod of the first node that sends.
    pub client: &'a Host,
    /// Pods with an echo server and the names of their nodes, the first node's first.
    pub backends: Vec<(&'a Host, &'a str)>,
    /// What the agents read.
    pub manifests: &'a Manifests,
    /// Who watches.
    pub prometheus: &'a Prometheus,
}

/// The cluster while it is played on.
pub struct Stage<'a> {
    cast: Cast<'a>,
    load: Load,
    /// The longest time until a change of endpoints was in effect on both nodes.
    longest_arrival: Arc<Mutex<Duration>>,
    began: SystemTime,
    /// Alerts that have fired, each for whom.
    fired: BTreeMap<String, BTreeSet<String>>,
}

/// Starts Prometheus in the underlay, with the alert rules, their patience cut down to a second.
pub fn watch(topology: &Topology, keep: bool) -> Result<Prometheus> {
    let targets: Vec<Target> = topology
        .nodes
        .iter()
        .map(|node| Target {
            instance: node.host.name.clone(),
            address: SocketAddr::new(node.host.v4.into(), METRICS_PORT),
        })
        .collect();
    let address = SocketAddr::new(GATEWAY.into(), PROMETHEUS_PORT);
    Prometheus::start(&topology.underlay, address, &targets, &impatient_rules(PATIENCE)?, keep)
}

impl<'a> Stage<'a> {
    /// Creates the Services and starts the traffic.
    pub fn open(cast: Cast<'a>) -> Result<Self> {
        ensure!(cast.agents.len() == 2, "the stage has two nodes");
        cast.manifests.write("stage", &objects::lasting(&cast.backends))?;
        let mut stage = Self {
            cast,
            load: Load::new(),
            longest_arrival: Arc::default(),
            began: SystemTime::now(),
            fired: BTreeMap::new(),
        };
        stage.wait_for_services()?;
        stage.load = Load::new();
        stage.change();
        stage.send();
        stage.ask_for_health();
        Ok(stage)
    }

    fn wait_for_services(&self) -> Result<()> {
        for agent in &*self.cast.agents {
            for (service, endpoints) in [("ranges", 1), ("mute", 1), ("steady6", self.cast.backends.len())] {
                let live = process::wait_until(ARRIVAL, || {
                    let found = maps::backends(&agent.bpf_dir(), address(service), Protocol::Udp);
                    matches!(found, Ok(Some(backends)) if backends.len() == endpoints).then_some(())
                });
                live.with_context(|| format!("{} does not serve {service}; its log:\n{}", agent.node(), agent.log()))?;
            }
        }
        Ok(())
    }

    /// Objects change four times a second.
    fn change(&mut self) {
        let here = |body: Box<dyn FnOnce() + Send>| thread::spawn(body);
        let manifests = self.cast.manifests.clone();
        let mut seconds = 100;
        let settings: Action = Box::new(move || {
            seconds = 201 - seconds;
            manifests.write("changing", &objects::changing(seconds))
        });
        self.load.repeat("service changes", 4, &here, settings);

        let manifests = self.cast.manifests.clone();
        let dirs: Vec<_> = self.cast.agents.iter().map(Agent::bpf_dir).collect();
        let ends = [self.cast.backends.first(), self.cast.backends.last()];
        let mut ends: Vec<_> = ends
            .into_iter()
            .flatten()
            .map(|(host, node)| (host.v4, (*node).to_owned()))
            .collect();
        let longest = self.longest_arrival.clone();
        let endpoints: Action = Box::new(move || {
            ends.reverse();
            let (ip, node) = ends.first().context("there are backends")?;
            let changed = Instant::now();
            manifests.write(
                "moving",
                &objects::stamped("moving", (*ip).into(), node, SystemTime::now()),
            )?;
            let is_live = |dir| {
                let found = maps::backends(dir, address("moving"), Protocol::Udp);
                matches!(found, Ok(Some(backends)) if backends.iter().all(|backend| backend.ip() == *ip))
            };
            let arrived = process::wait_until(ARRIVAL, || dirs.iter().all(|dir| is_live(dir)).then_some(()));
            arrived.context("the endpoint does not arrive")?;
            let mut longest = longest.lock().expect("nothing panics while holding it");
            *longest = longest.max(changed.elapsed());
            Ok(())
        });
        self.load.repeat("endpoint changes", 4, &here, endpoints);
    }

    fn send(&mut self) {
        let client = self.cast.client;
        let there = |body: Box<dyn FnOnce() + Send>| client.netns.spawn(body);
        for (what, per_second, request) in [
            ("steady udp4", 20, echo::udp as fn(SocketAddr) -> echo::Outcome),
            ("steady udp6", 20, echo::udp),
            ("steady tcp4", 10, echo::tcp),
        ] {
            let vip = address(if what.ends_with('6') { "steady6" } else { "steady" });
            let action: Action = Box::new(move || {
                let answer = request(vip);
                answer.map(drop).map_err(|failure| anyhow::anyhow!("{failure}"))
            });
            self.load.repeat(what, per_second, &there, action);
        }
        for what in ["empty", "undefined", "local", "ranges", "moving"] {
            self.load
                .repeat(what, 10, &there, datagrams(client, address(what), 4, false));
        }
        self.load
            .repeat("sized", 10, &there, datagrams(client, address("sized"), 72, true));
    }

    fn ask_for_health(&mut self) {
        let node = self.cast.agents[0].netns().clone();
        let there = |body: Box<dyn FnOnce() + Send>| node.spawn(body);
        for path in ["/healthz", "/livez"] {
            let ask: Action = Box::new(move || http::get(HEALTH.parse()?, path).map(drop));
            self.load.repeat(path, 5, &there, ask);
        }
    }

    /// What everything says while nothing is wrong.
    pub fn healthy(&mut self) -> Result<Findings> {
        // A moment more than the window.
        thread::sleep((WINDOW + 3 * INTERVAL).saturating_sub(self.load.age()));
        let (selector, label) = instances_query()?;
        let offered = self.cast.prometheus.label_values(&label, &selector)?;
        let nodes: Vec<&str> = self.cast.agents.iter().map(Agent::node).collect();
        ensure!(
            offered == nodes,
            "the dashboard offers {offered:?}, and there are {nodes:?}"
        );
        let mut findings = self.panels(false)?;
        let evaluated = self.cast.prometheus.evaluated_rules()?;
        let active = self.cast.prometheus.alerts()?;
        for alert in alerts()? {
            ensure!(evaluated.contains(&alert.name), "{} was not evaluated", alert.name);
            let fires = active.iter().any(|active| active.name == alert.name);
            let says = if fires { "fires" } else { "silent" };
            findings.add([alert.name, "alert".into(), says.into(), "silent".into()], !fires);
        }
        Ok(findings)
    }

    /// Each panel for each node, and for both together with what is true.
    fn panels(&self, troubled: bool) -> Result<Findings> {
        let mut promises = self.promises(troubled)?;
        let window = if troubled { LONG_WINDOW } else { WINDOW };
        let mut findings = Findings::default();
        for query in queries()? {
            // As Grafana writes one value and several.
            for instance in ["node1", "(node1|node2)"] {
                let found = self.cast.prometheus.query(&query.with(instance, window))?;
                ensure!(!found.is_empty(), "{}: {instance} has no {}", query.panel, query.legend);
            }
            let found = self.cast.prometheus.query(&query.with(".*", window))?;
            promises.compare(&query, &found, &mut findings);
        }
        promises.missing(&mut findings);
        Ok(findings)
    }
}

/// Datagrams of a length, from one socket.
fn datagrams(client: &Host, to: SocketAddr, length: usize, answered: bool) -> Action {
    let socket = client.run(|| UdpSocket::bind("0.0.0.0:0"));
    Box::new(move || {
        let socket = socket.as_ref().map_err(|error| anyhow::anyhow!("no socket: {error}"))?;
        socket.send_to(&vec![b'x'; length], to)?;
        if answered {
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut answer = [0; 512];
            if socket.recv(&mut answer)? == 0 {
                bail!("an empty answer");
            }
        }
        Ok(())
    })
}
