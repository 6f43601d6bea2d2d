//! What a full rewrite table forgets. The kernel does not count it; but programs and agent count what they put in and take out, and
//! the walks of [`super::gc`] count what is there. What is missing was evicted.
//!
//! A walk takes time, and the table changes meanwhile. So what this gives is a lower bound, never more than was evicted since the first
//! walk began: it is behind by what happened during a walk, and right as soon as one meets a quiet table.
//!
//! Why: let a walk begin at `a`, end at `b` and see `n` entries. Whatever is there at `b` was seen, or inserted meanwhile; whatever was seen
//! was there at `a`, or inserted meanwhile. With `evicted = inserted − removed − present` at any moment, therefore
//! `evicted(b) ≥ inserted(a) − removed(b) − n` and `evicted(a) ≤ inserted(b) − removed(a) − n`.

/// Changes of one family's rewrite table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RewriteCounts {
    /// Entries the programs have put in, since the map was made.
    pub inserted: u64,
    /// Entries the programs have removed themselves, since the map was made.
    pub removed_by_programs: u64,
    /// Entries this agent has removed.
    pub removed_by_agent: u64,
}

impl RewriteCounts {
    fn removed(&self) -> i128 {
        i128::from(self.removed_by_programs) + i128::from(self.removed_by_agent)
    }
}

/// See the module; one per family.
#[derive(Default)]
pub(super) struct Ledger {
    /// When the walk under way began.
    began: Option<RewriteCounts>,
    /// What was evicted before this agent looked, at most; also what older programs have not counted.
    before: Option<i128>,
    evicted: u64,
}

impl Ledger {
    /// Is no walk under way?
    pub(super) fn is_idle(&self) -> bool {
        self.began.is_none()
    }

    /// A walk begins.
    pub(super) fn begin(&mut self, counts: RewriteCounts) {
        self.began = Some(counts);
    }

    /// It has ended, and seen so many entries.
    pub(super) fn end(&mut self, counts: RewriteCounts, seen: u64) {
        let Some(began) = self.began.take() else {
            return;
        };
        let seen = i128::from(seen);
        let at_most = i128::from(counts.inserted) - began.removed() - seen;
        let at_least = i128::from(began.inserted) - counts.removed() - seen;
        let before = *self.before.get_or_insert(at_most);
        let since = u64::try_from(at_least - before).unwrap_or(0);
        self.evicted = self.evicted.max(since);
    }

    /// Entries evicted since the first walk, at least.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(inserted: u64, removed_by_programs: u64, removed_by_agent: u64) -> RewriteCounts {
        RewriteCounts {
            inserted,
            removed_by_programs,
            removed_by_agent,
        }
    }

    /// A walk over a table that does not change.
    fn quiet(ledger: &mut Ledger, counts: RewriteCounts, seen: u64) -> u64 {
        ledger.begin(counts);
        ledger.end(counts, seen);
        ledger.evicted()
    }

    #[test]
    fn what_is_missing_was_evicted() {
        let mut ledger = Ledger::default();
        assert_eq!(quiet(&mut ledger, counts(10, 1, 0), 9), 0);
        assert_eq!(quiet(&mut ledger, counts(100, 11, 4), 80), 5);
        assert_eq!(quiet(&mut ledger, counts(100, 11, 24), 60), 5);
    }

    #[test]
    fn what_nobody_has_counted_is_not_evicted() {
        let mut ledger = Ledger::default();
        // Of programs that did not count, and evicted before: 50 entries nobody has seen coming.
        assert_eq!(quiet(&mut ledger, counts(0, 0, 0), 50), 0);
        assert_eq!(quiet(&mut ledger, counts(20, 0, 30), 40), 0);
        assert_eq!(quiet(&mut ledger, counts(20, 0, 30), 38), 2);
    }

    proptest::proptest! {
        /// Whatever happens while a walk is under way: never more than was evicted, and exactly that when it is quiet.
        #[test]
        fn never_too_much(steps: Vec<(u8, u8, u8, u8, u8)>) {
            let (mut ledger, mut now, mut present, mut evicted) = (Ledger::default(), RewriteCounts::default(), 0u64, 0u64);
            for (inserted, removed, collected, lost, missed) in steps {
                ledger.begin(now);
                let was_there = present;
                now.inserted += u64::from(inserted);
                present += u64::from(inserted);
                let out = u64::from(removed).min(present);
                (now.removed_by_programs, present) = (now.removed_by_programs + out, present - out);
                let out = u64::from(collected).min(present);
                (now.removed_by_agent, present) = (now.removed_by_agent + out, present - out);
                let out = u64::from(lost).min(present);
                (evicted, present) = (evicted + out, present - out);
                // What is new may have been seen or not, and so may what went.
                let least = present.saturating_sub(u64::from(inserted));
                let most = was_there + u64::from(inserted);
                ledger.end(now, least + u64::from(missed) % (most - least + 1));
                proptest::prop_assert!(ledger.evicted() <= evicted, "{} > {evicted}", ledger.evicted());
            }
        }
    }
}
