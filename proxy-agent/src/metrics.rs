//! Numbers for Prometheus: kube-proxy's names where they mean the same (section S), our own under `ebpf_proxy_`. `run` reports into
//! [`Metrics`]; what only the datapath knows is asked of its owner when somebody looks.

mod http;
mod services;
mod text;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot};

use crate::datapath::Stats;
use crate::model::PendingChanges;
use crate::plan::NoLocal;
use crate::source::{Kind, Warning};

pub use self::http::router;
use self::services::Services;

/// How the owner of the datapath is asked for its numbers.
pub type StatsRequest = oneshot::Sender<Stats>;
/// An owner that is busy for longer leaves the numbers as they were.
const STATS_PATIENCE: Duration = Duration::from_secs(1);
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

type Labels = Vec<(&'static str, String)>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;
type Seconds = Gauge<f64, AtomicU64>;

/// All metrics of an agent.
pub struct Metrics {
    registry: Registry,
    started: SystemTime,
    stats: mpsc::Sender<StatsRequest>,
    sync_duration: Histograms,
    sync_full: Histograms,
    sync_partial: Histograms,
    no_local: Family<Labels, Gauge>,
    last_sync: Family<Labels, Seconds>,
    last_queued: Family<Labels, Seconds>,
    programming: Histograms,
    endpoint_changes: Family<Labels, Counter>,
    endpoint_pending: Family<Labels, Gauge>,
    service_changes: Family<Labels, Counter>,
    service_pending: Family<Labels, Gauge>,
    healthz: Family<Labels, Counter>,
    livez: Family<Labels, Counter>,
    bad_objects: Family<Labels, Counter>,
    failures: Counter,
    map_entries: Family<Labels, Gauge>,
    map_capacity: Family<Labels, Gauge>,
    reasons: Family<Labels, Counter>,
    programs: Family<Labels, Gauge>,
    xdp_packets: Counter,
    collected: Counter,
    flows_removed: Counter,
    opened: Counter,
    rewrites_inserted: Family<Labels, Counter>,
    rewrites_removed: Family<Labels, Counter>,
    rewrites_evicted: Family<Labels, Counter>,
    services: Services,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Registers everything. `stats` leads to the owner of the datapath.
    pub fn new(stats: mpsc::Sender<StatsRequest>) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            started: SystemTime::now(),
            stats,
            sync_duration: Histograms::new_with_constructor(sync_buckets),
            sync_full: Histograms::new_with_constructor(sync_buckets),
            sync_partial: Histograms::new_with_constructor(sync_buckets),
            no_local: Family::default(),
            last_sync: Family::default(),
            last_queued: Family::default(),
            programming: Histograms::new_with_constructor(programming_buckets),
            endpoint_changes: Family::default(),
            endpoint_pending: Family::default(),
            service_changes: Family::default(),
            service_pending: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            bad_objects: Family::default(),
            failures: Counter::default(),
            map_entries: Family::default(),
            map_capacity: Family::default(),
            reasons: Family::default(),
            programs: Family::default(),
            xdp_packets: Counter::default(),
            collected: Counter::default(),
            flows_removed: Counter::default(),
            opened: Counter::default(),
            rewrites_inserted: Family::default(),
            rewrites_removed: Family::default(),
            rewrites_evicted: Family::default(),
            services: Services::default(),
        };
        metrics.register_common();
        metrics.register_own();
        metrics.begin_at_zero();
        metrics
    }

    /// Prometheus sees no increase in a series that appears with its first event, so rates and alerts would miss that one.
    fn begin_at_zero(&self) {
        for family in FAMILIES {
            drop(self.programming.get_or_create(&of_family(family)));
        }
        for answers in [&self.healthz, &self.livez] {
            for code in [200, 503] {
                drop(answers.get_or_create(&of_code(code)));
            }
        }
        for kind in Kind::ALL {
            drop(self.bad_objects.get_or_create(&of_kind(kind)));
        }
    }

    /// kube-proxy's names; the library adds `_total` to counters.
    fn register_common(&mut self) {
        let common = self.registry.sub_registry_with_prefix("kubeproxy");
        common.register(
            "sync_proxy_rules_duration_seconds",
            "Time taken to apply changes",
            self.sync_duration.clone(),
        );
        let help = "Time taken to apply everything there is, at start";
        common.register("sync_full_proxy_rules_duration_seconds", help, self.sync_full.clone());
        let help = "Time taken to apply what changed";
        common.register(
            "sync_partial_proxy_rules_duration_seconds",
            help,
            self.sync_partial.clone(),
        );
        // A gauge whose name ends like a counter's; it is kube-proxy's.
        let help = "Service ports whose Local policy leaves this node without an endpoint";
        common.register("sync_proxy_rules_no_local_endpoints_total", help, self.no_local.clone());
        common.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When changes were last applied",
            self.last_sync.clone(),
        );
        let help = "When a change last came in";
        common.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            help,
            self.last_queued.clone(),
        );
        let help = "From the change of an endpoint to its effect on this node";
        common.register("network_programming_duration_seconds", help, self.programming.clone());
        common.register(
            "sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices",
            self.endpoint_changes.clone(),
        );
        let help = "Changes of EndpointSlices not applied yet";
        common.register(
            "sync_proxy_rules_endpoint_changes_pending",
            help,
            self.endpoint_pending.clone(),
        );
        common.register(
            "sync_proxy_rules_service_changes",
            "Changes of Services",
            self.service_changes.clone(),
        );
        let help = "Changes of Services not applied yet";
        common.register(
            "sync_proxy_rules_service_changes_pending",
            help,
            self.service_pending.clone(),
        );
        common.register(
            "proxy_healthz",
            "Answers of /healthz by status code",
            self.healthz.clone(),
        );
        common.register("proxy_livez", "Answers of /livez by status code", self.livez.clone());
    }

    fn register_own(&mut self) {
        let own = self.registry.sub_registry_with_prefix("ebpf_proxy");
        own.register(
            "bad_objects",
            "Parts of objects that could not be used, by kind",
            self.bad_objects.clone(),
        );
        own.register(
            "sync_failures",
            "Objects that could not be programmed, at every attempt",
            self.failures.clone(),
        );
        own.register("map_entries", "Entries in a map", self.map_entries.clone());
        own.register("map_capacity", "Entries a map has room for", self.map_capacity.clone());
        let help = "Packets and connections refused, dropped or served in an unusual way, by reason";
        own.register("refusals", help, self.reasons.clone());
        own.register(
            "programs_attached",
            "Programs attached, by place",
            self.programs.clone(),
        );
        own.register(
            "xdp_packets",
            "Packets that XDP has forwarded",
            self.xdp_packets.clone(),
        );
        own.register(
            "entries_collected",
            "Idle rewrite entries removed",
            self.collected.clone(),
        );
        let help = "UDP flows taken from endpoints that left";
        own.register("flows_removed", help, self.flows_removed.clone());
        let help = "Connections written into the rewrite tables: two entries each, four if masqueraded";
        own.register("connections_opened", help, self.opened.clone());
        own.register(
            "rewrite_entries_inserted",
            "Entries put into the rewrite table",
            self.rewrites_inserted.clone(),
        );
        own.register(
            "rewrite_entries_removed",
            "Entries removed from the rewrite table, by whom",
            self.rewrites_removed.clone(),
        );
        let help = "Entries that a full rewrite table forgot, at least";
        own.register("rewrite_entries_evicted", help, self.rewrites_evicted.clone());
        own.register_collector(Box::new(self.services.clone()));
    }

    /// Changes came in and wait.
    pub fn queued(&self, pending: &PendingChanges) {
        for (index, family) in FAMILIES.iter().enumerate() {
            self.endpoint_pending
                .get_or_create(&of_family(family))
                .set(pending.endpoints[index] as i64);
            self.service_pending
                .get_or_create(&of_family(family))
                .set(pending.services[index] as i64);
            self.last_queued
                .get_or_create(&of_family(family))
                .set(seconds(SystemTime::now()));
        }
    }

    /// How many service ports their policy leaves without an endpoint here (S189).
    pub fn no_local_endpoints(&self, counts: NoLocal) {
        for (policy, counts) in [("internal", counts.internal), ("external", counts.external)] {
            for (family, count) in FAMILIES.iter().zip(counts) {
                let mut labels = of_family(family);
                labels.push(("traffic_policy", policy.to_owned()));
                self.no_local.get_or_create(&labels).set(count.into());
            }
        }
    }

    /// What waited was applied, successfully, in `took`; `is_full`: it was everything there is.
    pub fn synced(&self, pending: &PendingChanges, is_full: bool, took: Duration, now: SystemTime) {
        let by_kind = if is_full { &self.sync_full } else { &self.sync_partial };
        for (index, family) in FAMILIES.iter().enumerate() {
            let labels = of_family(family);
            self.sync_duration.get_or_create(&labels).observe(took.as_secs_f64());
            by_kind.get_or_create(&labels).observe(took.as_secs_f64());
            self.last_sync.get_or_create(&labels).set(seconds(now));
            self.endpoint_changes
                .get_or_create(&labels)
                .inc_by(pending.endpoints[index]);
            self.service_changes
                .get_or_create(&labels)
                .inc_by(pending.services[index]);
            self.endpoint_pending.get_or_create(&labels).set(0);
            self.service_pending.get_or_create(&labels).set(0);
        }
        for (is_v6, made) in pending.triggers.iter().filter(|(_, made)| *made >= self.started) {
            let took = now.duration_since(*made).unwrap_or_default();
            self.programming
                .get_or_create(&of_family(FAMILIES[usize::from(*is_v6)]))
                .observe(took.as_secs_f64());
        }
    }

    /// Objects that could not be programmed.
    pub fn failed(&self, objects: usize) {
        self.failures.inc_by(objects as u64);
    }

    /// Some part of an object could not be used.
    pub fn bad_object(&self, warning: &Warning) {
        self.bad_objects.get_or_create(&of_kind(warning.kind)).inc();
    }

    /// `/healthz` was answered.
    pub fn healthz_answered(&self, code: u16) {
        self.healthz.get_or_create(&of_code(code)).inc();
    }

    /// `/livez` was answered.
    pub fn livez_answered(&self, code: u16) {
        self.livez.get_or_create(&of_code(code)).inc();
    }

    fn take_in(&self, stats: Stats) {
        for map in &stats.maps {
            let labels = vec![("map", map.name.to_owned())];
            self.map_entries.get_or_create(&labels).set(map.entries as i64);
            self.map_capacity.get_or_create(&labels).set(map.capacity as i64);
        }
        let reasons: BTreeMap<_, _> = stats.reasons.iter().copied().collect();
        for (reason, count) in reasons {
            let counter = self.reasons.get_or_create_owned(&vec![("reason", reason.to_owned())]);
            counter.inner().store(count, Ordering::Relaxed);
        }
        for (place, mode, count) in [
            ("interface", stats.attach_mode, stats.programs_on_interfaces),
            ("cgroup", "", stats.programs_on_cgroup),
            ("xdp", stats.programs_at_xdp.1, stats.programs_at_xdp.0),
        ] {
            let labels = vec![("place", place.to_owned()), ("mode", mode.to_owned())];
            self.programs.get_or_create(&labels).set(count as i64);
        }
        self.xdp_packets.inner().store(stats.xdp_forwarded, Ordering::Relaxed);
        self.collected.inner().store(stats.entries_collected, Ordering::Relaxed);
        self.flows_removed.inner().store(stats.flows_removed, Ordering::Relaxed);
        self.opened.inner().store(stats.connections_opened, Ordering::Relaxed);
        for (family, (counts, evicted)) in FAMILIES.iter().zip(stats.rewrites) {
            let set = |counters: &Family<Labels, Counter>, labels: Labels, count| {
                counters.get_or_create(&labels).inner().store(count, Ordering::Relaxed);
            };
            set(&self.rewrites_inserted, of_family(family), counts.inserted);
            set(&self.rewrites_evicted, of_family(family), evicted);
            for (by, count) in [
                ("program", counts.removed_by_programs),
                ("agent", counts.removed_by_agent),
            ] {
                let mut labels = of_family(family);
                labels.push(("by", by.to_owned()));
                set(&self.rewrites_removed, labels, count);
            }
        }
        self.services.set(stats.services);
    }

    async fn render(&self) -> Result<String, std::fmt::Error> {
        let (tx, rx) = oneshot::channel();
        let asked = async {
            self.stats.send(tx).await.ok()?;
            rx.await.ok()
        };
        if let Ok(Some(stats)) = tokio::time::timeout(STATS_PATIENCE, asked).await {
            self.take_in(stats);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// 0.001·2ⁿ.
fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// kube-proxy's: fine up to a minute, coarse up to five.
fn programming_buckets() -> Histogram {
    let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(whole.map(f64::from)))
}

fn of_family(family: &str) -> Labels {
    vec![("ip_family", family.to_owned())]
}

fn of_code(code: u16) -> Labels {
    vec![("code", code.to_string())]
}

fn of_kind(kind: Kind) -> Labels {
    vec![("kind", kind.name().to_owned())]
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::MapStats;

    #[test]
    fn names_are_those_of_kube_proxy() {
        let (tx, _rx) = mpsc::channel(1);
        let metrics = Metrics::new(tx);
        let pending = PendingChanges {
            services: [2, 0],
            endpoints: [3, 1],
            triggers: vec![(true, SystemTime::now()), (false, SystemTime::UNIX_EPOCH)],
        };
        metrics.queued(&pending);
        metrics.synced(&pending, true, Duration::from_millis(3), SystemTime::now());
        metrics.synced(
            &PendingChanges::default(),
            false,
            Duration::from_millis(1),
            SystemTime::now(),
        );
        metrics.no_local_endpoints(NoLocal {
            internal: [4, 0],
            external: [0, 5],
        });
        metrics.healthz_answered(200);
        metrics.take_in(Stats {
            maps: vec![MapStats {
                name: "FRONTENDS4",
                entries: 5,
                capacity: 9,
            }],
            reasons: vec![("no_endpoints", 7)],
            ..Stats::default()
        });
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        for line in [
            "kubeproxy_sync_proxy_rules_endpoint_changes_total{ip_family=\"IPv4\"} 3",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending{ip_family=\"IPv4\"} 0",
            "kubeproxy_sync_proxy_rules_service_changes_total{ip_family=\"IPv4\"} 2",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\",ip_family=\"IPv6\"} 2",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 4",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"external\"} 5",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 1",
            // S188: the other one was made before the start.
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 0",
            "kubeproxy_proxy_livez_total{code=\"503\"} 0",
            "ebpf_proxy_bad_objects_total{kind=\"Service\"} 0",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "ebpf_proxy_map_entries{map=\"FRONTENDS4\"} 5",
            "ebpf_proxy_refusals_total{reason=\"no_endpoints\"} 7",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
