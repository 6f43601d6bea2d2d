//! What an agent says of the traffic that was sent: its metrics beside what the demo knows, and the kernel beside the objects.

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use proxy_tests::agent::Agent;

/// What was sent on the agent's node: requests with each protocol, all answered.
pub(crate) struct Sent {
    pub(crate) tcp: u64,
    pub(crate) udp: u64,
}

/// A line of the table.
struct Figure {
    metric: String,
    says: u64,
    expected: String,
    is_true: bool,
}

impl Figure {
    fn exactly(metric: String, says: u64, expected: u64) -> Self {
        Self {
            metric,
            says,
            expected: expected.to_string(),
            is_true: says == expected,
        }
    }

    fn between(metric: String, says: u64, [least, most]: [u64; 2]) -> Self {
        Self {
            metric,
            says,
            expected: format!("{least} to {most}"),
            is_true: (least..=most).contains(&says),
        }
    }
}

/// The sum of a metric's series that have all of these labels; an error if there is none.
fn sum(metrics: &str, name: &str, labels: &[String]) -> Result<u64> {
    let series: Vec<&str> = metrics
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| labels.iter().all(|label| line.contains(label.as_str())))
        .filter_map(|line| Some(line.rsplit_once(' ')?.1))
        .collect();
    ensure!(!series.is_empty(), "the agent has no {name} with {labels:?}");
    let values = series.into_iter().map(str::parse::<u64>);
    values
        .sum::<Result<u64, _>>()
        .with_context(|| format!("{name} is no whole number"))
}

/// Prints the table, and fails if a figure is not what the traffic was.
pub(crate) fn compare(agent: &Agent, service: &str, sent: &Sent) -> Result<()> {
    let metrics = agent.metrics()?;
    let of = |protocol: &str| vec![format!("service=\"{service}\""), format!("protocol=\"{protocol}\"")];
    let mut figures = Vec::new();
    for (protocol, sent, least) in [
        ("TCP", sent.tcp, sent.tcp),
        // A client that is given a source port again goes on with the flow that had it.
        ("UDP", sent.udp, sent.udp * 9 / 10),
    ] {
        let opened = sum(&metrics, "ebpf_proxy_service_connections_total", &of(protocol))?;
        figures.push(Figure::between(
            format!("{protocol} connections of the Service"),
            opened,
            [least, sent],
        ));
        for name in ["refused", "dropped"] {
            let counted = sum(&metrics, &format!("ebpf_proxy_service_{name}_total"), &of(protocol))?;
            figures.push(Figure::exactly(format!("{protocol} {name}"), counted, 0));
        }
    }
    // One datagram each way for a request; the node's own go through the packet programs as well, since their sockets are connected.
    for direction in ["request", "reply"] {
        let labels = [of("UDP"), vec![format!("direction=\"{direction}\"")]].concat();
        let packets = sum(&metrics, "ebpf_proxy_service_packets_total", &labels)?;
        figures.push(Figure::exactly(format!("UDP packets, {direction}"), packets, sent.udp));
    }
    for name in [
        "ebpf_proxy_sync_failures_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    ] {
        figures.push(Figure::exactly(name.to_owned(), sum(&metrics, name, &[])?, 0));
    }
    let programs = sum(
        &metrics,
        "ebpf_proxy_programs_attached",
        &["place=\"cgroup\"".to_owned()],
    )?;
    figures.push(Figure::exactly("programs at sockets".to_owned(), programs, 8));
    println!("{}", table(&figures));
    for figure in &figures {
        ensure!(
            figure.is_true,
            "{} says {}: {}, and that is not {}",
            agent.node(),
            figure.metric,
            figure.says,
            figure.expected
        );
    }
    Ok(())
}

fn table(figures: &[Figure]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["what /metrics has", "says", "is"]);
    for figure in figures {
        table.add_row([&figure.metric, &figure.says.to_string(), &figure.expected]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
