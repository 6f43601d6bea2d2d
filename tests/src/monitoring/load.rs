//! Traffic at a steady pace, of which every moment is known, so that rates have a truth. Used by the stage.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// What is repeated; an error ends it and is told.
pub(super) type Action = Box<dyn FnMut() -> Result<()> + Send>;
/// Runs a loop where it belongs, for example `|body| pod.netns.spawn(body)`.
pub(super) type Start<'s> = &'s dyn Fn(Box<dyn FnOnce() + Send>) -> JoinHandle<()>;

#[derive(Default)]
struct Book {
    done: BTreeMap<&'static str, Vec<Instant>>,
    errors: Vec<String>,
}

/// The running load; it ends when dropped.
pub(super) struct Load {
    began: Instant,
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            stop: Arc::default(),
            book: Arc::default(),
            threads: Vec::new(),
        }
    }

    /// Does something so often a second, by the clock: what comes late does not make the next ones late.
    pub(super) fn repeat(&mut self, what: &'static str, per_second: u32, start: Start<'_>, mut action: Action) {
        let (began, stop, book) = (self.began, self.stop.clone(), self.book.clone());
        let pause = Duration::from_secs(1) / per_second;
        self.threads.push(start(Box::new(move || {
            let mut next = began;
            while !stop.load(Ordering::Relaxed) {
                next += pause;
                thread::sleep(next.saturating_duration_since(Instant::now()));
                let result = action();
                let mut book = lock(&book);
                match result {
                    Ok(()) => book.done.entry(what).or_default().push(Instant::now()),
                    Err(error) => return book.errors.push(format!("{what}: {error:#}")),
                }
            }
        })));
    }

    /// How often a second this was done during the last `window`; an error if anything failed.
    pub(super) fn rate(&self, what: &'static str, window: Duration) -> Result<f64> {
        let book = lock(&self.book);
        if let Some(error) = book.errors.first() {
            bail!("{error}");
        }
        let done = book.done.get(what).map_or(&[][..], Vec::as_slice);
        let recent = done.iter().filter(|moment| moment.elapsed() <= window);
        Ok(recent.count() as f64 / window.as_secs_f64())
    }

    /// Time since this was done last.
    pub(super) fn since(&self, what: &'static str) -> Option<Duration> {
        Some(lock(&self.book).done.get(what)?.last()?.elapsed())
    }

    /// For how long it has been running.
    pub(super) fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Ends it.
    pub(super) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().expect("nothing panics while holding it")
}
