//! Addresses, ports and protocol numbers as they stand in packets and map keys: big-endian byte arrays inside newtypes, so that
//! a value of the wrong byte order cannot be written by accident. Used by every other module of this crate.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Addr4 {}
    impl Sealed for super::Addr6 {}
}

/// An address of one family; the type parameter of every layout that has an address in it. Sealed: there are two families.
pub trait Address:
    sealed::Sealed + Pod + Send + Sync + Eq + Ord + core::hash::Hash + fmt::Debug + fmt::Display + Into<IpAddr>
{
    /// `4` or `6`: the suffix of the family's map names.
    const FAMILY: u8;
    /// Bytes of an address.
    const LEN: usize;
    /// Bits of an address.
    const BITS: u8;
    /// The address if `ip` is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The address as big-endian bytes.
    fn octets(&self) -> &[u8];
    /// Ones'-complement sum of the address' 16-bit words, not folded (see [`crate::checksum`]).
    fn sum(&self) -> u32;
    /// Is the address in `network`, given the network's mask?
    fn is_in(&self, network: &Self, mask: &Self) -> bool;
    /// The address in the form that both families share: IPv4 as `::ffff:a.b.c.d`.
    fn mapped(&self) -> Addr6;
    /// Order of the addresses as big-endian numbers; the same as [`Ord`], in a form the BPF back end can compile.
    fn compare(&self, other: &Self) -> core::cmp::Ordering;
}

/// An IPv4 address in network order. Aligned to 4 so that the BPF back end copies it with one instruction.
#[repr(C, align(4))]
#[derive(Clone, Copy, Eq, PartialOrd, Ord, Pod, Zeroable, Default)]
pub struct Addr4(pub [u8; 4]);

/// An IPv6 address in network order. Aligned to 4 like its neighbours in the IPv6 header (which starts at a multiple of 4).
#[repr(C, align(4))]
#[derive(Clone, Copy, Eq, PartialOrd, Ord, Pod, Zeroable, Default)]
pub struct Addr6(pub [u8; 16]);

// Equality by words: the BPF back end compares byte arrays byte by byte, or calls a `memcmp` that does not exist there.
impl PartialEq for Addr4 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        bytemuck::cast::<Self, u32>(*self) == bytemuck::cast::<Self, u32>(*other)
    }
}

impl PartialEq for Addr6 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b): ([u32; 4], [u32; 4]) = (bytemuck::cast(*self), bytemuck::cast(*other));
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }
}

impl core::hash::Hash for Addr4 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl core::hash::Hash for Addr6 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Address for Addr4 {
    const FAMILY: u8 = 4;
    const LEN: usize = 4;
    const BITS: u8 = 32;

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn octets(&self) -> &[u8] {
        &self.0
    }

    #[inline(always)]
    fn sum(&self) -> u32 {
        let [a, b, c, d] = self.0;
        u32::from(u16::from_ne_bytes([a, b])) + u32::from(u16::from_ne_bytes([c, d]))
    }

    #[inline(always)]
    fn is_in(&self, network: &Self, mask: &Self) -> bool {
        let (addr, network, mask): (u32, u32, u32) =
            (bytemuck::cast(*self), bytemuck::cast(*network), bytemuck::cast(*mask));
        addr & mask == network
    }

    #[inline(always)]
    fn mapped(&self) -> Addr6 {
        let [a, b, c]: [u32; 3] = bytemuck::cast(MAPPED_PREFIX);
        bytemuck::cast([a, b, c, bytemuck::cast(*self)])
    }

    #[inline(always)]
    fn compare(&self, other: &Self) -> core::cmp::Ordering {
        u32::from_be_bytes(self.0).cmp(&u32::from_be_bytes(other.0))
    }
}

impl Address for Addr6 {
    const FAMILY: u8 = 6;
    const LEN: usize = 16;
    const BITS: u8 = 128;

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(ip.into()),
        }
    }

    fn octets(&self) -> &[u8] {
        &self.0
    }

    #[inline(always)]
    fn sum(&self) -> u32 {
        let words: [[u8; 2]; 8] = bytemuck::cast(self.0);
        let mut sum = 0;
        let mut i = 0;
        while i < 8 {
            sum += u32::from(u16::from_ne_bytes(words[i]));
            i += 1;
        }
        sum
    }

    #[inline(always)]
    fn is_in(&self, network: &Self, mask: &Self) -> bool {
        let (addr, network, mask): ([u32; 4], [u32; 4], [u32; 4]) =
            (bytemuck::cast(*self), bytemuck::cast(*network), bytemuck::cast(*mask));
        (addr[0] & mask[0] == network[0])
            & (addr[1] & mask[1] == network[1])
            & (addr[2] & mask[2] == network[2])
            & (addr[3] & mask[3] == network[3])
    }

    #[inline(always)]
    fn mapped(&self) -> Addr6 {
        *self
    }

    #[inline(always)]
    fn compare(&self, other: &Self) -> core::cmp::Ordering {
        let (a, b): ([u32; 4], [u32; 4]) = (bytemuck::cast(*self), bytemuck::cast(*other));
        let mut i = 0;
        while i < 3 && a[i] == b[i] {
            i += 1;
        }
        u32::from_be(a[i]).cmp(&u32::from_be(b[i]))
    }
}

/// The first twelve bytes of an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2), `::ffff:0:0/96`.
pub const MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

impl From<Ipv4Addr> for Addr4 {
    fn from(ip: Ipv4Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<Addr4> for IpAddr {
    fn from(addr: Addr4) -> Self {
        Self::V4(Ipv4Addr::from(addr.0))
    }
}

impl From<Ipv6Addr> for Addr6 {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<Addr6> for IpAddr {
    fn from(addr: Addr6) -> Self {
        Self::V6(Ipv6Addr::from(addr.0))
    }
}

impl fmt::Display for Addr4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv4Addr::from(self.0), f)
    }
}

impl fmt::Debug for Addr4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Addr6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ipv6Addr::from(self.0), f)
    }
}

impl fmt::Debug for Addr6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An L4 port in network order.
#[repr(C, align(2))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable, Default)]
pub struct Port(pub [u8; 2]);

impl Port {
    /// The port from a number in host order.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be_bytes())
    }

    /// The port as a number in host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }

    /// The port as one word of a ones'-complement sum.
    #[inline(always)]
    pub const fn sum(self) -> u32 {
        u16::from_ne_bytes(self.0) as u32
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.get(), f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// L4 protocols a Service may name (S25), with their IANA numbers; map keys hold the number as `u8`.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp = 6,
    /// User Datagram Protocol.
    Udp = 17,
    /// Stream Control Transmission Protocol.
    Sctp = 132,
}

impl Protocol {
    /// The protocol of an IANA number, if it is one that a Service may name.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The IANA number.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_wire() {
        assert_eq!(Addr4::from(Ipv4Addr::new(10, 96, 0, 10)).0, [10, 96, 0, 10]);
        assert_eq!(Port::new(8080).0, [0x1f, 0x90]);
        assert_eq!(Port::new(8080).get(), 8080);
        let v6: Ipv6Addr = "fd00:96::a".parse().unwrap();
        assert_eq!(Addr6::from(v6).octets(), v6.octets());
    }

    proptest::proptest! {
        #[test]
        fn compare_is_the_order_of_the_bytes(a: [u8; 16], b: [u8; 16], same in 0usize..16) {
            let mut b = b;
            b[..same].copy_from_slice(&a[..same]);
            proptest::prop_assert_eq!(Addr6(a).compare(&Addr6(b)), a.cmp(&b));
            proptest::prop_assert_eq!(Addr6(a) == Addr6(b), a == b);
            let (a4, b4): ([u8; 4], [u8; 4]) = (a[..4].try_into().unwrap(), b[..4].try_into().unwrap());
            proptest::prop_assert_eq!(Addr4(a4).compare(&Addr4(b4)), a4.cmp(&b4));
        }
    }

    #[test]
    fn prefixes_contain_their_addresses() {
        let parse = |ip: &str| Addr4::from(ip.parse::<Ipv4Addr>().unwrap());
        assert!(parse("10.244.3.9").is_in(&parse("10.244.0.0"), &parse("255.255.0.0")));
        assert!(!parse("10.245.3.9").is_in(&parse("10.244.0.0"), &parse("255.255.0.0")));
        let parse = |ip: &str| Addr6::from(ip.parse::<Ipv6Addr>().unwrap());
        assert!(parse("fd00:10::9").is_in(&parse("fd00:10::"), &parse("ffff:ffff:ffff:ffff::")));
        assert!(!parse("fd00:10:0:1::9").is_in(&parse("fd00:10::"), &parse("ffff:ffff:ffff:ffff::")));
    }

    #[test]
    fn families_share_a_form() {
        let [v4, v6]: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "::ffff:10.0.0.1".parse().unwrap()];
        assert_eq!(Some(Addr4::from_ip(v4).unwrap().mapped()), Addr6::from_ip(v6));
        let v6 = Addr6([7; 16]);
        assert_eq!(v6.mapped(), v6);
    }

    #[test]
    fn families_do_not_mix() {
        assert_eq!(Addr4::from_ip("fd00::1".parse().unwrap()), None);
        assert_eq!(Addr6::from_ip("10.0.0.1".parse().unwrap()), None);
    }
}
