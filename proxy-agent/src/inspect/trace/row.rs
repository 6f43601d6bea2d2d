//! An event as a line: aligned columns, or a JSON object.

use std::collections::HashMap;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::{Addr6, Port};
use proxy_common::rewrite::HOOK_INGRESS;
use proxy_common::trace::{AT_SOCKET, EVENT_MASQUERADED, Event, reason_of};
use serde::Serialize;

use super::question::EventKind;
use super::wall_clock;
use crate::datapath::sys;
use crate::inspect::output::or_none;
use crate::inspect::rows::{Names, protocol};
use crate::inspect::{InspectError, Output};

/// Something that happened. What it does not have is `null`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceRow {
    /// When, as RFC 3339.
    pub time: String,
    /// `opened`, `socket`, `refused` or `dropped`.
    pub event: &'static str,
    /// Protocol.
    pub protocol: String,
    /// Who dialled; not known at the socket.
    pub client: Option<SocketAddr>,
    /// What was dialled.
    pub frontend: SocketAddr,
    /// Where it goes.
    pub backend: Option<SocketAddr>,
    /// What the backend sees as its client, if that is not the client.
    pub seen_as: Option<SocketAddr>,
    /// Is the client masqueraded?
    pub masqueraded: bool,
    /// Namespace of the Service.
    pub namespace: Option<String>,
    /// Name of the Service.
    pub service: Option<String>,
    /// Name of the port.
    pub port_name: Option<String>,
    /// Why it was refused or dropped, as `ebpf_proxy_refusals_total` names it.
    pub reason: Option<&'static str>,
    /// `ingress`, `egress` or `socket`.
    pub hook: &'static str,
    /// Interface of the packet.
    pub interface: Option<String>,
    /// Process at the socket.
    pub pid: Option<u32>,
    /// Its name.
    pub process: Option<String>,
}

/// Both clocks at one moment: events have the one, people the other.
pub(super) struct Clocks {
    monotonic: u64,
    wall: i128,
}

impl Clocks {
    pub(super) fn now() -> Self {
        Self {
            monotonic: sys::monotonic_clock(),
            wall: wall_clock(),
        }
    }

    fn show(&self, time: u64) -> String {
        let at = self.wall - (i128::from(self.monotonic) - i128::from(time));
        let at = Timestamp::from_nanosecond(at).unwrap_or_default();
        at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
    }
}

/// Names of interfaces, as far as they were needed.
#[derive(Default)]
pub(super) struct Interfaces(HashMap<u32, String>);

impl Interfaces {
    fn name(&mut self, index: u32) -> String {
        self.0.entry(index).or_insert_with(|| interface(index)).clone()
    }
}

fn interface(index: u32) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: there is room for the longest name and the byte that ends it.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return format!("#{index}");
    }
    // SAFETY: the call has written a name that ends.
    unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned()
}

const COLUMNS: [(&str, usize); 9] = [
    ("TIME", 27),
    ("EVENT", 8),
    ("PROTOCOL", 8),
    ("CLIENT", 21),
    ("FRONTEND", 21),
    ("BACKEND", 21),
    ("SERVICE", 24),
    ("AT", 20),
    ("NOTE", 0),
];

/// The line above the first.
pub(super) fn heading(output: Output) -> String {
    match output {
        Output::Json | Output::Yaml => String::new(),
        Output::Table | Output::Wide => aligned(&COLUMNS.map(|(name, _)| name.to_owned())),
    }
}

/// Lines come one by one, so columns have widths that fit the usual; a longer cell moves the others of its line.
fn aligned(cells: &[String; COLUMNS.len()]) -> String {
    let mut line = String::new();
    for (cell, (_, width)) in cells.iter().zip(COLUMNS) {
        line += &format!("{cell:width$}   ");
    }
    line.trim_end().to_owned() + "\n"
}

impl TraceRow {
    pub(super) fn new(event: &Event, names: Option<&Names>, interfaces: &mut Interfaces, clocks: &Clocks) -> Self {
        let (client, seen_as) = (
            socket(&event.client, event.client_port),
            socket(&event.seen_as, event.seen_as_port),
        );
        let is_at_socket = event.hook == AT_SOCKET;
        let name = names
            .filter(|_| event.service != 0)
            .map(|names| names.get(event.service));
        let (namespace, service, port_name) = match name {
            Some((namespace, service, port)) => (Some(namespace), Some(service), Some(port)),
            None => (None, None, None),
        };
        let kind = EventKind::ALL.iter().find(|kind| kind.number() == event.kind);
        Self {
            time: clocks.show(event.time),
            event: kind.map_or("unknown", |kind| kind.name()),
            protocol: protocol(event.protocol),
            client,
            frontend: SocketAddr::new(address(&event.frontend), event.frontend_port.get()),
            backend: socket(&event.backend, event.backend_port),
            seen_as: seen_as.filter(|_| seen_as != client),
            masqueraded: event.flags & EVENT_MASQUERADED != 0,
            namespace,
            service,
            port_name,
            reason: reason_of(event.reason).map(proxy_common::reason::Reason::name),
            hook: match event.hook {
                AT_SOCKET => "socket",
                HOOK_INGRESS => "ingress",
                _ => "egress",
            },
            interface: (!is_at_socket).then(|| interfaces.name(event.ifindex)),
            pid: is_at_socket.then_some(event.pid),
            process: is_at_socket.then(|| process(&event.comm)),
        }
    }

    pub(super) fn line(&self, output: Output) -> Result<String, InspectError> {
        if matches!(output, Output::Json | Output::Yaml) {
            return Ok(serde_json::to_string(self)? + "\n");
        }
        let shown = |socket: Option<SocketAddr>| or_none(&socket.map(|socket| socket.to_string()).unwrap_or_default());
        let service = match (&self.namespace, &self.service, &self.port_name) {
            (Some(namespace), Some(service), Some(port)) if port.is_empty() => format!("{namespace}/{service}"),
            (Some(namespace), Some(service), Some(port)) => format!("{namespace}/{service}:{port}"),
            _ => String::new(),
        };
        let at = match (&self.interface, &self.process, self.pid) {
            (Some(interface), ..) => format!("{interface} {}", self.hook),
            (None, Some(process), Some(pid)) => format!("{process}[{pid}]"),
            _ => self.hook.to_owned(),
        };
        let note = match (self.reason, self.seen_as) {
            (Some(reason), _) => reason.to_owned(),
            (None, Some(seen_as)) => format!("seen as {seen_as}"),
            (None, None) => String::new(),
        };
        Ok(aligned(&[
            self.time.clone(),
            self.event.to_owned(),
            self.protocol.clone(),
            shown(self.client),
            self.frontend.to_string(),
            shown(self.backend),
            or_none(&service),
            at,
            note,
        ]))
    }
}

/// None if there is no address.
fn socket(addr: &Addr6, port: Port) -> Option<SocketAddr> {
    (*addr != Addr6::default()).then(|| SocketAddr::new(address(addr), port.get()))
}

fn address(addr: &Addr6) -> IpAddr {
    Ipv6Addr::from(addr.0).to_canonical()
}

/// The kernel ends a name that is shorter than its room with a zero.
fn process(comm: &[u8; 16]) -> String {
    let end = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    String::from_utf8_lossy(&comm[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use proxy_common::addr::{Addr4, Address};
    use proxy_common::reason::Reason;
    use proxy_common::trace::{EVENT_OPENED, EVENT_REFUSED, reason_code};

    use super::*;

    const CLOCKS: Clocks = Clocks {
        monotonic: 7_000_000_000,
        wall: 1_000_000_000_000_000_000,
    };

    fn opened() -> Event {
        Event {
            time: 6_999_999_000,
            client: Addr4([10, 0, 0, 1]).mapped(),
            client_port: Port::new(4_000),
            frontend: Addr4([10, 96, 0, 1]).mapped(),
            frontend_port: Port::new(80),
            backend: Addr4([10, 0, 1, 1]).mapped(),
            backend_port: Port::new(8080),
            seen_as: Addr4([10, 0, 0, 1]).mapped(),
            seen_as_port: Port::new(4_000),
            ifindex: 1,
            kind: EVENT_OPENED,
            protocol: 6,
            ..Event::zeroed()
        }
    }

    fn json(event: &Event) -> serde_json::Value {
        let row = TraceRow::new(event, None, &mut Interfaces::default(), &CLOCKS);
        serde_json::from_str(&row.line(Output::Json).unwrap()).unwrap()
    }

    #[test]
    fn json_has_stable_names() {
        let found = json(&opened());
        assert_eq!(found["time"], "2001-09-09T01:46:39.999999Z");
        assert_eq!((&found["event"], &found["hook"]), (&"opened".into(), &"ingress".into()));
        assert_eq!(found["client"], "10.0.0.1:4000");
        assert_eq!(found["backend"], "10.0.1.1:8080");
        assert_eq!(found["interface"], "lo");
        for none in ["seenAs", "namespace", "service", "portName", "reason", "pid", "process"] {
            assert!(
                found.get(none).is_some_and(serde_json::Value::is_null),
                "{none}: {found}"
            );
        }
        let masqueraded = Event {
            seen_as: Addr4([10, 0, 0, 9]).mapped(),
            flags: EVENT_MASQUERADED,
            ..opened()
        };
        assert_eq!(json(&masqueraded)["seenAs"], "10.0.0.9:4000");
    }

    #[test]
    fn lines_are_aligned() {
        let refused = Event {
            kind: EVENT_REFUSED,
            reason: reason_code(Reason::NoEndpoints),
            backend: Addr6::default(),
            ..opened()
        };
        let row = |event| TraceRow::new(event, None, &mut Interfaces::default(), &CLOCKS);
        let heading = heading(Output::Table);
        let line = row(&refused).line(Output::Table).unwrap();
        assert_eq!(heading.find("BACKEND"), line.find("<none>"), "{heading}{line}");
        assert!(line.ends_with("lo ingress             no_endpoints\n"), "{line}");
    }

    #[test]
    fn processes_have_names() {
        assert_eq!(process(b"curl\0\0\0\0\0\0\0\0\0\0\0\0"), "curl");
        assert_eq!(process(b"a-name-of-16-let"), "a-name-of-16-let");
    }
}
