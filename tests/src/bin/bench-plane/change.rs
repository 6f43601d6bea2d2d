//! One change of one EndpointSlice in a large cluster: how long from the event of the watch to the map, and to the first packet that
//! follows it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proxy_tests::agent::Agent;
use proxy_tests::kube_proxy::KubeProxy;
use proxy_tests::maps::Frontends4;
use proxy_tests::results::{Against, Better, Bound, Case, Row, Target};
use proxy_tests::standin::objects::{self, Size};
use proxy_tests::{echo, stats};

use crate::bed::{Bed, first_yes};
use crate::{OURS, THEIRS};

/// A change that takes longer is an error.
const LIMIT: Duration = Duration::from_secs(10);
/// The same with a proxy that writes its rules once a second at most, and takes its time.
const KUBE_PROXY_LIMIT: Duration = Duration::from_secs(300);
/// Quiet before each change, so that each is the first one after a while. Longer than the agent's interval between two syncs.
const PAUSE: Duration = Duration::from_millis(25);
/// Values that a p99 is made of.
const BATCH: usize = 100;

/// Everything found about changes.
#[derive(Default)]
pub(crate) struct Changes {
    to_map: Vec<(&'static str, Size, Vec<Duration>)>,
    to_packet: Vec<(&'static str, Size, Vec<Duration>)>,
}

/// Kinds of changes.
const ADDED: &str = "an endpoint more";
const REMOVED: &str = "an endpoint less";
const REPLACED: &str = "an endpoint replaced";

impl Changes {
    pub(crate) fn agent(&mut self, bed: &Bed, agent: &Agent, rounds: u32) -> Result<()> {
        let frontends = Frontends4::open(&agent.bpf_dir())?;
        let [mut added, mut removed, mut replaced] = [const { Vec::new() }; 3];
        for round in 0..rounds {
            // Never the last one, and never one twice in a row.
            let service = (round.wrapping_mul(7_919)) % bed.last().max(1);
            let usual = bed.endpoints(service);
            let other = Ipv4Addr::from_bits(0x0A_10_00_00 + round);
            let more: Vec<_> = usual.iter().copied().chain([other]).collect();
            let mut changed = usual.clone();
            changed[0] = other;
            for (endpoints, times) in [
                (&more, &mut added),
                (&usual, &mut removed),
                (&changed, &mut replaced),
                // Not measured: as it was.
                (&usual, &mut Vec::new()),
            ] {
                times.push(to_map(bed, &frontends, service, endpoints)?);
            }
        }
        for (kind, times) in [(ADDED, added), (REMOVED, removed), (REPLACED, replaced)] {
            show(kind, bed.size, &times);
            self.to_map.push((kind, bed.size, times));
        }
        let times = (0..rounds).map(|_| to_packet(bed, LIMIT)).collect::<Result<Vec<_>>>()?;
        show("to the first packet", bed.size, &times);
        self.to_packet.push((OURS, bed.size, times));
        Ok(())
    }

    pub(crate) fn kube_proxy(&mut self, bed: &Bed, _running: &KubeProxy, rounds: u32) -> Result<()> {
        let times = (0..rounds)
            .map(|_| to_packet(bed, KUBE_PROXY_LIMIT))
            .collect::<Result<Vec<_>>>()?;
        show("to the first packet, kube-proxy", bed.size, &times);
        self.to_packet.push((THEIRS, bed.size, times));
        Ok(())
    }

    pub(crate) fn cases(&self, first: Size) -> Vec<Case> {
        let smallest = self.to_map.iter().map(|(_, size, _)| u64::from(size.services)).min();
        let at = |who: &str, bound, against| Target {
            contender: who.into(),
            at: Some(first.services.into()),
            against,
            bound,
        };
        let kinds = [ADDED, REMOVED, REPLACED];
        let limits = kinds.map(|kind| at(kind, Bound::AtMost(5.0), Against::Nothing));
        let growth = smallest.map(|smallest| kinds.map(|kind| at(kind, Bound::AtMost(1.5), Against::Size(smallest))));
        let mut cases = Vec::new();
        for (name, title, share, targets) in [
            (
                "change-to-map-p50",
                "From the event of an EndpointSlice to the map, median",
                0.5,
                growth.into_iter().flatten().collect(),
            ),
            (
                "change-to-map-p99",
                "From the event of an EndpointSlice to the map, p99",
                0.99,
                limits.into_iter().collect(),
            ),
        ] {
            cases.push(case(name, title, share, &self.to_map, targets));
        }
        for (name, title, share) in [
            (
                "change-to-packet-p50",
                "From the event of a Service's first endpoint to the first packet, median",
                0.5,
            ),
            (
                "change-to-packet-p99",
                "From the event of a Service's first endpoint to the first packet, p99",
                0.99,
            ),
        ] {
            cases.push(case(name, title, share, &self.to_packet, Vec::new()));
        }
        cases
    }
}

fn show(what: &str, size: Size, times: &[Duration]) {
    let [median, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| stats::quantile(times, share));
    eprintln!(
        "{what} at {}x{}: median {median:?}, p90 {p90:?}, p99 {p99:?}, max {max:?}",
        size.services, size.endpoints
    );
}

fn case(
    name: &str,
    title: &str,
    share: f64,
    found: &[(&'static str, Size, Vec<Duration>)],
    targets: Vec<Target>,
) -> Case {
    let mut case = Case {
        name: name.into(),
        title: title.into(),
        about: "Each change is the first one after a pause. The map is asked without pause; packets are the first ones of new TCP connections from a pod, one after the other.".into(),
        unit: "ms".into(),
        better: Better::Lower,
        axis: Some("services".into()),
        rows: Vec::<Row>::new(),
        targets,
    };
    for (who, size, times) in found {
        let row = case.row_mut(who, Some(u64::from(size.services)));
        let batches = times
            .chunks(BATCH)
            .map(|batch| stats::quantile(batch, share).as_secs_f64() * 1e3);
        row.samples.extend(batches);
    }
    case
}

/// From the event to a frontend that leads to another range.
fn to_map(bed: &Bed, frontends: &Frontends4, service: u32, endpoints: &[Ipv4Addr]) -> Result<Duration> {
    std::thread::sleep(PAUSE);
    let address = objects::cluster_ip(service);
    let generation = || -> Result<u32> {
        let frontend = frontends.get(address, objects::PORT)?;
        Ok(frontend.context("the Service is not in the map")?.generation)
    };
    let before = generation()?;
    let sent = bed.standin.set_endpoints(service, endpoints);
    while generation()? == before {
        if sent.elapsed() > LIMIT {
            bail!("service {service} is as it was {LIMIT:?} after the change");
        }
        std::thread::yield_now();
    }
    Ok(sent.elapsed())
}

/// From the event of a first endpoint to the first connection it accepts.
fn to_packet(bed: &Bed, limit: Duration) -> Result<Duration> {
    let service = bed.last();
    let (pause, name) = (Duration::from_micros(50), bed.server().name.as_str());
    let vip = SocketAddr::new(objects::cluster_ip(service).into(), objects::PORT);
    let is_answered = || echo::tcp(vip).is_ok_and(|answer| answer.server == name);
    // All of it in the client's namespace, on one thread: a thread for each request would be part of the time.
    let took = bed.client().run(|| {
        bed.standin.set_endpoints(service, &[]);
        first_yes(limit, pause, || Ok(!is_answered()))?.context("it still has its endpoint")?;
        std::thread::sleep(PAUSE);
        let sent: Instant = bed.standin.set_endpoints(service, &[bed.server().v4]);
        let since = first_yes(limit, pause, || Ok(is_answered()))?.context("it has no endpoint")?;
        anyhow::Ok(since - sent)
    });
    took.with_context(|| format!("service {service}, {limit:?} after the change"))
}
