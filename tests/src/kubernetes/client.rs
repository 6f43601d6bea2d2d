//! Requests that run in a pod or on a node until they are told to stop, and what became of them. [`serve`] is the side that sends
//! (the hidden `load` of the `cluster` program); [`Load`] is the side of the test, with a pipe between them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::echo::{self, Held, Outcome};
use crate::process;
use crate::traffic::{self, Running};

/// Pause between two requests of one kind to one address.
const PAUSE: Duration = Duration::from_millis(5);
/// The line that says that all kinds of requests are answered.
const READY: &str = "ready";
const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(20);
/// Failures that are told in full.
const TOLD: usize = 5;

/// What became of the requests of one kind to one address.
#[derive(Serialize, Deserialize, Debug)]
pub struct Tally {
    /// Kind and address.
    pub what: String,
    /// How often each server answered.
    pub servers: BTreeMap<String, usize>,
    /// How many failed.
    pub failed: usize,
    /// How and when some of them did.
    pub failures: Vec<String>,
}

/// Sends requests to all addresses until a line on standard input tells how many more of each kind are to be made; prints the
/// tallies.
pub fn serve(addresses: &[SocketAddr]) -> Result<()> {
    let began = Instant::now();
    let mut running = Vec::new();
    for address in addresses.iter().copied() {
        let mut start = |kind: &str, request: Box<dyn FnMut() -> Outcome + Send>| {
            running.push((
                format!("{kind} {address}"),
                traffic::repeat(std::thread::spawn, PAUSE, request),
            ));
        };
        start("TCP", Box::new(move || echo::tcp(address)));
        start("UDP", Box::new(move || echo::udp(address)));
        let mut held = None;
        start("held TCP", Box::new(move || held_request(&mut held, address)));
    }
    for (what, requests) in &running {
        ensure!(requests.wait_for(1, START), "{what}: not one request comes to an end");
    }
    println!("{READY}");
    let mut count = String::new();
    std::io::stdin().read_line(&mut count)?;
    let count = count
        .trim()
        .parse()
        .context("reading how many requests are still to be made")?;
    for (what, requests) in &running {
        ensure!(
            requests.wait_for(count, STOP),
            "{what}: not {count} requests within {STOP:?}"
        );
    }
    let tallies: Vec<_> = running
        .into_iter()
        .map(|(what, requests)| tally(what, requests, began))
        .collect();
    println!("{}", serde_json::to_string(&tallies)?);
    Ok(())
}

/// One connection for all requests; one that broke counts once, and is replaced.
fn held_request(held: &mut Option<Held>, address: SocketAddr) -> Outcome {
    let mut connection = match held.take() {
        Some(connection) => connection,
        None => Held::open(address)?,
    };
    let answer = connection.ask()?;
    *held = Some(connection);
    Ok(answer)
}

fn tally(what: String, requests: Running, start: Instant) -> Tally {
    let mut tally = Tally {
        what,
        servers: BTreeMap::new(),
        failed: 0,
        failures: Vec::new(),
    };
    for sample in requests.stop() {
        match sample.outcome {
            Ok(server) => *tally.servers.entry(server).or_default() += 1,
            Err(failure) => {
                tally.failed += 1;
                let after = sample.began.saturating_duration_since(start);
                if tally.failures.len() < TOLD {
                    tally.failures.push(format!("{failure} after {} ms", after.as_millis()));
                }
            }
        }
    }
    tally
}

/// Requests that run somewhere else.
pub struct Load {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Load {
    /// Runs the command, which has to end up in [`serve`], and waits until requests are answered.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let name = format!("{command:?}");
        let mut child = process::spawn_bound(command).with_context(|| format!("starting {name}"))?;
        let mut output = BufReader::new(child.stdout.take().context("its standard output is a pipe")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(line.trim() == READY, "{name} says {line:?} instead of {READY:?}");
        Ok(Self { child, output })
    }

    /// Lets `count` more requests of each kind be made, stops them, and gives what became of all.
    pub fn stop(mut self, count: usize) -> Result<Vec<Tally>> {
        let mut input = self.child.stdin.take().context("its standard input is a pipe")?;
        writeln!(input, "{count}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        process::wait_or_kill(&mut self.child, STOP)?;
        serde_json::from_str(&line).with_context(|| format!("reading the tallies from {line:?}"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks one address several times, and prints who answered.
pub fn ask(address: SocketAddr, count: usize) -> Result<()> {
    let mut servers = BTreeMap::<String, usize>::new();
    for (kind, request) in echo::CONNECTED {
        for server in echo::names(count, || request(address)).with_context(|| format!("{kind} {address}"))? {
            *servers.entry(server).or_default() += 1;
        }
    }
    let shares: Vec<String> = servers
        .iter()
        .map(|(server, times)| format!("{server} {times}"))
        .collect();
    writeln!(std::io::stdout(), "{address}: {}", shares.join(", "))?;
    Ok(())
}
