//! Small packets, as many as one core can take: a source that puts frames into an interface of the node, the node's work on a core and a
//! thread of its own, and a sink behind it.
//!
//! The kernel handles what arrives at an interface in its NAPI instance. That of the interface under load is made a thread here, pinned
//! to a core where nothing else runs: so the time it takes is known exactly, and it is the node's own, from the driver's receive function
//! until the packet is handed to the next interface. Source and sink have another core.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proxy_tests::netns::Netns;
use proxy_tests::process;
use proxy_tests::xdp::{self, Counter, Foreign};

use crate::bpf::{self, FRAME};
use crate::load;

/// Where source and sink run, and where the node.
const OUTSIDE: usize = 0;
const NODE: usize = 1;
/// Frames of one call; a call cannot be interrupted otherwise.
const CALL: u32 = 16_384;
/// Before anything counts: connections are remembered, neighbours found.
const WARM_UP: Duration = Duration::from_millis(100);

/// An interface within a namespace.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) netns: Netns,
    pub(crate) interface: String,
}

impl Place {
    fn attribute(&self, name: &str) -> Result<String> {
        let text = process::run(
            self.netns
                .command("ip")
                .args(["-o", "link", "show", "dev", &self.interface]),
        )?;
        let after = text.split(&format!("{name} ")).nth(1);
        let word = after.and_then(|rest| rest.split_whitespace().next());
        word.map(str::to_owned).with_context(|| format!("no {name} in {text}"))
    }

    fn hardware_address(&self) -> Result<[u8; 6]> {
        let text = self.attribute("link/ether")?;
        let bytes: Vec<u8> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16))
            .collect::<Result<_, _>>()?;
        bytes
            .try_into()
            .ok()
            .with_context(|| format!("{text} is no hardware address"))
    }

    fn index(&self) -> Result<u32> {
        let found = self.netns.run(|| xdp::index(&self.interface));
        found.with_context(|| format!("finding {}", self.interface))
    }
}

/// Where packets come from, through which interface of the node they enter, where they go, and what they are.
pub(crate) struct Path {
    /// The other end of the node's interface.
    pub(crate) source: Place,
    /// The node's interface.
    pub(crate) entrance: Place,
    /// The other end of the interface by which they leave the node.
    pub(crate) exit: Place,
    pub(crate) from: Ipv4Addr,
    pub(crate) to: (Ipv4Addr, u16),
}

/// A path that is ready; the interfaces are as they were when it is dropped.
pub(crate) struct Flood {
    places: [Place; 2],
    source: Netns,
    program: Foreign,
    frame: [u8; FRAME],
    counter: Counter,
    node: Thread,
    _sink: OwnedFd,
}

/// What came of it.
pub(crate) struct Flooded {
    /// Packets that arrived at the sink.
    pub(crate) packets: u64,
    /// Nanoseconds that the node worked.
    pub(crate) node: u64,
    pub(crate) elapsed: Duration,
}

impl Flood {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let (client, node) = (path.source.hardware_address()?, path.entrance.hardware_address()?);
        let frame = frame([client, node], path.from, path.to)?;
        let counter = Counter::new().context("making a counter")?;
        let (index, sink) = (path.exit.index()?, bpf::sink(&counter).context("loading the sink")?);
        let attached = path
            .exit
            .netns
            .run(|| sink.attach(index))
            .context("attaching the sink")?;
        // The sink stays with the source, away from the node.
        Thread::of(&path.exit, OUTSIDE)?;
        // Without it, or a program, what is sent to a veth as a frame is lost.
        offload(&path.entrance, true)?;
        Ok(Self {
            places: [path.entrance.clone(), path.exit.clone()],
            source: path.source.netns.clone(),
            program: bpf::source(&frame, path.source.index()?).context("loading the source")?,
            frame,
            counter,
            node: Thread::of(&path.entrance, NODE)?,
            _sink: attached,
        })
    }

    /// As many packets as go through in this time.
    pub(crate) fn run(&self, time: Duration) -> Result<Flooded> {
        self.source.run(|| {
            load::pin(OUTSIDE)?;
            self.send(WARM_UP)?;
            let (packets, node, began) = (self.counter.read()?, self.node.nanoseconds()?, Instant::now());
            self.send(time)?;
            let (elapsed, node) = (began.elapsed(), self.node.nanoseconds()? - node);
            let packets = self.counter.read()? - packets;
            ensure!(packets > 0, "none of the packets arrived");
            Ok(Flooded { packets, node, elapsed })
        })
    }

    fn send(&self, time: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < time {
            self.program
                .send(&self.frame, CALL)
                .context("sending frames (Linux 5.18)")?;
        }
        Ok(())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        for place in &self.places {
            let _ = set_threaded(place, false);
        }
        let _ = offload(&self.places[0], false);
    }
}

fn frame([client, node]: [[u8; 6]; 2], from: Ipv4Addr, to: (Ipv4Addr, u16)) -> Result<[u8; FRAME]> {
    let (port, head) = bpf::source_port();
    let builder = PacketBuilder::ethernet2(client, node)
        .ipv4(from.octets(), to.0.octets(), 64)
        .udp(port, to.1);
    let mut payload = [0; FRAME - 42];
    payload[..2].copy_from_slice(&head);
    let mut bytes = Vec::with_capacity(FRAME);
    builder.write(&mut bytes, &payload)?;
    bytes.try_into().ok().context("a frame of another length")
}

/// Merging of received packets. It also makes a veth handle frames in a NAPI instance, as every real card does.
pub(crate) fn offload(place: &Place, on: bool) -> Result<()> {
    let word = if on { "on" } else { "off" };
    process::run(
        place
            .netns
            .command("ethtool")
            .args(["-K", &place.interface, "gro", word]),
    )?;
    Ok(())
}

/// The thread that does an interface's NAPI work.
struct Thread(i32);

impl Thread {
    /// Makes it a thread, on this core.
    fn of(place: &Place, core: usize) -> Result<Self> {
        let before = kernel_threads()?;
        set_threaded(place, true)?;
        let begin = format!("napi/{}-", place.interface);
        let begin: String = begin.chars().take(15).collect();
        let new = process::wait_until(Duration::from_secs(2), || {
            let now = kernel_threads().ok()?;
            let mut new = now
                .into_iter()
                .filter(|(thread, name)| !before.contains_key(thread) && name.starts_with(&begin));
            new.next()
        });
        let Some((thread, _)) = new else {
            bail!(
                "the kernel made no thread for {}: it is needed to tell the node's time from others'",
                place.interface
            )
        };
        load::pin_thread(thread, core)?;
        Ok(Self(thread))
    }

    /// How long it has run.
    fn nanoseconds(&self) -> Result<u64> {
        let path = format!("/proc/{}/schedstat", self.0);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let word = text.split_whitespace().next();
        word.and_then(|word| word.parse().ok())
            .with_context(|| format!("{path} says {text}"))
    }
}

/// The NAPI threads of the machine, by their numbers.
fn kernel_threads() -> Result<BTreeMap<i32, String>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let named = numbers.filter_map(|number| {
        let name = fs::read_to_string(format!("/proc/{number}/comm")).ok()?;
        name.starts_with("napi/").then_some((number, name))
    });
    Ok(named.collect())
}

/// The switch is a file that only a view of the interface's own namespace has. The thread ends with its view.
fn set_threaded(place: &Place, on: bool) -> Result<()> {
    place.netns.run(|| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )?;
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>)?;
        let path = format!("/sys/class/net/{}/threaded", place.interface);
        fs::write(&path, if on { "1" } else { "0" }).with_context(|| format!("writing {path}"))
    })
}
