//! Requests that keep running while something changes, and what became of each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::echo::{Failure, Outcome};

/// One request that was made.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it began.
    pub began: Instant,
    /// How it went: the server's name, or why there was none.
    pub outcome: Result<String, Failure>,
}

/// Requests made one after the other on a thread of their own until stopped.
pub struct Running {
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    thread: Option<JoinHandle<()>>,
}

/// Repeats `request` every `pause`. `start` runs the loop where it belongs, for example `|body| pod.netns.spawn(body)`.
pub fn repeat(
    start: impl FnOnce(Box<dyn FnOnce() + Send>) -> JoinHandle<()>,
    pause: Duration,
    mut request: impl FnMut() -> Outcome + Send + 'static,
) -> Running {
    let stop: Arc<AtomicBool> = Arc::default();
    let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let (stopped, results) = (stop.clone(), samples.clone());
    let thread = start(Box::new(move || {
        while !stopped.load(Ordering::Relaxed) {
            let began = Instant::now();
            let outcome = request().map(|answer| answer.server);
            results
                .lock()
                .expect("nothing panics while holding it")
                .push(Sample { began, outcome });
            std::thread::sleep(pause);
        }
    }));
    Running {
        stop,
        samples,
        thread: Some(thread),
    }
}

impl Running {
    /// Waits until `count` more requests have been made, or the time is up; says which.
    pub fn wait_for(&self, count: usize, limit: Duration) -> bool {
        let target = self.made() + count;
        crate::process::wait_until(limit, || (self.made() >= target).then_some(())).is_some()
    }

    /// Number of requests made so far.
    pub fn made(&self) -> usize {
        self.samples.lock().expect("nothing panics while holding it").len()
    }

    /// Ends it and gives what happened.
    pub fn stop(mut self) -> Vec<Sample> {
        self.end();
        std::mem::take(&mut self.samples.lock().expect("nothing panics while holding it"))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// The failures among the samples, for an assertion that none are there.
pub fn failures(samples: &[Sample]) -> Vec<&Sample> {
    samples.iter().filter(|s| s.outcome.is_err()).collect()
}

/// Who answered the requests that began after `moment`.
pub fn answers_after(samples: &[Sample], moment: Instant) -> Vec<String> {
    samples
        .iter()
        .filter(|s| s.began > moment)
        .filter_map(|s| s.outcome.clone().ok())
        .collect()
}
