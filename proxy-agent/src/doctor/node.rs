//! The node's network settings, the agent's ports, and what former agents left.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use super::{Check, Machine};
use crate::config::RunConfig;
use crate::datapath::{Remains, probe, remains};

pub(super) fn checks(machine: &Machine, config: &RunConfig) -> Vec<Check> {
    let mut checks = vec![
        forwarding(machine, "IPv4 forwarding", "net/ipv4/ip_forward"),
        forwarding(machine, "IPv6 forwarding", "net/ipv6/conf/all/forwarding"),
        reverse_path(machine),
        source_ports(machine),
    ];
    let bpf_dir = &config.datapath.bpf_dir;
    let remains = remains(bpf_dir);
    checks.push(pins(&remains, bpf_dir));
    for (check, flag, address) in [
        ("healthz port", "--healthz-bind-address", config.healthz),
        ("metrics port", "--metrics-bind-address", config.metrics),
    ] {
        checks.push(port(check, flag, address, remains.is_locked));
    }
    checks
}

fn forwarding(machine: &Machine, check: &'static str, name: &str) -> Check {
    match machine.sysctl(name).as_deref() {
        Some("0") => Check::warn(
            check,
            "the node does not forward: connections from pods and from outside to endpoints elsewhere are lost",
            format!("sysctl -w {}=1", name.replace('/', ".")),
        ),
        Some(_) => Check::ok(check, "the node forwards"),
        None => Check::ok(check, "the kernel has no such protocol"),
    }
}

fn reverse_path(machine: &Machine) -> Check {
    let check = "reverse-path filter";
    match machine.sysctl("net/ipv4/conf/all/rp_filter").as_deref() {
        Some("1") => Check::ok(
            check,
            "strict: replies to the node itself arrive where the filter expects them",
        ),
        Some("2") => Check::ok(check, "loose"),
        _ => Check::ok(check, "off, unless an interface has one"),
    }
}

fn source_ports(machine: &Machine) -> Check {
    let check = "masquerade ports";
    let setting = machine.sysctl("net/ipv4/ip_local_port_range").unwrap_or_default();
    match probe::clear_ports(&setting) {
        Some(ports) => Check::ok(
            check,
            format!("{}-{}, clear of sockets and node ports", ports.start, ports.end - 1),
        ),
        None => Check::warn(
            check,
            format!("ip_local_port_range ({setting}) leaves no room: masqueraded connections share ports with sockets"),
            "narrow it, for example sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"",
        ),
    }
}

fn pins(remains: &Remains, bpf_dir: &Path) -> Check {
    let (check, dir) = ("pins", bpf_dir.display());
    if !remains.other_versions.is_empty() {
        let found = format!(
            "maps of other versions are pinned in {dir}: {}",
            remains.other_versions.join(", ")
        );
        return Check::warn(
            check,
            found,
            "start the agent, which takes them over, or remove them with proxy-agent cleanup",
        );
    }
    match (remains.is_locked, remains.maps, remains.missing.as_slice()) {
        (true, ..) => Check::ok(check, format!("an agent is running with {dir}")),
        (false, 0, _) => Check::ok(check, format!("nothing is pinned in {dir}")),
        (false, _, []) => Check::warn(
            check,
            format!("maps and programs of an agent that does not run are in {dir}: they forward as it left them"),
            "start the agent, or remove them with proxy-agent cleanup",
        ),
        (false, _, missing) => Check::warn(
            check,
            format!("some maps are not pinned in {dir}: {}", missing.join(", ")),
            "start the agent: it makes them anew, and connections through them are forgotten",
        ),
    }
}

fn port(check: &'static str, flag: &str, address: Option<SocketAddr>, agent_runs: bool) -> Check {
    let Some(parsed) = address else {
        return Check::ok(check, format!("{flag} is empty: not served"));
    };
    match TcpListener::bind(parsed) {
        Ok(_) if agent_runs => Check::warn(
            check,
            format!("{parsed} is free although an agent is running"),
            format!("give doctor the {flag} of that agent, or look into its log"),
        ),
        Ok(_) => Check::ok(check, format!("{parsed} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse && agent_runs => {
            Check::ok(check, format!("{parsed} is in use while an agent is running"))
        }
        Err(error) if error.kind() == ErrorKind::AddrInUse => Check::fail(
            check,
            format!("{parsed} is taken by another process, such as kube-proxy"),
            format!("stop it (`ss -ltnp` names it), or give another {flag}"),
        ),
        Err(error) => Check::fail(
            check,
            format!("{parsed} cannot be bound: {error}"),
            format!("give another {flag}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn machine(sysctls: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in sysctls {
            let path = dir.path().join("sys").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        let machine = Machine {
            proc: dir.path().to_owned(),
            sys: dir.path().to_owned(),
        };
        (dir, machine)
    }

    #[test]
    fn settings_that_matter_are_named() {
        let name = "net/ipv4/ip_forward";
        for (value, status) in [("0", Status::Warn), ("1", Status::Ok)] {
            let (_dir, machine) = machine(&[(name, value)]);
            let check = forwarding(&machine, "IPv4 forwarding", name);
            assert_eq!(check.status, status);
            assert_eq!(
                check.remedy.contains("net.ipv4.ip_forward=1"),
                status == Status::Warn,
                "{check:?}"
            );
        }
        let (_dir, machine) = machine(&[("net/ipv4/ip_local_port_range", "1024 65535")]);
        assert_eq!(source_ports(&machine).status, Status::Warn);
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().ok();
        let check = port("healthz port", "--healthz-bind-address", address, false);
        assert_eq!(check.status, Status::Fail, "{check:?}");
        assert!(
            check.found.contains(&address.unwrap().to_string()) && check.found.contains("is taken"),
            "{check:?}"
        );
        assert_eq!(
            port("healthz port", "--x", address, true).status,
            Status::Ok,
            "by the agent"
        );
        drop(taken);
        assert_eq!(port("healthz port", "--x", address, false).status, Status::Ok);
        assert_eq!(
            port("healthz port", "--x", None, false).status,
            Status::Ok,
            "not served"
        );
    }
}
