//! What users apply is what the API server accepts, and it gives the agent the rights it needs and no more. That they suffice is
//! shown by all other tests of this file too: their agent has nothing else.

use proxy_tests::apiserver::AGENT_USER;
use proxy_tests::helm::{deploy, render};
use proxy_tests::manifests;

use crate::cluster::{Cluster, repository, turn};

#[test]
fn the_manifest_is_accepted() {
    let cluster = turn();
    let manifest = repository("deploy/proxy-agent.yaml");
    let manifest = manifest.to_str().unwrap();
    let strictly = ["apply", "--validate=strict", "--dry-run=server", "-f", manifest];
    cluster.api.kubectl(&strictly).unwrap();
    cluster
        .api
        .kubectl(&[&strictly[..], &["--server-side", "--force-conflicts"]].concat())
        .unwrap();
}

/// Makes the kinds of prometheus-operator known.
fn have_operator(cluster: &Cluster) {
    let kinds = repository("tests/tests/apiserver/operator.yaml");
    cluster.api.kubectl(&["apply", "-f", kinds.to_str().unwrap()]).unwrap();
    let established = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
    cluster.api.kubectl(&established).unwrap();
}

/// The chart with its defaults, privileged, and with every value set: fields that do not exist and values that are not allowed, such
/// as a propagation that only privileged containers may have, are errors. The objects have names of their own, so that none is taken
/// for a change of what the cluster has already.
#[test]
fn what_the_chart_makes_is_accepted() {
    let cluster = turn();
    have_operator(&cluster);
    let everything = deploy("chart/tests/everything.yaml");
    for args in [&[][..], &["--set", "privileged=true"], &["--values", &everything]] {
        let objects = render(&[args, &["--set", "nameOverride=of-the-chart"]].concat()).unwrap();
        for extra in [&[][..], &["--server-side", "--force-conflicts"]] {
            let strictly = [&["apply", "--validate=strict", "--dry-run=server", "-f", "-"], extra].concat();
            cluster
                .api
                .kubectl_with_input(&strictly, &objects)
                .unwrap_or_else(|error| panic!("{args:?}: {error:#}"));
        }
    }
}

/// S14: every verb that is needed, and none that harms.
#[test]
fn the_account_may_do_what_the_agent_does_and_no_more() {
    let cluster = turn();
    let may = |verb: &str, what: &str| {
        let args = ["auth", "can-i", verb, what, "--as", AGENT_USER, "--all-namespaces"];
        cluster.api.kubectl(&args).is_ok()
    };
    for (verbs, what) in [
        (&["get", "list", "watch"][..], "nodes"),
        (&["list", "watch"], "services"),
        (&["list", "watch"], "endpointslices.discovery.k8s.io"),
        (&["list", "watch"], "servicecidrs.networking.k8s.io"),
        (&["create", "patch"], "events.events.k8s.io"),
    ] {
        for verb in verbs {
            assert!(may(verb, what), "{verb} {what}");
        }
    }
    for (verb, what) in [
        ("list", "secrets"),
        ("list", "pods"),
        ("update", "services"),
        ("patch", "nodes"),
        ("delete", "endpointslices.discovery.k8s.io"),
        ("list", "events.events.k8s.io"),
        ("delete", "events.events.k8s.io"),
        ("create", "events"),
        ("create", "servicecidrs.networking.k8s.io"),
    ] {
        assert!(!may(verb, what), "{verb} {what} is nothing the agent needs");
    }
}

/// S14: those that keep their sockets to themselves, in no other case.
#[test]
fn pods_are_read_where_their_sockets_are_translated() {
    let cluster = turn();
    for (socket_lb, allowed) in [("host", false), ("all", true)] {
        let name = format!("with-{socket_lb}");
        let value = format!("datapath.socketLB={socket_lb},nameOverride={name}");
        let objects = manifests::documents(&render(&["--set", &value]).unwrap()).unwrap();
        let mut rights = objects;
        rights.retain(|object| object["kind"] != "DaemonSet");
        cluster.api.apply(&rights).unwrap();
        let user = format!("system:serviceaccount:kube-system:{name}");
        let may = |verb: &str, what: &str| {
            let args = ["auth", "can-i", verb, what, "--as", &user, "--all-namespaces"];
            cluster.api.kubectl(&args).is_ok()
        };
        assert!(may("list", "services"), "the account is {user}");
        for verb in ["list", "watch"] {
            assert_eq!(may(verb, "pods"), allowed, "{verb}, --socket-lb {socket_lb}");
        }
        for verb in ["get", "patch", "delete"] {
            assert!(!may(verb, "pods"), "{verb} is nothing the agent needs");
        }
        for kind in ["clusterrolebinding", "clusterrole"] {
            cluster.api.kubectl(&["delete", kind, &name]).unwrap();
        }
        cluster
            .api
            .kubectl(&["-n", "kube-system", "delete", "serviceaccount", &name])
            .unwrap();
    }
}
