//! Durations as kube-proxy's flags and configuration write them: Go's `time.Duration`, such as `500ms`, `1h30m` or `0`. Read by
//! `config`, written by `/configz`.

use std::fmt::Write;
use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;

/// A duration that is not negative. What Go writes with a fraction in front of a smaller unit (`1.5h30m`) is not understood.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    // Otherwise that would be ISO 8601, or prose, which Go does not take.
    if text.starts_with(['P', 'p', '+']) || text.contains([' ', ',', ':']) {
        return None;
    }
    Duration::try_from(text.parse::<SignedDuration>().ok()?).ok()
}

/// As Go prints it: `24h0m0s`, `1m0s`, `1.5s`, `10ms`.
pub(crate) fn text(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if seconds == 0 && nanos > 0 {
        let (unit, name) = match nanos {
            1_000_000.. => (1_000_000, "ms"),
            1_000.. => (1_000, "µs"),
            _ => (1, "ns"),
        };
        return format!("{}{name}", f64::from(nanos) / f64::from(unit));
    }
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    let mut text = String::new();
    // Writing into a String cannot fail.
    if hours > 0 {
        let _ = write!(text, "{hours}h");
    }
    if seconds >= 60 {
        let _ = write!(text, "{minutes}m");
    }
    let _ = write!(text, "{}", seconds % 60);
    if nanos > 0 {
        let fraction = format!("{nanos:09}");
        let _ = write!(text, ".{}", fraction.trim_end_matches('0'));
    }
    text + "s"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written_as_go_does() {
        for (read, nanos, written) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("1s", 1_000_000_000, "1s"),
            ("500ms", 500_000_000, "500ms"),
            ("10ms", 10_000_000, "10ms"),
            ("1.5s", 1_500_000_000, "1.5s"),
            ("0.25s", 250_000_000, "250ms"),
            ("1.5ms", 1_500_000, "1.5ms"),
            ("20us", 20_000, "20µs"),
            ("20µs", 20_000, "20µs"),
            ("7ns", 7, "7ns"),
            ("90s", 90_000_000_000, "1m30s"),
            ("1h30m", 5_400_000_000_000, "1h30m0s"),
            ("24h0m0s", 86_400_000_000_000, "24h0m0s"),
            ("1m0.05s", 60_050_000_000, "1m0.05s"),
        ] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(parse(read), Some(duration), "{read}");
            assert_eq!(text(duration), written);
            assert_eq!(parse(written), Some(duration), "{written}");
        }
        for bad in [
            "", "1", "-1s", "1d", "s", "1 s", "1s ", "PT1S", "1:00:00", "1h, 2m", "0.5", "2mo", "1w",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
