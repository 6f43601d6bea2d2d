//! `explain SRC DST:PORT/PROTO`: what would happen to a new connection on this node, step by step, from the pinned maps alone.
//!
//! What must stay true: nothing is decided here. Which frontend is found, who asks, which set and whether the source is masqueraded
//! is what `proxy_common` says, whose functions the programs run; this module reads rows, calls them and finds words.

mod facts;
mod question;
mod report;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::path::Path;

use proxy_common::addr::{Addr4, Addr6, Address, Port};
use proxy_common::affinity::AffinityKey;
use proxy_common::backend::{BACKEND_LOCAL, BACKEND_TERMINATING};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, Frontend, Origin};
use proxy_common::link::LINK_PODS;
use proxy_common::lookup::{self, Match};
use proxy_common::pick;
use proxy_common::reason::Reason;
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS};

use self::facts::Facts;
pub use self::question::{Question, Source};
pub use self::report::{Candidate, Explanation};
use super::{InspectError, Output, open, output, rows};

/// The explanation as text.
pub fn explain(bpf_dir: &Path, question: &Question, output: Output) -> Result<String, InspectError> {
    let explanation = explanation(bpf_dir, question)?;
    match output {
        Output::Json | Output::Yaml => output::serialize(&explanation, output),
        Output::Table | Output::Wide => Ok(explanation.to_string()),
    }
}

/// What [`explain`] prints.
pub fn explanation(bpf_dir: &Path, question: &Question) -> Result<Explanation, InspectError> {
    let tables = open(bpf_dir)?;
    let mut explanation = if question.destination.is_ipv4() {
        decide(&Facts::<Addr4>::read(&tables, bpf_dir)?, question)?
    } else {
        decide(&Facts::<Addr6>::read(&tables, bpf_dir)?, question)?
    };
    let is_host = explanation.origin == "host";
    explanation.connections = rows::connections(&tables)?;
    explanation.connections.retain(|row| {
        let is_client = match question.source {
            Source::Host => row.origin == "node",
            Source::Address(ip) => row.client.ip() == ip && (row.origin == "node") == is_host,
        };
        is_client && row.frontend == question.destination && row.protocol == question.protocol.to_string()
    });
    Ok(explanation)
}

/// The decision, in the order in which the programs take it.
fn decide<A: Address>(facts: &Facts<'_, A>, question: &Question) -> Result<Explanation, InspectError> {
    let mut said = Explanation::new(question);
    let dst = A::from_ip(question.destination.ip()).ok_or(InspectError::Families)?;
    let src = match question.source {
        Source::Host => None,
        Source::Address(ip) => Some(A::from_ip(ip).ok_or(InspectError::Families)?),
    };
    let origin = origin(facts, src.as_ref(), question, &mut said);
    said.origin = match origin {
        Origin::Pod => "pod",
        Origin::Host => "host",
        Origin::External => "external",
    };
    let found = lookup::frontend(
        &facts.for_client(origin),
        dst,
        Port::new(question.destination.port()),
        question.protocol.number(),
    );
    let Some((frontend, found_by)) = found else {
        unknown(facts, &dst, &mut said);
        return Ok(said);
    };
    describe(facts, frontend, found_by, &dst, &mut said);
    if origin == Origin::Host && facts.is_node(&dst) && !facts.reaches_own_address(question.protocol) {
        said.verdict = "notAService";
        said.step(
            "what a node sends to its own address never leaves it, and only the socket programs, which serve TCP and UDP, could \
             translate it: they are not attached, or the protocol is another",
        );
        return Ok(said);
    }
    if let Err(reason) = admitted(facts, frontend, origin, src, &dst, &mut said)? {
        said.end(reason);
        return Ok(said);
    }
    let is_local_policy = frontend.flags & FRONTEND_LOCAL != 0;
    let range = frontend.range(origin);
    said.set = Some(if range == frontend.local && is_local_policy {
        "local"
    } else {
        "cluster"
    });
    said.step(
        match (is_local_policy, range == frontend.cluster && range != frontend.local) {
            (false, _) => "the cluster set serves: the traffic policy is Cluster (S52)",
            (true, true) => "the cluster set serves: the traffic policy Local binds external clients only (S88)",
            (true, false) => "the local set serves: the traffic policy is Local (S57, S87)",
        },
    );
    masquerade(facts, frontend, origin, &mut said);
    for slot in range.first..range.first.saturating_add(range.count) {
        let Some(backend) = (facts.backend)(slot) else {
            said.end(Reason::BadRange);
            return Ok(said);
        };
        // Towards an endpoint on this node's own network nothing is masqueraded (S118); one that is the client itself always is (S110).
        let is_masqueraded =
            origin != Origin::Host && (said.masquerade || src == Some(backend.addr)) && !facts.is_node(&backend.addr);
        said.candidates.push(Candidate {
            address: std::net::SocketAddr::new(backend.addr.into(), backend.port.get()),
            local: backend.flags & BACKEND_LOCAL != 0,
            terminating: backend.flags & BACKEND_TERMINATING != 0,
            masqueraded: is_masqueraded,
        });
    }
    affinity(facts, frontend, origin, src.as_ref(), &mut said);
    if range.count == 0 {
        said.end(frontend.without_endpoint());
        return Ok(said);
    }
    said.verdict = "translated";
    Ok(said)
}

/// Who asks.
fn origin<A: Address>(facts: &Facts<'_, A>, src: Option<&A>, question: &Question, said: &mut Explanation) -> Origin {
    let Some(src) = src else {
        said.step("the client is this node itself");
        return Origin::of(HOOK_EGRESS, false);
    };
    if facts.is_node(src) {
        said.step(format!("the client is this node itself: {src} is one of its addresses"));
        return Origin::of(HOOK_EGRESS, false);
    }
    let is_pod = if facts.pods_by_link {
        match question.interface.map(|ifindex| facts.links.get(&ifindex)) {
            Some(Some(link)) => {
                let is_pod = link.flags & LINK_PODS != 0;
                let what = if is_pod { "one of pods" } else { "not one of pods" };
                said.step(format!(
                    "pods are told by their interface, and this one is {what} (S114)"
                ));
                is_pod
            }
            Some(None) => {
                said.step("the interface is none that the programs are attached to: the connection is not seen there");
                false
            }
            None => {
                said.step(
                    "pods are told by their interface, and none is given: the client is taken for an external one; name the \
                     interface it is behind with --interface",
                );
                false
            }
        }
    } else {
        let is_pod = facts.settings.pods.contains(src);
        said.step(match (is_pod, facts.settings.pods.set != 0) {
            (true, _) => format!("the client is a pod: {src} is in {} (S114)", facts.pods()),
            (false, true) => format!(
                "the client is external: {src} is not in {}, where pods are (S114)",
                facts.pods()
            ),
            (false, false) => "the client counts as external: nothing is set to tell pods by (S115)".to_owned(),
        });
        is_pod
    };
    Origin::of(HOOK_INGRESS, is_pod)
}

/// No frontend was found.
fn unknown<A: Address>(facts: &Facts<'_, A>, dst: &A, said: &mut Explanation) {
    if facts.settings.is_service(dst) {
        said.step(format!(
            "no frontend has this address and port, and {dst} is in a service network: nobody has it"
        ));
        return said.end(Reason::Unallocated);
    }
    said.verdict = "notAService";
    let why = match facts.node_addrs.get(dst) {
        Some(_) if facts.for_client(Origin::External).serves_node_ports(dst) => {
            ": it is an address of this node, but no Service has this node port"
        }
        Some(_) => ": it is an address of this node, which serves no node ports (--nodeport-addresses)",
        None => "",
    };
    said.step(format!(
        "no frontend has this address and port{why}; the packet goes on as it is"
    ));
}

/// Which frontend it is, and whose.
fn describe<A: Address>(facts: &Facts<'_, A>, frontend: &Frontend, by: Match, dst: &A, said: &mut Explanation) {
    let name = (facts.name)(frontend.service);
    said.matched = Some(match by {
        Match::Exact => "exact",
        Match::NodePort => "nodePort",
        Match::Undefined => "undefined",
    });
    said.step(match by {
        Match::Exact => format!("the address and port are those of {name} (S38)"),
        Match::NodePort => {
            format!("the port is a node port of {name}, and {dst} an address of this node that serves them (S81)")
        }
        Match::Undefined => {
            format!("{dst} is a cluster IP of the Service of {name}, but the port is none of its ports (S77)")
        }
    });
    said.service = Some(name);
    let has = |flag| frontend.flags & flag != 0;
    let kind = if has(FRONTEND_CLUSTER_IP) {
        "cluster IP"
    } else {
        "external"
    };
    let policy = if has(FRONTEND_LOCAL) { "Local" } else { "Cluster" };
    said.kind = Some(if has(FRONTEND_CLUSTER_IP) {
        "ClusterIP"
    } else {
        "External"
    });
    said.policy = Some(policy);
    said.affinity_seconds = frontend.affinity_seconds;
    if by != Match::Undefined {
        let sticky = match frontend.affinity_seconds {
            0 => "no session affinity".to_owned(),
            seconds => format!("session affinity of {seconds} s"),
        };
        said.step(format!(
            "it is a {kind} address with traffic policy {policy} and {sticky}"
        ));
    }
}

/// Whether the client may connect at all.
fn admitted<A: Address>(
    facts: &Facts<'_, A>,
    frontend: &Frontend,
    origin: Origin,
    src: Option<A>,
    dst: &A,
    said: &mut Explanation,
) -> Result<Result<(), Reason>, InspectError> {
    if frontend.flags & FRONTEND_SOURCE_RANGES == 0 {
        return Ok(frontend.admits(|| true));
    }
    // Who dials an address of the node on the node has that same address as source (S106).
    let source = match src {
        Some(src) => src,
        None if origin == Origin::Host && facts.is_node(dst) => *dst,
        None => return Err(InspectError::WhichAddress),
    };
    let is_allowed = (facts.is_source_allowed)(frontend.service, &source)?;
    let word = if is_allowed { "in one of" } else { "in none of" };
    said.step(format!(
        "the Service has source ranges, and {source} is {word} them (S101)"
    ));
    said.in_source_ranges = Some(is_allowed);
    Ok(frontend.admits(|| is_allowed))
}

/// Whether the endpoint sees another client.
fn masquerade<A: Address>(facts: &Facts<'_, A>, frontend: &Frontend, origin: Origin, said: &mut Explanation) {
    let has_pods = facts.pods_by_link || facts.settings.pods.set != 0;
    said.masquerade = frontend.masquerades(origin, has_pods, facts.masquerade_all.unwrap_or(false));
    said.step(if said.masquerade {
        "the client is masqueraded: the endpoint sees the address of the interface towards it (S108, S116)"
    } else if origin == Origin::Host {
        "nothing is masqueraded: the node's own connections carry an address of the node already"
    } else {
        "the client keeps its address, unless it is its own endpoint (S110)"
    });
    let is_decisive = frontend.flags & FRONTEND_CLUSTER_IP != 0 && origin != Origin::Host && !said.masquerade;
    if facts.masquerade_all.is_none() && is_decisive {
        said.step(
            "the programs' constants cannot be read: with --masquerade-all it is masqueraded all the same (S111)",
        );
    }
}

/// The endpoint the client is sent to again.
fn affinity<A: Address>(
    facts: &Facts<'_, A>,
    frontend: &Frontend,
    origin: Origin,
    src: Option<&A>,
    said: &mut Explanation,
) {
    if frontend.affinity_seconds == 0 {
        return;
    }
    let key = AffinityKey::of(frontend.service, origin, src.unwrap_or(&A::zeroed()));
    let range = frontend.range(origin);
    let Some(record) = (facts.affinity)(&key) else {
        return said.step("the client has no affinity record: any candidate is chosen and remembered (S132)");
    };
    let endpoint = std::net::SocketAddr::new(record.addr.into(), record.port.get());
    let find = |slot| -> Option<Ordering> {
        let backend = (facts.backend)(slot)?;
        let order = backend.addr.compare(&record.addr);
        Some(order.then_with(|| backend.port.get().cmp(&record.port.get())))
    };
    if !record.is_fresh(frontend.affinity_seconds, facts.now) {
        return said.step(format!(
            "the client's affinity to {endpoint} has run out: any candidate is chosen (S133)"
        ));
    }
    if pick::find(range.first, range.count, find).is_none() {
        return said.step(format!(
            "the client's affinity is to {endpoint}, which is no candidate: another is chosen (S135)"
        ));
    }
    said.affinity = Some(endpoint);
    said.step(format!(
        "the client is sent to {endpoint} again: its affinity record says so (S132)"
    ));
}
