//! Network namespaces that clean up after themselves, and ways to run code and commands inside them.
//!
//! Named under `/run/netns`, so that `ip -n` and `nsenter --net=` reach them. Only the network namespace is entered: mounts, and
//! with them bpffs and the cgroup hierarchy, stay visible.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::leftovers::{NETNS_DIR, unique_name};
use crate::process;

/// A network namespace; removed when the last clone of the guard is dropped.
#[derive(Clone)]
pub struct Netns(Arc<Inner>);

struct Inner {
    name: String,
    path: PathBuf,
    file: File,
    keep: std::sync::atomic::AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.keep.load(std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

impl Netns {
    /// A new namespace with its loopback up.
    pub fn new(label: &str) -> Result<Self> {
        let name = unique_name(label);
        let path = Path::new(NETNS_DIR).join(&name);
        fs::create_dir_all(NETNS_DIR).context("creating /run/netns")?;
        let file = thread::scope(|scope| {
            scope
                .spawn(|| make(&path))
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
        .with_context(|| format!("making network namespace {name} (this needs root)"))?;
        let netns = Self(Arc::new(Inner {
            name,
            path,
            file,
            keep: false.into(),
        }));
        // Addresses must be usable at once, so no duplicate address detection.
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The namespace of the calling thread, which belongs to somebody else.
    pub fn current() -> Result<Self> {
        let path = PathBuf::from("/proc/thread-self/ns/net");
        Ok(Self(Arc::new(Inner {
            name: "the current namespace".into(),
            file: File::open(&path)?,
            path,
            keep: true.into(),
        })))
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its path, as `nsenter --net=` wants it.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Leaves the namespace standing when the guard is dropped.
    pub fn keep(&self) {
        self.0.keep.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Runs `body` inside the namespace, on a thread of its own: the namespace belongs to the thread.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                body()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Like [`Netns::run`], without waiting for the end.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let netns = self.clone();
        thread::spawn(move || {
            netns.enter();
            // The thread itself keeps the namespace alive; the guard must not wait for it.
            drop(netns);
            body()
        })
    }

    fn enter(&self) {
        if self.is_entered().unwrap_or(false) {
            // In a pod one has no right to, nor need one.
            return;
        }
        setns(&self.0.file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("entering {}: {e}", self.0.name));
    }

    fn is_entered(&self) -> std::io::Result<bool> {
        let (here, there) = (fs::metadata("/proc/thread-self/ns/net")?, self.0.file.metadata()?);
        Ok((here.dev(), here.ino()) == (there.dev(), there.ino()))
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.0.file.as_raw_fd();
        let alive = self.clone();
        // SAFETY: setns is async-signal-safe; the descriptor stays open because the closure owns a clone of the guard.
        unsafe {
            command.pre_exec(move || {
                let _ = &alive;
                match libc::setns(fd, libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        command
    }

    /// Runs `ip` of iproute2 inside, one command per line.
    pub fn ip(&self, lines: &str) -> Result<()> {
        process::run_with_input(self.command("ip").args(["-batch", "-"]), lines)
            .with_context(|| format!("configuring {} (iproute2 is needed) with\n{lines}", self.0.name))?;
        Ok(())
    }

    /// Writes a sysctl of the namespace, named by its path below `/proc/sys`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.run(|| fs::write(&path, value))
            .with_context(|| format!("writing {value} to {}", path.display()))
    }
}

/// Runs `body` inside the namespace at a path, on a thread of its own.
pub fn run_at<T: Send>(path: &Path, body: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(path).with_context(|| format!("opening namespace {}", path.display()))?;
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).context("entering a namespace")?;
            Ok(body())
        });
        inside.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// On a thread that ends afterwards: only it moves into the new namespace.
fn make(path: &Path) -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    File::create(path)?;
    let of_this_thread = "/proc/thread-self/ns/net";
    let bound = mount(Some(of_this_thread), path, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    if bound.is_err() {
        let _ = fs::remove_file(path);
    }
    bound?;
    Ok(File::open(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_entered_by_threads_and_commands_and_goes_with_its_guard() {
        let netns = Netns::new("unit").unwrap();
        let path = netns.path().to_owned();
        let outside = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let inside = netns.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
        assert_ne!(inside, outside);
        assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
        let child = process::run(netns.command("readlink").arg("/proc/self/ns/net")).unwrap();
        assert_eq!(child.trim(), inside.to_str().unwrap());
        drop(netns);
        assert!(!path.exists());
    }

    #[test]
    fn a_panic_inside_comes_out_and_leaves_nothing() {
        let netns = Netns::new("panic").unwrap();
        let path = netns.path().to_owned();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || netns.run(|| panic!("inside"))));
        assert!(result.is_err());
        assert!(!path.exists());
    }
}
