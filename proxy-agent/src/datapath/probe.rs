//! What the kernel and the machine must provide, found out before anything is changed. Each failure is one sentence that names
//! what is missing and what to do.

use std::ffi::CString;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aya::programs::loaded_programs;
use aya::util::KernelVersion;
use proxy_common::config::{DEFAULT_PORT_COUNT, DEFAULT_PORT_FIRST};
use proxy_common::names;

use super::error::DatapathError;
use super::options::{AttachMode, Options, SocketLb};
use super::sys;

const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 15, 0);
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: u32 = 0x6367_7270;
/// The bit of CAP_SYS_ADMIN, which includes CAP_BPF and CAP_PERFMON.
const SYS_ADMIN: u32 = 21;
/// What the agent needs: name, bit, and the capability that does as well. PERFMON is for the verifier: pointer arithmetic with
/// bounds that it has to work out is for those who could read all memory anyway.
const CAPABILITIES: [(&str, u32, Option<u32>); 3] = [
    ("CAP_NET_ADMIN", 12, None),
    ("CAP_BPF", 39, Some(SYS_ADMIN)),
    ("CAP_PERFMON", 38, Some(SYS_ADMIN)),
];

/// Where nodePorts live unless the API server is told otherwise.
const NODE_PORTS: Range<u32> = 30_000..32_768;
/// Ports below are left to servers.
const FIRST_UNPRIVILEGED_PORT: u32 = 1_024;
/// Fewer ports than this are not worth searching in.
const FEWEST_PORTS: u32 = 256;

/// Checks everything that these options ask of kernel and machine; gives the kernel's version.
pub(super) fn requirements(options: &Options) -> Result<KernelVersion, DatapathError> {
    let kernel = kernel()?;
    capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default())?;
    bpf_call()?;
    bpf_file_system(&options.bpf_dir)?;
    if options.attach == AttachMode::Tcx && !has_tcx() {
        return Err(missing("tcx (Linux 6.6)", "use --attach auto or classic"));
    }
    if options.socket_lb != SocketLb::Off {
        cgroup(options.cgroup.as_deref())?;
    }
    Ok(kernel)
}

/// Does anything but capabilities keep this process from bpf()?
pub(crate) fn bpf_call() -> Result<(), DatapathError> {
    // It asks the kernel for a pin that nobody has, which changes nothing.
    match sys::open_pin(Path::new("/")) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => Err(missing(
            "the right to call bpf()",
            "a seccomp profile or security module forbids it though the capabilities are there: allow bpf in it, use a newer \
             container runtime, or make the container privileged",
        )),
        _ => Ok(()),
    }
}

/// The kernel's version, if it is not too old.
pub(crate) fn kernel() -> Result<KernelVersion, DatapathError> {
    let kernel = KernelVersion::current().map_err(|error| missing("the kernel's version", error))?;
    if kernel < OLDEST_KERNEL {
        return Err(missing("Linux 5.15", format!("this is {kernel:?}, use a newer kernel")));
    }
    Ok(kernel)
}

/// Can maps be pinned there?
pub(crate) fn bpf_file_system(bpf_dir: &Path) -> Result<(), DatapathError> {
    // The directory itself may not exist yet: what counts is the file system it will be made on.
    let existing = bpf_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    if file_system(existing) != Some(BPF_FS_MAGIC) {
        return Err(missing(
            &format!("a BPF file system at --bpf-dir {}", bpf_dir.display()),
            "mount one with `mount -t bpf bpf /sys/fs/bpf`, or name a folder on one that is mounted",
        ));
    }
    Ok(())
}

/// Can programs be attached with tcx links?
pub(crate) fn has_tcx() -> bool {
    super::links::has_tcx()
}

/// Is the program of this id our XDP program, of whichever agent?
pub(crate) fn is_our_xdp(id: u32) -> bool {
    loaded_programs()
        .flatten()
        .any(|program| program.id() == id && program.name_as_str() == Some(names::XDP_FORWARD))
}

fn missing(what: &str, remedy: impl ToString) -> DatapathError {
    DatapathError::Missing {
        what: what.to_owned(),
        remedy: remedy.to_string(),
    }
}

/// What this process may do, by its `/proc/self/status`.
pub(crate) fn capabilities(status: &str) -> Result<(), DatapathError> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default();
    let has = |capability: u32| effective >> capability & 1 == 1;
    for (name, number, substitute) in CAPABILITIES {
        if !has(number) && !substitute.is_some_and(has) {
            return Err(missing(
                &format!("the capability {name}"),
                "give it to the agent (securityContext.capabilities.add in a pod), or run it as root or privileged",
            ));
        }
    }
    Ok(())
}

fn file_system(path: &Path) -> Option<u32> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: an all-zero `statfs` is valid, and both pointers live through the call.
    let (result, stat) = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        (libc::statfs(path.as_ptr(), &mut stat), stat)
    };
    (result == 0).then_some(stat.f_type as u32)
}

/// The cgroup whose sockets are translated: the given one, or the first cgroup2 mount.
pub(crate) fn cgroup(wanted: Option<&Path>) -> Result<PathBuf, DatapathError> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let path = match wanted {
        Some(path) => path.to_owned(),
        None => first_cgroup2(&mounts).ok_or_else(|| {
            missing(
                "a cgroup2 mount",
                "mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup`, or use --socket-lb off",
            )
        })?,
    };
    if file_system(&path) != Some(CGROUP2_SUPER_MAGIC) {
        return Err(missing(
            &format!("a cgroup2 directory at --cgroup {}", path.display()),
            "name one that exists, or use --socket-lb off",
        ));
    }
    Ok(path)
}

fn first_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let path = fields.nth(1)?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Source ports for masqueraded connections, clear of the node's ephemeral ports and of nodePorts.
pub(super) fn masquerade_ports() -> Range<u32> {
    // There is one setting for both families.
    let setting = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let ports = clear_ports(&setting);
    if ports.is_none() {
        tracing::warn!(
            ip_local_port_range = setting.trim(),
            "ip_local_port_range leaves no room for masqueraded connections' source ports: some may be shared with sockets of the node"
        );
    }
    ports.unwrap_or(DEFAULT_PORT_FIRST..DEFAULT_PORT_FIRST + DEFAULT_PORT_COUNT)
}

/// The default, unless `ip_local_port_range` reaches into it: then the largest gap beside it and the nodePorts.
pub(crate) fn clear_ports(setting: &str) -> Option<Range<u32>> {
    let mut numbers = setting.split_ascii_whitespace().filter_map(|n| n.parse::<u32>().ok());
    let (low, high) = numbers.next().zip(numbers.next()).unwrap_or((32_768, 60_999));
    let default = DEFAULT_PORT_FIRST..DEFAULT_PORT_FIRST + DEFAULT_PORT_COUNT;
    if high < default.start || low >= default.end {
        return Some(default);
    }
    let mut taken = [NODE_PORTS, low..high + 1];
    taken.sort_by_key(|range| range.start);
    let [first, second] = taken;
    let end = first.end.max(second.end);
    [
        FIRST_UNPRIVILEGED_PORT..first.start,
        first.end..second.start,
        end..65_536,
    ]
    .into_iter()
    .filter(|gap| gap.end.saturating_sub(gap.start) >= FEWEST_PORTS)
    .max_by_key(|gap| gap.end - gap.start)
    // Those next to well-known servers are the least welcome: the upper end of a large gap.
    .map(|gap| gap.end.saturating_sub(DEFAULT_PORT_COUNT).max(gap.start)..gap.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_keep_clear_of_others() {
        assert_eq!(clear_ports("32768\t60999\n"), Some(61_000..65_536));
        assert_eq!(clear_ports(""), Some(61_000..65_536));
        for (low, high) in [
            (1024, 65_535),
            (32_768, 65_535),
            (1024, 29_999),
            (40_000, 61_500),
            (10_000, 65_535),
        ] {
            let Some(ports) = clear_ports(&format!("{low} {high}")) else {
                assert_eq!((low, high), (1024, 65_535));
                continue;
            };
            assert!(!ports.is_empty() && ports.end <= 65_536);
            for port in [ports.start, ports.end - 1] {
                assert!(!(low..=high).contains(&port), "{ports:?} in {low}-{high}");
                assert!(!NODE_PORTS.contains(&port), "{ports:?} in nodePorts");
            }
        }
    }

    #[test]
    fn the_first_cgroup2_mount_is_found() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(first_cgroup2(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(first_cgroup2("proc /proc proc rw 0 0"), None);
    }

    #[test]
    fn a_missing_capability_is_named() {
        let status = |bits: &[u32]| format!("CapEff:\t{:016x}\n", bits.iter().map(|bit| 1_u64 << bit).sum::<u64>());
        assert!(capabilities("CapEff:\t000001ffffffffff\n").is_ok());
        assert!(capabilities(&status(&[12, 38, 39])).is_ok());
        assert!(capabilities(&status(&[12, SYS_ADMIN])).is_ok());
        for (bits, name) in [
            (&[38, 39][..], "CAP_NET_ADMIN"),
            (&[12, 38], "CAP_BPF"),
            (&[12, 39], "CAP_PERFMON"),
            (&[], "CAP_NET_ADMIN"),
        ] {
            let error = capabilities(&status(bits)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let error = bpf_file_system(Path::new("/tmp/no-bpf-here")).unwrap_err();
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }
}
