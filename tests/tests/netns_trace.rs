//! `proxy-agent trace` beside a running agent: known traffic, the lines it prints, and how it ends.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
use proxy_common::addr::Protocol;
use proxy_common::names::{LAYOUT_VERSION, TRACE};
use proxy_common::trace::Trace;
use proxy_tests::agent::binary;
use proxy_tests::echo;
use proxy_tests::manifests::{self, port};
use proxy_tests::process::{self, wait_until};
use proxy_tests::programs::Plain;
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{ECHO, Setup, World, vips};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
const NOBODY: &str = "10.96.0.99:80";

/// One node with two pods; the second serves `web`, nobody serves `nobody`.
fn world() -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 2,
        ..Default::default()
    };
    let options = vec!["--cluster-cidr", CLUSTER_CIDR];
    let world = World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap();
    world.publish(&["pod1-2"]).unwrap();
    let nobody = manifests::service("nobody", &["10.96.0.99"], &[port("http", "TCP", 80)]);
    world.write("nobody", &[nobody]).unwrap();
    world.wait_for(nobody_addr(), Protocol::Tcp, Some(&[])).unwrap();
    world
}

fn nobody_addr() -> SocketAddr {
    NOBODY.parse().unwrap()
}

/// What the programs are asked for.
fn asked(world: &World) -> Trace {
    let path = world.agents[0]
        .bpf_dir()
        .join(format!("v{LAYOUT_VERSION}/maps/{TRACE}"));
    let map = Map::Array(MapData::from_pin(path).unwrap());
    Array::<_, Plain<Trace>>::try_from(map).unwrap().get(&0, 0).unwrap().0
}

fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` lives through the call, and this clock always exists.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) }, 0);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A running `proxy-agent trace -o json`.
struct Tracer {
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
}

impl Tracer {
    /// Starts it and waits until the programs are asked.
    fn start(world: &World, args: &[&str]) -> Self {
        let agent = &world.agents[0];
        let mut command = agent.netns().command(binary().unwrap());
        command
            .args(["trace", "-o", "json", "--bpf-dir"])
            .arg(agent.bpf_dir())
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = process::spawn_bound(command).unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let object =
                    serde_json::from_str(&line).unwrap_or_else(|error| Value::String(format!("{error}: {line}")));
                sink.lock().unwrap().push(object);
            }
        });
        let id = child.id();
        let is_asked = || (asked(world).tracer == id).then_some(());
        wait_until(PATIENCE, is_asked).unwrap_or_else(|| panic!("nobody asks: {:?}", child.try_wait()));
        Self { child, lines }
    }

    /// Waits for so many events, and gives those there are.
    fn events(&self, count: usize) -> Vec<Value> {
        let enough = || {
            let lines = self.lines.lock().unwrap();
            (lines.len() >= count).then(|| lines.clone())
        };
        wait_until(PATIENCE, enough).unwrap_or_else(|| panic!("less than {count}: {:#?}", self.lines.lock().unwrap()))
    }

    /// Waits until it has ended by itself; what it says at the end.
    fn ended(&mut self) -> (ExitStatus, String) {
        let ended = wait_until(PATIENCE, || self.child.try_wait().unwrap());
        let status = ended.expect("it goes on");
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status, text)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn with<'e>(events: &'e [Value], what: &[(&str, &str)]) -> &'e Value {
    let found: Vec<&Value> = events
        .iter()
        .filter(|event| what.iter().all(|(name, value)| event[name] == *value))
        .collect();
    assert_eq!(found.len(), 1, "{what:?} in {events:#?}");
    found[0]
}

/// Every kind of event, with names, from pods and from a process of the node; SIGTERM ends it and its question.
#[test]
fn what_happens_is_told() {
    let world = world();
    let mut tracer = Tracer::start(&world, &[]);
    let (client, server) = (world.topology.pod(0, 0), world.topology.pod(0, 1));
    for vip in vips() {
        client.run(|| echo::tcp(vip)).unwrap();
    }
    client.run(|| echo::tcp(nobody_addr())).unwrap_err();
    // Its own endpoint, so masqueraded.
    server.run(|| echo::tcp(vips()[0])).unwrap();
    let comm = world.agents[0].run(|| {
        echo::tcp(vips()[0]).unwrap();
        echo::udp_unconnected(vips()[1]).unwrap();
        echo::tcp(nobody_addr()).unwrap_err();
        std::fs::read_to_string("/proc/thread-self/comm").unwrap()
    });

    let events = tracer.events(7);
    for (family, vip) in ["v4", "v6"].into_iter().zip(vips()) {
        let from: std::net::IpAddr = if family == "v4" {
            client.v4.into()
        } else {
            client.v6.into()
        };
        let backends = server.sockets(ECHO);
        let frontend = vip.to_string();
        let of_client = |event: &&Value| {
            let client: Option<SocketAddr> = event["client"].as_str().and_then(|text| text.parse().ok());
            event["frontend"] == *frontend && client.is_some_and(|client| client.ip() == from)
        };
        let opened: Vec<&Value> = events.iter().filter(of_client).collect();
        assert_eq!(opened.len(), 1, "{family}: {events:#?}");
        let opened = opened[0];
        let backend: SocketAddr = opened["backend"].as_str().unwrap().parse().unwrap();
        assert!(backends.contains(&backend), "{opened}");
        for (name, value) in [
            ("event", "opened"),
            ("protocol", "TCP"),
            ("namespace", "default"),
            ("service", "web"),
            ("portName", "tcp"),
            ("hook", "ingress"),
        ] {
            assert_eq!(opened[name], value, "{name}: {opened}");
        }
        assert_eq!(
            (&opened["masqueraded"], &opened["seenAs"]),
            (&false.into(), &Value::Null),
            "{opened}"
        );
        assert!(
            opened["interface"].as_str().is_some_and(|name| !name.starts_with('#')),
            "{opened}"
        );
        let time: k8s_openapi::jiff::Timestamp = opened["time"].as_str().unwrap().parse().unwrap();
        let age = k8s_openapi::jiff::Timestamp::now().duration_since(time);
        assert!((0..120).contains(&age.as_secs()), "{opened}");
    }
    let masqueraded: Vec<&Value> = events.iter().filter(|event| event["masqueraded"] == true).collect();
    assert_eq!(masqueraded.len(), 1, "{events:#?}");
    let (own, seen): (SocketAddr, SocketAddr) = (
        masqueraded[0]["client"].as_str().unwrap().parse().unwrap(),
        masqueraded[0]["seenAs"].as_str().unwrap().parse().unwrap(),
    );
    assert_eq!(own.ip(), std::net::IpAddr::from(server.v4));
    assert_ne!(seen.ip(), own.ip());

    let refused = with(&events, &[("event", "refused"), ("hook", "ingress")]);
    assert_eq!(
        (&refused["reason"], &refused["service"]),
        (&"no_endpoints".into(), &"nobody".into())
    );
    assert_eq!(refused["backend"], Value::Null);
    let by_socket = with(&events, &[("event", "socket"), ("protocol", "TCP")]);
    with(&events, &[("event", "socket"), ("protocol", "UDP")]);
    let refused = with(&events, &[("event", "refused"), ("hook", "socket")]);
    for event in [by_socket, refused] {
        assert_eq!(event["process"], comm.trim_end(), "{event}");
        assert_eq!(event["pid"], std::process::id(), "{event}");
        assert_eq!(
            (&event["client"], &event["interface"]),
            (&Value::Null, &Value::Null),
            "{event}"
        );
    }

    process::signal(&tracer.child, Signal::SIGTERM);
    let (status, text) = tracer.ended();
    assert!(status.success(), "{status}: {text}");
    assert_eq!(text, format!("proxy-agent: {} events shown, 0 lost\n", events.len()));
    assert_eq!(asked(&world), Trace::default(), "nobody asks any more");
}

/// What is filtered is not shown; a count and a time end it.
#[test]
fn filters_and_ends() {
    let world = world();
    let client = world.topology.pod(0, 0);
    let traffic = || {
        for vip in vips() {
            client.run(|| echo::tcp(vip)).unwrap();
            client.run(|| echo::udp(vip)).unwrap();
        }
        client.run(|| echo::tcp(nobody_addr())).unwrap_err();
        world.agents[0].run(|| echo::tcp(vips()[0])).unwrap();
    };
    let v4 = client.v4.to_string();
    let prefix6 = format!("{}/64", client.v6);
    // How many of those six, and what all of them have in common.
    for (args, count, field, value) in [
        (&["--service", "default/nobody"][..], 1, "service", "nobody"),
        (&["--service", "web", "--protocol", "udp"], 2, "protocol", "UDP"),
        (&["--event", "opened"], 4, "event", "opened"),
        (&["--event", "socket,refused", "--port", "80"], 2, "protocol", "TCP"),
        (&["--client", &v4], 3, "hook", "ingress"),
        (&["--client", &prefix6, "--protocol", "tcp"], 1, "event", "opened"),
        (&["--reason", "no_endpoints,loop"], 1, "event", "refused"),
    ] {
        let mut args = args.to_vec();
        let number = count.to_string();
        args.extend(["-n", &number]);
        let mut tracer = Tracer::start(&world, &args);
        traffic();
        let (status, text) = tracer.ended();
        let events = tracer.events(count);
        assert!(
            status.success() && events.len() == count,
            "{args:?}: {status} {text} {events:#?}"
        );
        assert!(
            events.iter().all(|event| event[field] == value),
            "{args:?}: {events:#?}"
        );
    }
    // As many as there are and no more, until the time is over.
    let mut tracer = Tracer::start(&world, &["--service", "nobody", "--for", "3s"]);
    traffic();
    let (status, text) = tracer.ended();
    assert!(status.success(), "{text}");
    assert_eq!(text, "proxy-agent: 1 events shown, 0 lost\n");
}

/// One tracer at a time; one that is killed leaves nothing behind that lasts.
#[test]
fn tracers_end_however_they_end() {
    let world = world();
    let agent = &world.agents[0];
    let dial = || world.topology.pod(0, 0).run(|| echo::tcp(vips()[0])).unwrap();
    let mut first = Tracer::start(&world, &["--event", "opened"]);
    let refused = agent.command(&["trace", "-n", "1"]).unwrap_err().to_string();
    assert!(
        refused.contains(&format!("process {} traces already", first.child.id())),
        "{refused}"
    );
    dial();
    assert_eq!(first.events(1).len(), 1);

    process::signal(&first.child, Signal::SIGKILL);
    let _status = first.child.wait().unwrap();
    dial();
    let until = asked(&world).until;
    assert!(
        until > 0 && until < monotonic() + 6_000_000_000,
        "a few seconds at most"
    );
    wait_until(PATIENCE, || (monotonic() > until).then_some(())).expect("a few seconds");
    assert_eq!(asked(&world).until, until, "nobody puts it off");

    // The next one is not told what the first one asked for.
    let mut second = Tracer::start(&world, &["-n", "1"]);
    world.topology.pod(0, 0).run(|| echo::tcp(nobody_addr())).unwrap_err();
    let (status, text) = second.ended();
    assert!(status.success(), "{text}");
    assert_eq!(second.events(1)[0]["event"], "refused");

    // A reader that has seen enough.
    let mut command = agent.netns().command(binary().unwrap());
    command.args(["trace", "--bpf-dir"]).arg(agent.bpf_dir());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = process::spawn_bound(command).unwrap();
    let mut heading = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut heading)
        .unwrap();
    assert!(heading.starts_with("TIME "), "{heading}");
    let ended = wait_until(PATIENCE, || {
        dial();
        child.try_wait().unwrap()
    });
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    assert_eq!(asked(&world), Trace::default());
}

/// Without maps it says what the other commands say, and it does not wait for a Service that is not there.
#[test]
fn nothing_to_trace() {
    let world = world();
    let out = world.agents[0]
        .tool(&["trace", "--bpf-dir", "/sys/fs/bpf/never"])
        .unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(
        !out.status.success() && text.contains("there are no maps in /sys/fs/bpf/never"),
        "{text}"
    );
    for (args, expected) in [
        (
            ["--service", "default/none"],
            "service default/none is not programmed on this node",
        ),
        (["--reason", "none"], "no_endpoints"),
        (["--client", "none"], "10.244.0.0/16"),
        (["--for", "0"], "a time above 0"),
    ] {
        let error = world.agents[0]
            .command(&[&["trace"], &args[..]].concat())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{args:?}: {error}");
    }
}
