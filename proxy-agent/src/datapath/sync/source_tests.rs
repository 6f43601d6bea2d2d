//! Source ranges, markers of undefined ports and affinity: what is written in which order, and what goes when.

use proxy_common::addr::{Addr4, Port, Protocol};
use proxy_common::affinity::AffinityKey;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED, FrontendKey};

use super::tests::{World, name, plan};
use crate::datapath::affinity;
use crate::plan::{FrontendPlan, ServicePortPlan};

const VIP: Addr4 = Addr4([203, 0, 113, 10]);

fn guarded(ranges: &[([u8; 4], u8)]) -> ServicePortPlan {
    let mut plan = plan("10.96.0.1", &["10.0.0.1"], &[]);
    plan.v4.frontends.push(FrontendPlan {
        addr: VIP,
        port: Port::new(80),
        flags: if ranges.is_empty() { 0 } else { FRONTEND_SOURCE_RANGES },
    });
    plan.v4.source_ranges = ranges.iter().map(|(addr, len)| (Addr4(*addr), *len)).collect();
    plan
}

const TEN: ([u8; 4], u8) = ([10, 0, 0, 0], 8);
const DOC: ([u8; 4], u8) = ([192, 0, 2, 0], 24);

fn held(world: &World) -> Vec<String> {
    let rows = world.tables.v4.source_ranges.iter();
    assert_eq!(world.sync.occupancy().source_ranges, [rows.len(), 0], "for the metrics");
    rows.map(|(_, addr, len)| format!("{addr}/{}", len - 32)).collect()
}

fn asks(world: &World) -> bool {
    let key = FrontendKey::new(VIP, Port::new(80), Protocol::Udp.number());
    world.tables.v4.frontends[&key].flags & FRONTEND_SOURCE_RANGES != 0
}

#[test]
fn source_ranges_come_change_and_go() {
    let mut world = World::new(16);
    world.complete();
    world.apply(vec![(name("a"), Some(guarded(&[TEN])))]);
    assert_eq!((held(&world), asks(&world)), (vec!["10.0.0.0/8".to_owned()], true));
    world.apply(vec![(name("a"), Some(guarded(&[DOC])))]);
    assert_eq!(
        (held(&world), asks(&world)),
        (vec!["192.0.2.0/24".to_owned()], true),
        "S101"
    );
    world.apply(vec![(name("a"), Some(guarded(&[])))]);
    assert_eq!((held(&world), asks(&world)), (vec![], false));
    world.apply(vec![(name("a"), Some(guarded(&[TEN, DOC])))]);
    assert_eq!(held(&world).len(), 2);
    world.apply(vec![(name("a"), None)]);
    assert_eq!(held(&world).len(), 0);
    assert!(!world.sync.is_pending());
}

#[test]
fn a_restart_keeps_source_ranges_and_removes_leftovers() {
    let mut world = World::new(16);
    world.complete();
    let both = [
        (name("a"), Some(guarded(&[TEN, DOC]))),
        (name("b"), Some(guarded(&[TEN]))),
    ];
    world.apply(both.to_vec());
    assert_eq!(held(&world).len(), 3);
    world.restart();
    world.apply(vec![(name("a"), Some(guarded(&[TEN])))]);
    assert_eq!(
        held(&world).len(),
        3,
        "nothing is removed before everything is known (S160)"
    );
    world.complete();
    assert_eq!(held(&world), ["10.0.0.0/8"]);
    assert!(!world.sync.is_pending());
}

#[test]
fn a_failed_source_range_keeps_its_frontend_back() {
    for failing in 0..6 {
        let mut world = World::new(16);
        world.complete();
        world.tables.writes.fail_at(Some(failing));
        world.apply(vec![(name("a"), Some(guarded(&[TEN, DOC])))]);
        world.tables.writes.fail_at(None);
        world.rest();
        assert_eq!((held(&world).len(), asks(&world)), (2, true), "write {failing}");
        world.tables.writes.fail_at(Some(world.tables.writes.done()));
        world.apply(vec![(name("a"), Some(guarded(&[])))]);
        assert!(!asks(&world) || held(&world).len() == 2, "it would let nobody in");
        world.tables.writes.fail_at(None);
        world.rest();
        assert_eq!((held(&world).len(), asks(&world)), (0, false), "write {failing}");
        assert!(!world.sync.is_pending());
    }
}

#[test]
fn ports_of_a_service_share_the_marker_of_undefined_ones() {
    let mut world = World::new(16);
    world.complete();
    let marker = FrontendKey::new(Addr4([10, 96, 0, 1]), Port::new(0), 0);
    let port = |number, backends: &[&str]| {
        let mut plan = plan("10.96.0.1", backends, &[]);
        plan.v4.frontends[0].port = Port::new(number);
        plan.v4.frontends.push(FrontendPlan {
            addr: marker.addr,
            port: marker.port,
            flags: FRONTEND_CLUSTER_IP | FRONTEND_UNDEFINED,
        });
        Some(plan)
    };
    world.apply(vec![(name("a"), port(80, &["10.0.0.1"])), (name("b"), port(81, &[]))]);
    let found = world.tables.v4.frontends[&marker];
    assert_eq!(found.flags, FRONTEND_CLUSTER_IP | FRONTEND_UNDEFINED, "S77");
    world.apply(vec![(name("a"), port(80, &["10.0.0.2"]))]);
    assert_eq!(
        world.tables.v4.frontends[&marker], found,
        "it does not follow endpoints"
    );
    world.apply(vec![(name("a"), None)]);
    assert_ne!(world.tables.v4.frontends[&marker].service, found.service);
    world.apply(vec![(name("b"), None)]);
    assert!(world.tables.v4.frontends.is_empty());
}

#[test]
fn clients_are_forgotten_with_the_affinity() {
    let mut world = World::new(16);
    world.complete();
    let with = |seconds| {
        let mut plan = plan("10.96.0.1", &["10.0.0.1"], &[]);
        plan.affinity_seconds = seconds;
        Some(plan)
    };
    let mut report = world.apply(vec![(name("a"), with(10))]);
    assert!(!report.take_affinity_ended());
    let service = world.tables.v4.frontends.values().next().unwrap().service;
    let record = AffinityKey {
        service,
        client: Addr4([10, 0, 0, 9]),
    };
    world.tables.v4.affinity.insert(record);
    let mut report = world.apply(vec![(name("a"), with(20))]);
    assert!(!report.take_affinity_ended(), "S137: another timeout keeps the records");
    assert_eq!(affinity::sweep(&mut world.tables, &world.sync.v4).unwrap(), 0);
    let mut report = world.apply(vec![(name("a"), with(0))]);
    assert!(report.take_affinity_ended(), "S136");
    assert_eq!(affinity::sweep(&mut world.tables, &world.sync.v4).unwrap(), 1);
    world.apply(vec![(name("a"), with(10))]);
    let mut report = world.apply(vec![(name("a"), None)]);
    assert!(report.take_affinity_ended());
}
