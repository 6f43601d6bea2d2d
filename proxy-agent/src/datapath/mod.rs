//! The only module that writes BPF maps and attaches programs. `run` owns one [`Datapath`] and calls it from one task; calls
//! block for as long as the system calls take and never wait for anything else.
//!
//! `loader` turns the embedded object into verified programs and pinned maps, `tables` are those maps, `ranges` and `sync` decide
//! what is written in which order, `opt_out` knows whose sockets are left alone, `flows` moves UDP flows, `links`, `xdp` and `cgroup`
//! attach the programs, `gc` removes what has gone
//! quiet, `upgrade` takes over from another version, `cleanup` removes everything.

mod affinity;
mod cgroup;
mod classic;
mod cleanup;
pub(crate) mod constants;
pub(crate) mod counters;
pub(crate) mod doubts;
mod drain;
mod error;
pub(crate) mod events;
mod flows;
mod gc;
#[cfg(test)]
mod kernel_tests;
mod ledger;
mod links;
mod loader;
#[cfg(test)]
mod memory;
mod node_port_addresses;
mod opt_out;
mod options;
pub(crate) mod probe;
mod ranges;
mod readers;
mod remains;
mod settings;
mod sync;
pub(crate) mod sys;
pub(crate) mod tables;
mod upgrade;
mod verify;
mod xdp;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::clock;
use proxy_common::counters::Counters;
use proxy_common::reason::{Reason, XDP_FORWARDED};

use self::cgroup::Sockets;
use self::flows::{Departed, Services};
use self::gc::Collector;
use self::links::Links;
use self::loader::Loaded;
use self::opt_out::OptOut;
use self::readers::Readers;
use self::settings::NodeSettings;
use self::sync::{GRACE, Sync};
use self::tables::{BpfTables, FamilyTables};
use crate::netlink::Network;
use crate::plan::{ServicePortName, ServicePortPlan};

pub use cleanup::{CleanupReport, cleanup};
pub use error::DatapathError;
pub(crate) use error::TableError;
pub use ledger::RewriteCounts;
pub(crate) use loader::Pins;
pub use node_port_addresses::NodePortAddresses;
pub use options::{
    AttachMode, BpfLogLevel, Capacities, InterfaceFilter, Options, PodDetection, SocketLb, Timeouts, XdpMode,
    XdpOptions,
};
pub(crate) use remains::{Remains, remains};
pub(crate) use sync::name_of;
pub use sync::{SyncFailure, SyncReport};
pub use verify::{Difference, Wanted, verify};

/// The setting that a full `FRONTENDS4/6` is about.
const FRONTENDS_SETTING: &str = "--frontends-capacity";
/// The setting that a full `BACKENDS4/6` is about.
const BACKENDS_SETTING: &str = "--backends-capacity";
/// The setting that a full `REWRITES4/6` is about.
const REWRITES_SETTING: &str = "--rewrites-capacity";
/// The setting that a full `SERVICES` is about.
const SERVICES_SETTING: &str = "--services-capacity";

/// Next tick while something is under way.
const SOON: Duration = Duration::from_secs(1);
/// Next tick otherwise.
const LATER: Duration = Duration::from_secs(2);
/// How often attachments are looked after.
const REPAIR_INTERVAL: Duration = Duration::from_secs(10);
/// How often the maps are compared with what was written.
const AUDIT_INTERVAL: Duration = Duration::from_secs(60);
/// Longest time between two tries of a write that keeps failing.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// The datapath of one node.
pub struct Datapath {
    loaded: Loaded,
    tables: BpfTables,
    sync: Sync,
    settings: NodeSettings,
    pods: PodDetection,
    service_metrics: bool,
    sockets: Option<Sockets>,
    /// Where pods' sockets are translated.
    opt_out: Option<OptOut>,
    links: Links,
    readers: Readers,
    collectors: [Collector; 2],
    /// Flows to look at again, and when.
    sweep: Option<(Duration, Services)>,
    /// Flows that went elsewhere, since when; what is left of them is forgotten after the grace period.
    departed: Vec<(Duration, Departed<Addr4>, Departed<Addr6>)>,
    /// When to look at the affinity records again.
    forget: Option<Duration>,
    /// When failed writes are tried again, and how long to wait after that.
    retry: (Duration, Duration),
    started: Instant,
    repaired: Instant,
    audited: Instant,
    collected: u64,
    moved: u64,
}

/// Numbers for metrics.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Entries and capacity per map; those of the rewrite tables and affinity records are as old as the last walk, some
    /// seconds.
    pub maps: Vec<MapStats>,
    /// How often each reason was met, by [`Reason::name`].
    pub reasons: Vec<(&'static str, u64)>,
    /// Programs on interfaces.
    pub programs_on_interfaces: usize,
    /// Programs on the cgroup.
    pub programs_on_cgroup: usize,
    /// Programs at XDP, and `native` or `generic`.
    pub programs_at_xdp: (usize, &'static str),
    /// Packets that XDP has forwarded.
    pub xdp_forwarded: u64,
    /// `tcx` or `classic`.
    pub attach_mode: &'static str,
    /// Idle entries removed from the rewrite tables so far.
    pub entries_collected: u64,
    /// What came into the rewrite tables and went, IPv4 and IPv6, and how much of it was evicted at least.
    pub rewrites: [(RewriteCounts, u64); 2],
    /// UDP flows that lost their backend so far (S141).
    pub flows_removed: u64,
    /// Connections written into the rewrite tables so far, two entries each, or four.
    pub connections_opened: u64,
    /// What was counted of the service ports that saw any traffic; none if they are not counted.
    pub services: Vec<ServiceStats>,
}

/// What was counted of a service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceStats {
    /// The service port.
    pub name: ServicePortName,
    /// Over all CPUs.
    pub counters: Counters,
}

/// Occupancy of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapStats {
    /// Name of the map.
    pub name: &'static str,
    /// Entries, or slots taken.
    pub entries: u64,
    /// Entries it can hold.
    pub capacity: u64,
}

impl Datapath {
    /// Opens or makes the pinned maps, loads and verifies all programs, takes over from another version, attaches the socket programs,
    /// reads back what a former agent left. What is forwarded stays the same.
    pub fn open(options: Options) -> Result<Self, DatapathError> {
        let mut loaded = loader::load(&options)?;
        loaded.take_over()?;
        let table = |error: TableError| {
            DatapathError::call("reading", loaded.pins.maps.display())(std::io::Error::other(error))
        };
        let mut tables = BpfTables::open(&loaded.pins.maps, true).map_err(table)?;
        let sync = Sync::adopt(&tables).map_err(table)?;
        let mut settings = NodeSettings::adopt(&tables, sync.v4.keys(), sync.v6.keys()).map_err(table)?;
        match &options.pods {
            PodDetection::ClusterCidr(cidrs) => settings.set_pods(cidrs),
            // What a former agent knew stands until the Node is known.
            PodDetection::NodeCidr => {}
            PodDetection::Bridge(_) | PodDetection::InterfacePrefix(_) => settings.set_pods(&[]),
        }
        settings.wait_for_interfaces(&tables).map_err(table)?;
        // Before any program runs that reads them.
        let mut report = SyncReport::default();
        settings.flush(&mut tables, &mut report);
        if let Some(failure) = report.failed.pop() {
            return Err(DatapathError::call("writing", failure.object)(std::io::Error::other(
                failure.error,
            )));
        }
        let links = Links::open(
            options.interfaces,
            options.pods.clone(),
            options.node_port_addresses,
            options.attach,
            options.xdp,
            &loaded.pins.links,
            &tables,
        )?;
        let (mut sockets, mut opt_out) = (None, None);
        if options.socket_lb == SocketLb::Off {
            let removed = cgroup::detach(&loaded.pins.links)?;
            tracing::info!(removed, "socket programs are off");
        } else {
            let cgroup = probe::cgroup(options.cgroup.as_deref())?;
            sockets = Some(Sockets::attach(&cgroup, &loaded.pins.links, &loaded.programs)?);
            if options.socket_lb == SocketLb::All {
                opt_out = Some(OptOut::open(&loaded.pins.maps, cgroup).map_err(table)?);
            }
        }
        if opt_out.is_none() {
            OptOut::clear(&loaded.pins.maps).map_err(table)?;
        }
        let found = sync.occupancy();
        tracing::info!(
            frontends4 = found.frontends[0],
            frontends6 = found.frontends[1],
            services = found.services,
            attach = links.mode(),
            "maps opened"
        );
        let started = Instant::now();
        Ok(Self {
            loaded,
            tables,
            sync,
            settings,
            pods: options.pods,
            service_metrics: options.service_metrics,
            sockets,
            opt_out,
            links,
            readers: Readers::new(sys::synchronize),
            collectors: [(); 2].map(|()| Collector::new(&options.timeouts)),
            sweep: None,
            departed: Vec::new(),
            forget: None,
            retry: (Duration::ZERO, SOON),
            started,
            repaired: started,
            audited: started,
            collected: 0,
            moved: 0,
        })
    }

    /// Opens or makes the pinned maps, loads and verifies all programs, and lets go of them: what [`Self::open`] could fail at.
    pub fn prepare(options: &Options) -> Result<(), DatapathError> {
        loader::load(options)?.abandon()
    }

    /// Applies the plans of changed service ports (`None`: gone). Until [`Self::complete`] has been called once nothing is deleted
    /// that a former agent left.
    pub fn apply(&mut self, changes: Vec<(ServicePortName, Option<ServicePortPlan>)>) -> SyncReport {
        let now = self.now();
        let mut settings = SyncReport::default();
        for plan in changes.iter().filter_map(|(_, plan)| plan.as_ref()) {
            self.settings.reckon_with(plan);
        }
        self.settings.flush(&mut self.tables, &mut settings);
        let mut report = self.sync.apply(&mut self.tables, changes, now);
        report.failed.extend(settings.failed);
        self.move_flows(&mut report, now);
        report
    }

    /// The prefixes of the Node object, which are the pods' if it is to be asked (S114 NodeCIDR, S183).
    pub fn set_pod_cidrs(&mut self, cidrs: &[IpNet]) -> SyncReport {
        let mut report = SyncReport::default();
        if self.pods == PodDetection::NodeCidr {
            self.settings.set_pods(cidrs);
            self.settings.flush(&mut self.tables, &mut report);
        }
        report
    }

    /// Cluster IPs are taken from these networks: what leaves the node for another address of them belongs to nobody (S78).
    pub fn set_service_networks(&mut self, networks: &[IpNet]) -> SyncReport {
        let mut report = SyncReport::default();
        self.settings.set_networks(networks);
        self.settings.flush(&mut self.tables, &mut report);
        report
    }

    /// All kinds have been listed and applied: whatever the maps still hold that nobody asked for is removed.
    pub fn complete(&mut self) -> SyncReport {
        let now = self.now();
        let mut report = self.sync.complete(&mut self.tables, now);
        // Endpoints may have left while no agent ran, or just before the last one ended.
        report.take_moved_udp();
        report.take_affinity_ended();
        self.sweep_flows(Services::All, &mut report, now);
        self.forget_clients(&mut report);
        self.forget = Some(now + GRACE);
        self.loaded.programs.verify_others();
        report
    }

    /// Interfaces and addresses as netlink sees them now: attaches, detaches, writes `LINKS` and `NODE_ADDRS4/6`. From the first
    /// time on new connections are served.
    pub fn set_network(&mut self, network: &Network) -> SyncReport {
        let mut report = SyncReport::default();
        self.links
            .set_network(network, &self.loaded.programs, &mut self.tables, &mut report);
        self.settings.serve();
        self.settings.flush(&mut self.tables, &mut report);
        report
    }

    /// The node's own addresses as its Node object has them (S84): decides which local addresses serve node ports.
    pub fn set_node_ips(&mut self, ips: &[IpAddr]) -> SyncReport {
        let mut report = SyncReport::default();
        self.links.set_node_ips(ips, &mut self.tables, &mut report);
        report
    }

    /// Pods of this node whose sockets are left to the packet programs, by UID. Gives when to look again for those whose cgroup is not
    /// there yet.
    pub fn set_opted_out(&mut self, pods: BTreeSet<String>) -> (SyncReport, Option<Duration>) {
        let mut report = SyncReport::default();
        let next = self.opt_out.as_mut().and_then(|opt_out| {
            opt_out.set(pods, &mut report);
            opt_out.next()
        });
        (report, next)
    }

    /// Looks for them again.
    pub fn look_for_opted_out(&mut self) -> (SyncReport, Option<Duration>) {
        let mut report = SyncReport::default();
        let next = self.opt_out.as_mut().and_then(|opt_out| {
            opt_out.look(&mut report);
            opt_out.next()
        });
        (report, next)
    }

    /// Periodic work: idle connections, UDP flows to endpoints that left (S141), ranges to free, failed writes to retry, links to
    /// repair. Returns when it wants to be called next.
    pub fn tick(&mut self) -> Duration {
        let now = self.now();
        let mut report = SyncReport::default();
        if !self.sync.is_pending() {
            self.retry = (now, SOON);
        } else if self.retry.0 <= now {
            report = self.sync.flush(&mut self.tables, now);
            self.move_flows(&mut report, now);
            let wait = self.retry.1;
            self.retry = (now + wait, (wait * 2).min(LONGEST_RETRY));
        }
        if let Some((due, services)) = self.sweep.take() {
            if due <= now {
                self.sweep_once(&services, &mut report, now);
            } else {
                self.sweep = Some((due, services));
            }
        }
        if self.forget.is_some_and(|due| due <= now) {
            self.forget = None;
            self.forget_clients(&mut report);
        }
        if self.sync.has_idle() {
            if let Some(before) = self.readers.gone_before(now) {
                self.sync.free_idle(&mut self.tables, before, &mut report);
            }
            if report.slots_freed > 0 {
                // What did not fit may fit now.
                self.retry = (now, SOON);
            }
        }
        self.settings.flush(&mut self.tables, &mut report);
        self.collect(&mut report);
        if self.audited.elapsed() >= AUDIT_INTERVAL {
            self.audit(&mut report);
        }
        if self.repaired.elapsed() >= REPAIR_INTERVAL {
            self.repaired = Instant::now();
            self.loaded.repair_pins(&mut report);
            self.links.repair(&self.loaded.programs, &mut self.tables, &mut report);
            if let Some(sockets) = &mut self.sockets {
                sockets.repair(&self.loaded.programs, &mut report);
            }
            if let Some(opt_out) = &mut self.opt_out {
                opt_out.look(&mut report);
            }
        }
        for failure in &report.failed {
            tracing::warn!(
                object = failure.object,
                error = failure.error,
                "not programmed, will be tried again"
            );
        }
        let is_busy = self.sync.is_pending()
            || self.sync.has_idle()
            || self.sweep.is_some()
            || self.forget.is_some()
            || self.collectors.iter().any(Collector::is_busy);
        if is_busy { SOON } else { LATER }
    }

    /// Is something left to write, in IPv4 and in IPv6?
    pub fn is_behind(&self) -> [bool; 2] {
        self.sync.is_behind()
    }

    /// For metrics: entries and capacity per map, reasons, programs attached.
    pub fn stats(&self) -> Stats {
        let found = self.sync.occupancy();
        let map = |name, entries: u64, capacity: u32| MapStats {
            name,
            entries,
            capacity: u64::from(capacity),
        };
        let [backends4, backends6] = found.backends.map(u64::from);
        let [frontends4, frontends6] = found.frontends.map(|n| n as u64);
        let [rewrites4, rewrites6] = [self.collectors[0].entries(), self.collectors[1].entries()];
        let [affinity4, affinity6] = [0, 1].map(|family| self.collectors[family].affinity_records());
        let [ranges4, ranges6] = found.source_ranges.map(|n| n as u64);
        let [links, addrs4, addrs6] = self.links.entries();
        let tables = &self.tables;
        let (connections_opened, services) = self.counters();
        Stats {
            maps: vec![
                map("FRONTENDS4", frontends4, tables.v4.frontends.capacity()),
                map("FRONTENDS6", frontends6, tables.v6.frontends.capacity()),
                map("BACKENDS4", backends4, tables.v4.backends.len()),
                map("BACKENDS6", backends6, tables.v6.backends.len()),
                map("REWRITES4", rewrites4, tables.v4.rewrites.capacity()),
                map("REWRITES6", rewrites6, tables.v6.rewrites.capacity()),
                map("AFFINITY4", affinity4, tables.v4.affinity.capacity()),
                map("AFFINITY6", affinity6, tables.v6.affinity.capacity()),
                map("SRC_RANGES4", ranges4, tables.v4.source_ranges.capacity()),
                map("SRC_RANGES6", ranges6, tables.v6.source_ranges.capacity()),
                map("LINKS", links, tables.links.capacity()),
                map("NODE_ADDRS4", addrs4, tables.v4.node_addrs.capacity()),
                map("NODE_ADDRS6", addrs6, tables.v6.node_addrs.capacity()),
                map("SERVICES", found.services as u64, tables.services.capacity()),
            ]
            .into_iter()
            .chain(self.opt_out.as_ref().map(OptOut::stats))
            .collect(),
            reasons: self.reasons(),
            programs_on_interfaces: self.links.attached(),
            programs_on_cgroup: self.sockets.as_ref().map_or(0, Sockets::len),
            programs_at_xdp: self.links.xdp(),
            xdp_forwarded: self.count(XDP_FORWARDED),
            attach_mode: self.links.mode(),
            entries_collected: self.collected,
            rewrites: [
                self.rewrites::<Addr4>(&self.collectors[0]),
                self.rewrites::<Addr6>(&self.collectors[1]),
            ],
            flows_removed: self.moved,
            connections_opened,
            services,
        }
    }

    fn now(&self) -> Duration {
        // Never so early that "the grace period ago" would lie before the start.
        self.started.elapsed() + GRACE
    }

    /// All connections, and what was counted of each service port.
    fn counters(&self) -> (u64, Vec<ServiceStats>) {
        let below = self
            .sync
            .service_ids()
            .map(|(id, _)| id.saturating_add(1))
            .max()
            .unwrap_or(1);
        let below = if self.service_metrics { below } else { 1 };
        let counters = match self.tables.counters.read(below) {
            Ok(counters) => counters,
            Err(error) => {
                tracing::warn!(%error, "no numbers of services");
                return (0, Vec::new());
            }
        };
        let total = counters.first().map_or(0, |total| total.connections.iter().sum());
        let mut services: Vec<ServiceStats> = self
            .sync
            .service_ids()
            .filter_map(|(id, name)| {
                let counters = *counters.get(id as usize)?;
                let name = name.clone();
                (!counters.is_zero()).then_some(ServiceStats { name, counters })
            })
            .collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        (total, services)
    }

    fn rewrites<A: Address>(&self, collector: &Collector) -> (RewriteCounts, u64)
    where
        BpfTables: FamilyTables<A>,
    {
        let counts = FamilyTables::<A>::rewrite_counts(&self.tables).unwrap_or_else(|error| {
            tracing::warn!(%error, "no numbers of the rewrite table");
            RewriteCounts::default()
        });
        (counts, collector.evicted())
    }

    fn reasons(&self) -> Vec<(&'static str, u64)> {
        Reason::ALL
            .iter()
            .map(|reason| (reason.name(), self.count(*reason as u32)))
            .collect()
    }

    /// A slot of `REASONS`, over all CPUs.
    fn count(&self, slot: u32) -> u64 {
        let cpus = aya::util::nr_cpus().unwrap_or_default();
        let counts = sys::lookup_many::<u64>(self.tables.reasons.fd().as_fd(), &slot, cpus);
        counts.unwrap_or_default().iter().sum()
    }

    /// Frontends changed: UDP flows and affinity records are looked at now and once more later.
    fn move_flows(&mut self, report: &mut SyncReport, now: Duration) {
        if report.take_affinity_ended() {
            self.forget_clients(report);
            self.forget = Some(now + GRACE);
        }
        let moved = report.take_moved_udp();
        if !moved.is_empty() {
            self.sweep_flows(Services::Ids(moved), report, now);
        }
    }

    fn forget_clients(&mut self, report: &mut SyncReport) {
        let forgotten4 = affinity::sweep::<Addr4>(&mut self.tables, &self.sync.v4);
        let forgotten6 = affinity::sweep::<Addr6>(&mut self.tables, &self.sync.v6);
        for error in [forgotten4, forgotten6].into_iter().filter_map(Result::err) {
            report.fail("affinity records", error);
        }
    }

    fn sweep_flows(&mut self, services: Services, report: &mut SyncReport, now: Duration) {
        self.sweep_once(&services, report, now);
        let later = match self.sweep.take() {
            Some((_, waiting)) => waiting.join(services),
            None => services,
        };
        self.sweep = Some((now + GRACE, later));
    }

    fn sweep_once(&mut self, services: &Services, report: &mut SyncReport, now: Duration) {
        let late = |(when, ..): &mut (Duration, Departed<Addr4>, Departed<Addr6>)| *when + GRACE <= now;
        for (_, v4, v6) in self.departed.extract_if(.., late) {
            let forgotten = flows::forget(&mut self.tables, &v4).and_then(|()| flows::forget(&mut self.tables, &v6));
            if let Err(error) = forgotten {
                report.fail("UDP flows", error);
            }
        }
        let swept4 = flows::sweep::<Addr4, _>(&mut self.tables, &self.sync.v4, services);
        let swept6 = flows::sweep::<Addr6, _>(&mut self.tables, &self.sync.v6, services);
        match swept4.and_then(|v4| Ok((v4, swept6?))) {
            Ok((v4, v6)) => {
                let moved = v4.len() + v6.len();
                report.flows_removed += moved;
                self.moved += moved as u64;
                if moved > 0 {
                    self.departed.push((now, v4, v6));
                }
            }
            Err(error) => report.fail("UDP flows", error),
        }
    }

    /// Before the first list is complete the maps may hold what a former agent left, and none of it is looked at.
    fn audit(&mut self, report: &mut SyncReport) {
        self.audited = Instant::now();
        if !self.sync.is_complete() || self.sync.is_pending() {
            return;
        }
        self.sync.audit(&mut self.tables, report);
        let read = self
            .settings
            .read_back(&self.tables)
            .and_then(|()| self.links.read_back(&self.tables));
        if let Err(error) = read {
            report.fail("comparison with the maps", error);
        }
        self.settings.flush(&mut self.tables, report);
        self.links.refresh(&self.loaded.programs, &mut self.tables, report);
    }

    fn collect(&mut self, report: &mut SyncReport) {
        let now = clock::ticks(sys::coarse_clock());
        let [v4, v6] = &mut self.collectors;
        for collected in [
            v4.step::<Addr4>(&mut self.tables, now),
            v6.step::<Addr6>(&mut self.tables, now),
        ] {
            match collected {
                Ok(removed) => self.collected += removed as u64,
                Err(error) => report.fail("idle connections", error),
            }
        }
    }
}

/// Opens the pinned maps of a node for reading, with or without a running agent.
pub(crate) fn open_tables(bpf_dir: &Path) -> Result<BpfTables, TableError> {
    BpfTables::open(&Pins::new(bpf_dir).maps, false)
}

const _: () = {
    const fn can_be_owned_by_a_task<T: Send>() {}
    can_be_owned_by_a_task::<Datapath>();
};
