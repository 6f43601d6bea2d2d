//! Waiting until every program that runs now has finished, without making the agent wait: the kernel takes tens of milliseconds for it,
//! during which no change would be applied. `Datapath::tick` asks; what was released before the answer's time has no reader any more.

use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The last wait.
#[derive(Debug)]
pub(super) struct Readers {
    wait: fn(),
    /// Since when a thread waits.
    waiting: Option<(Duration, JoinHandle<()>)>,
}

impl Readers {
    /// `wait` returns when everything that was running at its call has finished.
    pub(super) fn new(wait: fn()) -> Self {
        Self { wait, waiting: None }
    }

    /// The time before which every program that is still running has begun: the beginning of a wait that is over. `None` while there
    /// is none; the next wait begins then.
    pub(super) fn gone_before(&mut self, now: Duration) -> Option<Duration> {
        match self.waiting.take_if(|(_, thread)| thread.is_finished()) {
            Some((began, thread)) => thread.join().ok().map(|()| began),
            None => {
                if self.waiting.is_none() {
                    let started = thread::Builder::new().name("readers".into()).spawn(self.wait);
                    // Without a thread the next call tries again.
                    self.waiting = started.ok().map(|thread| (now, thread));
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;

    static GATE: Mutex<()> = Mutex::new(());

    #[test]
    fn an_answer_is_as_old_as_its_question() {
        let gate = GATE.lock().unwrap();
        let mut readers = Readers::new(|| drop(GATE.lock()));
        let at = Duration::from_secs;
        assert_eq!(readers.gone_before(at(1)), None, "asked");
        assert_eq!(readers.gone_before(at(2)), None, "still waiting");
        drop(gate);
        let end = Instant::now() + at(10);
        let mut answer = None;
        while answer.is_none() && Instant::now() < end {
            answer = readers.gone_before(at(3));
        }
        assert_eq!(answer, Some(at(1)));
        assert_eq!(readers.gone_before(at(4)), None, "asked again");
    }
}
