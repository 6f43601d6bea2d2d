//! What single options may say.

use super::*;

#[test]
fn cidrs_one_per_family() {
    let texts = |text| match config(&["--cluster-cidr", text])?.datapath.pods {
        PodDetection::ClusterCidr(cidrs) => Ok(cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()),
        other => Err(format!("{other:?}")),
    };
    assert_eq!(texts(""), Ok(vec![]));
    assert_eq!(texts("10.244.1.0/16").unwrap(), ["10.244.0.0/16"]);
    assert_eq!(
        texts("fd00::/56, 10.244.0.0/16").unwrap(),
        ["fd00::/56", "10.244.0.0/16"]
    );
    for bad in ["10.244.0.0", ",", "10.0.0.0/8,", "10.0.0.0/8,10.1.0.0/16"] {
        let text = texts(bad).unwrap_err();
        assert!(text.starts_with(&format!("--cluster-cidr {bad:?}: ")), "{text}");
    }
}

#[test]
fn addresses_of_node_ports() {
    let addresses = |text| {
        let config = config(&["--nodeport-addresses", text]);
        config.map(|config| config.datapath.node_port_addresses)
    };
    let everything = NodePortAddresses::default();
    assert_eq!(addresses(" "), Ok(everything.clone()), "S83");
    let prefixes = ["192.0.2.0/24", "fd00::/64"].map(|text| text.parse().unwrap());
    let chosen = NodePortAddresses {
        prefixes: prefixes.to_vec(),
        ..everything.clone()
    };
    assert_eq!(addresses("192.0.2.7/24, fd00::/64"), Ok(chosen), "S81");
    let mixed = NodePortAddresses {
        all: true,
        primary: true,
        prefixes: [&NodePortAddresses::LOCALHOST[..], &prefixes[..1]].concat(),
        ..everything.clone()
    };
    assert_eq!(addresses("primary,localhost, all,192.0.2.0/24"), Ok(mixed), "S81");
    for bad in ["192.0.2.1", "primary,,192.0.2.0/24", ",", "Primary"] {
        let text = addresses(bad).unwrap_err();
        assert!(text.starts_with(&format!("--nodeport-addresses {bad:?}: ")), "{text}");
    }
    let primary = NodePortAddresses {
        primary: true,
        ..everything
    };
    let nftables = config(&["--proxy-mode", "nftables"]).unwrap();
    assert_eq!(nftables.datapath.node_port_addresses, primary, "S83");
    let loopback = |options: &[&str]| config(options).unwrap().datapath.node_port_addresses.loopback_allowed;
    assert!(loopback(&[]) && loopback(&["--localhost-nodeports"]));
    assert!(!loopback(&["--localhost-nodeports=false"]));
    assert!(!loopback(&["--iptables-localhost-nodeports=false"]));
}

#[test]
fn ways_to_tell_pods() {
    let pods = |options: &[&str]| config(options).map(|config| config.datapath.pods);
    assert_eq!(pods(&[]), Ok(PodDetection::ClusterCidr(vec![])), "S115: no detection");
    let cidr = ["--cluster-cidr", "10.244.0.0/16"];
    let cidrs = vec!["10.244.0.0/16".parse().unwrap()];
    assert_eq!(pods(&cidr), Ok(PodDetection::ClusterCidr(cidrs)), "S114");
    assert_eq!(pods(&["--detect-local-mode", "NodeCIDR"]), Ok(PodDetection::NodeCidr));
    let bridge = ["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface"];
    let prefix = [
        "--detect-local-mode",
        "InterfaceNamePrefix",
        "--pod-interface-name-prefix",
    ];
    assert_eq!(
        pods(&[&bridge[..], &["cni0"]].concat()),
        Ok(PodDetection::Bridge("cni0".to_owned()))
    );
    let veth = PodDetection::InterfacePrefix("veth".to_owned());
    assert_eq!(pods(&[&prefix[..], &["veth"]].concat()), Ok(veth));
    for (mode, bad) in [
        (bridge, ""),
        (prefix, ""),
        (bridge, "a/b"),
        (prefix, "abcdefghijklmnop"),
    ] {
        let text = pods(&[&mode[..], &[bad]].concat()).unwrap_err();
        assert!(text.starts_with(&format!("{} {bad:?}: ", mode[2])), "{text}");
    }
    assert!(pods(&["--detect-local-mode", "BridgeInterface"]).is_err());
    assert!(pods(&["--detect-local-mode", "clustercidr"]).is_err());
}

#[test]
fn gates_are_read() {
    let (config, remarks) = load(&["--feature-gates", "AllowServiceExternalIPs=false,Other=true"]).unwrap();
    assert!(!config.gates.service_external_ips, "S100");
    assert_eq!(remarks.warnings, ["unknown feature gate Other, ignored"]);
    let text = load(&["--feature-gates", "AllowServiceExternalIPs"]).unwrap_err();
    assert!(
        text.starts_with("--feature-gates \"AllowServiceExternalIPs\": "),
        "{text}"
    );
}

#[test]
fn bind_addresses() {
    let healthz = |options: &[&str]| config(options).map(|config| config.healthz.map(|address| address.to_string()));
    let flag = |text| healthz(&["--healthz-bind-address", text]);
    assert_eq!(flag(""), Ok(None), "S174");
    assert_eq!(flag("[::]:1"), Ok(Some("[::]:1".to_owned())));
    for (bare, whole) in [
        ("192.0.2.1", "192.0.2.1:10256"),
        ("::1", "[::1]:10256"),
        ("[::1]", "[::1]:10256"),
    ] {
        assert_eq!(flag(bare), Ok(Some(whole.to_owned())), "{bare}");
    }
    assert!(flag("localhost:1").is_err());
    assert_eq!(healthz(&[]), Ok(Some("0.0.0.0:10256".to_owned())));
    assert_eq!(healthz(&["--bind-address=::"]), Ok(Some("[::]:10256".to_owned())));
}

#[test]
fn names_are_lower_case() {
    let name = |name| config(&["--node-name", name]).unwrap().node_name;
    assert_eq!(&*name(" Node-A\n"), "node-a");
    assert!(!name("").is_empty());
    assert_eq!(
        &*config(&["--hostname-override=Node-B"]).unwrap().node_name,
        "node-b",
        "S191"
    );
}

#[test]
fn api_servers() {
    let source = |options: &[&str]| config(options).map(|config| config.source);
    let server = |kubeconfig: Option<&str>, master: Option<&str>, rate| {
        SourceConfig::ApiServer(ApiServer {
            kubeconfig: kubeconfig.map(PathBuf::from),
            master: master.map(str::to_owned),
            rate,
        })
    };
    assert_eq!(source(&[]), Ok(server(None, None, None)));
    let url = "https://192.0.2.1:6443";
    for master in [url, "192.0.2.1:6443"] {
        let options = ["--kubeconfig", "/k", "--master", master];
        assert_eq!(source(&options), Ok(server(Some("/k"), Some(url), None)), "S191, S192");
    }
    assert!(source(&["--master", "ftp://a"]).is_err());
    assert!(source(&["--master", "https://"]).is_err());
    let rate = |qps, burst| Ok(server(None, None, Some(Rate { qps, burst })));
    assert_eq!(source(&["--kube-api-qps=2.5"]), rate(2.5, 10));
    assert_eq!(source(&["--kube-api-burst=7"]), rate(5.0, 7));
    assert_eq!(
        source(&["--kube-api-qps=-1", "--kube-api-burst=7"]),
        Ok(server(None, None, None))
    );
    assert!(source(&["--kube-api-burst=-7"]).is_err());
    assert!(source(&["--kube-api-qps=NaN"]).is_err());
}

#[test]
fn a_given_address_is_the_node_s() {
    let ip = |text| config(&["--bind-address", text]).map(|config| config.node_ip);
    assert_eq!(ip("0.0.0.0"), Ok(None));
    assert_eq!(ip("::"), Ok(None));
    assert_eq!(ip("192.0.2.1"), Ok(Some(IpAddr::from([192, 0, 2, 1]))), "S184");
    assert!(
        ip("192.0.2.1:80")
            .unwrap_err()
            .starts_with("--bind-address \"192.0.2.1:80\": ")
    );
}

#[test]
fn sizes_and_patterns() {
    for (flag, bad) in [
        ("--frontends-capacity", "0"),
        ("--interfaces", "("),
        ("--exclude-interfaces", "a)(b"),
        ("--xdp-interfaces", "("),
    ] {
        let text = config(&[flag, bad]).unwrap_err();
        assert!(text.starts_with(&format!("{flag} {bad:?}: ")), "{text}");
    }
}

#[test]
fn every_mode_is_taken_for_ours() {
    for mode in ["iptables", "nftables", "ipvs"] {
        let (_, remarks) = load(&["--proxy-mode", mode]).unwrap();
        let warning = format!("--proxy-mode {mode:?}: this program forwards with eBPF all the same; ");
        assert!(remarks.warnings[0].starts_with(&warning), "{remarks:?}");
    }
    for mode in ["", "ebpf"] {
        assert_eq!(load(&["--proxy-mode", mode]).unwrap().1, Remarks::default(), "S191");
    }
    assert!(load(&["--proxy-mode", "kernelspace"]).is_err());
}

#[test]
fn intervals_are_checked_as_kube_proxy_does() {
    let intervals = |min: &str, sync: &str| {
        let flags = [format!("--min-sync-period={min}"), format!("--sync-period={sync}")];
        config(&[&flags[0], &flags[1]]).map(|config| config.intervals)
    };
    let given = intervals("1s", "1m").unwrap();
    assert_eq!((given.min_sync.as_secs(), given.sync.as_secs()), (1, 60));
    assert_eq!(intervals("0", "30s").unwrap().min_sync, Duration::ZERO, "S162: at once");
    for (min, sync, flag) in [
        ("x", "30s", "--min-sync-period \"x\": "),
        ("-1s", "30s", "--min-sync-period \"-1s\": "),
        ("0", "0", "--sync-period \"0\": "),
        ("1m", "30s", "--min-sync-period \"1m\": "),
    ] {
        let text = intervals(min, sync).unwrap_err();
        assert!(text.starts_with(flag), "{text}");
    }
}

#[test]
fn timeouts_by_flag() {
    let parse = |flags: &[&str]| config(flags).map(|config| config.datapath.timeouts);
    assert_eq!(parse(&[]), Ok(Timeouts::default()));
    let seconds = Duration::from_secs;
    assert_eq!(
        parse(&[
            "--conntrack-tcp-timeout-established=2h",
            "--conntrack-tcp-timeout-close-wait=0",
            "--conntrack-udp-timeout=45s",
            "--conntrack-udp-timeout-stream=90s",
        ]),
        Ok(Timeouts {
            tcp_established: seconds(7_200),
            tcp_half_closed: seconds(3_600),
            udp_unanswered: seconds(45),
            udp_answered: seconds(90),
        }),
        "S151"
    );
    let text = parse(&["--conntrack-udp-timeout=soon"]).unwrap_err();
    assert!(text.starts_with("--conntrack-udp-timeout \"soon\": "), "{text}");
}
