//! Wires the tasks of an agent together and owns what must have one owner. Sources and netlink send what they see; one task takes it
//! in, plans, and calls the datapath, whose calls block and are short; the health and metrics servers only look on.
//!
//! What must stay true: nothing is completed (leftovers removed) before every kind has been listed and the node's addresses are
//! known (S160); stopping removes nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::changes::changed;
use crate::config::{Intervals, RunArgs, RunConfig, SourceConfig};
use crate::configz::configz;
use crate::datapath::{Datapath, SocketLb, SyncReport};
use crate::health::events::Events;
use crate::health::node_ports::Checks;
use crate::health::{self, Health};
use crate::heap;
use crate::metrics::{self, Metrics, StatsRequest};
use crate::model::{ClusterState, PendingChanges};
use crate::netlink::{self, Network};
use crate::server::Server;
use crate::source::convert::Converter;
use crate::source::pods::{self, OptedOut};
use crate::source::{self, Event};

/// After this, what could not be written is tried again; then after twice as long, up to the sync period (S163).
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// A ready endpoint that is in no slice any more is withdrawn after this, unless it has turned up in another one (S42).
const SETTLING: Duration = Duration::from_millis(5);
/// Services planned at once from which on the heap is tidied up afterwards: lists, not changes.
const MANY: usize = 1_000;
/// Events taken in before they are applied, at most: a busy source must not keep them from being applied.
const BATCH: usize = 4096;
/// Events that may wait for the owner; sources wait beyond that.
const EVENT_QUEUE: usize = 1024;
/// Netlink is tried again after this.
const NETLINK_RETRY: Duration = Duration::from_secs(5);

/// Runs an agent until it is told to stop, or the file that `args` name has changed.
pub fn run(config: RunConfig, args: &RunArgs) -> anyhow::Result<()> {
    block_on(run_async(config, args))
}

/// Makes and pins the maps and has the kernel verify the programs: everything of the start that changes nothing.
pub fn prepare(config: RunConfig) -> anyhow::Result<()> {
    block_on(async { Datapath::prepare(&config.datapath).context("preparing the datapath") })
}

pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(future)
}

async fn run_async(config: RunConfig, args: &RunArgs) -> anyhow::Result<()> {
    // First of all, so that a signal during start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;

    let (stats_tx, stats_rx) = mpsc::channel(8);
    let metrics = Arc::new(Metrics::new(stats_tx));
    let health = Arc::new(Health::new(config.intervals.sync));
    start_servers(&config, &health, &metrics).await?;

    let (events_tx, events) = mpsc::channel(EVENT_QUEUE);
    let (pods_tx, pods) = watch::channel(None);
    let opted_out = (config.datapath.socket_lb == SocketLb::All).then_some(pods_tx);
    let service_events = start_source(&config, events_tx, opted_out).await?;
    let (network_tx, network) = watch::channel(None);
    tokio::spawn(follow_network(network_tx));

    tracing::info!(node = %config.node_name, "starting");
    let check_addresses = config.datapath.node_port_addresses.clone();
    let checks = Checks::new(health.clone(), check_addresses, service_events);
    let datapath = Datapath::open(config.datapath).context("opening the datapath")?;
    let mut owner = Owner {
        state: ClusterState::default(),
        datapath,
        metrics,
        checks,
        health,
        network_known: false,
        completed: false,
        apply_at: None,
        settle_at: None,
        last_apply: None,
        next_tick: Instant::now(),
        intervals: config.intervals,
        retry: None,
        look_at: None,
    };
    tokio::select! {
        result = owner.run(events, network, pods, stats_rx) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = changed(args) => anyhow::bail!("the configuration has changed: ending, to be started with what it says now"),
    }?;
    tracing::info!("stopping; what is pinned goes on forwarding");
    Ok(())
}

async fn start_servers(config: &RunConfig, health: &Arc<Health>, metrics: &Arc<Metrics>) -> anyhow::Result<()> {
    if let Some(address) = config.healthz {
        let (name, flag) = ("healthz", "--healthz-bind-address");
        let router = health::router(health.clone(), metrics.clone());
        Server { name, flag, address }
            .start(router, config.bind_address_hard_fail)
            .await?;
    }
    if let Some(address) = config.metrics {
        let (name, flag) = ("metrics", "--metrics-bind-address");
        let router = metrics::router(metrics.clone(), configz(config));
        Server { name, flag, address }
            .start(router, config.bind_address_hard_fail)
            .await?;
    }
    Ok(())
}

/// Gives where Events about Services can be published. `opted_out`: pods that keep their sockets are followed too.
pub(crate) async fn start_source(
    config: &RunConfig,
    events: mpsc::Sender<Event>,
    opted_out: Option<watch::Sender<OptedOut>>,
) -> anyhow::Result<Events> {
    let converter = Converter::new(config.node_name.clone())
        .with_external_ips(config.gates.service_external_ips)
        .with_proxy_name(config.service_proxy_name.clone())
        .with_node_ip(config.node_ip);
    match &config.source {
        SourceConfig::Manifests(dir) => {
            source::manifests::watch(dir.clone(), converter, events)?;
            Ok(Events::default())
        }
        SourceConfig::ApiServer(server) => {
            let client = source::client::open(server).await?;
            let service_events = Events::start(client.clone(), config.node_name.clone());
            if let Some(opted_out) = opted_out {
                tokio::spawn(pods::watch(client.clone(), config.node_name.clone(), opted_out));
            }
            tokio::spawn(source::kube::watch(client, converter, events));
            Ok(service_events)
        }
    }
}

async fn follow_network(network: watch::Sender<Option<Network>>) {
    while !network.is_closed() {
        if let Err(error) = netlink::watch(network.clone()).await {
            let error = anyhow::Error::from(error);
            tracing::warn!(
                error = format!("{error:#}"),
                "interfaces cannot be followed, trying again"
            );
        }
        sleep(NETLINK_RETRY).await;
    }
}

/// The task that owns the state and the datapath.
struct Owner {
    state: ClusterState,
    datapath: Datapath,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    checks: Checks,
    network_known: bool,
    completed: bool,
    /// When to apply what waits.
    apply_at: Option<Instant>,
    /// When the endpoints that were lost have been waited for.
    settle_at: Option<Instant>,
    last_apply: Option<Instant>,
    next_tick: Instant,
    intervals: Intervals,
    /// Something failed; how long to wait after the next try.
    retry: Option<Duration>,
    /// When to look again for cgroups of pods that keep their sockets.
    look_at: Option<Instant>,
}

impl Owner {
    async fn run(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut network: watch::Receiver<Option<Network>>,
        mut pods: watch::Receiver<OptedOut>,
        mut stats: mpsc::Receiver<StatsRequest>,
    ) -> anyhow::Result<()> {
        let mut batch = Vec::new();
        loop {
            let (apply_at, settle_at, look_at) = (self.apply_at, self.settle_at, self.look_at);
            self.health.alive(Instant::now().into_std());
            tokio::select! {
                received = events.recv_many(&mut batch, BATCH) => {
                    anyhow::ensure!(received > 0, "the source of objects ended");
                    batch.drain(..).for_each(|event| self.take_in(event));
                    self.schedule();
                }
                changed = network.changed() => {
                    changed.context("interfaces are not followed any more")?;
                    let latest = network.borrow_and_update().clone();
                    self.set_network(latest.as_ref());
                }
                // Nobody says anything where pods' sockets are not translated, or there is no API server.
                Ok(()) = pods.changed() => {
                    if let Some(opted_out) = pods.borrow_and_update().clone() {
                        tracing::info!(pods = opted_out.len(), "pods that keep their sockets");
                        let looked = self.datapath.set_opted_out(opted_out);
                        self.looked(looked);
                    }
                }
                () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() => {
                    let looked = self.datapath.look_for_opted_out();
                    self.looked(looked);
                }
                Some(request) = stats.recv() => {
                    // Whoever asked may have gone.
                    let _ = request.send(self.datapath.stats());
                }
                () = sleep_until(apply_at.unwrap_or_else(Instant::now)), if apply_at.is_some() => self.apply(),
                () = sleep_until(settle_at.unwrap_or_else(Instant::now)), if settle_at.is_some() => {
                    self.state.settle();
                    self.schedule();
                }
                () = sleep_until(self.next_tick) => self.tick(),
            }
        }
    }

    fn tick(&mut self) {
        let next = self.datapath.tick();
        self.next_tick = Instant::now() + next;
        // It tries again as well, and may have made good what failed.
        if self.retry.is_some() && self.datapath.is_behind() == [false; 2] {
            self.apply();
        }
    }

    fn take_in(&mut self, event: Event) {
        match event {
            Event::Change(change) => self.state.apply(change),
            Event::Warning(warning) => {
                let (kind, object, field) = (warning.kind.name(), &warning.object, &warning.field);
                tracing::warn!(
                    kind,
                    object,
                    field,
                    problem = warning.problem,
                    remedy = warning.remedy,
                    "bad object"
                );
                self.metrics.bad_object(&warning);
            }
        }
    }

    /// Decides when to apply what was taken in: at once after quiet, else after the minimum interval.
    fn schedule(&mut self) {
        if self.state.is_complete() {
            self.health.node(self.state.node());
            let ips = self.state.node().map_or(&[][..], |node| &node.ips);
            self.checks.set_node_ips(ips);
            let report = self.datapath.set_node_ips(ips);
            self.note_failures(&report);
            if let Some(node) = self.state.node() {
                let report = self.datapath.set_pod_cidrs(&node.pod_cidrs);
                self.note_failures(&report);
            }
        }
        if self.state.take_service_networks_changed() {
            let networks = self.state.service_networks();
            if networks.is_empty() {
                tracing::info!("no service network is known: addresses of nobody are left to routing");
            } else {
                tracing::info!(?networks, "service networks");
            }
            let report = self.datapath.set_service_networks(networks);
            self.note_failures(&report);
        }
        let now = Instant::now();
        self.settle_at = self
            .settle_at
            .or(Some(now + SETTLING))
            .filter(|_| self.state.is_settling());
        if !self.state.has_changes() && (self.completed || !self.can_complete()) {
            return;
        }
        self.health.queued(now.into_std(), touched(self.state.pending()));
        self.metrics.queued(self.state.pending());
        let earliest = self
            .last_apply
            .map_or(now, |last| last + self.intervals.min_sync)
            .max(now);
        self.apply_at = Some(self.apply_at.map_or(earliest, |at| at.min(earliest)));
        if earliest == now {
            self.apply();
        }
    }

    fn can_complete(&self) -> bool {
        self.state.is_complete() && self.network_known
    }

    fn apply(&mut self) {
        let started = Instant::now();
        self.apply_at = None;
        let changes = self.state.take_changes();
        let services = changes.len();
        let mut report = self.datapath.apply(changes);
        self.metrics.no_local_endpoints(self.state.no_local());
        // Withdrawn ones first: another Service may take over the port.
        let mut checks = self.state.take_health_checks();
        checks.sort_by_key(|(_, check)| check.is_some());
        for (service, check) in checks {
            self.checks.set(service, check);
        }
        let is_full = !self.completed && self.can_complete();
        if is_full {
            let completed = self.datapath.complete();
            report.written += completed.written;
            report.deleted += completed.deleted;
            report.failed.extend(completed.failed);
            self.completed = true;
            self.health.ready();
            tracing::info!(services, written = report.written, deleted = report.deleted, "ready");
        }
        let now = Instant::now();
        if services >= MANY {
            heap::trim();
        }
        self.last_apply = Some(now);
        let (written, deleted) = (report.written, report.deleted);
        tracing::debug!(services, written, deleted, took = ?(now - started), "applied");
        let wall = SystemTime::now();
        if self.note_failures(&report) {
            let wait = self.retry.unwrap_or(FIRST_RETRY).min(self.intervals.sync);
            self.apply_at = Some(now + wait);
            self.retry = Some(wait * 2);
            let behind = self.datapath.is_behind();
            // What failed without leaving anything to write counts for both.
            if behind != [false; 2] {
                self.health.synced(wall, behind.map(|is_behind| !is_behind));
            }
            return;
        }
        self.retry = None;
        self.metrics
            .synced(&self.state.take_pending(), is_full, now - started, wall);
        self.health.synced(wall, [true; 2]);
    }

    fn set_network(&mut self, network: Option<&Network>) {
        let Some(network) = network else { return };
        self.checks.set_network(network);
        let report = self.datapath.set_network(network);
        self.note_failures(&report);
        self.network_known = true;
        self.schedule();
    }

    fn looked(&mut self, (report, next): (SyncReport, Option<Duration>)) {
        let next = if self.note_failures(&report) {
            Some(FIRST_RETRY)
        } else {
            next
        };
        self.look_at = next.map(|next| Instant::now() + next);
    }

    fn note_failures(&self, report: &SyncReport) -> bool {
        for failure in &report.failed {
            tracing::warn!(
                object = failure.object,
                error = failure.error,
                "not programmed, trying again"
            );
        }
        self.metrics.failed(report.failed.len());
        !report.failed.is_empty()
    }
}

/// The families that changes are about; those of the node are about both.
fn touched(pending: &PendingChanges) -> [bool; 2] {
    let families = [0, 1].map(|family| pending.services[family] + pending.endpoints[family] > 0);
    if families == [false; 2] { [true; 2] } else { families }
}
