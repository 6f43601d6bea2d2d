//! The Helm chart without a cluster: it is clean, its default is the plain manifest, and every value arrives. That an API server
//! accepts what it makes: `tests/tests/apiserver/deploy.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeMap;

use proxy_tests::helm::{deploy, helm, render};
use proxy_tests::manifests;
use serde_json::{Value, json};

/// Labels that only Helm's objects have.
const HELM_LABELS: [&str; 3] = [
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "helm.sh/chart",
];

fn objects(text: &str) -> BTreeMap<String, Value> {
    let objects = manifests::documents(text).unwrap().into_iter();
    objects
        .map(|object| (object["kind"].as_str().unwrap().to_owned(), object))
        .collect()
}

fn documents(args: &[&str]) -> Vec<Value> {
    manifests::documents(&render(args).unwrap()).unwrap()
}

fn everything() -> String {
    deploy("chart/tests/everything.yaml")
}

fn container(objects: &BTreeMap<String, Value>) -> &Value {
    &objects["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]
}

#[test]
fn lint_is_clean() {
    let chart = deploy("chart/ebpf-proxy");
    helm(&["lint", "--strict", &chart]).unwrap();
    helm(&["lint", "--strict", &chart, "--values", &everything()]).unwrap();
}

#[test]
fn the_default_is_the_plain_manifest() {
    let plain = objects(&std::fs::read_to_string(deploy("proxy-agent.yaml")).unwrap());
    let mut rendered = objects(&render(&[]).unwrap());
    for object in rendered.values_mut() {
        let name = object["metadata"]["labels"]["app.kubernetes.io/name"].clone();
        assert_eq!(name, "proxy-agent");
        object["metadata"]["labels"]
            .as_object_mut()
            .unwrap()
            .retain(|label, _| !HELM_LABELS.contains(&label.as_str()));
    }
    for (kind, object) in &plain {
        let mut rendered = rendered
            .remove(kind)
            .unwrap_or_else(|| panic!("the chart makes no {kind}"));
        if object["metadata"].get("labels").is_none() {
            rendered["metadata"].as_object_mut().unwrap().remove("labels");
        }
        assert_eq!(
            &rendered, object,
            "{kind}: left the chart, right deploy/proxy-agent.yaml"
        );
    }
    assert!(rendered.is_empty(), "the plain manifest lacks {:?}", rendered.keys());
}

#[test]
fn privileged_replaces_the_capabilities() {
    let objects = objects(&render(&["--set", "privileged=true"]).unwrap());
    let wanted = json!({"privileged": true, "readOnlyRootFilesystem": true, "runAsUser": 0});
    assert_eq!(container(&objects)["securityContext"], wanted);
}

/// The agent itself takes every argument: an option that was renamed is found out here.
#[test]
fn every_value_arrives() {
    let objects = objects(&render(&["--values", &everything()]).unwrap());
    let container = container(&objects);
    let args: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
    for wanted in [
        "--detect-local-mode=InterfaceNamePrefix",
        "--cluster-cidr=10.1.0.0/16,fd01::/48",
        "--nodeport-addresses=primary,192.0.2.0/24",
        "--localhost-nodeports=false",
        "--feature-gates=AllowServiceExternalIPs=false",
        "--healthz-bind-address=[::]:10356",
        "--rewrites-capacity=2097152",
        "--masquerade-all",
    ] {
        assert!(args.iter().any(|arg| arg == wanted), "{wanted} in {args:?}");
    }
    let binary = proxy_tests::agent::binary().unwrap();
    let help = proxy_tests::process::run(std::process::Command::new(binary).args(["run", "--help"])).unwrap();
    for arg in &args {
        let option = arg.split('=').next().unwrap();
        assert!(help.contains(option), "the agent has no {option}");
    }
    assert!(args.len() > 25, "{args:?}");
    let env = container["env"].as_array().unwrap();
    let value = |name: &str| env.iter().find(|entry| entry["name"] == name).unwrap()["value"].clone();
    assert_eq!(value("KUBERNETES_SERVICE_HOST"), "192.0.2.10");
    assert_eq!(value("KUBERNETES_SERVICE_PORT"), "443");
    assert_eq!(value("RUST_LOG"), "debug");
    assert_eq!(container["livenessProbe"]["httpGet"]["port"], 10356);
    assert_eq!(container["image"], "registry.example/proxy-agent:9.9.9");
    let of = |field: &str, name: &str| {
        container[field]
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["name"] == name)
    };
    assert!(of("volumeMounts", "more") && of("ports", "metrics"), "{container:#}");
    assert_eq!(container["ports"][0]["containerPort"], 10349);
    assert_eq!(container["livenessProbe"]["periodSeconds"], 20);
    assert_eq!(container["readinessProbe"]["timeoutSeconds"], 3);
    let set = &objects["DaemonSet"];
    assert_eq!(set["metadata"]["annotations"]["example.com/owner"], "net");
    assert_eq!(set["spec"]["template"]["spec"]["volumes"][2]["name"], "more");
    let rules = objects["ClusterRole"]["rules"].as_array().unwrap();
    let pods = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]});
    assert!(rules.contains(&pods), "with datapath.socketLB: {rules:#?}");
    let more = documents(&["--values", &everything()]);
    assert!(
        more.iter()
            .any(|object| object["metadata"]["name"] == "service-proxy-more")
    );
}

/// An image that is named by what it is.
#[test]
fn a_digest_counts_before_the_tag() {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let value = format!("image.digest={digest}");
    let objects = objects(&render(&["--set", &value, "--set", "image.tag=v1"]).unwrap());
    assert_eq!(container(&objects)["image"], format!("ebpf-proxy/proxy-agent@{digest}"));
}

/// One source: what Prometheus and Grafana are given are the files of the chart, which hold in a packed chart too.
#[test]
fn rules_and_dashboard_are_the_files() {
    let file = |name: &str| std::fs::read_to_string(deploy(&format!("chart/ebpf-proxy/monitoring/{name}"))).unwrap();
    let rules: Value = serde_saphyr::from_str(&file("rules.yaml")).unwrap();
    let dashboard: Value = serde_json::from_str(&file("dashboard.json")).unwrap();
    let dir = proxy_tests::leftovers::temp_dir("chart").unwrap();
    let packed = dir.path().join(format!("ebpf-proxy-{}.tgz", env!("CARGO_PKG_VERSION")));
    let target = dir.path().to_str().unwrap();
    helm(&["package", &deploy("chart/ebpf-proxy"), "--destination", target]).unwrap();
    let from_packed = ["template", "x", packed.to_str().unwrap(), "--values", &everything()];
    for objects in [
        documents(&["--values", &everything()]),
        manifests::documents(&helm(&from_packed).unwrap()).unwrap(),
    ] {
        let named = |kind: &str, name: &str| {
            let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
            objects.iter().find(is_it).unwrap_or_else(|| panic!("no {kind} {name}"))
        };
        assert_eq!(named("PrometheusRule", "service-proxy")["spec"], rules);
        let map = named("ConfigMap", "service-proxy-dashboard");
        assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
        let text = map["data"]["ebpf-proxy.json"].as_str().unwrap();
        assert_eq!(serde_json::from_str::<Value>(text).unwrap(), dashboard);
        let monitor = named("PodMonitor", "service-proxy");
        let set = named("DaemonSet", "service-proxy");
        assert_eq!(monitor["spec"]["selector"], set["spec"]["selector"]);
        let port = &set["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"];
        assert_eq!(&monitor["spec"]["podMetricsEndpoints"][0]["port"], port);
    }
    let kinds = |args: &[&str]| {
        documents(args)
            .iter()
            .map(|object| object["kind"].clone())
            .collect::<Vec<_>>()
    };
    let default = kinds(&[]);
    assert!(
        ["PodMonitor", "PrometheusRule", "ConfigMap"]
            .iter()
            .all(|kind| !default.contains(&json!(kind)))
    );
}

/// Prometheus would find nobody there, and nobody would be told.
#[test]
fn metrics_on_loopback_are_not_to_be_scraped() {
    for address in ["127.0.0.1:10249", "[::1]:10249", ""] {
        let values = [
            "monitoring.podMonitor.enabled=true",
            &format!("metrics.bindAddress={address}"),
        ];
        let error = format!("{:#}", render(&["--set", values[0], "--set", values[1]]).unwrap_err());
        assert!(
            error.contains("metrics.bindAddress") && error.contains("0.0.0.0:10249"),
            "{address}: {error}"
        );
    }
}

#[test]
fn values_that_mean_nothing_are_refused() {
    for wrong in [
        "pods.detectLocalMode=Guess",
        "sync.period=soon",
        "health.port=0",
        "tolerances=[]",
        "datapath.attach=xdp",
    ] {
        let error = format!("{:#}", render(&["--set", wrong]).unwrap_err());
        assert!(error.contains("schema"), "{wrong}: {error}");
    }
}
