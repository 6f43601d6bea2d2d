//! The objects of a generated cluster, with everything that real ones carry (managed fields, target references, unique ids), since
//! whoever reads them has to skip it.
//!
//! Objects are text without `kind` and `apiVersion`, as they stand in a list.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

/// How many Services there are, and endpoints behind each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    /// Services, each with one port and one EndpointSlice.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
}

/// Port of every Service.
pub const PORT: u16 = 80;
/// Port of every endpoint.
pub const TARGET_PORT: u16 = 8080;
/// Endpoints are spread over as many nodes; none of them is the client's.
const NODES: u32 = 500;
const ZONES: [&str; 3] = ["zone-a", "zone-b", "zone-c"];
/// Version of the objects at first.
pub(super) const FIRST_VERSION: u64 = 1_000_000;
const CREATED: &str = "2026-01-01T00:00:00Z";

/// The cluster IP of a Service: in the `/16` of the tests' service network.
pub fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + service)
}

/// The address of an endpoint, which nobody has: in another part of 10.0.0.0/8 than the topology's pods.
pub fn endpoint_ip(size: Size, service: u32, endpoint: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 128, 0, 0)) + service * size.endpoints + endpoint)
}

/// Namespace and name of a Service.
pub fn name(service: u32) -> (String, String) {
    (format!("team-{}", service % 100), format!("service-{service}"))
}

fn uid(kind: u8, number: u32) -> String {
    format!("00000000-0000-4000-80{kind:02x}-{number:012x}")
}

fn metadata(kind: u8, number: u32, version: u64) -> Value {
    let (namespace, service) = name(number);
    json!({
        "name": service,
        "namespace": namespace,
        "uid": uid(kind, number),
        "resourceVersion": version.to_string(),
        "generation": 1,
        "creationTimestamp": CREATED,
        "labels": {"app": service, "app.kubernetes.io/managed-by": "Helm", "team": namespace},
    })
}

/// A Service.
pub(super) fn service(number: u32, version: u64) -> String {
    let (_, name) = name(number);
    let ip = cluster_ip(number);
    let mut metadata = metadata(1, number, version);
    metadata["annotations"] =
        json!({"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": metadata["namespace"]});
    metadata["managedFields"] = json!([{
        "manager": "helm", "operation": "Update", "apiVersion": "v1", "time": CREATED, "fieldsType": "FieldsV1",
        "fieldsV1": {
            "f:metadata": {
                "f:annotations": {".": {}, "f:meta.helm.sh/release-name": {}, "f:meta.helm.sh/release-namespace": {}},
                "f:labels": {".": {}, "f:app": {}, "f:app.kubernetes.io/managed-by": {}, "f:team": {}},
            },
            "f:spec": {
                "f:internalTrafficPolicy": {},
                "f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}},
                "f:selector": {}, "f:sessionAffinity": {}, "f:type": {},
            },
        },
    }]);
    json!({
        "metadata": metadata,
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": "http"}],
            "selector": {"app": name},
            "clusterIP": ip,
            "clusterIPs": [ip],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    })
    .to_string()
}

/// The EndpointSlice of a Service, with these endpoints.
pub(super) fn slice(number: u32, addresses: impl Iterator<Item = Ipv4Addr>, version: u64) -> String {
    let (namespace, service) = name(number);
    let mut metadata = metadata(2, number, version);
    metadata["name"] = json!(format!("{service}-x7k2p"));
    metadata["generateName"] = json!(format!("{service}-"));
    metadata["labels"]["kubernetes.io/service-name"] = json!(service);
    metadata["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("endpointslice-controller.k8s.io");
    metadata["ownerReferences"] = json!([{
        "apiVersion": "v1", "kind": "Service", "name": service, "uid": uid(1, number), "controller": true, "blockOwnerDeletion": true,
    }]);
    metadata["managedFields"] = json!([{
        "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "discovery.k8s.io/v1", "time": CREATED,
        "fieldsType": "FieldsV1",
        "fieldsV1": {
            "f:addressType": {}, "f:endpoints": {}, "f:ports": {},
            "f:metadata": {
                "f:generateName": {},
                "f:labels": {".": {}, "f:app": {}, "f:endpointslice.kubernetes.io/managed-by": {}, "f:kubernetes.io/service-name": {}, "f:team": {}},
                "f:ownerReferences": {".": {}, "k:{\"uid\":\"00000000-0000-4000-8001-000000000000\"}": {}},
            },
        },
    }]);
    let endpoint = |(index, ip): (usize, Ipv4Addr)| {
        let pod = ip.to_bits();
        json!({
            "addresses": [ip],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": format!("{service}-7d4b9c6f58-{index:05}"), "uid": uid(3, pod)},
            "nodeName": format!("worker-{:03}.example.internal", pod % NODES),
            "zone": ZONES[(pod % 3) as usize],
        })
    };
    json!({
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": addresses.enumerate().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
    })
    .to_string()
}

/// The Node of a client.
pub(super) fn node(name: &str, version: u64) -> String {
    json!({
        "metadata": {"name": name, "uid": uid(4, 1), "resourceVersion": version.to_string(), "creationTimestamp": CREATED,
            "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": ZONES[0]}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.56.11"}, {"type": "Hostname", "address": name}]},
    })
    .to_string()
}

/// The network of the cluster IPs.
pub(super) fn service_cidr(version: u64) -> String {
    json!({
        "metadata": {"name": "kubernetes", "uid": uid(5, 1), "resourceVersion": version.to_string(), "creationTimestamp": CREATED},
        "spec": {"cidrs": ["10.96.0.0/16"]},
        "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": CREATED, "reason": "", "message": ""}]},
    })
    .to_string()
}
