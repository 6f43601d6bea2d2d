//! From a document to a configuration: every value is checked, and defaults are filled in. Pure but for the host's name and the
//! directories that have to exist.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use axum::http::Uri;
use clap::ValueEnum;
use ipnet::IpNet;

use super::document::Document;
use super::times::{self, Section};
use super::words::{AttachArg, BpfLogLevelArg, DetectLocalModeArg, ModeArg, SocketLbArg, XdpModeArg};
use super::{ApiServer, ConfigError, DEFAULT_BPF_DIR, Origin, Rate, Remarks, RunConfig, SourceConfig};
use crate::datapath::{Capacities, InterfaceFilter, NodePortAddresses, Options, PodDetection, XdpOptions};
use crate::gates::FeatureGates;
use crate::model::address::{parse_cidr, parse_ip};

/// What the kernel takes as the name of an interface.
const LONGEST_INTERFACE_NAME: usize = 15;
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// kube-proxy's, for whichever of the two is not given.
const DEFAULT_RATE: Rate = Rate { qps: 5.0, burst: 10 };

/// A text that says something.
fn said(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.trim().is_empty())
}

/// Checks a document.
pub(super) fn check(document: &Document, origin: &Origin, remarks: &mut Remarks) -> Result<RunConfig, ConfigError> {
    let ebpf = &document.ebpf;
    let mode = mode(document, origin, remarks)?;
    let section = Section::of(document, mode);
    let node_ip = node_ip(document, origin)?;
    let is_ipv6 = said(&document.bind_address).is_some_and(|text| text.contains(':'));
    let (any, own) = if is_ipv6 {
        (IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::LOCALHOST))
    } else {
        (IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::LOCALHOST))
    };
    let bind = |is_served: Option<bool>, field, text, default| {
        if is_served == Some(false) {
            return Ok(None);
        }
        bind_address(origin, field, text, default).map(Some)
    };
    Ok(RunConfig {
        node_name: node_name(origin, said(&document.hostname_override))?.into(),
        node_ip,
        source: source(document, origin)?,
        service_proxy_name: proxy_name(document, origin)?.map(Into::into),
        gates: gates(document, remarks),
        datapath: Options {
            bpf_dir: said(&ebpf.bpf_dir).unwrap_or(DEFAULT_BPF_DIR).into(),
            cgroup: directory(origin, "ebpf.cgroup", &ebpf.cgroup)?,
            socket_lb: choice(origin, "ebpf.socketLB", &ebpf.socket_lb, SocketLbArg::Host)?.into(),
            pods: pods(document, origin)?,
            interfaces: interfaces(document, origin)?,
            node_port_addresses: NodePortAddresses {
                loopback_allowed: ebpf
                    .localhost_node_ports
                    .or(section.localhost_node_ports)
                    .unwrap_or(true),
                ..node_port_addresses(document, origin, mode)?
            },
            masquerade_all: ebpf.masquerade_all.or(section.masquerade_all).unwrap_or(false),
            attach: choice(origin, "ebpf.attach", &ebpf.attach, AttachArg::Auto)?.into(),
            xdp: xdp(document, origin)?,
            log_level: choice(origin, "ebpf.bpfLogLevel", &ebpf.bpf_log_level, BpfLogLevelArg::Off)?.into(),
            service_metrics: ebpf.service_metrics.unwrap_or(true),
            capacities: capacities(document, origin)?,
            timeouts: times::timeouts(&document.conntrack, origin)?,
        },
        healthz: bind(
            ebpf.serve_healthz,
            "healthzBindAddress",
            &document.healthz_bind_address,
            (any, HEALTHZ_PORT),
        )?,
        metrics: bind(
            ebpf.serve_metrics,
            "metricsBindAddress",
            &document.metrics_bind_address,
            (own, METRICS_PORT),
        )?,
        bind_address_hard_fail: document.bind_address_hard_fail.unwrap_or(false),
        intervals: times::intervals(ebpf, &section, origin)?,
        verbosity: document.logging.verbosity.unwrap_or(0),
    })
}

/// One of the words of a kind; `default` if none is said.
fn choice<T: ValueEnum>(origin: &Origin, field: &str, text: &Option<String>, default: T) -> Result<T, ConfigError> {
    let Some(text) = said(text) else {
        return Ok(default);
    };
    T::from_str(text, false).map_err(|_| {
        let words = T::value_variants()
            .iter()
            .filter_map(|word| Some(word.to_possible_value()?.get_name().to_owned()));
        let remedy = format!("write {}", words.collect::<Vec<_>>().join(", "));
        origin.error(field, text, "is not a word that is known", remedy)
    })
}

/// There is one way of ours to do what kube-proxy's modes do.
fn mode(document: &Document, origin: &Origin, remarks: &mut Remarks) -> Result<ModeArg, ConfigError> {
    let mode = choice(origin, "mode", &document.mode, ModeArg::Ebpf)?;
    if mode != ModeArg::Ebpf {
        let (place, name) = (origin.place("mode"), document.mode.as_deref().unwrap_or_default());
        let warning = format!(
            "{place} {name:?}: this program forwards with eBPF all the same; the settings of {name} that mean something here are used"
        );
        remarks.warnings.push(warning);
    }
    Ok(mode)
}

/// S184: unspecified is as good as not given.
fn node_ip(document: &Document, origin: &Origin) -> Result<Option<IpAddr>, ConfigError> {
    let Some(text) = said(&document.bind_address) else {
        return Ok(None);
    };
    let remedy = "write an IP address of this node, or 0.0.0.0 or :: for that of its Node object";
    let ip = parse_ip(text.trim()).ok_or_else(|| origin.error("bindAddress", text, "is not an address", remedy))?;
    Ok(Some(ip).filter(|ip| !ip.is_unspecified()))
}

/// The given name, else the host's, lower-cased and trimmed (S172).
fn node_name(origin: &Origin, given: Option<&str>) -> Result<String, ConfigError> {
    const FIELD: &str = "hostnameOverride";
    const REMEDY: &str = "give the name of this node's Node object with --node-name";
    let name = match given {
        Some(given) => given.to_owned(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|reason| {
            let problem = format!("the host's name cannot be read ({reason})");
            origin.error(FIELD, "", &problem, REMEDY)
        })?,
    };
    match name.trim().to_lowercase() {
        name if name.is_empty() => Err(origin.error(FIELD, "", "the host has no name", REMEDY)),
        name => Ok(name),
    }
}

/// A label's value, which Kubernetes would not take otherwise.
fn proxy_name<'d>(document: &'d Document, origin: &Origin) -> Result<Option<&'d str>, ConfigError> {
    const LONGEST: usize = 63;
    let Some(name) = said(&document.ebpf.service_proxy_name) else {
        return Ok(None);
    };
    let is_end = |letter: Option<u8>| letter.is_some_and(|letter| letter.is_ascii_alphanumeric());
    let is_inside = |letter: u8| letter.is_ascii_alphanumeric() || b"-_.".contains(&letter);
    let bytes = name.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    if ends.into_iter().all(|letter| is_end(letter.copied())) && bytes.len() <= LONGEST && name.bytes().all(is_inside) {
        return Ok(Some(name));
    }
    let remedy = "write the value of the label service.kubernetes.io/service-proxy-name of the Services it is to serve";
    Err(origin.error("ebpf.serviceProxyName", name, "is not the value of a label", remedy))
}

fn source(document: &Document, origin: &Origin) -> Result<SourceConfig, ConfigError> {
    if let Some(dir) = directory(origin, "ebpf.manifests", &document.ebpf.manifests)? {
        return Ok(SourceConfig::Manifests(dir));
    }
    let client = &document.client_connection;
    Ok(SourceConfig::ApiServer(ApiServer {
        kubeconfig: said(&client.kubeconfig).map(PathBuf::from),
        master: said(&document.ebpf.master)
            .map(|text| master(origin, text))
            .transpose()?,
        rate: rate(document, origin)?,
    }))
}

/// With a scheme, which may be left out.
fn master(origin: &Origin, text: &str) -> Result<String, ConfigError> {
    let text = text.trim();
    let url = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let uri = url.parse::<Uri>().ok();
    let is_server = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
    if uri.as_ref().is_some_and(is_server) {
        return Ok(url);
    }
    let remedy = "write a URL such as https://192.0.2.10:6443";
    Err(origin.error("ebpf.master", text, "is not the address of a server", remedy))
}

/// 0 is as good as not given; fewer than 0 is without limit, as client-go has it.
fn rate(document: &Document, origin: &Origin) -> Result<Option<Rate>, ConfigError> {
    let (qps, burst) = (document.client_connection.qps, document.client_connection.burst);
    let [qps, burst] = [qps, burst.map(|burst| burst as f64)].map(|number| number.filter(|number| *number != 0.0));
    if qps.or(burst).is_none() || qps.is_some_and(|qps| qps < 0.0) {
        return Ok(None);
    }
    let qps = qps.unwrap_or(DEFAULT_RATE.qps);
    let burst = burst.unwrap_or(DEFAULT_RATE.burst.into());
    if !(1e-3..=1e6).contains(&qps) {
        let remedy = "write a number from 0.001 to 1000000, a negative one for no limit, or nothing";
        return Err(origin.error("clientConnection.qps", &qps.to_string(), "is no rate", remedy));
    }
    if !(1.0..=1e6).contains(&burst) {
        let remedy = "write a number from 1 to 1000000, or nothing";
        return Err(origin.error(
            "clientConnection.burst",
            &burst.to_string(),
            "is no number of requests",
            remedy,
        ));
    }
    Ok(Some(Rate {
        qps,
        burst: burst as u32,
    }))
}

/// Gates that nobody here knows are another component's, or older or newer than this one.
fn gates(document: &Document, remarks: &mut Remarks) -> FeatureGates {
    let none = Default::default();
    let (gates, unknown) = FeatureGates::from_map(document.feature_gates.as_ref().unwrap_or(&none));
    let unknown = unknown
        .into_iter()
        .map(|gate| format!("unknown feature gate {gate}, ignored"));
    remarks.warnings.extend(unknown);
    gates
}

fn directory(origin: &Origin, field: &str, text: &Option<String>) -> Result<Option<PathBuf>, ConfigError> {
    let Some(text) = said(text) else {
        return Ok(None);
    };
    let path = Path::new(text);
    let problem = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Ok(Some(path.to_owned())),
        Ok(_) => "is not a directory".to_owned(),
        Err(reason) => reason.to_string(),
    };
    Err(origin.error(field, text, &problem, "give a directory that exists"))
}

/// At most one prefix per family (S114, S115).
fn cluster_cidrs(document: &Document, origin: &Origin) -> Result<Vec<IpNet>, ConfigError> {
    let Some(text) = said(&document.cluster_cidr) else {
        return Ok(Vec::new());
    };
    let remedy = "write one prefix per family, such as 10.244.0.0/16,fd00:10::/56";
    let fail = |problem: &str| origin.error("clusterCIDR", text, problem, remedy);
    let mut cidrs: Vec<IpNet> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let cidr = parse_cidr(part)
            .ok_or_else(|| fail(&format!("{part:?} is not a prefix")))?
            .trunc();
        if cidrs
            .iter()
            .any(|other| other.addr().is_ipv4() == cidr.addr().is_ipv4())
        {
            return Err(fail("two prefixes are of one family"));
        }
        cidrs.push(cidr);
    }
    Ok(cidrs)
}

/// How pods are told from others (S114), with what the mode needs.
fn pods(document: &Document, origin: &Origin) -> Result<PodDetection, ConfigError> {
    let cluster_cidrs = cluster_cidrs(document, origin)?;
    let default = DetectLocalModeArg::ClusterCidr;
    let names = &document.detect_local;
    match choice(origin, "detectLocalMode", &document.detect_local_mode, default)? {
        DetectLocalModeArg::ClusterCidr => Ok(PodDetection::ClusterCidr(cluster_cidrs)),
        DetectLocalModeArg::NodeCidr => Ok(PodDetection::NodeCidr),
        DetectLocalModeArg::BridgeInterface => {
            let remedy = "name the bridge that pods are behind with --pod-bridge-interface, such as cni0";
            let name = interface_name(origin, "detectLocal.bridgeInterface", &names.bridge_interface, remedy)?;
            Ok(PodDetection::Bridge(name))
        }
        DetectLocalModeArg::InterfaceNamePrefix => {
            let remedy =
                "write with --pod-interface-name-prefix what the names of pods' interfaces begin with, such as veth";
            let prefix = interface_name(
                origin,
                "detectLocal.interfaceNamePrefix",
                &names.interface_name_prefix,
                remedy,
            )?;
            Ok(PodDetection::InterfacePrefix(prefix))
        }
    }
}

/// The name of an interface, or the beginning of one, that a mode cannot do without.
fn interface_name(
    origin: &Origin,
    field: &str,
    text: &Option<String>,
    remedy: &'static str,
) -> Result<String, ConfigError> {
    let text = text.as_deref().unwrap_or_default();
    let fail = |problem| Err(origin.error(field, text, problem, remedy));
    match text.trim() {
        "" => fail("is needed by this way to tell pods (detectLocalMode, --detect-local-mode)"),
        name if name.len() > LONGEST_INTERFACE_NAME => fail("is longer than a name can be"),
        name if name.contains(|c: char| c == '/' || c.is_whitespace()) => fail("cannot be in a name"),
        name => Ok(name.to_owned()),
    }
}

fn interfaces(document: &Document, origin: &Origin) -> Result<InterfaceFilter, ConfigError> {
    let [include, exclude] = [&document.ebpf.interfaces, &document.ebpf.exclude_interfaces].map(said);
    filter(origin, "ebpf.interfaces", include, None)?;
    filter(origin, "ebpf.excludeInterfaces", include, exclude)
}

/// A filter from two patterns. It is the last one that was not looked at yet, and `field` is where it is.
fn filter(
    origin: &Origin,
    field: &str,
    include: Option<&str>,
    exclude: Option<&str>,
) -> Result<InterfaceFilter, ConfigError> {
    InterfaceFilter::new(include, exclude).map_err(|error| {
        let remedy = "write a regular expression for interface names, such as eth.*|veth.*";
        let problem = error.to_string().replace('\n', " ");
        origin.error(field, exclude.or(include).unwrap_or_default(), &problem, remedy)
    })
}

/// Without a pattern there is no XDP.
fn xdp(document: &Document, origin: &Origin) -> Result<XdpOptions, ConfigError> {
    let xdp = &document.ebpf.xdp;
    let chosen = said(&xdp.interfaces).map(|pattern| filter(origin, "ebpf.xdp.interfaces", Some(pattern), None));
    Ok(XdpOptions {
        interfaces: chosen.transpose()?,
        mode: choice(origin, "ebpf.xdp.mode", &xdp.mode, XdpModeArg::Auto)?.into(),
    })
}

/// Prefixes and words (S81). Whoever names nftables and no addresses has the primary ones, as there (S83).
fn node_port_addresses(document: &Document, origin: &Origin, mode: ModeArg) -> Result<NodePortAddresses, ConfigError> {
    const REMEDY: &str = "write prefixes such as 192.0.2.0/24,fd00::/64 and the words all, primary and localhost, or nothing for all addresses";
    let parts = document.node_port_addresses.as_deref().unwrap_or_default();
    let mut addresses = NodePortAddresses {
        primary: parts.is_empty() && mode == ModeArg::Nftables,
        ..NodePortAddresses::default()
    };
    for part in parts {
        match part.trim() {
            "all" => addresses.all = true,
            "primary" => addresses.primary = true,
            "localhost" => addresses.prefixes.extend(NodePortAddresses::LOCALHOST),
            part => {
                let problem = format!("{part:?} is neither a prefix nor a word that is known");
                let prefix = parse_cidr(part);
                let fail = || origin.error("nodePortAddresses", &parts.join(","), &problem, REMEDY);
                addresses.prefixes.push(prefix.ok_or_else(fail)?.trunc());
            }
        }
    }
    Ok(addresses)
}

fn capacities(document: &Document, origin: &Origin) -> Result<Capacities, ConfigError> {
    let given = &document.ebpf.capacities;
    let default = Capacities::default();
    let size = |field, given: Option<u32>, default| match given {
        Some(0) => {
            let remedy = "write a number above 0, or leave it out";
            Err(origin.error(field, "0", "a map needs room for something", remedy))
        }
        given => Ok(given.unwrap_or(default)),
    };
    Ok(Capacities {
        frontends: size("ebpf.capacities.frontends", given.frontends, default.frontends)?,
        backends: size("ebpf.capacities.backends", given.backends, default.backends)?,
        rewrites: size("ebpf.capacities.rewrites", given.rewrites, default.rewrites)?,
        counters: size("ebpf.capacities.counters", given.counters, default.counters)?,
        services: size("ebpf.capacities.services", given.services, default.services)?,
    })
}

/// As kube-proxy reads it: the port may be left out, and so may everything.
fn bind_address(
    origin: &Origin,
    field: &str,
    text: &Option<String>,
    default: (IpAddr, u16),
) -> Result<SocketAddr, ConfigError> {
    let Some(text) = said(text) else {
        return Ok(default.into());
    };
    let bare = text
        .trim()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    let address = text.trim().parse().or(bare.map(|ip| SocketAddr::new(ip, default.1)));
    address.map_err(|_| {
        let remedy = "write an IP address and a port, such as 0.0.0.0:10256 or [::]:10256; to switch it off, an empty flag, or serveHealthz or serveMetrics: false in the section ebpf";
        origin.error(field, text, "is not an address with a port", remedy)
    })
}
