//! New connections: how many a second, and how long each takes.

use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::results::{Against, Better, Bound, Case, contender};
use proxy_tests::stats::quantile;

use super::traffic::in_turn;
use super::{Builder, than, than_direct};
use crate::Run;
use crate::contenders::Kind;
use crate::load::{self, Dialled};
use crate::machine::cores;
use crate::site::{Site, Way};

pub(crate) const RATE_CLUSTER_IP: &str = "connections-clusterip";
pub(crate) const RATE_NODE_PORT: &str = "connections-nodeport";
pub(crate) const MEDIAN_CLUSTER_IP: &str = "latency-clusterip";
pub(crate) const TAIL_CLUSTER_IP: &str = "latency-clusterip-p99";
pub(crate) const MEDIAN_NODE_PORT: &str = "latency-nodeport";
pub(crate) const TAIL_NODE_PORT: &str = "latency-nodeport-p99";
pub(crate) const FIRST_PACKET: &str = "first-packet";

/// Turns of each contender at each size, by scale, and how many milliseconds one is.
const ROUNDS: [usize; 3] = [11, 3, 1];
const TURN: [u64; 3] = [350, 200, 50];

/// Connections from a pod through a cluster IP, and from outside through a node port.
pub(crate) struct Connections {
    rounds: usize,
    turn: Duration,
    is_wanted: [bool; 2],
    rate: [Builder; 2],
    median: [Builder; 2],
    tail: [Builder; 2],
    first: Builder,
}

/// What a turn came to.
struct Turn {
    rate: f64,
    /// Microseconds.
    median: f64,
    tail: f64,
    connect: f64,
}

const WAYS: [Way; 2] = [Way::ClusterIp, Way::NodePort];

impl Connections {
    pub(crate) fn new(run: &Run) -> Self {
        let wants = |cases: &[&str]| cases.iter().any(|case| run.wants(case));
        let text = |what: &str, unit, better, names: [&str; 2], about: &str| {
            let titles = ["from a pod through ClusterIP", "from outside through NodePort"];
            [0, 1].map(|way| {
                Builder::new(names[way], &format!("{what} {}", titles[way]), unit, better, about).axis("Services")
            })
        };
        let [cluster, node] = text(
            "New connections",
            "1/s",
            Better::Higher,
            [RATE_CLUSTER_IP, RATE_NODE_PORT],
            RATE,
        );
        Self {
            rounds: run.pick(ROUNDS),
            turn: Duration::from_millis(run.pick(TURN)),
            is_wanted: [
                wants(&[RATE_CLUSTER_IP, MEDIAN_CLUSTER_IP, TAIL_CLUSTER_IP, FIRST_PACKET]),
                wants(&[RATE_NODE_PORT, MEDIAN_NODE_PORT, TAIL_NODE_PORT]),
            ],
            rate: [
                cluster
                    .target(contender::SOCKET, None, than_direct(), Bound::AtLeast(0.98))
                    .target(
                        contender::SOCKET,
                        None,
                        Against::SizeBeside(1, contender::DIRECT.to_owned()),
                        Bound::Around(0.03),
                    )
                    .target(contender::TC, Some(1), than(contender::NFTABLES), Bound::AtLeast(1.2))
                    .target(contender::TC, Some(1), than(contender::IPTABLES), Bound::AtLeast(1.2)),
                node,
            ],
            median: text(
                "Latency of a connection, median,",
                "µs",
                Better::Lower,
                [MEDIAN_CLUSTER_IP, MEDIAN_NODE_PORT],
                MEDIAN,
            ),
            tail: text(
                "Latency of a connection, 99th percentile,",
                "µs",
                Better::Lower,
                [TAIL_CLUSTER_IP, TAIL_NODE_PORT],
                TAIL,
            ),
            first: Builder::new(
                FIRST_PACKET,
                "What the first packet costs, from a pod through ClusterIP",
                "µs",
                Better::Lower,
                FIRST,
            )
            .axis("Services")
            .target(contender::TC, None, than(contender::NFTABLES), Bound::AtMost(0.5)),
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted.contains(&true)
    }

    pub(crate) fn measure(&mut self, run: &Run, site: &Site, size: u32) -> Result<()> {
        let at = Some(u64::from(size));
        for (way, how) in WAYS.into_iter().enumerate() {
            if !self.is_wanted[way] {
                continue;
            }
            run.step(&format!("new connections by {how:?}, {size} Services"));
            let mut direct = None;
            let mut connects: Vec<(Kind, usize, f64)> = Vec::new();
            let mut taken = vec![0; site.contenders.len()];
            let (rounds, turn) = (self.rounds, self.turn);
            in_turn(run, site, rounds, |index| {
                let one = &site.contenders[index];
                if one.kind == Kind::XdpSwap || (how == Way::ClusterIp && one.kind == Kind::Xdp) {
                    return;
                }
                let name = one.kind.name();
                if let Some(why) = &one.out {
                    self.say(way, name, at, why);
                    return;
                }
                match connect(site, index, how, turn) {
                    Ok(turn) => {
                        self.rate[way].add(name, at, turn.rate);
                        self.median[way].add(name, at, turn.median);
                        self.tail[way].add(name, at, turn.tail);
                        if one.kind == Kind::Direct {
                            direct = Some(index);
                        }
                        connects.push((one.kind, taken[index], turn.connect));
                        taken[index] += 1;
                    }
                    Err(error) => self.say(way, name, at, &format!("{error:#}")),
                }
            })?;
            if how == Way::ClusterIp && direct.is_some() {
                self.add_first(&connects, at);
            }
        }
        Ok(())
    }

    fn say(&mut self, way: usize, name: &str, at: Option<u64>, why: &str) {
        for builder in [&mut self.rate[way], &mut self.median[way], &mut self.tail[way]] {
            builder.say(name, at, why);
        }
        if way == 0 {
            self.first.say(name, at, why);
        }
    }

    /// What the other contenders take longer for `connect` than the one without a proxy, round by round.
    fn add_first(&mut self, connects: &[(Kind, usize, f64)], at: Option<u64>) {
        for (kind, round, time) in connects.iter().filter(|(kind, ..)| *kind != Kind::Direct) {
            let direct = connects
                .iter()
                .find(|(other, turn, _)| *other == Kind::Direct && turn == round);
            if let Some((_, _, direct)) = direct {
                self.first.add(kind.name(), at, time - direct);
            }
        }
    }

    pub(crate) fn finish(self) -> Vec<Case> {
        let pairs = [self.rate, self.median, self.tail].into_iter().flatten();
        pairs.chain([self.first]).filter_map(Builder::finish).collect()
    }
}

/// A client and a server thread on every core, for so long.
fn connect(site: &Site, index: usize, way: Way, time: Duration) -> Result<Turn> {
    let contender = &site.contenders[index];
    let _others_wait = site.alone(index);
    site.forget_connections(contender)?;
    let targets = site.targets(contender, way);
    let client = site.client(contender, way);
    let spawn = |body: Box<dyn FnOnce() -> Result<Dialled> + Send>| match way {
        Way::ClusterIp => contender.proxy.spawn_in_pod(client, body),
        Way::NodePort => client.spawn(body),
    };
    let dialled = load::all_at_once(cores(), spawn, move |core, start| {
        load::dial(&targets, core, &start, time)
    })?;
    let mut all = Dialled::default();
    dialled.into_iter().for_each(|one| all.add(one));
    ensure!(
        all.failed == 0,
        "{} of {} connections failed",
        all.failed,
        all.wholes.len() as u64 + all.failed
    );
    ensure!(!all.wholes.is_empty(), "not one connection came to its end");
    let microseconds = |samples: &[u32], share| f64::from(quantile(samples, share)) / 1e3;
    Ok(Turn {
        rate: all.rate,
        median: microseconds(&all.wholes, 0.5),
        tail: microseconds(&all.wholes, 0.99),
        connect: microseconds(&all.connects, 0.5),
    })
}

const RATE: &str = "Connect, send 32 bytes, read the answer of 64 bytes and the end of the stream, close; the server closes first. \
    On each core one client and the server's thread for it take turns, so the rate says how much processor time a connection takes in \
    all: the client's and the server's system calls, two network stacks and the way between them, which are the same for everybody, and \
    the proxy, whose share is what the ratio shows. With more than one Service, 64 of them, spread over all, are dialled in turn; a node \
    port is always that of the first Service.";
const MEDIAN: &str = "From before `socket` until after `close`, of the connections of the rate above.";
const TAIL: &str = "The same, exceeded by one connection in a hundred. It holds what the machine does beside.";
const FIRST: &str = "How much longer `connect` takes at the median than without a proxy: the first packet there and the first one back, \
    the lookup of the Service, the choice of a backend, and the making of whatever remembers the connection.";
