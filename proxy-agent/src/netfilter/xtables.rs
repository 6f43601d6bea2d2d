//! Matches and targets of iptables, which legacy tables and iptables over nftables have in the same form (`include/uapi/linux/netfilter`).

use std::net::SocketAddr;

use super::{Action, Rule, address, number16, number32, port, text};

/// Bit of `xt_recent`: the match only remembers, and so is always true.
const XT_RECENT_SET: u8 = 1 << 1;

/// Adds what a match asks for.
pub(super) fn matched(rule: &mut Rule, name: &str, info: &[u8]) {
    match name {
        "comment" => rule.comment = text(info),
        // Each rule of a chain has its turn by chance.
        "statistic" => {}
        "recent" if info.get(8).is_some_and(|set| set & XT_RECENT_SET != 0) => {}
        // `xt_tcp`, `xt_udp`: source ports, destination ports, both as ranges. What else they may ask for kube-proxy does not.
        "tcp" | "udp" => ports(rule, info, 0, 4),
        "sctp" => ports(rule, info, 4, 0),
        _ => rule.conditional = true,
    }
}

fn ports(rule: &mut Rule, info: &[u8], source: usize, destination: usize) {
    let range = |at| number16(info, at).zip(number16(info, at + 2));
    rule.by_source |= range(source).is_some_and(|range| range != (0, u16::MAX));
    match range(destination) {
        Some((0, u16::MAX)) => {}
        Some((first, last)) if first == last => rule.port = Some(first),
        _ => rule.conditional = true,
    }
}

/// What a target does.
pub(super) fn target(name: &str, revision: u32, info: &[u8], is_v4: bool) -> Action {
    match name {
        "DNAT" => {
            let to = destination(revision, info, is_v4);
            to.map_or(Action::None, |to| Action::Destinations(vec![to]))
        }
        "REJECT" => Action::Reject,
        _ => Action::None,
    }
}

/// The first address and port of the range, which for kube-proxy are the only ones.
fn destination(revision: u32, info: &[u8], is_v4: bool) -> Option<SocketAddr> {
    /// `NF_NAT_RANGE_MAP_IPS`.
    const HAS_ADDRESS: u32 = 1;
    // `nf_nat_ipv4_multi_range_compat`: how many, then flags, addresses and ports of the first.
    // `nf_nat_range` and `nf_nat_range2`: flags, two addresses of 16 bytes each, ports.
    let (flags, first, ports) = if revision == 0 { (4, 8, 16) } else { (0, 4, 36) };
    if number32(info, flags)? & HAS_ADDRESS == 0 {
        return None;
    }
    Some(SocketAddr::new(address(info.get(first..)?, is_v4)?, port(info, ports)?))
}
