//! What the results are, for people: a text for the terminal, and the document with its plots. Everything is made of the results.

mod document;
mod plot;
mod table;

pub(crate) use document::write_document;
pub(crate) use table::text;

use proxy_tests::results::{Against, Better, Bound, Case, Row, Spread, Target, Verdict, ratios};

/// The contender that others are compared with: the first row, which has no proxy where there is such a one.
fn base(case: &Case) -> Option<&str> {
    case.rows.first().map(|row| row.contender.as_str())
}

/// How a row relates to the first contender at its size; nothing for that one itself.
fn relation(case: &Case, row: &Row) -> Option<Spread> {
    let base = base(case)?;
    if row.contender == base {
        return None;
    }
    Spread::of(&ratios(&row.samples, &case.row(base, row.at)?.samples))
}

/// A figure with three significant digits.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size => (2 - size.log10().floor() as i32).clamp(0, 4) as usize,
    };
    thousands(&format!("{value:.digits$}"))
}

/// `1234567` as `1,234,567`.
fn thousands(text: &str) -> String {
    let (sign, rest) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
    let (whole, fraction) = rest
        .split_once('.')
        .map_or((rest, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let fraction = fraction.map(|fraction| format!(".{fraction}")).unwrap_or_default();
    format!("{sign}{grouped}{fraction}")
}

/// A middle with its ends.
fn spread(spread: Spread) -> String {
    format!(
        "{} ({}–{})",
        figure(spread.median),
        figure(spread.min),
        figure(spread.max)
    )
}

/// A ratio with its ends: two decimals, as targets have them.
fn ratio(spread: Spread) -> String {
    format!("{:.2} ({:.2}–{:.2})", spread.median, spread.min, spread.max)
}

fn size(at: Option<u64>) -> String {
    at.map(|at| thousands(&at.to_string())).unwrap_or_default()
}

/// A line about a target: what it is, what was reached, whether that is enough.
struct TargetLine {
    what: String,
    bound: String,
    reached: String,
    verdict: &'static str,
}

fn target_lines(case: &Case) -> Vec<TargetLine> {
    let lines = case.targets.iter().flat_map(|target| {
        let verdicts = case.verdicts(target);
        verdicts
            .into_iter()
            .map(|(at, verdict)| target_line(case, target, at, verdict))
    });
    lines.collect()
}

fn target_line(case: &Case, target: &Target, at: Option<u64>, verdict: Option<Verdict>) -> TargetLine {
    let axis = case.axis.as_deref().unwrap_or_default();
    let place = at.map(|at| format!(", {} {axis}", size(Some(at)))).unwrap_or_default();
    let against = match &target.against {
        Against::Nothing => String::new(),
        Against::Contender(other) => format!(" : {other}"),
        Against::Size(other) => format!(" : itself at {}", size(Some(*other))),
        Against::SizeBeside(other, base) => format!(" : itself at {}, both in relation to {base}", size(Some(*other))),
    };
    let is_value = target.against == Against::Nothing;
    let bound = match target.bound {
        Bound::AtLeast(bound) => format!("≥ {bound}"),
        Bound::AtMost(bound) => format!("≤ {bound}"),
        Bound::Around(range) => format!("1 ± {range}"),
    };
    let unit = if is_value {
        format!(" {}", case.unit)
    } else {
        String::new()
    };
    TargetLine {
        what: format!("{}{place}: {}{against}", case.title, target.contender),
        bound: format!("{bound}{unit}"),
        reached: match verdict {
            Some(verdict) if is_value => format!("{}{unit}", spread(verdict.reached)),
            Some(verdict) => ratio(verdict.reached),
            None => "not measured".to_owned(),
        },
        verdict: match verdict {
            Some(verdict) if verdict.is_met => "met",
            Some(_) => "missed",
            None => "open",
        },
    }
}

fn direction(better: Better) -> &'static str {
    match better {
        Better::Higher => "more is better",
        Better::Lower => "less is better",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use proxy_tests::results::contender;

    /// Two cases as they might be measured: one over sizes with a row that came to nothing, one without sizes.
    pub(super) fn cases() -> Vec<Case> {
        let row = |contender: &str, at, samples: &[f64], note: Option<&str>| Row {
            samples: samples.to_vec(),
            note: note.map(str::to_owned),
            ..Row::new(contender, at)
        };
        let case = |name: &str, title: &str, rows, targets, axis: Option<&str>| Case {
            name: name.into(),
            title: title.into(),
            about: "How it was done.".into(),
            unit: "1/s".into(),
            better: Better::Higher,
            axis: axis.map(str::to_owned),
            rows,
            targets,
        };
        let target = |contender: &str, against, bound| Target {
            contender: contender.into(),
            at: None,
            against,
            bound,
        };
        let direct = || Against::Contender(contender::DIRECT.into());
        let sized = vec![
            row(contender::DIRECT, Some(1), &[20_000.0, 20_200.0, 19_900.0], None),
            row(contender::TC, Some(1), &[10_000.0, 10_100.0, 9_900.0], None),
            row(contender::IPTABLES, Some(1), &[7_000.0, 7_100.0, 6_900.0], None),
            row(contender::DIRECT, Some(50_000), &[20_100.0, 20_200.0, 20_000.0], None),
            row(contender::TC, Some(50_000), &[9_900.0, 10_000.0, 9_800.0], None),
            row(
                contender::IPTABLES,
                Some(50_000),
                &[],
                Some("not programmed within 180 s"),
            ),
        ];
        let targets = vec![
            target(contender::TC, direct(), Bound::AtLeast(0.4)),
            target(contender::TC, Against::Size(1), Bound::Around(0.03)),
            target(contender::IPTABLES, direct(), Bound::AtLeast(0.9)),
        ];
        let plain = vec![
            row("this", None, &[1.5, 1.25], None),
            row("that", None, &[3.0, 2.5], None),
        ];
        vec![
            case("sized", "Connections", sized, targets, Some("Services")),
            case(
                "plain",
                "Seconds",
                plain,
                vec![target("this", Against::Nothing, Bound::AtMost(2.0))],
                None,
            ),
        ]
    }

    #[test]
    fn figures_have_three_digits() {
        let all = [0.0, 0.01234, 0.5, 1.0, 12.34, 123.4, 1234.5, 1_234_567.0, -0.25].map(figure);
        assert_eq!(
            all,
            [
                "0",
                "0.0123",
                "0.500",
                "1.00",
                "12.3",
                "123",
                "1,234",
                "1,234,567",
                "-0.250"
            ]
        );
    }

    #[test]
    fn the_text_has_every_figure_and_every_verdict() {
        let text = text(&cases());
        for expected in [
            "10,000 (9,900–10,100)",
            "0.50 (0.50–0.50)",
            "not programmed within 180 s",
            "Connections, 50,000 Services: ours, tc only : itself at 1",
            "not measured",
            "missed",
            "≤ 2 1/s",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
    }

    #[test]
    fn the_document_names_its_plots_and_they_are_there() {
        let dir = proxy_tests::leftovers::temp_dir("document").unwrap();
        std::fs::create_dir(dir.path().join("performance")).unwrap();
        let stale = dir.path().join("performance/gone.svg");
        std::fs::write(&stale, "").unwrap();
        let machine = Machine {
            kernel: "Linux 6.18".into(),
            processor: "Some processor".into(),
            cores: 2,
            gigabytes: 24,
            is_virtual: true,
            date: "2026-01-01".into(),
        };
        write_document(dir.path(), &cases(), &machine).unwrap();
        let text = std::fs::read_to_string(dir.path().join("performance.md")).unwrap();
        assert!(text.contains("Linux 6.18") && text.contains("2 cores"), "{text}");
        for name in ["sized", "plain"] {
            assert!(text.contains(&format!("(performance/{name}.svg)")), "{text}");
            let plot = std::fs::read_to_string(dir.path().join(format!("performance/{name}.svg"))).unwrap();
            assert!(plot.starts_with("<svg") && plot.contains("</svg>"), "{plot}");
        }
        assert!(!stale.exists(), "a plot of a case that is no more");
        assert!(
            text.contains("| missed |") && text.contains("| met |") && text.contains("| open |"),
            "{text}"
        );
    }
}
