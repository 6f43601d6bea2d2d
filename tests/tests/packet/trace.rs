//! What a tracer is told of packets: known packets, events compared as a whole.

use bytemuck::Zeroable;
use proxy_common::addr::{Addr6, Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, Frontend, FrontendKey};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS};
use proxy_common::settings::{Prefix, Settings};
use proxy_common::trace::{EVENT_DROPPED, EVENT_MASQUERADED, EVENT_OPENED, EVENT_REFUSED, Event, Trace, reason_code};
use proxy_tests::programs::{DROP, PASS, Programs};
use proxy_tests::wire::{L4, Tcp, ends, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, in_namespace, load, load_masquerading, outsider};

both_families! {
    /// Once per connection, with everything that was decided.
    opened => check_opened;
    /// The address and port that the backend sees.
    masqueraded => check_masqueraded;
    /// With the reason and the service.
    refused_and_dropped => check_refused_and_dropped;
    /// What belongs to nobody, with ports and without.
    strays => check_strays;
    /// Nothing while nobody asks, and nothing when the time is over.
    off => check_off;
    /// The programs choose.
    filters => check_filters;
    /// About one of so many.
    sampling => check_sampling;
    /// A buffer that nobody reads is full at some time; what is lost is counted.
    lost => check_lost;
}

fn everything() -> Trace {
    Trace {
        until: u64::MAX,
        ..Trace::default()
    }
}

/// An event about a TCP packet from the client to the address, with all that the cases have in common.
fn event<A: Address>(kind: u8, service: u32, client: (A, u16), frontend: (A, u16)) -> Event {
    Event {
        client: client.0.mapped(),
        client_port: Port::new(client.1),
        frontend: frontend.0.mapped(),
        frontend_port: Port::new(frontend.1),
        service,
        ifindex: LO,
        kind,
        protocol: Protocol::Tcp.number(),
        hook: HOOK_INGRESS,
        ..Event::zeroed()
    }
}

/// The one event since the last question; its time is checked here and taken away.
fn only(programs: &mut Programs) -> Event {
    let events = programs.events();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_ne!(events[0].time, 0);
    Event { time: 0, ..events[0] }
}

fn check_opened<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(7, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(8, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    programs.ask(everything());
    for (service, first, then, protocol, port, backend_port) in [
        (7, SYN, ACK, Protocol::Tcp, 80, 8080),
        (8, L4::Udp, L4::Udp, Protocol::Udp, 53, 5353),
    ] {
        let client = at(c.client, 40_000);
        let run = |l4| programs_run(&programs, TC_INGRESS, &packet(l4, client, at(c.vip, port), b""));
        run(first);
        run(then);
        let reply = packet(then, at(c.backend, backend_port), client, b"");
        programs_run(&programs, TC_EGRESS, &reply);
        let expected = Event {
            backend: c.backend.mapped(),
            backend_port: Port::new(backend_port),
            seen_as: c.client.mapped(),
            seen_as_port: Port::new(40_000),
            protocol: protocol.number(),
            ..event(EVENT_OPENED, service, (c.client, 40_000), (c.vip, port))
        };
        assert_eq!(only(&mut programs), expected);
    }
    // What is not ours is nothing to tell.
    programs_run(
        &programs,
        TC_INGRESS,
        &packet(SYN, at(c.client, 1), at(c.backend, 80), b""),
    );
    assert_eq!(programs.events(), []);
}

fn programs_run(programs: &Programs, program: &str, bytes: &[u8]) {
    assert_eq!(programs.run(program, bytes, LO, FORWARDED).verdict, PASS);
}

fn check_masqueraded<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading((61_000, 2));
        programs.add_service(7, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        programs.ask(everything());
        // Two clients with one source port: the second is given another one.
        let mut other = [0; 16];
        other[..A::LEN].copy_from_slice(outsider::<A>().octets());
        other[A::LEN - 1] += 1;
        let other: A = bytemuck::pod_read_unaligned(&other[..A::LEN]);
        for client in [outsider::<A>(), other] {
            let syn = packet(SYN, at(client, 40_000), at(c.vip, 80), b"");
            let inside = programs.run(TC_INGRESS, &syn, LO, FORWARDED).packet;
            let outside = programs.run(TC_EGRESS, &inside, LO, FORWARDED).packet;
            let expected = Event {
                backend: c.backend.mapped(),
                backend_port: Port::new(8080),
                seen_as: c.node.mapped(),
                seen_as_port: Port::new(ends(&outside).0.1),
                flags: EVENT_MASQUERADED,
                ..event(EVENT_OPENED, 7, (client, 40_000), (c.vip, 80))
            };
            assert_eq!(only(&mut programs), expected);
        }
    });
}

fn check_refused_and_dropped<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[]);
    let elsewhere = Frontend {
        service: 2,
        flags: FRONTEND_CLUSTER_IP | FRONTEND_HAS_ENDPOINTS,
        ..Frontend::default()
    };
    programs.set_frontend(FrontendKey::new(c.other_vip, Port::new(80), 6), elsewhere);
    programs.ask(everything());
    for (service, vip, kind, reason) in [
        (1, c.vip, EVENT_REFUSED, Reason::NoEndpoints),
        (2, c.other_vip, EVENT_DROPPED, Reason::NoLocalEndpoints),
    ] {
        programs.run(
            TC_INGRESS,
            &packet(SYN, at(c.client, 40_000), at(vip, 80), b""),
            LO,
            FORWARDED,
        );
        let expected = Event {
            reason: reason_code(reason),
            ..event(kind, service, (c.client, 40_000), (vip, 80))
        };
        assert_eq!(only(&mut programs), expected);
    }
}

fn check_strays<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.change_settings(|settings: &mut Settings<A>| {
        let mask: A = bytemuck::pod_read_unaligned(&[0xff; 16][..A::LEN]);
        settings.networks[0] = Prefix {
            addr: c.vip,
            mask,
            set: 1,
        };
    });
    programs.ask(everything());
    let stray = packet(ACK, at(c.client, 40_000), at(c.vip, 80), b"");
    assert_eq!(programs.run(TC_EGRESS, &stray, LO, FORWARDED).verdict, DROP);
    let expected = Event {
        reason: reason_code(Reason::Unallocated),
        hook: HOOK_EGRESS,
        ..event(EVENT_DROPPED, 0, (c.client, 40_000), (c.vip, 80))
    };
    assert_eq!(only(&mut programs), expected);
    // A protocol that no Service has: its ports are not read.
    let (mut other, offset) = (stray, if A::FAMILY == 4 { 14 + 9 } else { 14 + 6 });
    other[offset] = 47;
    assert_eq!(programs.run(TC_EGRESS, &other, LO, FORWARDED).verdict, DROP);
    let expected = Event {
        client_port: Port::default(),
        frontend_port: Port::default(),
        protocol: 47,
        ..expected
    };
    assert_eq!(only(&mut programs), expected);
}

fn check_off<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Tcp, &[]);
    for (number, question) in (0..).zip([
        Trace::default(),
        Trace {
            until: 1,
            ..everything()
        },
    ]) {
        programs.ask(question);
        for vip in [c.vip, c.other_vip] {
            programs.run(
                TC_INGRESS,
                &packet(SYN, at(c.client, 40_000 + number), at(vip, 80), b""),
                LO,
                FORWARDED,
            );
        }
        assert_eq!(programs.events(), []);
    }
}

fn check_filters<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(7, c.vip, 80, Protocol::Tcp, &[]);
    let mut asked = |question: Trace| {
        programs.ask(question);
        programs.run(
            TC_INGRESS,
            &packet(SYN, at(c.client, 40_000), at(c.vip, 80), b""),
            LO,
            FORWARDED,
        );
        programs.events().len()
    };
    let all = everything();
    let host = Addr6([0xff; 16]);
    let mut services = [0; 8];
    services[5] = 7;
    for (question, expected) in [
        (
            Trace {
                kinds: 1 << EVENT_REFUSED,
                ..all
            },
            1,
        ),
        (
            Trace {
                kinds: 1 << EVENT_OPENED | 1 << EVENT_DROPPED,
                ..all
            },
            0,
        ),
        (Trace { protocol: 6, ..all }, 1),
        (Trace { protocol: 17, ..all }, 0),
        (
            Trace {
                port: Port::new(80),
                ..all
            },
            1,
        ),
        (
            Trace {
                port: Port::new(8080),
                ..all
            },
            0,
        ),
        (
            Trace {
                reasons: 1 << Reason::NoEndpoints as u32,
                ..all
            },
            1,
        ),
        (
            Trace {
                reasons: 1 << Reason::Loop as u32,
                ..all
            },
            0,
        ),
        (Trace { services, ..all }, 1),
        (
            Trace {
                services: [6; 8],
                ..all
            },
            0,
        ),
        (
            Trace {
                client: c.client.mapped(),
                mask: host,
                ..all
            },
            1,
        ),
        (
            Trace {
                client: c.node.mapped(),
                mask: host,
                ..all
            },
            0,
        ),
    ] {
        assert_eq!(asked(question), expected, "{question:?}");
    }
}

fn check_sampling<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.ask(Trace {
        sample: 10,
        ..everything()
    });
    for port in 10_000..11_000 {
        programs.run(
            TC_INGRESS,
            &packet(SYN, at(c.client, port), at(c.vip, 80), b""),
            LO,
            FORWARDED,
        );
    }
    // 100 are expected, and ten standard deviations are 95.
    let seen = programs.events().len();
    assert!((20..=195).contains(&seen), "{seen}");
}

fn check_lost<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.ask(everything());
    let sent = 2_500;
    for port in 0..sent {
        let syn = packet(SYN, at(c.client, 10_000 + port), at(c.vip, 80), b"");
        assert_eq!(programs.run(TC_INGRESS, &syn, LO, FORWARDED).verdict, PASS);
    }
    let (seen, lost) = (programs.events().len() as u64, programs.events_lost());
    assert_eq!(seen + lost, u64::from(sent));
    assert!(seen >= 1_024 && lost > 0, "{seen} {lost}");
    // Read, it has room again.
    let rst = packet(L4::Tcp(Tcp::Syn), at(c.client, 9_999), at(c.vip, 80), b"");
    programs.run(TC_INGRESS, &rst, LO, FORWARDED);
    assert_eq!(programs.events().len(), 1);
}
