//! Small packets: how many a node forwards in a second of one core, and the same as processor time.

use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_tests::results::{Better, Bound, Case, contender};
use proxy_tests::xdp::{self, Foreign};

use super::traffic::in_turn;
use super::{Builder, than};
use crate::contenders::{Kind, UPLINK};
use crate::flood::Flood;
use crate::site::{Site, Way};
use crate::{Run, Scale};

pub(crate) const CLUSTER_IP: &str = "packets-clusterip";
pub(crate) const NODE_PORT: &str = "packets-nodeport";
pub(crate) const CPU: &str = "packets-cpu";

/// Turns by scale, and their milliseconds.
const ROUNDS: [usize; 3] = [9, 3, 1];
const TURN: [u64; 3] = [400, 200, 50];
const WAYS: [(Way, &str); 2] = [(Way::ClusterIp, CLUSTER_IP), (Way::NodePort, NODE_PORT)];

/// Floods from a pod through a cluster IP, and from outside through a node port to another machine.
pub(crate) struct Packets {
    is_wanted: bool,
    rate: [Builder; 2],
    cpu: Builder,
}

impl Packets {
    pub(crate) fn new(run: &Run) -> Self {
        Self {
            is_wanted: [CLUSTER_IP, NODE_PORT, CPU].iter().any(|case| run.wants(case)),
            rate: [
                Builder::new(
                    CLUSTER_IP,
                    "Small packets from a pod through ClusterIP",
                    "million packets per second of a core",
                    Better::Higher,
                    ABOUT_POD,
                )
                .target(contender::TC, None, than(contender::NFTABLES), Bound::AtLeast(1.0)),
                Builder::new(
                    NODE_PORT,
                    "Small packets from outside through NodePort to another machine",
                    "million packets per second of a core",
                    Better::Higher,
                    ABOUT_NODE_PORT,
                )
                .target(contender::XDP, None, than(contender::NFTABLES), Bound::AtLeast(3.0))
                .target(contender::XDP, None, than(contender::XDP_SWAP), Bound::AtLeast(0.7)),
            ],
            cpu: Builder::new(
                CPU,
                "Processor time of the node for a million small packets from outside through NodePort",
                "s",
                Better::Lower,
                ABOUT_CPU,
            ),
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    pub(crate) fn measure(&mut self, run: &Run, site: &Site) -> Result<()> {
        if !self.is_wanted {
            return Ok(());
        }
        let (rounds, time) = (run.pick(ROUNDS), Duration::from_millis(run.pick(TURN)));
        site.add_remote(run)?;
        for (way, (how, name)) in WAYS.into_iter().enumerate() {
            run.step(&format!("small packets by {how:?}"));
            // The swap stays on its interface until this returns.
            let mut attached = Vec::new();
            let mut floods = Vec::new();
            for contender in &site.contenders {
                let kind = contender.kind;
                let is_in = match how {
                    Way::ClusterIp => !matches!(kind, Kind::Socket | Kind::Xdp | Kind::XdpSwap),
                    Way::NodePort => kind != Kind::Socket,
                };
                if kind == Kind::XdpSwap && is_in {
                    let node = &site.node(contender).netns;
                    attached.push(node.run(|| {
                        let index = xdp::index(UPLINK).context("finding the uplink")?;
                        let attached = Foreign::swap().and_then(|swap| swap.attach(index));
                        attached.context("attaching a program that swaps")
                    })?);
                }
                let flood = is_in.then(|| Flood::new(&site.path(contender, how)));
                floods.push(
                    flood
                        .transpose()
                        .with_context(|| format!("{} by {name}", kind.name()))?,
                );
            }
            in_turn(run, site, rounds, |index| {
                let kind = site.contenders[index].kind;
                let Some(flood) = &floods[index] else { return };
                let _others_wait = site.alone(index);
                match flood.run(time) {
                    Ok(flooded) => {
                        let each = flooded.node as f64 / flooded.packets as f64;
                        self.rate[way].add(kind.name(), None, 1e3 / each);
                        if how == Way::NodePort {
                            self.cpu.add(kind.name(), None, each / 1e3);
                        }
                        if run.scale == Scale::Quick {
                            let offered = flooded.packets as f64 / flooded.elapsed.as_secs_f64() / 1e6;
                            run.step(&format!(
                                "{}: {each:.0} ns, {offered:.2} million/s arrived",
                                kind.name()
                            ));
                        }
                    }
                    Err(error) => self.rate[way].say(kind.name(), None, &format!("{error:#}")),
                }
            })?;
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<Case> {
        let [cluster, node] = self.rate;
        [cluster, node, self.cpu]
            .into_iter()
            .filter_map(Builder::finish)
            .collect()
    }
}

const ABOUT_POD: &str = "UDP in frames of 60 bytes, from 256 ports of one pod to another pod of the same node. The source puts ready frames \
    into the pod's interface, as many as the node takes; all that the node does happens in one thread of the kernel on a core of its own: \
    the driver's receive function, making a packet buffer, the proxy, routing, and handing over to the other pod's interface, where a sink \
    counts. Counted are the packets that arrive, for each second that this thread has run. So the ratio includes the kernel's \
    forwarding, which is the same for everybody, but neither source nor sink.";
const ABOUT_NODE_PORT: &str = "The same from a host outside, through the node's uplink, to a pod of another machine, so that packets leave \
    by the interface they came from. The source address is replaced too, but for those without a proxy. `XDP swap` is a program that only \
    swaps addresses and sends the packet back: what the driver and its test harness cost.";
const ABOUT_CPU: &str = "The same measurement the other way round.";
