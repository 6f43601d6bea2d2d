//! Every map and every load-time constant of the programs, and [`Family`]: the two families' maps behind one name, so that all
//! code above is written once.
//!
//! Map names, keys, values and capacities come from proxy-common; `docs/architecture.md` says who writes what.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::helpers::bpf_map_lookup_elem;
use aya_ebpf::macros::btf_map;
use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::affinity::{Affinity, AffinityKey};
use proxy_common::backend::Backend;
use proxy_common::config::{DEFAULT_PORT_COUNT, DEFAULT_PORT_FIRST};
use proxy_common::counters::{BY_PACKET, Counters, DropClass, TO_BACKEND, TO_CLIENT, TOTAL};
use proxy_common::fragment::{FragmentKey, Ports};
use proxy_common::frontend::{Frontend, FrontendKey};
use proxy_common::link::{Link, NodeAddr};
use proxy_common::names;
use proxy_common::reason::{REASON_SLOTS, REWRITES_INSERTED, REWRITES_REMOVED, Reason};
use proxy_common::rewrite::{KIND_REPLY, KIND_REQUEST, Rewrite, RewriteKey};
use proxy_common::service::ServiceInfo;
use proxy_common::settings::Settings;
use proxy_common::socket::SocketFlows;
use proxy_common::source_range::SourceRangeKey;
use proxy_common::trace::{Event, Trace};

use crate::refuse::{Headers, Quote};
use crate::route::Words;
use crate::service::Lookup;
use crate::xdp::Path;

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
static FRONTENDS4: HashMap<FrontendKey<Addr4>, Frontend, { names::FRONTENDS_CAPACITY }, NO_PREALLOC> = HashMap::new();
#[btf_map]
static FRONTENDS6: HashMap<FrontendKey<Addr6>, Frontend, { names::FRONTENDS_CAPACITY }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static BACKENDS4: Array<Backend<Addr4>, { names::BACKENDS_CAPACITY }, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS6: Array<Backend<Addr6>, { names::BACKENDS_CAPACITY }, MMAPABLE> = Array::new();

#[btf_map]
static REWRITES4: LruHashMap<RewriteKey<Addr4>, Rewrite<Addr4>, { names::REWRITES_CAPACITY }> = LruHashMap::new();
#[btf_map]
static REWRITES6: LruHashMap<RewriteKey<Addr6>, Rewrite<Addr6>, { names::REWRITES_CAPACITY }> = LruHashMap::new();

#[btf_map]
static FRAGMENTS4: LruHashMap<FragmentKey<Addr4>, Ports, { names::FRAGMENTS_CAPACITY }> = LruHashMap::new();
#[btf_map]
static FRAGMENTS6: LruHashMap<FragmentKey<Addr6>, Ports, { names::FRAGMENTS_CAPACITY }> = LruHashMap::new();

#[btf_map]
static AFFINITY4: LruHashMap<AffinityKey<Addr4>, Affinity<Addr4>, { names::AFFINITY_CAPACITY }> = LruHashMap::new();
#[btf_map]
static AFFINITY6: LruHashMap<AffinityKey<Addr6>, Affinity<Addr6>, { names::AFFINITY_CAPACITY }> = LruHashMap::new();

// The keys are `SourceRangeKey`s; the library wants to be told of what follows the prefix length only, without alignment.
#[btf_map]
static SRC_RANGES4: LpmTrie<[u8; 8], u32, { names::SRC_RANGES_CAPACITY }> = LpmTrie::new();
#[btf_map]
static SRC_RANGES6: LpmTrie<[u8; 20], u32, { names::SRC_RANGES_CAPACITY }> = LpmTrie::new();

#[btf_map]
static NODE_ADDRS4: HashMap<Addr4, NodeAddr, { names::NODE_ADDRS_CAPACITY }, NO_PREALLOC> = HashMap::new();
#[btf_map]
static NODE_ADDRS6: HashMap<Addr6, NodeAddr, { names::NODE_ADDRS_CAPACITY }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static CLUSTER_IPS4: HashMap<u32, FrontendKey<Addr4>, { names::SERVICES_CAPACITY }, NO_PREALLOC> = HashMap::new();
#[btf_map]
static CLUSTER_IPS6: HashMap<u32, FrontendKey<Addr6>, { names::SERVICES_CAPACITY }, NO_PREALLOC> = HashMap::new();

#[btf_map]
static SETTINGS4: Array<Settings<Addr4>, 1> = Array::new();
#[btf_map]
static SETTINGS6: Array<Settings<Addr6>, 1> = Array::new();

#[btf_map]
static SOCKETS4: SkStorage<SocketFlows<Addr4>> = SkStorage::new();
#[btf_map]
static SOCKETS6: SkStorage<SocketFlows<Addr6>> = SkStorage::new();

#[btf_map]
pub(crate) static SOCKET_OPT_OUT: HashMap<u64, u32, { names::SOCKET_OPT_OUT_CAPACITY }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static LINKS: HashMap<u32, Link, { names::LINKS_CAPACITY }, NO_PREALLOC> = HashMap::new();

// Only people and the agent read it; it is declared here so that one object describes every map.
#[btf_map]
static SERVICES: HashMap<u32, ServiceInfo, { names::SERVICES_CAPACITY }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static TRACE: Array<Trace, 1> = Array::new();

#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { names::EVENTS_CAPACITY }> = RingBuf::new();

#[btf_map]
static REASONS: PerCpuArray<u64, REASON_SLOTS> = PerCpuArray::new();

#[btf_map]
static COUNTERS: PerCpuArray<Counters, { names::COUNTERS_CAPACITY }> = PerCpuArray::new();

/// Room for what does not fit on the stack while a connection is opened or refused. tc programs run with soft interrupts off, so
/// a CPU's slot has one user at a time.
#[repr(C, align(8))]
pub(crate) struct Scratch<A> {
    /// The entry for requests.
    pub(crate) request: Rewrite<A>,
    /// Key and value of a second entry, and of a third.
    pub(crate) key: RewriteKey<A>,
    pub(crate) value: Rewrite<A>,
    pub(crate) back_key: RewriteKey<A>,
    pub(crate) back_value: Rewrite<A>,
    /// Key of an entry's partner.
    pub(crate) partner: RewriteKey<A>,
    /// Slot of the chosen backend, its service, and whether the client is to be masqueraded on account of who it is.
    pub(crate) slot: u32,
    pub(crate) service: u32,
    pub(crate) masquerades: u32,
    /// What a tracer is told of the packet: [`crate::trace::OPENED`], the code of a reason, or 0 for nothing.
    pub(crate) outcome: u32,
    /// Interface towards the backend if the connection is masqueraded, otherwise 0.
    pub(crate) leaves_by: u32,
    /// Keys of look-ups that only some services need.
    pub(crate) lookup: Lookup<A>,
    /// Parameters of a helper.
    pub(crate) words: Words,
    /// What a refusal quotes, and the headers put before it.
    pub(crate) quote: Quote,
    pub(crate) error: Headers,
}

#[btf_map]
static SCRATCH4: PerCpuArray<Scratch<Addr4>, 1> = PerCpuArray::new();
#[btf_map]
static SCRATCH6: PerCpuArray<Scratch<Addr6>, 1> = PerCpuArray::new();

#[btf_map]
static PATHS4: PerCpuArray<Path<Addr4>, { names::PATHS_CAPACITY }> = PerCpuArray::new();
#[btf_map]
static PATHS6: PerCpuArray<Path<Addr6>, { names::PATHS_CAPACITY }> = PerCpuArray::new();

#[unsafe(no_mangle)]
pub(crate) static PODS_BY_LINK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static SOCKET_PODS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static HAVE_SET_RETVAL: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static MASQUERADE_ALL: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static HAVE_CSUM_IPV6: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static COUNT_SERVICES: Global<u32> = Global::new(1);
#[unsafe(no_mangle)]
pub(crate) static PORT_FIRST: Global<u32> = Global::new(DEFAULT_PORT_FIRST);
#[unsafe(no_mangle)]
pub(crate) static PORT_COUNT: Global<u32> = Global::new(DEFAULT_PORT_COUNT);

/// Adds one to a reason's counter.
#[inline(always)]
pub(crate) fn count(reason: Reason) {
    count_slot(reason as u32);
}

/// Adds one to a slot of `REASONS`.
#[inline(always)]
pub(crate) fn count_slot(slot: u32) {
    if let Some(counter) = REASONS.get_ptr_mut(slot) {
        // SAFETY: the slot belongs to this CPU, and programs do not migrate while they run.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

/// This CPU's counters of a service, if they are kept and there is room for them.
///
/// Additions to them are not atomic: tc programs, which run with soft interrupts off, and socket hooks have words of their own.
#[inline(always)]
fn counters(service: u32) -> Option<*mut Counters> {
    if COUNT_SERVICES.load() == 0 {
        return None;
    }
    COUNTERS.get_ptr_mut(service)
}

/// # Safety
/// `counter` is a word of this CPU's map slot.
#[inline(always)]
unsafe fn add(counter: *mut u64, more: u32) {
    // SAFETY: promised by the caller; the slot stays allocated while the program runs.
    unsafe { *counter = (*counter).wrapping_add(u64::from(more)) };
}

/// Counts a packet that goes through an entry of the rewrite table: once for each packet, so not those of masquerades.
#[inline(always)]
pub(crate) fn count_packet(service: u32, kind: u8, bytes: u32) {
    if kind != KIND_REQUEST && kind != KIND_REPLY {
        return;
    }
    if let Some(counters) = counters(service) {
        let direction = if kind == KIND_REQUEST { TO_BACKEND } else { TO_CLIENT };
        // SAFETY: words of the slot.
        unsafe {
            add(core::ptr::addr_of_mut!((*counters).packets[direction]), 1);
            add(core::ptr::addr_of_mut!((*counters).bytes[direction]), bytes);
        }
    }
}

/// Counts a connection to a service, [`BY_PACKET`] or [`BY_SOCKET`].
#[inline(always)]
pub(crate) fn count_connection(service: u32, by: usize) {
    if let Some(counters) = counters(service) {
        // SAFETY: a word of the slot.
        unsafe { add(core::ptr::addr_of_mut!((*counters).connections[by]), 1) };
    }
}

/// Counts a connection that was written into the rewrite table.
#[inline(always)]
pub(crate) fn count_opened(service: u32) {
    count_connection(service, BY_PACKET);
    if let Some(counters) = COUNTERS.get_ptr_mut(TOTAL) {
        // SAFETY: a word of the slot.
        unsafe { add(core::ptr::addr_of_mut!((*counters).connections[BY_PACKET]), 1) };
    }
}

/// Counts what was not served, by its reason and for its service. `by` as for [`count_connection`].
#[inline(always)]
pub(crate) fn count_unserved(service: u32, reason: Reason, by: usize) {
    count(reason);
    if let Some(counters) = counters(service) {
        // SAFETY: words of the slot.
        unsafe {
            let counter = if reason.is_refused() {
                core::ptr::addr_of_mut!((*counters).refused[by])
            } else {
                core::ptr::addr_of_mut!((*counters).dropped[DropClass::of(reason) as usize])
            };
            add(counter, 1);
        }
    }
}

/// One address family: its maps and constants.
pub(crate) trait Family: Address {
    /// `FRONTENDS4/6`. To be read at once: the agent replaces values as a whole, and the old one may soon be another's.
    fn frontend(key: &FrontendKey<Self>) -> Option<&'static Frontend>;
    /// `BACKENDS4/6`. In place: a slot that a frontend points to is never written, and a copy through the stack would become a
    /// call to memmove, which the verifier rejects.
    fn backend(index: u32) -> Option<&'static Backend<Self>>;
    /// `REWRITES4/6`: the entry in place, because the hot path writes its clock and state.
    fn rewrite(key: &RewriteKey<Self>) -> Option<*mut Rewrite<Self>>;
    /// Adds to `REWRITES4/6` and counts it; false if the key is taken or the kernel did not take it.
    fn insert_rewrite(key: &RewriteKey<Self>, value: &Rewrite<Self>) -> bool;
    /// Writes over an entry of `REWRITES4/6`, which is not counted: should it have gone this very moment, one too few is.
    fn replace_rewrite(key: &RewriteKey<Self>, value: &Rewrite<Self>) -> bool;
    /// Removes from `REWRITES4/6` and counts it; what is gone already is fine.
    fn remove_rewrite(key: &RewriteKey<Self>);
    /// Remembers the ports of a fragmented packet in `FRAGMENTS4/6`.
    fn remember_ports(key: &FragmentKey<Self>, ports: &Ports);
    /// The ports of a fragmented packet, if its first fragment was seen.
    fn recall_ports(key: &FragmentKey<Self>) -> Option<Ports>;
    /// `AFFINITY4/6`, in place: the program writes its clock.
    fn affinity(key: &AffinityKey<Self>) -> Option<*mut Affinity<Self>>;
    /// Writes to `AFFINITY4/6`.
    fn remember_affinity(key: &AffinityKey<Self>, value: &Affinity<Self>);
    /// Is the client in one of the source ranges of the service?
    fn is_source_allowed(key: &SourceRangeKey<Self>) -> bool;
    /// Are node ports served on the address: is it one of this node's, with one of these `NODE_ADDR_*` bits?
    fn has_node_ports(addr: &Self, bits: u32) -> bool;
    /// Is the address one of this node (`NODE_ADDRS4/6`)?
    fn is_node(addr: &Self) -> bool;
    /// The node's address for packets that leave by `link`; zero if it has none.
    fn link_addr(link: &Link) -> Self;
    /// `CLUSTER_IPS4/6`. To be read at once, like a frontend.
    fn cluster_ip(service: u32) -> Option<&'static FrontendKey<Self>>;
    /// `SETTINGS4/6`, in place: the agent may be writing it, so that for a moment a prefix is none.
    fn settings() -> Option<&'static Settings<Self>>;
    /// This CPU's scratch room.
    fn scratch() -> Option<*mut Scratch<Self>>;
    /// A slot of this CPU's `PATHS4/6`.
    fn path(slot: u32) -> Option<*mut Path<Self>>;
    /// `SOCKETS4/6`.
    fn sockets() -> &'static SkStorage<SocketFlows<Self>>;
}

macro_rules! family {
    ($addr:ty, $frontends:ident, $backends:ident, $rewrites:ident, $fragments:ident, $affinity:ident, $src_ranges:ident, $node_addrs:ident, $sockets:ident, $scratch:ident, $settings:ident, $cluster_ips:ident, $paths:ident, $link_addr:ident) => {
        impl Family for $addr {
            #[inline(always)]
            fn frontend(key: &FrontendKey<Self>) -> Option<&'static Frontend> {
                // SAFETY: the value is plain old data and stays allocated while the program runs.
                unsafe { $frontends.get(key) }
            }

            #[inline(always)]
            fn backend(index: u32) -> Option<&'static Backend<Self>> {
                $backends.get(index)
            }

            #[inline(always)]
            fn rewrite(key: &RewriteKey<Self>) -> Option<*mut Rewrite<Self>> {
                $rewrites.get_ptr_mut(key)
            }

            #[inline(always)]
            fn insert_rewrite(key: &RewriteKey<Self>, value: &Rewrite<Self>) -> bool {
                let is_inserted = $rewrites.insert(key, value, u64::from(BPF_NOEXIST)).is_ok();
                if is_inserted {
                    count_slot(names::of_family::<Self, _>(REWRITES_INSERTED));
                }
                is_inserted
            }

            #[inline(always)]
            fn replace_rewrite(key: &RewriteKey<Self>, value: &Rewrite<Self>) -> bool {
                $rewrites.insert(key, value, u64::from(BPF_ANY)).is_ok()
            }

            #[inline(always)]
            fn remove_rewrite(key: &RewriteKey<Self>) {
                if $rewrites.remove(key).is_ok() {
                    count_slot(names::of_family::<Self, _>(REWRITES_REMOVED));
                }
            }

            #[inline(always)]
            fn remember_ports(key: &FragmentKey<Self>, ports: &Ports) {
                // Without it the other fragments pass untouched and the packet is lost, as it would be without memory anywhere.
                let _lost = $fragments.insert(key, ports, 0);
            }

            #[inline(always)]
            fn recall_ports(key: &FragmentKey<Self>) -> Option<Ports> {
                // SAFETY: the value is copied out at once.
                unsafe { $fragments.get(key).copied() }
            }

            #[inline(always)]
            fn affinity(key: &AffinityKey<Self>) -> Option<*mut Affinity<Self>> {
                $affinity.get_ptr_mut(key)
            }

            #[inline(always)]
            fn remember_affinity(key: &AffinityKey<Self>, value: &Affinity<Self>) {
                // Without the record the client's next connection chooses freely, as it does after the timeout.
                let _forgotten = $affinity.insert(key, value, 0);
            }

            #[inline(always)]
            fn is_source_allowed(key: &SourceRangeKey<Self>) -> bool {
                let map = core::ptr::addr_of!($src_ranges).cast_mut().cast();
                // SAFETY: the map's key has the layout of `SourceRangeKey`; only the presence of a value matters.
                unsafe { !bpf_map_lookup_elem(map, core::ptr::from_ref(key).cast()).is_null() }
            }

            #[inline(always)]
            fn has_node_ports(addr: &Self, bits: u32) -> bool {
                // SAFETY: one word of plain old data is read at once.
                unsafe { $node_addrs.get(addr) }.is_some_and(|addr| addr.flags & bits != 0)
            }

            #[inline(always)]
            fn is_node(addr: &Self) -> bool {
                $node_addrs.get_ptr(addr).is_some()
            }

            #[inline(always)]
            fn link_addr(link: &Link) -> Self {
                link.$link_addr
            }

            #[inline(always)]
            fn cluster_ip(service: u32) -> Option<&'static FrontendKey<Self>> {
                // SAFETY: the value is plain old data and stays allocated while the program runs.
                unsafe { $cluster_ips.get(&service) }
            }

            #[inline(always)]
            fn settings() -> Option<&'static Settings<Self>> {
                $settings.get(0)
            }

            #[inline(always)]
            fn scratch() -> Option<*mut Scratch<Self>> {
                $scratch.get_ptr_mut(0)
            }

            #[inline(always)]
            fn path(slot: u32) -> Option<*mut Path<Self>> {
                $paths.get_ptr_mut(slot)
            }

            #[inline(always)]
            fn sockets() -> &'static SkStorage<SocketFlows<Self>> {
                &$sockets
            }
        }
    };
}

family!(
    Addr4,
    FRONTENDS4,
    BACKENDS4,
    REWRITES4,
    FRAGMENTS4,
    AFFINITY4,
    SRC_RANGES4,
    NODE_ADDRS4,
    SOCKETS4,
    SCRATCH4,
    SETTINGS4,
    CLUSTER_IPS4,
    PATHS4,
    addr4
);
family!(
    Addr6,
    FRONTENDS6,
    BACKENDS6,
    REWRITES6,
    FRAGMENTS6,
    AFFINITY6,
    SRC_RANGES6,
    NODE_ADDRS6,
    SOCKETS6,
    SCRATCH6,
    SETTINGS6,
    CLUSTER_IPS6,
    PATHS6,
    addr6
);
