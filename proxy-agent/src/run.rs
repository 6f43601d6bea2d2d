//! Wires the tasks of an agent together and owns what must have one owner. Sources and netlink send what they see; one task takes it
//! in, plans, and calls the datapath, whose calls block and are short; the health and metrics servers only look on.
//!
//! What must stay true: nothing is completed (leftovers removed) before every kind has been listed and the node's addresses are
//! known (S160); stopping removes nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::{RunConfig, SourceConfig};
use crate::datapath::{Datapath, SyncReport};
use crate::health::node_ports::Checks;
use crate::health::{self, Health};
use crate::metrics::{self, Metrics, StatsRequest};
use crate::model::ClusterState;
use crate::netlink::{self, Network};
use crate::source::convert::Converter;
use crate::source::{self, Event};

/// The first change after quiet is applied at once, later ones not sooner than this after the one before (S162).
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// A ready endpoint that is in no slice any more is withdrawn after this, unless it has turned up in another one (S42).
const SETTLING: Duration = Duration::from_millis(5);
/// After this, what could not be written is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Events taken in before they are applied, at most: a busy source must not keep them from being applied.
const BATCH: usize = 4096;
/// Events that may wait for the owner; sources wait beyond that.
const EVENT_QUEUE: usize = 1024;
/// An address that cannot be bound, and netlink, are tried again after this (S179).
const REBIND_INTERVAL: Duration = Duration::from_secs(5);

/// Runs an agent until it is told to stop.
pub fn run(config: RunConfig) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(run_async(config))
}

async fn run_async(config: RunConfig) -> anyhow::Result<()> {
    // First of all, so that a signal during start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;

    let (stats_tx, stats_rx) = mpsc::channel(8);
    let metrics = Arc::new(Metrics::new(stats_tx));
    let health = Arc::new(Health::default());
    if let Some(address) = config.healthz {
        tokio::spawn(serve(
            "healthz",
            address,
            health::router(health.clone(), metrics.clone()),
        ));
    }
    if let Some(address) = config.metrics {
        tokio::spawn(serve("metrics", address, metrics::router(metrics.clone())));
    }

    let (events_tx, events) = mpsc::channel(EVENT_QUEUE);
    start_source(&config, events_tx).await?;
    let (network_tx, network) = watch::channel(None);
    tokio::spawn(follow_network(network_tx));

    tracing::info!(node = %config.node_name, "starting");
    let datapath = Datapath::open(config.datapath).context("opening the datapath")?;
    let mut owner = Owner {
        state: ClusterState::default(),
        datapath,
        metrics,
        checks: Checks::new(health.clone()),
        health,
        network_known: false,
        completed: false,
        apply_at: None,
        settle_at: None,
        last_apply: None,
        next_tick: Instant::now(),
    };
    tokio::select! {
        result = owner.run(events, network, stats_rx) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }?;
    tracing::info!("stopping; what is pinned goes on forwarding");
    Ok(())
}

async fn start_source(config: &RunConfig, events: mpsc::Sender<Event>) -> anyhow::Result<()> {
    let converter = Converter::new(config.node_name.clone()).with_external_ips(config.gates.service_external_ips);
    match &config.source {
        SourceConfig::Manifests(dir) => source::manifests::watch(dir.clone(), converter, events)?,
        SourceConfig::ApiServer(kubeconfig) => {
            let client = source::client::open(kubeconfig.as_deref()).await?;
            tokio::spawn(source::kube::watch(client, converter, events));
        }
    }
    Ok(())
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
        sleep(REBIND_INTERVAL).await;
    }
}

async fn serve(name: &'static str, address: SocketAddr, router: Router) {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!(name, %address, "serving");
                if let Err(error) = axum::serve(listener, router.clone()).await {
                    tracing::warn!(name, %address, %error, "server ended, starting it again");
                }
            }
            Err(error) => tracing::warn!(name, %address, %error, "cannot be bound, trying again"),
        }
        sleep(REBIND_INTERVAL).await;
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
}

impl Owner {
    async fn run(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut network: watch::Receiver<Option<Network>>,
        mut stats: mpsc::Receiver<StatsRequest>,
    ) -> anyhow::Result<()> {
        let mut batch = Vec::new();
        loop {
            let (apply_at, settle_at) = (self.apply_at, self.settle_at);
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
                Some(request) = stats.recv() => {
                    // Whoever asked may have gone.
                    let _ = request.send(self.datapath.stats());
                }
                () = sleep_until(apply_at.unwrap_or_else(Instant::now)), if apply_at.is_some() => self.apply(),
                () = sleep_until(settle_at.unwrap_or_else(Instant::now)), if settle_at.is_some() => {
                    self.state.settle();
                    self.schedule();
                }
                () = sleep_until(self.next_tick) => self.next_tick = Instant::now() + self.datapath.tick(),
            }
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
            let report = self.datapath.set_node_ips(ips);
            self.note_failures(&report);
        }
        if self.state.take_service_networks_changed() {
            let networks = self.state.service_networks();
            tracing::info!(?networks, "service networks");
        }
        let now = Instant::now();
        self.settle_at = self
            .settle_at
            .or(Some(now + SETTLING))
            .filter(|_| self.state.is_settling());
        if !self.state.has_changes() && (self.completed || !self.can_complete()) {
            return;
        }
        self.health.queued(now.into_std());
        self.metrics.queued(self.state.pending());
        let earliest = self.last_apply.map_or(now, |last| last + MIN_INTERVAL).max(now);
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
        // Withdrawn ones first: another Service may take over the port.
        let mut checks = self.state.take_health_checks();
        checks.sort_by_key(|(_, check)| check.is_some());
        for (service, check) in checks {
            self.checks.set(service, check);
        }
        if !self.completed && self.can_complete() {
            let completed = self.datapath.complete();
            report.written += completed.written;
            report.deleted += completed.deleted;
            report.failed.extend(completed.failed);
            self.completed = true;
            self.health.ready();
            tracing::info!(services, written = report.written, deleted = report.deleted, "ready");
        }
        let now = Instant::now();
        self.last_apply = Some(now);
        let (written, deleted) = (report.written, report.deleted);
        tracing::debug!(services, written, deleted, took = ?(now - started), "applied");
        if self.note_failures(&report) {
            self.apply_at = Some(now + RETRY_INTERVAL);
            return;
        }
        let wall = SystemTime::now();
        self.metrics.synced(&self.state.take_pending(), now - started, wall);
        self.health.synced(wall);
    }

    fn set_network(&mut self, network: Option<&Network>) {
        let Some(network) = network else { return };
        let report = self.datapath.set_network(network);
        self.note_failures(&report);
        self.network_known = true;
        self.schedule();
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
