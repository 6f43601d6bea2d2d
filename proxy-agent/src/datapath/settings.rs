//! What the programs are told of the node and the cluster beside services and interfaces: `SETTINGS4/6`. The datapath collects what
//! is wanted and calls [`NodeSettings::flush`], which writes what differs and may be called again after a failure.

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address, Port};
use proxy_common::frontend::FrontendKey;
use proxy_common::names;
use proxy_common::settings::{MODE_DRAIN, MODE_SERVE, NETWORKS, Prefix, Settings};

use super::error::TableError;
use super::sync::SyncReport;
use super::tables::{FamilyTables, Tables};
use crate::plan::{FamilyPlan, ServicePortPlan};

/// Both families' settings.
pub(super) struct NodeSettings {
    v4: FamilySettings<Addr4>,
    v6: FamilySettings<Addr6>,
}

struct FamilySettings<A> {
    wanted: Settings<A>,
    held: Settings<A>,
}

impl NodeSettings {
    /// Takes over what the kernel has, and the node ports of these frontends.
    pub(super) fn adopt<'f>(
        tables: &impl Tables,
        frontends4: impl Iterator<Item = &'f FrontendKey<Addr4>>,
        frontends6: impl Iterator<Item = &'f FrontendKey<Addr6>>,
    ) -> Result<Self, TableError> {
        Ok(Self {
            v4: FamilySettings::adopt(tables, frontends4)?,
            v6: FamilySettings::adopt(tables, frontends6)?,
        })
    }

    /// Leaves new connections alone until [`Self::serve`], unless a former agent's programs serve them already. While some interfaces
    /// have programs and others have not, a connection would be translated on one way only.
    pub(super) fn wait_for_interfaces(&mut self, tables: &impl Tables) -> Result<(), TableError> {
        let is_new = tables.links()?.is_empty();
        for (mode, held) in [
            (&mut self.v4.wanted.mode, self.v4.held.mode),
            (&mut self.v6.wanted.mode, self.v6.held.mode),
        ] {
            if is_new || held == MODE_DRAIN {
                *mode = MODE_DRAIN;
            }
        }
        Ok(())
    }

    /// New connections are served.
    pub(super) fn serve(&mut self) {
        (self.v4.wanted.mode, self.v6.wanted.mode) = (MODE_SERVE, MODE_SERVE);
    }

    /// A source in one of these is a pod: the first prefix of each family counts.
    pub(super) fn set_pods(&mut self, prefixes: &[IpNet]) {
        self.v4.wanted.pods = of_family(prefixes).next().unwrap_or_else(bytemuck::Zeroable::zeroed);
        self.v6.wanted.pods = of_family(prefixes).next().unwrap_or_else(bytemuck::Zeroable::zeroed);
    }

    /// Cluster IPs are taken from these networks.
    pub(super) fn set_networks(&mut self, networks: &[IpNet]) {
        self.v4.set_networks(networks);
        self.v6.set_networks(networks);
    }

    /// The node ports of a plan are about to be written.
    pub(super) fn reckon_with(&mut self, plan: &ServicePortPlan) {
        self.v4.reckon_with(&plan.v4);
        self.v6.reckon_with(&plan.v6);
    }

    /// What the kernel holds may not be what was written.
    pub(super) fn read_back(&mut self, tables: &impl Tables) -> Result<(), TableError> {
        self.v4.held = tables.settings()?;
        self.v6.held = tables.settings()?;
        Ok(())
    }

    /// Writes what differs.
    pub(super) fn flush(&mut self, tables: &mut impl Tables, report: &mut SyncReport) {
        self.v4.flush(tables, report);
        self.v6.flush(tables, report);
    }
}

impl<A: Address> FamilySettings<A> {
    fn adopt<'f>(
        tables: &impl FamilyTables<A>,
        frontends: impl Iterator<Item = &'f FrontendKey<A>>,
    ) -> Result<Self, TableError>
    where
        A: 'f,
    {
        let held = tables.settings()?;
        let mut settings = Self { wanted: held, held };
        settings.wanted.node_ports = bytemuck::Zeroable::zeroed();
        // An agent that ended while connections were held or left to another proxy ended in the middle of something.
        settings.wanted.mode = MODE_SERVE;
        for key in frontends.filter(|key| key.addr == A::zeroed()) {
            settings.widen(key.port);
        }
        Ok(settings)
    }

    fn set_networks(&mut self, networks: &[IpNet]) {
        let networks: Vec<Prefix<A>> = of_family(networks).collect();
        let mut slots = [bytemuck::Zeroable::zeroed(); NETWORKS];
        if networks.len() <= NETWORKS {
            slots[..networks.len()].copy_from_slice(&networks);
        } else {
            // A part of them would say of the others that they are none. Without any, nothing is taken for unallocated.
            let (family, count) = (A::FAMILY, networks.len());
            tracing::warn!(
                family,
                count,
                room = NETWORKS,
                "too many service networks: addresses of them that no Service has are left to routing"
            );
        }
        self.wanted.networks = slots;
    }

    fn reckon_with(&mut self, plan: &FamilyPlan<A>) {
        for frontend in plan.frontends.iter().filter(|frontend| frontend.addr == A::zeroed()) {
            self.widen(frontend.port);
        }
    }

    /// A range that is too wide costs a look-up here and there, so it never shrinks while the agent runs.
    fn widen(&mut self, port: Port) {
        let [first, last] = &mut self.wanted.node_ports;
        if first.get() == 0 || port.get() < first.get() {
            *first = port;
        }
        if port.get() > last.get() {
            *last = port;
        }
    }

    fn flush(&mut self, tables: &mut impl FamilyTables<A>, report: &mut SyncReport) {
        if self.wanted == self.held {
            return;
        }
        // The programs may read while the kernel copies. So a prefix that becomes another one is none in between.
        let between = Settings {
            pods: kept(self.held.pods, self.wanted.pods),
            networks: std::array::from_fn(|i| kept(self.held.networks[i], self.wanted.networks[i])),
            node_ports: self.wanted.node_ports,
            mode: self.wanted.mode,
        };
        for step in [between, self.wanted] {
            if let Err(error) = tables.set_settings(&step) {
                return report.fail(names::for_family::<A>(names::SETTINGS), error);
            }
            self.held = step;
            report.written += 1;
        }
    }
}

fn kept<A: Address>(held: Prefix<A>, wanted: Prefix<A>) -> Prefix<A> {
    if held == wanted {
        held
    } else {
        bytemuck::Zeroable::zeroed()
    }
}

/// The prefixes of a family, in wire order.
fn of_family<A: Address>(prefixes: &[IpNet]) -> impl Iterator<Item = Prefix<A>> {
    prefixes.iter().filter_map(|net| {
        Some(Prefix {
            addr: A::from_ip(net.network())?,
            mask: A::from_ip(net.netmask())?,
            set: 1,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::memory::MemoryTables;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_differs_is_written() {
        let mut tables = MemoryTables::new(8);
        let mut settings = NodeSettings::adopt(&tables, [].iter(), [].iter()).unwrap();
        settings.set_networks(&nets(&["10.96.0.0/16", "fd00:96::/112", "10.112.0.0/24"]));
        settings.set_pods(&nets(&["10.244.0.0/16"]));
        let mut report = SyncReport::default();
        settings.flush(&mut tables, &mut report);
        assert!(tables.v4.settings.is_service(&Addr4([10, 96, 3, 4])));
        assert!(tables.v4.settings.is_service(&Addr4([10, 112, 0, 4])));
        assert!(tables.v4.settings.pods.contains(&Addr4([10, 244, 3, 4])));
        assert_eq!(tables.v6.settings.networks[0].set, 1);
        assert_eq!(tables.v6.settings.pods.set, 0, "S115");
        let written = tables.writes.done();
        settings.flush(&mut tables, &mut report);
        assert_eq!(tables.writes.done(), written, "nothing new");

        tables.writes.fail_at(Some(written + 1));
        settings.set_networks(&nets(&["10.112.0.0/24"]));
        settings.flush(&mut tables, &mut report);
        assert_eq!(report.failed.len(), 1);
        assert_eq!(
            tables.v4.settings.networks[0].set, 0,
            "neither the old network nor the new one"
        );
        settings.flush(&mut tables, &mut report);
        assert!(tables.v4.settings.is_service(&Addr4([10, 112, 0, 4])));
        assert!(!tables.v4.settings.is_service(&Addr4([10, 96, 0, 4])));
    }

    #[test]
    fn too_many_networks_are_as_good_as_none() {
        let mut tables = MemoryTables::new(8);
        let mut settings = NodeSettings::adopt(&tables, [].iter(), [].iter()).unwrap();
        let many: Vec<IpNet> = (0..=NETWORKS)
            .map(|i| format!("10.{i}.0.0/16").parse().unwrap())
            .collect();
        settings.set_networks(&many);
        settings.flush(&mut tables, &mut SyncReport::default());
        assert!(tables.v4.settings.may_be_service(&Addr4([192, 0, 2, 1])));
    }

    #[test]
    fn node_ports_of_former_frontends_are_expected() {
        let mut tables = MemoryTables::new(8);
        let key = |addr, port| FrontendKey::new(Addr4(addr), Port::new(port), 6);
        let frontends = [key([0; 4], 30_500), key([10, 96, 0, 1], 80), key([0; 4], 30_100)];
        let mut settings = NodeSettings::adopt(&tables, frontends.iter(), [].iter()).unwrap();
        settings.flush(&mut tables, &mut SyncReport::default());
        assert_eq!(tables.v4.settings.node_ports, [Port::new(30_100), Port::new(30_500)]);
    }
}
