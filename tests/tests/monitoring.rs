//! The alert rules and the dashboard that the chart carries speak of metrics that a running agent has: every name, every label, and
//! every value that a label is compared with. promtool approves of them. That what they say is true is shown by `demo.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use proxy_common::reason::Reason;
use proxy_tests::manifests;
use proxy_tests::process::{run_with_input, wait_until};
use proxy_tests::prometheus::{program, promtool};
use proxy_tests::world::{ARRIVAL, ENDPOINT_PORTS, SERVICE_PORTS, Setup, World, vips};
use proxy_tests::{echo, monitoring, topology::Shape};
use serde_json::{Value, json};

/// What the metrics' names begin with.
const OURS: [&str; 2] = ["kubeproxy_", "ebpf_proxy_"];
/// Prometheus adds it to what it scrapes.
const SCRAPED: &str = "instance";

/// Expressions with where they stand.
fn expressions() -> Vec<(String, String)> {
    let alerts = monitoring::alerts().unwrap().into_iter();
    let queries = monitoring::queries().unwrap().into_iter();
    alerts
        .map(|alert| (alert.name, alert.expression))
        .chain(queries.map(|query| (query.panel, query.expression)))
        .collect()
}

/// A label and the values that it is compared with.
type Matcher = (String, Vec<String>);

/// The metrics an expression names, each with its matchers.
fn metrics_of(expression: &str) -> Vec<(String, Vec<Matcher>)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(start) = OURS.iter().filter_map(|prefix| rest.find(prefix)).min() {
        rest = &rest[start..];
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let (name, behind) = rest.split_at(end);
        let matchers = behind.strip_prefix('{').and_then(|behind| behind.split_once('}'));
        let matchers = matchers.map_or("", |(matchers, _)| matchers);
        let matcher = |text: &str| {
            let (label, value) = text.split_once(['=', '!']).unwrap();
            let value = value.trim_start_matches(['=', '~']).trim_matches('"');
            (label.trim().to_owned(), value.split('|').map(str::to_owned).collect())
        };
        let matchers = matchers
            .split(',')
            .filter(|text| !text.trim().is_empty())
            .map(matcher)
            .collect();
        found.push((name.to_owned(), matchers));
        rest = behind;
    }
    found
}

/// Labels and their values of every metric in the agent's answer.
fn exposed(text: &str) -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let mut metrics: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let series = line.rsplit_once(' ').unwrap().0;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let metric = metrics.entry(name.to_owned()).or_default();
        for label in labels
            .trim_end_matches('}')
            .split("\",")
            .filter(|label| !label.is_empty())
        {
            let (label, value) = label.split_once("=\"").unwrap();
            metric
                .entry(label.to_owned())
                .or_default()
                .insert(value.trim_end_matches('"').to_owned());
        }
    }
    metrics
}

fn small_world() -> World {
    let shape = Shape {
        nodes: 1,
        ..Default::default()
    };
    World::new(&Setup {
        shape,
        ..Default::default()
    })
    .unwrap()
}

#[test]
fn rules_and_dashboard_name_what_an_agent_has() {
    let world = small_world();
    world.publish(&["pod1-1"]).unwrap();
    // As the control plane stamps a change of endpoints (S188).
    let mut slices = manifests::slices("stamped", &ENDPOINT_PORTS, &world.endpoints_of(&["pod1-1"]));
    for slice in &mut slices {
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": now});
    }
    slices.push(manifests::service("stamped", &["10.96.0.98"], &SERVICE_PORTS));
    world.write("stamped", &slices).unwrap();
    world.topology.pod(0, 1).run(|| echo::tcp(vips()[0])).unwrap();
    // Something of everything: a bad object, questions for health, a change with a time.
    let mut bad = manifests::service("bad", &["10.96.0.99"], &[]);
    bad["spec"]["clusterIP"] = json!("not an address");
    bad["spec"]["clusterIPs"] = json!(["not an address"]);
    world.write("bad", &[bad]).unwrap();
    let agent = &world.agents[0];
    for path in ["/healthz", "/livez"] {
        agent.healthz(path).unwrap();
    }
    let awaited = [
        "ebpf_proxy_bad_objects_total",
        "kubeproxy_network_programming_duration_seconds_bucket",
    ];
    let metrics = wait_until(ARRIVAL, || {
        agent
            .metrics()
            .ok()
            .map(|text| exposed(&text))
            .filter(|metrics| awaited.iter().all(|name| metrics.contains_key(*name)))
    });
    let metrics = metrics.unwrap_or_else(|| panic!("not within {ARRIVAL:?}: {awaited:?}"));
    let reasons: BTreeSet<String> = Reason::ALL.iter().map(|reason| reason.name().to_owned()).collect();
    let mut named = 0;
    for (place, expression) in expressions() {
        let metrics_named = metrics_of(&expression);
        assert!(!metrics_named.is_empty(), "{place}: no metric in {expression}");
        for (name, matchers) in metrics_named {
            named += 1;
            let labels = metrics
                .get(&name)
                .unwrap_or_else(|| panic!("{place}: no agent has {name}"));
            for (label, values) in matchers.into_iter().filter(|(label, _)| label != SCRAPED) {
                let known = labels
                    .get(&label)
                    .unwrap_or_else(|| panic!("{place}: {name} has no label {label}"));
                for value in values.iter().filter(|value| label != "code" && !value.contains('.')) {
                    assert!(
                        known.contains(value) || reasons.contains(value),
                        "{place}: {name} has no {label} {value}"
                    );
                }
            }
        }
    }
    assert!(named > 20, "only {named} metrics are named");
}

/// Whatever promtool has to say against the rules, and every alert as the file beside says: when it fires, with which words, and when
/// it does not.
#[test]
fn promtool_approves_of_the_rules() {
    let rules = monitoring::rules_file();
    let said = promtool(&["check", "rules", "--lint=all", "--lint-fatal", rules.to_str().unwrap()]).unwrap();
    assert!(said.contains("SUCCESS"), "{said}");
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/prometheus/rules.test.yaml");
    let said = promtool(&["test", "rules", cases]).unwrap();
    assert!(said.contains("SUCCESS"), "{said}");
    let cases: Value = serde_saphyr::from_str(&std::fs::read_to_string(cases).unwrap()).unwrap();
    let mut seen: BTreeMap<String, [bool; 2]> = BTreeMap::new();
    for test in cases["tests"].as_array().unwrap() {
        for case in test["alert_rule_test"].as_array().unwrap() {
            let fires = case["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
            let name = case["alertname"].as_str().unwrap().to_owned();
            seen.entry(name).or_default()[usize::from(fires)] = true;
        }
    }
    for alert in monitoring::alerts().unwrap() {
        assert_eq!(
            seen.get(&alert.name),
            Some(&[true; 2]),
            "{}: silent, firing",
            alert.name
        );
    }
}

/// What promtool says of the text that the agent serves to those who do not ask for OpenMetrics.
#[test]
fn promtool_approves_of_the_metrics() {
    let world = small_world();
    world.publish(&["pod1-1"]).unwrap();
    world.topology.pod(0, 1).run(|| echo::tcp(vips()[0])).unwrap();
    let metrics = world.agents[0].metrics().unwrap();
    let mut check = Command::new(program("promtool").unwrap());
    let said = run_with_input(check.args(["check", "metrics"]), &metrics)
        .map_or_else(|error| format!("{error:#}"), |_| String::new());
    let complaints = said
        .lines()
        .filter(|line| line.contains("kubeproxy_") || line.contains("ebpf_proxy_"));
    // kube-proxy's name of a gauge.
    let complaints: Vec<_> = complaints
        .filter(|line| !line.contains("kubeproxy_sync_proxy_rules_no_local_endpoints_total "))
        .collect();
    assert_eq!(complaints, Vec::<&str>::new());
}
