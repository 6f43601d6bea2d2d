//! Constant load while everything changes: 200 new connections a second and 100 held ones, from a pod, a node and outside, over
//! every kind of address and both families. Each kind of change is one step; none fails a connection that it must not fail.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

#[path = "netns_load/objects.rs"]
mod objects;
#[path = "netns_load/site.rs"]
mod site;
#[path = "netns_load/steps.rs"]
mod steps;

use site::Site;

/// S32, S42, S62, S63, S97, S136, S141, S145, S147, S155, S165, S167, S169: no change of endpoints, addresses or policies, no
/// restart of an agent and no rolling restart of all backends fails a connection.
#[test]
fn no_change_under_constant_load_fails_a_connection() {
    let mut site = Site::new();
    steps::endpoints(&mut site);
    steps::policies(&mut site);
    steps::addresses(&mut site);
    steps::service_types(&mut site);
    steps::synchronisation(&mut site);
    steps::restarts(&mut site);
    steps::rolling_restart(&mut site);
    site.finish();
}
