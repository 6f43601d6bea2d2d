//! Kubernetes Events about Services: a health-check port that cannot be bound shows up in `kubectl describe service` (S159). Listeners
//! report, one task publishes.
//!
//! What must stay true: nobody waits for the API server; what cannot be published is lost, and the log has it anyway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::model::ObjectName;

const CONTROLLER: &str = "ebpf-proxy";
/// Kubernetes' limit for the text of an Event.
const LONGEST_NOTE: usize = 1024;
/// Reports that may wait; more are lost.
const QUEUE: usize = 64;
/// An API server that takes longer does not hear of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where failures are reported. Without an API server: nowhere.
#[derive(Clone, Debug, Default)]
pub struct Events {
    queue: Option<mpsc::Sender<Failure>>,
}

#[derive(Debug)]
struct Failure {
    service: ObjectName,
    note: String,
}

impl Events {
    /// Starts publishing in the name of a node. To be called from within the runtime; ends with the last clone.
    pub fn start(client: Client, node_name: Arc<str>) -> Self {
        let (queue, failures) = mpsc::channel(QUEUE);
        tokio::spawn(publish_all(client, node_name, failures));
        Self { queue: Some(queue) }
    }

    /// A health-check port of a Service cannot be bound.
    pub(super) fn health_check_failed(&self, service: &ObjectName, address: SocketAddr, error: &std::io::Error) {
        let Some(queue) = &self.queue else { return };
        let failure = Failure {
            service: service.clone(),
            note: note(service, address, error),
        };
        if queue.try_send(failure).is_err() {
            tracing::debug!(%service, "too many events, this one is lost");
        }
    }
}

fn note(service: &ObjectName, address: SocketAddr, error: &std::io::Error) -> String {
    let port = address.port();
    let mut note = format!(
        "healthCheckNodePort {port} of Service {service} cannot be served at {address}: {error}; free the port on this node, or give \
         the Service another one"
    );
    note.truncate(note.floor_char_boundary(LONGEST_NOTE));
    note
}

async fn publish_all(client: Client, node_name: Arc<str>, mut failures: mpsc::Receiver<Failure>) {
    let reporter = Reporter {
        controller: CONTROLLER.to_owned(),
        instance: Some(node_name.to_string()),
    };
    // It counts repeated ones on the Event that is there.
    let recorder = Recorder::new(client.clone(), reporter);
    while let Some(failure) = failures.recv().await {
        let service = &failure.service;
        match timeout(PATIENCE, publish(&client, &recorder, &failure)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%service, %error, "event not published"),
            Err(_) => tracing::warn!(%service, "event not published: the API server does not answer"),
        }
    }
}

async fn publish(client: &Client, recorder: &Recorder, failure: &Failure) -> Result<(), kube::Error> {
    let ObjectName { namespace, name } = &failure.service;
    // `kubectl describe` finds events by the object's uid. Listing is what the agent may do anyway.
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    let only = ListParams::default().fields(&format!("metadata.name={name}"));
    let Some(service) = services.list_metadata(&only).await?.items.pop() else {
        return Ok(());
    };
    let regarding = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(namespace.to_string()),
        name: Some(name.to_string()),
        uid: service.metadata.uid,
        ..ObjectReference::default()
    };
    let event = Event {
        type_: EventType::Warning,
        reason: "FailedToStartServiceHealthcheck".to_owned(),
        note: Some(failure.note.clone()),
        action: "Listen".to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &regarding).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_names_object_field_and_remedy() {
        let service = ObjectName::new("default", "web");
        let address = "[::]:30999".parse().unwrap();
        let error = std::io::Error::from_raw_os_error(libc::EADDRINUSE);
        let text = note(&service, address, &error);
        for part in [
            "default/web",
            "healthCheckNodePort 30999",
            "[::]:30999",
            "in use",
            "free the port",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let long = std::io::Error::other("é".repeat(2000));
        assert!(note(&service, address, &long).len() <= LONGEST_NOTE);
    }

    #[tokio::test]
    async fn nobody_waits() {
        let (queue, _never_read) = mpsc::channel(1);
        let events = Events { queue: Some(queue) };
        let error = std::io::Error::from_raw_os_error(libc::EADDRINUSE);
        for events in [&events, &events, &Events::default()] {
            events.health_check_failed(&ObjectName::new("a", "b"), "0.0.0.0:1".parse().unwrap(), &error);
        }
    }
}
