//! Watches Services, EndpointSlices, the own Node and ServiceCIDRs in an API server (S14). Each kind has its own task and its own watch; a full
//! list replaces the kind as a whole. Without an API server nothing is said, so the last state stands, however long (S161).

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::{self, NODE_NAME, causes};
use super::convert::{Converter, trigger_time};
use super::{Event, objects};
use crate::model::{Change, EndpointSlice, Node, ObjectName, Service, ServiceCidr};

/// A server that knows streaming lists sends the next object, or the mark of the end, sooner than this.
const STREAMING_PATIENCE: Duration = Duration::from_secs(15);

/// Pauses between tries for a kind that the server does not serve: the first, and up to which they grow.
const UNSERVED_PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(600)];

/// Watches for ever; returns only when nobody listens any more.
pub async fn watch(client: Client, converter: Converter, events: mpsc::Sender<Event>) {
    let own_node = format!("metadata.name={}", converter.node_name());
    let mut tasks = JoinSet::new();
    let all = watcher::Config::default;
    let services: Api<objects::Service> = Api::all(client.clone());
    let slices: Api<objects::EndpointSlice> = Api::all(client.clone());
    let nodes: Api<objects::Node> = Api::all(client.clone());
    let cidrs: Api<objects::ServiceCIDR> = Api::all(client);
    tasks.spawn(follow(services, all(), converter.clone(), events.clone()));
    tasks.spawn(follow(slices, all(), converter.clone(), events.clone()));
    tasks.spawn(follow(cidrs, all(), converter.clone(), events.clone()));
    tasks.spawn(follow(nodes, all().fields(&own_node), converter, events));
    while tasks.join_next().await.is_some() {}
}

/// A kind that is watched: what becomes of an object, and how it is told.
trait Watched:
    kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static
{
    type Model: Send + 'static;
    /// What it is called where one object is followed, and what to do where there is none.
    const REMEDY_IF_ABSENT: Option<&str> = None;
    /// What to do where the server refuses this kind to us. Not given for kinds without which nothing can be done.
    const REMEDY_IF_FORBIDDEN: Option<&str> = None;
    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Option<Self::Model>;
    fn list(models: Vec<Self::Model>) -> Change;
    fn one(name: ObjectName, model: Option<Self::Model>, trigger: Option<SystemTime>) -> Change;
}

impl Watched for objects::Service {
    type Model = Service;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Option<Service> {
        converter.service(name, self)
    }

    fn list(models: Vec<Service>) -> Change {
        Change::Services(models)
    }

    fn one(name: ObjectName, model: Option<Service>, _: Option<SystemTime>) -> Change {
        Change::Service(name, model)
    }
}

impl Watched for objects::EndpointSlice {
    type Model = EndpointSlice;

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Option<EndpointSlice> {
        converter.slice(name, self)
    }

    fn list(models: Vec<EndpointSlice>) -> Change {
        Change::Slices(models)
    }

    fn one(name: ObjectName, model: Option<EndpointSlice>, trigger: Option<SystemTime>) -> Change {
        Change::Slice(name, model, trigger)
    }
}

impl Watched for objects::Node {
    type Model = Node;
    const REMEDY_IF_ABSENT: Option<&str> = Some(NODE_NAME);

    fn convert(&self, _: &ObjectName, converter: &mut Converter) -> Option<Node> {
        converter.node(self)
    }

    fn list(mut models: Vec<Node>) -> Change {
        Change::Node(models.pop())
    }

    fn one(_: ObjectName, model: Option<Node>, _: Option<SystemTime>) -> Change {
        Change::Node(model)
    }
}

impl Watched for objects::ServiceCIDR {
    type Model = ServiceCidr;
    const REMEDY_IF_FORBIDDEN: Option<&str> = Some("add servicecidrs of networking.k8s.io to the agent's ClusterRole");

    fn convert(&self, name: &ObjectName, converter: &mut Converter) -> Option<ServiceCidr> {
        Some(converter.service_cidr(name, self))
    }

    fn list(models: Vec<ServiceCidr>) -> Change {
        Change::ServiceCidrs(models)
    }

    fn one(name: ObjectName, model: Option<ServiceCidr>, _: Option<SystemTime>) -> Change {
        Change::ServiceCidr(name.name, model)
    }
}

/// Follows one kind: streaming lists if the server has them, plain ones if not.
async fn follow<K: Watched>(api: Api<K>, config: watcher::Config, converter: Converter, events: mpsc::Sender<Event>) {
    let mut watch = Watch {
        converter,
        events,
        listing: None,
        listed: false,
        refused: false,
        kind: K::kind(&()).into_owned(),
    };
    let mut patience = Some(STREAMING_PATIENCE);
    let [mut pause, longest] = UNSERVED_PAUSES;
    loop {
        let config = config.clone();
        let config = if patience.is_some() {
            config.streaming_lists()
        } else {
            config
        };
        match watch.run(&api, config, patience).await {
            End::NobodyListens => return,
            End::NoStreaming => {
                patience = None;
                tracing::info!(
                    kind = watch.kind,
                    "the API server has no streaming lists, using plain ones"
                );
            }
            End::Unserved => {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = watch.events.closed() => return,
                }
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// One kind's watch.
struct Watch<K: Watched> {
    converter: Converter,
    events: mpsc::Sender<Event>,
    /// Objects of a list that is not complete yet.
    listing: Option<Vec<K::Model>>,
    /// Some list has been completed.
    listed: bool,
    /// The server does not serve it, which has been said.
    refused: bool,
    kind: String,
}

#[derive(PartialEq, Eq)]
enum End {
    NoStreaming,
    Unserved,
    NobodyListens,
}

impl<K: Watched> Watch<K> {
    async fn run(&mut self, api: &Api<K>, config: watcher::Config, patience: Option<Duration>) -> End {
        let mut stream = pin!(watcher(api.clone(), config).default_backoff());
        loop {
            let next = match patience.filter(|_| self.listing.is_some()) {
                Some(patience) => match tokio::time::timeout(patience, stream.next()).await {
                    Ok(next) => next,
                    // Before 1.27 a server ignores the request for a streaming list and never marks its end.
                    Err(_) => return End::NoStreaming,
                },
                None => stream.next().await,
            };
            let sent = match next {
                Some(Ok(event)) => self.handle(event).await,
                Some(Err(error)) if patience.is_some() && self.is_starting() && refuses_streaming(&error) => {
                    return End::NoStreaming;
                }
                Some(Err(error))
                    if !self.listed
                        && let Some(refusal) = Refusal::of(&error)
                        && let Some(remedy) = K::REMEDY_IF_FORBIDDEN =>
                {
                    return match self.do_without(refusal, remedy).await {
                        Ok(()) => End::Unserved,
                        Err(_) => End::NobodyListens,
                    };
                }
                Some(Err(error)) => {
                    self.say(&error);
                    Ok(())
                }
                None => return End::NobodyListens,
            };
            if sent.is_err() {
                return End::NobodyListens;
            }
        }
    }

    fn say(&self, error: &watcher::Error) {
        let (kind, remedy, error) = (&self.kind, remedy(error), causes(error));
        if self.listed {
            tracing::warn!(
                kind,
                error,
                remedy,
                "watch interrupted, the last state stands; trying again"
            );
        } else {
            tracing::warn!(kind, error, remedy, "not listed yet, trying again");
        }
    }

    /// Is a list under way, or has none been completed yet? An error then is about the list, not about a watch after it.
    fn is_starting(&self) -> bool {
        self.listing.is_some() || !self.listed
    }

    /// The server does not serve this kind: there is none of it as far as anybody can tell, and nothing waits for it.
    async fn do_without(&mut self, refusal: Refusal, remedy: &str) -> Result<(), mpsc::error::SendError<Event>> {
        self.listing = None;
        if std::mem::replace(&mut self.refused, true) {
            return Ok(());
        }
        match refusal {
            Refusal::Unknown => tracing::info!(
                kind = self.kind,
                "the API server does not know this kind, going on without"
            ),
            Refusal::Forbidden => tracing::warn!(kind = self.kind, remedy, "may not be listed, going on without"),
        }
        self.events.send(Event::Change(K::list(Vec::new()))).await
    }

    async fn handle(&mut self, event: watcher::Event<K>) -> Result<(), mpsc::error::SendError<Event>> {
        match event {
            watcher::Event::Init => self.listing = Some(Vec::new()),
            watcher::Event::InitApply(object) => {
                let model = self.convert(&object).await?;
                if let Some(listing) = &mut self.listing {
                    listing.extend(model);
                }
            }
            watcher::Event::InitDone => {
                let models = self.listing.take().unwrap_or_default();
                self.listed = true;
                tracing::info!(kind = self.kind, objects = models.len(), "listed");
                if let Some(remedy) = K::REMEDY_IF_ABSENT.filter(|_| models.is_empty()) {
                    let (kind, name) = (&self.kind, self.converter.node_name());
                    tracing::warn!(
                        kind,
                        name,
                        remedy,
                        "the API server has no object of this name, going on without"
                    );
                }
                self.events.send(Event::Change(K::list(models))).await?;
            }
            watcher::Event::Apply(object) => {
                let model = self.convert(&object).await?;
                let change = K::one(object_name(&object), model, trigger_time(object.meta()));
                self.events.send(Event::Change(change)).await?;
            }
            watcher::Event::Delete(object) => {
                self.events
                    .send(Event::Change(K::one(object_name(&object), None, None)))
                    .await?;
            }
        }
        Ok(())
    }

    async fn convert(&mut self, object: &K) -> Result<Option<K::Model>, mpsc::error::SendError<Event>> {
        let model = object.convert(&object_name(object), &mut self.converter);
        for warning in self.converter.take_warnings() {
            self.events.send(Event::Warning(warning)).await?;
        }
        Ok(model)
    }
}

fn object_name<K: kube::Resource>(object: &K) -> ObjectName {
    let meta = object.meta();
    let text = |part: &Option<String>| Arc::from(part.as_deref().unwrap_or_default());
    ObjectName {
        namespace: text(&meta.namespace),
        name: text(&meta.name),
    }
}

fn remedy(error: &watcher::Error) -> &'static str {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => client::remedy(error),
        _ => "nothing, unless it goes on",
    }
}

/// Why a server does not serve a kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    Unknown,
    Forbidden,
}

impl Refusal {
    fn of(error: &watcher::Error) -> Option<Self> {
        use watcher::Error::{InitialListFailed, WatchStartFailed};
        let (InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status))) = error else {
            return None;
        };
        match status.code {
            404 => Some(Self::Unknown),
            403 => Some(Self::Forbidden),
            _ => None,
        }
    }
}

/// Does the server, rather than the way to it, say no while it streams a list? From 1.27 on, one where the feature is off says that
/// the request is invalid; one on an old etcd says so only after the stream has begun.
fn refuses_streaming(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => matches!(status.code, 400 | 422),
        watcher::Error::WatchError(status) => !matches!(status.code, 401 | 403 | 410 | 429),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn who_has_no_streaming_lists() {
        let status = |code| Box::new(Status::failure("no", "no").with_code(code));
        let start = |code| watcher::Error::WatchStartFailed(kube::Error::Api(status(code)));
        assert!(refuses_streaming(&start(422)));
        assert!(!refuses_streaming(&start(403)) && !refuses_streaming(&start(500)));
        assert!(
            refuses_streaming(&watcher::Error::WatchError(status(500))),
            "etcd without progress requests"
        );
        assert!(
            !refuses_streaming(&watcher::Error::WatchError(status(410))),
            "has to start anew"
        );
        assert!(!refuses_streaming(&watcher::Error::NoResourceVersion));
        assert_eq!(Refusal::of(&start(404)), Some(Refusal::Unknown), "before 1.33");
        assert_eq!(Refusal::of(&start(403)), Some(Refusal::Forbidden));
        assert_eq!(Refusal::of(&start(500)), None);
    }
}
