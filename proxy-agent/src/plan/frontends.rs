//! The addresses and ports under which clients may dial a service port: its cluster IP of each family (S16). Every further kind
//! of frontend is one more block in [`frontends`].

use proxy_common::addr::Address;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_LOCAL};

use super::FrontendPlan;
use crate::model::{Service, ServicePort};

/// The frontends of one port in one family.
pub fn frontends<A: Address>(service: &Service, port: &ServicePort) -> Vec<FrontendPlan<A>> {
    let mut frontends = Vec::new();
    if let Some(addr) = service.cluster_ip::<A>() {
        let policy = if service.internal_local { FRONTEND_LOCAL } else { 0 };
        frontends.push(FrontendPlan {
            addr,
            port: port.port,
            flags: FRONTEND_CLUSTER_IP | policy,
        });
    }
    frontends
}

/// Does some frontend choose from the local set (S56)?
pub fn uses_local<A>(frontends: &[FrontendPlan<A>]) -> bool {
    frontends.iter().any(|frontend| frontend.flags & FRONTEND_LOCAL != 0)
}
