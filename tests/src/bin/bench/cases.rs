//! What is measured, by groups that share a site.

mod connections;
mod packets;
mod streams;
pub(crate) mod traffic;

use proxy_tests::results::{Against, Better, Bound, Case, Row, Target, contender};

/// Collects samples, and a reason where there are none.
pub(crate) struct Builder(Case);

impl Builder {
    pub(crate) fn new(name: &str, title: &str, unit: &str, better: Better, about: &str) -> Self {
        Self(Case {
            name: name.to_owned(),
            title: title.to_owned(),
            about: about.split_whitespace().collect::<Vec<_>>().join(" "),
            unit: unit.to_owned(),
            better,
            axis: None,
            rows: Vec::new(),
            targets: Vec::new(),
        })
    }

    pub(crate) fn axis(mut self, axis: &str) -> Self {
        self.0.axis = Some(axis.to_owned());
        self
    }

    pub(crate) fn target(mut self, of: &str, at: Option<u64>, against: Against, bound: Bound) -> Self {
        self.0.targets.push(Target {
            contender: of.to_owned(),
            at,
            against,
            bound,
        });
        self
    }

    pub(crate) fn row(&mut self, contender: &str, at: Option<u64>) -> &mut Row {
        self.0.row_mut(contender, at)
    }

    pub(crate) fn add(&mut self, contender: &str, at: Option<u64>, sample: f64) {
        self.row(contender, at).samples.push(sample);
    }

    pub(crate) fn say(&mut self, contender: &str, at: Option<u64>, note: &str) {
        self.row(contender, at).note = Some(note.to_owned());
    }

    /// The case, if anything was measured.
    pub(crate) fn finish(self) -> Option<Case> {
        (!self.0.rows.is_empty()).then_some(self.0)
    }
}

/// In relation to another contender.
fn than(other: &str) -> Against {
    Against::Contender(other.to_owned())
}

/// In relation to no proxy at all.
fn than_direct() -> Against {
    than(contender::DIRECT)
}
