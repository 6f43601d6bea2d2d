//! What a person sees of the traffic: the metrics per service port and `proxy-agent top`, after traffic that is known.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::names;
use proxy_common::rewrite::{Rewrite, RewriteKey};

use proxy_tests::echo::REQUESTS;
use proxy_tests::manifests::{self, port};
use proxy_tests::programs::Plain;
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{Setup, World, vips};
use proxy_tests::{process, traffic};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// Requests to each address with each protocol.
const COUNT: usize = 7;
const NOBODY: &str = "10.96.0.99:80";

fn world(options: &[&'static str]) -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 2,
        ..Default::default()
    };
    let mut all = vec!["--cluster-cidr", CLUSTER_CIDR];
    all.extend(options);
    World::new(&Setup {
        shape,
        options: all,
        ..Default::default()
    })
    .unwrap()
}

/// The value of one series of `web` or another service; none if there is no such series.
fn metric(world: &World, name: &str, service: &str, labels: &str) -> Option<u64> {
    let text = world.agents[0].metrics().unwrap();
    let name = format!("ebpf_proxy_service_{name}_total{{namespace=\"default\",service=\"{service}\",");
    let series = text.lines().filter_map(|line| line.strip_prefix(&name));
    let values: Vec<u64> = series
        .filter_map(|line| line.split_once("} "))
        .filter(|(found, _)| found.ends_with(labels))
        .map(|(_, value)| value.parse().unwrap())
        .collect();
    assert!(values.len() <= 1, "{name}{labels}: {values:?}");
    values.first().copied()
}

fn request_everything(world: &World) {
    let client = world.topology.pod(0, 0);
    for vip in vips() {
        for (what, request) in REQUESTS {
            for _ in 0..COUNT {
                client
                    .run(|| request(vip))
                    .unwrap_or_else(|failure| panic!("{what} to {vip}: {failure}"));
            }
        }
    }
}

/// Exact numbers; they outlive the agent, and go with the Service.
#[test]
fn traffic_is_counted_per_service_port() {
    let mut world = world(&[]);
    world.publish(&["pod1-2"]).unwrap();
    world
        .write(
            "nobody",
            &[manifests::service("nobody", &["10.96.0.99"], &[port("", "TCP", 80)])],
        )
        .unwrap();
    let nobody: SocketAddr = NOBODY.parse().unwrap();
    world
        .wait_for(nobody, proxy_common::addr::Protocol::Tcp, Some(&[]))
        .unwrap();
    assert_eq!(
        metric(&world, "connections", "web", "protocol=\"UDP\""),
        None,
        "not used yet"
    );

    request_everything(&world);
    let both = 2 * COUNT as u64;
    // Two of the three kinds of requests.
    let udp_both = 2 * both;
    let udp = |world: &World, name, more: &str| metric(world, name, "web", &format!("protocol=\"UDP\"{more}"));
    let tcp = |world: &World, name, more: &str| metric(world, name, "web", &format!("protocol=\"TCP\"{more}"));
    // Two sockets may have had the same port by chance.
    assert!(udp(&world, "connections", "") > Some(both));
    for direction in [",direction=\"request\"", ",direction=\"reply\""] {
        // One datagram each.
        assert_eq!(udp(&world, "packets", direction), Some(udp_both));
        assert!(
            udp(&world, "bytes", direction) > Some(udp_both * 28),
            "more than headers"
        );
        // A handshake and an end at least.
        assert!(tcp(&world, "packets", direction) >= Some(both * 3));
    }
    assert_eq!(tcp(&world, "connections", ""), Some(both));
    assert_eq!(tcp(&world, "refused", ""), Some(0));

    // At the socket: connections without packets.
    let packets = tcp(&world, "packets", ",direction=\"request\"");
    let (_, connect) = REQUESTS.into_iter().find(|(what, _)| what.contains("TCP")).unwrap();
    world.agents[0].run(|| connect(vips()[0])).unwrap();
    assert_eq!(tcp(&world, "connections", ""), Some(both + 1));
    assert_eq!(tcp(&world, "packets", ",direction=\"request\""), packets);

    world.topology.pod(0, 0).run(|| connect(nobody)).unwrap_err();
    assert_eq!(metric(&world, "refused", "nobody", "protocol=\"TCP\""), Some(1));

    // Kept over a restart: the programs go on counting meanwhile.
    world.agents[0].stop();
    request_everything(&world);
    world.agents[0].launch().unwrap();
    assert_eq!(udp(&world, "packets", ",direction=\"reply\""), Some(2 * udp_both));
    assert_eq!(tcp(&world, "connections", ""), Some(2 * both + 1));

    // A Service that comes again begins at zero.
    world.manifests.remove("nobody").unwrap();
    let gone = || (metric(&world, "refused", "nobody", "protocol=\"TCP\"").is_none()).then_some(());
    process::wait_until(PATIENCE, gone).expect("the series go with the Service");
    world
        .write(
            "nobody",
            &[manifests::service("nobody", &["10.96.0.99"], &[port("", "TCP", 80)])],
        )
        .unwrap();
    world
        .wait_for(nobody, proxy_common::addr::Protocol::Tcp, Some(&[]))
        .unwrap();
    world.topology.pod(0, 0).run(|| connect(nobody)).unwrap_err();
    assert_eq!(metric(&world, "refused", "nobody", "protocol=\"TCP\""), Some(1));
}

/// `--service-metrics=false`, and back.
#[test]
fn counting_can_be_switched_off() {
    let mut world = world(&["--service-metrics=false"]);
    world.publish(&["pod1-2"]).unwrap();
    request_everything(&world);
    let text = world.agents[0].metrics().unwrap();
    assert!(!text.contains("ebpf_proxy_service_"), "{text}");
    let opened = text
        .lines()
        .find_map(|line| line.strip_prefix("ebpf_proxy_connections_opened_total "));
    let opened: usize = opened.unwrap().parse().unwrap();
    // Two UDP sockets may have had the same port by chance.
    assert!((4 * COUNT..=6 * COUNT).contains(&opened), "{opened}");

    world.agents[0].stop();
    world.agents[0].set_options(&["--cluster-cidr", CLUSTER_CIDR]);
    world.agents[0].launch().unwrap();
    request_everything(&world);
    let connections = metric(&world, "connections", "web", "protocol=\"TCP\"");
    assert_eq!(connections, Some(2 * COUNT as u64));
}

/// The service and the backend that are busy stand first, with rates.
#[test]
fn top_shows_who_is_busy() {
    let world = world(&[]);
    world.publish(&["pod1-2"]).unwrap();
    let (_, connect) = REQUESTS.into_iter().find(|(what, _)| what.contains("TCP")).unwrap();
    let client = world.topology.pod(0, 0).netns.clone();
    let running = traffic::repeat(
        |body| client.spawn(body),
        Duration::from_millis(5),
        move || connect(vips()[0]),
    );
    assert!(running.wait_for(3, PATIENCE), "traffic");
    let top = |more: &[&str]| {
        let mut args = vec!["top", "--once", "--interval", "1500ms"];
        args.extend(more);
        world.agents[0].command(&args).unwrap()
    };
    let json: Value = serde_json::from_str(&top(&["-o", "json", "-n", "1"])).unwrap();
    let table = top(&["--sort", "connections"]);
    assert!(traffic::failures(&running.stop()).is_empty());

    let services = json["services"].as_array().unwrap();
    assert_eq!(services.len(), 1, "-n 1");
    let service = &services[0];
    assert_eq!(
        (&service["service"], &service["protocol"]),
        (&"web".into(), &"TCP".into())
    );
    let rate = |name: &str| service[name].as_f64().unwrap();
    assert!(rate("connectionsPerSecond") > 0.0, "{json}");
    // A SYN, an ACK and a FIN at least.
    assert!(rate("requestPacketsPerSecond") > rate("connectionsPerSecond"), "{json}");
    assert!(
        rate("replyBytesPerSecond") > 40.0 * rate("connectionsPerSecond"),
        "{json}"
    );
    let backend = &json["backends"][0];
    let address = SocketAddr::new(world.topology.pod(0, 1).v4.into(), proxy_tests::world::ECHO);
    assert_eq!(backend["address"], address.to_string());
    assert!(backend["newPerSecond"].as_f64().unwrap() > 0.0, "{json}");

    let mut lines = table.lines();
    let heading = lines.next().unwrap();
    for column in ["NAMESPACE", "SERVICE", "CONN/S", "PKT/S", "BYTES/S"] {
        assert!(heading.contains(column), "{table}");
    }
    let busiest: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(
        (busiest[0], busiest[1], busiest[3]),
        ("default", "web", "TCP"),
        "{table}"
    );
    assert!(table.contains(&address.to_string()), "{table}");
}

/// Entries that are really in the rewrite table.
fn rewrites<A: Address>(world: &World) -> u64 {
    let name = names::for_family::<A>(names::REWRITES);
    let path = world.agents[0]
        .bpf_dir()
        .join(format!("v{}/maps/{name}", names::LAYOUT_VERSION));
    let map = Map::LruHashMap(MapData::from_pin(path).unwrap());
    let map = HashMap::<_, Plain<RewriteKey<A>>, Plain<Rewrite<A>>>::try_from(map).unwrap();
    map.keys().map(Result::unwrap).count() as u64
}

fn own_metric(world: &World, series: &str) -> u64 {
    let text = world.agents[0].metrics().unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("ebpf_proxy_{series} ")));
    value.unwrap_or_else(|| panic!("no {series}: {text}")).parse().unwrap()
}

/// What a table that is too small forgets is counted: exactly, as soon as the table is quiet.
#[test]
fn evicted_entries_are_counted() {
    let world = world(&["--rewrites-capacity", "1024"]);
    world.publish(&["pod1-2"]).unwrap();
    fills::<Addr4>(&world, "IPv4", vips()[0]);
    fills::<Addr6>(&world, "IPv6", vips()[1]);
}

fn fills<A: Address>(world: &World, family: &str, vip: SocketAddr) {
    const FLOWS: u16 = 2_000;
    let inserted = || {
        own_metric(
            world,
            &format!("rewrite_entries_inserted_total{{ip_family=\"{family}\"}}"),
        )
    };
    let evicted = || {
        own_metric(
            world,
            &format!("rewrite_entries_evicted_total{{ip_family=\"{family}\"}}"),
        )
    };
    let removed = |by| {
        own_metric(
            world,
            &format!("rewrite_entries_removed_total{{ip_family=\"{family}\",by=\"{by}\"}}"),
        )
    };
    let (present, before) = (rewrites::<A>(world), inserted());
    assert_eq!(evicted(), 0);
    let (by_program, by_agent) = (removed("program"), removed("agent"));
    world.topology.pod(0, 0).run(|| {
        let any: IpAddr = if A::FAMILY == 4 {
            [0; 4].into()
        } else {
            [0u16; 8].into()
        };
        for port in 20_000..20_000 + FLOWS {
            UdpSocket::bind((any, port)).unwrap().send_to(b"one", vip).unwrap();
        }
    });
    // The entries of a flow's two directions; others in passing.
    let new = inserted() - before;
    assert!(new >= 2 * u64::from(FLOWS), "{new}");
    let gone = present + new - rewrites::<A>(world) - (removed("program") - by_program) - (removed("agent") - by_agent);
    assert!(gone >= new - 1_024, "{gone} of {new}");
    let counted = process::wait_until(Duration::from_secs(60), || (evicted() >= gone).then(&evicted));
    assert_eq!(counted, Some(gone), "{family}: {} now", evicted());
}
