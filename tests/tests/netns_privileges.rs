//! The agent gets by with the capabilities that its DaemonSet asks for, on a read-only root file system and without the right to
//! gain any; and says which one is missing. The capabilities are read from the manifest, so that it cannot say something else.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::path::Path;

use proxy_tests::attached;
use proxy_tests::echo::REQUESTS;
use proxy_tests::manifests;
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{Setup, World, answered_by, names, vips};

fn documented() -> Vec<String> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/proxy-agent.yaml");
    let documents = manifests::documents(&std::fs::read_to_string(manifest).unwrap()).unwrap();
    let pods = documents.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let context = &pods["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["readOnlyRootFilesystem"], true);
    serde_json::from_value(context["capabilities"]["add"].clone()).unwrap()
}

/// A node with an agent that is not running yet and a pod that serves and asks.
fn world(options: &[&'static str]) -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 2,
        ..Default::default()
    };
    let mut options = options.to_vec();
    options.extend(["--cluster-cidr", CLUSTER_CIDR]);
    World::new(&Setup {
        shape,
        options,
        without_agents: true,
    })
    .unwrap()
}

/// Start, traffic of pods and of the host, adoption by the next agent, the commands that look, and removal.
fn everything_works(options: &[&'static str], at_xdp: &[&str]) {
    let mut world = world(options);
    world.start_agents_with(|agent| agent.confine(&documented())).unwrap();
    world.publish(&["pod1-2"]).unwrap();
    let served = |world: &World| {
        for vip in vips() {
            for (what, request) in REQUESTS {
                let pod = || answered_by(1, &format!("{what} to {vip}"), || request(vip));
                assert_eq!(world.topology.pod(0, 0).run(pod), names(&["pod1-2"]));
                assert_eq!(world.agents[0].run(pod), names(&["pod1-2"]), "a process of the host");
            }
        }
    };
    served(&world);
    world.agents[0].stop();
    world.agents[0].launch().unwrap();
    served(&world);
    assert_eq!(attached::xdp(world.agents[0].netns()).unwrap(), at_xdp);
    let listed = world.agents[0].command(&["service", "list"]).unwrap();
    assert!(listed.contains("10.96.0.10"), "{listed}");
    world.agents[0].stop();
    let removed = world.agents[0].command(&["cleanup"]).unwrap();
    assert!(!removed.starts_with("removed 0 links, 0 filters"), "{removed}");
    assert!(attached::xdp(world.agents[0].netns()).unwrap().is_empty());
}

#[test]
fn the_documented_capabilities_are_enough() {
    let options = [
        "--socket-lb",
        "all",
        "--bpf-log-level",
        "debug",
        "--xdp-interfaces",
        "eth0",
    ];
    everything_works(&options, &["eth0 native xdp_forward"]);
}

#[test]
fn the_documented_capabilities_are_enough_for_classic_filters() {
    everything_works(&["--attach", "classic"], &[]);
}

#[test]
fn a_capability_that_is_missing_is_named() {
    let documented = documented();
    for missing in &documented {
        let mut world = world(&[]);
        let kept: Vec<String> = documented.iter().filter(|name| *name != missing).cloned().collect();
        let error = world.start_agents_with(|agent| agent.confine(&kept)).unwrap_err();
        let said = format!("{error:#}");
        let sentence = format!("the capability CAP_{missing} is missing: give it to the agent");
        assert!(said.contains(&sentence), "without {missing} it said {said}");
    }
}
