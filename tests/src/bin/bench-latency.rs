//! `cargo xtask bench latency`: from a write to the API server to the first connection that reaches a backend.
//!
//! Each round writes objects while a client in a pod dials the address over and over. Two kinds of write: a new Service with its
//! EndpointSlice, and a new EndpointSlice of a Service that has none yet. Two ways: kubectl, which takes a while to end after the
//! server has answered it, and requests of our own. Measured is the moment of the first connection that is accepted, from the moment
//! the last write was acknowledged (zero if the connection came first) and from just before the first write.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use proxy_common::addr::Protocol;
use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{self, port};
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Shape};
use proxy_tests::world::{ECHO, Setup, World};
use proxy_tests::{echo, stats};
use serde_json::{Value, json};

/// Rounds of each kind.
const ROUNDS: u8 = 50;
/// A round that takes longer is an error.
const LIMIT: Duration = Duration::from_secs(10);
/// What the median from the acknowledgement on must stay below.
const TARGET: Duration = Duration::from_millis(50);
/// Quiet before each write, so that each is the first change after a while. Longer than the agent's interval between two syncs.
const PAUSE: Duration = Duration::from_millis(30);
/// How long one dial may take while the address is not served yet: nobody answers those.
const DIAL: Duration = Duration::from_millis(2);

fn main() -> Result<()> {
    let shape = Shape {
        nodes: 1,
        ..Default::default()
    };
    let mut world = World::new(&Setup {
        shape,
        without_agents: true,
        ..Default::default()
    })?;
    let api = ApiServer::start(&world.topology.underlay, GATEWAY.into())?;
    let host = world.topology.node(0);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": host.name}});
    api.apply(&[node])?;
    let source = Source::Kubeconfig(api.kubeconfig());
    let agent = Agent::start(&host.name, &host.netns, &source, &["--cluster-cidr", CLUSTER_CIDR])?;
    world.agents.push(agent);
    let bed = Bed { world, api };

    println!("{ROUNDS} rounds each, milliseconds");
    println!(
        "{:<58} {:>8} {:>8} {:>8} {:>8}",
        "until the first connection", "median", "p90", "p99", "max"
    );
    let mut worst = Duration::ZERO;
    for (number, written) in [Written::ServiceAndSlice, Written::Slice].into_iter().enumerate() {
        let first = 2 * number as u8;
        let kubectl = bed.rounds(first, written, |objects| bed.api.apply(objects).map(drop))?;
        let direct = bed.world.topology.underlay.run(|| {
            let client = ApiClient::new(&bed.api)?;
            bed.rounds(first + 1, written, |objects| client.create(objects))
        })?;
        for (way, rounds) in [("kubectl", kubectl), ("API", direct)] {
            let samples = |since: fn(&Live) -> Instant| -> Vec<Duration> {
                rounds
                    .iter()
                    .map(|r| r.live.saturating_duration_since(since(r)))
                    .collect()
            };
            let (acknowledged, began) = (samples(|r| r.acknowledged), samples(|r| r.began));
            print_row(&format!("{written}, {way}: from its acknowledgement"), &acknowledged);
            print_row(&format!("{written}, {way}: from just before it"), &began);
            worst = worst.max(stats::quantile(&acknowledged, 0.5));
        }
    }
    let verdict = if worst < TARGET { "met" } else { "missed" };
    println!("target: median from the acknowledgement below {TARGET:?}: {verdict}");
    Ok(())
}

fn print_row(what: &str, samples: &[Duration]) {
    let at = |share| stats::quantile(samples, share).as_secs_f64() * 1e3;
    let [median, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(at);
    println!("{what:<58} {median:>8.2} {p90:>8.2} {p99:>8.2} {max:>8.2}");
}

/// What a round writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    ServiceAndSlice,
    Slice,
}

impl std::fmt::Display for Written {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ServiceAndSlice => "Service and slice",
            Self::Slice => "slice",
        })
    }
}

struct Bed {
    world: World,
    api: ApiServer,
}

/// Moments of one round.
struct Live {
    began: Instant,
    acknowledged: Instant,
    live: Instant,
}

impl Bed {
    fn rounds(&self, kind: u8, written: Written, write: impl Fn(&[Value]) -> Result<()>) -> Result<Vec<Live>> {
        (0..ROUNDS)
            .map(|round| self.round(kind, round, written, &write))
            .collect()
    }

    /// One write, of objects that nobody has had before: what an earlier round leaves behind cannot answer.
    fn round(&self, kind: u8, round: u8, written: Written, write: impl Fn(&[Value]) -> Result<()>) -> Result<Live> {
        let name = format!("latency-{kind}-{round}");
        let ip = Ipv4Addr::new(10, 96, 100 + kind, round + 1);
        let vip = SocketAddr::new(ip.into(), 80);
        let backend = manifests::endpoint(self.world.topology.pod(0, 1).v4, "node1");
        let service = manifests::service(&name, &[&ip.to_string()], &[port("", "TCP", 80)]);
        let slice = manifests::slice(&name, &name, "IPv4", &[port("", "TCP", ECHO)], vec![backend]);
        let objects = match written {
            Written::ServiceAndSlice => vec![service, slice],
            Written::Slice => {
                self.api.apply(&[service])?;
                self.world.wait_for(vip, Protocol::Tcp, Some(&[]))?;
                vec![slice]
            }
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (stop, client) = (&stop, &self.world.topology.pod(0, 0).netns);
            let requests = scope.spawn(move || client.run(|| first(stop, || echo::dial(vip, DIAL).is_ok())));
            // The dialling has begun, and the agent is not still busy with the round before.
            std::thread::sleep(PAUSE);
            let began = Instant::now();
            let outcome = write(&objects);
            let acknowledged = Instant::now();
            stop.store(outcome.is_err(), Ordering::Relaxed);
            let live = requests.join().ok().flatten();
            outcome?;
            Ok(Live {
                began,
                acknowledged,
                live: live.with_context(|| format!("{vip} is not served after {LIMIT:?}"))?,
            })
        })
    }
}

/// The moment at which `question` is first answered with yes.
fn first(stop: &AtomicBool, question: impl Fn() -> bool) -> Option<Instant> {
    let end = Instant::now() + LIMIT;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        if question() {
            return Some(Instant::now());
        }
        // The agent shares the machine's processors with us.
        std::thread::sleep(Duration::from_micros(200));
    }
    None
}

/// Writes without kubectl, whose own start would hide what is measured.
struct ApiClient {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl ApiClient {
    fn new(api: &ApiServer) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let kubeconfig = Kubeconfig::read_from(api.kubeconfig())?;
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self { runtime, client })
    }

    fn create(&self, objects: &[Value]) -> Result<()> {
        self.runtime.block_on(async {
            for object in objects {
                let path = match object["kind"].as_str() {
                    Some("Service") => "/api/v1/namespaces/default/services",
                    _ => "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
                };
                let request = http::Request::post(path)
                    .header(http::header::CONTENT_TYPE, "application/json")
                    .body(object.to_string().into_bytes())?;
                self.client.request_text(request).await?;
            }
            Ok(())
        })
    }
}
