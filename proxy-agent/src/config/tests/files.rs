//! Configuration files.

use super::*;

const KUBEADM: &str = include_str!("../fixtures/kubeadm-1.36.yaml");

/// Written out and read back, a configuration is the same.
fn assert_round_trip(config: &RunConfig) {
    let text = config.to_yaml();
    let written = file(&text);
    let (again, remarks) = load(&["--config", written.path().to_str().unwrap()]).unwrap();
    assert_eq!(format!("{again:?}"), format!("{config:?}"), "{text}");
    assert_eq!(remarks, Remarks::default(), "{text}");
    assert_eq!(again.to_yaml(), text);
}

#[test]
fn the_file_that_kubeadm_writes() {
    let written = file(KUBEADM);
    let path = written.path().to_str().unwrap();
    let (config, remarks) = load(&["--config", path, "--hostname-override=Node-A"]).unwrap();
    assert_eq!(remarks, Remarks::default(), "nothing to say");
    assert_eq!(&*config.node_name, "node-a", "S172");
    let expected = load(&[
        "--node-name=node-a",
        "--cluster-cidr=10.244.0.0/16",
        "--kubeconfig=/var/lib/kube-proxy/kubeconfig.conf",
    ])
    .unwrap()
    .0;
    assert_eq!(
        format!("{config:?}"),
        format!("{expected:?}"),
        "S192: everything else is the default"
    );
    assert_round_trip(&config);
    let json = serde_json::to_string(&crate::source::document_values(KUBEADM, false).remove(0).unwrap()).unwrap();
    let json = file(&json);
    let options = ["--config", json.path().to_str().unwrap(), "--node-name=node-a"];
    assert_eq!(
        format!("{:?}", super::config(&options).unwrap()),
        format!("{config:?}"),
        "as JSON"
    );
}

#[test]
fn everything_a_file_can_say() {
    let text = r#"
bindAddress: 192.0.2.1
bindAddressHardFail: true
clientConnection: {kubeconfig: /k, qps: 20, burst: 40}
clusterCIDR: 10.244.0.0/16,fd00:10::/56
conntrack: {maxPerCore: 1, tcpCloseWaitTimeout: 2h, tcpEstablishedTimeout: 48h0m0s, udpStreamTimeout: 1m, udpTimeout: 10s}
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0}
featureGates: {AllowServiceExternalIPs: false, Other: true}
healthzBindAddress: 192.0.2.1
hostnameOverride: Node-A
iptables: {masqueradeAll: true, localhostNodePorts: false, minSyncPeriod: 2s, syncPeriod: 1m}
logging: {verbosity: 4, format: json}
metricsBindAddress: "[::1]:1"
nodePortAddresses: [192.0.2.0/24, primary]
ebpf:
  attach: classic
  bpfDir: /b
  bpfLogLevel: info
  capacities: {frontends: 1, backends: 2, rewrites: 3, services: 4}
  cgroup: /proc
  excludeInterfaces: eth9
  interfaces: eth.*|x
  master: https://192.0.2.9:6443
  socketLB: all
  xdp: {interfaces: eth0, mode: native}
"#;
    let (config, remarks) = with_file(text, &[]).unwrap();
    assert_eq!(remarks.warnings, ["unknown feature gate Other, ignored"]);
    assert_eq!(
        remarks.details,
        ["FILE: without meaning here: conntrack.maxPerCore, logging.format"]
    );
    let by_flags = super::config(&[
        "--bind-address=192.0.2.1",
        "--bind-address-hard-fail",
        "--kubeconfig=/k",
        "--kube-api-qps=20",
        "--kube-api-burst=40",
        "--cluster-cidr=10.244.0.0/16,fd00:10::/56",
        "--conntrack-tcp-timeout-close-wait=2h",
        "--conntrack-tcp-timeout-established=48h",
        "--conntrack-udp-timeout-stream=1m",
        "--conntrack-udp-timeout=10s",
        "--detect-local-mode=BridgeInterface",
        "--pod-bridge-interface=cni0",
        "--feature-gates=AllowServiceExternalIPs=false",
        "--healthz-bind-address=192.0.2.1:10256",
        "--metrics-bind-address=[::1]:1",
        "--hostname-override=node-a",
        "--masquerade-all=true",
        "--localhost-nodeports=false",
        "--iptables-min-sync-period=2s",
        "--iptables-sync-period=1m",
        "-v=4",
        "--nodeport-addresses=192.0.2.0/24,primary",
        "--attach=classic",
        "--bpf-dir=/b",
        "--bpf-log-level=info",
        "--frontends-capacity=1",
        "--backends-capacity=2",
        "--rewrites-capacity=3",
        "--services-capacity=4",
        "--cgroup=/proc",
        "--exclude-interfaces=eth9",
        "--interfaces=eth.*|x",
        "--master=192.0.2.9:6443",
        "--socket-lb=all",
        "--xdp-interfaces=eth0",
        "--xdp-mode=native",
    ])
    .unwrap();
    assert_eq!(format!("{config:?}"), format!("{by_flags:?}"), "S191");
    assert_ne!(config.datapath.timeouts, Timeouts::default(), "S151");
    // Without the bridge no prefixes are needed, so they are not written.
    assert_round_trip(&config);
}

#[test]
fn what_is_in_effect_can_be_read_back() {
    for options in [
        &[][..],
        &["--healthz-bind-address=", "--metrics-bind-address="],
        &["--min-sync-period=0", "--sync-period=1h1.5s"],
        &["--detect-local-mode=NodeCIDR", "--manifests=/proc", "-v8"],
        &[
            "--detect-local-mode=InterfaceNamePrefix",
            "--pod-interface-name-prefix=veth",
        ],
        &["--xdp-interfaces=eth.*|ens1", "--xdp-mode=generic"],
        &["--proxy-mode=nftables", "--bind-address=2001:db8::1"],
        &["--nodeport-addresses=localhost,all", "--localhost-nodeports=false"],
        &[
            "--cluster-cidr=10.0.0.0/8,fd00::/8",
            "--masquerade-all",
            "--kube-api-qps=0.5",
        ],
    ] {
        assert_round_trip(&config(options).unwrap());
    }
}

#[test]
fn the_section_of_the_mode_counts() {
    let text = "
iptables: {masqueradeAll: true, localhostNodePorts: false, minSyncPeriod: 1s, syncPeriod: 11s}
nftables: {minSyncPeriod: 2s, syncPeriod: 12s}
ipvs: {minSyncPeriod: 0s, syncPeriod: 13s}
";
    let chosen = |mode: &str, own: &str| {
        let (config, _) = with_file(&format!("{text}mode: {mode:?}\n{own}"), &[]).unwrap();
        let addresses = &config.datapath.node_port_addresses;
        let times = (config.intervals.min_sync.as_millis(), config.intervals.sync.as_secs());
        (config.datapath.masquerade_all, addresses.loopback_allowed, times)
    };
    let iptables = (true, false, (1_000, 11));
    for mode in ["", "ebpf", "iptables"] {
        assert_eq!(chosen(mode, ""), iptables, "{mode:?}");
    }
    assert_eq!(chosen("nftables", ""), (false, true, (2_000, 12)));
    assert_eq!(chosen("ipvs", ""), (true, false, (10, 13)), "S162: 0s is the default");
    let own = "ebpf: {masqueradeAll: false, localhostNodePorts: true, minSyncPeriod: 0s, syncPeriod: 14s}";
    assert_eq!(
        chosen("iptables", own),
        (false, true, (0, 14)),
        "S162, S163: here 0s is at once"
    );
}

#[test]
fn flags_beside_a_file() {
    let text = "hostnameOverride: a\nclusterCIDR: 10.0.0.0/8\nebpf: {bpfDir: /b}\nlogging: {verbosity: 2}\n";
    let flags = [
        "--hostname-override=b",
        "--bpf-dir=/c",
        "--master=https://192.0.2.1:6443",
        "-v=6",
        "--cluster-cidr=nonsense",
        "--masquerade-all",
        "--healthz-bind-address=",
        "--nodeport-addresses=primary",
        "--feature-gates=nonsense",
    ];
    let (config, remarks) = with_file(text, &flags).unwrap();
    assert_eq!((&*config.node_name, config.verbosity), ("b", 6));
    assert_eq!(config.datapath.bpf_dir, PathBuf::from("/c"));
    let masters = match &config.source {
        SourceConfig::ApiServer(server) => server.master.as_deref(),
        SourceConfig::Manifests(_) => None,
    };
    assert_eq!(masters, Some("https://192.0.2.1:6443"));
    assert!(!config.datapath.masquerade_all && config.healthz.is_some());
    assert_eq!(
        remarks.warnings,
        [
            "--cluster-cidr, --healthz-bind-address, --masquerade-all, --nodeport-addresses, --feature-gates ignored: --config FILE \
             counts instead, as with kube-proxy"
        ],
        "S191"
    );
    let from_file = with_file(text, &[]).unwrap().0;
    assert_eq!((&*from_file.node_name, from_file.verbosity), ("a", 2));
}

/// S191: a command line of kube-proxy's works as it is.
#[test]
fn flags_without_meaning_are_named() {
    let flags = [
        "--conntrack-max-per-core=0",
        "--conntrack-min",
        "-1",
        "--profiling",
        "--ipvs-strict-arp=false",
        "--logging-format=json",
        "--masquerade-all",
    ];
    let (config, remarks) = with_file("clusterCIDR: 10.0.0.0/8\n", &flags).unwrap();
    assert!(!config.datapath.masquerade_all);
    assert_eq!(
        remarks.warnings,
        [
            "--masquerade-all ignored: --config FILE counts instead, as with kube-proxy",
            "--conntrack-max-per-core, --conntrack-min, --logging-format, --ipvs-strict-arp, --profiling ignored: without meaning here"
        ]
    );
}

#[test]
fn what_is_not_known_is_named() {
    let text = "nftables: {masqueradeBits: 1}\nconntrackk: {min: 1}\nebpf: {capacities: {all: 1}}\nwinkernel: {networkName: x}\n---\nkind: Other\n";
    let (_, remarks) = with_file(text, &[]).unwrap();
    assert_eq!(
        remarks.warnings,
        [
            "FILE: document 2 is skipped: its kind is \"Other\", not KubeProxyConfiguration",
            "FILE: conntrackk is not a field that is known, ignored",
            "FILE: ebpf.capacities.all is not a field that is known, ignored",
            "FILE: nftables.masqueradeBits is not a field that is known, ignored",
        ]
    );
    assert_eq!(remarks.details, ["FILE: without meaning here: winkernel.networkName"]);
}

#[test]
fn errors_name_file_field_value_and_remedy() {
    for (text, expected) in [
        (
            "clusterCIDR: 10.0.0.0/40",
            "FILE: clusterCIDR \"10.0.0.0/40\": \"10.0.0.0/40\" is not a prefix; write one prefix per family",
        ),
        (
            "iptables: {syncPeriod: soon}",
            "FILE: iptables.syncPeriod \"soon\": is not a duration; write a number with a unit",
        ),
        (
            "mode: nftables\nnftables: {minSyncPeriod: 1m}",
            "FILE: nftables.minSyncPeriod \"1m0s\": is longer than FILE: nftables.syncPeriod 30s; write a shorter one",
        ),
        (
            "conntrack: {udpTimeout: -1s}",
            "FILE: conntrack.udpTimeout \"-1s\": is not a duration; ",
        ),
        (
            "iptables: {masqueradeAll: 'yes'}",
            "FILE: iptables.masqueradeAll: invalid type: string \"yes\", expected a boolean",
        ),
        (
            "ebpf: {capacities: {frontends: -1}}",
            "FILE: ebpf.capacities.frontends: invalid value: integer `-1`, expected u32",
        ),
        (
            "ebpf: {capacities: {frontends: 0}}",
            "FILE: ebpf.capacities.frontends \"0\": a map needs room for something; ",
        ),
        (
            "ebpf: {socketLB: some}",
            "FILE: ebpf.socketLB \"some\": is not a word that is known; write host, all, off",
        ),
        (
            "mode: userspace",
            "FILE: mode \"userspace\": is not a word that is known; write ebpf, iptables, nftables, ipvs",
        ),
        (
            "detectLocalMode: Bridge",
            "FILE: detectLocalMode \"Bridge\": is not a word that is known; write ClusterCIDR, ",
        ),
        (
            "nodePortAddresses: [192.0.2.1]",
            "FILE: nodePortAddresses \"192.0.2.1\": ",
        ),
        (
            "nodePortAddresses: primary",
            "FILE: nodePortAddresses: invalid type: string \"primary\", expected a sequence",
        ),
        (
            "healthzBindAddress: here",
            "FILE: healthzBindAddress \"here\": is not an address with a port; ",
        ),
        ("ebpf: {manifests: /nowhere}", "FILE: ebpf.manifests \"/nowhere\": "),
        (
            "---\nkind: KubeProxyConfiguration",
            "FILE: document 2 is a second KubeProxyConfiguration; leave one of them",
        ),
        ("a: [", "FILE, document 1: "),
    ] {
        let error = with_file(text, &[]).unwrap_err();
        assert!(error.starts_with(expected), "{text}: {error}");
    }
    for (whole, expected) in [
        ("", ": there is no KubeProxyConfiguration in it; "),
        (
            "{\"kind\": \"ConfigMap\"}",
            ": there is no KubeProxyConfiguration in it; ",
        ),
        (
            "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v9",
            ": apiVersion: \"kubeproxy.config.k8s.io/v9\" is not known; write ",
        ),
    ] {
        let written = file(whole);
        let path = written.path().to_str().unwrap();
        let error = load(&["--config", path]).unwrap_err();
        assert!(error.starts_with(&format!("{path}{expected}")), "{whole}: {error}");
    }
    let error = load(&["--config=/nowhere"]).unwrap_err();
    assert!(error.starts_with("--config /nowhere: "), "{error}");
}
