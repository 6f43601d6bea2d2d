//! `--socket-lb all`: pods that are labelled keep their sockets to themselves, whatever driver made their cgroups.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::cgroup::Cgroup;
use proxy_tests::echo::{EchoServer, Held};
use proxy_tests::manifests::{self, port};
use proxy_tests::maps;
use proxy_tests::process::wait_until;
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Host, Shape, Topology};
use serde_json::{Value, json};

const LABEL: &str = "ebpf-proxy.io/socket-lb";
const ECHO: u16 = 8080;
const VIP: &str = "10.96.0.10";
const ARRIVAL: Duration = Duration::from_secs(45);
const SERVER: usize = 3;

/// Declared in the order in which things go.
struct Site {
    pods: Vec<Pod>,
    agent: Agent,
    api: ApiServer,
    _server: EchoServer,
    topology: Topology,
}

/// A pod's cgroups, the container's first.
struct Pod {
    name: String,
    cgroups: Vec<Cgroup>,
}

impl Pod {
    fn id(&self) -> u64 {
        fs::metadata(self.cgroups[1].path()).unwrap().ino()
    }
}

impl Site {
    fn new() -> Self {
        let shape = Shape {
            nodes: 1,
            pods_per_node: 4,
            ..Default::default()
        };
        let topology = Topology::new(&shape).unwrap();
        let server = topology.pod(0, SERVER);
        let echo = EchoServer::start(&server.netns, &server.name, &server.sockets(ECHO)).unwrap();
        let api = ApiServer::start(&topology.underlay, GATEWAY.into()).unwrap();
        wait_until(ARRIVAL, || api.kubectl(&["get", "namespace", "default"]).ok()).expect("the namespace default");
        let node = topology.node(0);
        let addresses = [node.v4.into(), node.v6.into()];
        let ports = [port("http", "TCP", 80)];
        let targets = [port("http", "TCP", ECHO)];
        let endpoint = manifests::endpoint(server.v4, &node.name);
        api.apply(&[
            manifests::node(&node.name, "zone", &addresses),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "default"}}),
            manifests::service("web", &[VIP], &ports),
            manifests::slice("web-1", "web", "IPv4", &targets, vec![endpoint]),
        ])
        .unwrap();
        let source = Source::Kubeconfig(api.kubeconfig());
        let options = ["--cluster-cidr", CLUSTER_CIDR, "--socket-lb", "all"];
        let agent = Agent::start(&node.name, &node.netns, &source, &options).unwrap();
        Self {
            pods: Vec::new(),
            agent,
            api,
            _server: echo,
            topology,
        }
    }

    /// Makes a pod; gives its UID.
    fn create(&self, name: &str, node: &str, label: Option<&str>) -> String {
        let pod: Value = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": label.map(|value| json!({LABEL: value}))},
            "spec": {
                "nodeName": node, "automountServiceAccountToken": false,
                "containers": [{"name": "main", "image": "main"}],
            },
        });
        self.api.apply(&[pod]).unwrap();
        let args = ["get", "pod", name, "-n", "default", "-o", "jsonpath={.metadata.uid}"];
        self.api.kubectl(&args).unwrap()
    }

    /// What the kubelet does next: the cgroups of a pod, one inside the other.
    fn start(&mut self, name: &str, path: &[&str]) {
        let mut cgroups: Vec<Cgroup> = Vec::new();
        for part in path {
            let parent = cgroups.first().map_or(self.agent.cgroup(), Cgroup::path);
            cgroups.insert(0, Cgroup::inside(parent, part).unwrap());
        }
        self.pods.push(Pod {
            name: name.to_owned(),
            cgroups,
        });
    }

    fn kubectl(&self, args: &[&str]) {
        self.api.kubectl(&[&["-n", "default"], args].concat()).unwrap();
    }

    fn node(&self) -> &Host {
        self.topology.node(0)
    }

    /// Does the service's address stand in the packets that the pod sends? Its process sees it as its peer in any case.
    fn sees_the_service(&self, pod: usize) -> bool {
        let vip = format!("{VIP}:80").parse().unwrap();
        let held = self.topology.pod(0, pod).netns.run(|| {
            self.pods[pod].cgroups[0].enter().unwrap();
            Held::open(vip).unwrap()
        });
        assert_eq!(held.peer(), Ok(vip), "{}", self.pods[pod].name);
        let client = held.stream().local_addr().unwrap();
        let listed = self.agent.command(&["connection", "list"]).unwrap();
        let is_packet = listed
            .lines()
            .any(|line| line.contains(&client.to_string()) && line.contains(&vip.to_string()));
        drop(held);
        is_packet
    }

    fn who_sees_the_service(&self) -> Vec<&str> {
        let pods = (0..self.pods.len()).filter(|pod| self.sees_the_service(*pod));
        pods.map(|pod| &*self.pods[pod].name).collect()
    }

    fn wait_for(&self, pods: &[usize]) {
        let mut wanted: Vec<u64> = pods.iter().map(|pod| self.pods[*pod].id()).collect();
        wanted.sort_unstable();
        let mut last = Vec::new();
        let arrived = wait_until(ARRIVAL, || {
            last = maps::opted_out(&self.agent.bpf_dir()).unwrap();
            (last == wanted).then_some(())
        });
        assert!(
            arrived.is_some(),
            "{wanted:?} is wanted, {last:?} found\n{}",
            self.agent.log()
        );
    }
}

/// Labelled before and after the cgroup is there, with the names of both drivers and below a root of the kubelet's own; label off
/// and on; pods that end while nobody looks; and without the option.
#[test]
fn labelled_pods_see_the_service() {
    let mut site = Site::new();
    let node = site.node().name.clone();
    // cgroupfs: the kubelet has made the cgroup a moment before the API server tells.
    let uid = site.create("one", &node, None);
    site.start(
        "one",
        &["kubepods", "burstable", &format!("pod{uid}"), "0123456789abcdef"],
    );
    // systemd: it makes it after.
    let uid = site.create("two", &node, Some("off"));
    let slice = format!("kubepods-besteffort-pod{}.slice", uid.replace('-', "_"));
    let path = [
        "kubepods.slice",
        "kubepods-besteffort.slice",
        &slice,
        "cri-containerd-01.scope",
    ];
    std::thread::sleep(Duration::from_millis(300));
    site.start("two", &path);
    site.wait_for(&[1]);
    assert_eq!(site.who_sees_the_service(), ["two"]);
    // With a root of its own, guaranteed; and one that says something else.
    let uid = site.create("three", &node, Some("on"));
    let slice = format!("kubelet-kubepods-pod{}.slice", uid.replace('-', "_"));
    site.start(
        "three",
        &["kubelet.slice", "kubelet-kubepods.slice", &slice, "crio-01.scope"],
    );
    // Another node's does not matter.
    site.create("elsewhere", "other", Some("off"));
    assert_eq!(site.who_sees_the_service(), ["two"]);

    site.kubectl(&["label", "pod", "one", &format!("{LABEL}=off")]);
    site.kubectl(&["label", "pod", "three", "--overwrite", &format!("{LABEL}=off")]);
    site.wait_for(&[0, 1, 2]);
    assert_eq!(site.who_sees_the_service(), ["one", "two", "three"]);
    let metrics = site.agent.metrics().unwrap();
    assert!(
        metrics.contains("ebpf_proxy_map_entries{map=\"SOCKET_OPT_OUT\"} 3"),
        "{metrics}"
    );
    site.kubectl(&["label", "pod", "one", &format!("{LABEL}-")]);
    site.wait_for(&[1, 2]);
    assert_eq!(site.who_sees_the_service(), ["two", "three"]);

    // Without an agent what is known stands; what changed meanwhile is made good.
    site.agent.stop();
    assert_eq!(site.who_sees_the_service(), ["two", "three"]);
    site.kubectl(&["delete", "pod", "two", "--grace-period=0", "--force"]);
    site.agent.launch().unwrap();
    site.wait_for(&[2]);
    assert_eq!(site.who_sees_the_service(), ["three"]);

    site.agent.stop();
    site.agent.set_options(&["--cluster-cidr", CLUSTER_CIDR]);
    site.agent.launch().unwrap();
    site.wait_for(&[]);
    assert_eq!(
        site.who_sees_the_service(),
        ["one", "two", "three"],
        "pods' sockets are left alone"
    );
}
