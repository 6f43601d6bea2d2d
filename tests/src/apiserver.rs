//! A real etcd and kube-apiserver inside a namespace, and kubectl for it.
//!
//! Both listen only inside the namespace they are given (that of the underlay, so that agents on the nodes reach the API server
//! at its address there), on their usual ports. Used by the API server tests, the latency benchmark and whole clusters.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;

use crate::netns::Netns;
use crate::topology::SERVICE_CIDR;
use crate::{leftovers, process};

/// Version that `cargo xtask setup` builds; `tests/kubernetes/go.mod` names the same.
pub(crate) const KUBERNETES: &str = "kubernetes-1.36.3";
const PORT: u16 = 6443;
const START: Duration = Duration::from_secs(180);
const ADMIN_TOKEN: &str = "admin-token";
const AGENT_TOKEN: &str = "agent-token";
/// The user that the agent's DaemonSet runs as, so that the tests prove its RBAC rules.
pub const AGENT_USER: &str = "system:serviceaccount:kube-system:proxy-agent";

/// A running API server; ended and removed when dropped.
pub struct ApiServer {
    netns: Netns,
    address: IpAddr,
    dir: TempDir,
    etcd: Child,
    server: Option<Child>,
}

/// Finds `kube-apiserver`, `kubectl`, `kube-proxy` or `etcd`.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let candidates = match std::env::var_os("KUBEBUILDER_ASSETS") {
        Some(assets) => vec![PathBuf::from(assets)],
        None => vec![
            home.join(".cache/ebpf-proxy").join(KUBERNETES),
            "/usr/bin".into(),
            "/usr/local/bin".into(),
        ],
    };
    let found = candidates.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is missing: run `cargo xtask setup` (it needs Go and Debian's etcd-server), or set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver, kubectl and kube-proxy")
    })
}

impl ApiServer {
    /// Starts both in `netns`, where `address` must be an address that clients reach.
    pub fn start(netns: &Netns, address: IpAddr) -> Result<Self> {
        program("kubectl")?;
        let dir = leftovers::temp_dir("apiserver")?;
        write_credentials(dir.path(), address)?;
        let mut etcd = netns.command(program("etcd")?);
        etcd.arg("--data-dir")
            .arg(dir.path().join("etcd"))
            .args(["--log-level", "warn"]);
        etcd.args([
            "--listen-client-urls",
            "http://127.0.0.1:2379",
            "--advertise-client-urls",
            "http://127.0.0.1:2379",
        ]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        let etcd = process::spawn_logged(etcd, &dir.path().join("etcd.log"))?;
        let mut server = Self {
            netns: netns.clone(),
            address,
            dir,
            etcd,
            server: None,
        };
        server.launch()?;
        Ok(server)
    }

    /// Starts the API server (again): same address, same data.
    pub fn launch(&mut self) -> Result<()> {
        if self.server.is_some() {
            bail!("the API server runs already");
        }
        let dir = self.dir.path().to_owned();
        let file = |name: &str| dir.join(name).display().to_string();
        let mut command = self.netns.command(program("kube-apiserver")?);
        command.args([
            "--etcd-servers",
            "http://127.0.0.1:2379",
            "--authorization-mode",
            "RBAC",
        ]);
        command.args(["--secure-port", &PORT.to_string(), "--bind-address", "0.0.0.0"]);
        command.args([
            "--advertise-address",
            &self.address.to_string(),
            "--service-cluster-ip-range",
            SERVICE_CIDR,
        ]);
        // The names of nodes are known to nobody.
        command.arg("--kubelet-preferred-address-types=InternalIP");
        // The agent's DaemonSet is privileged, which real clusters allow.
        command.arg("--allow-privileged=true");
        command.args(["--token-auth-file", &file("tokens.csv"), "--cert-dir", &file("certs")]);
        command.args([
            "--tls-cert-file",
            &file("server.crt"),
            "--tls-private-key-file",
            &file("server.key"),
        ]);
        command.args(["--service-account-issuer", "https://kubernetes.default.svc"]);
        command.args([
            "--service-account-key-file",
            &file("sa.pub"),
            "--service-account-signing-key-file",
            &file("sa.key"),
        ]);
        self.server = Some(process::spawn_logged(command, &self.dir.path().join("apiserver.log"))?);
        let ready = process::wait_until(START, || {
            let exited = self
                .server
                .as_mut()
                .is_some_and(|c| c.try_wait().is_ok_and(|status| status.is_some()));
            (exited || self.kubectl(&["get", "--raw", "/readyz"]).is_ok()).then_some(!exited)
        });
        if ready != Some(true) {
            let log = |name: &str| fs::read_to_string(file(name)).unwrap_or_default();
            bail!(
                "the API server does not come up; etcd says\n{}\nthe API server says\n{}",
                log("etcd.log"),
                log("apiserver.log")
            );
        }
        Ok(())
    }

    /// Ends the API server without warning; etcd and the data stay.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// Kubeconfig of an administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Kubeconfig of the agent's service account, which may do what RBAC rules in the API server say.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        self.dir.path().join("agent-kubeconfig")
    }

    /// A file of its credentials, such as `ca.crt` or `sa.key`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The namespace it listens in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Runs kubectl as administrator.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        process::run(self.kubectl_command()?.args(args))
    }

    /// Runs kubectl with `input` on its standard input.
    pub fn kubectl_with_input(&self, args: &[&str], input: &str) -> Result<String> {
        process::run_with_input(self.kubectl_command()?.args(args), input)
    }

    /// Applies objects.
    pub fn apply(&self, objects: &[serde_json::Value]) -> Result<String> {
        self.kubectl_with_input(&["apply", "-f", "-"], &crate::manifests::list(objects))
    }

    /// The start of a command line for people, by which kubectl reaches it.
    pub fn kubectl_line(&self) -> Result<String> {
        let (netns, kubectl, config) = (self.netns.path(), program("kubectl")?, self.kubeconfig());
        let (netns, kubectl, config) = (netns.display(), kubectl.display(), config.display());
        Ok(format!("nsenter --net={netns} {kubectl} --kubeconfig {config}"))
    }

    /// A command for kubectl as administrator.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut command = self.netns.command(program("kubectl")?);
        command.arg("--kubeconfig").arg(self.kubeconfig());
        command.arg("--cache-dir").arg(self.dir.path().join("kubectl-cache"));
        Ok(command)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("apiserver.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            let _ = writeln!(std::io::stderr(), "--- last lines of the API server's log\n{tail}\n---");
        }
        self.stop();
        let _ = self.etcd.kill();
        let _ = self.etcd.wait();
    }
}

/// Certificates, keys, tokens and kubeconfigs.
fn write_credentials(dir: &Path, address: IpAddr) -> Result<()> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::new(authority, authority_key);
    let server_key = KeyPair::generate()?;
    // The third is the address of the `kubernetes` Service: the first of the service network.
    let names = [
        address.to_string(),
        "127.0.0.1".into(),
        "10.96.0.1".into(),
        "kubernetes.default.svc".into(),
    ];
    let server = CertificateParams::new(names)?.signed_by(&server_key, &issuer)?;
    let accounts = KeyPair::generate()?;
    fs::write(dir.join("ca.crt"), &authority_pem)?;
    fs::write(dir.join("server.crt"), server.pem())?;
    fs::write(dir.join("server.key"), server_key.serialize_pem())?;
    fs::write(dir.join("sa.key"), accounts.serialize_pem())?;
    fs::write(dir.join("sa.pub"), accounts.public_key_pem())?;
    let tokens =
        format!("{ADMIN_TOKEN},admin,1,\"system:masters\"\n{AGENT_TOKEN},{AGENT_USER},2,\"system:serviceaccounts\"\n");
    fs::write(dir.join("tokens.csv"), tokens)?;
    for (file, token) in [("kubeconfig", ADMIN_TOKEN), ("agent-kubeconfig", AGENT_TOKEN)] {
        let server = format!("https://{}", std::net::SocketAddr::new(address, PORT));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": dir.join("ca.crt")}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        });
        fs::write(dir.join(file), config.to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::{port, service};

    /// A real API server gives a dual-stack service its addresses, and keeps it over a restart.
    #[test]
    fn objects_survive_a_restart() {
        let netns = Netns::new("api").unwrap();
        let mut api = ApiServer::start(&netns, "127.0.0.1".parse().unwrap()).unwrap();
        api.apply(&[service(
            "web",
            &["10.96.0.10", "fd00:96::a"],
            &[port("http", "TCP", 80)],
        )])
        .unwrap();
        let may = api.kubectl(&["auth", "can-i", "list", "services", "--as", AGENT_USER]);
        assert!(may.is_err(), "without RBAC rules the agent's account may do nothing");
        api.stop();
        api.launch().unwrap();
        let addresses = api
            .kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs}"])
            .unwrap();
        assert_eq!(addresses, r#"["10.96.0.10","fd00:96::a"]"#);
    }
}
