//! The kernel and what it has been given: version, features, mounts, capabilities.

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};
use aya::util::KernelVersion;

use super::{Check, Machine};
use crate::datapath::{AttachMode, Options, SocketLb, probe};

const FIB_LOOKUP: &str = "fib lookup";
const SET_RETVAL: &str = "set_retval";

pub(super) fn checks(machine: &Machine, options: &Options) -> Vec<Check> {
    let mut checks = vec![
        Check::needed("kernel version", probe::kernel(), |version| {
            format!("Linux {}", show(version))
        }),
        Check::needed(
            "capabilities",
            probe::capabilities(&machine.proc("self/status")),
            |()| "CAP_NET_ADMIN, and CAP_BPF or CAP_SYS_ADMIN".to_owned(),
        ),
        Check::needed("bpf()", probe::bpf_call(), |()| "may be called".to_owned()),
        Check::needed("BPF file system", probe::bpf_file_system(&options.bpf_dir), |()| {
            format!("at {}", options.bpf_dir.display())
        }),
    ];
    checks.push(if options.socket_lb == SocketLb::Off {
        Check::ok("cgroup2", "not needed: --socket-lb is off")
    } else {
        Check::needed("cgroup2", probe::cgroup(options.cgroup.as_deref()), |path| {
            format!("at {}", path.display())
        })
    });
    checks.push(btf(machine));
    checks.push(tcx(options.attach));
    checks.extend(helpers());
    checks.push(jit(machine));
    checks
}

fn show(version: KernelVersion) -> String {
    // Its only way out is its debug form: KernelVersion { major: 6, minor: 1, patch: 0 }.
    let text = format!("{version:?}");
    let numbers: Vec<&str> = text
        .split(|c: char| !c.is_ascii_digit())
        .filter(|word| !word.is_empty())
        .collect();
    numbers.join(".")
}

fn btf(machine: &Machine) -> Check {
    if machine.sys.join("kernel/btf/vmlinux").exists() {
        Check::ok("BTF", "the kernel has it")
    } else {
        let remedy = "use a kernel with CONFIG_DEBUG_INFO_BTF if the verifier refuses the programs";
        Check::warn(
            "BTF",
            "the kernel has none: programs load without type information",
            remedy,
        )
    }
}

fn tcx(attach: AttachMode) -> Check {
    match (probe::has_tcx(), attach) {
        (true, _) => Check::ok("tcx", "the kernel has it"),
        (false, AttachMode::Tcx) => {
            Check::fail("tcx", "the kernel has none (Linux 6.6)", "use --attach auto or classic")
        }
        (false, _) => Check::ok("tcx", "the kernel has none (Linux 6.6): classic filters are used"),
    }
}

fn helpers() -> Vec<Check> {
    let probed = |kind, helper| is_helper_supported(kind, helper).map_err(|error| error.to_string());
    let unknown = |check, error| Check::warn(check, format!("cannot be probed: {error}"), "run as root");
    let fib = match probed(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_fib_lookup) {
        Ok(true) => Check::ok(FIB_LOOKUP, "the kernel has it"),
        Ok(false) => Check::fail(
            FIB_LOOKUP,
            "the kernel has no bpf_fib_lookup",
            "use a kernel with CONFIG_INET",
        ),
        Err(error) => unknown(FIB_LOOKUP, error),
    };
    let retval = match probed(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval) {
        Ok(true) => Check::ok(SET_RETVAL, "the kernel has it: a refused connect says ECONNREFUSED"),
        Ok(false) => Check::warn(
            SET_RETVAL,
            "the kernel has no bpf_set_retval (Linux 5.18): a refused connect of the node itself says EPERM",
            "use a newer kernel if that matters",
        ),
        Err(error) => unknown(SET_RETVAL, error),
    };
    vec![fib, retval]
}

fn jit(machine: &Machine) -> Check {
    match machine.sysctl("net/core/bpf_jit_enable").as_deref() {
        Some("0") => Check::warn(
            "BPF JIT",
            "programs are interpreted",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        _ => Check::ok("BPF JIT", "programs are compiled"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_shown_as_people_write_them() {
        assert_eq!(show(KernelVersion::new(6, 1, 12)), "6.1.12");
    }
}
