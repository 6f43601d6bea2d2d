//! What a real client sees of a stand-in.

use std::pin::pin;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config};

use super::*;

const SIZE: Size = Size {
    services: 25,
    endpoints: 3,
};

fn with_client<F: Future<Output = ()>>(options: Options, body: impl Fn(Arc<StandIn>, Client) -> F + Send + Sync) {
    let netns = Netns::new("standin").unwrap();
    let standin = StandIn::start(&netns, Ipv4Addr::LOCALHOST.into(), "node1", SIZE, options).unwrap();
    let standin = Arc::new(standin);
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(standin.kubeconfig()).unwrap();
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
            let client = Client::try_from(config.unwrap()).unwrap();
            body(standin.clone(), client).await;
        });
    });
}

#[test]
fn lists_come_in_pages() {
    with_client(Options::default(), |standin, client| async move {
        let services: Api<Service> = Api::all(client.clone());
        let mut names = Vec::new();
        let mut parameters = ListParams::default().limit(10);
        loop {
            let page = services.list(&parameters).await.unwrap();
            names.extend(page.items.into_iter().filter_map(|service| service.metadata.name));
            assert_eq!(standin.listed_at(), None);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters = parameters.continue_token(&token),
                None => break,
            }
        }
        assert_eq!(names.len(), SIZE.services as usize);
        let slices = Api::<EndpointSlice>::all(client.clone())
            .list(&ListParams::default())
            .await
            .unwrap();
        assert!(
            slices
                .items
                .iter()
                .all(|slice| slice.endpoints.as_ref().map_or(0, Vec::len) == SIZE.endpoints as usize)
        );
        let other = ListParams::default().fields("metadata.name=other");
        let nodes = Api::<Node>::all(client.clone());
        assert!(nodes.list(&other).await.unwrap().items.is_empty());
        assert!(nodes.get("node1").await.is_ok());
        Api::<ServiceCIDR>::all(client)
            .list(&ListParams::default())
            .await
            .unwrap();
        assert!(standin.listed_at().is_some(), "every kind has been listed");
    });
}

/// The watch of the agent and of kube-proxy, which begins with a streaming list, and one without.
#[test]
fn a_watch_sees_the_list_and_every_change() {
    for streaming in [true, false] {
        with_client(Options::default(), |standin, client| async move {
            let config = watcher::Config::default();
            let config = if streaming { config.streaming_lists() } else { config };
            let mut events = pin!(watcher(Api::<EndpointSlice>::all(client), config));
            let mut listed = 0;
            loop {
                match events.next().await.unwrap().unwrap() {
                    Event::Init => {}
                    Event::InitApply(_) => listed += 1,
                    Event::InitDone => break,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(listed, SIZE.services, "streaming: {streaming}");
            let address = Ipv4Addr::new(10, 1, 2, 3);
            standin.set_endpoints(7, &[address]);
            let Event::Apply(slice) = events.next().await.unwrap().unwrap() else {
                panic!("not a change")
            };
            assert_eq!(slice.endpoints.unwrap()[0].addresses, [address.to_string()]);
            assert_eq!(slice.metadata.labels.unwrap()["kubernetes.io/service-name"], name(7).1);
        });
    }
}

#[test]
fn a_server_without_streaming_lists_says_so() {
    let options = Options {
        without_streaming_lists: true,
    };
    with_client(options, |_, client| async move {
        let config = watcher::Config::default().streaming_lists();
        let mut events = pin!(watcher(Api::<Service>::all(client), config));
        loop {
            match events.next().await.unwrap() {
                Ok(Event::Init) => {}
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) => return assert_eq!(status.code, 422),
                other => panic!("{other:?}"),
            }
        }
    });
}

fn name(service: u32) -> (String, String) {
    objects::name(service)
}
