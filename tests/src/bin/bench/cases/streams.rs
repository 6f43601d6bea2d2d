//! Streams: bytes per second over one connection and over many.

use std::time::Duration;

use anyhow::Result;
use proxy_tests::results::{Better, Bound, Case, contender};

use super::traffic::in_turn;
use super::{Builder, than_direct};
use crate::Run;
use crate::contenders::Kind;
use crate::load;
use crate::machine::cores;
use crate::site::{Site, Way};

pub(crate) const CLUSTER_IP: &str = "stream-clusterip";
pub(crate) const NODE_PORT: &str = "stream-nodeport";

const CONNECTIONS: [u64; 2] = [1, 16];
/// Turns by scale, and their milliseconds.
const ROUNDS: [usize; 3] = [9, 3, 1];
const TURN: [u64; 3] = [500, 250, 100];
const WAYS: [(Way, &str); 2] = [(Way::ClusterIp, CLUSTER_IP), (Way::NodePort, NODE_PORT)];

/// Streams from a pod through a cluster IP, and from outside through a node port.
pub(crate) struct Streams([Builder; 2]);

impl Streams {
    pub(crate) fn new() -> Self {
        let builder = |name, title, paths: &[&str]| {
            let builder = Builder::new(name, title, "Gbit/s", Better::Higher, ABOUT).axis("connections");
            paths.iter().fold(builder, |builder, path| {
                builder.target(path, None, than_direct(), Bound::AtLeast(0.97))
            })
        };
        Self([
            builder(
                CLUSTER_IP,
                "Streams from a pod through ClusterIP",
                &[contender::SOCKET, contender::TC],
            ),
            builder(NODE_PORT, "Streams from outside through NodePort", &[contender::TC]),
        ])
    }

    pub(crate) fn measure(&mut self, run: &Run, site: &Site) -> Result<()> {
        let (rounds, time) = (run.pick(ROUNDS), Duration::from_millis(run.pick(TURN)));
        for (builder, (way, name)) in self.0.iter_mut().zip(WAYS) {
            for count in CONNECTIONS.into_iter().filter(|_| run.wants(name)) {
                run.step(&format!("streams by {way:?}, {count} at once"));
                in_turn(run, site, rounds, |index| {
                    let kind = site.contenders[index].kind;
                    if kind == Kind::XdpSwap || (way == Way::ClusterIp && kind == Kind::Xdp) {
                        return;
                    }
                    match stream(site, index, way, count as usize, time) {
                        Ok(rate) => builder.add(kind.name(), Some(count), rate),
                        Err(error) => builder.say(kind.name(), Some(count), &format!("{error:#}")),
                    }
                })?;
            }
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<Case> {
        self.0.into_iter().filter_map(Builder::finish).collect()
    }
}

/// Gigabits per second of so many connections together.
fn stream(site: &Site, index: usize, way: Way, count: usize, time: Duration) -> Result<f64> {
    let contender = &site.contenders[index];
    let _others_wait = site.alone(index);
    let target = site.targets(contender, way)[0];
    let client = site.client(contender, way);
    let spawn = |body: Box<dyn FnOnce() -> Result<f64> + Send>| match way {
        Way::ClusterIp => contender.proxy.spawn_in_pod(client, body),
        Way::NodePort => client.spawn(body),
    };
    let rates = load::all_at_once(count, spawn, move |number, start| {
        load::stream(target, number % cores(), &start, time)
    })?;
    Ok(rates.into_iter().sum::<f64>() * 8.0 / 1e9)
}

const ABOUT: &str = "Writes of 128 KiB, as fast as they go, one way; the reader of a connection has another core than its writer. The \
    kernel hands segments of up to 64 KiB from one namespace to the next without copying; so this is mostly the two copies between \
    processes and the kernel, which are the same for everybody. A veth with an XDP program takes no such large segments, unlike a real card, \
    which goes on to merge and to split; so the row with XDP is about veths.";
