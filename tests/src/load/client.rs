//! The loops of a client: what it does over each connection, and how what happens is judged. Called by [`super::Load::start`] alone, on
//! a thread that is in the client's namespace and cgroup already.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::{Attempt, Fault, Flows, HELD_TCP, Path, Rules, Shared};
use crate::echo::{self, Answer, Failure};

/// How often a held connection says something.
const BEAT: Duration = Duration::from_millis(200);
/// How long an answer may take. One lost SYN costs a second, so this allows one on a busy machine and [`SLOW`] tells it.
const PATIENCE: Duration = Duration::from_secs(3);
/// From here on a new connection counts as slow: a SYN was lost and sent again.
const SLOW: Duration = Duration::from_millis(950);

/// A client's event loop, on a thread that is in the client's place already: its sockets are made here.
pub(super) fn run_client(shared: &Arc<Shared>, paths: &[Path], held: Vec<(usize, (Attempt, Path))>, pace: Duration) {
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
    let connected = index.is_multiple_of(2) && path.udp == Flows::All;
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
