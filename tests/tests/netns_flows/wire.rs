//! What the kernel does to a row: real connections, as many as it takes to see every expected server.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxy_tests::echo::{self, Client, Failure};

use super::cluster::Cluster;
use super::expect::Expected;
use super::flow::{Flow, Request, Source};

/// Requests after which a row is given up whose servers did not all answer: one of four is missed with a chance of 10^-10.
const MOST: usize = 80;
/// Requests at least, so that a server that should not answer has its chance.
const LEAST: usize = 4;
/// How long to wait where nothing is to come.
const SILENCE: Duration = Duration::from_millis(250);
/// Silent rows that wait side by side.
const ABREAST: usize = 32;

/// What happened to a row's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    servers: BTreeMap<String, BTreeSet<IpAddr>>,
    failures: BTreeMap<String, usize>,
    /// Answers that came from elsewhere than what was dialled.
    strange_peers: BTreeSet<SocketAddr>,
}

/// How often each outcome was expected, and what was wrong.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    answered: usize,
    refused: usize,
    dropped: usize,
    undefined: usize,
    requests: usize,
    took: Duration,
    pub(crate) wrong: Vec<String>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.answered + self.refused + self.dropped + self.undefined;
        write!(
            f,
            "{rows:5} rows  {:5} answered  {:5} refused  {:5} dropped  {:4} undefined  {:6} requests  {:5.1} s",
            self.answered,
            self.refused,
            self.dropped,
            self.undefined,
            self.requests,
            self.took.as_secs_f32()
        )
    }
}

impl Tally {
    /// Adds another's numbers.
    pub(crate) fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.dropped += other.dropped;
        self.undefined += other.undefined;
        self.requests += other.requests;
        self.took = self.took.max(other.took);
        self.wrong.extend(other.wrong);
    }
}

/// Sends all rows of one source and compares.
pub(crate) fn run(cluster: &Cluster, source: Source, rows: &[(Flow, Expected)]) -> Tally {
    let begin = Instant::now();
    let mut tally = source.run(cluster, || {
        let mut tally = Tally::default();
        let (silent, loud): (Vec<_>, Vec<_>) = rows
            .iter()
            .partition(|(_, expected)| matches!(expected, Expected::Dropped | Expected::Perhaps(_)));
        for (flow, expected) in loud {
            tally.note(flow, expected);
        }
        for rows in silent.chunks(ABREAST) {
            std::thread::scope(|scope| {
                let tallies: Vec<_> = rows
                    .iter()
                    .map(|(flow, expected)| {
                        scope.spawn(move || {
                            let mut tally = Tally::default();
                            tally.note(flow, expected);
                            tally
                        })
                    })
                    .collect();
                tallies.into_iter().for_each(|t| tally.add(t.join().unwrap()));
            });
        }
        tally
    });
    tally.took = begin.elapsed();
    tally
}

impl Tally {
    fn note(&mut self, flow: &Flow, expected: &Expected) {
        let observed = match expected {
            Expected::Answered(servers) => {
                self.answered += 1;
                let mut observed = Observed::default();
                for count in 0..MOST {
                    let all = servers.keys().all(|name| observed.servers.contains_key(name));
                    if count >= LEAST && (all || !observed.failures.is_empty()) {
                        break;
                    }
                    self.requests += 1;
                    observed.add(flow, flow.ask(echo::PATIENCE));
                }
                observed
            }
            // A socket that is not connected is told of no refusal.
            Expected::Refused if flow.request == Request::UdpTo => return,
            Expected::Refused | Expected::Dropped => {
                let patience = if *expected == Expected::Refused {
                    self.refused += 1;
                    echo::PATIENCE
                } else {
                    self.dropped += 1;
                    SILENCE
                };
                self.requests += 1;
                let mut observed = Observed::default();
                observed.add(flow, flow.ask(patience));
                observed
            }
            Expected::Perhaps(_) => {
                self.undefined += 1;
                let mut observed = Observed::default();
                for _ in 0..LEAST {
                    self.requests += 1;
                    observed.add(flow, flow.ask(SILENCE));
                }
                observed
            }
        };
        if let Some(difference) = observed.differs(expected) {
            self.wrong.push(format!("{flow}: {difference}"));
        }
    }
}

impl Flow {
    fn ask(&self, patience: Duration) -> echo::Outcome {
        loop {
            let port = self.source.next_port();
            let client = Client { port, patience };
            let outcome = match self.request {
                Request::Tcp => client.tcp(self.target),
                Request::Udp => client.udp(self.target),
                Request::UdpTo => client.udp_unconnected(self.target),
            };
            // Somebody listens there.
            if outcome != Err(Failure::Other(ErrorKind::AddrInUse)) {
                return outcome;
            }
        }
    }
}

impl Observed {
    fn add(&mut self, flow: &Flow, outcome: echo::Outcome) {
        match outcome {
            Ok(answer) => {
                self.servers
                    .entry(answer.server)
                    .or_default()
                    .insert(answer.client.ip());
                if answer.peer != flow.target {
                    self.strange_peers.insert(answer.peer);
                }
            }
            Err(failure) => *self.failures.entry(failure.to_string()).or_default() += 1,
        }
    }

    /// What is not as expected.
    fn differs(&self, expected: &Expected) -> Option<String> {
        let is_silent = |failure: Failure| self.failures.keys().eq([&failure.to_string()]);
        let seen_rightly = |servers: &BTreeMap<String, BTreeSet<IpAddr>>| {
            let right = |(name, seen): (_, &BTreeSet<_>)| servers.get(name).is_some_and(|s| seen.is_subset(s));
            self.servers.iter().all(right)
        };
        let is_right = match expected {
            Expected::Answered(servers) => {
                self.failures.is_empty() && servers.len() == self.servers.len() && seen_rightly(servers)
            }
            Expected::Refused => self.servers.is_empty() && is_silent(Failure::Refused),
            Expected::Dropped => self.servers.is_empty() && is_silent(Failure::Timeout),
            Expected::Perhaps(servers) => {
                seen_rightly(servers) && (self.failures.is_empty() || is_silent(Failure::Timeout))
            }
        };
        (!is_right || !self.strange_peers.is_empty()).then(|| format!("\n    expected {expected:?}\n    got {self:?}"))
    }
}
