//! What the programs need to know of the node and the cluster that may change while they run: the one value of `SETTINGS4/6`.
//! Written by the agent, read for packets that no entry of the rewrite table translates.
//!
//! What must stay true: a connection that has its entries goes on in every mode.

use crate::addr::{Address, Port};

/// Service networks per family; a cluster starts with one.
pub const NETWORKS: usize = 8;

/// New connections to services are served. Zero, so that a map nobody has written yet serves too.
pub const MODE_SERVE: u32 = 0;
/// They have to wait: what would open one is dropped, and the client's next try a second later comes to the maps that take over.
pub const MODE_HOLD: u32 = 1;
/// They are left to another proxy of this node, or to nobody until every interface has its programs: nothing new is translated or
/// refused.
pub const MODE_DRAIN: u32 = 2;

/// An address prefix. All zero: there is none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefix<A> {
    /// Network address, host bits zero.
    pub addr: A,
    /// Network mask.
    pub mask: A,
    /// 1 if the prefix is set.
    pub set: u32,
}

crate::pod_for_both_families!(Prefix, v4: 12, v6: 36);

impl<A: Address> Prefix<A> {
    /// Is the address in the prefix?
    #[inline(always)]
    pub fn contains(&self, addr: &A) -> bool {
        self.set != 0 && addr.is_in(&self.addr, &self.mask)
    }
}

/// See the module. All zero: nothing is known.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings<A> {
    /// Addresses of pods; a source in it is a pod (S114 ClusterCIDR and NodeCIDR, S108).
    pub pods: Prefix<A>,
    /// Networks from which cluster IPs are taken (S78); unused ones follow the used ones.
    pub networks: [Prefix<A>; NETWORKS],
    /// Every node port of a service is between these, the first and the last included. Zero: there is none.
    pub node_ports: [Port; 2],
    /// What becomes of new connections: [`MODE_SERVE`], [`MODE_HOLD`] or [`MODE_DRAIN`].
    pub mode: u32,
}

crate::pod_for_both_families!(Settings, v4: 116, v6: 332);

impl<A: Address> Settings<A> {
    /// Is the address in a service network?
    #[inline(always)]
    pub fn is_service(&self, addr: &A) -> bool {
        let mut i = 0;
        while i < NETWORKS {
            let network = &self.networks[i];
            if network.set == 0 {
                return false;
            }
            if network.contains(addr) {
                return true;
            }
            i += 1;
        }
        false
    }

    /// May a cluster IP have the address? Where no service network is known, any address may be one.
    #[inline(always)]
    pub fn may_be_service(&self, addr: &A) -> bool {
        self.networks[0].set == 0 || self.is_service(addr)
    }

    /// May the port be a node port?
    #[inline(always)]
    pub fn may_be_node_port(&self, port: Port) -> bool {
        let [first, last] = self.node_ports;
        first.get() <= port.get() && port.get() <= last.get()
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;
    use crate::addr::Addr4;

    fn network(addr: [u8; 4], mask: [u8; 4]) -> Prefix<Addr4> {
        Prefix {
            addr: Addr4(addr),
            mask: Addr4(mask),
            set: 1,
        }
    }

    #[test]
    fn service_networks() {
        let mut settings = Settings::<Addr4>::zeroed();
        assert!(!settings.is_service(&Addr4([10, 96, 0, 1])));
        assert!(settings.may_be_service(&Addr4([10, 96, 0, 1])), "none is known");
        settings.networks[0] = network([10, 96, 0, 0], [255, 255, 0, 0]);
        settings.networks[1] = network([10, 112, 0, 0], [255, 255, 255, 0]);
        for (addr, expected) in [
            ([10, 96, 255, 1], true),
            ([10, 112, 0, 9], true),
            ([10, 112, 1, 9], false),
        ] {
            assert_eq!(settings.is_service(&Addr4(addr)), expected, "{addr:?}");
            assert_eq!(settings.may_be_service(&Addr4(addr)), expected, "{addr:?}");
        }
    }

    #[test]
    fn node_ports() {
        let mut settings = Settings::<Addr4>::zeroed();
        assert!(!settings.may_be_node_port(Port::new(30_000)));
        settings.node_ports = [Port::new(30_000), Port::new(30_080)];
        for (port, expected) in [(29_999, false), (30_000, true), (30_080, true), (30_081, false)] {
            assert_eq!(settings.may_be_node_port(Port::new(port)), expected, "{port}");
        }
    }
}
