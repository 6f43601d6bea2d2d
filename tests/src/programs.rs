//! The real programs, loaded but attached to nothing, with their maps: for packet tests and benchmarks by program test-run.
//!
//! The maps are private to one [`Programs`], so tests do not see each other.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{CgroupSockAddr, ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::affinity::{Affinity, AffinityKey};
use proxy_common::backend::Backend;
use proxy_common::config;
use proxy_common::counters::Counters;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, Frontend, FrontendKey, Range};
use proxy_common::link::{Link, NodeAddr};
use proxy_common::names;
use proxy_common::reason::{EVENTS_LOST, REWRITES_INSERTED, REWRITES_REMOVED, Reason, XDP_FORWARDED};
use proxy_common::rewrite::{Rewrite, RewriteKey};
use proxy_common::settings::{Prefix, Settings};
use proxy_common::trace::{Event, Trace};

/// Verdicts of the tc programs.
pub const PASS: i32 = -1;
/// See [`PASS`].
pub const DROP: i32 = 2;
/// See [`PASS`]; under test-run nothing is sent, the verdict is only a number.
pub const REDIRECT: i32 = 7;

/// Verdicts of the XDP program.
pub const XDP_PASS: i32 = 2;
/// See [`XDP_PASS`]; under test-run nothing is sent, the verdict is only a number.
pub const XDP_TX: i32 = 3;
/// See [`XDP_TX`].
pub const XDP_REDIRECT: i32 = 4;

/// Plain old data as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Plain<T>(pub T);

// SAFETY: `Plain` is transparent and bytemuck vouches that any bytes are a valid `T` without padding.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}

/// Load-time constants of the programs.
#[derive(Clone, Copy)]
pub struct Constants {
    /// Cookie of the network namespace that counts as the node's.
    pub host_netns: u64,
    /// IPv4 pod network as address and mask.
    pub pods4: Option<([u8; 4], [u8; 4])>,
    /// IPv6 pod network as address and mask.
    pub pods6: Option<([u8; 16], [u8; 16])>,
    /// Pods are told from others by their interface.
    pub pods_by_link: bool,
    /// Source ports for masquerading: first and count.
    pub ports: (u32, u32),
    /// Every service port's traffic is counted.
    pub count_services: bool,
    /// Most talkative level of aya-log that is kept, 0 for none.
    pub log_level: u8,
}

impl Default for Constants {
    fn default() -> Self {
        Self {
            host_netns: 0,
            pods4: None,
            pods6: None,
            pods_by_link: false,
            ports: (config::DEFAULT_PORT_FIRST, config::DEFAULT_PORT_COUNT),
            count_services: true,
            log_level: 0,
        }
    }
}

/// The loaded object.
pub struct Programs {
    ebpf: Ebpf,
    next_backend: u32,
}

/// What a program made of a packet.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The program's verdict.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// The object that `cargo xtask build-ebpf` made.
pub fn object() -> Result<Vec<u8>> {
    let path = std::env::var_os("EBPF_PROXY_OBJECT").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/ebpf-proxy/ebpf/proxy-ebpf"),
        PathBuf::from,
    );
    std::fs::read(&path).with_context(|| format!("no eBPF object at {}: run `cargo xtask build-ebpf`", path.display()))
}

impl Programs {
    /// Loads the object and verifies every program.
    pub fn load(constants: Constants) -> Result<Self> {
        // SAFETY: no memory is passed.
        let user = unsafe { libc::geteuid() };
        ensure!(user == 0, "loading eBPF programs needs root: run the tests as root");
        let mut ebpf = EbpfLoader::new()
            .override_global(config::HOST_NETNS, &constants.host_netns, true)
            .override_global(config::PODS_BY_LINK, &u32::from(constants.pods_by_link), true)
            .override_global(config::PORT_FIRST, &constants.ports.0, true)
            .override_global(config::PORT_COUNT, &constants.ports.1, true)
            .override_global(config::HAVE_SET_RETVAL, &1u32, true)
            .override_global(config::COUNT_SERVICES, &u32::from(constants.count_services), true)
            .override_global("AYA_LOG_LEVEL", &constants.log_level, true)
            // Making the thousands that there may be takes longer than most tests.
            .map_max_entries(names::COUNTERS, 64)
            .load(&object()?)
            .context("loading the eBPF object")?;
        for name in [
            names::TC_INGRESS,
            names::TC_EGRESS,
            names::TC_INGRESS_L3,
            names::TC_EGRESS_L3,
        ] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| format!("the verifier rejects {name}"))?;
        }
        let xdp: &mut Xdp = ebpf
            .program_mut(names::XDP_FORWARD)
            .context(names::XDP_FORWARD)?
            .try_into()?;
        xdp.load()
            .with_context(|| format!("the verifier rejects {}", names::XDP_FORWARD))?;
        for name in names::SOCKET_PROGRAMS {
            let program: &mut CgroupSockAddr = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| format!("the verifier rejects {name}"))?;
        }
        let mut programs = Self { ebpf, next_backend: 0 };
        programs.set_pods(constants.pods4.map(|(addr, mask)| (Addr4(addr), Addr4(mask))));
        programs.set_pods(constants.pods6.map(|(addr, mask)| (Addr6(addr), Addr6(mask))));
        Ok(programs)
    }

    /// What the kernel says of every program.
    pub fn infos(&self) -> Result<Vec<(String, ProgramInfo)>> {
        self.ebpf
            .programs()
            .map(|(name, program)| Ok((name.to_owned(), program.info()?)))
            .collect()
    }

    /// Runs a tc program on a packet as if it passed the interface of this index, having arrived by `ingress_ifindex` (0: it is
    /// the node's own).
    pub fn run(&self, program: &str, packet: &[u8], ifindex: u32, ingress_ifindex: u32) -> Outcome {
        let (verdict, packet, _) = self.repeat(program, packet, ifindex, ingress_ifindex, 1);
        Outcome { verdict, packet }
    }

    /// As [`Self::run`], many times over the same packet buffer; also returns the mean duration of a run in nanoseconds.
    pub fn repeat(
        &self,
        program: &str,
        packet: &[u8],
        ifindex: u32,
        ingress_ifindex: u32,
        repeat: u32,
    ) -> (i32, Vec<u8>, u128) {
        let program: &SchedClassifier = self
            .ebpf
            .program(program)
            .expect(program)
            .try_into()
            .expect("a tc program");
        let mut out = vec![0; packet.len() + 256];
        // `struct __sk_buff`: ingress_ifindex is its tenth word, ifindex the eleventh.
        let mut ctx = [0u32; 48];
        ctx[9] = ingress_ifindex;
        ctx[10] = ifindex;
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: Some(bytemuck::cast_slice(&ctx)),
                repeat,
                ..TestRunOptions::default()
            })
            .expect("program test-run");
        out.truncate(result.data_size_out as usize);
        (result.return_value as i32, out, result.duration.as_nanos())
    }

    /// Runs the XDP program on a packet that arrived by the interface of this index.
    pub fn run_xdp(&self, packet: &[u8], ifindex: u32) -> Outcome {
        let (verdict, packet, _) = self.repeat_xdp(packet, ifindex, 1);
        Outcome { verdict, packet }
    }

    /// As [`Self::run_xdp`], many times over the same packet buffer; also returns the mean duration of a run in nanoseconds. A packet
    /// that is forwarded has no hop left after the 63rd time.
    pub fn repeat_xdp(&self, packet: &[u8], ifindex: u32, repeat: u32) -> (i32, Vec<u8>, u128) {
        let program: &Xdp = self
            .ebpf
            .program(names::XDP_FORWARD)
            .expect(names::XDP_FORWARD)
            .try_into()
            .expect("an XDP program");
        let mut out = vec![0; packet.len()];
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let ctx = [0, packet.len() as u32, 0, ifindex, 0, 0];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: Some(bytemuck::cast_slice(&ctx)),
                repeat,
                ..TestRunOptions::default()
            })
            .expect("program test-run");
        out.truncate(result.data_size_out as usize);
        (result.return_value as i32, out, result.duration.as_nanos())
    }

    fn hash<K: bytemuck::Pod, V: bytemuck::Pod>(&mut self, name: &str) -> HashMap<&mut MapData, Plain<K>, Plain<V>> {
        HashMap::try_from(self.ebpf.map_mut(name).expect(name)).expect(name)
    }

    /// Adds a service with one frontend and these endpoints; with none it refuses.
    pub fn add_service<A: Address>(&mut self, id: u32, addr: A, port: u16, protocol: Protocol, backends: &[(A, u16)]) {
        let first = self.next_backend;
        let mut array: Array<_, Plain<Backend<A>>> = Array::try_from(
            self.ebpf
                .map_mut(names::for_family::<A>(names::BACKENDS))
                .expect("backends"),
        )
        .expect("array");
        for (i, (addr, port)) in backends.iter().enumerate() {
            let backend = Backend {
                addr: *addr,
                port: Port::new(*port),
                flags: 0,
            };
            array.set(first + i as u32, Plain(backend), 0).expect("backend");
        }
        self.next_backend += backends.len() as u32;
        let range = Range {
            first,
            count: backends.len() as u32,
            keep: 0,
        };
        let has_endpoints = if backends.is_empty() { 0 } else { FRONTEND_HAS_ENDPOINTS };
        let frontend = Frontend {
            service: id,
            flags: FRONTEND_CLUSTER_IP | has_endpoints,
            cluster: range,
            generation: 1,
            ..Frontend::default()
        };
        self.set_frontend(FrontendKey::new(addr, Port::new(port), protocol.number()), frontend);
    }

    /// Writes a frontend as it is.
    pub fn set_frontend<A: Address>(&mut self, key: FrontendKey<A>, frontend: Frontend) {
        self.hash::<FrontendKey<A>, Frontend>(names::for_family::<A>(names::FRONTENDS))
            .insert(Plain(key), Plain(frontend), 0)
            .expect("frontend");
    }

    /// A frontend as it was written.
    pub fn frontend<A: Address>(&mut self, key: &FrontendKey<A>) -> Frontend {
        let map = self.hash::<FrontendKey<A>, Frontend>(names::for_family::<A>(names::FRONTENDS));
        map.get(&Plain(*key), 0).expect("frontend").0
    }

    /// How many clients with session affinity are remembered.
    pub fn affinity_records<A: Address>(&mut self) -> usize {
        self.hash::<AffinityKey<A>, Affinity<A>>(names::for_family::<A>(names::AFFINITY))
            .keys()
            .count()
    }

    /// Changes what the programs know of the node and the cluster.
    pub fn change_settings<A: Address>(&mut self, change: impl FnOnce(&mut Settings<A>)) {
        let map = self
            .ebpf
            .map_mut(names::for_family::<A>(names::SETTINGS))
            .expect("settings");
        let mut array: Array<_, Plain<Settings<A>>> = Array::try_from(map).expect("array");
        let mut settings = array.get(&0, 0).expect("settings").0;
        change(&mut settings);
        array.set(0, Plain(settings), 0).expect("settings");
    }

    fn set_pods<A: Address>(&mut self, pods: Option<(A, A)>) {
        self.change_settings(|settings: &mut Settings<A>| {
            settings.node_ports = [Port::new(30_000), Port::new(32_767)];
            if let Some((addr, mask)) = pods {
                settings.pods = Prefix { addr, mask, set: 1 };
            }
        });
    }

    /// Makes an interface known.
    pub fn set_link(&mut self, ifindex: u32, link: Link) {
        self.hash::<u32, Link>(names::LINKS)
            .insert(Plain(ifindex), Plain(link), 0)
            .expect("link");
    }

    /// Makes an address one of the node's.
    pub fn set_node_addr<A: Address>(&mut self, addr: A) {
        self.hash::<A, NodeAddr>(names::for_family::<A>(names::NODE_ADDRS))
            .insert(Plain(addr), Plain(NodeAddr { ifindex: 1, flags: 0 }), 0)
            .expect("node address");
    }

    /// The rewrite table, sorted by key.
    pub fn rewrites<A: Address>(&mut self) -> Vec<(RewriteKey<A>, Rewrite<A>)> {
        let map = self.hash::<RewriteKey<A>, Rewrite<A>>(names::for_family::<A>(names::REWRITES));
        let mut entries: Vec<_> = map
            .iter()
            .map(|entry| entry.expect("entry"))
            .map(|(k, v)| (k.0, v.0))
            .collect();
        entries.sort_by_key(|(key, _)| *key);
        entries
    }

    /// The rewrite table itself.
    pub fn rewrite_table<A: Address>(&self) -> &Map {
        let name = names::for_family::<A>(names::REWRITES);
        self.ebpf.map(name).expect(name)
    }

    /// Writes an entry of the rewrite table.
    pub fn set_rewrite<A: Address>(&mut self, key: RewriteKey<A>, value: Rewrite<A>) {
        self.hash::<RewriteKey<A>, Rewrite<A>>(names::for_family::<A>(names::REWRITES))
            .insert(Plain(key), Plain(value), 0)
            .expect("rewrite");
    }

    /// Removes an entry of the rewrite table.
    pub fn remove_rewrite<A: Address>(&mut self, key: &RewriteKey<A>) {
        self.hash::<RewriteKey<A>, Rewrite<A>>(names::for_family::<A>(names::REWRITES))
            .remove(&Plain(*key))
            .expect("rewrite");
    }

    /// What was counted of a service, over all CPUs.
    pub fn counters(&self, service: u32) -> Counters {
        let map: PerCpuArray<_, Plain<Counters>> =
            PerCpuArray::try_from(self.ebpf.map(names::COUNTERS).expect("counters")).expect("per-CPU array");
        let mut sum = Counters::default();
        for counters in map.get(&service, 0).expect("counters").iter() {
            sum.add(&counters.0);
        }
        sum
    }

    /// How often a reason was counted, over all CPUs.
    pub fn count(&self, reason: Reason) -> u64 {
        self.count_slot(reason as u32)
    }

    /// Packets that XDP has forwarded, over all CPUs.
    pub fn xdp_forwarded(&self) -> u64 {
        self.count_slot(XDP_FORWARDED)
    }

    /// Events that found no room, over all CPUs.
    pub fn events_lost(&self) -> u64 {
        self.count_slot(EVENTS_LOST)
    }

    /// Entries that the programs have put into a family's rewrite table and removed from it, over all CPUs.
    pub fn rewrite_counts<A: Address>(&self) -> (u64, u64) {
        let of = |slots| self.count_slot(names::of_family::<A, _>(slots));
        (of(REWRITES_INSERTED), of(REWRITES_REMOVED))
    }

    /// Asks the programs for events.
    pub fn ask(&mut self, question: Trace) {
        let map = self.ebpf.map_mut(names::TRACE).expect("question");
        let mut array: Array<_, Plain<Trace>> = Array::try_from(map).expect("array");
        array.set(0, Plain(question), 0).expect("question");
    }

    /// The events since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        let map = self.ebpf.map_mut(names::EVENTS).expect("events");
        let mut ring = RingBuf::try_from(map).expect("ring buffer");
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.push(bytemuck::pod_read_unaligned(&item[..size_of::<Event>()]));
        }
        events
    }

    fn count_slot(&self, slot: u32) -> u64 {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.ebpf.map(names::REASONS).expect("reasons")).expect("per-CPU array");
        map.get(&slot, 0).expect("slot").iter().sum()
    }
}
