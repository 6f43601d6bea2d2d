//! `cargo xtask bench latency`: from a Service written with kubectl to the first request that reaches a backend.
//!
//! Each round creates a Service with its EndpointSlice through a real API server while a client in a pod dials the address over and
//! over. Measured are the moment of the first success and, with it, the entry in the maps: from just before the write through the
//! API, and from the return of kubectl (which may be later than the success: then it counts as zero).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use proxy_common::addr::Protocol;
use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{self, port};
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Shape};
use proxy_tests::world::{ECHO, Setup, World};
use proxy_tests::{echo, maps, stats};

/// Rounds of each kind.
const ROUNDS: u32 = 50;
/// A round that takes longer is an error.
const LIMIT: Duration = Duration::from_secs(10);
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
    let node = serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": host.name}});
    api.apply(&[node])?;
    let source = Source::Kubeconfig(api.kubeconfig());
    let agent = Agent::start(&host.name, &host.netns, &source, &["--cluster-cidr", CLUSTER_CIDR])?;
    world.agents.push(agent);
    let bed = Bed { world, api };

    let mut kubectl = (Vec::new(), Vec::new());
    let mut direct = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let live = bed.round(round, |objects| bed.api.apply(objects).map(drop))?;
        kubectl.0.push(live.request.saturating_duration_since(live.returned));
        kubectl.1.push(live.entry.saturating_duration_since(live.returned));
    }
    bed.world.topology.underlay.run(|| -> Result<()> {
        let client = ApiClient::new(&bed.api)?;
        for round in ROUNDS..2 * ROUNDS {
            let live = bed.round(round, |objects| client.create(objects))?;
            direct.0.push(live.request - live.began);
            direct.1.push(live.entry - live.began);
        }
        Ok(())
    })?;
    println!("{ROUNDS} Services with one endpoint, milliseconds      median     p99     max");
    print_row("kubectl returned   -> first request answered", &kubectl.0);
    print_row("kubectl returned   -> entry in the maps", &kubectl.1);
    print_row("before the API write -> first request answered", &direct.0);
    print_row("before the API write -> entry in the maps", &direct.1);
    Ok(())
}

fn print_row(what: &str, samples: &[Duration]) {
    let at = |share| stats::quantile(samples, share).as_secs_f64() * 1e3;
    println!("{what:<48} {:>8.2} {:>7.2} {:>7.2}", at(0.5), at(0.99), at(1.0));
}

struct Bed {
    world: World,
    api: ApiServer,
}

/// Moments of one round.
struct Live {
    began: Instant,
    returned: Instant,
    request: Instant,
    entry: Instant,
}

impl Bed {
    fn round(&self, round: u32, write: impl FnOnce(&[serde_json::Value]) -> Result<()>) -> Result<Live> {
        let name = format!("latency-{round}");
        let ip = format!("10.96.{}.{}", 100 + round / 200, round % 200 + 1);
        let vip = SocketAddr::new(ip.parse()?, 80);
        let backend = self.world.topology.pod(0, 1).v4;
        let objects = [
            manifests::service(&name, &[&ip], &[port("", "TCP", 80)]),
            manifests::slice(
                &name,
                &name,
                "IPv4",
                &[port("", "TCP", ECHO)],
                vec![manifests::endpoint(backend, "node1")],
            ),
        ];
        let stop = AtomicBool::new(false);
        let (tx, rx) = mpsc::channel();
        let bpf_dir = self.world.agents[0].bpf_dir();
        std::thread::scope(|scope| {
            let (stop, client) = (&stop, &self.world.topology.pod(0, 0).netns);
            let requests = scope.spawn(move || client.run(|| first(stop, || echo::dial(vip, DIAL).is_ok())));
            let has_backend =
                move || matches!(maps::backends(&bpf_dir, vip, Protocol::Tcp), Ok(Some(b)) if !b.is_empty());
            let entries = scope.spawn(move || {
                let entry = first(stop, has_backend);
                let _ = tx.send(());
                entry
            });
            let began = Instant::now();
            let written = write(&objects);
            let returned = Instant::now();
            if written.is_err() || rx.recv_timeout(LIMIT).is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let moment = |thread: std::thread::ScopedJoinHandle<'_, Option<Instant>>| {
                thread
                    .join()
                    .ok()
                    .flatten()
                    .with_context(|| format!("{vip} is not served after {LIMIT:?}"))
            };
            written?;
            Ok(Live {
                began,
                returned,
                entry: moment(entries)?,
                request: moment(requests)?,
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

    fn create(&self, objects: &[serde_json::Value]) -> Result<()> {
        let [service, slice] = objects else {
            anyhow::bail!("a Service and its slice")
        };
        let service: Service = serde_json::from_value(service.clone())?;
        let slice: EndpointSlice = serde_json::from_value(slice.clone())?;
        self.runtime.block_on(async {
            let how = PostParams::default();
            Api::<Service>::namespaced(self.client.clone(), "default")
                .create(&how, &service)
                .await?;
            Api::<EndpointSlice>::namespaced(self.client.clone(), "default")
                .create(&how, &slice)
                .await?;
            Ok(())
        })
    }
}
