//! Watches which pods of this node keep their sockets to themselves: those with the label [`LABEL`]. Only where pods' sockets are
//! translated at all (`--socket-lb all`), and nothing of a pod is read but its metadata (S14).
//!
//! What must stay true: without an answer of the API server the last state stands.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

use super::client::{self, causes};

/// The label, and what it says.
pub(crate) const LABEL: &str = "ebpf-proxy.io/socket-lb";
/// See [`LABEL`].
pub(crate) const OFF: &str = "off";
/// A mirror pod has another UID than the static pod that it shows; this annotation has that one.
const STATIC_UID: &str = "kubernetes.io/config.mirror";

/// UIDs of the pods, as the kubelet knows them. `None`: not listed yet.
pub(crate) type OptedOut = Option<BTreeSet<String>>;

/// Pods with the label, on this node, that have not ended.
pub(crate) fn selection(node: &str) -> watcher::Config {
    watcher::Config::default()
        .fields(&format!(
            "spec.nodeName={node},status.phase!=Succeeded,status.phase!=Failed"
        ))
        .labels(&format!("{LABEL}={OFF}"))
}

/// Follows them until nobody listens any more.
pub(crate) async fn watch(client: Client, node: Arc<str>, pods: watch::Sender<OptedOut>) {
    let api: Api<PartialObjectMeta<Pod>> = Api::all(client);
    let mut stream = pin!(watcher(api, selection(&node)).default_backoff());
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut is_interrupted = false;
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            () = pods.closed() => return,
        };
        let Some(next) = next else { return };
        let event = match next {
            Ok(event) => event,
            Err(error) => {
                // Said once: it is tried again for as long as it lasts.
                if !std::mem::replace(&mut is_interrupted, true) {
                    let (error, remedy) = (causes(&error), remedy(&error));
                    tracing::warn!(
                        error,
                        remedy,
                        "pods with the label {LABEL} cannot be watched, trying again"
                    );
                }
                continue;
            }
        };
        let is_listing = matches!(event, watcher::Event::Init | watcher::Event::InitApply(_));
        match event {
            watcher::Event::Init => found.clear(),
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => {
                found.extend(name(&pod).zip(uid(&pod)));
            }
            watcher::Event::InitDone => is_interrupted = false,
            watcher::Event::Delete(pod) => {
                if let Some(name) = name(&pod) {
                    found.remove(&name);
                }
            }
        }
        if !is_listing {
            pods.send_replace(Some(found.values().cloned().collect()));
        }
    }
}

fn name(pod: &PartialObjectMeta<Pod>) -> Option<String> {
    let (namespace, name) = (pod.metadata.namespace.as_ref()?, pod.metadata.name.as_ref()?);
    Some(format!("{namespace}/{name}"))
}

fn uid(pod: &PartialObjectMeta<Pod>) -> Option<String> {
    let annotations = pod.metadata.annotations.as_ref();
    let of_static = annotations.and_then(|annotations| annotations.get(STATIC_UID));
    of_static.or(pod.metadata.uid.as_ref()).cloned()
}

fn remedy(error: &watcher::Error) -> &'static str {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status))
            if status.code == 403 =>
        {
            RIGHTS
        }
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => client::remedy(error),
        _ => "nothing, unless it goes on",
    }
}

/// What to do where pods may not be read.
pub(crate) const RIGHTS: &str = "allow list and watch of pods in the ClusterRole of the agent, as the chart does with datapath.socketLB=all; \
     until then sockets of every pod are translated";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_static_pod_goes_by_the_uid_that_the_kubelet_gave_it() {
        let pod = |annotations| {
            let metadata = json!({"name": "a", "namespace": "b", "uid": "of-the-object", "annotations": annotations});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        assert_eq!(uid(&pod(json!({}))).as_deref(), Some("of-the-object"));
        assert_eq!(uid(&pod(json!({STATIC_UID: "hash"}))).as_deref(), Some("hash"));
    }
}
