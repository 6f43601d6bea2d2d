//! Service ports whose Local policy leaves this node without an endpoint although there are some elsewhere (S189): counted for the
//! metrics, Service by Service as they are planned.

use std::ops::{AddAssign, SubAssign};

use proxy_common::addr::Address;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_LOCAL};

use super::{FamilyPlan, ServicePortPlan};

/// A number of service ports, by family (IPv4, IPv6) and by the policy that is to blame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NoLocal {
    /// `internalTrafficPolicy`.
    pub internal: [u32; 2],
    /// `externalTrafficPolicy`.
    pub external: [u32; 2],
}

impl NoLocal {
    /// One service port.
    pub fn of(plan: &ServicePortPlan) -> Self {
        let [v4, v6] = [of_family(&plan.v4), of_family(&plan.v6)];
        Self {
            internal: [v4.0, v6.0].map(u32::from),
            external: [v4.1, v6.1].map(u32::from),
        }
    }
}

fn of_family<A: Address>(plan: &FamilyPlan<A>) -> (bool, bool) {
    if !plan.has_endpoints || !plan.local.selectable.is_empty() {
        return (false, false);
    }
    let has = |is_internal| {
        let mut local = plan.frontends.iter().filter(|f| f.flags & FRONTEND_LOCAL != 0);
        local.any(|frontend| (frontend.flags & FRONTEND_CLUSTER_IP != 0) == is_internal)
    };
    (has(true), has(false))
}

impl AddAssign for NoLocal {
    fn add_assign(&mut self, other: Self) {
        for family in 0..2 {
            self.internal[family] += other.internal[family];
            self.external[family] += other.external[family];
        }
    }
}

impl SubAssign for NoLocal {
    fn sub_assign(&mut self, other: Self) {
        for family in 0..2 {
            self.internal[family] -= other.internal[family];
            self.external[family] -= other.external[family];
        }
    }
}
