//! What only the kernel can prove of [`super`]: maps and links of another version are taken over, wherever a start ended halfway.
//! The other version is this one under another number, with other layouts where a test says so. Needs root.

use std::fs;
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use aya_obj::generated::bpf_map_type;
use proxy_common::addr::{Addr4, Port};
use proxy_common::frontend::{FRONTEND_SOURCE_RANGES, FrontendKey};
use proxy_common::settings::{MODE_HOLD, MODE_SERVE, Settings};
use serde_json::{Value, json};

use super::*;
use crate::datapath::kernel_tests::{Bed, assert_ok, in_namespace, index, network, run, service};
use crate::datapath::tables::FamilyTables;
use crate::datapath::{AttachMode, Datapath, InterfaceFilter};
use crate::plan::{ServicePortName, ServicePortPlan};

const OTHER: u32 = 7;
/// Counters of a service port that does not exist.
const SLOT: u32 = 5;
/// The service that [`service`] describes.
const KEY: FrontendKey<Addr4> = FrontendKey::new(Addr4([10, 96, 0, 10]), Port::new(53), 17);

/// The usual service, for some clients only.
fn wanted() -> (ServicePortName, Option<ServicePortPlan>) {
    let (name, mut plan) = service();
    plan.v4.frontends[0].flags |= FRONTEND_SOURCE_RANGES;
    plan.v4.source_ranges = vec![(Addr4([10, 0, 0, 0]), 8)];
    (name, Some(plan))
}

/// An agent of the other version ran and ended.
fn leave(bed: &Bed, mode: AttachMode) -> PathBuf {
    let mut datapath = Datapath::open(bed.options(mode)).unwrap();
    assert_ok(&datapath.apply(vec![wanted()]));
    assert_ok(&datapath.set_network(&network()));
    drop(datapath);
    let [own, other] = [names::LAYOUT_VERSION, OTHER].map(|number| root(bed, number, State::Complete));
    fs::rename(own, &other).unwrap();
    other
}

fn root(bed: &Bed, number: u32, state: State) -> PathBuf {
    Version::new(&bed.bpf_dir, number, state).pins.root
}

/// The directories, and what runs where: link by link.
fn found(bed: &Bed) -> (Vec<String>, Vec<(String, u32)>) {
    let mut names: Vec<String> = versions(&bed.bpf_dir).unwrap().iter().map(Version::name).collect();
    names.sort();
    let mut links = Vec::new();
    for version in versions(&bed.bpf_dir).unwrap() {
        for pin in children(&version.pins.links).unwrap() {
            let link = sys::open_pin(&pin).unwrap();
            let name = pin.file_name().unwrap().to_str().unwrap().to_owned();
            links.push((name, sys::link_program(link.as_fd()).unwrap()));
        }
    }
    links.sort();
    (names, links)
}

/// Changes what the maps of a directory are said to consist of.
fn describe(root: &Path, change: impl FnOnce(&mut Value)) {
    let maps = root.join("maps");
    let path = maps.join(names::LAYOUTS);
    let text = RawMap::open(&path).unwrap().lookup(&[0; 4]).unwrap().unwrap();
    let mut layouts: Value = serde_json::from_slice(&text).unwrap();
    change(&mut layouts);
    fs::remove_file(&path).unwrap();
    let map = RawMap::new_value(names::LAYOUTS, &serde_json::to_vec(&layouts).unwrap()).unwrap();
    sys::pin(map.fd(), &path).unwrap();
}

/// Opens this version, and asserts that it alone is there with everything the other one had, in the links that it had.
fn assert_taken_over(bed: &Bed, what: &str) {
    let (_, links) = found(bed);
    let mut datapath = Datapath::open(bed.options(AttachMode::Auto)).unwrap_or_else(|error| panic!("{what}: {error}"));
    let frontend = datapath.tables.v4.frontends.get(&KEY).unwrap().unwrap();
    let backends = FamilyTables::<Addr4>::backends(&datapath.tables, frontend.cluster.first, 3).unwrap();
    assert_eq!(backends[2].addr, Addr4([10, 0, 0, 3]), "{what}");
    let ranges = FamilyTables::<Addr4>::source_ranges(&datapath.tables).unwrap();
    assert_eq!(ranges.len(), 1, "{what}: {ranges:?}");
    let settings: Settings<Addr4> = datapath.tables.settings().unwrap();
    assert_eq!(settings.mode, MODE_SERVE, "{what}");
    let (names, now) = found(bed);
    assert_eq!(names, [format!("v{}", names::LAYOUT_VERSION)], "{what}");
    let of = |links: &[(String, u32)]| links.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(of(&now), of(&links), "{what}");
    assert!(
        now.iter().zip(&links).all(|(now, before)| now.1 != before.1),
        "{what}: old programs: {now:?}"
    );
    assert_ok(&datapath.apply(vec![wanted()]));
    assert_ok(&datapath.complete());
    assert_ok(&datapath.set_network(&network()));
    let stats = datapath.stats();
    assert_eq!(
        (stats.programs_on_interfaces, stats.programs_on_cgroup),
        (2, 8),
        "{what}"
    );
    assert_eq!(tcx_programs(), 2, "{what}");
}

/// All programs in the hooks of the namespace's interfaces.
fn tcx_programs() -> usize {
    let hooks = [TcAttachType::Ingress, TcAttachType::Egress];
    let count = |name| hooks.map(|hook| SchedClassifier::query_tcx(name, hook).unwrap().1.len());
    ["left", "right"].into_iter().flat_map(count).sum()
}

#[test]
fn links_and_maps_of_another_version_are_taken_over() {
    in_namespace(|bed| {
        let other = leave(bed, AttachMode::Tcx);
        let id = |root: &Path| {
            run(
                "bpftool",
                &format!("map show pinned {}", root.join("maps/REWRITES4").display()),
            )
        };
        let before = id(&other);
        assert_taken_over(bed, "another version");
        assert_eq!(
            id(&root(bed, names::LAYOUT_VERSION, State::Complete)),
            before,
            "the same map"
        );
    });
}

/// The link at XDP moves with the others and gets the new program; without the option it goes.
#[test]
fn an_xdp_link_is_taken_over() {
    in_namespace(|bed| {
        let [own, other] = [names::LAYOUT_VERSION, OTHER].map(|number| root(bed, number, State::Complete));
        for is_wanted in [true, false] {
            let mut options = bed.options(AttachMode::Auto);
            options.xdp.interfaces = Some(InterfaceFilter::new(Some("left"), None).unwrap());
            let mut former = Datapath::open(options.clone()).unwrap();
            assert_ok(&former.set_network(&network()));
            drop(former);
            fs::rename(&own, &other).unwrap();
            let xdp = || {
                let (_, links) = found(bed);
                let (_, program) = links.into_iter().find(|(name, _)| name.ends_with("-xdp"))?;
                Some(program)
            };
            let before = xdp().unwrap();
            if !is_wanted {
                options.xdp.interfaces = None;
            }
            let datapath = Datapath::open(options).unwrap();
            assert_eq!(xdp().is_some(), is_wanted);
            assert_ne!(xdp(), Some(before), "the new program");
            drop(datapath);
        }
    });
}

/// An agent that ends at any moment of the change leaves something from which the next one goes on.
#[test]
fn a_start_that_ended_halfway_is_taken_further() {
    let own = names::LAYOUT_VERSION;
    // What is there under which name, and whether its own version has been given the links already.
    let states: [(&str, [(u32, State); 2]); 5] = [
        ("while copying", [(OTHER, State::Complete), (own, State::Building)]),
        (
            "between the two renamings",
            [(OTHER, State::Retired), (own, State::Building)],
        ),
        (
            "before the links were taken over",
            [(OTHER, State::Retired), (own, State::Complete)],
        ),
        (
            "its own maps were retired",
            [(own, State::Retired), (OTHER, State::Building)],
        ),
        ("another one follows", [(OTHER, State::Complete), (own, State::Retired)]),
    ];
    for (what, state) in states {
        in_namespace(move |bed| {
            let left = leave(bed, AttachMode::Tcx);
            let [first, second] = state.map(|(number, state)| root(bed, number, state));
            for dir in ["maps", "links"] {
                fs::create_dir_all(second.join(dir)).unwrap();
            }
            for pin in children(&left.join("maps")).unwrap() {
                let name = pin.file_name().unwrap();
                // Half made: the first ones.
                if state[1].1 != State::Building || name.to_str().unwrap() < "M" {
                    sys::pin(sys::open_pin(&pin).unwrap().as_fd(), &second.join("maps").join(name)).unwrap();
                }
            }
            // Some links had been taken over.
            if state[1].1 != State::Building {
                fs::rename(left.join("links/connect4"), second.join("links/connect4")).unwrap();
            }
            if left != first {
                fs::rename(&left, &first).unwrap();
            }
            set_mode_to_hold(&first);
            assert_taken_over(bed, what);
        });
    }
}

fn set_mode_to_hold(root: &Path) {
    let path = root.join("maps/SETTINGS4");
    let map = RawMap::open(&path).unwrap();
    let mut settings: Settings<Addr4> = sys::lookup(map.fd(), &0u32).unwrap().unwrap();
    settings.mode = MODE_HOLD;
    sys::update(map.fd(), &0u32, &settings).unwrap();
}

/// Fields go where their names are, new ones are zero; in maps of every kind that can be listed.
#[test]
fn entries_are_copied_by_the_names_of_their_fields() {
    in_namespace(|bed| {
        let other = leave(bed, AttachMode::Tcx);
        let maps = other.join("maps");
        let counters = RawMap::open(&maps.join("COUNTERS")).unwrap();
        let counted: Vec<u8> = (0..counters.room())
            .map(|at| (at / counters.stride()) as u8 + 1)
            .collect();
        counters.update(&SLOT.to_ne_bytes(), &counted).unwrap();
        // In the other version an index or a number stands before what this one has in every value, and addresses behind ports.
        let kinds = [
            ("FRONTENDS4", bpf_map_type::BPF_MAP_TYPE_HASH, 1),
            ("BACKENDS4", bpf_map_type::BPF_MAP_TYPE_ARRAY, 0),
            ("SRC_RANGES4", bpf_map_type::BPF_MAP_TYPE_LPM_TRIE, 1),
            ("COUNTERS", bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, 0),
        ];
        for (name, kind, flags) in kinds {
            let path = maps.join(name);
            let map = RawMap::open(&path).unwrap();
            let cpus = map.room() / map.stride();
            let wider = RawMap::create(
                kind,
                name,
                [map.key_size(), map.value_size() + 8],
                map.max_entries(),
                flags,
            )
            .unwrap();
            let mut key = None;
            while let Some(next) = map.next_key(key.as_deref()).unwrap() {
                let value = map.lookup(&next).unwrap().unwrap();
                let mut new = vec![0; wider.room()];
                for cpu in 0..cpus {
                    let (from, to) = (cpu * map.stride(), cpu * wider.stride());
                    new[to..to + 8].fill(0xee);
                    new[to + 8..to + 8 + map.value_size()].copy_from_slice(&value[from..from + map.value_size()]);
                }
                wider.update(&next, &new).unwrap();
                key = Some(next);
            }
            fs::remove_file(&path).unwrap();
            sys::pin(wider.fd(), &path).unwrap();
        }
        describe(&other, |layouts| {
            for (name, ..) in kinds {
                let fields = layouts[name]["value"].as_object_mut().unwrap();
                for field in fields.values_mut() {
                    field["offset"] = json!(field["offset"].as_u64().unwrap() + 8);
                }
                fields.insert("former".to_owned(), json!({"offset": 0, "size": 8, "count": 1}));
            }
        });
        assert_taken_over(bed, "wider values");
        let own = root(bed, names::LAYOUT_VERSION, State::Complete);
        let counters = RawMap::open(&own.join("maps/COUNTERS")).unwrap();
        assert_eq!(
            counters.lookup(&SLOT.to_ne_bytes()).unwrap().unwrap(),
            counted,
            "every CPU's"
        );
    });
}

/// What cannot be taken over is refused with the map, the field and the remedy, and nothing is touched.
#[test]
fn a_key_that_lost_a_field_is_refused_before_anything_changes() {
    in_namespace(|bed| {
        let other = leave(bed, AttachMode::Tcx);
        describe(&other, |layouts| {
            layouts["REWRITES4"]["key"].as_object_mut().unwrap().remove("hook");
        });
        set_mode_to_hold(&other);
        let before = found(bed);
        let error = Datapath::open(bed.options(AttachMode::Auto)).err().unwrap().to_string();
        for part in ["REWRITES4", "hook", "the version that made it", "proxy-agent cleanup"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(found(bed), before);
        fs::remove_file(other.join("maps").join(names::LAYOUTS)).unwrap();
        let error = Datapath::open(bed.options(AttachMode::Auto)).err().unwrap().to_string();
        assert!(
            error.contains("LAYOUTS") && error.contains("proxy-agent cleanup"),
            "{error}"
        );
        assert_eq!(found(bed), before);
    });
}

/// Same version, other build: maps whose sizes are right and whose fields are not are made anew and filled by name.
#[test]
fn a_build_with_other_fields_of_the_same_size_is_another_layout() {
    in_namespace(|bed| {
        let other = leave(bed, AttachMode::Tcx);
        let own = root(bed, names::LAYOUT_VERSION, State::Complete);
        fs::rename(&other, &own).unwrap();
        let path = own.join("maps/FRONTENDS4");
        let map = RawMap::open(&path).unwrap();
        let mut value = map.lookup(bytemuck::bytes_of(&KEY)).unwrap().unwrap();
        // Service and flags change places.
        value[..8].rotate_left(4);
        map.update(bytemuck::bytes_of(&KEY), &value).unwrap();
        describe(&own, |layouts| {
            let fields = &mut layouts["FRONTENDS4"]["value"];
            let service = fields["service"].take();
            fields["service"] = fields["flags"].take();
            fields["flags"] = service;
        });
        assert_taken_over(bed, "another build");
    });
}

/// Filters have no pins: they are replaced where they are.
#[test]
fn filters_of_another_version_are_replaced() {
    in_namespace(|bed| {
        let other = leave(bed, AttachMode::Classic);
        let shown = || run("bpftool", "net show");
        let before = shown();
        assert_eq!(before.matches("tc_").count(), 2, "{before}");
        assert!(!other.join("links").join(format!("{}-ingress", index("left"))).exists());
        let datapath = Datapath::open(bed.options(AttachMode::Classic)).unwrap();
        let now = shown();
        assert_eq!(now.matches("tc_").count(), 2, "{now}");
        assert_ne!(now, before, "other programs");
        assert_eq!(found(bed).0, [format!("v{}", names::LAYOUT_VERSION)]);
        drop(datapath);
    });
}
