//! The rows that an explanation is made of, read once so that it is about one moment.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

use proxy_common::addr::{Address, Protocol};
use proxy_common::affinity::{Affinity, AffinityKey};
use proxy_common::backend::Backend;
use proxy_common::clock;
use proxy_common::frontend::{Frontend, FrontendKey, Origin};
use proxy_common::link::{LINK_PODS, Link, NODE_ADDR_NODE_PORTS, NODE_ADDR_SOCKETS, NodeAddr};
use proxy_common::lookup::Rows;
use proxy_common::names;
use proxy_common::settings::Settings;
use proxy_common::source_range::SourceRangeKey;

use super::super::rows::Names;
use crate::datapath::tables::{BpfFamily, BpfTables, FamilyTables, HasFamily, Tables};
use crate::datapath::{Pins, TableError, constants, sys};

/// How a row that is looked up by number is read.
type BySlot<'t, V> = Box<dyn Fn(u32) -> V + 't>;
/// How an affinity record is read.
type Records<'t, A> = Box<dyn Fn(&AffinityKey<A>) -> Option<Affinity<A>> + 't>;
/// How a client is looked for in the source ranges of a service.
type Ranges<'t, A> = Box<dyn Fn(u32, &A) -> Result<bool, TableError> + 't>;

/// What is known of a family.
pub(super) struct Facts<'t, A> {
    pub(super) frontends: HashMap<FrontendKey<A>, Frontend>,
    pub(super) settings: Settings<A>,
    pub(super) node_addrs: HashMap<A, NodeAddr>,
    pub(super) links: HashMap<u32, Link>,
    pub(super) pods_by_link: bool,
    /// `None`: it cannot be known.
    pub(super) masquerade_all: Option<bool>,
    /// The socket programs are attached.
    pub(super) has_sockets: bool,
    pub(super) now: u32,
    pub(super) name: BySlot<'t, String>,
    pub(super) backend: BySlot<'t, Option<Backend<A>>>,
    pub(super) affinity: Records<'t, A>,
    pub(super) is_source_allowed: Ranges<'t, A>,
}

impl<'t, A: Address> Facts<'t, A> {
    /// Reads the pinned maps.
    pub(super) fn read(tables: &'t BpfTables, bpf_dir: &Path) -> Result<Self, TableError>
    where
        BpfTables: FamilyTables<A> + HasFamily<A, Family = BpfFamily<A>>,
    {
        let family = HasFamily::<A>::family(tables);
        let settings = FamilyTables::<A>::settings(tables)?;
        let links: HashMap<u32, Link> = Tables::links(tables)?.into_iter().collect();
        let constants = constants::decisive(bpf_dir);
        // Without the constants: an agent that goes by interfaces has no prefix, and knows some interface of a pod.
        let by_link = settings.pods.set == 0 && links.values().any(|link| link.flags & LINK_PODS != 0);
        let all_names = Names::read(tables)?;
        let source_ranges = &family.source_ranges;
        Ok(Self {
            frontends: FamilyTables::<A>::frontends(tables)?.into_iter().collect(),
            settings,
            node_addrs: FamilyTables::<A>::node_addrs(tables)?.into_iter().collect(),
            links,
            pods_by_link: constants.map_or(by_link, |constants| constants.pods_by_link),
            masquerade_all: constants.map(|constants| constants.masquerade_all),
            has_sockets: Pins::new(bpf_dir).links.join(names::SOCKET_PROGRAMS[0]).exists(),
            now: clock::ticks(sys::coarse_clock()),
            name: Box::new(move |service| all_names.show(service)),
            backend: Box::new(|slot| family.backends.get(slot)),
            affinity: Box::new(|key| family.affinity.get(key).ok().flatten()),
            is_source_allowed: Box::new(move |service, source| {
                let key = SourceRangeKey::new(service, *source, A::BITS);
                Ok(source_ranges.get(&key)?.is_some())
            }),
        })
    }

    /// Is the address one of the node's?
    pub(super) fn is_node(&self, addr: &A) -> bool {
        self.node_addrs.contains_key(addr)
    }

    /// Can the node's own processes reach a service at an address of the node?
    pub(super) fn reaches_own_address(&self, protocol: Protocol) -> bool {
        self.has_sockets && protocol != Protocol::Sctp
    }

    /// The rows as a client of this kind meets them.
    pub(super) fn for_client(&self, origin: Origin) -> ForClient<'_, 't, A> {
        let sockets = if origin == Origin::Host && self.has_sockets {
            NODE_ADDR_SOCKETS
        } else {
            0
        };
        ForClient {
            facts: self,
            node_addr: NODE_ADDR_NODE_PORTS | sockets,
        }
    }

    /// The prefix of pods.
    pub(super) fn pods(&self) -> String {
        let (addr, mask): (IpAddr, A) = (self.settings.pods.addr.into(), self.settings.pods.mask);
        let bits: u32 = mask.octets().iter().map(|octet| octet.count_ones()).sum();
        format!("{addr}/{bits}")
    }
}

/// See [`Facts::for_client`].
pub(super) struct ForClient<'f, 't, A> {
    facts: &'f Facts<'t, A>,
    node_addr: u32,
}

impl<A: Address> ForClient<'_, '_, A> {
    pub(super) fn serves_node_ports(&self, addr: &A) -> bool {
        let found = self.facts.node_addrs.get(addr);
        found.is_some_and(|addr| addr.flags & self.node_addr != 0)
    }
}

impl<'f, A: Address> Rows<A> for ForClient<'f, '_, A> {
    type Frontend = &'f Frontend;
    type Settings = &'f Settings<A>;

    fn frontend(&self, key: &FrontendKey<A>) -> Option<&'f Frontend> {
        self.facts.frontends.get(key)
    }

    fn settings(&self) -> Option<&'f Settings<A>> {
        Some(&self.facts.settings)
    }

    fn has_node_ports(&self, addr: &A) -> bool {
        self.serves_node_ports(addr)
    }
}
