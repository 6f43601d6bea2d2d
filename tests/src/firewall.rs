//! Rules of netfilter in a namespace, as a CNI plugin or an administrator would have them. Needs `nft`.

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::process;

/// Loads rules in nft's own language.
pub fn load(netns: &Netns, rules: &str) -> Result<()> {
    process::run_with_input(netns.command("nft").args(["-f", "-"]), rules)
        .with_context(|| format!("the Debian package nftables is needed; loading\n{rules}"))?;
    Ok(())
}

/// Packets that a named counter of table `inet test` has seen.
pub fn packets(netns: &Netns, counter: &str) -> Result<u64> {
    let listed = process::run(netns.command("nft").args(["list", "counter", "inet", "test", counter]))?;
    let mut words = listed.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    let number = words
        .next()
        .with_context(|| format!("no number of packets in {listed:?}"))?;
    Ok(number.parse()?)
}
