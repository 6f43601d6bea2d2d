//! The stage's Services: one for each thing that can happen to a packet.

use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::manifests::{self, Port, port};
use crate::topology::Host;
use crate::world::ECHO;

/// Where no pod answers.
pub(super) const SILENT: u16 = 9;
const PORT: u16 = 80;
/// Cluster IPs. All but the first are IPv4 alone.
const STEADY: [&str; 2] = ["10.96.1.10", "fd00:96::1:10"];
const EMPTY: &str = "10.96.1.11";
const LOCAL: &str = "10.96.1.12";
const RANGES: &str = "10.96.1.13";
const SIZED: &str = "10.96.1.14";
const MOVING: &str = "10.96.1.15";
const CHANGING: &str = "10.96.1.16";
const LOST: &str = "10.96.1.17";
const MUTE: &str = "10.96.1.18";
const SLOW: &str = "10.96.1.19";
/// Load-balancer address of the one with source ranges.
const OUTSIDE: &str = "203.0.113.13";
const UDP: [Port; 1] = [port("udp", "UDP", PORT)];
const ECHO_UDP: [Port; 1] = [port("udp", "UDP", ECHO)];

/// Backends with the names of their nodes.
pub(super) type Backends<'a> = [(&'a Host, &'a str)];

/// What is dialled.
pub(super) fn address(service: &str) -> SocketAddr {
    let (ip, port) = match service {
        "steady6" => (STEADY[1], PORT),
        // No port of the Service.
        "undefined" => (STEADY[0], PORT + 1),
        "empty" => (EMPTY, PORT),
        "local" => (LOCAL, PORT),
        "ranges" => (OUTSIDE, PORT),
        "sized" => (SIZED, PORT),
        "moving" => (MOVING, PORT),
        "lost" => (LOST, PORT),
        "mute" => (MUTE, PORT),
        "slow" => (SLOW, PORT),
        _ => (STEADY[0], PORT),
    };
    SocketAddr::new(ip.parse().expect("a constant"), port)
}

/// Those that stay as they are.
pub(super) fn lasting(backends: &Backends<'_>) -> Vec<Value> {
    let of_v4 = |(host, node): &(&Host, &'_ str)| (IpAddr::V4(host.v4), (*node).to_owned());
    let one = |name: &str, ip: &str, ports: &[Port], chosen: Option<&(&Host, &str)>| {
        let endpoint = chosen.map(of_v4);
        let endpoint: Vec<(IpAddr, &str)> = endpoint.iter().map(|(ip, node)| (*ip, node.as_str())).collect();
        let mut objects = vec![manifests::service(name, &[ip], &UDP)];
        objects.extend(manifests::slices(name, ports, &endpoint).into_iter().take(1));
        objects
    };
    let (first, last) = (backends.first(), backends.last());
    let mut objects = steady(backends);
    objects.extend(one("empty", EMPTY, &ECHO_UDP, None));
    objects.extend(one("sized", SIZED, &ECHO_UDP, first));
    objects.extend(one("lost", LOST, &ECHO_UDP, first));
    objects.extend(one("mute", MUTE, &[port("udp", "UDP", SILENT)], first));
    let mut local = one("local", LOCAL, &ECHO_UDP, last);
    local[0]["spec"]["internalTrafficPolicy"] = json!("Local");
    objects.extend(local);
    let mut ranges = one("ranges", RANGES, &ECHO_UDP, first);
    ranges[0]["spec"]["type"] = json!("LoadBalancer");
    ranges[0]["spec"]["loadBalancerSourceRanges"] = json!(["192.0.2.0/24"]);
    ranges[0]["status"] = json!({"loadBalancer": {"ingress": [{"ip": OUTSIDE}]}});
    objects.extend(ranges);
    objects
}

fn steady(backends: &Backends<'_>) -> Vec<Value> {
    let (service, echo) = (port("tcp", "TCP", PORT), port("tcp", "TCP", ECHO));
    let endpoints: Vec<(IpAddr, &str)> = backends
        .iter()
        .flat_map(|(host, node)| [(IpAddr::V4(host.v4), *node), (IpAddr::V6(host.v6), *node)])
        .collect();
    let mut objects = vec![manifests::service("steady", &STEADY, &[UDP[0].clone(), service])];
    objects.extend(manifests::slices("steady", &[ECHO_UDP[0].clone(), echo], &endpoints));
    objects
}

/// One whose endpoint is now here and now there, as the control plane stamps the change (S188).
pub(super) fn stamped(name: &str, endpoint: IpAddr, node: &str, changed: SystemTime) -> Vec<Value> {
    let mut slices = manifests::slices(name, &ECHO_UDP, &[(endpoint, node)]);
    slices.truncate(1);
    let stamp = Timestamp::try_from(changed).map(|time| time.to_string());
    slices[0]["metadata"]["annotations"] =
        json!({"endpoints.kubernetes.io/last-change-trigger-time": stamp.unwrap_or_default()});
    let ip = address(name).ip().to_string();
    slices.push(manifests::service(name, &[&ip], &UDP));
    slices
}

/// The one whose settings change; nobody dials it.
pub(super) fn changing(affinity_seconds: u32) -> Vec<Value> {
    let mut service = manifests::service("changing", &[CHANGING], &UDP);
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": affinity_seconds}});
    vec![service]
}

/// One with an address that is none.
pub(super) fn bad() -> Vec<Value> {
    vec![manifests::service("bad", &["not an address"], &UDP)]
}

/// More than the maps have room for.
pub(super) fn too_many(frontends: u32) -> Vec<Value> {
    let ip = |number: u32| format!("10.96.{}.{}", 2 + number / 200, 1 + number % 200);
    let one = |number| manifests::service(&format!("many-{number}"), &[&ip(number)], &UDP);
    (0..frontends).map(one).collect()
}
