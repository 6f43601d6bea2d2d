//! Cold starts: a node that has just come up, a large cluster, nothing written yet.

use std::time::Duration;

use anyhow::Result;
use proxy_tests::agent::Agent;
use proxy_tests::kube_proxy::KubeProxy;
use proxy_tests::results::{Against, Better, Bound, Case, Row, Target};
use proxy_tests::standin::objects::Size;

use crate::bed::Bed;
use crate::contenders::{self, Memory, Start};
use crate::{OURS, THEIRS};

/// What memory settles to is read this long after the start: unused memory has been given back by then.
const SETTLED: Duration = Duration::from_secs(3);

/// One start: whose, of which cluster, and what was found, if it came up in time.
type Found = (&'static str, Size, Option<(Start, Memory)>);

/// Everything found about starts.
#[derive(Default)]
pub(crate) struct Starts {
    found: Vec<Found>,
}

impl Starts {
    pub(crate) fn agent(&mut self, bed: &Bed) -> Result<Agent> {
        let (agent, start) = contenders::agent(bed)?;
        self.note(OURS, bed.size, start, agent.pid().unwrap_or_default())?;
        Ok(agent)
    }

    /// `None`: it did not come up in time.
    pub(crate) fn kube_proxy(&mut self, bed: &Bed) -> Result<Option<KubeProxy>> {
        let Some((proxy, start)) = contenders::kube_proxy(bed)? else {
            self.found.push((THEIRS, bed.size, None));
            return Ok(None);
        };
        self.note(THEIRS, bed.size, start, proxy.pid())?;
        Ok(Some(proxy))
    }

    fn note(&mut self, who: &'static str, size: Size, start: Start, pid: u32) -> Result<()> {
        std::thread::sleep(SETTLED);
        let memory = contenders::memory(pid)?;
        eprintln!(
            "{who} at {}x{}: listed after {:?}, done {:?} later, processors {:?}, {memory:.1?}",
            size.services,
            size.endpoints,
            start.listed - start.began,
            start.done.saturating_duration_since(start.listed),
            start.cpu,
        );
        self.found.push((who, size, Some((start, memory))));
        Ok(())
    }

    pub(crate) fn cases(&self, first: Size) -> Vec<Case> {
        let first = u64::from(first.services);
        let at = |bound, against| Target {
            contender: OURS.into(),
            at: Some(first),
            against,
            bound,
        };
        vec![
            self.case(
                "cold-start",
                "From the last byte of the lists to everything written",
                "s",
                vec![
                    at(Bound::AtMost(2.0), Against::Nothing),
                    at(Bound::AtMost(1.0 / 50.0), Against::Contender(THEIRS.into())),
                ],
                |start, _| start.done.saturating_duration_since(start.listed).as_secs_f64(),
            ),
            self.case(
                "cold-start-in-all",
                "From the start of the process to everything written",
                "s",
                Vec::new(),
                |start, _| (start.done - start.began).as_secs_f64(),
            ),
            self.case(
                "cold-start-cpu",
                "Processor time of a start",
                "s",
                Vec::new(),
                |start, _| start.cpu.as_secs_f64(),
            ),
            self.case(
                "memory",
                "Resident memory of the process",
                "MiB",
                vec![at(Bound::AtMost(80.0), Against::Nothing)],
                |_, memory| memory.resident,
            ),
            self.case(
                "memory-anonymous",
                "Its anonymous part",
                "MiB",
                Vec::new(),
                |_, memory| memory.anonymous,
            ),
            self.case(
                "memory-peak",
                "Most resident memory so far",
                "MiB",
                Vec::new(),
                |_, memory| memory.peak,
            ),
            self.case(
                "memory-maps",
                "Memory of the maps, in the kernel",
                "MiB",
                Vec::new(),
                |_, memory| memory.maps,
            ),
        ]
    }

    fn case(
        &self,
        name: &str,
        title: &str,
        unit: &str,
        targets: Vec<Target>,
        value: fn(&Start, &Memory) -> f64,
    ) -> Case {
        let mut case = Case {
            name: name.into(),
            title: title.into(),
            about: "A generated cluster, served by a stand-in for an API server on the same machine. The agent is done when it is ready and its maps have been found complete; kube-proxy when it says that it has written its rules, and the last Service answers.".into(),
            unit: unit.into(),
            better: Better::Lower,
            axis: Some("services".into()),
            rows: Vec::<Row>::new(),
            targets,
        };
        for (who, size, found) in &self.found {
            let row = case.row_mut(who, Some(u64::from(size.services)));
            match found {
                Some((start, memory)) => row.samples.push(value(start, memory)),
                None => row.note = Some("not programmed in time".into()),
            }
        }
        case
    }
}
