//! What only the kernel can prove: XDP links are made, adopted, replaced, repaired and removed, and `LINKS` says where they are.

use proxy_common::link::LINK_XDP;

use super::*;
use crate::datapath::kernel_tests::{assert_ok, in_namespace, index, network, run};
use crate::datapath::options::{AttachMode, InterfaceFilter};
use crate::datapath::{Datapath, Options, Pins, REPAIR_INTERVAL, cleanup};

fn with_xdp(mut options: Options, interfaces: &str, mode: XdpMode) -> Options {
    options.xdp = XdpOptions {
        interfaces: Some(InterfaceFilter::new(Some(interfaces), None).unwrap()),
        mode,
    };
    options
}

/// The interface's mark in `ip`, such as `xdp` or `xdpgeneric`.
fn mark(interface: &str) -> Option<String> {
    let shown = run("ip", &format!("-o link show {interface}"));
    shown
        .split_whitespace()
        .find(|word| word.starts_with("xdp"))
        .map(str::to_owned)
}

fn is_marked(datapath: &Datapath, interface: &str) -> bool {
    let link = datapath.tables.links.get(&index(interface)).unwrap();
    link.is_some_and(|link| link.flags & LINK_XDP != 0)
}

fn link_id(pin: &Path) -> String {
    let shown = run("bpftool", &format!("link show pinned {}", pin.display()));
    shown.split(':').next().unwrap().to_owned()
}

/// S164: adopted by the next agent in the same link, attached again where somebody took it away, and gone with the option or `cleanup`.
#[test]
fn links_are_adopted_repaired_and_removed() {
    in_namespace(|bed| {
        let options = with_xdp(bed.options(AttachMode::Auto), "left", XdpMode::Auto);
        let links = Pins::new(&bed.bpf_dir).links;
        let path = pin(&links, index("left"));
        let mut first = Datapath::open(options.clone()).unwrap();
        assert_ok(&first.set_network(&network()));
        assert_eq!(mark("left").as_deref(), Some("xdp"));
        assert!(is_marked(&first, "left"));
        assert_eq!(first.stats().programs_at_xdp, (1, "native"));
        let link = link_id(&path);
        let program = sys::link_program(sys::open_pin(&path).unwrap().as_fd()).unwrap();
        drop(first);

        let mut second = Datapath::open(options).unwrap();
        assert!(is_marked(&second, "left"), "while nothing is attached yet");
        let report = second.set_network(&network());
        assert_ok(&report);
        assert_eq!((report.written, report.deleted), (0, 0));
        assert_eq!(link_id(&path), link);
        assert_ne!(
            sys::link_program(sys::open_pin(&path).unwrap().as_fd()).unwrap(),
            program
        );
        sys::detach_link(sys::open_pin(&path).unwrap().as_fd()).unwrap();
        assert_eq!(mark("left"), None);
        second.repaired -= REPAIR_INTERVAL;
        second.tick();
        assert_eq!(mark("left").as_deref(), Some("xdp"));
        fs::remove_file(&path).unwrap();
        second.repaired -= REPAIR_INTERVAL;
        second.tick();
        assert!(path.exists());
        drop(second);

        let mut third = Datapath::open(bed.options(AttachMode::Auto)).unwrap();
        assert_ok(&third.set_network(&network()));
        assert_eq!(mark("left"), None);
        assert!(!is_marked(&third, "left") && !path.exists());
        drop(third);
        let options = with_xdp(bed.options(AttachMode::Auto), "left", XdpMode::Native);
        assert_ok(&Datapath::open(options).unwrap().set_network(&network()));
        assert_eq!(mark("left").as_deref(), Some("xdp"));
        cleanup(&bed.bpf_dir, None).unwrap();
        assert_eq!(mark("left"), None);
    });
}

/// A bridge has no XDP in its driver: `auto` does without, `native` reports it, `generic` works behind it.
#[test]
fn modes_of_an_interface_without_xdp() {
    in_namespace(|bed| {
        run("ip", "link add bridge type bridge");
        let mut network = network();
        let info = LinkInfo {
            name: "bridge".to_owned(),
            has_ethernet: true,
            ..LinkInfo::default()
        };
        network.links.insert(index("bridge"), info);
        for (mode, expected, failures) in [
            (XdpMode::Auto, None, 0),
            (XdpMode::Native, None, 1),
            (XdpMode::Generic, Some("xdpgeneric"), 0),
        ] {
            let mut datapath = Datapath::open(with_xdp(bed.options(AttachMode::Auto), "bridge", mode)).unwrap();
            let report = datapath.set_network(&network);
            assert_eq!(report.failed.len(), failures, "{mode:?}: {:?}", report.failed);
            assert_eq!(mark("bridge").as_deref(), expected, "{mode:?}");
            assert_eq!(is_marked(&datapath, "bridge"), expected.is_some());
        }
    });
}

/// Another mode than the link's makes a new link; netlink says which it is.
#[test]
fn a_link_moves_into_the_driver() {
    in_namespace(|bed| {
        let open = |mode, network: &Network| {
            let mut datapath = Datapath::open(with_xdp(bed.options(AttachMode::Auto), "left", mode)).unwrap();
            assert_ok(&datapath.set_network(network));
            mark("left")
        };
        let mut network = network();
        assert_eq!(open(XdpMode::Generic, &network).as_deref(), Some("xdpgeneric"));
        let generic = true;
        network.links.get_mut(&index("left")).unwrap().xdp = Some(crate::netlink::XdpProgram { id: 1, generic });
        assert_eq!(open(XdpMode::Auto, &network).as_deref(), Some("xdp"));
    });
}

#[test]
fn pins_are_told_from_others() {
    assert_eq!(interface_of(Path::new("/x/12-xdp")), Some(12));
    assert_eq!(interface_of(Path::new("/x/12-ingress")), None);
    assert_eq!(interface_of(&pin(Path::new("/x"), 7)), Some(7));
}
