//! From the real kube-proxy to the agent and back, on a node with traffic: nothing fails, and nothing is left behind.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

#[path = "netns_migrate/site.rs"]
mod site;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_common::addr::Protocol;
use proxy_tests::attached;
use proxy_tests::echo;
use proxy_tests::kube_proxy::Mode;
use proxy_tests::manifests;
use proxy_tests::maps;
use proxy_tests::process::wait_until;
use proxy_tests::service::NODE_PORT;
use proxy_tests::traffic;
use proxy_tests::world::{SERVICE_PORTS, vips};
use serde_json::{Value, json};
use site::{ARRIVAL, Site, assert_undisturbed, text};

/// The chain that has the endpoints of the service `spare`.
fn spare_chain(site: &Site, mode: Mode) -> String {
    let (listed, mark) = match mode {
        Mode::Nftables => (site.on_node("nft", &["list", "chains", "ip"]), "-default/spare/tcp/tcp"),
        Mode::Iptables => (
            site.on_node("iptables-nft-save", &["-t", "nat"]),
            "default/spare:tcp cluster IP",
        ),
        Mode::LegacyIptables => (
            site.on_node("iptables-legacy-save", &["-t", "nat"]),
            "default/spare:tcp cluster IP",
        ),
    };
    let line = listed
        .lines()
        .find(|line| line.contains(mark))
        .unwrap_or_else(|| panic!("{mark} in {listed}"));
    let chain = line
        .split_whitespace()
        .find(|word| word.starts_with("service-") || word.starts_with("KUBE-SVC-"));
    chain.unwrap_or_else(|| panic!("no chain in {line}")).to_owned()
}

/// A rule that somebody removes is found, and named with its Service.
fn a_missing_rule_is_named(site: &Site, mode: Mode) {
    let chain = spare_chain(site, mode);
    match mode {
        Mode::Nftables => site.on_node("nft", &["flush", "chain", "ip", "kube-proxy", &chain]),
        Mode::Iptables => site.on_node("iptables-nft", &["-w", "-t", "nat", "-F", &chain]),
        Mode::LegacyIptables => site.on_node("iptables-legacy", &["-w", "-t", "nat", "-F", &chain]),
    };
    let (code, said, text) = site.migrate("check", &[]);
    assert_eq!(code, Some(1), "{text}");
    let differences = said["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1, "{text}");
    let found = [
        &differences[0]["service"],
        &differences[0]["address"],
        &differences[0]["problem"],
    ];
    let http = SERVICE_PORTS.iter().find(|port| port.protocol == "TCP").unwrap().name;
    assert_eq!(
        found,
        [
            &json!(format!("default/spare:{http}")),
            &json!("10.96.0.37:80/TCP"),
            &json!("endpoints")
        ]
    );
    // A change of its endpoints makes kube-proxy write them again.
    site.api.apply(&site.slices("spare", &[1], &site.node().name)).unwrap();
    site.no_difference(&[]);
}

fn there_and_back(mode: Mode, name: &str) {
    let mut site = Site::new(&[]);
    // What is tracked of UDP is soon forgotten, so that the test need not wait for it.
    for setting in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        site.node()
            .netns
            .sysctl(&format!("net/netfilter/{setting}"), "3")
            .unwrap();
    }
    let kube_proxy = site.kube_proxy(mode);
    let mut old = site.hold();
    let traffic = site.traffic();

    let said = site.no_difference(&[]);
    assert_eq!(said["modes"], json!([name]), "{said:#}");
    assert!(said["compared"].as_u64().unwrap() > 30, "{said:#}");
    let reasons: Vec<&Value> = said["byDesign"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["address"])
        .collect();
    assert!(
        reasons.len() == 1 && reasons[0].to_string().contains("node ports at"),
        "{said:#}"
    );
    a_missing_rule_is_named(&site, mode);

    // The agent takes the new connections; the old ones stay where they are.
    site.agent.launch().unwrap();
    for vip in vips() {
        let has = || {
            maps::backends(&site.agent.bpf_dir(), vip, Protocol::Tcp)
                .unwrap()
                .map(|_| ())
        };
        wait_until(ARRIVAL, has).unwrap();
    }
    let mut ours = site.hold();
    old.answer("beside the agent");
    site.no_difference(&[]);
    let (code, said, _) = site.migrate("verify", &[]);
    assert_eq!(code, Some(0), "{said:#}");
    let frontends = said["oldConnections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["frontend"].clone());
    assert!(
        frontends.into_iter().any(|frontend| frontend == json!(vips()[0])),
        "{said:#}"
    );
    let refused = site.remove_rules(&["--force"]);
    assert!(
        !refused.status.success() && text(&refused).contains("kube-proxy is running"),
        "{}",
        text(&refused)
    );

    drop(kube_proxy);
    let before = site.on_node("nft", &["list", "chains"]);
    let removed = site.remove_rules(&[]);
    assert!(removed.status.success(), "{}", text(&removed));
    let after = site.on_node("nft", &["list", "chains"]);
    for mark in ["KUBE-S", "KUBE-E", "KUBE-FO", "KUBE-M", "KUBE-N", "KUBE-P", "service-"] {
        assert!(!after.contains(mark), "{mark} is left of\n{before}\nin\n{after}");
    }
    old.answer("without kube-proxy's rules");
    ours.answer("without kube-proxy's rules");
    drop(old);
    let removed = site.remove_rules(&["--wait", "40s"]);
    assert!(removed.status.success(), "{}", text(&removed));
    let tables = site.on_node("nft", &["list", "tables"]);
    assert!(!tables.contains("kube-proxy"), "{tables}\n{}", text(&removed));
    let (code, said, text) = site.migrate("verify", &[]);
    assert_eq!((code, &said["oldConnections"]), (Some(0), &json!([])), "{text}");

    // And back: kube-proxy serves what is new, the agent's connections go on until they end.
    let kube_proxy = site.kube_proxy(mode);
    // The agent answers too: whether all rules are there is seen by reading them.
    site.no_difference(&[]);
    site.agent.stop();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let cleaning = scope.spawn(|| {
            site.agent
                .command(&["cleanup", "--drain", "--timeout", "120s"])
                .unwrap()
        });
        let through_kube_proxy = || {
            site.on_node("cat", &["/proc/net/nf_conntrack"])
                .contains("dst=10.96.0.10")
                .then_some(())
        };
        wait_until(ARRIVAL, through_kube_proxy).expect("new connections are kube-proxy's");
        ours.answer("draining");
        assert!(!cleaning.is_finished(), "it waits for connections");
        drop(ours);
        let said = cleaning.join().unwrap();
        assert!(
            said.contains("removed") && !said.contains("cut off"),
            "{said} after {:?}",
            began.elapsed()
        );
    });
    println!("the drain ended, {:?} after it began", began.elapsed());
    assert_undisturbed(traffic);
    let programs = attached::programs(site.agent.netns()).unwrap();
    assert!(programs.is_empty(), "{programs:?}");
    assert!(!site.on_node("tc", &["qdisc", "show"]).contains("clsact"));
    let cgroup = site.agent.cgroup().display().to_string();
    let attached = site.on_node("bpftool", &["cgroup", "show", &cgroup]);
    assert!(attached.lines().count() <= 1, "socket programs left: {attached}");
    drop(kube_proxy);
}

/// kube-proxy's rules are tables of nftables.
#[test]
fn there_and_back_with_nftables() {
    there_and_back(Mode::Nftables, "nftables");
}

/// They are chains of iptables over nftables.
#[test]
fn there_and_back_with_iptables() {
    there_and_back(Mode::Iptables, "iptables");
}

/// Programs come to one interface after the other, and a connection needs them on two: new ones are kube-proxy's until all are there.
#[test]
fn nothing_is_lost_when_the_agent_arrives() {
    const CLIENTS: usize = 8;
    let mut site = Site::new(&[]);
    let _kube_proxy = site.kube_proxy(Mode::Nftables);
    let pause = Duration::from_millis(1);
    let mut running = Vec::new();
    for target in site.node().sockets(NODE_PORT) {
        for client in 0..CLIENTS {
            let outside = site.outside().netns.clone();
            let requests = traffic::repeat(|body| outside.spawn(body), pause, move || echo::udp(target));
            running.push((format!("UDP, client {client} to {target}"), requests));
        }
    }
    site.agent.launch().unwrap();
    for vip in vips() {
        let has = || {
            maps::backends(&site.agent.bpf_dir(), vip, Protocol::Udp)
                .unwrap()
                .map(|_| ())
        };
        wait_until(ARRIVAL, has).unwrap();
    }
    assert_undisturbed(running);
    let metrics = site.agent.metrics().unwrap();
    let opened = metrics
        .lines()
        .find(|line| line.starts_with("ebpf_proxy_connections_opened_total"));
    assert!(
        opened.is_some_and(|line| !line.ends_with(" 0")),
        "the agent serves: {metrics}"
    );
}

/// Both take source ports for the same address of the node: kube-proxy keeps off those that the agent's connections have.
#[test]
fn ports_of_masquerades_are_not_taken() {
    const FLOWS: u16 = 10_000;
    const REQUESTS: usize = 150;
    let mut site = Site::new(&[]);
    let _kube_proxy = site.kube_proxy(Mode::Nftables);
    site.agent.launch().unwrap();
    for vip in vips() {
        let has = || {
            maps::backends(&site.agent.bpf_dir(), vip, Protocol::Udp)
                .unwrap()
                .map(|_| ())
        };
        wait_until(ARRIVAL, has).unwrap();
    }
    let mut ours = site.hold();
    let targets = site.node().sockets(NODE_PORT);
    // A seventh of all ports, so that of so many requests some would meet one.
    site.outside().run(|| {
        for target in targets {
            for port in (2_000..).take(FLOWS.into()) {
                let client = echo::Client {
                    port,
                    patience: echo::PATIENCE,
                };
                client
                    .udp(target)
                    .unwrap_or_else(|failure| panic!("{port} to {target}: {failure}"));
            }
        }
    });
    site.no_difference(&[]);
    site.agent.stop();
    std::thread::scope(|scope| {
        let cleaning = scope.spawn(|| site.agent.command(&["cleanup", "--drain", "--timeout", "90s"]).unwrap());
        let tracked = || site.on_node("cat", &["/proc/net/nf_conntrack"]);
        let through_kube_proxy = || {
            site.outside().run(|| echo::udp(targets[0])).unwrap();
            tracked().contains(&format!("dport={NODE_PORT}")).then_some(())
        };
        wait_until(ARRIVAL, through_kube_proxy).expect("new connections are kube-proxy's");
        for target in targets {
            for request in 0..REQUESTS {
                let answer = site.outside().run(|| echo::udp(target));
                assert!(
                    answer.is_ok(),
                    "request {request} to {target}: {answer:?}\n{}",
                    tracked()
                );
            }
        }
        let claims = |protocol: &str| {
            let node = format!(" src={} dst=10.244.", site.node().v4);
            let is_one = |line: &&str| {
                let from_node = line.split("sport").next().unwrap().contains(&node);
                from_node && line.contains(protocol) && line.contains("UNREPLIED")
            };
            tracked().lines().filter(is_one).count()
        };
        assert!(claims("udp") > FLOWS.into() && claims("tcp") == 1, "{}", tracked());
        ours.answer("draining");
        assert!(!cleaning.is_finished(), "it waits for connections");
        drop(ours);
        let said = cleaning.join().unwrap();
        assert!(said.contains("removed") && !said.contains("connections"), "{said}");
        assert_eq!((claims("udp"), claims("tcp")), (0, 0), "nothing is left");
    });
}

/// Legacy tables are compared as well; they are not removed, and it is said what to do.
#[test]
fn legacy_iptables_are_compared() {
    let mut site = Site::new(&[]);
    let kube_proxy = site.kube_proxy(Mode::LegacyIptables);
    let said = site.no_difference(&[]);
    assert_eq!(said["modes"], json!(["iptables (legacy)"]), "{said:#}");
    assert!(said["compared"].as_u64().unwrap() > 30, "{said:#}");
    a_missing_rule_is_named(&site, Mode::LegacyIptables);
    drop(kube_proxy);
    site.agent.launch().unwrap();
    let refused = site.remove_rules(&[]);
    assert!(
        !refused.status.success() && text(&refused).contains("kube-proxy --cleanup"),
        "{}",
        text(&refused)
    );
}

/// S1: beside kube-proxy the agent serves what is labelled for it, and keeps out of the way of the rest.
#[test]
fn a_canary_serves_what_is_labelled() {
    const LABEL: &str = "service.kubernetes.io/service-proxy-name";
    let options = ["--service-proxy-name", "canary"];
    let mut site = Site::new(&options);
    let ips = ["10.96.0.40", "fd00:96::40"];
    let mut canary = manifests::service("canary", &ips, &SERVICE_PORTS);
    canary["metadata"]["labels"] = json!({LABEL: "canary"});
    canary["spec"]["type"] = json!("NodePort");
    for index in [0, 1] {
        canary["spec"]["ports"][index]["nodePort"] = json!(30_090);
    }
    let mut objects = site.slices("canary", &[1], &site.node().name);
    for slice in &mut objects {
        slice["metadata"]["labels"][LABEL] = json!("canary");
    }
    objects.push(canary);
    site.api.apply(&objects).unwrap();
    let _kube_proxy = site.kube_proxy(Mode::Nftables);
    let served = ips.map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
    assert!(
        site.client().run(|| echo::tcp(served[0])).is_err(),
        "kube-proxy leaves it alone"
    );
    site.agent.launch().unwrap();
    let traffic = site.traffic();
    let bpf_dir = site.agent.bpf_dir();
    for (vip, other) in served.into_iter().zip(vips()) {
        wait_until(ARRIVAL, || maps::backends(&bpf_dir, vip, Protocol::Tcp).unwrap()).expect("the canary serves it");
        assert_eq!(
            maps::backends(&bpf_dir, other, Protocol::Tcp).unwrap(),
            None,
            "it is kube-proxy's"
        );
    }
    let own = |targets: &[SocketAddr; 2], ask: &dyn Fn(SocketAddr, bool) -> echo::Outcome| {
        for target in targets {
            for is_udp in [false, true] {
                let answer = ask(*target, is_udp).unwrap_or_else(|failure| panic!("{target}, UDP {is_udp}: {failure}"));
                assert_eq!(answer.server, site.topology.pod(0, 1).name);
            }
        }
    };
    // kube-proxy's nftables mode drops what the node sends to cluster IPs it does not know, so connected UDP is out.
    let at_socket = |target, is_udp| {
        if is_udp {
            echo::udp_unconnected(target)
        } else {
            echo::tcp(target)
        }
    };
    let request = |target, is_udp| if is_udp { echo::udp(target) } else { echo::tcp(target) };
    own(&served, &|target, is_udp| site.client().run(|| request(target, is_udp)));
    own(&served, &|target, is_udp| site.agent.run(|| at_socket(target, is_udp)));
    own(&site.node().sockets(30_090), &|target, is_udp| {
        site.outside().run(|| request(target, is_udp))
    });
    // Processes of the node that no socket program sees: the packet programs must leave them to kube-proxy.
    for vip in vips() {
        for is_udp in [false, true] {
            for _ in 0..20 {
                let answer = site.node().run(|| request(vip, is_udp));
                assert!(answer.is_ok(), "{vip}, UDP {is_udp}: {answer:?}");
            }
        }
    }
    let said = site.no_difference(&options);
    let reasons = said["byDesign"].as_array().unwrap();
    let has = |service: &str, problem: &str| {
        let is =
            |one: &Value| one["service"].as_str().unwrap().starts_with(service) && one["problem"] == json!(problem);
        reasons.iter().any(is)
    };
    assert!(
        has("default/web", "missingInAgent") && has("default/canary", "missingInKubeProxy"),
        "{said:#}"
    );
    assert_undisturbed(traffic);
}
