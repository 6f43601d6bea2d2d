//! Forwarding at XDP: what leaves is what tc and the kernel's forwarding would have made of the packet, byte by byte; everything else
//! passes as it came.

use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use proxy_common::addr::{Address, Protocol};
use proxy_common::counters::Counters;
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::rewrite::{
    HOOK_EGRESS, KIND_REQUEST, REWRITE_GAVE_WAY, REWRITE_MASQUERADED, Rewrite, RewriteKey, STATE_FIN, STATE_RST,
    STATE_SEEN,
};
use proxy_common::settings::{MODE_DRAIN, MODE_HOLD, Settings};
use proxy_tests::cards::{Cards, GATEWAY_MAC, OTHER_NODE_MAC, SECOND_MAC, THIRD_NODE_MAC};
use proxy_tests::programs::{Constants, PASS, Programs, XDP_PASS, XDP_REDIRECT, XDP_TX};
use proxy_tests::wire::{DST_MAC, End, L4, SRC_MAC, Tcp, assert_same, ends, packet, sctp, with_hops};

use crate::unusual::cut;
use crate::{ACK, Cast, SYN, at, load_masquerading, outsider};

both_families! {
    /// A connection from its first packet to its last, by XDP and by tc beside it: the same bytes, the same entries, the same counts.
    life => check_life;
    /// UDP: both directions, without a checksum, and where the checksum would become zero.
    udp => check_udp;
    /// An endpoint behind another card: redirected if that has the program, otherwise left to tc.
    other_card => check_other_card;
    /// What is remembered of a flow holds for a moment: then another neighbour counts, and that the flow is over.
    moment => check_moment;
    /// S154: a connection that follows another one on its tuple at once is not taken for it.
    reuse => check_reuse;
    /// What is not XDP's passes as it came and leaves no trace.
    passed => check_passed;
    /// Connections that are not masqueraded, or gave way, are tc's.
    other_connections => check_other_connections;
    /// S195: SCTP is forwarded while its checksum stays right.
    sctp_ports => check_sctp;
    /// The padding of a short frame is no part of the packet.
    padded => check_padded;
    /// Established connections go on while new ones are held or left to another proxy.
    modes => check_modes;
}

const HEADERS: usize = 14;
/// For less time a flow is remembered (`clock::moment`).
const MOMENT: Duration = Duration::from_millis(50);

/// Runs a test on a thread in the namespace of a node with two cards.
fn on_cards(test: impl FnOnce(&Cards, Programs) + Send) {
    let cards = Cards::new().unwrap();
    cards.netns.run(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        cards.make_known(&mut programs, true);
        test(&cards, programs);
    });
}

fn header_len(bytes: &[u8]) -> usize {
    if bytes[12] == 0x08 { 20 } else { 40 }
}

/// As the kernel forwards it: one hop less, and the hardware addresses of the next one.
fn forwarded(bytes: &[u8], from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
    let mut bytes = with_hops(bytes, 63);
    bytes[..6].copy_from_slice(&to);
    bytes[6..12].copy_from_slice(&from);
    bytes
}

/// What both hooks of tc make of a forwarded packet.
fn by_tc(programs: &Programs, bytes: &[u8], from: u32, to: u32) -> Vec<u8> {
    let out = programs.run(TC_INGRESS, bytes, from, from);
    assert_eq!(out.verdict, PASS);
    let out = programs.run(TC_EGRESS, &out.packet, to, from);
    assert_eq!(out.verdict, PASS);
    out.packet
}

/// Opens a connection by tc; what its endpoint sees as its client.
fn open(programs: &Programs, cards: &Cards, first: L4, client: End, vip: End) -> End {
    ends(&by_tc(
        programs,
        &packet(first, client, vip, b""),
        cards.first,
        cards.first,
    ))
    .0
}

#[track_caller]
fn assert_passed(programs: &Programs, bytes: &[u8], ifindex: u32) {
    let before = programs.xdp_forwarded();
    let out = programs.run_xdp(bytes, ifindex);
    assert_eq!(out.verdict, XDP_PASS);
    assert_same(&out.packet, bytes);
    assert_eq!(programs.xdp_forwarded(), before);
}

/// Everything of the entries but their clock.
fn entries<A: Address>(programs: &mut Programs) -> Vec<(RewriteKey<A>, Rewrite<A>)> {
    let timeless = |(key, value)| (key, Rewrite { last_seen: 0, ..value });
    programs.rewrites().into_iter().map(timeless).collect()
}

fn check_life<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        // The same life by tc alone, in maps of its own.
        let mut beside = load_masquerading(Constants::default().ports);
        cards.make_known(&mut beside, false);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 80), at(c.backend, 8080));
        for programs in [&mut programs, &mut beside] {
            programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        }
        let card = cards.first;

        // The handshake is tc's.
        let syn = packet(SYN, client, vip, b"");
        assert_passed(&programs, &syn, card);
        let node = open(&programs, cards, SYN, client, vip);
        assert_eq!(node.0, c.node.into());
        open(&beside, cards, SYN, client, vip);
        let answer = packet(L4::Tcp(Tcp::SynAck), backend, node, b"");
        assert_passed(&programs, &answer, card);
        for programs in [&programs, &beside] {
            assert_same(
                &by_tc(programs, &answer, card, card),
                &packet(L4::Tcp(Tcp::SynAck), vip, client, b""),
            );
        }

        let mut count = 0;
        for (l4, payload) in [
            (ACK, &b""[..]),
            (ACK, &[7; 1_399]),
            (L4::Tcp(Tcp::FinAck), b"bye"),
            (L4::Tcp(Tcp::Rst), b""),
            (ACK, b"who goes on was not reset"),
        ] {
            for (from, to, next_hop) in [
                ((client, vip), (node, backend), OTHER_NODE_MAC),
                ((backend, node), (vip, client), GATEWAY_MAC),
            ] {
                let sent = packet(l4, from.0, from.1, payload);
                let translated = packet(l4, to.0, to.1, payload);
                let out = programs.run_xdp(&sent, card);
                assert_eq!(out.verdict, XDP_TX, "{l4:?}");
                assert_same(&out.packet, &forwarded(&translated, DST_MAC, next_hop));
                assert_same(&by_tc(&beside, &sent, card, card), &translated);
                count += 1;
            }
            assert_eq!(entries::<A>(&mut programs), entries::<A>(&mut beside), "{l4:?}");
        }
        let states: Vec<u32> = entries::<A>(&mut programs)
            .iter()
            .map(|(_, value)| value.state)
            .collect();
        assert_eq!(states, [STATE_SEEN | STATE_FIN; 4]);
        assert_eq!(programs.xdp_forwarded(), count);
        let counters = programs.counters(1);
        assert_eq!(counters.packets, [6, 6], "with the handshake's");
        assert_eq!(counters, beside.counters(1));

        // A reset ends it at once: the next SYN of the port opens a new connection, by tc.
        programs.run_xdp(&packet(L4::Tcp(Tcp::Rst), client, vip, b""), card);
        let is_reset = |(_, value): &(_, Rewrite<A>)| value.state & STATE_RST != 0;
        assert_eq!(
            entries::<A>(&mut programs)
                .iter()
                .filter(|entry| is_reset(entry))
                .count(),
            2
        );
        assert_passed(&programs, &syn, card);
        open(&programs, cards, SYN, client, vip);
        assert!(!entries::<A>(&mut programs).iter().any(is_reset));
        assert_eq!(programs.counters(1).connections, [2, 0]);
    });
}

fn check_udp<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 53), at(c.backend, 5353));
        let first = packet(L4::Udp, client, vip, b"query");
        assert_passed(&programs, &first, cards.first);
        let node = open(&programs, cards, L4::Udp, client, vip);
        for (from, to, next_hop) in [
            ((client, vip), (node, backend), OTHER_NODE_MAC),
            ((backend, node), (vip, client), GATEWAY_MAC),
        ] {
            let at_checksum = HEADERS + header_len(&first) + 6;
            // Of all payloads of two bytes one gives each checksum, zero written as 0xffff among them (RFC 768).
            let zero = (0..=u16::MAX)
                .map(u16::to_be_bytes)
                .find(|payload| packet(L4::Udp, to.0, to.1, payload)[at_checksum..][..2] == [0xff; 2])
                .unwrap();
            for payload in [&b""[..], b"odd", &zero, &[7; 1_400]] {
                let translated = packet(L4::Udp, to.0, to.1, payload);
                let out = programs.run_xdp(&packet(L4::Udp, from.0, from.1, payload), cards.first);
                assert_eq!(out.verdict, XDP_TX);
                assert_same(&out.packet, &forwarded(&translated, DST_MAC, next_hop));
            }
            let without = |(from, to)| {
                let mut bytes = packet(L4::Udp, from, to, b"query");
                bytes[at_checksum..][..2].fill(0);
                bytes
            };
            let out = programs.run_xdp(&without(from), cards.first);
            assert_eq!(out.verdict, XDP_TX);
            assert_same(&out.packet, &forwarded(&without(to), DST_MAC, next_hop));
        }
        assert_eq!(programs.counters(1).packets, [6, 5]);
    });
}

/// The same address in the third node's pod network.
fn on_third_node<A: Address>(pod: A) -> A {
    let mut octets = [0; 16];
    octets[..A::LEN].copy_from_slice(pod.octets());
    octets[if A::FAMILY == 4 { 2 } else { 7 }] = 3;
    bytemuck::pod_read_unaligned(&octets[..A::LEN])
}

fn check_other_card<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        let pod = on_third_node(c.backend);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(pod, 8080)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 80), at(pod, 8080));
        let syn = packet(SYN, client, vip, b"");
        let node = ends(&by_tc(&programs, &syn, cards.first, cards.second)).0;
        let request = packet(ACK, client, vip, b"to");
        let out = programs.run_xdp(&request, cards.first);
        assert_eq!(out.verdict, XDP_REDIRECT);
        let translated = packet(ACK, node, backend, b"to");
        assert_same(&out.packet, &forwarded(&translated, SECOND_MAC, THIRD_NODE_MAC));
        let addressed = |mac: [u8; 6], mut bytes: Vec<u8>| {
            bytes[..6].copy_from_slice(&mac);
            bytes
        };
        let reply = addressed(SECOND_MAC, packet(ACK, backend, node, b"fro"));
        let out = programs.run_xdp(&reply, cards.second);
        assert_eq!(out.verdict, XDP_REDIRECT);
        assert_same(
            &out.packet,
            &forwarded(&packet(ACK, vip, client, b"fro"), DST_MAC, GATEWAY_MAC),
        );
        // Seen by a promiscuous card, and none of this node's business.
        assert_passed(&programs, &addressed(SRC_MAC, reply), cards.second);
        cards.make_known(&mut programs, false);
        sleep(MOMENT);
        assert_passed(&programs, &request, cards.first);
    });
}

fn check_moment<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (client, vip) = (at(outsider::<A>(), 40_000), at(c.vip, 80));
        let node = open(&programs, cards, SYN, client, vip);
        let request = packet(ACK, client, vip, b"");
        let translated = packet(ACK, node, at(c.backend, 8080), b"");
        let expect = |programs: &Programs, next_hop| {
            for _ in 0..3 {
                let out = programs.run_xdp(&request, cards.first);
                assert_same(&out.packet, &forwarded(&translated, DST_MAC, next_hop));
            }
        };
        expect(&programs, OTHER_NODE_MAC);
        let neighbour = if A::FAMILY == 4 { "192.168.56.20" } else { "fd00:56::20" };
        let change = format!("neigh replace {neighbour} lladdr 02:00:00:00:00:0c dev eth0");
        cards.netns.ip(&change).unwrap();
        sleep(MOMENT);
        expect(&programs, THIRD_NODE_MAC);
        // UDP flows are taken from an endpoint that leaves by removing their entries; so are connections that are over.
        for (key, _) in programs.rewrites::<A>() {
            programs.remove_rewrite(&key);
        }
        sleep(MOMENT);
        assert_passed(&programs, &request, cards.first);
    });
}

fn check_reuse<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        let (client, vip) = (at(outsider::<A>(), 40_000), at(c.vip, 80));
        for backend in [c.backend, c.other_backend, c.backend] {
            programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(backend, 8080)]);
            let syn = packet(SYN, client, vip, b"");
            assert_passed(&programs, &syn, cards.first);
            let node = open(&programs, cards, SYN, client, vip);
            for _ in 0..2 {
                let out = programs.run_xdp(&packet(ACK, client, vip, b""), cards.first);
                assert_same(
                    &out.packet,
                    &forwarded(&packet(ACK, node, at(backend, 8080), b""), DST_MAC, OTHER_NODE_MAC),
                );
            }
            let reset = packet(L4::Tcp(Tcp::Rst), client, vip, b"");
            assert_eq!(programs.run_xdp(&reset, cards.first).verdict, XDP_TX);
        }
    });
}

/// A packet with eight bytes of IPv4 options, or an empty hop-by-hop header, before its L4 header.
fn with_extension(bytes: &[u8]) -> Vec<u8> {
    let (ip, l4) = bytes[HEADERS..].split_at(header_len(bytes));
    let mut out = bytes[..HEADERS].to_vec();
    if ip.len() == 20 {
        let (mut ip, _) = etherparse::Ipv4Header::from_slice(ip).unwrap();
        ip.options = [1u8; 8].into();
        ip.total_len += 8;
        ip.header_checksum = ip.calc_header_checksum();
        out.extend_from_slice(&ip.to_bytes());
    } else {
        let mut ip = ip.to_vec();
        ip[4..6].copy_from_slice(&(l4.len() as u16 + 8).to_be_bytes());
        let next = std::mem::replace(&mut ip[6], 0);
        out.extend_from_slice(&ip);
        // PadN of four bytes.
        out.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]);
    }
    out.extend_from_slice(l4);
    out
}

fn check_passed<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        let card = cards.first;
        let mut nowhere = [0; 16];
        nowhere[..A::LEN].copy_from_slice(c.backend.octets());
        nowhere[if A::FAMILY == 4 { 2 } else { 7 }] = 4;
        let nowhere: A = bytemuck::pod_read_unaligned(&nowhere[..A::LEN]);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        programs.add_service(2, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
        programs.add_service(3, c.other_vip, 80, Protocol::Tcp, &[(nowhere, 8080)]);
        let client = at(outsider::<A>(), 40_000);
        let (vip, dns, lost) = (at(c.vip, 80), at(c.vip, 53), at(c.other_vip, 80));
        open(&programs, cards, SYN, client, vip);
        open(&programs, cards, L4::Udp, client, dns);
        open(&programs, cards, SYN, client, lost);
        let before = (entries::<A>(&mut programs), programs.counters(1), programs.counters(2));

        let known = packet(ACK, client, vip, b"data");
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = known.clone();
            change(&mut bytes);
            bytes
        };
        let len_field = if A::FAMILY == 4 { HEADERS + 2 } else { HEADERS + 4 };
        let whole = packet(L4::Udp, client, dns, &[7; 1_600]);
        let passing = [
            ("a SYN", packet(SYN, client, vip, b"")),
            ("a SYN with an ACK", packet(L4::Tcp(Tcp::SynAck), client, vip, b"")),
            ("unknown", packet(ACK, at(outsider::<A>(), 1), vip, b"")),
            ("unknown UDP", packet(L4::Udp, at(outsider::<A>(), 1), dns, b"")),
            ("one hop left", with_hops(&known, 1)),
            ("no hop left", with_hops(&known, 0)),
            ("options or extension headers", with_extension(&known)),
            ("a first fragment", cut(&whole)[0].clone()),
            ("a later fragment", cut(&whole)[1].clone()),
            ("larger than the MTU", whole),
            ("an unknown neighbour", packet(ACK, client, lost, b"")),
            (
                "a VLAN",
                changed(&|bytes| {
                    bytes.splice(12..12, [0x81, 0, 0, 5]);
                }),
            ),
            ("for another machine", changed(&|bytes| bytes[5] = 0x77)),
            ("to everybody", changed(&|bytes| bytes[..6].fill(0xff))),
            ("another version", changed(&|bytes| bytes[HEADERS] ^= 0xf0)),
            ("longer than the frame", changed(&|bytes| bytes[len_field + 1] += 1)),
            ("shorter than its headers", changed(&|bytes| bytes[len_field + 1] = 19)),
            ("cut off", changed(&|bytes| bytes.truncate(HEADERS + 10))),
            ("ARP", changed(&|bytes| bytes[12..14].copy_from_slice(&[8, 6]))),
        ];
        for (what, bytes) in &passing {
            println!("{what}");
            assert_passed(&programs, bytes, card);
        }
        assert_eq!(
            (entries::<A>(&mut programs), programs.counters(1), programs.counters(2)),
            before,
            "nothing is noted of what passes"
        );
        // The same while the flow they are made of is remembered.
        for (what, bytes) in &passing {
            println!("{what}, of a flow under way");
            assert_eq!(programs.run_xdp(&known, card).verdict, XDP_TX);
            assert_passed(&programs, bytes, card);
        }

        // A node that does not forward.
        for setting in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            cards.netns.sysctl(setting, "0").unwrap();
        }
        sleep(MOMENT);
        assert_passed(&programs, &known, card);
        for setting in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            cards.netns.sysctl(setting, "1").unwrap();
        }
        // The endpoint is on this node by now.
        let pod: IpAddr = c.backend.into();
        cards.netns.ip(&format!("addr add {pod} dev lo")).unwrap();
        assert_passed(&programs, &known, card);
    });
}

fn check_other_connections<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        // A pod's address: it is not masqueraded, and its replies need not come back by this node.
        let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
        assert_eq!(open(&programs, cards, SYN, client, vip), client);
        assert_passed(&programs, &packet(ACK, client, vip, b""), cards.first);
        assert_passed(&programs, &packet(ACK, backend, client, b""), cards.first);

        // Entries that tc treats in another way than by rewriting.
        let client = at(outsider::<A>(), 40_000);
        open(&programs, cards, SYN, client, vip);
        let known = packet(ACK, client, vip, b"");
        assert_eq!(programs.run_xdp(&known, cards.first).verdict, XDP_TX);
        sleep(MOMENT);
        let all = programs.rewrites::<A>();
        let is_request =
            |(_, value): &&(_, Rewrite<A>)| value.kind == KIND_REQUEST && value.flags == REWRITE_MASQUERADED;
        let (key, request) = *all.iter().find(is_request).unwrap();
        for flags in (0..8).map(|bit| 1 << bit).filter(|flag| *flag != REWRITE_MASQUERADED) {
            programs.set_rewrite(
                key,
                Rewrite {
                    flags: request.flags | flags,
                    ..request
                },
            );
            assert_passed(&programs, &known, cards.first);
        }
        programs.set_rewrite(
            key,
            Rewrite {
                flags: REWRITE_GAVE_WAY,
                ..request
            },
        );
        assert_passed(&programs, &known, cards.first);
        programs.set_rewrite(key, request);
        assert_eq!(programs.run_xdp(&known, cards.first).verdict, XDP_TX);
        sleep(MOMENT);
        // Without its masquerade.
        programs.remove_rewrite(&RewriteKey::new(
            request.src,
            request.src_port,
            request.dst,
            request.dst_port,
            key.protocol,
            HOOK_EGRESS,
        ));
        assert_passed(&programs, &known, cards.first);
    });
}

fn check_sctp<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
        programs.add_service(2, c.other_vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
        let (client, backend, node) = (at(outsider::<A>(), 40_000), at(c.backend, 80), at(c.node, 40_000));
        for (vip, is_forwarded) in [(at(c.vip, 80), true), (at(c.other_vip, 80), false)] {
            let data = sctp(client, vip, &[3, 0, 0, 4]);
            assert_passed(&programs, &data, cards.first);
            by_tc(&programs, &data, cards.first, cards.first);
            if !is_forwarded {
                assert_passed(&programs, &data, cards.first);
                continue;
            }
            let out = programs.run_xdp(&data, cards.first);
            assert_eq!(out.verdict, XDP_TX);
            let translated = sctp(node, backend, &[3, 0, 0, 4]);
            assert_same(&out.packet, &forwarded(&translated, DST_MAC, OTHER_NODE_MAC));
        }
    });
}

fn check_padded<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 53), at(c.backend, 5353));
        let node = open(&programs, cards, L4::Udp, client, vip);
        let before = programs.counters(1);
        let padded = |(from, to)| [packet(L4::Udp, from, to, b"x"), vec![0; 17]].concat();
        for (from, to, next_hop) in [
            ((client, vip), (node, backend), OTHER_NODE_MAC),
            ((backend, node), (vip, client), GATEWAY_MAC),
        ] {
            let out = programs.run_xdp(&padded(from), cards.first);
            assert_same(&out.packet, &forwarded(&padded(to), DST_MAC, next_hop));
        }
        // tc sees a request as it arrives, and a reply as it leaves.
        let len = packet(L4::Udp, client, vip, b"x").len() as u64 - HEADERS as u64;
        let expected = Counters {
            packets: [1, 1],
            bytes: [len + 17, len],
            ..Counters::default()
        };
        assert_eq!(programs.counters(1).since(&before), expected);
    });
}

fn check_modes<A: Address>(c: Cast<A>) {
    on_cards(|cards, mut programs| {
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (client, vip) = (at(outsider::<A>(), 40_000), at(c.vip, 80));
        open(&programs, cards, SYN, client, vip);
        for mode in [MODE_HOLD, MODE_DRAIN] {
            programs.change_settings(|settings: &mut Settings<A>| settings.mode = mode);
            assert_eq!(
                programs.run_xdp(&packet(ACK, client, vip, b""), cards.first).verdict,
                XDP_TX
            );
        }
    });
}
