//! A stand-in for an API server, for measurements of large clusters.
//!
//! A real one with 50,000 Services needs minutes to be filled, several gigabytes, and a good part of the processors while it is read;
//! none of that is what is measured. This one serves a generated cluster ([`objects`]) from memory, as bytes that were made before,
//! over plain HTTP: lists in pages, watches with bookmarks, and streaming lists, as far as an agent and the real kube-proxy use them
//! ([`server`]). It notes when it handed out the last byte of the first lists, and changes EndpointSlices at the word of the
//! benchmark. What a real API server answers is proved by the tests with one ([`crate::apiserver`]); a benchmark that could use one should.

pub mod objects;
mod server;
mod store;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::objects::Size;
use self::store::{Kind, Store};
use crate::leftovers;
use crate::netns::Netns;

/// What a stand-in does otherwise than a real API server of today.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Refuses streaming lists, as API servers do whose feature gate WatchList is off.
    pub without_streaming_lists: bool,
}

/// A running stand-in; ended when dropped.
pub struct StandIn {
    shared: Arc<Mutex<Store>>,
    size: Size,
    dir: TempDir,
    /// Dropped without waiting for connections that watch.
    runtime: Option<tokio::runtime::Runtime>,
}

impl StandIn {
    /// Serves a cluster of this size in `netns`, at `address` and a port of the kernel's choice. `node` is the one Node.
    pub fn start(netns: &Netns, address: IpAddr, node: &str, size: Size, options: Options) -> Result<Self> {
        let listener = netns.run(|| std::net::TcpListener::bind(SocketAddr::new(address, 0)));
        let listener = listener.with_context(|| format!("listening at {address}"))?;
        listener.set_nonblocking(true)?;
        let dir = leftovers::temp_dir("standin")?;
        let server = format!("http://{}", listener.local_addr()?);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "standin", "cluster": {"server": server}}],
            "users": [{"name": "standin", "user": {}}],
            "contexts": [{"name": "standin", "context": {"cluster": "standin", "user": "standin"}}],
            "current-context": "standin",
        });
        std::fs::write(dir.path().join("kubeconfig"), config.to_string())?;
        let shared = Arc::new(Mutex::new(Store::new(node, size)));
        // One thread: who is measured has the rest of the machine.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        runtime.spawn(server::serve(listener, shared.clone(), options));
        Ok(Self {
            shared,
            size,
            dir,
            runtime: Some(runtime),
        })
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Its folder, which goes with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The cluster's size.
    pub fn size(&self) -> Size {
        self.size
    }

    /// When the last byte of the first list of every kind was handed out, if all have been asked for.
    pub fn listed_at(&self) -> Option<Instant> {
        self.store().listed_at()
    }

    /// Forgets who has been given a list, before another client starts.
    pub fn forget_lists(&self) {
        self.store().forget_lists();
    }

    /// Events that clients have sent, as JSON.
    pub fn events(&self) -> Vec<String> {
        self.store().events.clone()
    }

    /// Gives the EndpointSlice of a Service these endpoints, and tells whoever watches; gives the moment just before that.
    pub fn set_endpoints(&self, service: u32, addresses: &[Ipv4Addr]) -> Instant {
        let mut store = self.store();
        let version = store.next_version();
        let slice = objects::slice(service, addresses.iter().copied(), version);
        store.replace(Kind::EndpointSlice, service as usize, slice)
    }

    /// Adds a Service, an EndpointSlice or a Node, and tells whoever watches. Generated objects are counted from the first one on, so
    /// [`StandIn::set_endpoints`] is for stand-ins without added ones.
    pub fn add(&self, object: &Value) {
        let mut object = object.clone();
        let kind = Kind::named(object["kind"].as_str().unwrap_or_default()).expect("a kind that is served");
        let mut store = self.store();
        object["metadata"]["resourceVersion"] = json!(store.next_version().to_string());
        // As in a list, these are not repeated.
        for field in ["kind", "apiVersion"] {
            object.as_object_mut().map(|fields| fields.remove(field));
        }
        store.add(kind, object.to_string());
    }

    /// Adds generated Services, each with its EndpointSlice of as many endpoints as the stand-in began with, up to this number.
    pub fn grow(&mut self, services: u32) {
        let numbers = self.size.services..services;
        self.size.services = self.size.services.max(services);
        for number in numbers {
            let mut store = self.store();
            let version = store.next_version();
            let addresses = (0..self.size.endpoints).map(|endpoint| objects::endpoint_ip(self.size, number, endpoint));
            let (service, slice) = (
                objects::service(number, version),
                objects::slice(number, addresses, version),
            );
            store.add(Kind::Service, service);
            store.add(Kind::EndpointSlice, slice);
        }
    }

    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.shared.lock().expect("nothing panics while holding it")
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests;
