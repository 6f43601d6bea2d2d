//! The real agent against a real kube-apiserver and etcd: objects written with kubectl become traffic, change it and end it; the
//! server goes away and comes back; the agent is killed and comes back; objects made to hurt do not.
//!
//! One network, one API server and one agent for all tests of this file, which take turns with it. Each test has service names and
//! addresses of its own and leaves agent and server running.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with its context")]

#[path = "apiserver/cluster.rs"]
mod cluster;
#[path = "apiserver/deploy.rs"]
mod deploy;
#[path = "apiserver/health_check.rs"]
mod health_check;
#[path = "apiserver/hurt.rs"]
mod hurt;
#[path = "apiserver/networks.rs"]
mod networks;
#[path = "apiserver/node.rs"]
mod node;
#[path = "apiserver/objects.rs"]
mod objects;
#[path = "apiserver/outage.rs"]
mod outage;
#[path = "apiserver/prerequisites.rs"]
mod prerequisites;
