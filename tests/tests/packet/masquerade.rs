//! Connections whose source changes too, and those of the node itself.

use std::collections::BTreeMap;

use proxy_common::addr::{Address, Protocol};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::{KIND_MASQUERADE, KIND_REPLY, KIND_REQUEST, KIND_UNMASQUERADE};
use proxy_tests::programs::{Constants, DROP, PASS, REDIRECT};
use proxy_tests::wire::{L4, Tcp, assert_same, ends, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, in_namespace, load_masquerading, outsider};

both_families! {
    /// S108, S110, S117, S121: masquerading and its reversal.
    masquerade => check_masquerade;
    /// S119: a connection that is over masquerades nothing that comes later with its tuple.
    masquerade_ends => check_masquerade_ends;
    /// S121: no free port is a counted refusal to serve, never a shared port.
    exhaustion => check_exhaustion;
    /// S75: the node's own packets at the egress hook.
    from_the_node => check_from_the_node;
}

fn check_masquerade<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (vip, backend) = (at(c.vip, 80), at(c.backend, 8080));
        // From outside (S108), and from the endpoint itself (S110).
        for client in [at(outsider::<A>(), 40_000), at(c.backend, 41_000)] {
            let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &packet(SYN, client, backend, b""));
            let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
            let node = ends(&out.packet).0;
            assert_eq!(node.0, c.node.into());
            assert_same(&out.packet, &packet(SYN, node, backend, b""));
            let reply = packet(L4::Tcp(Tcp::SynAck), backend, node, b"");
            let out = programs.run(TC_INGRESS, &reply, LO, FORWARDED);
            assert_same(&out.packet, &packet(L4::Tcp(Tcp::SynAck), backend, client, b""));
            let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
            assert_same(&out.packet, &packet(L4::Tcp(Tcp::SynAck), vip, client, b""));
        }
        let mut kinds: Vec<_> = programs
            .rewrites::<A>()
            .into_iter()
            .map(|(_, value)| value.kind)
            .collect();
        kinds.sort_unstable();
        let each = [KIND_REQUEST, KIND_REPLY, KIND_MASQUERADE, KIND_UNMASQUERADE];
        assert_eq!(kinds, each.into_iter().flat_map(|kind| [kind; 2]).collect::<Vec<_>>());
        // A pod's source stays (S119).
        let before = programs.rewrites::<A>().len();
        programs.run(TC_INGRESS, &packet(SYN, at(c.client, 40_000), vip, b""), LO, FORWARDED);
        assert_eq!(programs.rewrites::<A>().len(), before + 2);
    });
}

fn check_masquerade_ends<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 80), at(c.backend, 8080));
        let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
        let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
        assert_eq!(ends(&out.packet).0.0, c.node.into());
        programs.run(TC_INGRESS, &packet(L4::Tcp(Tcp::Rst), client, vip, b""), LO, FORWARDED);
        // The same client port dials the endpoint itself.
        let direct = packet(SYN, client, backend, b"");
        for hook in [TC_INGRESS, TC_EGRESS] {
            let out = programs.run(hook, &direct, LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &direct);
        }
    });
}

fn check_exhaustion<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        // Two ports to change to: of many clients with one source port, few can be served and nobody shares.
        let mut programs = load_masquerading((61_000, 2));
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let mut ports = BTreeMap::new();
        let mut refused = 0;
        for host in 1..=20 {
            let mut client = [0; 16];
            client[..A::LEN].copy_from_slice(outsider::<A>().octets());
            client[A::LEN - 1] = host;
            let client: A = bytemuck::pod_read_unaligned(&client[..A::LEN]);
            let request = packet(SYN, at(client, 40_000), at(c.vip, 80), b"");
            let out = programs.run(TC_INGRESS, &request, LO, FORWARDED);
            if out.verdict == DROP {
                refused += 1;
                continue;
            }
            let port = ends(&programs.run(TC_EGRESS, &out.packet, LO, FORWARDED).packet).0.1;
            assert_eq!(ports.insert(port, host), None, "two connections share port {port}");
        }
        assert_eq!(ports.len(), 3, "the clients' own port and both spare ones");
        assert_eq!(programs.count(Reason::NoSourcePort), refused);
        assert_eq!(
            programs.rewrites::<A>().len(),
            3 * 4,
            "who is not served leaves nothing behind"
        );
    });
}

fn check_from_the_node<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.set_node_addr(c.node);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        programs.add_service(2, c.other_vip, 80, Protocol::Tcp, &[(c.node, 8080)]);
        let (client, vip, backend) = (at(c.node, 40_000), at(c.vip, 80), at(c.backend, 8080));

        // Forwarded packets were looked up where they came in.
        let forwarded = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
        assert_eq!(
            (forwarded.verdict, forwarded.packet),
            (PASS, packet(SYN, client, vip, b""))
        );

        // To a pod: routed again; the reply is made to arrive by the interface the request left by.
        let out = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(SYN, client, backend, b""));
        let out = programs.run(TC_INGRESS, &packet(ACK, backend, client, b""), LO, FORWARDED);
        assert_eq!(out.verdict, PASS, "it is there already");
        assert_same(&out.packet, &packet(ACK, vip, client, b""));

        // To an endpoint on the node's own network, which sees the frontend's address as its client.
        let vip = at(c.other_vip, 80);
        let out = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(SYN, (vip.0, client.1), at(c.node, 8080), b""));
        let reply = packet(ACK, at(c.node, 8080), (vip.0, client.1), b"");
        let out = programs.run(TC_EGRESS, &reply, LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(ACK, vip, client, b""));
    });
}
