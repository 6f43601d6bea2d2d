//! The agent against a real API server: what is written with kubectl arrives, losing the server does no harm, and the manifest
//! that users apply is accepted and gives the agent exactly the rights it needs.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use proxy_common::addr::Protocol;
use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::echo;
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Shape};
use proxy_tests::world::{CLUSTER_IPS, ECHO, ENDPOINT_PORTS, SERVICE_PORTS, Setup, World, answered_by, names, vips};
use serde_json::json;

struct Cluster {
    world: World,
    api: ApiServer,
}

/// A node whose agent uses its own service account, with the rights that `deploy/proxy-agent.yaml` gives it (S14).
fn cluster() -> Cluster {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 3,
        ..Default::default()
    };
    let mut world = World::new(&Setup {
        shape,
        without_agents: true,
        ..Default::default()
    })
    .unwrap();
    let api = ApiServer::start(&world.topology.underlay, GATEWAY.into()).unwrap();
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/proxy-agent.yaml");
    api.kubectl(&["apply", "-f", deploy.to_str().unwrap()]).unwrap();
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}});
    api.apply(&[node]).unwrap();
    let source = Source::Kubeconfig(api.agent_kubeconfig());
    let host = world.topology.node(0);
    let agent = Agent::start(&host.name, &host.netns, &source, &["--cluster-cidr", CLUSTER_CIDR]).unwrap();
    world.agents.push(agent);
    Cluster { world, api }
}

impl Cluster {
    fn apply_web(&self, pods: &[&str]) {
        let mut objects = vec![manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS)];
        objects.extend(manifests::slices(
            "web",
            &ENDPOINT_PORTS,
            &self.world.endpoints_of(pods),
        ));
        self.api.apply(&objects).unwrap();
        self.wait_web(pods);
    }

    fn wait_web(&self, pods: &[&str]) {
        for vip in vips() {
            let endpoints = self.world.endpoints_of(pods).into_iter();
            let of_family = endpoints.filter(|(ip, _): &(IpAddr, _)| ip.is_ipv4() == vip.is_ipv4());
            let backends: Vec<_> = of_family.map(|(ip, _)| SocketAddr::new(ip, ECHO)).collect();
            self.world.wait_for(vip, Protocol::Tcp, Some(&backends)).unwrap();
        }
    }

    fn answers(&self) -> std::collections::BTreeSet<String> {
        let client = self.world.topology.pod(0, 0);
        vips()
            .iter()
            .flat_map(|vip| client.run(|| answered_by(40, "TCP to the service", || echo::tcp(*vip))))
            .collect()
    }
}

/// S12, S32, S43: created, changed, deleted; each step is seen in the data path.
#[test]
fn objects_written_with_kubectl_arrive() {
    let cluster = cluster();
    cluster.apply_web(&["pod1-2"]);
    assert_eq!(cluster.answers(), names(&["pod1-2"]));
    cluster.apply_web(&["pod1-2", "pod1-3"]);
    assert_eq!(cluster.answers(), names(&["pod1-2", "pod1-3"]));
    cluster
        .api
        .kubectl(&["delete", "endpointslice", "web-ipv4", "web-ipv6"])
        .unwrap();
    cluster.wait_web(&[]);
    cluster.api.kubectl(&["delete", "service", "web"]).unwrap();
    for vip in vips() {
        cluster.world.wait_for(vip, Protocol::Tcp, None).unwrap();
    }
}

/// S1, S2, S4: the labels that say "not yours" act as deletion and addition on live objects.
#[test]
fn labels_hand_a_service_to_another_proxy_and_back() {
    let cluster = cluster();
    cluster.apply_web(&["pod1-2"]);
    for label in [
        "service.kubernetes.io/service-proxy-name=other",
        "service.kubernetes.io/headless=",
    ] {
        let key = label.split('=').next().unwrap();
        cluster.api.kubectl(&["label", "service", "web", label]).unwrap();
        cluster.world.wait_for(vips()[0], Protocol::Tcp, None).unwrap();
        cluster
            .api
            .kubectl(&["label", "service", "web", &format!("{key}-")])
            .unwrap();
        cluster.wait_web(&["pod1-2"]);
    }
}

/// S161: while the API server is away the last state stands; back again, changes arrive, and what vanished meanwhile goes.
#[test]
fn the_api_server_may_go_and_come_back() {
    let mut cluster = cluster();
    cluster.apply_web(&["pod1-2"]);
    cluster.api.stop();
    assert_eq!(cluster.answers(), names(&["pod1-2"]));
    cluster.api.launch().unwrap();
    cluster.apply_web(&["pod1-3"]);
    assert_eq!(cluster.answers(), names(&["pod1-3"]));
}

/// S160, S161: what was deleted while the agent was away is removed after its first full list, and nothing else is.
#[test]
fn what_vanished_while_the_agent_was_away_is_removed() {
    let mut cluster = cluster();
    cluster.apply_web(&["pod1-2"]);
    let other: [Port; 1] = [port("", "TCP", 80)];
    let gone = manifests::service("gone", &["10.96.0.20"], &other);
    cluster.api.apply(&[gone]).unwrap();
    let gone: SocketAddr = "10.96.0.20:80".parse().unwrap();
    cluster.world.wait_for(gone, Protocol::Tcp, Some(&[])).unwrap();
    cluster.world.agents[0].kill();
    cluster.api.kubectl(&["delete", "service", "gone"]).unwrap();
    assert_eq!(cluster.answers(), names(&["pod1-2"]));
    cluster.world.agents[0].launch().unwrap();
    cluster.world.wait_for(gone, Protocol::Tcp, None).unwrap();
    cluster.wait_web(&["pod1-2"]);
    assert_eq!(cluster.answers(), names(&["pod1-2"]));
}

/// S160: an agent that cannot reach its API server changes nothing that a former one left.
#[test]
fn an_agent_without_its_api_server_changes_nothing() {
    let mut cluster = cluster();
    cluster.apply_web(&["pod1-2"]);
    cluster.api.stop();
    cluster.world.agents[0].kill();
    cluster.world.agents[0].launch_only().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(
        cluster.world.agents[0].is_running(),
        "{}",
        cluster.world.agents[0].log()
    );
    assert_eq!(cluster.answers(), names(&["pod1-2"]));
    cluster.api.launch().unwrap();
    cluster.apply_web(&["pod1-3"]);
    assert_eq!(cluster.answers(), names(&["pod1-3"]));
}

/// The manifest that users apply is accepted by the server's own validation.
#[test]
fn the_deploy_manifest_is_valid() {
    let netns = proxy_tests::netns::Netns::new("deploy").unwrap();
    let api = ApiServer::start(&netns, "127.0.0.1".parse().unwrap()).unwrap();
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/proxy-agent.yaml");
    let deploy = deploy.to_str().unwrap();
    api.kubectl(&[
        "apply",
        "--server-side",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        deploy,
    ])
    .unwrap();
    api.kubectl(&["apply", "--server-side", "--validate=strict", "-f", deploy])
        .unwrap();
    let may = |verb: &str, what: &str| {
        let user = proxy_tests::apiserver::AGENT_USER;
        api.kubectl(&["auth", "can-i", verb, what, "--as", user, "--all-namespaces"])
            .is_ok()
    };
    for (verb, what) in [
        ("list", "services"),
        ("watch", "services"),
        ("list", "endpointslices.discovery.k8s.io"),
        ("watch", "endpointslices.discovery.k8s.io"),
        ("get", "nodes"),
        ("watch", "nodes"),
    ] {
        assert!(may(verb, what), "{verb} {what}");
    }
    for (verb, what) in [
        ("list", "secrets"),
        ("list", "pods"),
        ("update", "services"),
        ("delete", "nodes"),
    ] {
        assert!(!may(verb, what), "{verb} {what} is nothing the agent needs (S14)");
    }
}
