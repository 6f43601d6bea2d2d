//! One set of series per service port, from what the programs counted. A service port appears with the first packet that dials it on
//! this node, and goes with the Service: a node's series are those of the services it uses, not those of the cluster.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use proxy_common::counters::{Counters, DIRECTIONS, DropClass};

use crate::datapath::ServiceStats;

/// The numbers as they were last read.
#[derive(Clone, Debug, Default)]
pub(super) struct Services(Arc<Mutex<Vec<ServiceStats>>>);

/// What is shown of a service port under one name: values with the label that tells them apart.
type Values = Vec<(Option<(&'static str, &'static str)>, u64)>;
/// Name, help, values.
type Series = (&'static str, &'static str, fn(&Counters) -> Values);

const SERIES: [Series; 5] = [
    (
        "service_connections",
        "Connections opened to a service port, UDP flows begun",
        |counters| vec![(None, counters.connections.iter().sum())],
    ),
    (
        "service_packets",
        "Packets translated for a service port; not those of connections translated at the socket",
        |counters| by("direction", DIRECTIONS, &counters.packets),
    ),
    (
        "service_bytes",
        "Bytes of these packets from the IP header on",
        |counters| by("direction", DIRECTIONS, &counters.bytes),
    ),
    (
        "service_refused",
        "Connections answered with an error because the service port has no usable endpoint",
        |counters| vec![(None, counters.refused.iter().sum())],
    ),
    ("service_dropped", "Packets to a service port dropped", |counters| {
        by("reason", DropClass::ALL.map(DropClass::name), &counters.dropped)
    }),
];

fn by<const N: usize>(label: &'static str, names: [&'static str; N], values: &[u64; N]) -> Values {
    names
        .into_iter()
        .zip(values)
        .map(|(name, value)| (Some((label, name)), *value))
        .collect()
}

impl Services {
    pub(super) fn set(&self, services: Vec<ServiceStats>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = services;
    }
}

impl Collector for Services {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let services = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if services.is_empty() {
            return Ok(());
        }
        for (name, help, values) in SERIES {
            let metric_type = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, metric_type)?;
            for service in services.iter() {
                let protocol = service.name.protocol.to_string();
                for (label, value) in values(&service.counters) {
                    let mut labels = vec![
                        ("namespace", service.name.namespace.as_str()),
                        ("service", service.name.name.as_str()),
                        ("port", service.name.port.as_str()),
                        ("protocol", protocol.as_str()),
                    ];
                    labels.extend(label);
                    ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}
