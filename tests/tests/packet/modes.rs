//! What becomes of new connections while the maps move or another proxy takes over; those that exist never notice.

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, Frontend, FrontendKey};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::settings::{MODE_DRAIN, MODE_HOLD, MODE_SERVE, Settings};
use proxy_tests::programs::{DROP, PASS, Programs};
use proxy_tests::wire::{End, L4, assert_same, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, load};

both_families! {
    /// New connections wait, and the next try is served once the mode is over.
    held => check_held;
    /// New connections are left to whoever else is there, a refused service's too.
    drained => check_drained;
}

fn set_mode<A: Address>(programs: &mut Programs, mode: u32) {
    programs.change_settings(|settings: &mut Settings<A>| settings.mode = mode);
}

/// A connection: its first packet and the others, client, frontend and backend.
type Connection = (L4, L4, End, End, End);

/// A service, and a client that has opened a connection of each protocol to it.
fn with_connections<A: Address>(c: Cast<A>) -> (Programs, [Connection; 2]) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    let client = at(c.client, 40_000);
    let opened = [
        (SYN, ACK, client, at(c.vip, 80), at(c.backend, 8080)),
        (L4::Udp, L4::Udp, client, at(c.vip, 53), at(c.backend, 5353)),
    ];
    for (first, _, client, vip, _) in opened {
        programs.run(TC_INGRESS, &packet(first, client, vip, b""), LO, FORWARDED);
    }
    (programs, opened)
}

fn go_on(programs: &Programs, opened: &[Connection]) {
    for &(_, then, client, vip, backend) in opened {
        let out = programs.run(TC_INGRESS, &packet(then, client, vip, b"to"), LO, FORWARDED);
        assert_same(&out.packet, &packet(then, client, backend, b"to"));
        let out = programs.run(TC_EGRESS, &packet(then, backend, client, b"fro"), LO, FORWARDED);
        assert_same(&out.packet, &packet(then, vip, client, b"fro"));
    }
}

fn check_held<A: Address>(c: Cast<A>) {
    let (mut programs, opened) = with_connections(c);
    set_mode::<A>(&mut programs, MODE_HOLD);
    let other = at(c.client, 40_001);
    for (first, _, _, vip, _) in opened {
        let out = programs.run(TC_INGRESS, &packet(first, other, vip, b""), LO, FORWARDED);
        assert_eq!(out.verdict, DROP);
    }
    assert_eq!(programs.count(Reason::Held), 2);
    assert_eq!(programs.rewrites::<A>().len(), 4, "those of before");
    let foreign = packet(SYN, other, at(c.backend, 8080), b"");
    assert_same(&programs.run(TC_INGRESS, &foreign, LO, FORWARDED).packet, &foreign);
    go_on(&programs, &opened);

    set_mode::<A>(&mut programs, MODE_SERVE);
    for (first, _, _, vip, backend) in opened {
        let out = programs.run(TC_INGRESS, &packet(first, other, vip, b""), LO, FORWARDED);
        assert_same(&out.packet, &packet(first, other, backend, b""));
    }
}

fn check_drained<A: Address>(c: Cast<A>) {
    let (mut programs, opened) = with_connections(c);
    let without_endpoints = Frontend {
        service: 3,
        flags: FRONTEND_CLUSTER_IP,
        ..Frontend::default()
    };
    programs.set_frontend(FrontendKey::new(c.vip, Port::new(81), 6), without_endpoints);
    set_mode::<A>(&mut programs, MODE_DRAIN);
    let (other, refused) = (at(c.client, 40_001), at(c.vip, 81));
    for (first, vip) in [(SYN, opened[0].3), (L4::Udp, opened[1].3), (SYN, refused)] {
        for program in [TC_INGRESS, TC_EGRESS] {
            let bytes = packet(first, other, vip, b"");
            let out = programs.run(program, &bytes, LO, FORWARDED);
            assert_eq!((out.verdict, out.packet), (PASS, bytes), "{program}");
        }
    }
    assert_eq!(programs.rewrites::<A>().len(), 4, "those of before");
    go_on(&programs, &opened);
}
