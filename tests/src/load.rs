//! Constant load: new connections at a fixed rate and held ones that keep talking, from inside the clients' namespaces, each judged
//! by what is allowed at its time.
//!
//! One thread with a small event loop per client; connections begin on schedule however long others take, so that a stall shows as
//! many failures and not as few requests. A test tells with [`Load::rules`] what may answer before and after each change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::echo::Failure;
use crate::process::wait_until;
use anyhow::{Context, Result, bail};

mod client;

/// New connections per second over all clients.
pub const RATE: u32 = 200;
/// TCP connections that are held.
pub const HELD_TCP: usize = 80;
/// UDP flows, each with a socket and port of its own.
pub const HELD_UDP: usize = 20;
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
            (client.start)(Box::new(move || client::run_client(&shared, &paths, held, pace)))
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
