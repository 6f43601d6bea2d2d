//! The node agent: watches Services, EndpointSlices, its own Node and ServiceCIDRs, plans what the kernel should hold, and keeps the BPF maps
//! in step with that plan.
//!
//! Data flows one way: `source` (an API server or a folder of manifests) → `model` (our own types and the cluster state) →
//! `plan` (a pure function) → `datapath` (the only module that writes maps). `netlink` reports interfaces and addresses, `run`
//! wires the tasks together, `inspect` reads pinned maps for people. `model` and `plan` know nothing of kube, aya or tokio.

pub mod cli;
pub mod config;
mod configz;
pub mod datapath;
pub mod doctor;
mod dry_run;
mod duration;
pub mod gates;
pub mod health;
mod heap;
pub mod inspect;
pub mod metrics;
pub mod migrate;
pub mod model;
mod netfilter;
pub mod netlink;
pub mod plan;
pub mod run;
mod server;
pub mod source;
pub mod verify;
