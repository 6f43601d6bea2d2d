//! Options that fit no interface of this node. Nothing fails then, and yet services are not served, or pods are taken for strangers. A
//! running agent says so when it begins to be so ([`super::links`]), and `doctor` at any time.

use super::options::{InterfaceFilter, PodDetection, XdpOptions};
use crate::netlink::{LinkInfo, Network};

/// So many names are told.
const TOLD: usize = 8;

/// What does not fit, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Doubt {
    pub(crate) found: String,
    pub(crate) remedy: String,
}

/// Everything that is doubtful.
pub(super) fn all(filter: &InterfaceFilter, xdp: &XdpOptions, pods: &PodDetection, network: &Network) -> Vec<Doubt> {
    interfaces(filter, network)
        .into_iter()
        .chain(xdp_interfaces(filter, xdp, network))
        .chain(pods_of(pods, network))
        .collect()
}

/// No interface carries the programs.
pub(crate) fn interfaces(filter: &InterfaceFilter, network: &Network) -> Option<Doubt> {
    if network.links.values().any(|info| filter.accepts_link(info)) {
        return None;
    }
    let options = ["--interfaces", "--exclude-interfaces"]
        .into_iter()
        .zip(filter.patterns());
    let options: Vec<String> = options
        .filter_map(|(option, pattern)| Some(format!("{option} {}", pattern?)))
        .collect();
    let options = if options.is_empty() {
        String::new()
    } else {
        format!(" by {}", options.join(" "))
    };
    Some(Doubt {
        found: format!(
            "no interface is chosen{options}: services are not served to anybody but the node's own sockets"
        ),
        remedy: format!(
            "choose among {}; a pattern has to match the whole name, as eth.* does",
            names(network)
        ),
    })
}

/// No interface gets XDP, though some should.
pub(crate) fn xdp_interfaces(filter: &InterfaceFilter, xdp: &XdpOptions, network: &Network) -> Option<Doubt> {
    let [pattern, _] = xdp.interfaces.as_ref()?.patterns();
    let is_chosen = |info: &LinkInfo| filter.accepts_link(info) && xdp.accepts(info);
    (!network.links.values().any(is_chosen)).then(|| Doubt {
        found: format!(
            "no interface is chosen by --xdp-interfaces {}: tc forwards alone",
            pattern.unwrap_or_default()
        ),
        remedy: format!(
            "choose among those that --interfaces takes and that have an Ethernet header: {}",
            names(network)
        ),
    })
}

/// No interface is one of pods.
pub(crate) fn pods_of(pods: &PodDetection, network: &Network) -> Option<Doubt> {
    let mut names_of_links = network.links.values().map(|info| info.name.as_str());
    let (is_there, what, option) = match pods {
        PodDetection::ClusterCidr(_) | PodDetection::NodeCidr => return None,
        PodDetection::Bridge(bridge) => (
            names_of_links.any(|name| name == bridge),
            format!("there is no bridge {bridge}"),
            "--pod-bridge-interface",
        ),
        PodDetection::InterfacePrefix(prefix) => (
            names_of_links.any(|name| name.starts_with(prefix.as_str())),
            format!("no interface begins with {prefix}"),
            "--pod-interface-name-prefix",
        ),
    };
    (!is_there).then(|| Doubt {
        found: format!("{what}: nobody is taken for a pod, and pods are masqueraded as others are"),
        remedy: format!(
            "choose {option} among {}; where the CNI makes interfaces with the first pod, this passes",
            names(network)
        ),
    })
}

fn names(network: &Network) -> String {
    let names: Vec<&str> = network
        .links
        .values()
        .filter(|info| !info.loopback)
        .map(|info| info.name.as_str())
        .collect();
    let more = if names.len() > TOLD { ", …" } else { "" };
    let names = &names[..names.len().min(TOLD)];
    if names.is_empty() {
        "interfaces other than loopback, of which there is none".to_owned()
    } else {
        format!("{}{more}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(names: &[&str]) -> Network {
        let link = |name: &&str| LinkInfo {
            name: (*name).to_owned(),
            loopback: *name == "lo",
            has_ethernet: true,
            ..LinkInfo::default()
        };
        Network {
            links: (1..).zip(names.iter().map(link)).collect(),
            ..Network::default()
        }
    }

    #[test]
    fn what_fits_no_interface_is_named() {
        let network = network(&["lo", "eth0", "cni0"]);
        let any = PodDetection::ClusterCidr(Vec::new());
        let off = XdpOptions::default();
        let filter = InterfaceFilter::new(Some("eth"), None).unwrap();
        let doubts = all(&filter, &off, &any, &network);
        assert!(doubts[0].found.contains("--interfaces eth:"), "{doubts:?}");
        assert!(doubts[0].remedy.contains("eth0, cni0"), "{doubts:?}");
        let filter = InterfaceFilter::new(Some("eth.*"), None).unwrap();
        assert!(all(&filter, &off, &any, &network).is_empty());
        for (pods, doubtful) in [
            (PodDetection::Bridge("cni0".into()), false),
            (PodDetection::Bridge("cni".into()), true),
            (PodDetection::InterfacePrefix("cni".into()), false),
            (PodDetection::InterfacePrefix("veth".into()), true),
            (PodDetection::NodeCidr, false),
        ] {
            assert_eq!(!all(&filter, &off, &pods, &network).is_empty(), doubtful, "{pods:?}");
        }
    }

    #[test]
    fn xdp_on_no_interface_is_doubtful() {
        let network = network(&["lo", "eth0", "wg0"]);
        let filter = InterfaceFilter::new(None, Some("eth1")).unwrap();
        for (pattern, doubtful) in [
            ("eth0", false),
            ("eth.*", false),
            ("eth", true),
            ("lo", true),
            ("eth1", true),
        ] {
            let xdp = XdpOptions {
                interfaces: Some(InterfaceFilter::new(Some(pattern), None).unwrap()),
                ..XdpOptions::default()
            };
            let doubt = xdp_interfaces(&filter, &xdp, &network);
            assert_eq!(doubt.is_some(), doubtful, "{pattern}");
        }
        assert_eq!(xdp_interfaces(&filter, &XdpOptions::default(), &network), None);
    }
}
