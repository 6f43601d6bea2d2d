//! The state of the cluster: applies changes in whatever order they come, keeps slices with their service, and replans exactly the
//! services that a change touched (S166). Owned by the one task in `run`; no clock, no I/O.
//!
//! What must stay true: a slice is attached to one service at a time (S13); a service entry exists while it has a Service, a slice
//! or a plan that was handed out (S12); nothing is handed out before every kind has been listed once (S160).

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Protocol};

use super::networks::ServiceNetworks;
use super::slices::Slices;
use super::{Change, EndpointSlice, Family, Node, ObjectName, Service};
use crate::plan::{HealthCheck, NoLocal, NodeContext, ServicePortName, ServicePortPlan, health_check, plan_service};

/// Everything known about the cluster.
#[derive(Debug, Default)]
pub struct ClusterState {
    services: HashMap<ObjectName, ServiceEntry>,
    /// slice → name of the service it is attached to, in the same namespace.
    attached: HashMap<ObjectName, Arc<str>>,
    node: Option<Node>,
    context: NodeContext,
    service_networks: ServiceNetworks,
    listed: Listed,
    dirty: BTreeSet<ObjectName>,
    /// Services that changed only by losing a ready endpoint. It may be on its way to another of their slices (S42).
    settling: BTreeSet<ObjectName>,
    health_checks: Vec<(ObjectName, Option<HealthCheck>)>,
    /// The sum over all services.
    no_local: NoLocal,
    pending: PendingChanges,
}

/// Changes applied since the last [`ClusterState::take_pending`], for the metrics.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PendingChanges {
    /// Changes of Services: IPv4, IPv6.
    pub services: [u64; 2],
    /// Changes of EndpointSlices: IPv4, IPv6.
    pub endpoints: [u64; 2],
    /// When the changes of EndpointSlices were made (S188), by family: `false` is IPv4.
    pub triggers: Vec<(bool, SystemTime)>,
}

#[derive(Debug, Default)]
struct ServiceEntry {
    service: Option<Service>,
    slices: Slices,
    /// Ports whose plan was handed out: those that must be withdrawn when they are not planned any more.
    planned: Vec<(Box<str>, Protocol)>,
    /// What was handed out last.
    health_check: Option<HealthCheck>,
    /// This service's share.
    no_local: NoLocal,
}

#[derive(Debug, Default)]
struct Listed {
    services: bool,
    slices: bool,
    node: bool,
    service_cidrs: bool,
}

impl ClusterState {
    /// Takes in one change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Services(services) => self.replace_services(services),
            Change::Slices(slices) => self.replace_slices(slices),
            Change::Service(name, service) => self.set_service(name, service),
            Change::Slice(name, slice, trigger) => self.set_slice(name, slice, trigger),
            Change::Node(node) => self.set_node(node),
            Change::ServiceCidrs(objects) => {
                self.service_networks.replace(objects);
                self.listed.service_cidrs = true;
            }
            Change::ServiceCidr(name, object) => self.service_networks.set(name, object),
        }
    }

    /// Every kind has been listed once.
    pub fn is_complete(&self) -> bool {
        self.listed.services && self.listed.slices && self.listed.node && self.listed.service_cidrs
    }

    /// Has some service lost an endpoint that may turn up again in a moment?
    pub fn is_settling(&self) -> bool {
        !self.settling.is_empty()
    }

    /// The moment is over: what has not turned up is gone.
    pub fn settle(&mut self) {
        self.dirty.append(&mut self.settling);
    }

    /// Is there anything that [`Self::take_changes`] would return?
    pub fn has_changes(&self) -> bool {
        self.is_complete() && !self.dirty.is_empty()
    }

    /// The own Node, if it is known.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The networks that cluster IPs are taken from (S78): sorted, each once. None known: nothing can be said about such addresses.
    pub fn service_networks(&self) -> &[IpNet] {
        self.service_networks.union()
    }

    /// Are the service networks others than at the last call? Never before every kind has been listed.
    pub fn take_service_networks_changed(&mut self) -> bool {
        self.is_complete() && self.service_networks.take_changed()
    }

    /// What the changes since the last call amount to, for the metrics.
    pub fn take_pending(&mut self) -> PendingChanges {
        std::mem::take(&mut self.pending)
    }

    /// See [`Self::take_pending`].
    pub fn pending(&self) -> &PendingChanges {
        &self.pending
    }

    /// Plans the services that changed since the last call, without those that are settling; `None` for a service port that is gone.
    /// Nothing before every kind has been listed.
    pub fn take_changes(&mut self) -> Vec<(ServicePortName, Option<ServicePortPlan>)> {
        if !self.is_complete() {
            return Vec::new();
        }
        let mut changes = Vec::new();
        let dirty = std::mem::take(&mut self.dirty);
        self.settling.retain(|name| !dirty.contains(name));
        for name in dirty {
            let Entry::Occupied(mut occupied) = self.services.entry(name) else {
                continue;
            };
            let name = occupied.key().clone();
            let entry = occupied.get_mut();
            self.no_local -= entry.no_local;
            entry.replan(&name, &self.context, &mut changes);
            self.no_local += entry.no_local;
            let check = entry
                .service
                .as_ref()
                .and_then(|service| health_check(service, entry.slices.iter()));
            if check != entry.health_check {
                entry.health_check = check;
                self.health_checks.push((name, check));
            }
            if occupied.get().is_unused() {
                occupied.remove();
            }
        }
        changes
    }

    /// Service ports that their policy leaves without an endpoint here, according to the plans taken so far (S189).
    pub fn no_local(&self) -> NoLocal {
        self.no_local
    }

    /// Health checks that changed with the plans taken so far; `None` for one that is gone.
    pub fn take_health_checks(&mut self) -> Vec<(ObjectName, Option<HealthCheck>)> {
        std::mem::take(&mut self.health_checks)
    }

    fn set_service(&mut self, name: ObjectName, service: Option<Service>) {
        if service.is_none() && !self.services.contains_key(&name) {
            return;
        }
        let entry = self.services.entry(name.clone()).or_default();
        if entry.service == service {
            return;
        }
        for (family, count) in self.pending.services.iter_mut().enumerate() {
            let in_family = |service: &Service| match family {
                0 => service.cluster_ip4.is_some(),
                _ => service.cluster_ip6.is_some(),
            };
            *count += u64::from(entry.service.iter().chain(&service).any(in_family));
        }
        entry.service = service;
        self.dirty.insert(name);
    }

    fn set_slice(&mut self, name: ObjectName, slice: Option<EndpointSlice>, trigger: Option<SystemTime>) {
        let old_owner = self.attached.get(&name).cloned();
        let new_owner = slice.as_ref().map(|slice| slice.service.clone());
        let mut family = None;
        if let Some(owner) = old_owner.filter(|owner| new_owner.as_ref() != Some(owner)) {
            self.attached.remove(&name);
            let owner = ObjectName::new(name.namespace.clone(), owner);
            if let Some(old) = self
                .services
                .get_mut(&owner)
                .and_then(|entry| entry.slices.remove(&name.name))
            {
                family = Some(old.endpoints.family());
                self.touch(owner, Some(&old));
            }
        }
        if let Some(slice) = slice {
            let owner = ObjectName::new(name.namespace.clone(), slice.service.clone());
            let slices = &mut self.services.entry(owner.clone()).or_default().slices;
            if slices.get(&name.name) != Some(&slice) {
                family = Some(slice.endpoints.family());
                self.attached.insert(name.clone(), slice.service.clone());
                let old = slices.insert(slice);
                self.touch(owner, old.as_ref());
            }
        }
        let Some(family) = family else { return };
        self.pending.endpoints[usize::from(family == 6)] += 1;
        if let Some(time) = trigger.filter(|_| new_owner.is_some()) {
            self.pending.triggers.push((family == 6, time));
        }
    }

    /// A slice of this service changed; `old` is what it was.
    fn touch(&mut self, owner: ObjectName, old: Option<&EndpointSlice>) {
        let lost = |entry: &ServiceEntry| {
            old.is_some_and(|old| {
                !entry.has_only(old) && (entry.has_lost::<Addr4>(old) || entry.has_lost::<Addr6>(old))
            })
        };
        if !self.dirty.contains(&owner) && self.services.get(&owner).is_some_and(lost) {
            self.settling.insert(owner);
        } else {
            self.settling.remove(&owner);
            self.dirty.insert(owner);
        }
    }

    fn set_node(&mut self, node: Option<Node>) {
        let context = node.as_ref().map(NodeContext::from).unwrap_or_default();
        if context != self.context {
            self.context = context;
            self.dirty.extend(self.services.keys().cloned());
        }
        self.node = node;
        self.listed.node = true;
    }

    fn replace_services(&mut self, services: Vec<Service>) {
        let names: HashSet<ObjectName> = services.iter().map(|service| service.name.clone()).collect();
        let gone: Vec<ObjectName> = self
            .services
            .iter()
            .filter(|(name, entry)| entry.service.is_some() && !names.contains(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.set_service(name, None);
        }
        for service in services {
            self.set_service(service.name.clone(), Some(service));
        }
        self.listed.services = true;
    }

    fn replace_slices(&mut self, slices: Vec<EndpointSlice>) {
        let names: HashSet<ObjectName> = slices.iter().map(|slice| slice.name.clone()).collect();
        let gone: Vec<ObjectName> = self
            .attached
            .keys()
            .filter(|name| !names.contains(*name))
            .cloned()
            .collect();
        for name in gone {
            self.set_slice(name, None, None);
        }
        for slice in slices {
            self.set_slice(slice.name.clone(), Some(slice), None);
        }
        self.listed.slices = true;
    }
}

impl ServiceEntry {
    fn replan(
        &mut self,
        name: &ObjectName,
        context: &NodeContext,
        changes: &mut Vec<(ServicePortName, Option<ServicePortPlan>)>,
    ) {
        let plans = match &self.service {
            Some(service) => plan_service(service, self.slices.iter(), context),
            None => Vec::new(),
        };
        self.no_local = NoLocal::default();
        for (_, plan) in &plans {
            self.no_local += NoLocal::of(plan);
        }
        let planned = plans
            .iter()
            .map(|(port, _)| (port.port.as_str().into(), port.protocol))
            .collect();
        let before = std::mem::replace(&mut self.planned, planned);
        for (port, protocol) in before {
            if !self
                .planned
                .iter()
                .any(|(name, proto)| (name, *proto) == (&port, protocol))
            {
                changes.push((service_port_name(name, &port, protocol), None));
            }
        }
        changes.extend(plans.into_iter().map(|(port, plan)| (port, Some(plan))));
    }

    /// Was a ready endpoint in `old` that is in no slice any more?
    fn has_lost<A: Family>(&self, old: &EndpointSlice) -> bool {
        // Most endpoints stay where they were, so that slice is looked at first.
        let slices = || self.slices.get(&old.name.name).into_iter().chain(self.slices.iter());
        let is_there = |addr: A| slices().any(|slice| A::endpoints(&slice.endpoints).iter().any(|e| e.addr == addr));
        A::endpoints(&old.endpoints)
            .iter()
            .any(|e| e.is_ready() && !is_there(e.addr))
    }

    /// Is `old` still there, and the only slice of its family? What it lost has no other slice to turn up in: whoever moves an endpoint
    /// into a new slice makes that one first.
    fn has_only(&self, old: &EndpointSlice) -> bool {
        let others = |slice: &&EndpointSlice| slice.endpoints.family() == old.endpoints.family();
        self.slices.get(&old.name.name).is_some() && self.slices.iter().filter(others).count() == 1
    }

    fn is_unused(&self) -> bool {
        self.service.is_none() && self.slices.is_empty() && self.planned.is_empty()
    }
}

/// The full name of a port of a service.
pub(crate) fn service_port_name(service: &ObjectName, port: &str, protocol: Protocol) -> ServicePortName {
    ServicePortName {
        namespace: service.namespace.to_string(),
        name: service.name.to_string(),
        port: port.to_owned(),
        protocol,
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
