//! Names for service ids: the value of `SERVICES`, so that tools and people can name what they see in the other maps, and so
//! that a restarted agent adopts the ids of its predecessor. Written by the agent, never read by a program.

use bytemuck::{Pod, Zeroable};

/// Bytes kept of each name. DNS labels (RFC 1123) have at most 63, so nothing is cut.
pub const NAME_LEN: usize = if cfg!(feature = "next-layout") { 96 } else { 64 };

/// A service port: namespace, name, port name and protocol. Names are UTF-8, padded with zeros.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Pod, Zeroable)]
pub struct ServiceInfo {
    /// Namespace of the Service.
    pub namespace: [u8; NAME_LEN],
    /// Name of the Service.
    pub name: [u8; NAME_LEN],
    /// Name of the port, empty for an unnamed one.
    pub port_name: [u8; NAME_LEN],
    /// IANA protocol number.
    pub protocol: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

const _: () = assert!(size_of::<ServiceInfo>() == 3 * NAME_LEN + 4);

/// `name` padded with zeros, or `None` if it is longer than a name may be.
pub fn encode_name(name: &str) -> Option<[u8; NAME_LEN]> {
    let mut bytes = [0; NAME_LEN];
    bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    Some(bytes)
}

/// The text of a padded name; empty if the bytes are not UTF-8.
pub fn decode_name(bytes: &[u8; NAME_LEN]) -> &str {
    let len = bytes.iter().position(|b| *b == 0).unwrap_or(NAME_LEN);
    bytes
        .get(..len)
        .and_then(|text| core::str::from_utf8(text).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        assert_eq!(decode_name(&encode_name("kube-dns").unwrap()), "kube-dns");
        assert_eq!(encode_name(&"x".repeat(65)), None);
        assert_eq!(decode_name(&encode_name(&"x".repeat(64)).unwrap()), "x".repeat(64));
    }
}
