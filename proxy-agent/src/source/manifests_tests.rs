//! A real folder, written to in the ways that people and tools write.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::model::ClusterState;

struct Bed {
    dir: TempDir,
    rx: mpsc::Receiver<Event>,
    state: ClusterState,
    plans: BTreeMap<String, String>,
    warnings: Vec<String>,
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

impl Bed {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let (tx, rx) = mpsc::channel(1024);
        watch(dir.path().to_owned(), Converter::new("node-a"), tx).unwrap();
        Self {
            dir,
            rx,
            state: ClusterState::default(),
            plans: BTreeMap::new(),
            warnings: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn drain(&mut self) {
        while let Ok(event) = self.rx.try_recv() {
            match event {
                Event::Change(change) => self.state.apply(change),
                Event::Warning(warning) => self.warnings.push(warning.to_string()),
            }
        }
    }

    /// Follows until the service networks are those, for at most five seconds.
    #[track_caller]
    fn expect_networks(&mut self, expected: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            self.drain();
            let found: Vec<String> = self.state.service_networks().iter().map(ToString::to_string).collect();
            if self.state.is_complete() && found == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{found:?} instead of {expected:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Follows until the frontends are those, for at most five seconds; `name=address` each.
    #[track_caller]
    fn expect(&mut self, expected: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            self.drain();
            self.state.settle();
            for (name, plan) in self.state.take_changes() {
                match plan {
                    Some(plan) => self.plans.insert(name.name, plan.v4.frontends[0].addr.to_string()),
                    None => self.plans.remove(&name.name),
                };
            }
            let found: Vec<String> = self.plans.iter().map(|(name, addr)| format!("{name}={addr}")).collect();
            if self.state.is_complete() && found == expected {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{found:?} instead of {expected:?}; warnings {:#?}",
                self.warnings
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn files_come_change_and_go() {
    let mut bed = Bed::new(&[
        ("a.yaml", &service("a", "10.96.0.1")),
        ("notes.txt", "kind: ["),
        (".b.yaml", &service("b", "10.96.0.2")),
    ]);
    bed.expect(&["a=10.96.0.1"]);
    fs::write(bed.path("b.yml"), service("b", "10.96.0.2")).unwrap();
    bed.expect(&["a=10.96.0.1", "b=10.96.0.2"]);
    fs::write(bed.path("a.yaml"), service("a", "10.96.0.3")).unwrap();
    bed.expect(&["a=10.96.0.3", "b=10.96.0.2"]);
    fs::write(bed.path("a.tmp"), service("a", "10.96.0.4")).unwrap();
    fs::rename(bed.path("a.tmp"), bed.path("a.yaml")).unwrap();
    bed.expect(&["a=10.96.0.4", "b=10.96.0.2"]);
    fs::rename(bed.path("b.yml"), bed.path("b.bak")).unwrap();
    bed.expect(&["a=10.96.0.4"]);
    fs::remove_file(bed.path("a.yaml")).unwrap();
    bed.expect(&[]);
    assert!(bed.warnings.is_empty(), "{:?}", bed.warnings);
}

#[test]
fn a_bad_file_keeps_what_it_said() {
    let both = service("a", "10.96.0.1") + "---\n" + &service("b", "10.96.0.2");
    let mut bed = Bed::new(&[("x.yaml", &both)]);
    bed.expect(&["a=10.96.0.1", "b=10.96.0.2"]);
    fs::write(bed.path("x.yaml"), service("a", "10.96.0.9") + "---\nkind: [\n").unwrap();
    bed.expect(&["a=10.96.0.9", "b=10.96.0.2"]);
    assert!(bed.warnings[0].contains("x.yaml, document 2"), "{:?}", bed.warnings);
    fs::write(bed.path("x.yaml"), [0xff, 0xfe]).unwrap();
    fs::write(bed.path("y.yaml"), service("c", "10.96.0.3")).unwrap();
    bed.expect(&["a=10.96.0.9", "b=10.96.0.2", "c=10.96.0.3"]);
    fs::write(bed.path("x.yaml"), service("a", "10.96.0.1")).unwrap();
    bed.expect(&["a=10.96.0.1", "c=10.96.0.3"]);
}

#[test]
fn a_file_is_read_when_it_is_whole() {
    use std::io::Write;
    let text = service("a", "10.96.0.1") + "---\n" + &service("b", "10.96.0.2");
    let mut bed = Bed::new(&[("x.yaml", &text)]);
    bed.expect(&["a=10.96.0.1", "b=10.96.0.2"]);
    let mut file = fs::File::create(bed.path("x.yaml")).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    bed.expect(&["a=10.96.0.1", "b=10.96.0.2"]);
    for part in text.replace("0.2", "0.3").as_bytes().chunks(40) {
        file.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        assert!(
            bed.rx.try_recv().is_err(),
            "nothing is said while the file is being written"
        );
    }
    drop(file);
    bed.expect(&["a=10.96.0.1", "b=10.96.0.3"]);
}

#[test]
fn the_first_of_two_files_counts() {
    let mut bed = Bed::new(&[
        ("b.yaml", &service("s", "10.96.0.2")),
        ("a.yaml", &service("s", "10.96.0.1")),
    ]);
    bed.expect(&["s=10.96.0.1"]);
    fs::remove_file(bed.path("a.yaml")).unwrap();
    bed.expect(&["s=10.96.0.2"]);
}

#[test]
fn a_mounted_config_map() {
    let dir = TempDir::new().unwrap();
    let version = |name: &str, ip: &str| {
        let folder = dir.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a.yaml"), service("a", ip)).unwrap();
    };
    version("..1", "10.96.0.1");
    version("..2", "10.96.0.2");
    symlink("..1", dir.path().join("..data")).unwrap();
    symlink("..data/a.yaml", dir.path().join("a.yaml")).unwrap();
    let (tx, rx) = mpsc::channel(1024);
    watch(dir.path().to_owned(), Converter::new("node-a"), tx).unwrap();
    let mut bed = Bed {
        dir,
        rx,
        state: ClusterState::default(),
        plans: BTreeMap::new(),
        warnings: Vec::new(),
    };
    bed.expect(&["a=10.96.0.1"]);
    symlink("..2", bed.path("..data_tmp")).unwrap();
    fs::rename(bed.path("..data_tmp"), bed.path("..data")).unwrap();
    bed.expect(&["a=10.96.0.2"]);
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let (tx, _rx) = mpsc::channel(1);
    let error = watch("/nonexistent/folder".into(), Converter::new("node-a"), tx)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("--manifests /nonexistent/folder: "), "{error}");
}

#[test]
fn service_networks_of_files() {
    let cidr = |name: &str, network: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{name: {name}}}\nspec: {{cidrs: [{network}]}}\n"
        )
    };
    let mut bed = Bed::new(&[("a.yaml", &cidr("kubernetes", "10.96.0.0/16"))]);
    bed.expect_networks(&["10.96.0.0/16"]);
    fs::write(bed.path("b.yaml"), cidr("more", "10.97.0.0/16")).unwrap();
    bed.expect_networks(&["10.96.0.0/16", "10.97.0.0/16"]);
    fs::remove_file(bed.path("b.yaml")).unwrap();
    bed.expect_networks(&["10.96.0.0/16"]);
}
