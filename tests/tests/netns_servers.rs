//! What an agent serves over HTTP, as probes, load balancers and people see it: `/healthz`, `/livez`, the metrics server's paths,
//! health-check ports; and what it does when an address is taken. One node each, without packets.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use proxy_tests::agent::{Agent, Source};
use proxy_tests::http::{self, Answer};
use proxy_tests::manifests::{self, port};
use proxy_tests::topology::Shape;
use proxy_tests::world::{Setup, World};
use proxy_tests::{netns::Netns, process};
use serde_json::{Value, json};

const HEALTHZ: &str = "127.0.0.1:10256";
const METRICS: &str = "127.0.0.1:10249";
const CHECK: u16 = 31_156;
/// Above what anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn world(options: &[&'static str]) -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 1,
        ..Default::default()
    };
    World::new(&Setup {
        shape,
        options: options.to_vec(),
        ..Default::default()
    })
    .unwrap()
}

fn get(netns: &Netns, server: &str, path: &str) -> anyhow::Result<Answer> {
    netns.run(|| http::get(server.parse()?, path))
}

fn node(world: &World) -> &Netns {
    world.agents[0].netns()
}

fn wait_for<T>(what: &str, question: impl FnMut() -> Option<T>) -> T {
    process::wait_until(PATIENCE, question).unwrap_or_else(|| panic!("{what}: not within {PATIENCE:?}"))
}

/// A dual-stack Service with policy Local and a health-check port, and an endpoint of this node behind it.
fn checked(node: &str) -> Vec<Value> {
    let mut service = manifests::service("checked", &["10.96.0.20", "fd00:96::20"], &[port("http", "TCP", 80)]);
    service["spec"]["type"] = json!("LoadBalancer");
    service["spec"]["externalTrafficPolicy"] = json!("Local");
    service["spec"]["healthCheckNodePort"] = json!(CHECK);
    let endpoints = ["10.244.1.9", "fd00:10:244:1::9"].map(|ip| (ip.parse::<IpAddr>().unwrap(), node));
    let mut objects = vec![service];
    objects.extend(manifests::slices("checked", &[port("http", "TCP", 8080)], &endpoints));
    objects
}

/// S177: as load balancers read it.
fn assert_health(answer: &Answer, status: u16, has_eligibility: bool) -> Value {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("Content-Type"), Some("application/json"), "{answer:?}");
    assert_eq!(answer.header("X-Content-Type-Options"), Some("nosniff"), "{answer:?}");
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    let keys: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = vec!["currentTime", "healthy", "lastUpdated", "nodeEligible", "status"];
    expected.retain(|key| has_eligibility || *key != "nodeEligible");
    assert_eq!(keys, expected, "{body}");
    for family in ["IPv4", "IPv6"] {
        let family = &body["status"][family];
        assert!(
            family["healthy"].is_boolean() && family["lastUpdated"].is_string(),
            "{body}"
        );
    }
    let is_now = body["lastUpdated"] == body["currentTime"];
    assert_eq!(is_now, status == 200, "{body}");
    body
}

/// S173, S174, S176, S177, S180: one family's map is full, so its change waits; the other family is in step. Room is made, and all is
/// well again.
#[test]
fn a_change_that_cannot_be_applied_makes_its_family_unhealthy() {
    let world = world(&["--frontends-capacity", "4", "--sync-period", "1s"]);
    let node = node(&world);
    world.write("checked", &checked("node1")).unwrap();
    let check = |ip: &str| {
        let server = SocketAddr::new(ip.parse().unwrap(), CHECK);
        node.run(|| http::get(server, "/")).ok()
    };
    wait_for("an answer at the health-check port", || {
        check("::1").filter(|a| a.status == 200)
    });
    for (path, has_eligibility) in [("/healthz", true), ("/livez", false)] {
        let body = assert_health(&get(node, HEALTHZ, path).unwrap(), 200, has_eligibility);
        assert_eq!(body["healthy"], true);
    }

    // Each of them takes two frontends, and there is room for four in IPv4.
    let more: Vec<_> = (30..33)
        .map(|last| {
            manifests::service(
                &format!("more-{last}"),
                &[&format!("10.96.0.{last}")],
                &[port("", "TCP", 80)],
            )
        })
        .collect();
    world.write("more", &more).unwrap();
    let answer = wait_for("/livez: 503", || {
        get(node, HEALTHZ, "/livez").ok().filter(|answer| answer.status == 503)
    });
    let body = assert_health(&answer, 503, false);
    assert_eq!(body["status"]["IPv4"]["healthy"], false, "{body}");
    assert_eq!(body["status"]["IPv6"]["healthy"], true, "{body}");
    let body = assert_health(&get(node, HEALTHZ, "/healthz").unwrap(), 503, true);
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(false), &json!(true)));
    for ip in ["127.0.0.1", "::1"] {
        let answer = check(ip).unwrap();
        assert_eq!(answer.status, 503, "S180: {answer:?}");
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(
            (&body["serviceProxyHealthy"], &body["localEndpoints"]),
            (&json!(false), &json!(1))
        );
    }

    world.manifests.remove("more").unwrap();
    wait_for("healthy again", || {
        get(node, HEALTHZ, "/healthz")
            .ok()
            .filter(|answer| answer.status == 200)
    });
    assert_eq!(check("127.0.0.1").unwrap().status, 200);
}

/// S156: where node ports are served, while addresses come and go.
#[test]
fn health_checks_follow_the_chosen_addresses() {
    let world = world(&["--nodeport-addresses", "198.51.100.0/24,fd00:51::/64"]);
    let node = node(&world);
    world.write("checked", &checked("node1")).unwrap();
    let check = |ip: &str| {
        let server = SocketAddr::new(ip.parse().unwrap(), CHECK);
        node.run(|| http::get(server, "/")).ok().map(|answer| answer.status)
    };
    for (address, ip) in [("198.51.100.7/32", "198.51.100.7"), ("fd00:51::7/128", "fd00:51::7")] {
        assert_eq!(check(ip), None);
        node.ip(&format!("address add {address} dev lo")).unwrap();
        wait_for(ip, || (check(ip) == Some(200)).then_some(()));
        node.ip(&format!("address del {address} dev lo")).unwrap();
        node.ip(&format!("address add {address} dev lo")).unwrap();
        wait_for("it comes back", || (check(ip) == Some(200)).then_some(()));
    }
    for ip in ["127.0.0.1", "::1"] {
        assert_eq!(check(ip), None, "{ip} is not chosen");
    }
}

/// S178.
#[test]
fn the_metrics_server_s_paths() {
    let world = world(&[
        "--min-sync-period=1s",
        "--nodeport-addresses=192.0.2.0/24",
        "--conntrack-udp-timeout=45s",
    ]);
    let get = |path: &str| get(node(&world), METRICS, path).unwrap();
    for (path, body) in [("/healthz", "ok"), ("/proxyMode", "ebpf")] {
        let answer = get(path);
        assert_eq!((answer.status, answer.body.as_str()), (200, body), "{path}");
        assert_eq!(
            answer.header("Content-Type"),
            Some("text/plain; charset=utf-8"),
            "{path}"
        );
    }
    let answer = get("/metrics/slis");
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, ""),
        "no indicators, as in kube-proxy"
    );
    let answer = get("/metrics");
    assert_eq!(answer.status, 200);
    // What kube-proxy gives to somebody who asks for nothing in particular. Prometheus asks for OpenMetrics: `monitoring.rs`.
    assert_eq!(
        answer.header("Content-Type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    assert!(
        answer
            .body
            .contains("\nkubeproxy_sync_proxy_rules_duration_seconds_bucket{")
    );
    for map in [
        "FRONTENDS",
        "BACKENDS",
        "REWRITES",
        "AFFINITY",
        "SRC_RANGES",
        "NODE_ADDRS",
    ] {
        for family in [4, 6] {
            let line = format!("\nebpf_proxy_map_capacity{{map=\"{map}{family}\"}} ");
            assert!(answer.body.contains(&line), "{line} is not in {}", answer.body);
        }
    }
    let answer = get("/configz");
    assert_eq!(
        (answer.status, answer.header("Content-Type")),
        (200, Some("application/json"))
    );
    let config: Value = serde_json::from_str(&answer.body).unwrap();
    let config = &config["kubeproxy.config.k8s.io"];
    assert_eq!(config["hostnameOverride"], "node1");
    assert_eq!(config["nodePortAddresses"], json!(["192.0.2.0/24"]));
    for (field, value) in [
        ("localhostNodePorts", json!(true)),
        ("masqueradeAll", json!(false)),
        ("minSyncPeriod", json!("1s")),
        ("serviceMetrics", json!(true)),
        ("syncPeriod", json!("30s")),
    ] {
        assert_eq!(config["ebpf"][field], value, "{field}");
    }
    assert_eq!(
        config["conntrack"],
        json!({"tcpCloseWaitTimeout": "1h0m0s", "tcpEstablishedTimeout": "24h0m0s", "udpStreamTimeout": "3m0s",
            "udpTimeout": "45s"})
    );
    assert_eq!(get("/nothing").status, 404);
}

/// S162: the first change after quiet at once, those after it together.
#[test]
fn changes_within_the_least_period_are_applied_together() {
    const LEAST: Duration = Duration::from_secs(3);
    let world = world(&["--min-sync-period", "3s"]);
    let node = node(&world);
    let applied = || -> u64 {
        let text = get(node, METRICS, "/metrics").unwrap().body;
        let name = "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ";
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .parse()
            .unwrap()
    };
    let before = wait_for("quiet after the start", || {
        // Nothing may have been applied for so long, or the first change would have to wait.
        let count = applied();
        std::thread::sleep(LEAST);
        (applied() == count).then_some(count)
    });
    let started = Instant::now();
    let service = |last: u8| {
        manifests::service(
            &format!("s-{last}"),
            &[&format!("10.96.0.{last}")],
            &[port("", "TCP", 80)],
        )
    };
    world.write("s-40", &[service(40)]).unwrap();
    wait_for("the first change", || (applied() == before + 1).then_some(()));
    let first = started.elapsed();
    assert!(first < LEAST, "S162: at once, not after {first:?}");
    for last in 41..45 {
        world.write(&format!("s-{last}"), &[service(last)]).unwrap();
    }
    let vip = "10.96.0.44:80".parse().unwrap();
    world
        .wait_for(vip, proxy_common::addr::Protocol::Tcp, Some(&[]))
        .unwrap();
    assert_eq!(applied(), before + 2, "S162: together");
}

/// S189.
#[test]
fn service_ports_without_a_local_endpoint_are_counted() {
    let world = world(&[]);
    let wait_for_count = |family: &str, count: u32| {
        let line = format!(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total\
             {{ip_family=\"{family}\",traffic_policy=\"external\"}} {count}\n"
        );
        let metrics = || world.agents[0].metrics().unwrap();
        wait_for(&line, || metrics().contains(&line).then_some(()));
    };
    for (node, count) in [("node2", 1), ("node1", 0), ("node2", 1)] {
        let mut objects = checked(node);
        objects[0]["spec"]["ports"][0]["nodePort"] = json!(31_157);
        world.write("checked", &objects).unwrap();
        wait_for_count("IPv4", count);
        wait_for_count("IPv6", count);
    }
    world.manifests.remove("checked").unwrap();
    wait_for_count("IPv4", 0);
    wait_for_count("IPv6", 0);
}

/// S179: tried again, or fatal.
#[test]
fn an_address_that_is_taken() {
    let base = proxy_tests::leftovers::temp_dir("taken").unwrap();
    let netns = Netns::new("taken").unwrap();
    netns.ip("link set lo up").unwrap();
    let taken = netns.run(|| TcpListener::bind(METRICS)).unwrap();
    let source = Source::Manifests(base.path().to_owned());

    let mut agent = Agent::prepare("fatal", &netns, &source, &["--bind-address-hard-fail"]).unwrap();
    let error = format!("{:#}", agent.launch().unwrap_err());
    for part in ["ended at once", "--metrics-bind-address", METRICS, "in use"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    drop(agent);

    let agent = Agent::start("patient", &netns, &source, &[]).unwrap();
    wait_for("it says so", || {
        agent.log().contains("cannot be bound, trying again").then_some(())
    });
    drop(taken);
    wait_for("served after it is free", || agent.metrics().ok());
}
