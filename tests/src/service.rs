//! The usual service with every kind of address (cluster IP, nodePort, load-balancer address, externalIP) in a small cluster with
//! a host outside. Used by the namespace tests that dial more than cluster IPs.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use proxy_common::addr::Protocol;
use serde_json::{Value, json};

use crate::manifests;
use crate::topology::{CLUSTER_CIDR, Host, Shape};
use crate::world::{CLUSTER_IPS, ECHO, ENDPOINT_PORTS, SERVICE_PORTS, Setup, World, vips};

/// Its nodePort, for TCP and UDP.
pub const NODE_PORT: u16 = 30_080;
/// Load-balancer addresses; nobody has them on an interface (S96).
pub const LB: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
/// External addresses; nobody has them on an interface either (S98).
pub const EXTERNAL_IP: [&str; 2] = ["203.0.113.250", "2001:db8:113::250"];

/// Two nodes, an external host that sends the outside addresses to the first node, and the service with these changes.
pub fn world(options: &[&'static str], pods: &[&str], change: impl Fn(&mut Value)) -> Result<World> {
    let world = empty_world(options)?;
    publish(&world, pods, change)?;
    Ok(world)
}

/// The same without the service.
pub fn empty_world(options: &[&'static str]) -> Result<World> {
    let mut world = world_without_agents(options)?;
    world.start_agents()?;
    Ok(world)
}

/// The same before any agent has started.
pub fn world_without_agents(options: &[&'static str]) -> Result<World> {
    let mut all = vec!["--cluster-cidr", CLUSTER_CIDR];
    all.extend(options);
    let world = World::new(&Setup {
        shape: Shape {
            external: true,
            ..Default::default()
        },
        options: all,
        without_agents: true,
    })?;
    let node = world.topology.node(0);
    external(&world).netns.ip(&format!(
        "route add 203.0.113.0/24 via {}\nroute add 2001:db8:113::/64 via {}\n",
        node.v4, node.v6
    ))?;
    Ok(world)
}

/// The host outside the cluster.
pub fn external(world: &World) -> &Host {
    world
        .topology
        .external
        .as_ref()
        .expect("these worlds are built with a host outside")
}

/// The service as a load balancer with every kind of address.
pub fn load_balancer() -> Value {
    let mut service = manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS);
    service["spec"]["type"] = json!("LoadBalancer");
    service["spec"]["ports"][0]["nodePort"] = json!(NODE_PORT);
    service["spec"]["ports"][1]["nodePort"] = json!(NODE_PORT);
    service["spec"]["externalIPs"] = json!(EXTERNAL_IP);
    service["status"] = json!({"loadBalancer": {"ingress": [{"ip": LB[0]}, {"ip": LB[1]}]}});
    service
}

/// Writes the service with these changes, and waits until its cluster IPs lead to these pods everywhere.
pub fn publish(world: &World, pods: &[&str], change: impl Fn(&mut Value)) -> Result<()> {
    let mut service = load_balancer();
    change(&mut service);
    let endpoints = world.endpoints_of(pods);
    let mut objects = vec![service];
    objects.extend(manifests::slices("web", &ENDPOINT_PORTS, &endpoints));
    world.write("web", &objects)?;
    for vip in vips() {
        let family = endpoints.iter().filter(|(ip, _)| ip.is_ipv4() == vip.is_ipv4());
        let backends: Vec<_> = family.map(|(ip, _)| SocketAddr::new(*ip, ECHO)).collect();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            world.wait_for(vip, protocol, Some(&backends)).context("publishing")?;
        }
    }
    Ok(())
}

/// The outside addresses of the service in both families: nodePort of a node, load balancer, externalIP.
pub fn outside(node: &Host) -> Vec<SocketAddr> {
    let ports = [
        node.sockets(NODE_PORT).to_vec(),
        to_sockets(LB).to_vec(),
        to_sockets(EXTERNAL_IP).to_vec(),
    ];
    ports.concat()
}

/// Addresses with the service's port.
pub fn to_sockets(ips: [&str; 2]) -> [SocketAddr; 2] {
    ips.map(|ip| SocketAddr::new(ip.parse::<IpAddr>().expect("a constant"), 80))
}
