//! EndpointSlices made to hurt, written as JSON as an API server or a file would have them.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::model::fixtures::object;

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
