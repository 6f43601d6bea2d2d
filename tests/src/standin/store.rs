//! What a stand-in holds: every object as text, who watches, and what has been changed.
//!
//! What must stay true: a change is put into the objects, into the history and before every watcher under one lock, so nobody misses
//! one between a list and the watch that follows it.

use std::time::Instant;

use axum::body::Bytes;
use tokio::sync::mpsc;

use super::objects::{self, FIRST_VERSION, Size};

/// What is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// How an object that stands for itself begins.
    pub(super) fn head(self) -> String {
        format!(r#"{{"kind":"{}","apiVersion":"{}","#, self.name(), self.api_version())
    }

    /// An object as an event of a watch, one line.
    pub(super) fn event(self, what: &str, object: &str) -> String {
        let fields = object.strip_prefix('{').unwrap_or(object);
        format!("{{\"type\":\"{what}\",\"object\":{}{fields}}}\n", self.head())
    }
}

/// Objects of one kind.
#[derive(Default)]
pub(super) struct Objects {
    pub(super) objects: Vec<Bytes>,
    watchers: Vec<mpsc::UnboundedSender<Bytes>>,
    /// Events since the start, by version.
    history: Vec<(u64, Bytes)>,
    listed: Option<Instant>,
}

/// Everything.
pub(super) struct Store {
    kinds: [Objects; 4],
    pub(super) version: u64,
    pub(super) events: Vec<String>,
}

impl Store {
    pub(super) fn new(node: &str, size: Size) -> Self {
        let version = FIRST_VERSION;
        let slice = |number: u32| {
            let addresses = (0..size.endpoints).map(|endpoint| objects::endpoint_ip(size, number, endpoint));
            objects::slice(number, addresses, version)
        };
        let all = |objects: Vec<String>| Objects {
            objects: objects.into_iter().map(Bytes::from).collect(),
            ..Objects::default()
        };
        Self {
            kinds: [
                all((0..size.services)
                    .map(|number| objects::service(number, version))
                    .collect()),
                all((0..size.services).map(slice).collect()),
                all(vec![objects::node(node, version)]),
                all(vec![objects::service_cidr(version)]),
            ],
            version,
            events: Vec::new(),
        }
    }

    pub(super) fn of(&mut self, kind: Kind) -> &mut Objects {
        &mut self.kinds[kind as usize]
    }

    pub(super) fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// An object has become this one, which carries the current version.
    pub(super) fn replace(&mut self, kind: Kind, index: usize, object: String) -> Instant {
        let version = self.version;
        let event = Bytes::from(kind.event("MODIFIED", &object));
        let objects = self.of(kind);
        objects.objects[index] = object.into();
        objects.history.push((version, event.clone()));
        let now = Instant::now();
        objects.watchers.retain(|watcher| watcher.send(event.clone()).is_ok());
        now
    }

    /// An object that is new; it carries the current version.
    pub(super) fn add(&mut self, kind: Kind, object: String) {
        let version = self.version;
        let event = Bytes::from(kind.event("ADDED", &object));
        let objects = self.of(kind);
        objects.objects.push(object.into());
        objects.history.push((version, event.clone()));
        objects.watchers.retain(|watcher| watcher.send(event.clone()).is_ok());
    }

    /// What happens to a kind from now on, and what happened since a version.
    pub(super) fn follow(&mut self, kind: Kind, since: u64) -> mpsc::UnboundedReceiver<Bytes> {
        let (events, receiver) = mpsc::unbounded_channel();
        let objects = self.of(kind);
        for (_, event) in objects.history.iter().filter(|(version, _)| *version > since) {
            // Its receiver is right here.
            let _ = events.send(event.clone());
        }
        objects.watchers.push(events);
        receiver
    }

    /// The last byte of a list has been handed out.
    pub(super) fn listed(&mut self, kind: Kind) {
        self.of(kind).listed.get_or_insert_with(Instant::now);
    }

    pub(super) fn listed_at(&self) -> Option<Instant> {
        let times: Option<Vec<Instant>> = Kind::ALL.iter().map(|kind| self.kinds[*kind as usize].listed).collect();
        times?.into_iter().max()
    }

    pub(super) fn forget_lists(&mut self) {
        self.kinds.iter_mut().for_each(|objects| objects.listed = None);
    }
}
