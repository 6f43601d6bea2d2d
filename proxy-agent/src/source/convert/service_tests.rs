//! Services made to hurt, written as JSON as an API server or a file would have them.

use serde_json::{Value, json};

use super::*;
use crate::model::fixtures::object;

fn service(spec: Value) -> (Option<Service>, Vec<String>) {
    labelled_service(json!({}), spec)
}

fn labelled_service(labels: Value, spec: Value) -> (Option<Service>, Vec<String>) {
    let value = json!({"metadata": {"name": "web", "namespace": "default", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": spec});
    let decoded: objects::Service = serde_json::from_value(value).unwrap();
    let mut converter = Converter::new("node-a");
    let service = converter.service(&object("web"), &decoded);
    (
        service,
        converter.take_warnings().iter().map(ToString::to_string).collect(),
    )
}

#[test]
fn services_to_ignore() {
    let proxied = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
    for (label, value) in [
        ("service.kubernetes.io/service-proxy-name", ""),
        ("service.kubernetes.io/headless", "x"),
    ] {
        assert_eq!(
            labelled_service(json!({label: value}), proxied.clone()),
            (None, vec![]),
            "S1, S2"
        );
    }
    assert_eq!(
        labelled_service(json!({"service.kubernetes.io/headless": 7}), proxied.clone()).0,
        None,
        "any value"
    );
    assert!(labelled_service(json!({"other": "x"}), proxied).0.is_some());
    for spec in [
        json!({"clusterIP": "None", "clusterIPs": ["None"]}),
        json!({"clusterIP": ""}),
        json!({}),
        json!({"clusterIP": "10.96.0.1", "type": "ExternalName"}),
    ] {
        assert_eq!(service(spec), (None, vec![]), "S5, S6");
    }
    let (ignored, warnings) = service(json!([1]));
    assert_eq!((ignored, warnings.len()), (None, 1));
}

/// S1: a proxy with a name serves what is labelled with it, and nothing else; headless Services are nobody's.
#[test]
fn a_proxy_with_a_name_serves_what_is_labelled_with_it() {
    let key = "service.kubernetes.io/service-proxy-name";
    for (labels, expected) in [
        (json!({key: "canary"}), true),
        (json!({key: "other"}), false),
        (json!({key: ""}), false),
        (json!({}), false),
        (json!({key: "canary", "service.kubernetes.io/headless": ""}), false),
    ] {
        let value = json!({"metadata": {"name": "web", "namespace": "default", "labels": labels},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}});
        let decoded: objects::Service = serde_json::from_value(value).unwrap();
        let mut converter = Converter::new("node-a").with_proxy_name(Some("canary".into()));
        assert_eq!(
            converter.service(&object("web"), &decoded).is_some(),
            expected,
            "{labels}"
        );
    }
}

#[test]
fn cluster_ips_by_family() {
    let ips = |spec| {
        let (service, warnings) = service(spec);
        let service = service.unwrap();
        (
            service.cluster_ip4.map(|ip| ip.to_string()),
            service.cluster_ip6.map(|ip| ip.to_string()),
            warnings.len(),
        )
    };
    let v4 = Some("10.96.0.11".to_owned());
    let v6 = Some("fd00::1".to_owned());
    let dual =
        json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.96.0.011"], "ipFamilies": ["IPv6", "IPv4"]});
    assert_eq!(ips(dual), (v4.clone(), v6.clone(), 0), "S16, S17, S20");
    assert_eq!(
        ips(json!({"clusterIP": "10.96.0.011"})),
        (v4.clone(), None, 0),
        "S16: no families"
    );
    let unpaired = json!({"clusterIP": "10.96.0.11", "clusterIPs": ["10.96.0.11", "fd00::1"]});
    assert_eq!(ips(unpaired), (v4.clone(), None, 1));
    let swapped =
        json!({"clusterIP": "10.96.0.11", "clusterIPs": ["10.96.0.11", "10.96.0.12"], "ipFamilies": ["IPv4", "IPv6"]});
    assert_eq!(ips(swapped), (v4, None, 1));
    let bad =
        json!({"clusterIP": "10.96.0.300", "clusterIPs": ["10.96.0.300", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]});
    assert_eq!(ips(bad), (None, v6, 1), "S19: the other family stays");
}

#[test]
fn bad_ports_are_left_out() {
    let (service, warnings) = service(json!({"clusterIP": "10.96.0.1", "ports": [
        {"name": "ok", "port": 80}, {"name": "zero", "port": 0}, {"name": "big", "port": 65536}, {"name": "text", "port": "http"},
        {"name": "odd", "port": 81, "protocol": "HTTP"}, "nonsense", null, {"port": 82.5}, {"name": "ok", "port": 83},
        {"name": 7, "port": 84}, {"name": "udp", "port": 80, "protocol": "UDP"}, {"name": "empty", "port": 85, "protocol": ""},
    ]}));
    let names: Vec<_> = service
        .unwrap()
        .ports
        .iter()
        .map(|p| format!("{}:{}/{}", p.name, p.port, p.protocol))
        .collect();
    assert_eq!(names, ["ok:80/TCP", "udp:80/UDP", "empty:85/TCP"], "S25");
    assert_eq!(warnings.len(), 9, "{warnings:#?}");
    assert_eq!(
        warnings[2],
        "Service default/web: spec.ports[1].port: is 0; the port is ignored; use a number from 1 to 65535"
    );
}

#[test]
fn policies_and_affinity() {
    let with = |extra: Value| {
        let mut spec = json!({"clusterIP": "10.96.0.1"});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let (service, warnings) = service(spec);
        let service = service.unwrap();
        (service.internal_local, service.affinity_seconds, warnings.len())
    };
    let timeout = |value: Value| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": value}}});
    assert_eq!(with(json!({"internalTrafficPolicy": "Local"})), (true, 0, 0));
    assert_eq!(
        with(json!({"internalTrafficPolicy": "Cluster", "sessionAffinity": "None"})),
        (false, 0, 0)
    );
    assert_eq!(with(json!({"sessionAffinity": "ClientIP"})), (false, 10_800, 0), "S132");
    assert_eq!(with(timeout(json!(60))), (false, 60, 0));
    assert_eq!(with(timeout(json!(0))), (false, 10_800, 1));
    assert_eq!(with(timeout(json!("x"))), (false, 10_800, 1));
    assert_eq!(
        service(json!({"clusterIP": "10.96.0.1"})).0.unwrap().created,
        1_767_225_600
    );
}

#[test]
fn external_addresses() {
    let decode = |spec: Value, ingress: Value| {
        let value =
            json!({"metadata": {"name": "web"}, "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}});
        let decoded: objects::Service = serde_json::from_value(value).unwrap();
        let mut converter = Converter::new("node-a");
        let service = converter.service(&object("web"), &decoded).unwrap();
        (service, converter.take_warnings().len())
    };
    let texts = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [
            {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81, "nodePort": 0}, {"name": "c", "port": 82, "nodePort": 70000}],
        "externalIPs": ["203.0.113.011", "2001:db8::1", "nonsense", "203.0.113.11"],
        "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "2001:db8::/32", "10.0.0.0"]});
    let ingress = json!([{"ip": "203.0.113.10"}, {"ip": "203.0.113.12", "ipMode": "VIP"}, {"ip": "203.0.113.13", "ipMode": "Proxy"},
        {"hostname": "lb.example"}, {"ip": "x"}, {"ip": "2001:db8::2"}]);
    let (service, warnings) = decode(spec, ingress);
    assert_eq!(
        texts(&service.external_ips),
        ["203.0.113.11", "2001:db8::1"],
        "S19, S20, S98"
    );
    assert_eq!(
        texts(&service.load_balancer_ips),
        ["203.0.113.10", "203.0.113.12", "2001:db8::2"],
        "S94, S95"
    );
    let ranges: Vec<_> = service.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.0.0.0/8", "2001:db8::/32"], "S104");
    let ports: Vec<_> = service.ports.iter().map(|port| port.node_port.map(Port::get)).collect();
    assert_eq!(ports, [Some(30_080), None, None], "S9");
    assert_eq!(warnings, 4);
}

#[test]
fn external_policy_where_it_is_honoured() {
    let decode = |kind: &str, external_ips: Value, policy: &str| {
        let (service, warnings) = service(
            json!({"clusterIP": "10.96.0.1", "type": kind, "externalIPs": external_ips,
            "externalTrafficPolicy": policy, "healthCheckNodePort": 30_999}),
        );
        assert!(warnings.is_empty());
        let service = service.unwrap();
        (service.external_local, service.health_check_port.map(Port::get))
    };
    assert_eq!(
        decode("LoadBalancer", json!([]), "Local"),
        (true, Some(30_999)),
        "S51, S156"
    );
    assert_eq!(decode("LoadBalancer", json!([]), "Cluster"), (false, None), "S156");
    assert_eq!(decode("NodePort", json!([]), "Local"), (true, None), "S51, S156");
    assert_eq!(decode("ClusterIP", json!([]), "Local"), (false, None), "S51");
    assert_eq!(
        decode("ClusterIP", json!(["203.0.113.1"]), "Local"),
        (true, None),
        "S51"
    );
}

#[test]
fn external_ips_can_be_switched_off() {
    let spec = json!({"clusterIP": "10.96.0.1", "externalIPs": ["203.0.113.1"], "externalTrafficPolicy": "Local"});
    let decoded: objects::Service = serde_json::from_value(json!({"spec": spec})).unwrap();
    for allowed in [true, false] {
        let mut converter = Converter::new("node-a").with_external_ips(allowed);
        let service = converter.service(&object("web"), &decoded).unwrap();
        assert_eq!(service.external_ips.len(), usize::from(allowed), "S100");
        assert_eq!(
            service.external_local, allowed,
            "S51: not reachable from outside any more"
        );
    }
}
