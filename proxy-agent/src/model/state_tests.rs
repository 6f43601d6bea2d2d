//! Steps of changes, and which service ports are handed out after each.

use super::*;
use crate::model::fixtures::{LEAVING_HERE, READY, READY_HERE, object, service, slice};

const TCP80: &str = "http:80/TCP";

impl ClusterState {
    /// Is there anything left of this service?
    pub(crate) fn remembers(&self, name: &ObjectName) -> bool {
        self.services.contains_key(name)
    }

    fn taken(&mut self) -> Vec<String> {
        let describe = |(name, plan): (ServicePortName, Option<ServicePortPlan>)| match plan {
            Some(plan) => format!("{name} {}", plan.v4.cluster.selectable.len()),
            None => format!("{name} gone"),
        };
        self.settle();
        self.take_changes().into_iter().map(describe).collect()
    }

    fn put_service(&mut self, service: Service) {
        self.apply(Change::Service(service.name.clone(), Some(service)));
    }

    fn put_slice(&mut self, slice: EndpointSlice) {
        self.apply(Change::Slice(slice.name.clone(), Some(slice), None));
    }
}

fn listed() -> ClusterState {
    let mut state = ClusterState::default();
    state.apply(Change::Services(Vec::new()));
    state.apply(Change::Slices(Vec::new()));
    state.apply(Change::Node(None));
    state.apply(Change::ServiceCidrs(Vec::new()));
    state
}

fn web() -> Service {
    service("web", &["10.96.0.10"], &[TCP80])
}

fn web_slice(name: &str, owner: &str) -> EndpointSlice {
    slice(name, owner, &[TCP80], &[("10.0.0.1", READY)])
}

#[test]
fn nothing_before_every_kind_is_listed() {
    let mut state = ClusterState::default();
    state.apply(Change::Services(vec![web()]));
    assert!(state.take_changes().is_empty());
    state.apply(Change::Slices(vec![web_slice("a", "web")]));
    assert!(state.take_changes().is_empty() && !state.is_complete() && !state.has_changes());
    state.apply(Change::Node(None));
    let service_cidr = crate::model::ServiceCidr {
        name: "kubernetes".into(),
        networks: vec!["10.96.0.0/16".parse().unwrap()],
    };
    state.apply(Change::ServiceCidr("kubernetes".into(), Some(service_cidr.clone())));
    assert!(state.take_changes().is_empty() && !state.take_service_networks_changed());
    state.apply(Change::ServiceCidrs(vec![service_cidr]));
    assert!(
        state.take_service_networks_changed() && state.service_networks().len() == 1,
        "S78"
    );
    assert!(state.is_complete() && state.has_changes());
    assert_eq!(state.taken(), ["default/web:http/TCP 1"], "S160");
}

#[test]
fn slices_before_their_service() {
    let mut state = listed();
    state.put_slice(web_slice("a", "web"));
    assert!(state.taken().is_empty());
    state.put_service(web());
    assert_eq!(state.taken(), ["default/web:http/TCP 1"], "S12");
    state.apply(Change::Service(object("web"), None));
    assert_eq!(state.taken(), ["default/web:http/TCP gone"]);
    state.apply(Change::Slice(object("a"), None, None));
    assert!(state.taken().is_empty());
    assert!(!state.remembers(&object("web")), "S12: no residue");
}

#[test]
fn a_relabelled_slice_moves() {
    let mut state = listed();
    state.put_service(web());
    state.put_service(service("api", &["10.96.0.11"], &[TCP80]));
    state.put_slice(web_slice("a", "web"));
    assert_eq!(state.taken(), ["default/api:http/TCP 0", "default/web:http/TCP 1"]);
    state.put_slice(web_slice("a", "api"));
    assert_eq!(
        state.taken(),
        ["default/api:http/TCP 1", "default/web:http/TCP 0"],
        "S13"
    );
    state.apply(Change::Slice(object("a"), None, None));
    assert_eq!(state.taken(), ["default/api:http/TCP 0"]);
}

/// S42: between two slices an endpoint may be in neither.
#[test]
fn an_endpoint_between_two_slices_is_waited_for() {
    let with = |name: &str, ips: &[&str]| {
        let endpoints: Vec<_> = ips.iter().map(|ip| (*ip, READY)).collect();
        slice(name, "web", &[TCP80], &endpoints)
    };
    let mut state = listed();
    state.put_service(web());
    state.put_slice(with("a", &["10.0.0.1", "10.0.0.2"]));
    state.put_slice(with("b", &["10.0.0.3"]));
    assert_eq!(state.taken(), ["default/web:http/TCP 3"]);
    state.put_slice(with("a", &["10.0.0.1"]));
    assert!(state.is_settling() && !state.has_changes() && state.take_changes().is_empty());
    state.put_slice(with("b", &["10.0.0.2", "10.0.0.3"]));
    assert!(state.has_changes() && !state.is_settling(), "it is there again");
    assert_eq!(state.taken(), ["default/web:http/TCP 3"]);

    // In both: the first copy that goes is no loss. One that does not turn up again goes when the moment is over.
    state.put_slice(with("a", &["10.0.0.1", "10.0.0.3"]));
    state.taken();
    state.put_slice(with("b", &["10.0.0.2"]));
    assert!(!state.is_settling() && state.has_changes());
    state.taken();
    state.apply(Change::Slice(object("b"), None, None));
    assert!(state.is_settling() && !state.has_changes());
    state.settle();
    assert!(state.has_changes());
    assert_eq!(state.taken(), ["default/web:http/TCP 2"]);

    // What is added meanwhile, to this service or another, waits for nobody; nor does a Service that is deleted.
    state.put_slice(with("a", &["10.0.0.1"]));
    state.put_slice(with("c", &["10.0.0.9"]));
    assert_eq!(state.take_changes().len(), 1);
    state.put_slice(with("a", &[]));
    state.put_service(service("api", &["10.96.0.11"], &[TCP80]));
    assert_eq!(state.take_changes().len(), 1);
    state.apply(Change::Service(object("web"), None));
    assert!(state.has_changes());
    assert_eq!(state.taken(), ["default/web:http/TCP gone"]);
}

/// S42: where there is no other slice, nothing is on its way to one.
#[test]
fn what_the_only_slice_lost_is_gone() {
    let mut state = listed();
    state.put_service(web());
    state.put_slice(slice("a", "web", &[TCP80], &[("10.0.0.1", READY), ("10.0.0.2", READY)]));
    state.put_slice(slice("six", "web", &[TCP80], &[("fd00::1", READY)]));
    assert_eq!(state.taken(), ["default/web:http/TCP 2"]);
    state.put_slice(slice("a", "web", &[TCP80], &[("10.0.0.1", READY)]));
    assert!(state.has_changes() && !state.is_settling());
    assert_eq!(state.taken(), ["default/web:http/TCP 1"]);
    // One that is deleted may be made again.
    state.apply(Change::Slice(object("a"), None, None));
    assert!(state.is_settling() && !state.has_changes());
}

#[test]
fn only_what_changed_is_planned() {
    let mut state = listed();
    state.put_service(web());
    state.put_service(service("api", &["10.96.0.11"], &[TCP80]));
    state.taken();
    state.put_slice(web_slice("a", "web"));
    assert_eq!(state.taken(), ["default/web:http/TCP 1"], "S166");
    state.put_slice(web_slice("a", "web"));
    state.put_service(web());
    assert!(state.taken().is_empty(), "the same again is no change");
    state.apply(Change::Slices(vec![web_slice("b", "web")]));
    assert_eq!(
        state.taken(),
        ["default/web:http/TCP 1"],
        "a full list that names another slice"
    );
    state.apply(Change::Services(vec![web()]));
    assert_eq!(
        state.taken(),
        ["default/api:http/TCP gone"],
        "absent from a full list: deleted"
    );
}

#[test]
fn a_removed_port_is_withdrawn() {
    let mut state = listed();
    state.put_service(service("web", &["10.96.0.10"], &[TCP80, "old:81/TCP"]));
    state.taken();
    state.put_service(service("web", &["10.96.0.10"], &[TCP80, "new:81/TCP"]));
    let expected = [
        "default/web:old/TCP gone",
        "default/web:http/TCP 0",
        "default/web:new/TCP 0",
    ];
    assert_eq!(state.taken(), expected, "S32, S35: the old owner goes first");
}

#[test]
fn a_new_zone_replans_all_and_other_news_of_the_node_nothing() {
    let node = |zone: &str, leaving| {
        Change::Node(Some(Node {
            zone: Some(zone.into()),
            leaving,
            ..Node::default()
        }))
    };
    let mut state = listed();
    state.put_service(web());
    state.taken();
    state.apply(node("x", false));
    assert_eq!(state.taken(), ["default/web:http/TCP 0"], "S71");
    state.apply(node("x", true));
    assert!(state.taken().is_empty());
    assert!(state.node().is_some_and(|node| node.leaving));
}

#[test]
fn changes_are_counted_by_family() {
    let mut state = listed();
    state.put_service(web());
    state.put_service(web());
    state.put_slice(slice("six", "web", &[TCP80], &[("fd00::1", READY)]));
    let made = SystemTime::UNIX_EPOCH;
    state.apply(Change::Slice(object("a"), Some(web_slice("a", "web")), Some(made)));
    let pending = state.take_pending();
    assert_eq!((pending.services, pending.endpoints), ([1, 0], [1, 1]));
    assert_eq!(pending.triggers, [(false, made)], "S188");
    assert_eq!(state.take_pending(), PendingChanges::default());
}

/// S189: two ports, both families, each policy; counted while they are planned and forgotten with them.
#[test]
fn service_ports_without_a_local_endpoint_are_counted() {
    const PORTS: [&str; 2] = ["a:80/TCP", "b:81/TCP"];
    let mut state = listed();
    let counts = |state: &mut ClusterState| {
        state.settle();
        state.take_changes();
        (state.no_local().internal, state.no_local().external)
    };
    let mut web = service("web", &["10.96.0.10", "fd00:96::a"], &PORTS);
    web.external_local = true;
    state.put_service(web.clone());
    state.put_slice(slice("x", "web", &PORTS, &[("10.0.0.1", READY)]));
    assert_eq!(
        counts(&mut state),
        ([0, 0], [0, 0]),
        "nothing that is dialled from outside"
    );
    web.external_ips = vec!["203.0.113.1".parse().unwrap()];
    web.internal_local = true;
    state.put_service(web.clone());
    assert_eq!(counts(&mut state), ([2, 0], [2, 0]), "no endpoints at all in IPv6");
    state.put_slice(slice("x", "web", &PORTS[..1], &[("10.0.0.1", READY)]));
    assert_eq!(
        counts(&mut state),
        ([1, 0], [1, 0]),
        "the other port has no endpoints at all"
    );
    state.put_slice(slice("six", "web", &PORTS, &[("fd00::1", READY)]));
    assert_eq!(counts(&mut state), ([1, 2], [1, 0]), "the externalIP is IPv4");
    for here in [READY_HERE, LEAVING_HERE] {
        state.put_slice(slice("x", "web", &PORTS, &[("10.0.0.1", READY), ("10.0.0.2", here)]));
        assert_eq!(counts(&mut state), ([0, 2], [0, 0]), "served here");
    }
    let mut api = service("api", &["10.96.0.11"], &PORTS[..1]);
    api.internal_local = true;
    state.put_service(api);
    state.put_slice(slice("y", "api", &PORTS[..1], &[("10.0.0.3", READY)]));
    assert_eq!(counts(&mut state), ([1, 2], [0, 0]), "the sum");
    state.apply(Change::Service(object("web"), None));
    assert_eq!(counts(&mut state), ([1, 0], [0, 0]), "dropped with the service");
    state.apply(Change::Slice(object("y"), None, None));
    assert_eq!(counts(&mut state), ([0, 0], [0, 0]));
}
