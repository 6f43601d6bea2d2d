//! UDP flows whose backend left choose again at their next packet: their entries in the rewrite table are removed (S141–S149).
//! Called by `Datapath` right after frontends were written, and once more after the grace period, because a program that read the
//! old frontend may have written an entry meanwhile.
//!
//! At first only the entries for requests go. The others follow after the grace period: an answer may be under way, and would reach
//! its client with the backend's address.
//!
//! Only UDP: TCP and SCTP connections stay where they are for as long as they live (S147).

use std::collections::{BTreeSet, HashMap};

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{Frontend, FrontendKey};
use proxy_common::rewrite::{HOOK_EGRESS, KIND_REQUEST, REWRITE_MASQUERADED, Rewrite, RewriteKey};

use super::error::TableError;
use super::sync::FamilySync;
use super::sys::Cursor;
use super::tables::{FamilyTables, RewriteEntry};

/// Whose flows are looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Services {
    /// Every service's, after a start.
    All,
    /// Those of these ids.
    Ids(BTreeSet<u32>),
}

impl Services {
    fn contains(&self, id: u32) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => ids.contains(&id),
        }
    }

    /// Both together.
    pub(super) fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Ids(mut ids), Self::Ids(more)) => {
                ids.extend(more);
                Self::Ids(ids)
            }
            _ => Self::All,
        }
    }
}

/// Where a flow to a frontend may stay: the service, and its backends, selectable or kept (S145), of either range (S143).
type Allowed<A> = Option<(u32, BTreeSet<(A, Port)>)>;

/// Flows that have to choose again, by what their entries for requests were.
pub(super) type Departed<A> = Vec<RewriteEntry<A>>;

/// Makes the flows choose again that have to; gives what is to be forgotten later.
pub(super) fn sweep<A: Address, T: FamilyTables<A>>(
    tables: &mut T,
    sync: &FamilySync<A>,
    services: &Services,
) -> Result<Departed<A>, TableError> {
    let mut allowed: HashMap<FrontendKey<A>, Allowed<A>> = HashMap::new();
    let mut cursor = Cursor::default();
    let mut departed = Vec::new();
    loop {
        let mut entries = Vec::new();
        let at_end = tables.scan_rewrites(&mut cursor, &mut entries)?;
        for (key, rewrite) in entries {
            let is_request = rewrite.kind == KIND_REQUEST && key.protocol == Protocol::Udp.number();
            if !is_request || !services.contains(rewrite.service) {
                continue;
            }
            let dialled = FrontendKey::new(key.dst, key.dst_port, key.protocol);
            let allowed = allowed
                .entry(dialled)
                .or_insert_with(|| allowed_at(tables, frontend_of(sync, &dialled)));
            let stays = allowed.as_ref().is_some_and(|(service, backends)| {
                *service == rewrite.service && backends.contains(&(rewrite.dst, rewrite.dst_port))
            });
            if !stays {
                tables.remove_rewrite(&key)?;
                departed.push((key, rewrite));
            }
        }
        if at_end {
            return Ok(departed);
        }
    }
}

/// The frontend that was dialled: by its address, or as a node port on an address of the node (S38).
fn frontend_of<'s, A: Address>(sync: &'s FamilySync<A>, dialled: &FrontendKey<A>) -> Option<&'s Frontend> {
    let node_port = FrontendKey::new(A::zeroed(), dialled.port, dialled.protocol);
    sync.frontend(dialled).or_else(|| sync.frontend(&node_port))
}

fn allowed_at<A: Address>(tables: &impl FamilyTables<A>, frontend: Option<&Frontend>) -> Allowed<A> {
    let frontend = frontend?;
    let backends = [frontend.cluster, frontend.local]
        .into_iter()
        .filter_map(|range| tables.backends(range.first, range.count.checked_add(range.keep)?).ok())
        .flatten()
        .map(|backend| (backend.addr, backend.port))
        .collect();
    Some((frontend.service, backends))
}

/// Removes what is left of flows that went elsewhere. The flow may have come back to its backend meanwhile; then all of it is in use.
pub(super) fn forget<A: Address>(
    tables: &mut impl FamilyTables<A>,
    departed: &[RewriteEntry<A>],
) -> Result<(), TableError> {
    for (key, rewrite) in departed {
        let now = tables.rewrite(key)?;
        if now.is_none_or(|now| (now.dst, now.dst_port) != (rewrite.dst, rewrite.dst_port)) {
            remove_rest(tables, key, rewrite)?;
        }
    }
    Ok(())
}

/// Removes everything that was written with a request entry.
fn remove_rest<A: Address>(
    tables: &mut impl FamilyTables<A>,
    key: &RewriteKey<A>,
    rewrite: &Rewrite<A>,
) -> Result<(), TableError> {
    remove_partner(tables, key, rewrite)?;
    if rewrite.flags & REWRITE_MASQUERADED == 0 {
        return Ok(());
    }
    let outward_key = RewriteKey::new(
        rewrite.src,
        rewrite.src_port,
        rewrite.dst,
        rewrite.dst_port,
        key.protocol,
        HOOK_EGRESS,
    );
    if let Some(outward) = tables.rewrite(&outward_key)? {
        tables.remove_rewrite(&outward_key)?;
        remove_partner(tables, &outward_key, &outward)?;
    }
    Ok(())
}

/// Removes the entry of the other direction, if it still belongs to this one.
pub(super) fn remove_partner<A: Address>(
    tables: &mut impl FamilyTables<A>,
    key: &RewriteKey<A>,
    rewrite: &Rewrite<A>,
) -> Result<(), TableError> {
    if partner(tables, key, rewrite)?.is_some() {
        tables.remove_rewrite(&key.partner(rewrite))?;
    }
    Ok(())
}

/// The entry of the other direction, if it still undoes this one: another connection may have taken its key since.
pub(super) fn partner<A: Address>(
    tables: &impl FamilyTables<A>,
    key: &RewriteKey<A>,
    rewrite: &Rewrite<A>,
) -> Result<Option<Rewrite<A>>, TableError> {
    let undoes = |partner: &Rewrite<A>| {
        (partner.src, partner.src_port, partner.dst, partner.dst_port) == (key.dst, key.dst_port, key.src, key.src_port)
    };
    Ok(tables.rewrite(&key.partner(rewrite))?.filter(undoes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proxy_common::addr::Addr4;
    use proxy_common::backend::Backend;
    use proxy_common::rewrite::{HOOK_INGRESS, KIND_MASQUERADE, KIND_REPLY, KIND_UNMASQUERADE, Meta};

    use super::*;
    use crate::datapath::memory::MemoryTables;
    use crate::datapath::sync::Sync;
    use crate::plan::{Endpoints, FamilyPlan, FrontendPlan, ServicePortName, ServicePortPlan};

    const VIP: Addr4 = Addr4([10, 96, 0, 1]);
    const CLIENT: Addr4 = Addr4([10, 0, 9, 9]);
    const PORT: Port = Port::new(53);

    fn service(protocol: Protocol, selectable: &[u8], keep: &[u8]) -> Vec<(ServicePortName, Option<ServicePortPlan>)> {
        let list = |lasts: &[u8]| {
            let backend = |last: &u8| Backend {
                addr: Addr4([10, 0, 0, *last]),
                port: PORT,
                flags: 0,
            };
            lasts.iter().map(backend).collect()
        };
        let name = ServicePortName {
            namespace: "ns".to_owned(),
            name: "dns".to_owned(),
            port: String::new(),
            protocol,
        };
        let v4 = FamilyPlan {
            frontends: vec![FrontendPlan {
                addr: VIP,
                port: PORT,
                flags: 0,
            }],
            cluster: Endpoints {
                selectable: list(selectable),
                keep: list(keep),
            },
            local: Endpoints::default(),
            has_endpoints: true,
            source_ranges: Vec::new(),
        };
        let plan = ServicePortPlan {
            v4,
            ..ServicePortPlan::default()
        };
        vec![(name, Some(plan))]
    }

    /// A masqueraded flow: four entries.
    fn add_flow(tables: &mut MemoryTables, protocol: Protocol, backend: u8) {
        let id = tables.v4.frontends.values().next().unwrap().service;
        let (port, node_port) = (Port::new(4_000), Port::new(61_000));
        let (backend, node) = (Addr4([10, 0, 0, backend]), Addr4([192, 0, 2, 1]));
        let mut add = |key: RewriteKey<Addr4>, to: Rewrite<Addr4>, kind| {
            let value = Rewrite {
                kind,
                service: id,
                flags: if kind == KIND_REQUEST { REWRITE_MASQUERADED } else { 0 },
                ..to
            };
            tables.v4.rewrites.insert(key, value);
            key.partner(&value)
        };
        let key = RewriteKey::new(CLIENT, port, VIP, PORT, protocol.number(), HOOK_INGRESS);
        let back = add(
            key,
            key.rewrite_to(CLIENT, port, backend, PORT, Meta::default()),
            KIND_REQUEST,
        );
        add(
            back,
            back.rewrite_to(VIP, PORT, CLIENT, port, Meta::default()),
            KIND_REPLY,
        );
        let key = RewriteKey::new(CLIENT, port, backend, PORT, protocol.number(), HOOK_EGRESS);
        let back = add(
            key,
            key.rewrite_to(node, node_port, backend, PORT, Meta::default()),
            KIND_MASQUERADE,
        );
        add(
            back,
            back.rewrite_to(backend, PORT, CLIENT, port, Meta::default()),
            KIND_UNMASQUERADE,
        );
        assert_eq!(tables.v4.rewrites.len(), 4);
    }

    /// Entries left after the endpoints changed from 1 and 2 to what is given, with a flow to endpoint 1.
    fn left(protocol: Protocol, selectable: &[u8], keep: &[u8]) -> usize {
        let mut tables = MemoryTables::new(16);
        let mut sync = Sync::adopt(&tables).unwrap();
        sync.apply(&mut tables, service(protocol, &[1, 2], &[]), Duration::ZERO);
        add_flow(&mut tables, protocol, 1);
        let mut report = sync.apply(&mut tables, service(protocol, selectable, keep), Duration::ZERO);
        let departed = sweep::<Addr4, _>(&mut tables, &sync.v4, &Services::Ids(report.take_moved_udp())).unwrap();
        assert_eq!(
            tables.v4.rewrites.len(),
            4 - departed.len(),
            "answers under way are translated"
        );
        forget(&mut tables, &departed).unwrap();
        tables.v4.rewrites.len()
    }

    #[test]
    fn udp_flows_follow_the_endpoints() {
        assert_eq!(left(Protocol::Udp, &[1, 3], &[]), 4, "still chosen");
        assert_eq!(left(Protocol::Udp, &[2], &[1]), 4, "terminating but serving (S145)");
        assert_eq!(
            left(Protocol::Udp, &[2], &[]),
            0,
            "gone, with the masquerade pair (S141)"
        );
        assert_eq!(left(Protocol::Tcp, &[2], &[]), 4, "connections are never cut (S147)");
        assert_eq!(left(Protocol::Sctp, &[2], &[]), 4, "connections are never cut (S147)");
    }

    #[test]
    fn flows_to_node_ports_follow_too() {
        // S142: what was dialled is an address of the node, the frontend stands for all of them.
        let on_node = |selectable: &[u8]| {
            let mut changes = service(Protocol::Udp, selectable, &[]);
            let plan = changes[0].1.as_mut().unwrap();
            plan.v4.frontends[0].addr = Addr4([0; 4]);
            changes
        };
        for (selectable, left) in [(&[1, 3], 4), (&[2, 3], 0)] {
            let mut tables = MemoryTables::new(16);
            let mut sync = Sync::adopt(&tables).unwrap();
            sync.apply(&mut tables, on_node(&[1, 2]), Duration::ZERO);
            add_flow(&mut tables, Protocol::Udp, 1);
            let mut report = sync.apply(&mut tables, on_node(selectable), Duration::ZERO);
            let departed = sweep::<Addr4, _>(&mut tables, &sync.v4, &Services::Ids(report.take_moved_udp())).unwrap();
            forget(&mut tables, &departed).unwrap();
            assert_eq!(tables.v4.rewrites.len(), left);
        }
    }

    #[test]
    fn an_entry_that_now_belongs_to_another_connection_stays() {
        let mut tables = MemoryTables::new(16);
        let mut sync = Sync::adopt(&tables).unwrap();
        sync.apply(&mut tables, service(Protocol::Udp, &[1], &[]), Duration::ZERO);
        add_flow(&mut tables, Protocol::Udp, 1);
        let reply = tables
            .v4
            .rewrites
            .values_mut()
            .find(|rewrite| rewrite.kind == KIND_REPLY)
            .unwrap();
        reply.src = Addr4([10, 96, 0, 99]);
        sync.apply(&mut tables, service(Protocol::Udp, &[2], &[]), Duration::ZERO);
        let departed = sweep::<Addr4, _>(&mut tables, &sync.v4, &Services::All).unwrap();
        assert_eq!(departed.len(), 1);
        forget(&mut tables, &departed).unwrap();
        let kinds: Vec<u8> = tables.v4.rewrites.values().map(|rewrite| rewrite.kind).collect();
        assert_eq!(kinds, [KIND_REPLY]);
    }
}
