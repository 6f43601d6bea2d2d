//! Addresses of a Service that change while it lives, on the wire: load-balancer addresses come, go and become somebody else's
//! (S97), a node port changes hands (S35), and nothing listens on one (S36).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_tests::echo::{self, Failure};
use proxy_tests::manifests;
use proxy_tests::world::{ECHO, ENDPOINT_PORTS, SERVICE_PORTS, answered_by, names};
use serde_json::{Value, json};

use proxy_tests::shared::Turn;

use super::cluster::{self, Cluster};

/// Addresses that no service of the table has.
const CLUSTER_IPS: [[&str; 2]; 2] = [["10.96.2.1", "fd00:96::201"], ["10.96.2.2", "fd00:96::202"]];
const FIRST: [&str; 2] = ["203.0.113.91", "2001:db8:113::91"];
const SECOND: [&str; 2] = ["203.0.113.92", "2001:db8:113::92"];
const NODE_PORT: u16 = 30_500;
const FILE: &str = "changes";
/// Long enough for an answer, where none is to come.
const SHORT: Duration = Duration::from_millis(300);

/// The file that a test wrote; removed when its turn is over, whatever came of it.
struct Changes(Turn<Cluster>);

impl Drop for Changes {
    fn drop(&mut self) {
        let _ = self.0.world.manifests.remove(FILE);
    }
}

fn service(number: usize, change: impl Fn(&mut Value)) -> Value {
    let name = format!("changes-{number}");
    let mut service = manifests::service(&name, &CLUSTER_IPS[number], &SERVICE_PORTS);
    service["spec"]["type"] = json!("LoadBalancer");
    change(&mut service);
    service
}

/// Both services as they are to be, each with one pod.
fn write(cluster: &Cluster, services: &[Value]) {
    let mut objects = services.to_vec();
    for (number, pod) in ["pod1-1", "pod2-1"].into_iter().enumerate() {
        let name = format!("changes-{number}");
        objects.extend(manifests::slices(
            &name,
            &ENDPOINT_PORTS,
            &cluster.world.endpoints_of(&[pod]),
        ));
    }
    cluster.world.write(FILE, &objects).unwrap();
}

fn wait(cluster: &Cluster, ips: [&str; 2], port: u16, pod: Option<&str>) {
    for ip in ips.map(|ip| ip.parse::<IpAddr>().unwrap()) {
        let backend = pod.map(|name| SocketAddr::new(cluster::host(&cluster.world.topology, name).0.address(ip), ECHO));
        let backends = backend.as_ref().map(std::slice::from_ref);
        let frontend = SocketAddr::new(ip, port);
        cluster.world.wait_for(frontend, Protocol::Tcp, backends).unwrap();
    }
}

fn sockets(ips: [&str; 2], port: u16) -> [SocketAddr; 2] {
    ips.map(|ip| SocketAddr::new(ip.parse().unwrap(), port))
}

/// S97: a status is followed like a spec.
#[test]
fn load_balancer_addresses_come_and_go() {
    let changes = Changes(cluster::turn());
    let cluster = &*changes.0;
    let outsider = &cluster.router().outsiders[0];
    let status = |ips: [&str; 2], mode: &str| {
        let ingress = ips.map(|ip| json!({"ip": ip, "ipMode": mode}));
        json!({"loadBalancer": {"ingress": ingress}})
    };
    let is_served = |ips| {
        for target in sockets(ips, 80) {
            let by = outsider.run(|| answered_by(4, &format!("TCP to {target}"), || echo::tcp(target)));
            assert_eq!(by, names(&["pod1-1"]));
        }
    };
    write(cluster, &[service(0, |s| s["status"] = status(FIRST, "VIP"))]);
    wait(cluster, FIRST, 80, Some("pod1-1"));
    is_served(FIRST);
    write(cluster, &[service(0, |s| s["status"] = status(SECOND, "VIP"))]);
    wait(cluster, FIRST, 80, None);
    wait(cluster, SECOND, 80, Some("pod1-1"));
    is_served(SECOND);
    for target in sockets(FIRST, 80) {
        assert!(
            outsider.run(|| echo::dial(target, SHORT)).is_err(),
            "{target} is nobody's any more"
        );
    }
    write(cluster, &[service(0, |s| s["status"] = status(SECOND, "Proxy"))]);
    wait(cluster, SECOND, 80, None);
    for target in sockets(SECOND, 80) {
        assert!(
            outsider.run(|| echo::dial(target, SHORT)).is_err(),
            "{target} is the load balancer's own"
        );
    }
}

/// S34, S35, S36: TCP and UDP share a node port, another Service takes it over in one step, and nothing ever listens on it.
#[test]
fn a_node_port_changes_hands() {
    let changes = Changes(cluster::turn());
    let cluster = &*changes.0;
    let outsider = &cluster.router().outsiders[0];
    let node = cluster.world.topology.node(2);
    let with_port = |service: &mut Value| {
        for port in 0..SERVICE_PORTS.len() {
            service["spec"]["ports"][port]["nodePort"] = json!(NODE_PORT);
        }
    };
    assert!(listens(node, ECHO), "the node's echo server");
    let any = ["0.0.0.0", "::"];
    for (owner, pod) in [(0, "pod1-1"), (1, "pod2-1")] {
        let services = [0, 1].map(|number| {
            service(number, |s| {
                if number == owner {
                    with_port(s)
                }
            })
        });
        write(cluster, &services);
        wait(cluster, any, NODE_PORT, Some(pod));
        for target in node.sockets(NODE_PORT) {
            for (what, request) in echo::CONNECTED {
                let by = outsider.run(|| answered_by(4, &format!("{what} to {target}"), || request(target)));
                assert_eq!(by, names(&[pod]), "{what} to {target}");
            }
        }
        assert!(!listens(node, NODE_PORT), "a socket listens on the node port");
    }
    write(cluster, &[]);
    wait(cluster, any, NODE_PORT, None);
    for target in node.sockets(NODE_PORT) {
        assert_eq!(outsider.run(|| echo::tcp(target)), Err(Failure::Refused));
    }
    assert!(!listens(node, NODE_PORT), "a socket listens on the node port");
}

/// Does any TCP socket of the namespace listen on the port?
fn listens(host: &proxy_tests::topology::Host, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let tables = host.run(|| {
        ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap())
    });
    let port = format!(":{port:04X}");
    let is_listener = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().is_some_and(|local| local.ends_with(&port));
        local && fields.nth(1) == Some(LISTEN)
    };
    tables.iter().flat_map(|table| table.lines()).any(is_listener)
}
