//! Services, EndpointSlices, Nodes and ServiceCIDRs as the API writes them, cut down to the fields that matter. `kube` decodes straight into these,
//! so nothing else of an object is ever held. Every field is lenient: decoding succeeds for any JSON object.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::{ClusterResourceScope, Metadata, NamespaceResourceScope, Resource};
use serde::{Deserialize, Deserializer};

use super::lenient::{Field, lenient_struct};

/// A list of lenient items.
pub type List<T> = Field<Vec<Field<T>>>;

/// Declares a top-level object: its metadata, decoded leniently, and its other fields.
macro_rules! object {
    ($(#[$doc:meta])* $name:ident, $version:literal, $group:literal, $scope:ty, $plural:literal, { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        pub struct $name {
            /// Name, namespace, labels, annotations and times; nothing else of the metadata.
            #[serde(deserialize_with = "slim_metadata")]
            pub metadata: ObjectMeta,
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Resource for $name {
            const API_VERSION: &'static str = $version;
            const GROUP: &'static str = $group;
            const KIND: &'static str = stringify!($name);
            const VERSION: &'static str = "v1";
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = $scope;
        }

        impl Metadata for $name {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

object!(
    /// `v1 Service`.
    Service, "v1", "", NamespaceResourceScope, "services", {
        /// What is wanted.
        spec: Field<ServiceSpec>,
        /// Only what the load balancer says.
        status: Field<ServiceStatus>,
    }
);

object!(
    /// `discovery.k8s.io/v1 EndpointSlice`.
    EndpointSlice, "discovery.k8s.io/v1", "discovery.k8s.io", NamespaceResourceScope, "endpointslices", {
        /// `IPv4`, `IPv6` or `FQDN`.
        address_type: Field<String>,
        /// Ports of all endpoints.
        ports: List<EndpointPort>,
        /// The endpoints.
        endpoints: List<Endpoint>,
    }
);

object!(
    /// `v1 Node`.
    Node, "v1", "", ClusterResourceScope, "nodes", {
        /// Only its taints and the addresses of its pods.
        spec: Field<NodeSpec>,
        /// Only its addresses.
        status: Field<NodeStatus>,
    }
);

object!(
    /// `networking.k8s.io/v1 ServiceCIDR`.
    ServiceCIDR, "networking.k8s.io/v1", "networking.k8s.io", ClusterResourceScope, "servicecidrs", {
        /// What is wanted.
        spec: Field<ServiceCidrSpec>,
    }
);

/// Declares a part of an object.
macro_rules! part {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }
        lenient_struct!($name);
    };
}

part!(
    /// Spec of a Service.
    ServiceSpec {
        /// `spec.type`.
        r#type: Field<String>,
        /// `spec.clusterIP`.
        #[serde(rename = "clusterIP")]
        cluster_ip: Field<String>,
        /// `spec.clusterIPs`.
        #[serde(rename = "clusterIPs")]
        cluster_ips: List<String>,
        /// `spec.ipFamilies`.
        ip_families: List<String>,
        /// `spec.ports`.
        ports: List<ServicePort>,
        /// `spec.externalIPs`.
        #[serde(rename = "externalIPs")]
        external_ips: List<String>,
        /// `spec.loadBalancerSourceRanges`.
        load_balancer_source_ranges: List<String>,
        /// `spec.internalTrafficPolicy`.
        internal_traffic_policy: Field<String>,
        /// `spec.externalTrafficPolicy`.
        external_traffic_policy: Field<String>,
        /// `spec.healthCheckNodePort`.
        health_check_node_port: Field<i64>,
        /// `spec.sessionAffinity`.
        session_affinity: Field<String>,
        /// `spec.sessionAffinityConfig`.
        session_affinity_config: Field<SessionAffinityConfig>,
    }
);

part!(
    /// A port of a Service.
    ServicePort {
        /// Name.
        name: Field<String>,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: Field<String>,
        /// Number.
        port: Field<i64>,
        /// Number on the node's own addresses.
        node_port: Field<i64>,
    }
);

part!(
    /// Status of a Service.
    ServiceStatus {
        /// `status.loadBalancer`.
        load_balancer: Field<LoadBalancerStatus>,
    }
);

part!(
    /// `status.loadBalancer`.
    LoadBalancerStatus {
        /// `status.loadBalancer.ingress`.
        ingress: List<Ingress>,
    }
);

part!(
    /// A point of entry of a load balancer.
    Ingress {
        /// Address; absent if it has only a host name.
        ip: Field<String>,
        /// `VIP` or `Proxy`.
        ip_mode: Field<String>,
    }
);

part!(
    /// `spec.sessionAffinityConfig`.
    SessionAffinityConfig {
        /// `spec.sessionAffinityConfig.clientIP`.
        #[serde(rename = "clientIP")]
        client_ip: Field<ClientIpConfig>,
    }
);

part!(
    /// `spec.sessionAffinityConfig.clientIP`.
    ClientIpConfig {
        /// Seconds.
        timeout_seconds: Field<i64>,
    }
);

part!(
    /// A port of an EndpointSlice.
    EndpointPort {
        /// Name.
        name: Field<String>,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: Field<String>,
        /// Number.
        port: Field<i64>,
    }
);

part!(
    /// An endpoint.
    Endpoint {
        /// Addresses, of which the first counts (S22).
        addresses: List<String>,
        /// Conditions.
        conditions: Field<Conditions>,
        /// Name of its node.
        node_name: Field<String>,
        /// Topology hints.
        hints: Field<Hints>,
    }
);

part!(
    /// Conditions of an endpoint.
    Conditions {
        /// Absent means true.
        ready: Field<bool>,
        /// Absent means true.
        serving: Field<bool>,
        /// Absent means false.
        terminating: Field<bool>,
    }
);

part!(
    /// Topology hints of an endpoint.
    Hints {
        /// Zones that should use it.
        for_zones: List<NamedHint>,
        /// Nodes that should use it.
        for_nodes: List<NamedHint>,
    }
);

part!(
    /// A zone or node by name.
    NamedHint {
        /// Its name.
        name: Field<String>,
    }
);

part!(
    /// Spec of a Node.
    NodeSpec {
        /// Taints.
        taints: List<Taint>,
        /// Addresses of its pods.
        #[serde(rename = "podCIDRs")]
        pod_cidrs: List<String>,
        /// The same, as it was written before there were two families.
        #[serde(rename = "podCIDR")]
        pod_cidr: Field<String>,
    }
);

part!(
    /// Status of a Node.
    NodeStatus {
        /// Addresses.
        addresses: List<NodeAddress>,
    }
);

part!(
    /// An address of a Node.
    NodeAddress {
        /// `InternalIP`, `ExternalIP` or something else.
        r#type: Field<String>,
        /// The address.
        address: Field<String>,
    }
);

part!(
    /// A taint of a Node.
    Taint {
        /// Key.
        key: Field<String>,
    }
);

part!(
    /// Spec of a ServiceCIDR.
    ServiceCidrSpec {
        /// One prefix, or one of each family.
        cidrs: List<String>,
    }
);

part!(
    /// The metadata that is kept.
    SlimMetadata {
        /// Name.
        name: Field<String>,
        /// Namespace.
        namespace: Field<String>,
        /// Version, which the watch needs.
        resource_version: Field<String>,
        /// Labels.
        labels: Field<BTreeMap<String, Field<String>>>,
        /// Annotations.
        annotations: Field<BTreeMap<String, Field<String>>>,
        /// When the object was made.
        creation_timestamp: Field<String>,
        /// When its deletion was asked for.
        deletion_timestamp: Field<String>,
    }
);

/// The one annotation that is read: when the change was made that led to a version of a slice (S188).
pub const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

fn slim_metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let slim = Field::<SlimMetadata>::deserialize(deserializer)?
        .into_given()
        .unwrap_or_default();
    let time = |field: Field<String>| field.given().and_then(|text| text.parse::<Timestamp>().ok()).map(Time);
    let texts = |field: Field<BTreeMap<String, Field<String>>>, keep: fn(&str) -> bool| {
        let entries = field.into_given()?.into_iter().filter(|(key, _)| keep(key));
        // Some rules ask only whether a label is there (S1, S2), so one with an odd value stays, as an empty one.
        Some(
            entries
                .map(|(key, value)| (key, value.into_given().unwrap_or_default()))
                .collect(),
        )
    };
    Ok(ObjectMeta {
        name: slim.name.into_given(),
        namespace: slim.namespace.into_given(),
        resource_version: slim.resource_version.into_given(),
        labels: texts(slim.labels, |_| true),
        annotations: texts(slim.annotations, |key| key == TRIGGER_TIME_ANNOTATION),
        creation_timestamp: time(slim.creation_timestamp),
        deletion_timestamp: time(slim.deletion_timestamp),
        ..ObjectMeta::default()
    })
}
