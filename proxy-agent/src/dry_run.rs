//! `run --dry-run`: reads the source until everything has been listed once, plans, and says what would be programmed. Neither the
//! kernel nor the node's network is touched, so it needs no rights but to read.

use anyhow::Context;
use tokio::sync::mpsc;

use crate::config::RunConfig;
use crate::doctor::api;
use crate::inspect::{self, Output};
use crate::model::ClusterState;
use crate::run::{block_on, start_source};
use crate::source::Event;

const EVENT_QUEUE: usize = 64;

/// What would be programmed, as text.
pub(crate) fn dry_run(config: &RunConfig, output: Output) -> anyhow::Result<String> {
    // A proxy that runs tries again for ever.
    if let Some(obstacle) = api::obstacle(config) {
        anyhow::bail!(obstacle);
    }
    let state = block_on(first_lists(config));
    let plans = state?.take_changes();
    let plans: Vec<_> = plans
        .into_iter()
        .filter_map(|(name, plan)| Some((name, plan?)))
        .collect();
    inspect::planned(&plans, output).context("showing the plans")
}

async fn first_lists(config: &RunConfig) -> anyhow::Result<ClusterState> {
    let (events_tx, mut events) = mpsc::channel(EVENT_QUEUE);
    // Events about Services are published by what is not run here.
    let _publisher = start_source(config, events_tx, None).await?;
    let mut state = ClusterState::default();
    while !state.is_complete() {
        match events.recv().await.context("the source of objects ended")? {
            Event::Change(change) => state.apply(change),
            Event::Warning(warning) => tracing::warn!("{warning}"),
        }
    }
    // What is listed in between is what the first plans are made of.
    state.settle();
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunArgs;

    #[test]
    fn plans_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let objects = r#"
kind: Service
apiVersion: v1
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.0.7
  clusterIPs: [10.96.0.7]
  ipFamilies: [IPv4]
  externalTrafficPolicy: Local
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080, protocol: TCP}]
---
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.244.1.9], nodeName: node1, conditions: {ready: true}}
- {addresses: [10.244.2.9], nodeName: node2, conditions: {ready: true}}
"#;
        std::fs::write(dir.path().join("web.yaml"), objects).unwrap();
        let args = RunArgs {
            manifests: Some(dir.path().to_str().unwrap().to_owned()),
            node_name: Some("node1".to_owned()),
            bpf_dir: Some("/nonexistent".to_owned()),
            ..RunArgs::default()
        };
        let (config, _) = RunConfig::from_args(&args).unwrap();
        let rows: serde_json::Value = serde_json::from_str(&dry_run(&config, Output::Json).unwrap()).unwrap();
        let row = &rows[0];
        assert_eq!((&row["name"], &row["portName"]), (&"web".into(), &"http".into()));
        let frontends = row["frontends"].as_array().unwrap();
        let has = |kind: &str, port: u16, local: bool| {
            let is = |f: &serde_json::Value| f["kind"] == kind && f["port"] == port && f["local"] == local;
            frontends.iter().any(is)
        };
        assert!(has("ClusterIP", 80, false) && has("NodePort", 30080, true), "{row}");
        assert_eq!(
            row["cluster"]["selectable"],
            serde_json::json!(["10.244.1.9:8080", "10.244.2.9:8080"])
        );
        assert_eq!(row["local"]["selectable"], serde_json::json!(["10.244.1.9:8080"]));
        let table = dry_run(&config, Output::Table).unwrap();
        assert!(
            table.contains("10.96.0.7:80,*:30080") || table.contains("*:30080,10.96.0.7:80"),
            "{table}"
        );
    }
}
