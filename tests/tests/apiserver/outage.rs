//! The API server goes away, the agent goes away, or both; traffic does not notice, and what changed meanwhile is made good.

use std::time::Duration;

use proxy_tests::echo::Held;
use proxy_tests::manifests;
use proxy_tests::process;
use serde_json::Value;

use crate::cluster::{ALPHA, BETA, CLIENT, HTTP, assert_undisturbed, set_rules, turn, vip};

/// What an agent without a complete list is given to do wrong.
const TEMPTATION: Duration = Duration::from_secs(1);

/// S161: the last state stands without a server; changes of the time when the watch was down arrive afterwards.
#[test]
fn the_api_server_goes_and_comes_back() {
    let mut cluster = turn();
    let (stays, changes, goes) = (vip(10), vip(11), vip(12));
    cluster.publish("stays", stays, &[ALPHA]);
    cluster.publish("changes", changes, &[ALPHA]);
    cluster.publish("goes", goes, &[ALPHA]);
    let running = cluster.traffic(stays);
    let said = cluster.agent.log().len();
    cluster.api.stop();
    cluster.wait_for_log(said, "watch interrupted");
    for vip in [stays, changes, goes] {
        cluster.assert_answered_by(vip, &[ALPHA]);
    }
    cluster.api.launch().unwrap();
    // Changed while the agent waits between two tries, most likely; it arrives whether or not.
    cluster.api.apply(&[cluster.slice("changes", &[BETA])]).unwrap();
    cluster
        .api
        .kubectl(&["delete", "service/goes", "endpointslice/goes-1"])
        .unwrap();
    cluster.wait_for_pods(changes, &[BETA]);
    cluster.wait_for(goes, None);
    cluster.assert_answered_by(changes, &[BETA]);
    assert_undisturbed(running);
    cluster.unpublish("stays", stays);
    cluster.unpublish("changes", changes);
}

/// S161: a server whose machine goes without a word, as when power or a network fails: nothing comes over the watches' connections
/// any more, not even their end. The agent finds out by itself.
#[test]
fn the_api_server_vanishes_without_a_word() {
    let mut cluster = turn();
    let vip = vip(19);
    cluster.publish("silence", vip, &[ALPHA]);
    let running = cluster.traffic(vip);
    // The kernel forgets connections of dead processes after the first try to say so.
    cluster.api.netns().sysctl("net/ipv4/tcp_orphan_retries", "1").unwrap();
    cluster.api.netns().ip("link set node1 down").unwrap();
    cluster.api.stop();
    cluster.api.launch().unwrap();
    cluster.api.apply(&[cluster.slice("silence", &[BETA])]).unwrap();
    cluster.api.netns().ip("link set node1 up").unwrap();
    cluster.wait_for_pods(vip, &[BETA]);
    cluster.assert_answered_by(vip, &[BETA]);
    assert_undisturbed(running);
    cluster.unpublish("silence", vip);
}

/// S155, S169: killed without warning and started again while connections are made and one is held.
#[test]
fn the_agent_is_killed_and_comes_back() {
    let mut cluster = turn();
    let (stays, goes) = (vip(13), vip(14));
    cluster.publish("kept", stays, &[ALPHA, BETA]);
    cluster.publish("lost", goes, &[ALPHA]);
    let running = cluster.traffic(stays);
    let mut held = cluster.pod(CLIENT).run(|| Held::open(stays)).unwrap();
    for round in 0..2 {
        cluster.agent.kill();
        assert!(running.wait_for(100, Duration::from_secs(10)), "without an agent");
        if round == 0 {
            // Deleted behind its back: stands until the next agent has seen everything.
            cluster
                .api
                .kubectl(&["delete", "service/lost", "endpointslice/lost-1"])
                .unwrap();
            cluster.assert_answered_by(goes, &[ALPHA]);
        }
        cluster.agent.launch().unwrap();
        cluster.wait_for(goes, None);
        cluster.wait_for_pods(stays, &[ALPHA, BETA]);
        assert!(running.wait_for(100, Duration::from_secs(10)), "with a new agent");
    }
    cluster.request(goes).unwrap_err();
    assert_undisturbed(running);
    cluster.pod(CLIENT).run(|| held.ask()).unwrap();
    // What the new agent adopted it can still change and delete.
    cluster.api.apply(&[cluster.slice("kept", &[BETA])]).unwrap();
    cluster.wait_for_pods(stays, &[BETA]);
    cluster.unpublish("kept", stays);
}

/// S160: as long as one kind has not been listed, everything stays as a former agent left it, even what is known to be gone.
#[test]
fn nothing_is_removed_before_every_kind_is_listed() {
    let mut cluster = turn();
    let (stays, goes) = (vip(15), vip(16));
    cluster.publish("here", stays, &[ALPHA]);
    cluster.publish("gone", goes, &[ALPHA]);
    let running = cluster.traffic(stays);
    cluster.agent.kill();
    cluster
        .api
        .kubectl(&["delete", "service/gone", "endpointslice/gone-1"])
        .unwrap();
    // Slices may not be listed any more; everything else may.
    let rules = cluster
        .api
        .kubectl(&["get", "clusterrole/proxy-agent", "-o", "jsonpath={.rules}"])
        .unwrap();
    let rules: Vec<Value> = serde_json::from_str(&rules).unwrap();
    let of_slices = |rule: &Value| rule["resources"][0] == "endpointslices";
    let fewer: Vec<Value> = rules.iter().filter(|rule| !of_slices(rule)).cloned().collect();
    assert!(fewer.len() < rules.len());
    set_rules(&cluster, &fewer);
    let may = ["auth", "can-i", "list", "endpointslices.discovery.k8s.io"];
    let may = [
        &may[..],
        &["--as", proxy_tests::apiserver::AGENT_USER, "--all-namespaces"],
    ]
    .concat();
    process::wait_until(Duration::from_secs(10), || {
        cluster.api.kubectl(&may).is_err().then_some(())
    })
    .expect("the server forgets the right to list slices");
    let said = cluster.agent.log().len();
    cluster.agent.launch_only().unwrap();
    cluster.wait_for_log(said, "listed kind=\"Service\"");
    cluster.wait_for_log(said, "maps opened");
    cluster.wait_for_log(said, "not listed yet, trying again kind=\"EndpointSlice\"");
    cluster.wait_for_log(said, "allow list and watch in the ClusterRole");
    std::thread::sleep(TEMPTATION);
    assert!(
        cluster.agent.healthz("/readyz").is_err(),
        "ready without having listed slices"
    );
    for vip in [stays, goes] {
        cluster.wait_for_pods(vip, &[ALPHA]);
        cluster.assert_answered_by(vip, &[ALPHA]);
    }
    set_rules(&cluster, &rules);
    cluster.wait_for(goes, None);
    // A moment after the maps.
    process::wait_until(Duration::from_secs(5), || cluster.agent.healthz("/readyz").ok()).expect("ready");
    assert_undisturbed(running);
    cluster.unpublish("here", stays);
}

/// S160, S161: an agent that starts without a server leaves everything alone until it has one.
#[test]
fn an_agent_starts_without_a_server() {
    let mut cluster = turn();
    let (stays, goes) = (vip(17), vip(18));
    cluster.publish("still", stays, &[ALPHA]);
    cluster.publish("late", goes, &[ALPHA]);
    let running = cluster.traffic(stays);
    cluster.agent.kill();
    cluster
        .api
        .kubectl(&["delete", "service/late", "endpointslice/late-1"])
        .unwrap();
    cluster.api.stop();
    let said = cluster.agent.log().len();
    cluster.agent.launch_only().unwrap();
    cluster.wait_for_log(said, "maps opened");
    cluster.wait_for_log(said, "not listed yet, trying again");
    cluster.wait_for_log(said, "is reachable without this proxy");
    // As long as there is something to try again, the kubelet has no reason to end it.
    cluster.agent.healthz("/livez").unwrap();
    std::thread::sleep(TEMPTATION);
    assert!(cluster.agent.is_running());
    for vip in [stays, goes] {
        cluster.assert_answered_by(vip, &[ALPHA]);
    }
    cluster.api.launch().unwrap();
    cluster.wait_for(goes, None);
    cluster
        .api
        .apply(&[manifests::service("late", &[&goes.ip().to_string()], &[HTTP])])
        .unwrap();
    cluster.wait_for(goes, Some(&[]));
    assert_undisturbed(running);
    cluster.api.kubectl(&["delete", "service/late"]).unwrap();
    cluster.unpublish("still", stays);
}
