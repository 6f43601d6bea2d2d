//! What a container takes from a process: capabilities, the right to gain any, and a writable root. For the tests that show with
//! how little the agent gets by.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

/// Names as `securityContext.capabilities` has them, with their numbers in the kernel; those the agent could want.
const CAPABILITIES: [(&str, libc::c_ulong); 5] = [
    ("NET_ADMIN", 12),
    ("SYS_ADMIN", 21),
    ("SYS_RESOURCE", 24),
    ("PERFMON", 38),
    ("BPF", 39),
];
/// Above the last capability of any kernel; dropping one that does not exist is an error that means nothing.
const CAPABILITY_END: libc::c_ulong = 64;

/// How a process is kept.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// The capabilities it keeps.
    pub capabilities: Vec<String>,
    /// Directories that become read-only beside the file system of the root.
    pub read_only: Vec<PathBuf>,
}

impl Confinement {
    /// Applies it to a command, for the moment when it is started.
    pub fn apply(&self, command: &mut Command) -> Result<()> {
        let kept = self
            .capabilities
            .iter()
            .map(|name| number(name))
            .collect::<Result<Vec<_>>>()?;
        let paths = self
            .read_only
            .iter()
            .map(|path| CString::new(path.as_os_str().as_bytes()));
        let mounts = paths.collect::<Result<Vec<_>, _>>().context("a path with NUL")?;
        // SAFETY: only system calls between fork and exec; all memory was made before.
        unsafe {
            command.pre_exec(move || {
                read_only(&mounts)?;
                drop_all_but(&kept)
            });
        }
        Ok(())
    }
}

/// Lets every system call through but bpf(), as an old seccomp profile of a container runtime does; from the start of the command on.
pub fn forbid_bpf(command: &mut Command) {
    // SAFETY: only system calls between fork and exec, on memory of the child's stack.
    unsafe { command.pre_exec(forbid_bpf_here) };
}

fn forbid_bpf_here() -> io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let line = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let mut filter = [
        // The number is what `seccomp_data` begins with.
        line(LOAD, 0, 0),
        line(IF_EQUAL, libc::SYS_bpf as u32, 1),
        line(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0),
        line(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call, which copies it.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) })
}

/// The number of a capability, as bits of `/proc/<pid>/status` count.
pub fn number(name: &str) -> Result<libc::c_ulong> {
    let found = CAPABILITIES.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, number)| *number)
        .with_context(|| format!("the number of CAP_{name} is not in CAPABILITIES"))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Remounts in a mount namespace of its own.
fn read_only(mounts: &[CString]) -> io::Result<()> {
    let none = std::ptr::null();
    // SAFETY: the paths outlive the calls, and null is allowed where it is given.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(
            none,
            c"/".as_ptr(),
            none,
            libc::MS_REC | libc::MS_PRIVATE,
            none.cast(),
        ))?;
        let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
        check(libc::mount(none, c"/".as_ptr(), none, flags, none.cast()))?;
        for mount in mounts {
            check(libc::mount(
                mount.as_ptr(),
                mount.as_ptr(),
                none,
                libc::MS_BIND,
                none.cast(),
            ))?;
            check(libc::mount(none, mount.as_ptr(), none, flags, none.cast()))?;
        }
    }
    Ok(())
}

/// Root that is executed gets what the bounding set has, as in a container.
fn drop_all_but(kept: &[libc::c_ulong]) -> io::Result<()> {
    for capability in (0..CAPABILITY_END).filter(|number| !kept.contains(number)) {
        // SAFETY: no pointers.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if let Err(error) = check(result)
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            return Err(error);
        }
    }
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}
