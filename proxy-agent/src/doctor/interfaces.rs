//! The options that choose interfaces, held against those that are there.

use super::Check;
use crate::datapath::doubts::{self, Doubt};
use crate::datapath::{Options, PodDetection};
use crate::netlink::Network;
use crate::{run, verify};

const CHECK: &str = "interfaces";

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
    if matches!(options.pods, PodDetection::Bridge(_) | PodDetection::InterfacePrefix(_)) {
        let check = "interfaces of pods";
        checks.push(match doubts::pods_of(&options.pods, network) {
            None => Check::ok(check, "are there"),
            Some(Doubt { found, remedy }) => Check::warn(check, found, remedy),
        });
    }
    checks
}
