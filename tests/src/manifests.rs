//! Services and EndpointSlices as Kubernetes writes them, and a folder of them for `--manifests`.
//!
//! Plain JSON values, which are YAML too: a test that wants a broken object breaks the value.

use std::fmt::Display;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A named port of a Service or a slice.
#[derive(Clone, Debug)]
pub struct Port {
    /// Name, empty for the only one (S28).
    pub name: &'static str,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
    /// Number.
    pub number: u16,
}

/// A port of this name, protocol and number.
pub const fn port(name: &'static str, protocol: &'static str, number: u16) -> Port {
    Port { name, protocol, number }
}

impl Port {
    fn value(&self) -> Value {
        json!({"name": self.name, "protocol": self.protocol, "port": self.number})
    }
}

/// The objects of a file that people apply: YAML documents, without those that are empty.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let documents = text.split("\n---").map(serde_saphyr::from_str::<Value>);
    let parsed = documents
        .collect::<Result<Vec<_>, _>>()
        .context("a document is no YAML")?;
    Ok(parsed.into_iter().filter(|object| !object.is_null()).collect())
}

/// A ClusterIP Service of namespace `default`; one address for a single-stack service, two for dual-stack.
pub fn service(name: &str, cluster_ips: &[&str], ports: &[Port]) -> Value {
    let families: Vec<_> = cluster_ips
        .iter()
        .map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" })
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ips.first(),
            "clusterIPs": cluster_ips,
            "ipFamilies": families,
            "ipFamilyPolicy": if cluster_ips.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "ports": ports.iter().map(Port::value).collect::<Vec<_>>(),
        },
    })
}

/// An EndpointSlice of a service in namespace `default`.
pub fn slice(name: &str, service: &str, address_type: &str, ports: &[Port], endpoints: Vec<Value>) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": address_type,
        "ports": ports.iter().map(Port::value).collect::<Vec<_>>(),
        "endpoints": endpoints,
    })
}

/// A ready endpoint.
pub fn endpoint(address: impl Display, node: &str) -> Value {
    json!({
        "addresses": [address.to_string()],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": node,
    })
}

/// A Node with a zone and these addresses.
pub fn node(name: &str, zone: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<_> = addresses
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": addresses},
    })
}

/// The slices of a service, one per family that occurs among the endpoints (address and node name).
pub fn slices(service: &str, ports: &[Port], endpoints: &[(IpAddr, &str)]) -> Vec<Value> {
    [("IPv4", true), ("IPv6", false)]
        .map(|(family, is_v4)| {
            let endpoints: Vec<_> = endpoints.iter().filter(|(ip, _)| ip.is_ipv4() == is_v4).collect();
            let values = endpoints.iter().map(|(ip, node)| endpoint(ip, node)).collect();
            slice(
                &format!("{service}-{}", family.to_lowercase()),
                service,
                family,
                ports,
                values,
            )
        })
        .into()
}

/// Objects as one document for `kubectl apply -f -`, or a file of the folder.
pub fn list(objects: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string()
}

/// A folder of manifests. Files appear, change and disappear in one step, as an editor or a configuration tool does it.
#[derive(Clone)]
pub struct Manifests {
    dir: PathBuf,
    staging: PathBuf,
}

impl Manifests {
    /// Makes the folder `manifests` below `base`.
    pub fn new(base: &Path) -> Result<Self> {
        let (dir, staging) = (base.join("manifests"), base.join("staging"));
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        fs::create_dir_all(&staging).with_context(|| format!("making {}", staging.display()))?;
        Ok(Self { dir, staging })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes objects into `<name>.json`, replacing what was there.
    pub fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        self.write_text(&format!("{name}.json"), &list(objects))
    }

    /// Writes any text into a file, replacing what was there.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        let (from, to) = (self.staging.join(file), self.dir.join(file));
        fs::write(&from, text).with_context(|| format!("writing {}", from.display()))?;
        fs::rename(&from, &to).with_context(|| format!("moving it to {}", to.display()))
    }

    /// Removes `<name>.json`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.dir.join(format!("{name}.json"));
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_one_per_family() {
        let ports = [port("http", "TCP", 8080)];
        let endpoints = [
            ("10.0.0.1".parse().unwrap(), "node1"),
            ("fd00::1".parse().unwrap(), "node1"),
        ];
        let slices = slices("web", &ports, &endpoints);
        let addresses: Vec<_> = slices
            .iter()
            .map(|s| s["endpoints"][0]["addresses"][0].as_str().unwrap())
            .collect();
        assert_eq!(addresses, ["10.0.0.1", "fd00::1"]);
    }

    #[test]
    fn a_file_is_replaced_in_one_step() {
        let base = crate::leftovers::temp_dir("manifests").unwrap();
        let manifests = Manifests::new(base.path()).unwrap();
        manifests
            .write("web", &[service("web", &["10.96.0.1"], &[port("", "TCP", 80)])])
            .unwrap();
        manifests.write("web", &[]).unwrap();
        assert_eq!(fs::read_dir(manifests.dir()).unwrap().count(), 1);
        manifests.remove("web").unwrap();
        assert_eq!(fs::read_dir(manifests.dir()).unwrap().count(), 0);
    }
}
