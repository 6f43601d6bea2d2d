//! From the embedded object to verified programs and pinned maps. Called once by `Datapath::open`, before anything is attached.
//!
//! What must stay true: programs are loaded and verified before any link is touched; a pinned map is reused only if its layout is
//! the one the programs were built for (`upgrade`); one agent per pin directory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier, Xdp};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use aya_log::EbpfLogger;
use proxy_common::config;
use proxy_common::names;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::DatapathError;
use super::options::{BpfLogLevel, Options, SocketLb};
use super::sync::SyncReport;
use super::sys::raw::RawMap;
use super::upgrade::{self, Former, Layouts};
use super::{probe, sys};

/// The programs, compiled by `cargo xtask build-ebpf`; empty in a development build without them.
pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf"));

/// How long an agent that is ending is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Time between two looks at the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The programs that a start does not wait for.
const LATER: [&str; 2] = [names::TC_INGRESS_L3, names::TC_EGRESS_L3];
/// Programs that are verified at a time, at most: each takes some tens of megabytes of the kernel's memory meanwhile. One processor is
/// left to what the node does otherwise.
const VERIFIERS: usize = 4;

/// Where things are pinned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pins {
    /// `<bpf-dir>`.
    pub(crate) base: PathBuf,
    /// `<bpf-dir>/v<LAYOUT_VERSION>`.
    pub(crate) root: PathBuf,
    /// The maps, by name.
    pub(crate) maps: PathBuf,
    /// The links: `<ifindex>-ingress`, `<ifindex>-egress`, `<ifindex>-xdp`, or the name of a socket program.
    pub(crate) links: PathBuf,
}

impl Pins {
    pub(crate) fn new(bpf_dir: &Path) -> Self {
        Self::at(bpf_dir, bpf_dir.join(format!("v{}", names::LAYOUT_VERSION)))
    }

    /// Those in the directory of some version.
    pub(crate) fn at(bpf_dir: &Path, root: PathBuf) -> Self {
        Self {
            base: bpf_dir.to_owned(),
            maps: root.join("maps"),
            links: root.join("links"),
            root,
        }
    }
}

/// Names of all pinned maps.
pub(crate) fn pinned_maps() -> impl Iterator<Item = &'static str> {
    [
        names::FRONTENDS,
        names::BACKENDS,
        names::REWRITES,
        names::NODE_ADDRS,
        names::SOCKETS,
        names::FRAGMENTS,
        names::AFFINITY,
        names::SRC_RANGES,
        names::SETTINGS,
        names::CLUSTER_IPS,
    ]
    .into_iter()
    .flatten()
    .chain([
        names::LINKS,
        names::SOCKET_OPT_OUT,
        names::SERVICES,
        names::REASONS,
        names::COUNTERS,
        names::TRACE,
        names::EVENTS,
    ])
}

/// Loaded programs by name.
type ProgramFds = HashMap<String, OwnedFd>;

/// The programs. Those for interfaces without Ethernet header, which few nodes have, take the verifier as long as the others of their
/// kind: they are verified when somebody needs them, or once there is nothing more urgent to do.
pub(crate) struct Programs {
    fds: ProgramFds,
    rest: Mutex<Rest>,
    others: OnceLock<ProgramFds>,
}

/// What becomes of the other programs.
enum Rest {
    Waiting(Box<Ebpf>),
    Verifying(JoinHandle<Result<ProgramFds, DatapathError>>),
    /// Verified, or refused, which has been said.
    Done,
}

impl Programs {
    /// The program, if it was asked for at load; waits for one that is not verified yet.
    pub(crate) fn get(&self, name: &str) -> Option<BorrowedFd<'_>> {
        if LATER.contains(&name)
            && let Err(error) = self.finish()
        {
            let error = anyhow::Error::from(error);
            tracing::error!(
                error = format!("{error:#}"),
                "no programs for interfaces without Ethernet header"
            );
        }
        let found = self.fds.get(name).or_else(|| self.others.get()?.get(name));
        found.map(AsFd::as_fd)
    }

    /// There is nothing more urgent to do: has the others verified, on a thread of their own.
    pub(crate) fn verify_others(&self) {
        let mut rest = self.rest();
        if let Rest::Waiting(mut ebpf) = std::mem::replace(&mut *rest, Rest::Done) {
            let verify = move || verify_programs(&mut ebpf, &LATER);
            match thread::Builder::new().name("verifier".into()).spawn(verify) {
                Ok(thread) => *rest = Rest::Verifying(thread),
                Err(error) => tracing::error!(%error, "no programs for interfaces without Ethernet header"),
            }
        }
    }

    /// Waits until all are verified. An error is given once.
    pub(crate) fn finish(&self) -> Result<(), DatapathError> {
        let mut rest = self.rest();
        let fds = match std::mem::replace(&mut *rest, Rest::Done) {
            Rest::Done => return Ok(()),
            Rest::Waiting(mut ebpf) => verify_programs(&mut ebpf, &LATER)?,
            Rest::Verifying(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
        };
        // Nothing comes after this.
        let _ = self.others.set(fds);
        Ok(())
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What stays open while the agent runs.
pub(crate) struct Loaded {
    pub(crate) programs: Programs,
    pub(crate) pins: Pins,
    /// The pinned maps.
    maps: Vec<(PathBuf, OwnedFd)>,
    /// Maps of another layout that are to be taken over: until then the pins are not where they belong.
    former: Option<Former>,
    /// Held for its lock: a second agent with the same directory is refused.
    _lock: File,
    _logging: Option<Logging>,
}

impl Loaded {
    /// Puts maps and programs in the place of those of another version, and removes what is left of it.
    pub(crate) fn take_over(&mut self) -> Result<(), DatapathError> {
        match self.former.take() {
            Some(former) => former.take_over(&self.programs),
            None => upgrade::clear_away(&self.pins, &self.programs),
        }
    }

    /// Leaves another version where it is, once all programs are verified.
    pub(crate) fn abandon(&self) -> Result<(), DatapathError> {
        self.programs.finish()?;
        self.former.as_ref().map_or(Ok(()), Former::abandon)
    }

    /// Pins the maps again whose pins somebody removed: without, the next agent would begin with empty ones (S164).
    pub(crate) fn repair_pins(&self, report: &mut SyncReport) {
        for (path, map) in self.maps.iter().filter(|(path, _)| !path.exists()) {
            if let Err(error) = repin(map.as_fd(), path) {
                report.fail(path.display(), error);
            }
        }
    }
}

/// Pins a map or link whose pin somebody removed.
pub(crate) fn repin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    sys::pin(object, path)?;
    tracing::warn!(pin = %path.display(), "the pin was removed, made again");
    Ok(())
}

/// Makes the directories, checks what is pinned, loads and verifies the programs.
pub(crate) fn load(options: &Options) -> Result<Loaded, DatapathError> {
    if OBJECT.is_empty() {
        return Err(DatapathError::NoObject);
    }
    let kernel = probe::requirements(options)?;
    let pins = Pins::new(&options.bpf_dir);
    fs::create_dir_all(&pins.base).map_err(DatapathError::call("creating the directory", pins.base.display()))?;
    let lock = lock(&pins.base)?;
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| Box::new(aya::EbpfError::from(error)))?;
    let layouts = Layouts::of_object(&object)?;
    let former = upgrade::find(&pins.base, &object, &layouts)?;
    let place = match &former {
        Some(former) => {
            former.begin(&layouts)?;
            &former.building.pins
        }
        None => {
            for dir in [&pins.maps, &pins.links] {
                fs::create_dir_all(dir).map_err(DatapathError::call("creating the directory", dir.display()))?;
            }
            layouts.write(&pins.maps)?;
            &pins
        }
    };
    let sizes = map_sizes(place, &object, former.as_ref(), options)?;
    let ports = probe::masquerade_ports();
    let constants = Constants {
        host_netns: sys::netns_cookie()
            .map_err(DatapathError::call("SO_NETNS_COOKIE", "the agent's network namespace"))?,
        masquerade_all: u32::from(options.masquerade_all),
        pods_by_link: u32::from(options.pods.is_by_link()),
        socket_pods: u32::from(options.socket_lb == SocketLb::All),
        have_set_retval: u32::from(kernel >= KernelVersion::new(5, 18, 0)),
        have_csum_ipv6: u32::from(kernel >= KernelVersion::new(6, 16, 0)),
        port_first: ports.start,
        port_count: ports.end - ports.start,
        count_services: u32::from(options.service_metrics),
        log_level: options.log_level as u8,
    };
    tracing::info!(
        port_first = constants.port_first,
        port_count = constants.port_count,
        set_retval = constants.have_set_retval,
        csum_ipv6 = constants.have_csum_ipv6,
        host_netns = constants.host_netns,
        "constants of the programs"
    );
    let mut ebpf = load_object(place, &sizes, &constants)?;
    let logging = start_logging(&mut ebpf, options.log_level);
    let programs = load_programs(ebpf, options)?;
    tracing::info!(programs = programs.fds.len(), pins = %pins.root.display(), "programs verified");
    let maps = pinned_maps()
        .chain([names::LAYOUTS])
        .map(|name| {
            let path = place.maps.join(name);
            let map = sys::open_pin(&path).map_err(DatapathError::call("opening the pinned map", path.display()))?;
            Ok((pins.maps.join(name), map))
        })
        .collect::<Result<_, DatapathError>>()?;
    Ok(Loaded {
        programs,
        pins,
        maps,
        former,
        _lock: lock,
        _logging: logging,
    })
}

/// Takes the lock of the pin directory. The kernel releases it when the agent ends, however it ends; one that is just ending is
/// waited for.
pub(crate) fn lock(dir: &Path) -> Result<File, DatapathError> {
    let file = File::open(dir).map_err(DatapathError::call("opening the directory", dir.display()))?;
    let started = Instant::now();
    loop {
        // SAFETY: no pointers; the descriptor is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(DatapathError::call("flock", dir.display())(error));
        }
        if started.elapsed() > LOCK_PATIENCE {
            return Err(DatapathError::Busy(dir.to_owned()));
        }
        thread::sleep(LOCK_INTERVAL);
    }
}

/// The sizes to load with: those of `capacities`, or those that the maps have already that are pinned or are to be copied.
fn map_sizes(
    pins: &Pins,
    object: &aya_obj::Object,
    former: Option<&Former>,
    options: &Options,
) -> Result<Vec<(&'static str, u32)>, DatapathError> {
    let capacities = options.capacities;
    let mut sizes: Vec<(&'static str, u32)> = Vec::new();
    for (pair, size) in [
        (names::FRONTENDS, capacities.frontends),
        (names::BACKENDS, capacities.backends),
        (names::REWRITES, capacities.rewrites),
    ] {
        sizes.extend(pair.map(|name| (name, size)));
    }
    sizes.push((names::SERVICES, capacities.services));
    sizes.extend(names::CLUSTER_IPS.map(|name| (name, capacities.services)));
    // Slot 0 is no service's, and the only one if they are not counted.
    let counted = if options.service_metrics {
        capacities.counters
    } else {
        0
    };
    sizes.push((names::COUNTERS, counted.saturating_add(1)));
    if options.xdp.interfaces.is_none() {
        sizes.extend(names::PATHS.map(|name| (name, 1)));
    }
    for name in pinned_maps() {
        let map = object
            .maps
            .get(name)
            .ok_or_else(|| DatapathError::Incomplete(format!("map {name}")))?;
        let path = pins.maps.join(name);
        let is_pinned = path.exists();
        let held = if is_pinned {
            let info = RawMap::open(&path).map_err(DatapathError::call("opening the pinned map", path.display()))?;
            Some(info.max_entries())
        } else {
            former.and_then(|former| former.capacity(name))
        };
        let Some(held) = held else { continue };
        let chosen = sizes.iter_mut().find(|(sized, _)| *sized == name).map(|(_, size)| size);
        // Whoever did not choose a size goes with the version's, unless the map is there already.
        if !is_pinned && chosen.is_none() {
            continue;
        }
        let asked = chosen.as_deref().copied().unwrap_or_else(|| map.max_entries());
        // Counters may begin at zero: a map that was made without them, or with less, makes room for a larger one.
        if name == names::COUNTERS && held < asked {
            if is_pinned {
                fs::remove_file(&path).map_err(DatapathError::call("removing the pinned map", path.display()))?;
            }
            continue;
        }
        if held != asked && name != names::COUNTERS {
            tracing::warn!(
                map = name,
                kept = held,
                asked,
                "the pinned map keeps its capacity; `proxy-agent cleanup` before a start changes it"
            );
        }
        match chosen {
            Some(size) => *size = held,
            None => sizes.push((name, held)),
        }
    }
    Ok(sizes)
}

/// The load-time constants; names in `proxy_common::config`.
struct Constants {
    host_netns: u64,
    masquerade_all: u32,
    pods_by_link: u32,
    socket_pods: u32,
    have_set_retval: u32,
    have_csum_ipv6: u32,
    port_first: u32,
    port_count: u32,
    count_services: u32,
    log_level: u8,
}

fn load_object(pins: &Pins, sizes: &[(&'static str, u32)], constants: &Constants) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for name in pinned_maps() {
        loader.map_pin_path(name, pins.maps.join(name));
    }
    for (name, size) in sizes {
        loader.map_max_entries(name, *size);
    }
    // A constant that no program uses is not in the object; that is no error.
    loader
        .override_global(config::HOST_NETNS, &constants.host_netns, false)
        .override_global(config::MASQUERADE_ALL, &constants.masquerade_all, false)
        .override_global(config::PODS_BY_LINK, &constants.pods_by_link, false)
        .override_global(config::SOCKET_PODS, &constants.socket_pods, false)
        .override_global(config::HAVE_SET_RETVAL, &constants.have_set_retval, false)
        .override_global(config::HAVE_CSUM_IPV6, &constants.have_csum_ipv6, false)
        .override_global(config::PORT_FIRST, &constants.port_first, false)
        .override_global(config::PORT_COUNT, &constants.port_count, false)
        .override_global(config::COUNT_SERVICES, &constants.count_services, false)
        .override_global(aya_log::LEVEL, &constants.log_level, false);
    Ok(loader.load(OBJECT).map_err(Box::new)?)
}

fn load_programs(mut ebpf: Ebpf, options: &Options) -> Result<Programs, DatapathError> {
    let xdp = options.xdp.interfaces.as_ref().map(|_| names::XDP_FORWARD);
    let socket: &[&str] = match options.socket_lb {
        SocketLb::Off => &[],
        SocketLb::Host | SocketLb::All => &names::SOCKET_PROGRAMS,
    };
    let wanted: Vec<&str> = [names::TC_INGRESS, names::TC_EGRESS]
        .iter()
        .chain(&xdp)
        .chain(socket)
        .copied()
        .collect();
    let fds = verify_programs(&mut ebpf, &wanted)?;
    Ok(Programs {
        fds,
        rest: Mutex::new(Rest::Waiting(Box::new(ebpf))),
        others: OnceLock::new(),
    })
}

/// Has the kernel verify these programs, several at a time.
fn verify_programs(ebpf: &mut Ebpf, wanted: &[&str]) -> Result<ProgramFds, DatapathError> {
    let mut found: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let missing = |name| DatapathError::Incomplete(format!("program {name}"));
    let mut programs = Vec::new();
    for name in wanted {
        programs.push((*name, found.remove(name).ok_or_else(|| missing(*name))?));
    }
    // Each is the work of one processor for up to a second, and the kernel takes several at a time.
    let waiting = Mutex::new(programs.into_iter());
    let take = || waiting.lock().map_or(None, |mut waiting| waiting.next());
    let work = || {
        let mut fds = HashMap::new();
        while let Some((name, program)) = take() {
            let fd = load_program(program).map_err(|source| DatapathError::Program {
                name: name.to_owned(),
                source: Box::new(source),
            })?;
            fds.insert(name.to_owned(), fd);
        }
        Ok(fds)
    };
    let workers = thread::available_parallelism().map_or(1, |processors| (processors.get() - 1).clamp(1, VERIFIERS));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut all = HashMap::new();
        for worker in workers {
            let fds: Result<ProgramFds, DatapathError> =
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all.extend(fds?);
        }
        Ok(all)
    })
}

fn load_program(program: &mut Program) -> Result<OwnedFd, ProgramError> {
    match program {
        Program::CgroupSockAddr(_) => <&mut CgroupSockAddr>::try_from(&mut *program)?.load()?,
        Program::Xdp(_) => <&mut Xdp>::try_from(&mut *program)?.load()?,
        _ => <&mut SchedClassifier>::try_from(&mut *program)?.load()?,
    }
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

/// The task that turns what the programs say into log records of the agent.
struct Logging(tokio::task::JoinHandle<()>);

impl Drop for Logging {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn start_logging(ebpf: &mut Ebpf, level: BpfLogLevel) -> Option<Logging> {
    if level == BpfLogLevel::Off {
        return None;
    }
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        tracing::warn!("the programs' log is not read: there is no runtime");
        return None;
    };
    let logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "the programs of this build say nothing");
            return None;
        }
    };
    Some(Logging(runtime.spawn(async move {
        // SAFETY: the logger owns the ring buffer's descriptor, always gives the same one, and keeps it open until it is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let mut logger = match registered {
            Ok(logger) => logger,
            Err(error) => return tracing::warn!(%error, "the programs' log cannot be read"),
        };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })))
}

/// The id by which links name a cgroup: the inode of its directory.
pub(crate) fn cgroup_id(cgroup: &File) -> io::Result<u64> {
    Ok(cgroup.metadata()?.ino())
}
