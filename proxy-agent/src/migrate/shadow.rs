//! The shadow comparison: what kube-proxy's rules do, against what an agent with these options would do.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proxy_common::addr::Address;
use proxy_common::frontend::{FRONTEND_LOCAL, FRONTEND_UNDEFINED};
use serde::Serialize;

use super::kube_proxy::{Frontend, Mode, Rules, Serves};
use crate::inspect::Columns;
use crate::plan::{FamilyPlan, ServicePortName, ServicePortPlan};

/// Something that kube-proxy and the agent do not do alike.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShadowDifference {
    /// kube-proxy's mode.
    pub mode: String,
    /// Namespace/name:port of the Service, as far as it is known.
    pub service: String,
    /// What is dialled.
    pub address: String,
    /// `missingInKubeProxy`, `missingInAgent`, `endpoints`, `rules`.
    pub problem: &'static str,
    /// What kube-proxy does.
    pub kube_proxy: String,
    /// What the agent would do.
    pub agent: String,
    /// Why it is meant to be so; empty if it is not.
    pub reason: String,
}

impl Columns for ShadowDifference {
    const HEADINGS: &'static [&'static str] =
        &["MODE", "SERVICE", "ADDRESS", "PROBLEM", "KUBE-PROXY", "AGENT", "REASON"];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        let shown = |text: &str| if text.is_empty() { "<none>" } else { text }.to_owned();
        vec![
            self.mode.clone(),
            shown(&self.service),
            self.address.clone(),
            self.problem.to_owned(),
            shown(&self.kube_proxy),
            shown(&self.agent),
            shown(&self.reason),
        ]
    }
}

/// What an agent would do, by what is dialled.
pub(super) type Planned = BTreeMap<Frontend, Vec<Claim>>;

/// A service port that wants an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    created: i64,
    service: String,
    serves: Serves,
}

/// What the plans say a client from outside meets. The first claim of an address is the one that counts (S37).
pub(super) fn planned(plans: &[(ServicePortName, ServicePortPlan)]) -> Planned {
    let mut planned = Planned::new();
    for (name, plan) in plans {
        add(&mut planned, name, plan.created, &plan.v4);
        add(&mut planned, name, plan.created, &plan.v6);
    }
    for claims in planned.values_mut() {
        claims.sort_by(|a, b| (a.created, &a.service).cmp(&(b.created, &b.service)));
    }
    planned
}

fn add<A: Address>(planned: &mut Planned, name: &ServicePortName, created: i64, plan: &FamilyPlan<A>) {
    for frontend in plan
        .frontends
        .iter()
        .filter(|frontend| frontend.flags & FRONTEND_UNDEFINED == 0)
    {
        let set = if frontend.flags & FRONTEND_LOCAL != 0 {
            &plan.local
        } else {
            &plan.cluster
        };
        let endpoints = set.selectable.iter();
        let endpoints = endpoints.map(|backend| SocketAddr::new(backend.addr.into(), backend.port.get()));
        let serves = match (set.selectable.is_empty(), plan.has_endpoints) {
            (false, _) => Serves::Endpoints(endpoints.collect()),
            (true, true) => Serves::Dropped,
            (true, false) => Serves::Refused,
        };
        let key = Frontend {
            address: frontend.addr.into(),
            port: frontend.port.get(),
            protocol: name.protocol,
        };
        let port = if name.port.is_empty() { "" } else { ":" };
        planned.entry(key).or_default().push(Claim {
            created,
            service: format!("{}/{}{port}{}", name.namespace, name.name, name.port),
            serves,
        });
    }
}

/// Everything that differs. With the name of a canary's proxy, what only one side serves is as it should be (S1).
pub(super) fn compare(rules: &Rules, planned: &Planned, proxy_name: Option<&str>) -> Vec<ShadowDifference> {
    let mode = rules.mode.to_string();
    let mut found: Vec<_> = rules.problems.iter().map(|problem| broken(&mode, problem)).collect();
    for (frontend, (serves, service)) in &rules.frontends {
        let Some(claims) = planned.get(frontend) else {
            let reason = proxy_name.map(|name| format!("left to kube-proxy: not labelled {name}"));
            found.push(ShadowDifference {
                mode: mode.clone(),
                service: service.clone(),
                address: frontend.to_string(),
                problem: "missingInAgent",
                kube_proxy: serves.to_string(),
                agent: String::new(),
                reason: reason.unwrap_or_default(),
            });
            continue;
        };
        let Some(first) = claims.first().filter(|first| first.serves != *serves) else {
            continue;
        };
        let other = claims.iter().find(|claim| claim.serves == *serves);
        let reason = other.map(|other| {
            let (ours, theirs) = (&first.service, &other.service);
            format!("{ours} and {theirs} both want it: the agent gives it to the older one, kube-proxy to any")
        });
        found.push(ShadowDifference {
            mode: mode.clone(),
            service: first.service.clone(),
            address: frontend.to_string(),
            problem: "endpoints",
            kube_proxy: only(serves, &first.serves),
            agent: only(&first.serves, serves),
            reason: reason.unwrap_or_default(),
        });
    }
    for (frontend, claims) in planned {
        let Some(first) = claims.first().filter(|_| !rules.frontends.contains_key(frontend)) else {
            continue;
        };
        let reason = proxy_name.map(|name| format!("kube-proxy leaves it alone: labelled {name}"));
        found.push(ShadowDifference {
            mode: mode.clone(),
            service: first.service.clone(),
            address: frontend.to_string(),
            problem: "missingInKubeProxy",
            kube_proxy: String::new(),
            agent: first.serves.to_string(),
            reason: reason.unwrap_or_default(),
        });
    }
    found.extend(loopback(rules.mode, planned));
    found
}

fn broken(mode: &str, problem: &str) -> ShadowDifference {
    ShadowDifference {
        mode: mode.to_owned(),
        service: String::new(),
        address: String::new(),
        problem: "rules",
        kube_proxy: problem.to_owned(),
        agent: String::new(),
        reason: String::new(),
    }
}

/// The endpoints that only one side has, or its verdict.
fn only(one: &Serves, other: &Serves) -> String {
    match (one, other) {
        (Serves::Endpoints(one), Serves::Endpoints(other)) => {
            let only: Vec<String> = one.difference(other).map(ToString::to_string).collect();
            if only.is_empty() {
                String::new()
            } else {
                format!("only here: {}", only.join(","))
            }
        }
        (one, _) => one.to_string(),
    }
}

/// Node ports at loopback addresses, which not every mode serves.
fn loopback(mode: Mode, planned: &Planned) -> Option<ShadowDifference> {
    let has_node_ports = planned.keys().any(|frontend| frontend.address.is_unspecified());
    let what = match mode {
        Mode::Nftables => "127.0.0.0/8 and ::1",
        Mode::Iptables | Mode::LegacyIptables => "::1",
    };
    has_node_ports.then(|| ShadowDifference {
        mode: mode.to_string(),
        service: String::new(),
        address: format!("node ports at {what}"),
        problem: "missingInKubeProxy",
        kube_proxy: String::new(),
        agent: "served to the node's own sockets".to_owned(),
        reason: "kube-proxy cannot in this mode; --localhost-nodeports=false leaves it so".to_owned(),
    })
}
