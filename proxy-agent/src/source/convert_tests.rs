//! Objects made to hurt, written as JSON as an API server or a file would have them.

use std::time::Duration;

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

fn slice(value: Value) -> (Option<EndpointSlice>, Vec<String>) {
    let mut whole = json!({"metadata": {"name": "a", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4"});
    for (key, part) in value.as_object().unwrap() {
        whole[key] = part.clone();
    }
    let decoded: objects::EndpointSlice = serde_json::from_value(whole).unwrap();
    let mut converter = Converter::new("node-a");
    let slice = converter.slice(&object("a"), &decoded);
    (
        slice,
        converter.take_warnings().iter().map(ToString::to_string).collect(),
    )
}

fn endpoints(list: Value) -> (Vec<(String, u8)>, usize) {
    let (slice, warnings) = slice(json!({"endpoints": list}));
    let SliceEndpoints::V4(endpoints) = slice.unwrap().endpoints else {
        panic!("of the wrong family")
    };
    (
        endpoints.iter().map(|e| (e.addr.to_string(), e.flags)).collect(),
        warnings.len(),
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
fn slices_to_ignore() {
    for (part, warnings) in [
        (json!({"addressType": "FQDN"}), 0),
        (json!({"addressType": "IPv5"}), 1),
        (json!({"addressType": null}), 1),
        (json!({"metadata": {"name": "a"}}), 1),
        (
            json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": ""}}}),
            1,
        ),
        (
            json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""}}}),
            0,
        ),
    ] {
        let (ignored, seen) = slice(part);
        assert_eq!((ignored, seen.len()), (None, warnings), "S3, S10, S21");
    }
}

#[test]
fn slice_ports_need_a_name_and_a_number() {
    let (slice, warnings) = slice(json!({"ports": [
        {"name": "", "port": 1}, {"port": 2}, {"name": null, "port": 3}, {"name": "a"}, {"name": "b", "port": 0},
        {"name": "c", "port": 4, "protocol": null}, {"name": "d", "port": 5, "protocol": "UDP"},
    ]}));
    let ports: Vec<_> = slice
        .unwrap()
        .ports
        .iter()
        .map(|p| format!("{}:{}/{}", p.name, p.port, p.protocol))
        .collect();
    assert_eq!(ports, [":1/TCP", "c:4/TCP", "d:5/UDP"], "S28, S29");
    assert_eq!(warnings.len(), 4);
}

#[test]
fn bad_endpoints_are_left_out() {
    let (found, warnings) = endpoints(json!([
        {"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": []}, {}, {"addresses": ["fd00::1"]}, {"addresses": ["nonsense"]},
        {"addresses": [7]}, {"addresses": "10.0.0.3"}, {"addresses": ["0.0.0.0"]}, 5, {"addresses": ["10.0.0.04"]},
    ]));
    let names: Vec<_> = found.iter().map(|(addr, _)| addr.as_str()).collect();
    assert_eq!(names, ["10.0.0.1", "10.0.0.4"], "S20, S22, S23");
    assert_eq!(warnings, 8);
}

#[test]
fn conditions_have_defaults() {
    let ready = ENDPOINT_READY | ENDPOINT_SERVING;
    for (conditions, expected) in [
        (json!(null), ready),
        (json!({}), ready),
        (json!({"ready": null, "serving": null, "terminating": null}), ready),
        (json!({"ready": false}), ENDPOINT_SERVING),
        (
            json!({"ready": false, "serving": false, "terminating": true}),
            ENDPOINT_TERMINATING,
        ),
        (json!({"ready": "yes"}), ready),
        (json!("odd"), ready),
    ] {
        let (found, warnings) = endpoints(json!([{"addresses": ["10.0.0.1"], "conditions": conditions}]));
        assert_eq!(found, [("10.0.0.1".to_owned(), expected)], "S46 {conditions}");
        let is_odd = conditions == json!("odd") || conditions == json!({"ready": "yes"});
        assert_eq!(warnings, usize::from(is_odd), "{conditions}");
    }
}

#[test]
fn nodes_and_hints() {
    let ready = ENDPOINT_READY | ENDPOINT_SERVING;
    let (found, _) = endpoints(json!([
        {"addresses": ["10.0.0.1"], "nodeName": "node-a"},
        {"addresses": ["10.0.0.2"], "nodeName": "Node-a"},
        {"addresses": ["10.0.0.3"], "hints": {"forNodes": [{"name": "node-b"}]}},
        {"addresses": ["10.0.0.4"], "hints": {"forNodes": [{"name": "node-b"}, {"name": "node-a"}]}},
        {"addresses": ["10.0.0.5"], "hints": {"forNodes": []}},
    ]));
    let flags: Vec<u8> = found.iter().map(|(_, flags)| flags ^ ready).collect();
    assert_eq!(
        flags,
        [
            ENDPOINT_LOCAL,
            0,
            ENDPOINT_NODE_HINTED,
            ENDPOINT_NODE_HINTED | ENDPOINT_FOR_THIS_NODE,
            0
        ],
        "S44, S66"
    );

    let (slice, _) = slice(json!({"endpoints": [
        {"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "x"}, {"name": "y"}]}},
        {"addresses": ["10.0.0.2"], "hints": {"forZones": [{"name": "x"}, {"name": "y"}]}},
        {"addresses": ["10.0.0.3"], "hints": {"forZones": []}},
    ]}));
    let SliceEndpoints::V4(endpoints) = slice.unwrap().endpoints else {
        panic!("of the wrong family")
    };
    let zones: Vec<_> = endpoints.iter().map(|e| e.zones.as_ref()).collect();
    assert!(Arc::ptr_eq(zones[0].unwrap(), zones[1].unwrap()), "shared");
    assert_eq!(zones[2], None);
}

#[test]
fn the_own_node() {
    let node = |value: Value| Converter::new("node-a").node(&serde_json::from_value(value).unwrap());
    let zone = json!({"topology.kubernetes.io/zone": "x"});
    assert_eq!(
        node(json!({"metadata": {"name": "node-b", "labels": zone.clone()}})),
        None
    );
    let plain = node(json!({"metadata": {"name": "node-a", "labels": zone}})).unwrap();
    assert_eq!((plain.zone.as_deref(), plain.leaving), (Some("x"), false), "S70");
    let tainted = json!({"metadata": {"name": "node-a"}, "spec": {"taints": [{"key": "other"}, 5, {"key": "ToBeDeletedByClusterAutoscaler"}]}});
    assert!(node(tainted).unwrap().leaving, "S175");
    let deleted = json!({"metadata": {"name": "node-a", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
    assert!(node(deleted).unwrap().leaving, "S175");
}

#[test]
fn trigger_times() {
    let at = |text: &str| {
        let value = json!({"metadata": {"name": "a", "annotations": {TRIGGER_TIME_ANNOTATION: text, "other": "x"}}});
        let decoded: objects::EndpointSlice = serde_json::from_value(value).unwrap();
        assert_eq!(
            decoded.metadata.annotations.as_ref().unwrap().len(),
            1,
            "others are not kept"
        );
        trigger_time(&decoded.metadata)
    };
    assert_eq!(
        at("1970-01-01T00:00:10.5Z"),
        Some(SystemTime::UNIX_EPOCH + Duration::from_millis(10_500))
    );
    assert_eq!(at("yesterday"), None);
}

#[test]
fn any_json_object_decodes() {
    for value in [
        json!({"metadata": 5, "spec": [], "ports": {}, "endpoints": "x"}),
        json!({"metadata": {"name": [], "labels": [], "annotations": 3, "creationTimestamp": 4}, "spec": {"ports": {"a": []}}}),
        json!({"metadata": {"labels": {"a": null, "b": {"c": 1}}}, "endpoints": [[], {"addresses": {}, "hints": {"forZones": [{}]}}]}),
    ] {
        let decoded: objects::Service = serde_json::from_value(value.clone()).unwrap();
        Converter::new("n").service(&object("x"), &decoded);
        let decoded: objects::EndpointSlice = serde_json::from_value(value.clone()).unwrap();
        Converter::new("n").slice(&object("x"), &decoded);
        let decoded: objects::Node = serde_json::from_value(value).unwrap();
        Converter::new("n").node(&decoded);
    }
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
fn addresses_of_the_own_node() {
    let addresses = json!([{"type": "ExternalIP", "address": "198.51.100.1"}, {"type": "Hostname", "address": "node-a"},
        {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "192.0.2.2"}, 5,
        {"type": "ExternalIP", "address": "2001:db8::1"}]);
    let value = json!({"metadata": {"name": "node-a"}, "status": {"addresses": addresses}});
    let node = Converter::new("node-a")
        .node(&serde_json::from_value(value).unwrap())
        .unwrap();
    let ips: Vec<_> = node.ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["192.0.2.1", "2001:db8::1"], "S184");
}
