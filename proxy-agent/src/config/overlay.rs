//! How flags are laid over the configuration file. Called once by [`super::RunConfig::from_args`].
//!
//! What must stay true: every flag is a field of [`Document`], so whatever a flag says a file can say. With `--config`, flags for
//! what kube-proxy's own fields say are ignored and named, as kube-proxy ignores them; what kube-proxy takes from the command
//! line all the same, and what it does not have, counts before the file.

use std::collections::BTreeMap;

use super::document::Document;
use super::flags::RunArgs;
use super::words::word;
use super::{ConfigError, Origin};
use crate::gates::FeatureGates;

/// Lays flags over what the file says.
struct Overlay {
    has_file: bool,
    given: BTreeMap<&'static str, &'static str>,
    ignored: Vec<&'static str>,
}

impl Overlay {
    /// A flag that counts in any case.
    fn own<T>(&mut self, flag: &'static str, field: &'static str, value: Option<T>, slot: &mut Option<T>) {
        if value.is_some() {
            self.given.insert(field, flag);
            *slot = value;
        }
    }

    /// A flag that does not count if there is a file.
    fn kube<T>(&mut self, flag: &'static str, field: &'static str, value: Option<T>, slot: &mut Option<T>) {
        match value {
            Some(_) if self.has_file => self.ignored.push(flag),
            value => self.own(flag, field, value, slot),
        }
    }
}

/// Lays the flags over the document. Gives which field comes from which flag, and the flags that did not count.
pub(super) fn lay_over(args: &RunArgs, document: &mut Document) -> Result<(Origin, Vec<&'static str>), ConfigError> {
    let mut over = Overlay {
        has_file: args.config.is_some(),
        given: BTreeMap::new(),
        ignored: Vec::new(),
    };
    own_flags(args, document, &mut over);
    kube_flags(args, document, &mut over)?;
    let origin = Origin {
        file: args.config.as_ref().map(|path| path.display().to_string()),
        given: over.given,
    };
    Ok((origin, over.ignored))
}

fn own_flags(args: &RunArgs, document: &mut Document, over: &mut Overlay) {
    let args = args.clone();
    let ebpf = &mut document.ebpf;
    // An environment variable that is set to nothing says nothing.
    let node_name = args.node_name.filter(|name| !name.trim().is_empty());
    over.own(
        "--node-name",
        "hostnameOverride",
        node_name,
        &mut document.hostname_override,
    );
    over.own("--master", "ebpf.master", args.master, &mut ebpf.master);
    over.own("--manifests", "ebpf.manifests", args.manifests, &mut ebpf.manifests);
    over.own("--bpf-dir", "ebpf.bpfDir", args.bpf_dir, &mut ebpf.bpf_dir);
    over.own("--cgroup", "ebpf.cgroup", args.cgroup, &mut ebpf.cgroup);
    over.own("--interfaces", "ebpf.interfaces", args.interfaces, &mut ebpf.interfaces);
    let exclude = args.exclude_interfaces;
    over.own(
        "--exclude-interfaces",
        "ebpf.excludeInterfaces",
        exclude,
        &mut ebpf.exclude_interfaces,
    );
    over.own(
        "--socket-lb",
        "ebpf.socketLB",
        args.socket_lb.and_then(word),
        &mut ebpf.socket_lb,
    );
    over.own("--attach", "ebpf.attach", args.attach.and_then(word), &mut ebpf.attach);
    let xdp = args.xdp_interfaces;
    over.own("--xdp-interfaces", "ebpf.xdp.interfaces", xdp, &mut ebpf.xdp.interfaces);
    over.own(
        "--xdp-mode",
        "ebpf.xdp.mode",
        args.xdp_mode.and_then(word),
        &mut ebpf.xdp.mode,
    );
    let level = args.bpf_log_level.and_then(word);
    over.own("--bpf-log-level", "ebpf.bpfLogLevel", level, &mut ebpf.bpf_log_level);
    over.own("-v", "logging.verbosity", args.v, &mut document.logging.verbosity);
    over.own(
        "--service-metrics",
        "ebpf.serviceMetrics",
        args.service_metrics,
        &mut ebpf.service_metrics,
    );
    over.own(
        "--service-proxy-name",
        "ebpf.serviceProxyName",
        args.service_proxy_name,
        &mut ebpf.service_proxy_name,
    );
    let sizes = &mut ebpf.capacities;
    for (flag, field, value, slot) in [
        (
            "--frontends-capacity",
            "ebpf.capacities.frontends",
            args.frontends_capacity,
            &mut sizes.frontends,
        ),
        (
            "--backends-capacity",
            "ebpf.capacities.backends",
            args.backends_capacity,
            &mut sizes.backends,
        ),
        (
            "--rewrites-capacity",
            "ebpf.capacities.rewrites",
            args.rewrites_capacity,
            &mut sizes.rewrites,
        ),
        (
            "--counters-capacity",
            "ebpf.capacities.counters",
            args.counters_capacity,
            &mut sizes.counters,
        ),
        (
            "--services-capacity",
            "ebpf.capacities.services",
            args.services_capacity,
            &mut sizes.services,
        ),
    ] {
        over.own(flag, field, value, slot);
    }
}

fn kube_flags(args: &RunArgs, document: &mut Document, over: &mut Overlay) -> Result<(), ConfigError> {
    let args = args.clone();
    let (ebpf, client) = (&mut document.ebpf, &mut document.client_connection);
    let (tracked, local) = (&mut document.conntrack, &mut document.detect_local);
    // Here, and not in a file, an empty address means nowhere.
    let is_served = |address: &Option<String>| address.as_ref().map(|address| !address.trim().is_empty());
    let [serve_healthz, serve_metrics] = [&args.healthz_bind_address, &args.metrics_bind_address].map(is_served);
    let addresses = args.nodeport_addresses.as_deref().map(list);
    for (flag, field, value, slot) in [
        (
            "--kubeconfig",
            "clientConnection.kubeconfig",
            args.kubeconfig,
            &mut client.kubeconfig,
        ),
        ("--proxy-mode", "mode", args.proxy_mode, &mut document.mode),
        (
            "--bind-address",
            "bindAddress",
            args.bind_address,
            &mut document.bind_address,
        ),
        (
            "--cluster-cidr",
            "clusterCIDR",
            args.cluster_cidr,
            &mut document.cluster_cidr,
        ),
        (
            "--detect-local-mode",
            "detectLocalMode",
            args.detect_local_mode.and_then(word),
            &mut document.detect_local_mode,
        ),
        (
            "--pod-bridge-interface",
            "detectLocal.bridgeInterface",
            args.pod_bridge_interface,
            &mut local.bridge_interface,
        ),
        (
            "--pod-interface-name-prefix",
            "detectLocal.interfaceNamePrefix",
            args.pod_interface_name_prefix,
            &mut local.interface_name_prefix,
        ),
        (
            "--healthz-bind-address",
            "healthzBindAddress",
            args.healthz_bind_address,
            &mut document.healthz_bind_address,
        ),
        (
            "--metrics-bind-address",
            "metricsBindAddress",
            args.metrics_bind_address,
            &mut document.metrics_bind_address,
        ),
        (
            "--min-sync-period",
            "ebpf.minSyncPeriod",
            args.min_sync_period,
            &mut ebpf.min_sync_period,
        ),
        (
            "--sync-period",
            "ebpf.syncPeriod",
            args.sync_period,
            &mut ebpf.sync_period,
        ),
        (
            "--conntrack-tcp-timeout-established",
            "conntrack.tcpEstablishedTimeout",
            args.conntrack_tcp_timeout_established,
            &mut tracked.tcp_established_timeout,
        ),
        (
            "--conntrack-tcp-timeout-close-wait",
            "conntrack.tcpCloseWaitTimeout",
            args.conntrack_tcp_timeout_close_wait,
            &mut tracked.tcp_close_wait_timeout,
        ),
        (
            "--conntrack-udp-timeout",
            "conntrack.udpTimeout",
            args.conntrack_udp_timeout,
            &mut tracked.udp_timeout,
        ),
        (
            "--conntrack-udp-timeout-stream",
            "conntrack.udpStreamTimeout",
            args.conntrack_udp_timeout_stream,
            &mut tracked.udp_stream_timeout,
        ),
    ] {
        over.kube(flag, field, value, slot);
    }
    let hard_fail = args.bind_address_hard_fail;
    for (flag, field, value, slot) in [
        (
            "--localhost-nodeports",
            "ebpf.localhostNodePorts",
            args.localhost_nodeports,
            &mut ebpf.localhost_node_ports,
        ),
        (
            "--masquerade-all",
            "ebpf.masqueradeAll",
            args.masquerade_all,
            &mut ebpf.masquerade_all,
        ),
        (
            "--bind-address-hard-fail",
            "bindAddressHardFail",
            hard_fail,
            &mut document.bind_address_hard_fail,
        ),
    ] {
        over.kube(flag, field, value, slot);
    }
    over.kube(
        "--kube-api-qps",
        "clientConnection.qps",
        args.kube_api_qps,
        &mut client.qps,
    );
    over.kube(
        "--kube-api-burst",
        "clientConnection.burst",
        args.kube_api_burst,
        &mut client.burst,
    );
    over.kube(
        "--nodeport-addresses",
        "nodePortAddresses",
        addresses,
        &mut document.node_port_addresses,
    );
    if over.has_file {
        over.ignored.extend(args.feature_gates.map(|_| "--feature-gates"));
        return Ok(());
    }
    ebpf.serve_healthz = serve_healthz;
    ebpf.serve_metrics = serve_metrics;
    if let Some(text) = &args.feature_gates {
        let remedy = "write name=true or name=false, separated by commas";
        let gates = FeatureGates::parse(text);
        let gates = gates.map_err(|problem| ConfigError::value("--feature-gates", text, problem, remedy))?;
        over.own(
            "--feature-gates",
            "featureGates",
            Some(gates),
            &mut document.feature_gates,
        );
    }
    Ok(())
}

/// The parts of a list with commas; none of an empty text.
fn list(text: &str) -> Vec<String> {
    let parts = text.split(',').filter(|_| !text.trim().is_empty());
    parts.map(|part| part.trim().to_owned()).collect()
}
