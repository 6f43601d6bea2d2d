//! What the tests need and share: packets built from scratch, namespaces as nodes and pods, echo servers and clients, the real
//! agent, a real API server, and statistics. Used by the tests beside it, by the benchmarks and by the demo.
//!
//! Everything a helper makes (namespace, link, mount, cgroup, process, folder) is removed when its guard is dropped, also on a
//! panic; leftovers of a killed run are removed at the next start.

pub mod agent;
pub mod apiserver;
pub mod attached;
pub mod cards;
pub mod cgroup;
pub mod confine;
pub mod echo;
pub mod firewall;
pub mod helm;
pub mod http;
pub mod kube_proxy;
pub mod kubernetes;
pub mod leftovers;
pub mod load;
pub mod manifests;
pub mod maps;
pub mod monitoring;
pub mod netns;
pub mod process;
pub mod programs;
pub mod prometheus;
pub mod reference;
pub mod results;
pub mod service;
pub mod shared;
pub mod sniff;
pub mod sockets;
pub mod standin;
pub mod stats;
pub mod topology;
pub mod traffic;
pub mod wire;
pub mod world;
pub mod xdp;
