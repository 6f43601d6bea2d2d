//! Constant load: new connections at a fixed rate and held ones that keep talking, from inside the clients' namespaces, each judged
//! by what is allowed at its time.
//!
//! One thread with a small event loop per client; connections begin on schedule however long others take, so that a stall shows as
//! many failures and not as few requests. A test tells with [`Load::rules`] what may answer before and after each change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::echo::{self, Answer, Failure};
use crate::process::wait_until;

/// New connections per second over all clients.
pub const RATE: u32 = 200;
/// TCP connections that are held.
pub const HELD_TCP: usize = 80;
/// UDP flows, each with a socket and port of its own.
pub const HELD_UDP: usize = 20;
/// How often a held connection says something.
const BEAT: Duration = Duration::from_millis(200);
/// How long an answer may take. One lost SYN costs a second, so this allows one on a busy machine and [`SLOW`] tells it.
const PATIENCE: Duration = Duration::from_secs(3);
/// From here on a new connection counts as slow: a SYN was lost and sent again.
const SLOW: Duration = Duration::from_millis(950);
/// How long a round may take ([`Load::round`]); far above what it takes.
const ROUND: Duration = Duration::from_secs(20);
/// New connections on every path that make a round.
const PER_PATH: u64 = 5;
/// Messages on every held connection that make a round.
const PER_HELD: u64 = 2;

/// From whom to which address. Names are the test's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path {
    /// The client.
    pub client: &'static str,
    /// The kind of address.
    pub to: &'static str,
    /// The address.
    pub target: SocketAddr,
    /// How UDP flows may be held there.
    pub udp: Flows,
}

/// How UDP flows may be held on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flows {
    /// Not at all.
    No,
    /// With sockets that name the destination of every message.
    Unconnected,
    /// With those and connected ones.
    All,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} {}", self.client, self.to, self.target)
    }
}

/// What is allowed from now on.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Who may answer a new connection of a path; a path that is not here takes any answer.
    pub answers: BTreeMap<Path, BTreeSet<String>>,
    /// Who may answer a UDP flow that is held (S141).
    pub serving: BTreeSet<String>,
    /// Whom a UDP flow may not leave (S145).
    pub keep: BTreeSet<String>,
    /// Whose TCP connections may end.
    pub ended: BTreeSet<String>,
    /// May packets be lost, so that TCP is slow and a message over UDP unanswered? No TCP connection fails of that.
    pub lossy: bool,
}

/// What was attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// A connection with one request.
    New,
    /// A message over a TCP connection that stays.
    HeldTcp,
    /// A message of a UDP flow.
    HeldUdp,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No answer.
    Failed(Failure),
    /// An answer of somebody who may not.
    Wrong(String),
    /// A flow left a server that still serves.
    Moved(String, String),
    /// It took as long as a lost packet makes it take.
    Slow(Duration),
}

/// One thing that went wrong.
#[derive(Clone, Debug)]
pub struct Incident {
    /// When the attempt began, counted from the start of the load.
    pub at: Duration,
    /// Where.
    pub path: Path,
    /// During what.
    pub attempt: Attempt,
    /// What.
    pub fault: Fault,
    /// Did the rules allow it?
    pub allowed: bool,
}

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let allowed = if self.allowed { " (allowed)" } else { "" };
        write!(
            f,
            "{:8.3} s {:?} {}: {:?}{allowed}",
            self.at.as_secs_f64(),
            self.attempt,
            self.path,
            self.fault
        )
    }
}

/// Runs a client's loop where it belongs, for example `|body| pod.netns.spawn(body)`.
pub type Start<'s> = Box<dyn FnOnce(Box<dyn FnOnce() + Send>) -> JoinHandle<()> + 's>;

/// A client and what it dials.
pub struct Client<'s> {
    /// How to start its loop.
    pub start: Start<'s>,
    /// Its paths.
    pub paths: Vec<Path>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// New connections that came to an end, good or bad.
    pub made: u64,
    /// Messages of held connections.
    pub messages: u64,
    /// TCP connections that are open.
    pub tcp_alive: usize,
    /// UDP flows whose last message was answered.
    pub udp_alive: usize,
    /// Number of incidents.
    pub incidents: usize,
}

#[derive(Default)]
struct Book {
    made: BTreeMap<Path, u64>,
    answered: BTreeMap<Path, BTreeSet<String>>,
    held: Vec<Held>,
    incidents: Vec<Incident>,
}

#[derive(Clone, Debug)]
struct Held {
    attempt: Attempt,
    messages: u64,
    server: Option<String>,
}

struct Shared {
    began: Instant,
    stop: AtomicBool,
    rules: Mutex<Arc<Rules>>,
    book: Mutex<Book>,
}

/// The running load; it ends when dropped.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts it.
    pub fn start(clients: Vec<Client<'_>>, rules: Rules) -> Self {
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: false.into(),
            rules: Mutex::new(Arc::new(rules)),
            book: Mutex::default(),
        });
        let all: Vec<Path> = clients.iter().flat_map(|client| client.paths.clone()).collect();
        let udp: Vec<Path> = all.iter().filter(|path| path.udp != Flows::No).copied().collect();
        let held: Vec<(Attempt, Path)> = (0..HELD_TCP)
            .map(|i| (Attempt::HeldTcp, all[i % all.len()]))
            .chain((0..HELD_UDP).map(|i| (Attempt::HeldUdp, udp[i * udp.len() / HELD_UDP])))
            .collect();
        {
            let mut book = shared.book();
            book.made = all.iter().map(|path| (*path, 0)).collect();
            let idle = |(attempt, _): &(Attempt, Path)| Held {
                attempt: *attempt,
                messages: 0,
                server: None,
            };
            book.held = held.iter().map(idle).collect();
        }
        let pace = Duration::from_secs(1) * clients.len() as u32 / RATE;
        let threads = clients.into_iter().map(|client| {
            let own = held.iter().copied().enumerate();
            let held = own.filter(|(_, (_, path))| client.paths.contains(path)).collect();
            let (shared, paths) = (shared.clone(), client.paths);
            (client.start)(Box::new(move || run_client(&shared, &paths, held, pace)))
        });
        let threads = threads.collect();
        Self { shared, threads }
    }

    /// What is allowed from now on. What began before may still end by the rules of its beginning.
    pub fn rules(&self, rules: Rules) {
        *self.shared.rules.lock().expect("nothing panics while holding it") = Arc::new(rules);
    }

    /// Waits until every path had a handful of new connections and every held connection talked, and gives who answered the new
    /// ones of each path.
    pub fn round(&self) -> Result<BTreeMap<Path, BTreeSet<String>>> {
        let (made, messages) = {
            let mut book = self.shared.book();
            book.answered.clear();
            (
                book.made.clone(),
                book.held.iter().map(|held| held.messages).collect::<Vec<_>>(),
            )
        };
        let done = wait_until(ROUND, || {
            let book = self.shared.book();
            let enough = book.made.iter().all(|(path, count)| *count >= made[path] + PER_PATH);
            let talked = book
                .held
                .iter()
                .zip(&messages)
                .all(|(held, before)| held.messages >= before + PER_HELD);
            (enough && talked).then(|| book.answered.clone())
        });
        let Some(answered) = done else {
            let last: Vec<_> = self
                .incidents(0)
                .iter()
                .rev()
                .take(10)
                .map(Incident::to_string)
                .collect();
            bail!("the load came to a halt: {:?}\n{}", self.totals(), last.join("\n"));
        };
        Ok(answered)
    }

    /// Waits until nobody holds a connection to a server any more.
    pub fn left(&self, server: &str) -> Result<()> {
        let gone = || {
            let book = self.shared.book();
            let holds = book.held.iter().any(|held| held.server.as_deref() == Some(server));
            (!holds).then_some(())
        };
        wait_until(ROUND, gone).with_context(|| format!("connections to {server} outlive it"))
    }

    /// The counts so far.
    pub fn totals(&self) -> Totals {
        let book = self.shared.book();
        let alive = |attempt| {
            book.held
                .iter()
                .filter(|h| h.attempt == attempt && h.server.is_some())
                .count()
        };
        Totals {
            made: book.made.values().sum(),
            messages: book.held.iter().map(|held| held.messages).sum(),
            tcp_alive: alive(Attempt::HeldTcp),
            udp_alive: alive(Attempt::HeldUdp),
            incidents: book.incidents.len(),
        }
    }

    /// What went wrong, from a number of incidents on.
    pub fn incidents(&self, from: usize) -> Vec<Incident> {
        self.shared.book().incidents[from..].to_vec()
    }

    /// Ends it and gives the rate of new connections that it reached.
    pub fn stop(mut self) -> f64 {
        let reached = self.totals().made as f64 / self.shared.began.elapsed().as_secs_f64();
        self.end();
        reached
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("nothing panics while holding it")
    }

    fn current(&self) -> Arc<Rules> {
        self.rules.lock().expect("nothing panics while holding it").clone()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn incident(&self, began: Instant, path: Path, attempt: Attempt, fault: Fault, allowed: bool) {
        let at = began.duration_since(self.began);
        self.book().incidents.push(Incident {
            at,
            path,
            attempt,
            fault,
            allowed,
        });
    }

    /// Judges who answered a new connection, by the rules of its beginning and of its end.
    fn judge(&self, began: Instant, path: Path, attempt: Attempt, server: &str, rules: &Rules) {
        let allows = |rules: &Rules| rules.answers.get(&path).is_none_or(|names| names.contains(server));
        if !allows(rules) && !allows(&self.current()) {
            self.incident(began, path, attempt, Fault::Wrong(server.to_owned()), false);
        }
    }
}

/// A client's event loop, on a thread that is in the client's place already: its sockets are made here.
fn run_client(shared: &Arc<Shared>, paths: &[Path], held: Vec<(usize, (Attempt, Path))>, pace: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built");
    runtime.block_on(async {
        for (index, (attempt, path)) in held {
            match attempt {
                Attempt::HeldUdp => drop(tokio::spawn(hold_udp(shared.clone(), index, path))),
                _ => drop(tokio::spawn(hold_tcp(shared.clone(), index, path))),
            }
        }
        let mut clock = interval(pace);
        clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
        for path in paths.iter().cycle() {
            clock.tick().await;
            if shared.stopped() {
                return;
            }
            tokio::spawn(new_connection(shared.clone(), *path));
        }
    });
}

async fn new_connection(shared: Arc<Shared>, path: Path) {
    let (began, rules) = (Instant::now(), shared.current());
    let outcome = within(async { ask(&connect(path.target).await?).await }).await;
    let elapsed = began.elapsed();
    match &outcome {
        Ok(answer) => shared.judge(began, path, Attempt::New, &answer.server, &rules),
        Err(failure) => shared.incident(began, path, Attempt::New, Fault::Failed(*failure), false),
    }
    if outcome.is_ok() && elapsed > SLOW {
        shared.incident(
            began,
            path,
            Attempt::New,
            Fault::Slow(elapsed),
            rules.lossy || shared.current().lossy,
        );
    }
    let mut book = shared.book();
    *book.made.entry(path).or_default() += 1;
    if let Ok(answer) = outcome {
        book.answered.entry(path).or_default().insert(answer.server);
    }
}

/// Keeps one connection open and talking; opens another one when it ends.
async fn hold_tcp(shared: Arc<Shared>, index: usize, path: Path) {
    sleep(BEAT * index as u32 / HELD_TCP as u32).await;
    while !shared.stopped() {
        let (began, rules) = (Instant::now(), shared.current());
        let opened = within(async {
            let stream = connect(path.target).await?;
            let answer = ask(&stream).await?;
            Ok((stream, answer))
        });
        match opened.await {
            Ok((stream, answer)) => {
                shared.judge(began, path, Attempt::HeldTcp, &answer.server, &rules);
                shared.book().held[index].server = Some(answer.server.clone());
                talk(&shared, index, path, stream, &answer.server).await;
                shared.book().held[index].server = None;
            }
            Err(failure) => shared.incident(began, path, Attempt::HeldTcp, Fault::Failed(failure), false),
        }
        sleep(BEAT).await;
    }
}

/// Messages over a connection until it ends. Only its server's end may end it (S62, S63, S147).
async fn talk(shared: &Shared, index: usize, path: Path, stream: TcpStream, server: &str) {
    while !shared.stopped() {
        sleep(BEAT).await;
        let began = Instant::now();
        let fault = match within(ask(&stream)).await {
            Ok(answer) if answer.server == server => {
                shared.book().held[index].messages += 1;
                continue;
            }
            Ok(answer) => Fault::Wrong(answer.server),
            Err(failure) => Fault::Failed(failure),
        };
        let allowed = shared.current().ended.contains(server);
        shared.incident(began, path, Attempt::HeldTcp, fault, allowed);
        return;
    }
}

/// Keeps one UDP flow going: every other one over a connected socket.
async fn hold_udp(shared: Arc<Shared>, index: usize, path: Path) {
    let any: SocketAddr = if path.target.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).await.expect("a socket can be opened");
    let connected = index % 2 == 0 && path.udp == Flows::All;
    if connected {
        socket.connect(path.target).await.expect("connecting UDP sends nothing");
    }
    sleep(BEAT * index as u32 / HELD_TCP as u32).await;
    let mut last: Option<String> = None;
    for message in 0u64.. {
        if shared.stopped() {
            return;
        }
        let (began, rules) = (Instant::now(), shared.current());
        let outcome = within(ask_udp(&socket, (!connected).then_some(path.target), message)).await;
        let now = shared.current();
        let either = |ok: fn(&Rules, &str) -> bool, server: &str| ok(&rules, server) || ok(&now, server);
        let fault = match &outcome {
            Err(failure) => Some(Fault::Failed(*failure)),
            Ok(server) if !either(|rules, server| rules.serving.contains(server), server) => {
                Some(Fault::Wrong(server.clone()))
            }
            Ok(server) => last
                .clone()
                .filter(|last| last != server && !either(|rules, last| !rules.keep.contains(last), last))
                .map(|last| Fault::Moved(last, server.clone())),
        };
        if let Some(fault) = fault {
            let lost = fault == Fault::Failed(Failure::Timeout);
            shared.incident(began, path, Attempt::HeldUdp, fault, lost && (rules.lossy || now.lossy));
        }
        last = outcome.ok().or(last);
        {
            let held = &mut shared.book().held[index];
            held.messages += 1;
            held.server.clone_from(&last);
        }
        sleep(BEAT).await;
    }
}

async fn within<T>(attempt: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(PATIENCE, attempt).await.unwrap_or(Err(Failure::Timeout))
}

async fn connect(target: SocketAddr) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn ask(stream: &TcpStream) -> Result<Answer, Failure> {
    stream.writable().await?;
    // Two bytes into an idle connection's buffer: all or an error.
    stream.try_write(echo::QUESTION)?;
    let (mut line, mut buffer) = (Vec::new(), [0; 256]);
    while !line.ends_with(b"\n") {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Err(Failure::Reset),
            Ok(length) => line.extend(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    echo::parse(&String::from_utf8_lossy(&line), stream.peer_addr()?)
        .map_err(|_| Failure::Other(ErrorKind::InvalidData))
}

/// One message; gives the name of who answered it.
async fn ask_udp(socket: &UdpSocket, target: Option<SocketAddr>, message: u64) -> Result<String, Failure> {
    let request = format!("#{message}");
    match target {
        Some(target) => socket.send_to(request.as_bytes(), target).await?,
        None => socket.send(request.as_bytes()).await?,
    };
    let mut buffer = [0; 512];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        // A late answer to an earlier message is not this one's.
        if text.ends_with(&format!("\n{request}")) {
            let answer = echo::parse(&text, peer).map_err(|_| Failure::Other(ErrorKind::InvalidData))?;
            return Ok(answer.server);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::EchoServer;
    use crate::netns::Netns;

    /// What the load says is true: its rate, who answers, and what fails once the server ends.
    #[test]
    fn tells_what_happens() {
        let netns = Netns::new("load").unwrap();
        let paths = ["127.0.0.1:7", "[::1]:7"].map(|target| Path {
            client: "client",
            to: "server",
            target: target.parse().unwrap(),
            udp: Flows::All,
        });
        let client = Client {
            start: Box::new(|body| netns.spawn(body)),
            paths: paths.into(),
        };
        let targets = paths.map(|path| path.target);
        let server = EchoServer::start(&netns, "alpha", &targets).unwrap();
        let alpha = BTreeSet::from(["alpha".to_owned()]);
        let rules = Rules {
            answers: paths.map(|path| (path, alpha.clone())).into(),
            serving: alpha.clone(),
            keep: alpha.clone(),
            ..Rules::default()
        };
        let load = Load::start(vec![client], rules.clone());
        let answered = load.round().unwrap();
        assert!(answered.values().all(|servers| *servers == alpha), "{answered:?}");
        let totals = load.totals();
        assert_eq!(
            (totals.incidents, totals.tcp_alive, totals.udp_alive),
            (0, HELD_TCP, HELD_UDP)
        );

        load.rules(Rules {
            ended: alpha.clone(),
            ..rules
        });
        drop(server);
        wait_until(ROUND, || (load.totals().tcp_alive == 0).then_some(())).expect("connections end with their server");
        wait_until(ROUND, || {
            (load.incidents(0).iter().any(|i| i.attempt == Attempt::New)).then_some(())
        })
        .expect("somebody is refused");
        let _server = EchoServer::start(&netns, "beta", &targets).unwrap();
        load.round().unwrap();
        let incidents = load.incidents(0);
        let has = |attempt, fault: &Fault, allowed| {
            let mut matching = incidents.iter().filter(|i| i.attempt == attempt && i.fault == *fault);
            matching.any(|i| i.allowed == allowed)
        };
        let wrong = Fault::Wrong("beta".to_owned());
        assert!(has(Attempt::New, &Fault::Failed(Failure::Refused), false));
        assert!(has(Attempt::HeldTcp, &Fault::Failed(Failure::Reset), true));
        assert!(
            [Attempt::New, Attempt::HeldTcp, Attempt::HeldUdp]
                .iter()
                .all(|a| has(*a, &wrong, false))
        );
        let rate = load.stop();
        assert!(rate > 0.8 * f64::from(RATE), "{rate}");
    }
}
