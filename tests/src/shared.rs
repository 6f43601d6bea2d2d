//! A fixture that is costly to build: the tests of one binary take turns with it. The first one builds it; it goes when the process
//! exits, since a static is never dropped and what is in this one must not outlive the process.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is shared.
pub trait Fixture: Send + Sized + 'static {
    /// Makes it.
    fn build() -> Self;
    /// A test failed: says what helps to find out why, and puts things right for the next one.
    fn after_failure(&mut self);
}

/// The place of a fixture, in a static.
pub struct Shared<T>(Mutex<Option<T>>);

/// A test's turn with the fixture.
pub struct Turn<T: Fixture>(MutexGuard<'static, Option<T>>);

type Job = Box<dyn FnOnce() + Send>;

impl<T: Fixture> Shared<T> {
    /// An empty place.
    #[expect(
        clippy::new_without_default,
        reason = "it is for statics, which need a const function"
    )]
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Waits for the test's turn.
    pub fn turn(&'static self) -> Turn<T> {
        let mut fixture = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if fixture.is_none() {
            *fixture = Some(T::build());
            at_exit(Box::new(|| {
                drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
            }));
        }
        Turn(fixture)
    }
}

static JOBS: Mutex<Vec<Job>> = Mutex::new(Vec::new());

fn at_exit(job: Job) {
    let mut jobs = JOBS.lock().unwrap_or_else(PoisonError::into_inner);
    if jobs.is_empty() {
        // SAFETY: the function stays where it is and does not unwind.
        unsafe { libc::atexit(run_jobs) };
    }
    jobs.push(job);
}

/// On a thread of its own, since those of the main thread's variables that the standard library needs are gone by now.
extern "C" fn run_jobs() {
    let done = std::thread::spawn(|| {
        for job in JOBS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            job();
        }
    });
    let _ = done.join();
}

impl<T: Fixture> Deref for Turn<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_ref().expect("built before the first turn")
    }
}

impl<T: Fixture> DerefMut for Turn<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("built before the first turn")
    }
}

impl<T: Fixture> Drop for Turn<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.after_failure();
        }
    }
}
