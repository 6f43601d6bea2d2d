//! What a value has to be, and whether it is.

use std::fmt;

/// What is known of a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Truth {
    /// This.
    Exactly(f64),
    /// A rate: what is counted lies between two scrapes, which are not quite where the window begins and ends.
    About(f64),
    /// From this to that.
    Between(f64, f64),
    /// More than nothing.
    Some,
}

/// How far a rate may be off, as a share and at least.
const SHARE: f64 = 0.1;
const LEAST: f64 = 0.3;

impl Truth {
    pub(super) fn holds(self, value: f64) -> bool {
        match self {
            Self::Exactly(truth) => (value - truth).abs() < 1e-9,
            Self::About(truth) => (value - truth).abs() <= (truth * SHARE).max(LEAST),
            Self::Between(least, most) => (least..=most).contains(&value),
            Self::Some => value > 0.0,
        }
    }
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Exactly(truth) => f.write_str(&number(truth)),
            Self::About(truth) => write!(f, "about {}", number(truth)),
            Self::Between(least, most) => write!(f, "{} to {}", number(least), number(most)),
            Self::Some => f.write_str("more than 0"),
        }
    }
}

/// For people.
pub(super) fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.6}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_may_be_off_a_little() {
        assert!(Truth::About(20.0).holds(18.5) && !Truth::About(20.0).holds(17.0));
        assert!(Truth::About(0.0).holds(0.05) && !Truth::About(0.0).holds(1.0));
        assert!(Truth::Exactly(3.0).holds(3.0) && !Truth::Exactly(3.0).holds(3.1));
        assert!(!Truth::Between(0.0, 1.0).holds(f64::NAN));
    }
}
