//! What must hold for every set of objects: shapes of the ranges, and independence of the order in which things arrive.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::model::fixtures::{object, service, slice, with_zones};
use crate::model::{Change, ClusterState, Node};

const SERVICES: [&str; 3] = ["web", "dns", "api"];

fn any_slice(name: usize) -> impl Strategy<Value = EndpointSlice> {
    let endpoint = (0u8..6, 0u8..64);
    let zones = proptest::option::of(proptest::sample::subsequence(vec!["x", "y"], 1..=2));
    (
        0usize..3,
        0u16..3,
        proptest::collection::vec(endpoint, 0..6),
        any::<bool>(),
        zones,
    )
        .prop_map(move |(owner, port, endpoints, ipv6, zones)| {
            let names: Vec<(String, u8)> = endpoints
                .into_iter()
                .map(|(host, flags)| {
                    (
                        if ipv6 {
                            format!("fd00::{host}")
                        } else {
                            format!("10.0.0.{host}")
                        },
                        flags,
                    )
                })
                .collect();
            let endpoints: Vec<(&str, u8)> = names.iter().map(|(name, flags)| (name.as_str(), *flags)).collect();
            let ports = [format!("http:{}/TCP", 8080 + port), format!("dns:{}/UDP", 53 + port)];
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            let slice = slice(&format!("s{name}"), SERVICES[owner], &ports, &endpoints);
            match zones {
                Some(zones) => with_zones(slice, &zones),
                None => slice,
            }
        })
}

fn any_slices() -> impl Strategy<Value = Vec<EndpointSlice>> {
    (any_slice(0), any_slice(1), any_slice(2), any_slice(3)).prop_map(|(a, b, c, d)| vec![a, b, c, d])
}

fn any_service() -> impl Strategy<Value = Service> {
    (0usize..3, any::<bool>(), any::<bool>(), 1usize..=2, 1usize..=2).prop_map(
        |(name, local, six_first, ips, ports)| {
            let v4 = format!("10.96.0.{name}");
            let v6 = format!("fd00:96::{name}");
            let both = if six_first {
                [v6.as_str(), v4.as_str()]
            } else {
                [v4.as_str(), v6.as_str()]
            };
            let mut service = service(SERVICES[name], &both[..ips], &["http:80/TCP", "dns:53/UDP"][..ports]);
            service.internal_local = local;
            service
        },
    )
}

fn any_node() -> impl Strategy<Value = Option<Node>> {
    proptest::option::of(proptest::sample::select(vec!["x", "y"])).prop_map(|zone| {
        zone.map(|zone| Node {
            zone: Some(zone.into()),
            ..Node::default()
        })
    })
}

fn check_sorted<A: Ord + Copy + fmt::Debug>(set: &[Backend<A>]) -> Result<(), TestCaseError> {
    prop_assert!(
        set.windows(2).all(|w| (w[0].addr, w[0].port) < (w[1].addr, w[1].port)),
        "{set:?}"
    );
    Ok(())
}

fn check_family<A: Ord + Copy + fmt::Debug>(plan: &FamilyPlan<A>) -> Result<(), TestCaseError> {
    for set in [&plan.cluster, &plan.local] {
        check_sorted(&set.selectable)?;
        check_sorted(&set.keep)?;
        let selected: BTreeSet<_> = set.selectable.iter().map(|b| (b.addr, b.port)).collect();
        prop_assert!(set.keep.iter().all(|b| !selected.contains(&(b.addr, b.port))));
        prop_assert!(set.selectable.is_empty() || plan.has_endpoints);
    }
    prop_assert!(
        plan.has_endpoints != plan.cluster.selectable.is_empty(),
        "the cluster set is empty only if nothing is usable"
    );
    Ok(())
}

/// Follows the changes handed out, as the datapath does.
fn absorb(state: &mut ClusterState, plans: &mut BTreeMap<ServicePortName, ServicePortPlan>) {
    state.settle();
    for (name, plan) in state.take_changes() {
        match plan {
            Some(plan) => plans.insert(name, plan),
            None => plans.remove(&name),
        };
    }
}

fn listed(
    services: Vec<Service>,
    slices: Vec<EndpointSlice>,
    node: Option<Node>,
) -> BTreeMap<ServicePortName, ServicePortPlan> {
    let mut state = ClusterState::default();
    let mut plans = BTreeMap::new();
    state.apply(Change::Services(services));
    state.apply(Change::Slices(slices));
    state.apply(Change::Node(node));
    state.apply(Change::ServiceCidrs(Vec::new()));
    absorb(&mut state, &mut plans);
    plans
}

/// One object as of the last event that named it.
fn last<K: Ord, V>(items: impl IntoIterator<Item = (K, V)>) -> Vec<V> {
    items.into_iter().collect::<BTreeMap<K, V>>().into_values().collect()
}

proptest! {
    #[test]
    fn ranges_are_sorted_unique_and_disjoint(service in any_service(), slices in any_slices(), node in any_node()) {
        let node = node.as_ref().map(NodeContext::from).unwrap_or_default();
        for (_, plan) in plan_service(&service, slices.iter(), &node) {
            for family in [!plan.v4.frontends.is_empty(), !plan.v6.frontends.is_empty()] {
                prop_assert!(family || plan.v4.frontends.len() + plan.v6.frontends.len() > 0);
            }
            check_family(&plan.v4)?;
            check_family(&plan.v6)?;
        }
    }

    #[test]
    fn order_of_slices_does_not_matter(
        service in any_service(),
        (slices, shuffled) in any_slices().prop_flat_map(|s| (Just(s.clone()), Just(s).prop_shuffle())),
        node in any_node(),
    ) {
        let node = node.as_ref().map(NodeContext::from).unwrap_or_default();
        prop_assert_eq!(plan_service(&service, slices.iter(), &node), plan_service(&service, shuffled.iter(), &node));
    }

    /// Whatever happened on the way, what stands at the end is what a fresh start with the final objects would make.
    #[test]
    fn history_does_not_matter(
        services in proptest::collection::vec((any_service(), any::<bool>()), 0..12),
        slices in proptest::collection::vec((0usize..4).prop_flat_map(|n| (any_slice(n), any::<bool>())), 0..12),
        nodes in proptest::collection::vec(any_node(), 1..3),
        order in any::<u64>(),
    ) {
        let mut state = ClusterState::default();
        let mut plans = BTreeMap::new();
        state.apply(Change::Services(Vec::new()));
        prop_assert!(state.take_changes().is_empty());
        state.apply(Change::Slices(Vec::new()));
        state.apply(Change::Node(None));
        state.apply(Change::ServiceCidrs(Vec::new()));

        // Interleaves the three histories by the bits of `order`; each keeps its own order.
        let (mut service_events, mut slice_events, mut node_events) = (services.iter(), slices.iter(), nodes.iter());
        for step in 0..40 {
            match (order >> step) & 3 {
                0 => if let Some((s, alive)) = service_events.next() {
                    state.apply(Change::Service(s.name.clone(), alive.then(|| s.clone())));
                },
                1 => if let Some((s, alive)) = slice_events.next() {
                    state.apply(Change::Slice(s.name.clone(), alive.then(|| s.clone()), None));
                },
                2 => if let Some(node) = node_events.next() {
                    state.apply(Change::Node(node.clone()));
                },
                _ => absorb(&mut state, &mut plans),
            }
        }
        for (s, alive) in service_events {
            state.apply(Change::Service(s.name.clone(), alive.then(|| s.clone())));
        }
        for (s, alive) in slice_events {
            state.apply(Change::Slice(s.name.clone(), alive.then(|| s.clone()), None));
        }
        for node in node_events {
            state.apply(Change::Node(node.clone()));
        }
        absorb(&mut state, &mut plans);

        let services: Vec<_> = last(services.into_iter().map(|(s, alive)| (s.name.clone(), alive.then_some(s)))).into_iter().flatten().collect();
        let slices: Vec<_> = last(slices.into_iter().map(|(s, alive)| (s.name.clone(), alive.then_some(s)))).into_iter().flatten().collect();
        prop_assert_eq!(&plans, &listed(services.clone(), slices.clone(), nodes.last().cloned().flatten()));

        // A full list of the same changes nothing; an empty one takes everything away.
        state.apply(Change::Services(services));
        state.apply(Change::Slices(slices));
        prop_assert!(state.take_changes().is_empty());
        state.apply(Change::Services(Vec::new()));
        state.apply(Change::Slices(Vec::new()));
        absorb(&mut state, &mut plans);
        prop_assert!(plans.is_empty());
        prop_assert!(!state.remembers(&object("web")));
    }
}
