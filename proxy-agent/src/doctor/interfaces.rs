//! The options that choose interfaces, held against those that are there.

use super::Check;
use crate::datapath::doubts::{self, Doubt};
use crate::datapath::{Options, PodDetection, probe};
use crate::netlink::{LinkInfo, Network};
use crate::{run, verify};

const CHECK: &str = "interfaces";
const XDP: &str = "XDP";

pub(super) fn checks(options: &Options) -> Vec<Check> {
    match run::block_on(verify::network()) {
        Ok(network) => judge(options, &network),
        Err(error) => vec![Check::fail(
            CHECK,
            format!("{error:#}"),
            "see that rtnetlink may be used here",
        )],
    }
}

fn judge(options: &Options, network: &Network) -> Vec<Check> {
    let chosen = network
        .links
        .values()
        .filter(|info| options.interfaces.accepts_link(info));
    let mut checks = vec![match doubts::interfaces(&options.interfaces, network) {
        None => Check::ok(CHECK, format!("{} carry the programs", chosen.count())),
        Some(Doubt { found, remedy }) => Check::fail(CHECK, found, remedy),
    }];
    checks.extend(xdp(options, network));
    if matches!(options.pods, PodDetection::Bridge(_) | PodDetection::InterfacePrefix(_)) {
        let check = "interfaces of pods";
        checks.push(match doubts::pods_of(&options.pods, network) {
            None => Check::ok(check, "are there"),
            Some(Doubt { found, remedy }) => Check::warn(check, found, remedy),
        });
    }
    checks
}

/// The cards that are to forward at XDP, and what they have. Whether a driver has XDP is only seen when an agent attaches to it.
fn xdp(options: &Options, network: &Network) -> Vec<Check> {
    if options.xdp.interfaces.is_none() {
        return Vec::new();
    }
    if let Some(Doubt { found, remedy }) = doubts::xdp_interfaces(&options.interfaces, &options.xdp, network) {
        return vec![Check::warn(XDP, found, remedy)];
    }
    let chosen = |info: &&LinkInfo| options.interfaces.accepts_link(info) && options.xdp.accepts(info);
    let judge = |info: &LinkInfo| {
        let name = &info.name;
        match info.xdp {
            None => Check::ok(
                XDP,
                format!("{name} has no XDP program: an agent attaches one, if the driver can"),
            ),
            Some(program) if probe::is_our_xdp(program.id) => {
                let place = if program.generic { "generic" } else { "native" };
                Check::ok(XDP, format!("{name} forwards ({place})"))
            }
            Some(program) => Check::warn(
                XDP,
                format!(
                    "{name} has somebody else's XDP program ({}): tc forwards alone",
                    program.id
                ),
                "remove the other program, or leave the interface out of --xdp-interfaces",
            ),
        }
    };
    network.links.values().filter(chosen).map(judge).collect()
}
