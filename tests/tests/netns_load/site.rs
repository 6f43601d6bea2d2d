//! The cluster under load, and the bookkeeping of steps: what may answer during and after a change, what happened, the table.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use proxy_common::addr::Protocol;
use proxy_tests::echo::EchoServer;
use proxy_tests::load::{Client, Flows, HELD_TCP, HELD_UDP, Load, Path, RATE, Rules, Totals};
use proxy_tests::maps;
use proxy_tests::process::wait_until;
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{ARRIVAL, CLUSTER_IPS, Setup, World};

use crate::objects::{self, Backend, LB, MANY, MANY_PORT, MARKER, NODE_PORT, Objects, TURN};

pub(crate) const OPTIONS: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// Until UDP flows have moved that existed before a change.
const SETTLE: Duration = Duration::from_millis(250);
/// The load must be what it claims to be. Less only where the machine itself cannot begin that many.
const TOLERANCE: f64 = 0.95;
const FIRST_VERSION: u16 = 2000;

pub(crate) struct Site {
    pub(crate) load: Load,
    pub(crate) world: World,
    pub(crate) objects: Objects,
    paths: Vec<Path>,
    rules: Rules,
    version: u16,
    table: Table,
    forbidden: usize,
}

impl Site {
    /// Two nodes with four pods each: one is the client, one serves a thousand addresses, four serve `web`, two are spare.
    pub(crate) fn new() -> Self {
        let shape = Shape {
            pods_per_node: 4,
            external: true,
            ..Shape::default()
        };
        let mut world = World::new(&Setup {
            shape,
            options: OPTIONS.to_vec(),
            ..Setup::default()
        })
        .unwrap();
        world.topology.give_network(1, 3).unwrap();
        let any = [SocketAddr::new([0u16; 8].into(), MANY_PORT)];
        let many = EchoServer::start(&world.topology.pod(1, 3).netns, "many", &any).unwrap();
        world.servers.push(many);
        route_outside(&world);
        let chosen = [(0, 1), (0, 2), (1, 0), (1, 1)];
        let backends = chosen.map(|(node, pod)| Backend::new(world.topology.pod(node, pod), node));
        let nodes = [world.topology.node(0), world.topology.node(1)];
        let objects = Objects::new(backends.into(), nodes);
        world.write("many", &objects::many(0).0).unwrap();
        world.write("site", &objects.values(FIRST_VERSION)).unwrap();
        wait_version(&world, FIRST_VERSION);
        wait_many(&world, 0);

        let clients = clients(&world);
        let paths: Vec<Path> = clients.iter().flat_map(|client| client.paths.clone()).collect();
        let rules = objects.rules(&paths);
        let load = Load::start(clients, rules.clone());
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header([
            "step", "seconds", "new", "messages", "failed", "allowed", "TCP held", "UDP held",
        ]);
        let mut site = Self {
            load,
            world,
            objects,
            paths,
            rules,
            version: FIRST_VERSION,
            table,
            forbidden: 0,
        };
        site.act("nothing changes", |_| {});
        site
    }

    /// A step that changes objects.
    pub(crate) fn change(&mut self, step: &str, change: impl FnOnce(&mut Objects)) {
        self.act(step, |site| site.tell(change));
    }

    /// Changes objects within a step: allows what old and new objects allow until the change is everywhere.
    pub(crate) fn tell(&mut self, change: impl FnOnce(&mut Objects)) {
        change(&mut self.objects);
        let new = Rules {
            ended: self.rules.ended.clone(),
            lossy: self.rules.lossy,
            ..self.objects.rules(&self.paths)
        };
        self.load.rules(meanwhile(&self.rules, &new));
        self.version += 1;
        self.world.write("site", &self.objects.values(self.version)).unwrap();
        wait_version(&self.world, self.version);
        std::thread::sleep(SETTLE);
        self.load.rules(new.clone());
        self.rules = new;
    }

    /// A step that does anything, followed by a round of the load, in which the answers must show the objects as they are.
    pub(crate) fn act(&mut self, step: &str, action: impl FnOnce(&mut Self)) {
        let (began, before) = (Instant::now(), self.load.totals());
        action(self);
        let answered = self.load.round().unwrap_or_else(|error| panic!("{step}: {error:#}"));
        self.note(step, began.elapsed(), &before);
        let of_web = |path: &&Path| path.to != "turn" && path.to != "many";
        let union = |sets: &std::collections::BTreeMap<Path, BTreeSet<String>>| -> BTreeSet<String> {
            sets.iter()
                .filter(|(path, _)| of_web(path))
                .flat_map(|(_, set)| set.clone())
                .collect()
        };
        if self.objects.web["spec"]["sessionAffinity"] != "ClientIP" {
            assert_eq!(
                union(&answered),
                union(&self.rules.answers),
                "{step}: who answers afterwards"
            );
            return;
        }
        // A record is of one port for one client address, whatever address of the service is dialled (S134).
        for client in ["pod", "host"] {
            for family in [true, false] {
                let pinned = answered
                    .iter()
                    .filter(|(path, _)| of_web(path) && path.client == client && path.target.is_ipv4() == family);
                let servers: BTreeSet<_> = pinned.flat_map(|(_, set)| set).collect();
                assert_eq!(servers.len(), 1, "{step}: {client} is pinned to one endpoint");
            }
        }
    }

    fn note(&mut self, step: &str, took: Duration, before: &Totals) {
        let after = self.load.totals();
        let incidents = self.load.incidents(before.incidents);
        let (allowed, forbidden): (Vec<_>, Vec<_>) = incidents.iter().partition(|incident| incident.allowed);
        for incident in forbidden.iter().take(20) {
            println!("{step}: {incident}");
        }
        self.forbidden += forbidden.len();
        self.table.add_row([
            step.to_owned(),
            format!("{:.1}", took.as_secs_f64()),
            (after.made - before.made).to_string(),
            (after.messages - before.messages).to_string(),
            forbidden.len().to_string(),
            allowed.len().to_string(),
            format!("{}/{HELD_TCP}", after.tcp_alive),
            format!("{}/{HELD_UDP}", after.udp_alive),
        ]);
    }

    /// From now on the TCP connections of this server may end.
    pub(crate) fn may_end(&mut self, server: &str) {
        self.rules.ended.insert(server.to_owned());
        self.load.rules(self.rules.clone());
    }

    /// Is a lost packet excused for now? It may make a connection slow; that one fails is never excused by this.
    pub(crate) fn may_lose_packets(&mut self, lossy: bool) {
        self.rules.lossy = lossy;
        self.load.rules(self.rules.clone());
    }

    /// Waits until all nodes serve an address, or none does.
    pub(crate) fn assert_served(&self, address: &str, port: u16, served: bool) {
        let address = SocketAddr::new(address.parse().unwrap(), port);
        for agent in &self.world.agents {
            let arrived = wait_until(ARRIVAL, || {
                let found = maps::backends(&agent.bpf_dir(), address, Protocol::Tcp).unwrap();
                (found.is_some() == served).then_some(())
            });
            assert!(arrived.is_some(), "{}: {address} served: {served}", agent.node());
        }
    }

    /// Swaps the endpoints of `many`.
    pub(crate) fn swap_many(&self, generation: u8) {
        self.world.write("many", &objects::many(generation).0).unwrap();
        wait_many(&self.world, generation);
    }

    /// Ends the load, prints the table, and fails if anything failed that may not or the load was not what it should be.
    pub(crate) fn finish(self) {
        let totals = self.load.totals();
        let rate = self.load.stop();
        println!("{}", self.table);
        println!(
            "{} new connections, {rate:.1} a second; {} messages held",
            totals.made, totals.messages
        );
        assert_eq!(self.forbidden, 0, "connections failed that must not; see above");
        assert!(
            rate > TOLERANCE * f64::from(RATE),
            "{rate:.1} new connections a second are no load of {RATE}"
        );
    }
}

fn meanwhile(old: &Rules, new: &Rules) -> Rules {
    let mut rules = new.clone();
    for (path, names) in &mut rules.answers {
        names.extend(old.answers[path].iter().cloned());
    }
    rules.serving.extend(old.serving.iter().cloned());
    rules.keep.retain(|name| old.keep.contains(name));
    rules
}

fn wait_version(world: &World, version: u16) {
    let marker = SocketAddr::new(MARKER.parse().unwrap(), version);
    world.wait_for(marker, Protocol::Tcp, Some(&[])).unwrap();
}

fn wait_many(world: &World, generation: u8) {
    for (vip, ips) in MANY.iter().zip(objects::many(generation).1) {
        let backends: Vec<_> = ips.iter().map(|ip| SocketAddr::new(*ip, MANY_PORT)).collect();
        let vip = SocketAddr::new(vip.parse().unwrap(), 80);
        world.wait_for(vip, Protocol::Tcp, Some(&backends)).unwrap();
    }
}

/// The outside addresses lead to the first node.
fn route_outside(world: &World) {
    let node = world.topology.node(0);
    let (v4, v6) = (node.v4.to_string(), node.v6.to_string());
    world.topology.external.as_ref().unwrap().run(|| {
        for arguments in [
            ["route", "add", "203.0.113.0/24", "via", &v4].as_slice(),
            &["-6", "route", "add", "2001:db8:113::/64", "via", &v6],
        ] {
            assert!(Command::new("ip").args(arguments).status().unwrap().success());
        }
    });
}

fn clients(world: &World) -> Vec<Client<'_>> {
    let [first, second] = [world.topology.node(0), world.topology.node(1)];
    let ips = |ips: [&str; 2]| ips.map(|ip| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 80));
    let targets = [
        ("cluster IP", ips(CLUSTER_IPS)),
        ("nodePort", first.sockets(NODE_PORT)),
        ("load balancer", ips(LB)),
        ("turn", ips(TURN)),
        ("many", ips(MANY)),
        ("nodePort of node 2", second.sockets(NODE_PORT)),
    ];
    let paths = |client: &'static str, without: &str| -> Vec<Path> {
        let chosen = targets.iter().filter(|(to, _)| *to != without);
        let paths = chosen.flat_map(|(to, targets)| {
            targets.map(|target| Path {
                client,
                to,
                target,
                // A connected UDP socket of the node is served where its packets leave, and to an address of the node itself they
                // do not leave.
                udp: match (client, *to) {
                    (_, "many") => Flows::No,
                    ("host", "nodePort") => Flows::Unconnected,
                    _ => Flows::All,
                },
            })
        });
        paths.collect()
    };
    let pod = &world.topology.pod(0, 0).netns;
    let external = &world.topology.external.as_ref().unwrap().netns;
    let host = &world.agents[0];
    vec![
        Client {
            start: Box::new(|body| pod.spawn(body)),
            paths: paths("pod", "nodePort of node 2"),
        },
        Client {
            start: Box::new(|body| host.spawn(body)),
            paths: paths("host", "nodePort of node 2"),
        },
        Client {
            start: Box::new(|body| external.spawn(body)),
            paths: paths("external", "many"),
        },
    ]
}
