//! What only the kernel can prove: the object loads, links are pinned, replaced, repaired and removed, and a restart finds
//! everything. Needs root and a BPF file system; each test has a network namespace, a pin directory and a cgroup of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use proxy_common::addr::{Addr4, Port, Protocol};
use proxy_common::backend::Backend;
use proxy_common::frontend::FrontendKey;
use proxy_common::rewrite::{HOOK_INGRESS, KIND_REPLY, KIND_REQUEST, Meta, RewriteKey};

use super::tables::Tables;
use super::*;
use crate::netlink::{LinkAddress, LinkInfo};
use crate::plan::{Endpoints, FamilyPlan, FrontendPlan};

/// Runs a test in a thread with a network namespace of its own, which goes away with the thread.
pub(super) fn in_namespace(test: impl FnOnce(&Bed) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: no pointers; only this thread is affected.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "these tests need root: {}", std::io::Error::last_os_error());
        let bed = Bed::new();
        ip("link set lo up");
        ip("link add left type veth peer name right");
        ip("address add 192.0.2.1/24 dev left");
        test(&bed);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

pub(super) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) struct Bed {
    pub(super) bpf_dir: PathBuf,
    cgroup: PathBuf,
}

impl Bed {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ebpf-proxy-test-{}-{number}", std::process::id());
        let cgroup = probe::cgroup(None).unwrap().join(&name);
        fs::create_dir(&cgroup).unwrap();
        Self {
            bpf_dir: Path::new("/sys/fs/bpf").join(name),
            cgroup,
        }
    }

    pub(super) fn options(&self, attach: AttachMode) -> Options {
        Options {
            bpf_dir: self.bpf_dir.clone(),
            cgroup: Some(self.cgroup.clone()),
            socket_lb: SocketLb::Host,
            pods: PodDetection::ClusterCidr(vec!["10.0.0.0/16".parse().unwrap()]),
            interfaces: InterfaceFilter::new(None, Some("right")).unwrap(),
            node_port_addresses: NodePortAddresses::default(),
            masquerade_all: false,
            attach,
            xdp: XdpOptions::default(),
            log_level: BpfLogLevel::Off,
            service_metrics: true,
            capacities: Capacities {
                frontends: 64,
                backends: 64,
                rewrites: 1_024,
                services: 64,
                counters: 64,
            },
            timeouts: Timeouts::default(),
        }
    }

    fn pins(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(Pins::new(&self.bpf_dir).links)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains('-'))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Err(error) = cleanup(&self.bpf_dir, None) {
            eprintln!("cleanup: {error}");
        }
        // What a failed test put there is not ours to the clean-up.
        let _gone = fs::remove_dir_all(&self.bpf_dir);
        let _gone = fs::remove_dir(&self.cgroup);
    }
}

pub(super) fn index(name: &str) -> u32 {
    // The thread's own namespace; `/sys` would show the one it was mounted in.
    let text = ip(&format!("-o link show {name}"));
    text.split(':').next().unwrap().parse().unwrap()
}

/// The namespace's interfaces as netlink would report them.
pub(super) fn network() -> Network {
    let link = |name: &str, addresses: &[&str]| LinkInfo {
        name: name.to_owned(),
        has_ethernet: name != "lo",
        loopback: name == "lo",
        mac: Some([2, 0, 0, 0, 0, 1]),
        addresses: addresses
            .iter()
            .map(|ip| LinkAddress {
                ip: ip.parse().unwrap(),
                global: true,
                preferred: true,
            })
            .collect(),
        ..LinkInfo::default()
    };
    let mut network = Network::default();
    network.links.insert(index("lo"), link("lo", &["127.0.0.1"]));
    network.links.insert(index("left"), link("left", &["192.0.2.1"]));
    network.links.insert(index("right"), link("right", &[]));
    // Gone between event and attach.
    network.links.insert(9_999, link("ghost", &[]));
    network
}

pub(super) fn service() -> (ServicePortName, ServicePortPlan) {
    let backend = |last| Backend {
        addr: Addr4([10, 0, 0, last]),
        port: Port::new(53),
        flags: 0,
    };
    let plan = ServicePortPlan {
        v4: FamilyPlan {
            frontends: vec![FrontendPlan {
                addr: Addr4([10, 96, 0, 10]),
                port: Port::new(53),
                flags: 1,
            }],
            cluster: Endpoints {
                selectable: vec![backend(1), backend(2)],
                keep: vec![backend(3)],
            },
            has_endpoints: true,
            ..FamilyPlan::default()
        },
        ..ServicePortPlan::default()
    };
    let name = ServicePortName {
        namespace: "kube-system".to_owned(),
        name: "kube-dns".to_owned(),
        port: "dns".to_owned(),
        protocol: Protocol::Udp,
    };
    (name, plan)
}

pub(super) fn assert_ok(report: &SyncReport) {
    assert_eq!(report.failed, []);
}

#[test]
fn restart_adopts_everything_and_cleanup_leaves_nothing() {
    in_namespace(|bed| {
        let (name, plan) = service();
        let mut first = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        assert_ok(&first.apply(vec![(name.clone(), Some(plan.clone()))]));
        assert_ok(&first.complete());
        assert_ok(&first.set_network(&network()));
        first.tick();
        let busy = Datapath::open(bed.options(AttachMode::Auto)).err().unwrap();
        assert!(busy.to_string().contains(&bed.bpf_dir.display().to_string()), "{busy}");
        let key = FrontendKey::new(Addr4([10, 96, 0, 10]), Port::new(53), 17);
        let frontend = first.tables.v4.frontends.get(&key).unwrap().unwrap();
        assert_eq!(
            FamilyTables::<Addr4>::backends(&first.tables, frontend.cluster.first, 3).unwrap()[2]
                .addr
                .0[3],
            3
        );
        assert_eq!(
            bed.pins(),
            [
                format!("{}-egress", index("left")),
                format!("{}-ingress", index("left"))
            ]
        );
        let maps = Pins::new(&bed.bpf_dir).maps;
        for (map, field) in [
            ("FRONTENDS4", "generation"),
            ("SERVICES", "port_name"),
            ("LINKS", "addr4"),
        ] {
            let dump = run("bpftool", &format!("map dump pinned {}", maps.join(map).display()));
            assert!(dump.contains(field), "bpftool names the fields of {map}: {dump}");
        }
        drop(first);

        let mut second = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        let report = second.apply(vec![(name, Some(plan))]);
        assert_ok(&report);
        assert_eq!((report.written, report.deleted), (0, 0));
        let report = second.complete();
        assert_eq!((report.written, report.deleted), (0, 0));
        let report = second.set_network(&network());
        assert_ok(&report);
        assert_eq!((report.written, report.deleted), (0, 0));
        let stats = second.stats();
        assert_eq!((stats.programs_on_interfaces, stats.programs_on_cgroup), (2, 8));
        drop(second);

        cleanup(&bed.bpf_dir, None).unwrap();
        assert!(!bed.bpf_dir.exists());
    });
}

#[test]
fn modes_replace_each_other_and_foreign_filters_stay() {
    in_namespace(|bed| {
        run("tc", "qdisc add dev left clsact");
        // Classic bytecode that lets everything through, in a file because `run` splits at spaces.
        fs::write("/tmp/ebpf-proxy-test-bytecode", "1,6 0 0 4294967295").unwrap();
        run(
            "tc",
            "filter add dev left egress prio 7 handle 9 bpf bytecode-file /tmp/ebpf-proxy-test-bytecode flowid 1:1",
        );
        fs::remove_file("/tmp/ebpf-proxy-test-bytecode").unwrap();
        let ours = || run("tc", "filter show dev left egress").contains("0x70726f78");
        let open = |mode| {
            let mut datapath = Datapath::open(bed.options(mode)).unwrap();
            assert_ok(&datapath.set_network(&network()));
            datapath
        };
        drop(open(AttachMode::Classic));
        assert!(ours(), "{}", run("tc", "filter show dev left egress"));
        assert!(bed.pins().is_empty());
        drop(open(AttachMode::Tcx));
        assert!(!ours());
        assert_eq!(bed.pins().len(), 2);
        let mut classic = open(AttachMode::Classic);
        assert!(ours());
        assert!(bed.pins().is_empty());
        run("tc", "filter del dev left egress prio 1");
        assert!(!ours());
        classic.repaired -= REPAIR_INTERVAL;
        classic.tick();
        assert!(ours(), "repaired");
        drop(classic);
        cleanup(&bed.bpf_dir, None).unwrap();
        assert!(!ours());
        assert!(
            run("tc", "filter show dev left egress").contains("handle 0x9"),
            "foreign filter"
        );
        run("tc", "qdisc del dev left clsact");
    });
}

#[test]
fn a_detached_link_is_attached_again() {
    in_namespace(|bed| {
        let mut datapath = Datapath::open(bed.options(AttachMode::Tcx)).unwrap();
        assert_ok(&datapath.set_network(&network()));
        for pin in [format!("{}-ingress", index("left")), "connect4".to_owned()] {
            let path = Pins::new(&bed.bpf_dir).links.join(pin);
            let link = sys::open_pin(&path).unwrap();
            let target = sys::link_target(link.as_fd()).unwrap();
            sys::detach_link(link.as_fd()).unwrap();
            assert_ne!(sys::link_target(link.as_fd()).unwrap(), target);
            datapath.repaired -= REPAIR_INTERVAL;
            datapath.tick();
            let link = sys::open_pin(&path).unwrap();
            assert_eq!(sys::link_target(link.as_fd()).unwrap(), target);
        }
    });
}

/// A start does not wait for the programs of such interfaces; who needs them does.
#[test]
fn an_interface_without_ethernet_header_gets_programs_of_its_own() {
    in_namespace(|bed| {
        let mut datapath = Datapath::open(bed.options(AttachMode::Tcx)).unwrap();
        let program = || {
            let pin = Pins::new(&bed.bpf_dir).links.join(format!("{}-ingress", index("left")));
            let id = sys::link_program(sys::open_pin(&pin).unwrap().as_fd()).unwrap();
            let shown = run("bpftool", &format!("prog show id {id}"));
            shown
                .split(' ')
                .skip_while(|word| *word != "name")
                .nth(1)
                .unwrap()
                .to_owned()
        };
        let mut network = network();
        assert_ok(&datapath.set_network(&network));
        assert_eq!(program(), "tc_ingress");
        network.links.get_mut(&index("left")).unwrap().has_ethernet = false;
        assert_ok(&datapath.set_network(&network));
        assert_eq!(program(), "tc_ingress_l3");
        datapath.loaded.programs.finish().unwrap();
    });
}

/// S163, S164: what somebody else changes or removes in the maps is written again, and what he adds is removed.
#[test]
fn the_maps_are_kept_as_they_were_written() {
    in_namespace(|bed| {
        let (name, plan) = service();
        let mut datapath = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        datapath.set_service_networks(&["10.96.0.0/16".parse().unwrap()]);
        assert_ok(&datapath.apply(vec![(name, Some(plan))]));
        assert_ok(&datapath.set_network(&network()));
        assert_ok(&datapath.complete());
        datapath.tick();
        let dump = |datapath: &Datapath| {
            let v4 = &datapath.tables.v4;
            let slots: Vec<_> = (0..8).map(|slot| v4.backends.get(slot)).collect();
            let frontends = v4.frontends.all().unwrap();
            let settings = FamilyTables::<Addr4>::settings(&datapath.tables).unwrap();
            let others = (
                datapath.tables.services.all().unwrap(),
                datapath.tables.links.all().unwrap(),
            );
            (frontends, slots, settings, others, v4.node_addrs.all().unwrap())
        };
        let before = dump(&datapath);

        let tables = &mut datapath.tables;
        let (key, frontend) = before.0[0];
        let foreign = FrontendKey::new(Addr4([10, 96, 0, 99]), Port::new(1), 6);
        tables.remove_frontend(&key).unwrap();
        tables.set_frontend(&foreign, &frontend).unwrap();
        FamilyTables::<Addr4>::set_backends(tables, frontend.cluster.first, &[bytemuck::Zeroable::zeroed()]).unwrap();
        FamilyTables::<Addr4>::set_settings(tables, &bytemuck::Zeroable::zeroed()).unwrap();
        Tables::remove_service(tables, frontend.service).unwrap();
        Tables::remove_link(tables, index("left")).unwrap();
        tables.remove_node_addr(&Addr4([192, 0, 2, 1])).unwrap();
        assert_ne!(dump(&datapath), before);

        datapath.audited -= AUDIT_INTERVAL;
        datapath.tick();
        assert_eq!(dump(&datapath), before);
    });
}

/// S164: pins that somebody removes are made again, so that the next agent finds everything.
#[test]
fn removed_pins_are_made_again() {
    in_namespace(|bed| {
        let mut datapath = Datapath::open(bed.options(AttachMode::Tcx)).unwrap();
        assert_ok(&datapath.set_network(&network()));
        let pins = Pins::new(&bed.bpf_dir);
        let list = || {
            let mut all: Vec<_> = [&pins.maps, &pins.links]
                .into_iter()
                .flat_map(|dir| fs::read_dir(dir).unwrap())
                .map(|entry| entry.unwrap().file_name())
                .collect();
            all.sort();
            all
        };
        let before = list();
        let id = |pin: &Path| {
            let shown = run("bpftool", &format!("link show pinned {}", pin.display()));
            shown.split(':').next().unwrap().to_owned()
        };
        let ingress = pins.links.join(format!("{}-ingress", index("left")));
        let link = id(&ingress);
        fs::remove_dir_all(&pins.root).unwrap();
        datapath.repaired -= REPAIR_INTERVAL;
        datapath.tick();
        assert_eq!(list(), before);
        assert_eq!(id(&ingress), link, "the link is the same: it was never off");
    });
}

#[test]
fn a_former_agents_programs_stay_where_attaching_fails() {
    in_namespace(|bed| {
        let mut first = Datapath::open(bed.options(AttachMode::Tcx)).unwrap();
        assert_ok(&first.set_network(&network()));
        drop(first);
        let links = Pins::new(&bed.bpf_dir).links;
        let [egress, ingress] = ["egress", "ingress"].map(|hook| links.join(format!("{}-{hook}", index("left"))));
        fs::remove_file(&egress).unwrap();
        fs::create_dir(&egress).unwrap();
        // Pinned anew, it is what a walk through the folder finds first.
        let link = sys::open_pin(&ingress).unwrap();
        fs::remove_file(&ingress).unwrap();
        sys::pin(link.as_fd(), &ingress).unwrap();
        drop(link);
        let mut second = Datapath::open(bed.options(AttachMode::Tcx)).unwrap();
        assert_eq!(second.set_network(&network()).failed.len(), 1);
        assert!(sys::open_pin(&ingress).is_ok());
        fs::remove_dir(&egress).unwrap();
        second.repaired -= REPAIR_INTERVAL;
        second.tick();
        assert!(sys::open_pin(&egress).is_ok() && sys::open_pin(&ingress).is_ok());
    });
}

#[test]
fn a_map_of_another_shape_is_refused_and_another_size_is_kept() {
    in_namespace(|bed| {
        let mut options = bed.options(AttachMode::Auto);
        drop(Datapath::open(options.clone()).unwrap());
        options.capacities.frontends = 128;
        let datapath = Datapath::open(options.clone()).unwrap();
        assert_eq!(datapath.tables.v4.frontends.capacity(), 64);
        drop(datapath);
        let maps = Pins::new(&bed.bpf_dir).maps;
        fs::remove_file(maps.join("SERVICES")).unwrap();
        fs::rename(maps.join("LINKS"), maps.join("SERVICES")).unwrap();
        let error = Datapath::open(options).err().unwrap();
        assert!(error.to_string().contains("proxy-agent cleanup"), "{error}");
    });
}

#[test]
fn udp_flows_leave_with_their_backend() {
    in_namespace(|bed| {
        let (name, mut plan) = service();
        let mut datapath = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        datapath.complete();
        datapath.apply(vec![(name.clone(), Some(plan.clone()))]);
        let vip = FrontendKey::new(Addr4([10, 96, 0, 10]), Port::new(53), 17);
        let id = datapath.tables.v4.frontends.get(&vip).unwrap().unwrap().service;
        // One flow to each backend.
        let client = Addr4([10, 0, 9, 9]);
        for last in 1..=3 {
            let key = RewriteKey::new(
                client,
                Port::new(4_000 + u16::from(last)),
                vip.addr,
                vip.port,
                17,
                HOOK_INGRESS,
            );
            let mut there = key.rewrite_to(client, key.src_port, Addr4([10, 0, 0, last]), vip.port, Meta::default());
            (there.kind, there.service) = (KIND_REQUEST, id);
            let back_key = key.partner(&there);
            let mut back = back_key.rewrite_to(vip.addr, vip.port, client, key.src_port, Meta::default());
            (back.kind, back.service) = (KIND_REPLY, id);
            let map = aya::maps::MapData::from_pin(Pins::new(&bed.bpf_dir).maps.join("REWRITES4")).unwrap();
            sys::update(map.fd().as_fd(), &key, &there).unwrap();
            sys::update(map.fd().as_fd(), &back_key, &back).unwrap();
        }
        assert_eq!(datapath.tables.v4.rewrites.all().unwrap().len(), 6);
        // The second one terminates and is kept, the third one is gone.
        let gone = plan.v4.cluster.selectable.remove(1);
        plan.v4.cluster.keep = vec![gone];
        let report = datapath.apply(vec![(name.clone(), Some(plan))]);
        assert_ok(&report);
        assert_eq!(report.flows_removed, 1);
        assert_eq!(
            datapath.tables.v4.rewrites.all().unwrap().len(),
            5,
            "an answer may be under way"
        );
        // Without the service nothing is left, once that has arrived.
        let report = datapath.apply(vec![(name, None)]);
        assert_eq!(report.flows_removed, 2);
        datapath.started -= GRACE;
        datapath.tick();
        assert_eq!(datapath.tables.v4.rewrites.all().unwrap().len(), 0);
    });
}

#[test]
fn programs_can_be_loaded_with_logging() {
    in_namespace(|bed| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut options = bed.options(AttachMode::Auto);
        options.log_level = BpfLogLevel::Trace;
        let _inside = runtime.enter();
        drop(Datapath::open(options).unwrap());
    });
}

#[test]
fn a_walk_in_chunks_sees_every_entry_once() {
    in_namespace(|bed| {
        const ENTRIES: u32 = 9_000;
        let mut options = bed.options(AttachMode::Auto);
        // An LRU map evicts before it is quite full.
        options.capacities.rewrites = 4 * ENTRIES;
        let datapath = Datapath::open(options).unwrap();
        let map = aya::maps::MapData::from_pin(Pins::new(&bed.bpf_dir).maps.join("REWRITES4")).unwrap();
        for number in 0..ENTRIES {
            let client = Addr4(number.to_be_bytes());
            let key = RewriteKey::new(client, Port::new(1), client, Port::new(2), 6, HOOK_INGRESS);
            let value = key.rewrite_to(client, Port::new(1), client, Port::new(3), Meta::default());
            sys::update(map.fd().as_fd(), &key, &value).unwrap();
        }
        let mut found: Vec<_> = datapath.tables.v4.rewrites.all().unwrap();
        assert_eq!(found.len(), ENTRIES as usize);
        found.sort_by_key(|(key, _)| *key);
        found.dedup_by_key(|(key, _)| *key);
        assert_eq!(found.len(), ENTRIES as usize);
        assert!(
            found
                .iter()
                .all(|(key, value)| value.src == key.src && value.dst_port == Port::new(3))
        );
    });
}

#[test]
fn inspection_needs_no_agent() {
    in_namespace(|bed| {
        use crate::inspect::{self, Filter, Output};
        let missing = inspect::services(&bed.bpf_dir, &Filter::default(), Output::Table).unwrap_err();
        assert!(missing.to_string().contains("--bpf-dir"), "{missing}");
        let (name, plan) = service();
        let mut datapath = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        assert_ok(&datapath.apply(vec![(name, Some(plan))]));
        let list = || inspect::services(&bed.bpf_dir, &Filter::default(), Output::Table).unwrap();
        let with_agent = list();
        drop(datapath);
        assert_eq!(list(), with_agent);
        assert_eq!(
            with_agent,
            "NAMESPACE     NAME       PORT   PROTOCOL   FRONTENDS       ENDPOINTS\n\
             kube-system   kube-dns   dns    UDP        10.96.0.10:53   2\n"
        );
        let details = inspect::service(&bed.bpf_dir, "kube-system", "kube-dns", Output::Table).unwrap();
        assert!(details.contains("10.0.0.3:53   kept"), "{details}");
        assert!(inspect::service(&bed.bpf_dir, "kube-system", "none", Output::Table).is_err());
        assert_eq!(
            inspect::connections(&bed.bpf_dir, &Filter::default(), Output::Json).unwrap(),
            "[]\n"
        );
    });
}

#[test]
fn an_interface_index_that_was_reused_is_attached() {
    for mode in [AttachMode::Tcx, AttachMode::Classic] {
        in_namespace(move |bed| {
            let mut datapath = Datapath::open(bed.options(mode)).unwrap();
            assert_ok(&datapath.set_network(&network()));
            let before = index("left");
            ip("link del left");
            ip(&format!("link add left index {before} type veth peer name right"));
            assert_ok(&datapath.set_network(&network()));
            assert!(datapath.links.is_intact(before));
        });
    }
}

/// The socket programs find the service, and the application sees the address it dialled.
#[test]
fn a_process_in_the_cgroup_reaches_a_service() {
    in_namespace(|bed| {
        use std::io::Read;
        let listener = std::net::TcpListener::bind("192.0.2.1:0").unwrap();
        ip("link set left up");
        ip("route add default via 192.0.2.2");
        let (mut name, mut plan) = service();
        name.protocol = Protocol::Tcp;
        plan.v4.cluster.selectable = vec![Backend {
            addr: Addr4([192, 0, 2, 1]),
            port: Port::new(listener.local_addr().unwrap().port()),
            flags: 0,
        }];
        let mut datapath = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        assert_ok(&datapath.apply(vec![(name, Some(plan))]));
        assert_ok(&datapath.set_network(&network()));
        let script = format!(
            "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/10.96.0.10/53; echo hello >&3",
            bed.cgroup.display()
        );
        let status = Command::new("timeout")
            .args(["5", "bash", "-c", &script])
            .status()
            .unwrap();
        assert!(status.success(), "the process could not connect to the service");
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
    });
}

/// A pod behind an interface reaches a service in both modes, and the endpoint sees the pod's own address (S119).
#[test]
fn a_pod_reaches_a_service_in_both_modes() {
    for mode in [AttachMode::Tcx, AttachMode::Classic] {
        in_namespace(move |bed| {
            let listener = std::net::TcpListener::bind("192.0.2.1:0").unwrap();
            let (mut name, mut plan) = service();
            name.protocol = Protocol::Tcp;
            plan.v4.cluster.selectable = vec![Backend {
                addr: Addr4([192, 0, 2, 1]),
                port: Port::new(listener.local_addr().unwrap().port()),
                flags: 0,
            }];
            let mut datapath = Datapath::open(bed.options(mode)).unwrap();
            assert_ok(&datapath.apply(vec![(name, Some(plan))]));
            assert_ok(&datapath.set_network(&network()));
            let (tell, told) = std::sync::mpsc::channel();
            let (go, gone) = std::sync::mpsc::channel();
            let pod = std::thread::spawn(move || {
                // SAFETY: no pointers; only this thread is affected.
                assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
                // SAFETY: no arguments, never fails.
                tell.send(unsafe { libc::gettid() }).unwrap();
                gone.recv().unwrap();
                ip("address add 10.0.9.2/24 dev right");
                ip("link set right up");
                ip("route add default via 10.0.9.1");
                let vip = "10.96.0.10:53".parse().unwrap();
                let stream = std::net::TcpStream::connect_timeout(&vip, Duration::from_secs(5)).unwrap();
                stream.peer_addr().unwrap()
            });
            ip(&format!("link set right netns {}", told.recv().unwrap()));
            ip("address add 10.0.9.1/24 dev left");
            ip("link set left up");
            go.send(()).unwrap();
            let dialled = pod.join().expect("the pod connects");
            assert_eq!(dialled.to_string(), "10.96.0.10:53");
            assert_eq!(listener.accept().unwrap().1.ip().to_string(), "10.0.9.2");
            let rows = crate::inspect::connection_rows(&bed.bpf_dir, &crate::inspect::Filter::default()).unwrap();
            assert_eq!(rows.len(), 1);
            assert_eq!(
                (rows[0].service.as_str(), rows[0].client.ip().to_string().as_str()),
                ("kube-dns", "10.0.9.2")
            );
            assert_ne!(rows[0].state, "unanswered");
        });
    }
}

#[test]
fn source_ranges_and_node_port_addresses_are_in_the_kernel() {
    in_namespace(|bed| {
        let (name, mut plan) = service();
        plan.v4.frontends[0].flags |= proxy_common::frontend::FRONTEND_SOURCE_RANGES;
        plan.v4.source_ranges = vec![
            (Addr4([0; 4]), 0),
            (Addr4([10, 0, 0, 0]), 8),
            (Addr4([10, 0, 0, 9]), 32),
        ];
        let lengths = |datapath: &Datapath| {
            let rows = FamilyTables::<Addr4>::source_ranges(&datapath.tables).unwrap();
            let mut lengths: Vec<u32> = rows.iter().map(|key| key.prefix_len - 32).collect();
            lengths.sort_unstable();
            lengths
        };
        let mut datapath = Datapath::open(bed.options(AttachMode::Classic)).unwrap();
        datapath.apply(vec![(name.clone(), Some(plan.clone()))]);
        assert_eq!(lengths(&datapath), [0, 8, 32]);
        drop(datapath);

        let mut options = bed.options(AttachMode::Classic);
        options.node_port_addresses.primary = true;
        let mut datapath = Datapath::open(options).unwrap();
        plan.v4.source_ranges.remove(1);
        datapath.apply(vec![(name.clone(), Some(plan))]);
        assert_eq!(lengths(&datapath), [0, 8, 32], "S160");
        assert!(datapath.complete().failed.is_empty());
        assert_eq!(lengths(&datapath), [0, 32], "S101");
        datapath.apply(vec![(name, None)]);
        assert_eq!(lengths(&datapath), [] as [u32; 0]);

        let serves = |datapath: &Datapath| {
            let rows = FamilyTables::<Addr4>::node_addrs(&datapath.tables).unwrap();
            let mut flags: Vec<_> = rows.iter().map(|(_, value)| value.flags).collect();
            flags.sort_unstable();
            flags
        };
        datapath.set_network(&network());
        assert_eq!(serves(&datapath), [1, 2], "S84: no address in the Node object; S90");
        datapath.set_node_ips(&["192.0.2.77".parse().unwrap()]);
        assert_eq!(serves(&datapath), [0], "S84");
        datapath.set_node_ips(&["192.0.2.1".parse().unwrap()]);
        assert_eq!(serves(&datapath), [1], "S84");
    });
}
