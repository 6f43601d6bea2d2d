//! The text format of Prometheus, which came before OpenMetrics and is what most tools read. Made from OpenMetrics, whose samples are
//! the same; called by the metrics server.

use std::collections::HashSet;
use std::fmt::Write;

/// What differs is about counters, whose samples alone have the suffix `_total` in OpenMetrics, and lines that the older format has
/// not.
pub(super) fn from_open_metrics(open_metrics: &str) -> String {
    let types = open_metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let counters: HashSet<&str> = types.filter_map(|rest| rest.strip_suffix(" counter")).collect();
    let mut text = String::with_capacity(open_metrics.len() + counters.len() * 16);
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), ..) => {}
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(name) => {
                let _infallible = writeln!(text, "# {what} {name}_total {rest}");
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_their_suffix_everywhere() {
        let open_metrics = "# HELP a_seconds Time.\n# TYPE a_seconds gauge\n# UNIT a_seconds seconds\na_seconds 1.5\n\
            # HELP b What is counted.\n# TYPE b counter\nb_total{c=\"d\"} 2\n# EOF\n";
        let text = "# HELP a_seconds Time.\n# TYPE a_seconds gauge\na_seconds 1.5\n\
            # HELP b_total What is counted.\n# TYPE b_total counter\nb_total{c=\"d\"} 2\n";
        assert_eq!(from_open_metrics(open_metrics), text);
    }
}
