//! Addresses and prefixes as Kubernetes objects write them. Stricter parsers exist, but the API accepts text that they refuse:
//! IPv4 numbers with leading zeros, which are decimal and never octal (S20). Used for every address read from an object.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// The address that `text` stands for. An IPv4-mapped IPv6 address is the IPv4 address, as upstream takes it.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_ipv4(text).map(IpAddr::V4);
    }
    let (head, tail) = text.rsplit_once(':')?;
    let address: Ipv6Addr = if tail.contains('.') {
        format!("{head}:{}", parse_ipv4(tail)?).parse().ok()?
    } else {
        text.parse().ok()?
    };
    Some(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4))
}

/// The prefix that `text` stands for. White space around it is ignored and host bits may be set (S104).
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    if !is_decimal(length) {
        return None;
    }
    IpNet::new(parse_ip(address)?, length.parse().ok()?).ok()
}

fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parse_octet(parts.next()?)?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

fn parse_octet(text: &str) -> Option<u8> {
    if !is_decimal(text) {
        return None;
    }
    match text.trim_start_matches('0') {
        "" => Some(0),
        digits => digits.parse().ok(),
    }
}

/// `str::parse` alone would take a sign.
fn is_decimal(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn leading_zeros_are_decimal() {
        for (text, expected) in [
            ("10.0.0.011", "10.0.0.11"),
            ("010.000.00.1", "10.0.0.1"),
            ("192.168.0.100", "192.168.0.100"),
            ("fd00::1", "fd00::1"),
            ("64:ff9b::010.0.0.1", "64:ff9b::a00:1"),
            ("::ffff:10.0.0.011", "10.0.0.11"),
        ] {
            assert_eq!(parse_ip(text), Some(expected.parse().unwrap()), "{text}");
        }
        assert_eq!(parse_cidr("10.0.011.0/24"), Some("10.0.11.0/24".parse().unwrap()));
        assert_eq!(parse_cidr(" 10.1.2.3/8 "), Some("10.1.2.3/8".parse().unwrap()));
        assert_eq!(parse_cidr("fd00::/064"), Some("fd00::/64".parse().unwrap()));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            ".",
            "10.0.0",
            "10.0.0.1.",
            "10.0.0.256",
            "10.0.0.+1",
            "10.0.0.0x1",
            " 10.0.0.1",
            "None",
            "fd00::1%eth0",
            ":",
            "1::2::3",
            "10.0.0.1:80",
        ] {
            assert_eq!(parse_ip(text), None, "{text}");
        }
        for text in [
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "/8",
            "fd00::/129",
            "10.0.0.0/8/8",
        ] {
            assert_eq!(parse_cidr(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_the_standard_library_writes_is_read_back(ip: IpAddr) {
            let mapped = match ip {
                IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
                IpAddr::V4(_) => ip,
            };
            prop_assert_eq!(parse_ip(&ip.to_string()), Some(mapped));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = parse_ip(&text);
            let _ = parse_cidr(&text);
        }
    }
}
