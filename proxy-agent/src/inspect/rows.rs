//! From map entries to rows. Names come from `SERVICES`; an id that it does not hold is shown as a number.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::backend::{BACKEND_LOCAL, BACKEND_TERMINATING};
use proxy_common::clock;
use proxy_common::frontend::{
    FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED,
    FrontendKey, Origin,
};
use proxy_common::rewrite::{
    HOOK_EGRESS, HOOK_INGRESS, KIND_REQUEST, REWRITE_MASQUERADED, Rewrite, RewriteKey, STATE_FIN, STATE_RST, STATE_SEEN,
};
use serde::Serialize;

use crate::datapath::tables::{BpfTables, FamilyTables, Tables};
use crate::datapath::{TableError, name_of, sys};
use crate::plan::ServicePortName;

/// A service port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port.
    pub port_name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Number of the service port in the maps.
    pub id: u32,
    /// What clients dial.
    pub frontends: Vec<FrontendRow>,
}

/// An address and port that clients dial.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRow {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// `ClusterIP`, `NodePort` (on every address of the node that serves them), `External` (a load-balancer address or an
    /// externalIP), or `Undefined` (refuses every other port of the address, S77).
    pub kind: String,
    /// The traffic policy for this kind of address is Local (S57, S87).
    pub local: bool,
    /// Only clients in the Service's source ranges may connect (S101).
    pub source_ranges: bool,
    /// Some endpoint is usable somewhere (S55).
    pub has_endpoints: bool,
    /// Endpoints that new connections may go to.
    pub endpoints: u32,
    /// Endpoints that only running UDP flows stay with (S145).
    pub kept: u32,
    /// Session affinity timeout, 0 for none.
    pub affinity_seconds: u32,
    /// Number of the endpoints' version.
    pub generation: u32,
}

/// An endpoint of a service port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRow {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port.
    pub port_name: String,
    /// Protocol.
    pub protocol: String,
    /// `cluster` (S52) or `local` (S53).
    pub set: String,
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port of the endpoint.
    pub port: u16,
    /// `selectable`, or `kept` for running UDP flows only.
    pub state: String,
    /// It runs on this node.
    pub local: bool,
    /// It terminates.
    pub terminating: bool,
}

/// A connection.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    /// Protocol.
    pub protocol: String,
    /// Who dialled.
    pub client: SocketAddr,
    /// What was dialled.
    pub frontend: SocketAddr,
    /// Where the packets go.
    pub backend: SocketAddr,
    /// The source that the backend sees, if it is not the client's.
    pub masquerade: Option<SocketAddr>,
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port.
    pub port_name: String,
    /// `pod` if the client is behind an interface, `node` if it is this node itself.
    pub origin: String,
    /// `unanswered`, `established`, `closing` (one side has) or `closed`.
    pub state: String,
    /// Seconds since the last packet in either direction, to about a second.
    pub idle_seconds: u32,
}

/// Service ports by id.
pub(super) struct Names(pub(super) HashMap<u32, ServicePortName>);

impl Names {
    pub(super) fn read(tables: &BpfTables) -> Result<Self, TableError> {
        let services = Tables::services(tables)?;
        Ok(Self(
            services
                .into_iter()
                .filter_map(|(id, info)| Some((id, name_of(&info)?)))
                .collect(),
        ))
    }

    /// The service port, as logs name it.
    pub(super) fn show(&self, id: u32) -> String {
        self.0.get(&id).map_or_else(|| format!("#{id}"), ToString::to_string)
    }

    /// Namespace, name, port name.
    pub(super) fn get(&self, id: u32) -> (String, String, String) {
        match self.0.get(&id) {
            Some(name) => (name.namespace.clone(), name.name.clone(), name.port.clone()),
            None => (String::new(), format!("#{id}"), String::new()),
        }
    }
}

pub(super) fn protocol(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}

pub(super) fn socket<A: Address>(addr: A, port: Port) -> SocketAddr {
    SocketAddr::new(addr.into(), port.get())
}

pub(super) fn services(tables: &BpfTables) -> Result<Vec<ServiceRow>, TableError> {
    let names = Names::read(tables)?;
    let mut rows: BTreeMap<u32, ServiceRow> = names
        .0
        .iter()
        .map(|(id, name)| {
            let row = ServiceRow {
                namespace: name.namespace.clone(),
                name: name.name.clone(),
                port_name: name.port.clone(),
                protocol: name.protocol.to_string(),
                id: *id,
                frontends: Vec::new(),
            };
            (*id, row)
        })
        .collect();
    add_frontends::<Addr4>(tables, &names, &mut rows)?;
    add_frontends::<Addr6>(tables, &names, &mut rows)?;
    let mut rows: Vec<_> = rows.into_values().collect();
    for row in &mut rows {
        row.frontends.sort();
    }
    rows.sort();
    Ok(rows)
}

fn add_frontends<A: Address>(
    tables: &BpfTables,
    names: &Names,
    rows: &mut BTreeMap<u32, ServiceRow>,
) -> Result<(), TableError>
where
    BpfTables: FamilyTables<A>,
{
    for (key, frontend) in FamilyTables::<A>::frontends(tables)? {
        let row = rows.entry(frontend.service).or_insert_with(|| {
            let (namespace, name, port_name) = names.get(frontend.service);
            ServiceRow {
                namespace,
                name,
                port_name,
                protocol: protocol(key.protocol),
                id: frontend.service,
                frontends: Vec::new(),
            }
        });
        let has = |flag| frontend.flags & flag != 0;
        row.frontends.push(FrontendRow {
            address: key.addr.into(),
            port: key.port.get(),
            kind: kind(&key, frontend.flags).to_owned(),
            local: has(FRONTEND_LOCAL),
            source_ranges: has(FRONTEND_SOURCE_RANGES),
            has_endpoints: has(FRONTEND_HAS_ENDPOINTS),
            endpoints: frontend.range(Origin::External).count,
            kept: frontend.range(Origin::External).keep,
            affinity_seconds: frontend.affinity_seconds,
            generation: frontend.generation,
        });
    }
    Ok(())
}

fn kind<A: Address>(key: &FrontendKey<A>, flags: u32) -> &'static str {
    if flags & FRONTEND_UNDEFINED != 0 {
        "Undefined"
    } else if flags & FRONTEND_CLUSTER_IP != 0 {
        "ClusterIP"
    } else if key.addr == A::zeroed() {
        "NodePort"
    } else {
        "External"
    }
}

pub(super) fn backends(tables: &BpfTables) -> Result<Vec<BackendRow>, TableError> {
    let names = Names::read(tables)?;
    // Frontends of a service share their ranges; a set shows every endpoint once.
    let mut rows = BTreeSet::new();
    add_backends::<Addr4>(tables, &names, &mut rows)?;
    add_backends::<Addr6>(tables, &names, &mut rows)?;
    Ok(rows.into_iter().collect())
}

fn add_backends<A: Address>(
    tables: &BpfTables,
    names: &Names,
    rows: &mut BTreeSet<BackendRow>,
) -> Result<(), TableError>
where
    BpfTables: FamilyTables<A>,
{
    let mut seen = BTreeSet::new();
    for (key, frontend) in FamilyTables::<A>::frontends(tables)? {
        for (set, range) in [("cluster", frontend.cluster), ("local", frontend.local)] {
            if !seen.insert((frontend.service, set, range.first, range.count, range.keep)) {
                continue;
            }
            let slots = FamilyTables::<A>::backends(tables, range.first, range.count.saturating_add(range.keep))?;
            for (slot, backend) in (0u32..).zip(slots) {
                let (namespace, service, port_name) = names.get(frontend.service);
                rows.insert(BackendRow {
                    namespace,
                    service,
                    port_name,
                    protocol: protocol(key.protocol),
                    set: set.to_owned(),
                    address: backend.addr.into(),
                    port: backend.port.get(),
                    state: if slot < range.count { "selectable" } else { "kept" }.to_owned(),
                    local: backend.flags & BACKEND_LOCAL != 0,
                    terminating: backend.flags & BACKEND_TERMINATING != 0,
                });
            }
        }
    }
    Ok(())
}

pub(super) fn connections(tables: &BpfTables) -> Result<Vec<ConnectionRow>, TableError> {
    let names = Names::read(tables)?;
    let now = clock::ticks(sys::coarse_clock());
    let mut rows = join(&tables.v4.rewrites.all()?, &names, now);
    rows.extend(join(&tables.v6.rewrites.all()?, &names, now));
    rows.sort();
    Ok(rows)
}

/// One row per request entry; the other entries of the connection are found by their keys.
fn join<A: Address>(entries: &[(RewriteKey<A>, Rewrite<A>)], names: &Names, now: u32) -> Vec<ConnectionRow> {
    let by_key: HashMap<RewriteKey<A>, Rewrite<A>> = entries.iter().copied().collect();
    by_key
        .iter()
        .filter(|(_, rewrite)| rewrite.kind == KIND_REQUEST)
        .map(|(key, request)| {
            let reply = by_key.get(&key.partner(request));
            let outward = RewriteKey::new(
                request.src,
                request.src_port,
                request.dst,
                request.dst_port,
                key.protocol,
                HOOK_EGRESS,
            );
            let masquerade = (request.flags & REWRITE_MASQUERADED != 0)
                .then(|| by_key.get(&outward))
                .flatten()
                .map(|outward| socket(outward.src, outward.src_port));
            let (namespace, service, port_name) = names.get(request.service);
            let last_seen = request.last_seen.max(reply.map_or(0, |reply| reply.last_seen));
            let idle = u64::from(clock::elapsed(last_seen, now)) << 30;
            ConnectionRow {
                protocol: protocol(key.protocol),
                client: socket(key.src, key.src_port),
                frontend: socket(key.dst, key.dst_port),
                backend: socket(request.dst, request.dst_port),
                masquerade,
                namespace,
                service,
                port_name,
                origin: if key.hook == HOOK_INGRESS { "pod" } else { "node" }.to_owned(),
                state: state(request.state, reply.map_or(0, |reply| reply.state)).to_owned(),
                idle_seconds: (idle / 1_000_000_000) as u32,
            }
        })
        .collect()
}

fn state(request: u32, reply: u32) -> &'static str {
    let (both, either) = (request & reply, request | reply);
    if either & STATE_RST != 0 || both & STATE_FIN != 0 {
        "closed"
    } else if reply & STATE_SEEN == 0 {
        "unanswered"
    } else if either & STATE_FIN != 0 {
        "closing"
    } else {
        "established"
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::rewrite::{KIND_MASQUERADE, KIND_REPLY, KIND_UNMASQUERADE, Meta};

    use super::*;

    #[test]
    fn the_entries_of_a_connection_become_one_row() {
        let addr = |last| Addr4([10, 0, 0, last]);
        let (client, vip, backend, node) = (addr(1), addr(2), addr(3), addr(4));
        let (port, http) = (Port::new(4_000), Port::new(80));
        let entry = |mut rewrite: Rewrite<Addr4>, kind| {
            rewrite.kind = kind;
            rewrite.state = STATE_SEEN;
            rewrite.flags = REWRITE_MASQUERADED;
            rewrite.service = 7;
            rewrite.last_seen = 90;
            rewrite
        };
        let key = RewriteKey::new(client, port, vip, http, 6, HOOK_INGRESS);
        let request = entry(
            key.rewrite_to(client, port, backend, http, Meta::default()),
            KIND_REQUEST,
        );
        let back_key = key.partner(&request);
        let reply = entry(
            back_key.rewrite_to(vip, http, client, port, Meta::default()),
            KIND_REPLY,
        );
        let out_key = RewriteKey::new(client, port, backend, http, 6, HOOK_EGRESS);
        let out = entry(
            out_key.rewrite_to(node, Port::new(61_000), backend, http, Meta::default()),
            KIND_MASQUERADE,
        );
        let in_key = out_key.partner(&out);
        let inward = entry(
            in_key.rewrite_to(backend, http, client, port, Meta::default()),
            KIND_UNMASQUERADE,
        );
        let entries = [(in_key, inward), (key, request), (out_key, out), (back_key, reply)];
        let rows = join(&entries, &Names(HashMap::new()), 100);
        assert_eq!(
            rows,
            [ConnectionRow {
                protocol: "TCP".to_owned(),
                client: "10.0.0.1:4000".parse().unwrap(),
                frontend: "10.0.0.2:80".parse().unwrap(),
                backend: "10.0.0.3:80".parse().unwrap(),
                masquerade: Some("10.0.0.4:61000".parse().unwrap()),
                namespace: String::new(),
                service: "#7".to_owned(),
                port_name: String::new(),
                origin: "pod".to_owned(),
                state: "established".to_owned(),
                idle_seconds: 10,
            }]
        );
    }

    #[test]
    fn states_are_told_apart() {
        assert_eq!(state(STATE_SEEN, 0), "unanswered");
        assert_eq!(state(STATE_SEEN, STATE_SEEN), "established");
        assert_eq!(state(STATE_SEEN | STATE_FIN, STATE_SEEN), "closing");
        assert_eq!(state(STATE_FIN, STATE_SEEN | STATE_FIN), "closed");
        assert_eq!(state(STATE_RST, 0), "closed");
    }
}
