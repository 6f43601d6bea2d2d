//! `top`: what happens between two looks at the maps. Services from `COUNTERS`; backends from the rewrite table, which knows the
//! connections behind each, but not their packets, and none of those translated at the socket.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use proxy_common::addr::Address;
use proxy_common::clock;
use proxy_common::counters::{Counters, TO_BACKEND, TO_CLIENT};
use proxy_common::rewrite::{KIND_REQUEST, Rewrite, RewriteKey};
use serde::Serialize;

use super::rows::{Names, protocol, socket};
use super::{Filter, InspectError, Output, output};
use crate::datapath::sys;
use crate::datapath::tables::BpfTables;

/// What services are ordered by, the highest rate first; all but the name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Sort {
    #[default]
    Bytes,
    Packets,
    Connections,
    Refused,
    Dropped,
    Name,
}

/// What is shown and how.
#[derive(Clone, Debug, Default)]
pub struct TopOptions {
    /// Which services.
    pub filter: Filter,
    /// In which order.
    pub sort: Sort,
    /// Rows of each table.
    pub rows: usize,
    /// How.
    pub output: Output,
}

/// The rates of a service port.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRate {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port.
    pub port_name: String,
    /// Protocol.
    pub protocol: String,
    /// Connections opened and UDP flows begun.
    pub connections_per_second: f64,
    /// Packets of clients.
    pub request_packets_per_second: f64,
    /// Packets of backends.
    pub reply_packets_per_second: f64,
    /// Bytes of clients.
    pub request_bytes_per_second: f64,
    /// Bytes of backends.
    pub reply_bytes_per_second: f64,
    /// Connections answered with an error.
    pub refused_per_second: f64,
    /// Packets dropped.
    pub dropped_per_second: f64,
    /// All connections since the service port has its number.
    pub connections: u64,
    /// All packets, both directions.
    pub packets: u64,
    /// All bytes, both directions.
    pub bytes: u64,
}

impl ServiceRate {
    /// Both directions.
    pub fn packets_per_second(&self) -> f64 {
        self.request_packets_per_second + self.reply_packets_per_second
    }

    /// Both directions.
    pub fn bytes_per_second(&self) -> f64 {
        self.request_bytes_per_second + self.reply_bytes_per_second
    }

    fn new(names: &Names, id: u32, now: &Counters, before: &Counters, seconds: f64) -> Self {
        let (namespace, service, port_name) = names.get(id);
        let change = now.since(before);
        let rate = |count: u64| count as f64 / seconds;
        Self {
            namespace,
            service,
            port_name,
            protocol: names
                .0
                .get(&id)
                .map(|name| name.protocol.to_string())
                .unwrap_or_default(),
            connections_per_second: rate(change.connections.iter().sum()),
            request_packets_per_second: rate(change.packets[TO_BACKEND]),
            reply_packets_per_second: rate(change.packets[TO_CLIENT]),
            request_bytes_per_second: rate(change.bytes[TO_BACKEND]),
            reply_bytes_per_second: rate(change.bytes[TO_CLIENT]),
            refused_per_second: rate(change.refused.iter().sum()),
            dropped_per_second: rate(change.dropped.iter().sum()),
            connections: now.connections.iter().sum(),
            packets: now.packets.iter().sum(),
            bytes: now.bytes.iter().sum(),
        }
    }

    fn key(&self, sort: Sort) -> f64 {
        match sort {
            Sort::Bytes => self.bytes_per_second(),
            Sort::Packets => self.packets_per_second(),
            Sort::Connections => self.connections_per_second,
            Sort::Refused => self.refused_per_second,
            Sort::Dropped => self.dropped_per_second,
            Sort::Name => 0.0,
        }
    }
}

/// The connections of a backend that the packet programs translate.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRate {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port.
    pub port_name: String,
    /// Protocol.
    pub protocol: String,
    /// Address and port.
    pub address: SocketAddr,
    /// Connections that were not there at the last look.
    pub new_per_second: f64,
    /// Connections with a request since the last look, to about a second.
    pub active: u64,
    /// Connections in the rewrite table, silent and closed ones included until they are collected.
    pub known: u64,
}

/// Client, what it dialled, protocol and hook; where it goes.
type Connections = HashMap<(SocketAddr, SocketAddr, u8, u8), Connection>;

#[derive(Clone, Copy)]
struct Connection {
    service: u32,
    backend: SocketAddr,
    last_seen: u32,
}

/// One look at the maps.
struct Sample {
    taken: Instant,
    tick: u32,
    counters: Vec<Counters>,
    connections: Connections,
}

/// Looks at the maps, and at what changed since the look before.
pub struct Top {
    tables: BpfTables,
    options: TopOptions,
    before: Sample,
}

impl std::fmt::Debug for Top {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Top")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct Tables {
    seconds: f64,
    services: Vec<ServiceRate>,
    backends: Vec<BackendRate>,
}

impl Top {
    /// Opens the maps and takes the first look.
    pub fn open(bpf_dir: &Path, options: TopOptions) -> Result<Self, InspectError> {
        let tables = super::open(bpf_dir)?;
        let before = sample(&tables, &Names::read(&tables)?)?;
        Ok(Self {
            tables,
            options,
            before,
        })
    }

    /// What happened since the last look.
    pub fn look(&mut self) -> Result<String, InspectError> {
        let names = Names::read(&self.tables)?;
        let now = sample(&self.tables, &names)?;
        let shown = Tables {
            seconds: now.taken.duration_since(self.before.taken).as_secs_f64(),
            services: services(&names, &now, &self.before, &self.options),
            backends: backends(&names, &now, &self.before, &self.options),
        };
        self.before = now;
        match self.options.output {
            Output::Json | Output::Yaml => output::serialize(&shown, self.options.output),
            Output::Table | Output::Wide => Ok(format!(
                "{}\n{}",
                output::render(&shown.services, self.options.output)?,
                output::render(&shown.backends, self.options.output)?
            )),
        }
    }
}

fn sample(tables: &BpfTables, names: &Names) -> Result<Sample, InspectError> {
    let below = names.0.keys().max().map_or(0, |id| id.saturating_add(1));
    let mut connections = Connections::new();
    connections.extend(tables.v4.rewrites.all()?.iter().filter_map(connection));
    connections.extend(tables.v6.rewrites.all()?.iter().filter_map(connection));
    Ok(Sample {
        taken: Instant::now(),
        tick: clock::ticks(sys::coarse_clock()),
        counters: tables.counters.read(below)?,
        connections,
    })
}

fn connection<A: Address>(
    (key, rewrite): &(RewriteKey<A>, Rewrite<A>),
) -> Option<((SocketAddr, SocketAddr, u8, u8), Connection)> {
    // Service 0 is no service's: an entry of the node's own connection that gave way to another.
    if rewrite.kind != KIND_REQUEST || rewrite.service == 0 {
        return None;
    }
    let client = socket(key.src, key.src_port);
    let connection = Connection {
        service: rewrite.service,
        backend: socket(rewrite.dst, rewrite.dst_port),
        last_seen: rewrite.last_seen,
    };
    Some((
        (client, socket(key.dst, key.dst_port), key.protocol, key.hook),
        connection,
    ))
}

fn services(names: &Names, now: &Sample, before: &Sample, options: &TopOptions) -> Vec<ServiceRate> {
    let seconds = now.taken.duration_since(before.taken).as_secs_f64();
    let mut rows: Vec<ServiceRate> = names
        .0
        .keys()
        .filter_map(|id| {
            let counted = now.counters.get(*id as usize)?;
            let nothing = Counters::default();
            let counted_before = before.counters.get(*id as usize).unwrap_or(&nothing);
            Some(ServiceRate::new(names, *id, counted, counted_before, seconds))
        })
        .filter(|row| options.filter.accepts(&row.namespace, &row.service, &row.protocol))
        .collect();
    let name = |row: &ServiceRate| {
        let ServiceRate {
            namespace,
            service,
            port_name,
            protocol,
            ..
        } = row;
        (namespace.clone(), service.clone(), port_name.clone(), protocol.clone())
    };
    rows.sort_by_cached_key(name);
    rows.sort_by(|a, b| b.key(options.sort).total_cmp(&a.key(options.sort)));
    rows.truncate(options.rows);
    rows
}

fn backends(names: &Names, now: &Sample, before: &Sample, options: &TopOptions) -> Vec<BackendRate> {
    let seconds = now.taken.duration_since(before.taken).as_secs_f64();
    // New, active, known.
    let mut counts: BTreeMap<(u32, u8, SocketAddr), [u64; 3]> = BTreeMap::new();
    for (key, connection) in &now.connections {
        let [new, active, known] = counts
            .entry((connection.service, key.2, connection.backend))
            .or_default();
        let old = before.connections.get(key);
        *new += u64::from(old.is_none_or(|old| old.backend != connection.backend));
        *active += u64::from(connection.last_seen >= before.tick);
        *known += 1;
    }
    let mut rows: Vec<BackendRate> = counts
        .into_iter()
        .map(|((id, number, address), [new, active, known])| {
            let (namespace, service, port_name) = names.get(id);
            BackendRate {
                namespace,
                service,
                port_name,
                protocol: protocol(number),
                address,
                new_per_second: new as f64 / seconds,
                active,
                known,
            }
        })
        .filter(|row| options.filter.accepts(&row.namespace, &row.service, &row.protocol))
        .collect();
    rows.sort_by(|a, b| {
        let key = |row: &BackendRate| (row.active, row.known);
        b.new_per_second
            .total_cmp(&a.new_per_second)
            .then_with(|| key(b).cmp(&key(a)))
    });
    rows.truncate(options.rows);
    rows
}
