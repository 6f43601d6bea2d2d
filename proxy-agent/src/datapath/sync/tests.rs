//! Scenarios over tables in memory: plans in, a text dump of the maps out; failures at every write; restarts; and a property test
//! over random histories. `MemoryTables` itself panics if a published range is written again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::backend::Backend;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FrontendKey};

use super::{GRACE, Sync, SyncReport};
use crate::datapath::memory::MemoryTables;
use crate::plan::{Endpoints, FamilyPlan, FrontendPlan, ServicePortName, ServicePortPlan};

const START: Duration = Duration::from_secs(100);

type Change = (ServicePortName, Option<ServicePortPlan>);

pub(super) fn name(service: &str) -> ServicePortName {
    ServicePortName {
        namespace: "ns".to_owned(),
        name: service.to_owned(),
        port: String::new(),
        protocol: Protocol::Udp,
    }
}

fn family<A: Address>(vip: &str, backends: &[&str], keep: &[&str]) -> FamilyPlan<A> {
    let addr = |text: &&str| A::from_ip(text.parse::<IpAddr>().unwrap()).unwrap();
    let list = |texts: &[&str]| {
        let addrs: BTreeSet<A> = texts.iter().map(addr).collect();
        let port = Port::new(8080);
        addrs.into_iter().map(|addr| Backend { addr, port, flags: 0 }).collect()
    };
    FamilyPlan {
        frontends: vec![FrontendPlan {
            addr: addr(&vip),
            port: Port::new(80),
            flags: FRONTEND_CLUSTER_IP,
        }],
        cluster: Endpoints {
            selectable: list(backends),
            keep: list(keep),
        },
        local: Endpoints::default(),
        has_endpoints: !backends.is_empty(),
        source_ranges: Vec::new(),
    }
}

pub(super) fn plan(vip: &str, backends: &[&str], keep: &[&str]) -> ServicePortPlan {
    ServicePortPlan {
        v4: family(vip, backends, keep),
        ..ServicePortPlan::default()
    }
}

pub(super) struct World {
    pub(super) tables: MemoryTables,
    pub(super) sync: Sync,
    now: Duration,
}

impl World {
    pub(super) fn new(slots: usize) -> Self {
        let tables = MemoryTables::new(slots);
        Self {
            sync: Sync::adopt(&tables).unwrap(),
            tables,
            now: START,
        }
    }

    pub(super) fn apply(&mut self, changes: Vec<Change>) -> SyncReport {
        self.sync.apply(&mut self.tables, changes, self.now)
    }

    pub(super) fn complete(&mut self) -> SyncReport {
        self.sync.complete(&mut self.tables, self.now)
    }

    /// The grace period passes.
    pub(super) fn rest(&mut self) {
        self.now += GRACE;
        let mut report = self.sync.flush(&mut self.tables, self.now);
        self.sync.free_idle(&mut self.tables, self.now, &mut report);
    }

    pub(super) fn restart(&mut self) {
        self.sync = Sync::adopt(&self.tables).unwrap();
    }
}

#[test]
fn a_service_comes_changes_and_goes() {
    let mut world = World::new(16);
    world.complete();
    world.apply(vec![(
        name("a"),
        Some(plan("10.96.0.1", &["10.0.0.1", "10.0.0.2"], &[])),
    )]);
    assert_eq!(
        world.tables.dump(),
        "10.96.0.1 80 17 -> ns/a:/UDP flags=5 cluster=[10.0.0.1:8080,10.0.0.2:8080] keep=[] local=[] keep=[]\n"
    );
    let report = world.apply(vec![(name("a"), Some(plan("10.96.0.1", &["10.0.0.2"], &["10.0.0.1"])))]);
    assert_eq!((report.written, report.deleted), (3, 0), "two slots and a frontend");
    assert_eq!(
        world.tables.dump(),
        "10.96.0.1 80 17 -> ns/a:/UDP flags=5 cluster=[10.0.0.2:8080] keep=[10.0.0.1:8080] local=[] keep=[]\n"
    );
    world.apply(vec![(name("a"), Some(plan("10.96.0.1", &[], &[])))]);
    assert_eq!(
        world.tables.dump(),
        "10.96.0.1 80 17 -> ns/a:/UDP flags=1 cluster=[] keep=[] local=[] keep=[]\n"
    );
    world.apply(vec![(name("a"), None)]);
    assert_eq!(world.tables.dump(), "");
    assert_eq!(world.tables.services.len(), 1, "the id rests");
    world.rest();
    assert_eq!(world.tables.services.len(), 0);
    assert_eq!(world.sync.occupancy().backends, [0, 0]);
}

#[test]
fn unchanged_plans_write_nothing() {
    let mut world = World::new(16);
    let change = || vec![(name("a"), Some(plan("10.96.0.1", &["10.0.0.1"], &[])))];
    world.apply(change());
    world.complete();
    let before = world.tables.writes.done();
    world.apply(change());
    world.rest();
    assert_eq!(world.tables.writes.done(), before);
}

#[test]
fn families_do_not_influence_each_other() {
    // S15: IPv6 endpoints change, the IPv4 frontend keeps its generation.
    let mut world = World::new(16);
    let both = |v6: &[&str]| ServicePortPlan {
        v4: family("10.96.0.1", &["10.0.0.1"], &[]),
        v6: family("fd00::1", v6, &[]),
        ..ServicePortPlan::default()
    };
    world.apply(vec![(name("a"), Some(both(&["fd00::11"])))]);
    let frontends = world.tables.v4.frontends.clone();
    let report = world.apply(vec![(name("a"), Some(both(&["fd00::12"])))]);
    assert_eq!(report.written, 2);
    assert_eq!(world.tables.v4.frontends, frontends);
}

#[test]
fn generation_changes_with_a_range() {
    let mut world = World::new(16);
    let key = FrontendKey::new(Addr4([10, 96, 0, 1]), Port::new(80), 17);
    let mut seen = BTreeSet::new();
    for backends in [&["10.0.0.1"][..], &["10.0.0.2"], &[], &["10.0.0.2"]] {
        world.apply(vec![(name("a"), Some(plan("10.96.0.1", backends, &[])))]);
        assert!(seen.insert(world.tables.v4.frontends[&key].generation));
    }
}

#[test]
fn one_frontend_has_one_owner() {
    // S37: the older service wins, the other one takes over when it goes, in one write (S35).
    let mut world = World::new(16);
    world.complete();
    let claim = |created, backend| ServicePortPlan {
        created,
        ..plan("10.96.0.1", &[backend], &[])
    };
    world.apply(vec![(name("young"), Some(claim(2, "10.0.0.2")))]);
    world.apply(vec![(name("old"), Some(claim(1, "10.0.0.1")))]);
    assert!(world.tables.dump().contains("-> ns/old:/UDP"));
    let report = world.apply(vec![(name("old"), None)]);
    assert_eq!((report.written, report.deleted), (1, 0), "overwritten, not removed");
    assert!(world.tables.dump().contains("-> ns/young:/UDP"));
    assert!(world.tables.dump().contains("10.0.0.2"));
}

#[test]
fn a_full_table_names_the_setting_and_harms_no_other_service() {
    let mut world = World::new(2);
    let report = world.apply(vec![
        (
            name("big"),
            Some(plan("10.96.0.1", &["10.0.0.1", "10.0.0.2", "10.0.0.3"], &[])),
        ),
        (name("small"), Some(plan("10.96.0.2", &["10.0.0.4"], &[]))),
    ]);
    assert_eq!(report.failed.len(), 1);
    assert_eq!(report.failed[0].object, "ns/big:/UDP (IPv4)");
    assert!(
        report.failed[0].error.contains("--backends-capacity"),
        "{:?}",
        report.failed
    );
    assert_eq!(world.tables.v4.frontends.len(), 1, "no half-programmed service");
    world.apply(vec![(name("big"), Some(plan("10.96.0.1", &["10.0.0.1"], &[])))]);
    assert_eq!(world.tables.v4.frontends.len(), 2);
}

#[test]
fn a_restart_writes_nothing_and_deletes_leftovers_only_at_the_end() {
    let mut world = World::new(16);
    let kept = || (name("kept"), Some(plan("10.96.0.1", &["10.0.0.1"], &["10.0.0.9"])));
    world.apply(vec![
        kept(),
        (name("gone"), Some(plan("10.96.0.2", &["10.0.0.2"], &[]))),
    ]);
    world.complete();
    let (dump, before) = (world.tables.dump(), world.tables.writes.done());
    world.restart();
    world.apply(vec![kept(), (name("gone"), None)]);
    world.rest();
    assert_eq!((world.tables.dump(), world.tables.writes.done()), (dump, before));
    let report = world.complete();
    assert_eq!((report.written, report.deleted), (0, 1));
    world.rest();
    assert_eq!(world.tables.services.len(), 1);
    assert_eq!(world.sync.occupancy().backends, [2, 0]);
}

#[test]
fn an_id_held_twice_is_adopted_by_neither() {
    let mut world = World::new(16);
    world.apply(vec![(name("a"), Some(plan("10.96.0.1", &["10.0.0.1"], &[])))]);
    let (id, info) = world.tables.services.pop_first().unwrap();
    world.tables.services.insert(id, info);
    world.tables.services.insert(7, info);
    world.tables.services.insert(0, info);
    world.restart();
    world.apply(vec![(name("a"), Some(plan("10.96.0.1", &["10.0.0.1"], &[])))]);
    let frontend = world.tables.v4.frontends.values().next().unwrap();
    assert!(frontend.service != id && frontend.service != 7 && frontend.service != 0);
    world.complete();
    world.rest();
    assert_eq!(world.tables.services.len(), 1);
}

#[test]
fn overlapping_ranges_of_a_broken_map_are_repaired() {
    let mut world = World::new(16);
    let plans = || {
        vec![
            (name("a"), Some(plan("10.96.0.1", &["10.0.0.1", "10.0.0.2"], &[]))),
            (name("b"), Some(plan("10.96.0.2", &["10.0.0.3"], &[]))),
        ]
    };
    world.apply(plans());
    let dump = world.tables.dump();
    let a = world.tables.v4.frontends.values().next().unwrap().cluster;
    let b = world.tables.v4.frontends.values_mut().last().unwrap();
    b.cluster.first = a.first + 1;
    b.local.first = 9_999;
    b.local.count = 9_999;
    world.restart();
    world.apply(plans());
    world.complete();
    assert_eq!(world.tables.dump(), dump);
}

/// The history that failures are injected into.
fn history() -> Vec<Vec<Change>> {
    let v6 = |vip, backends: &[&str]| ServicePortPlan {
        v6: family::<Addr6>(vip, backends, &[]),
        ..plan("10.96.0.1", &["10.0.0.1"], &[])
    };
    vec![
        vec![
            (name("a"), Some(v6("fd00::1", &["fd00::11"]))),
            (name("b"), Some(plan("10.96.0.2", &["10.0.0.2", "10.0.0.3"], &[]))),
        ],
        vec![
            (name("a"), Some(v6("fd00::2", &["fd00::11", "fd00::12"]))),
            (name("b"), None),
            (name("c"), Some(plan("10.96.0.2", &["10.0.0.3"], &["10.0.0.2"]))),
        ],
        vec![(name("c"), Some(plan("10.96.0.2", &[], &[])))],
    ]
}

#[test]
fn a_failure_at_any_write_is_made_good() {
    let play = |fail_at: Option<usize>| {
        let mut world = World::new(16);
        world.tables.writes.fail_at(fail_at);
        world.complete();
        let mut failures = 0;
        for changes in history() {
            failures += world.apply(changes).failed.len();
        }
        world.rest();
        world.rest();
        assert!(!world.sync.is_pending());
        (world, failures)
    };
    let (expected, failures) = play(None);
    assert_eq!(failures, 0);
    for write in 0..expected.tables.writes.done() {
        let (world, _) = play(Some(write));
        assert_eq!(
            world.tables.dump(),
            expected.tables.dump(),
            "after a failure at write {write}"
        );
        assert_eq!(
            world.sync.occupancy(),
            expected.sync.occupancy(),
            "after a failure at write {write}"
        );
    }
}

/// What should be in the maps after all plans in `wanted` were applied.
fn check(world: &World, wanted: &BTreeMap<ServicePortName, ServicePortPlan>) {
    let mut owners: BTreeMap<Addr4, (i64, &ServicePortName)> = BTreeMap::new();
    for (name, plan) in wanted {
        for frontend in &plan.v4.frontends {
            let claim = (plan.created, name);
            let owner = owners.entry(frontend.addr).or_insert(claim);
            *owner = (*owner).min(claim);
        }
    }
    let family = &world.tables.v4;
    assert_eq!(family.frontends.len(), owners.len());
    let mut ranges = BTreeSet::new();
    for (key, frontend) in &family.frontends {
        let plan = &wanted[owners[&key.addr].1];
        let (selectable, keep) = family.slots(frontend.cluster);
        assert_eq!(selectable, plan.v4.cluster.selectable);
        assert_eq!(keep, plan.v4.cluster.keep);
        assert_eq!(frontend.flags & FRONTEND_HAS_ENDPOINTS != 0, plan.v4.has_endpoints);
        let end = frontend.cluster.first + frontend.cluster.count + frontend.cluster.keep;
        ranges.insert((frontend.cluster.first, end, frontend.service));
    }
    let ranges: Vec<_> = ranges.into_iter().filter(|(first, end, _)| first < end).collect();
    for pair in ranges.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "ranges overlap: {pair:?}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply(u8, Option<(Vec<u8>, BTreeSet<u8>, usize, i64)>),
    Rest,
    Restart,
    Fail(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let plan = (
        proptest::collection::vec(0u8..5, 1..3),
        proptest::collection::btree_set(0u8..12, 0..8),
        0usize..3,
        0i64..3,
    );
    prop_oneof![
        8 => (0u8..6, proptest::option::weighted(0.8, plan)).prop_map(|(who, plan)| Step::Apply(who, plan)),
        2 => Just(Step::Rest),
        1 => Just(Step::Restart),
        1 => (0usize..4).prop_map(Step::Fail),
    ]
}

proptest! {
    /// Whatever happens, every frontend shows its plan, ranges never overlap, and no published range is overwritten.
    #[test]
    fn any_history_converges(steps in proptest::collection::vec(step(), 1..60)) {
        let mut world = World::new(128);
        world.complete();
        let mut wanted = BTreeMap::new();
        for step in steps {
            match step {
                Step::Apply(who, plan) => {
                    let name = name(&format!("s{who}"));
                    let plan = plan.map(|(vips, backends, keep, created)| {
                        let mut list: Vec<Backend<Addr4>> = backends
                            .into_iter()
                            .map(|last| Backend { addr: Addr4([10, 0, 0, last]), port: Port::new(80), flags: 0 })
                            .collect();
                        let keep = list.split_off(list.len().saturating_sub(keep));
                        let vips: BTreeSet<u8> = vips.into_iter().collect();
                        let mut plan = ServicePortPlan { created, ..ServicePortPlan::default() };
                        plan.v4.has_endpoints = !list.is_empty();
                        plan.v4.cluster = Endpoints { selectable: list, keep };
                        plan.v4.frontends = vips
                            .into_iter()
                            .map(|last| FrontendPlan { addr: Addr4([10, 96, 0, last]), port: Port::new(80), flags: 0 })
                            .collect();
                        plan
                    });
                    match &plan {
                        Some(plan) => wanted.insert(name.clone(), plan.clone()),
                        None => wanted.remove(&name),
                    };
                    let report = world.apply(vec![(name, plan)]);
                    if report.failed.is_empty() && !world.sync.is_pending() {
                        check(&world, &wanted);
                    }
                }
                Step::Rest => world.rest(),
                Step::Restart => {
                    world.restart();
                    let all = wanted.iter().map(|(name, plan)| (name.clone(), Some(plan.clone()))).collect();
                    world.apply(all);
                    world.complete();
                }
                Step::Fail(distance) => world.tables.writes.fail_at(Some(world.tables.writes.done() + distance)),
            }
        }
        world.tables.writes.fail_at(None);
        world.rest();
        world.rest();
        check(&world, &wanted);
        let slots: usize = wanted
            .values()
            .filter(|plan| !plan.v4.frontends.is_empty())
            .map(|plan| plan.v4.cluster.selectable.len() + plan.v4.cluster.keep.len())
            .sum();
        prop_assert_eq!(world.sync.occupancy().backends[0] as usize, slots, "slots leak");
        prop_assert_eq!(world.tables.services.len(), wanted.len());
    }
}
