//! UDP flows whose backend left choose again at their next packet: their entries in the rewrite table are removed (S141–S149).
//! Called by `Datapath` right after frontends were written, and once more after the grace period, because a program that read the
//! old frontend may have written an entry meanwhile.
//!
//! Only UDP: TCP and SCTP connections stay where they are for as long as they live (S147).

use std::collections::{BTreeSet, HashMap};

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{Frontend, FrontendKey};
use proxy_common::rewrite::{HOOK_EGRESS, KIND_REQUEST, REWRITE_MASQUERADED, Rewrite, RewriteKey};

use super::error::TableError;
use super::sync::FamilySync;
use super::sys::Cursor;
use super::tables::FamilyTables;

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

/// Removes the flows that have to choose again; gives their number.
pub(super) fn sweep<A: Address, T: FamilyTables<A>>(
    tables: &mut T,
    sync: &FamilySync<A>,
    services: &Services,
) -> Result<usize, TableError> {
    let mut allowed: HashMap<FrontendKey<A>, Allowed<A>> = HashMap::new();
    let mut cursor = Cursor::default();
    let mut removed = 0;
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
                .or_insert_with(|| allowed_at(tables, sync.frontend(&dialled)));
            let stays = allowed.as_ref().is_some_and(|(service, backends)| {
                *service == rewrite.service && backends.contains(&(rewrite.dst, rewrite.dst_port))
            });
            if !stays {
                remove_connection(tables, &key, &rewrite)?;
                removed += 1;
            }
        }
        if at_end {
            return Ok(removed);
        }
    }
}

fn allowed_at<A: Address>(tables: &impl FamilyTables<A>, frontend: Option<&Frontend>) -> Allowed<A> {
    let frontend = frontend?;
    let backends = [frontend.cluster, frontend.local]
        .into_iter()
        .filter_map(|range| {
            tables
                .backends(range.first, range.count.checked_add(range.keep)?)
                .ok()
        })
        .flatten()
        .map(|backend| (backend.addr, backend.port))
        .collect();
    Some((frontend.service, backends))
}

/// Removes a request entry and everything that was written with it. The request goes first: the next packet then opens a new
/// connection, whose entries have other keys because its backend is another one.
fn remove_connection<A: Address>(
    tables: &mut impl FamilyTables<A>,
    key: &RewriteKey<A>,
    rewrite: &Rewrite<A>,
) -> Result<(), TableError> {
    tables.remove_rewrite(key)?;
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
