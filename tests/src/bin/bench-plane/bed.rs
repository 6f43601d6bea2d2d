//! What a size is measured on: a node with two pods, and a stand-in that serves the cluster.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_tests::standin::objects::{self, Size};
use proxy_tests::standin::{Options, StandIn};
use proxy_tests::topology::{GATEWAY, Shape};
use proxy_tests::world::{Setup, World};
use proxy_tests::{echo, topology};

/// The bed of one size.
pub(crate) struct Bed {
    pub(crate) standin: StandIn,
    pub(crate) world: World,
    pub(crate) size: Size,
}

impl Bed {
    pub(crate) fn new(size: Size) -> Result<Self> {
        let shape = Shape {
            nodes: 1,
            ..Default::default()
        };
        let world = World::new(&Setup {
            shape,
            without_agents: true,
            ..Default::default()
        })?;
        let node = &world.topology.node(0).name;
        let standin = StandIn::start(&world.topology.underlay, GATEWAY.into(), node, size, Options::default())?;
        let bed = Self { standin, world, size };
        // Whoever has written all Services serves this one.
        bed.standin.set_endpoints(bed.last(), &[bed.server().v4]);
        Ok(bed)
    }

    /// The Service that a pod is behind.
    pub(crate) fn last(&self) -> u32 {
        self.size.services - 1
    }

    pub(crate) fn node(&self) -> &topology::Host {
        self.world.topology.node(0)
    }

    pub(crate) fn client(&self) -> &topology::Host {
        self.world.topology.pod(0, 0)
    }

    pub(crate) fn server(&self) -> &topology::Host {
        self.world.topology.pod(0, 1)
    }

    /// The endpoints of a Service as they are at first.
    pub(crate) fn endpoints(&self, service: u32) -> Vec<Ipv4Addr> {
        (0..self.size.endpoints)
            .map(|endpoint| objects::endpoint_ip(self.size, service, endpoint))
            .collect()
    }

    /// Does the pod behind the last Service answer at its cluster IP?
    pub(crate) fn answers(&self, service: u32) -> bool {
        let vip = SocketAddr::new(objects::cluster_ip(service).into(), objects::PORT);
        let answer = self.client().run(|| echo::tcp(vip));
        answer.is_ok_and(|answer| answer.server == self.server().name)
    }
}

/// Asks over and over; the moment of the first yes, or `None` after `limit`.
pub(crate) fn first_yes(
    limit: Duration,
    pause: Duration,
    mut question: impl FnMut() -> Result<bool>,
) -> Result<Option<Instant>> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if question()? {
            return Ok(Some(Instant::now()));
        }
        std::thread::sleep(pause);
    }
    Ok(None)
}
