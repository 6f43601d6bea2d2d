//! Whether shares are what chance would give.

use std::collections::BTreeMap;

use statrs::distribution::{ChiSquared, ContinuousCDF};

/// Result of a chi-square test against equal shares.
#[derive(Clone, Copy, Debug)]
pub struct ChiSquare {
    /// Sum over (observed - expected)² / expected.
    pub statistic: f64,
    /// Probability that a uniform choice deviates at least this much.
    pub p: f64,
}

/// Tests `counts`, one per category (zeros included), against a uniform choice.
pub fn uniform(counts: &[u64]) -> ChiSquare {
    assert!(counts.len() > 1, "a share needs at least two categories");
    let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
    let statistic = counts.iter().map(|c| (*c as f64 - expected).powi(2) / expected).sum();
    let distribution = ChiSquared::new((counts.len() - 1) as f64).expect("the degrees of freedom are positive");
    ChiSquare {
        statistic,
        p: distribution.sf(statistic),
    }
}

/// How often each of `categories` occurs in `answers`, in their order.
pub fn count<'a>(categories: &[&str], answers: impl IntoIterator<Item = &'a String>) -> Vec<u64> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer).or_default() += 1;
    }
    categories.iter().map(|c| counts.get(c).copied().unwrap_or(0)).collect()
}

/// The value below which `share` (0 to 1) of the samples lie.
pub fn quantile<T: Copy + Ord>(samples: &[T], share: f64) -> T {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables give 7.815 as the value that three degrees of freedom exceed with p = 0.05.
    #[test]
    fn known_values() {
        let even = uniform(&[250, 250, 250, 250]);
        assert!(even.statistic == 0.0 && (even.p - 1.0).abs() < 1e-9);
        // (50² + 50²) / 1000 = 5 with one degree of freedom: p = 0.0253.
        let uneven = uniform(&[1050, 950]);
        assert!(
            (uneven.statistic - 5.0).abs() < 1e-9 && (uneven.p - 0.02535).abs() < 1e-4,
            "{uneven:?}"
        );
        assert!(uniform(&[500, 300, 100, 100]).p < 1e-6);
    }

    #[test]
    fn quantiles() {
        let samples: Vec<u32> = (1..=101).collect();
        assert_eq!((quantile(&samples, 0.5), quantile(&samples, 0.99)), (51, 100));
    }
}
