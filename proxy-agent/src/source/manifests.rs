//! A folder of ordinary Kubernetes YAML and JSON files as the source of objects, followed with inotify. A file is read when its
//! writer has closed it or moved it into place, so a half-written one is not seen; one that does not parse keeps what it said
//! before until it parses again or is removed. If several files define one object, the first by name counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::Event;
use super::convert::Converter;
use super::documents::{self, Contents, Key, Object, file_warning};
use crate::model::Change;

/// Quiet time after which what happened is taken in: one save of an editor is several events.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// Unending events are taken in after this all the same.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(50);
/// A file that was written to and not closed is read after this all the same.
const WRITER_PATIENCE: Duration = Duration::from_millis(200);
/// The folder is read anew this often, in case an event was lost or the folder itself replaced.
const RESCAN: Duration = Duration::from_secs(10);
/// A larger file is not a manifest.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Why the folder cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("--manifests {path}: {source}; give a directory that can be read")]
pub struct ManifestsError {
    path: String,
    source: notify::Error,
}

/// Follows the folder on a thread of its own until nobody listens any more. The first full list is sent at once.
pub fn watch(dir: PathBuf, converter: Converter, events: mpsc::Sender<Event>) -> Result<(), ManifestsError> {
    let (tx, rx) = channel();
    let failed = |source| ManifestsError {
        path: dir.display().to_string(),
        source,
    };
    let mut watcher = notify::recommended_watcher(tx).map_err(failed)?;
    watcher.watch(&dir, RecursiveMode::NonRecursive).map_err(failed)?;
    let folder = Folder::new(dir, converter);
    std::thread::spawn(move || follow(folder, watcher, &rx, &events));
    Ok(())
}

fn follow(
    mut folder: Folder,
    mut watcher: RecommendedWatcher,
    rx: &Receiver<notify::Result<notify::Event>>,
    events: &mpsc::Sender<Event>,
) {
    let send = |list: Vec<Event>| list.into_iter().all(|event| events.blocking_send(event).is_ok());
    if !send(folder.first_list()) {
        return;
    }
    let mut next_rescan = Instant::now() + RESCAN;
    while !events.is_closed() {
        let hints = gather(rx, next_rescan, &folder.dir);
        let rescan = hints.rescan || Instant::now() >= next_rescan;
        if rescan {
            next_rescan = Instant::now() + RESCAN;
            // A folder that was replaced has another inode: watching again is harmless if it was not.
            let _ = watcher.watch(&folder.dir, RecursiveMode::NonRecursive);
        }
        let list = if rescan {
            folder.rescan(&hints.paths)
        } else {
            folder.reread(hints.paths)
        };
        if !send(list) {
            return;
        }
    }
}

/// What inotify had to say.
#[derive(Default)]
struct Hints {
    paths: BTreeSet<PathBuf>,
    rescan: bool,
}

/// Waits for something to happen, then for quiet; not beyond `deadline` if nothing happens.
fn gather(rx: &Receiver<notify::Result<notify::Event>>, deadline: Instant, dir: &Path) -> Hints {
    let mut hints = Hints::default();
    let mut being_written = BTreeSet::new();
    let mut until = deadline;
    let mut limit = None;
    loop {
        match rx.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => hints.note(event, dir, &mut being_written),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => {
                hints.rescan = true;
                std::thread::sleep(RESCAN);
                break;
            }
        }
        let now = Instant::now();
        let limit = *limit.get_or_insert(now + DEBOUNCE_LIMIT);
        until = match (hints.is_empty(), being_written.is_empty()) {
            (true, true) => deadline,
            (false, true) => (now + DEBOUNCE).min(limit),
            (_, false) => now + WRITER_PATIENCE,
        };
    }
    hints.paths.extend(being_written);
    hints
}

impl Hints {
    fn is_empty(&self) -> bool {
        self.paths.is_empty() && !self.rescan
    }

    fn note(&mut self, event: notify::Result<notify::Event>, dir: &Path, being_written: &mut BTreeSet<PathBuf>) {
        let Ok(event) = event else {
            self.rescan = true;
            return;
        };
        self.rescan |= event.need_rescan();
        let closed = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
            EventKind::Access(_) | EventKind::Modify(ModifyKind::Metadata(_)) => return,
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_)) => false,
            _ => true,
        };
        for path in event.paths {
            // ConfigMap mounts swap a link called ..data to which all files point.
            let is_dotdot = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b".."));
            if path == dir || is_dotdot {
                self.rescan = true;
            } else if is_manifest(&path) {
                let is_whole = closed || !path.symlink_metadata().is_ok_and(|meta| meta.is_file());
                if is_whole {
                    being_written.remove(&path);
                    self.paths.insert(path);
                } else {
                    self.paths.remove(&path);
                    being_written.insert(path);
                }
            }
        }
    }
}

/// Files by extension, without those that editors keep beside them.
fn is_manifest(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && matches!(path.extension().and_then(OsStr::to_str), Some("yaml" | "yml" | "json"))
}

/// What tells two states of a file apart without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Fingerprint(u64, u64, i64, i64, i64, i64);

impl Fingerprint {
    fn of(meta: &fs::Metadata) -> Self {
        Self(
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        )
    }
}

/// The folder as last read.
struct Folder {
    dir: PathBuf,
    converter: Converter,
    files: BTreeMap<Arc<Path>, FileState>,
    /// Who defines an object, in the order of precedence.
    holders: HashMap<Key, BTreeMap<Arc<Path>, Object>>,
}

struct FileState {
    fingerprint: Fingerprint,
    keys: BTreeSet<Key>,
}

impl Folder {
    fn new(dir: PathBuf, converter: Converter) -> Self {
        Self {
            dir,
            converter,
            files: BTreeMap::new(),
            holders: HashMap::new(),
        }
    }

    fn first_list(&mut self) -> Vec<Event> {
        let changes = self.rescan(&BTreeSet::new());
        let mut events: Vec<Event> = changes
            .into_iter()
            .filter(|event| matches!(event, Event::Warning(_)))
            .collect();
        let (mut services, mut slices, mut node, mut cidrs) = (Vec::new(), Vec::new(), None, Vec::new());
        for object in self.holders.values().filter_map(|holders| holders.values().next()) {
            match object.clone() {
                Object::Service(service) => services.extend(service),
                Object::Slice(slice, _) => slices.extend(slice),
                Object::Node(own) => node = Some(own),
                Object::ServiceCidr(cidr) => cidrs.push(cidr),
            }
        }
        let lists = [
            Change::Services(services),
            Change::Slices(slices),
            Change::Node(node),
            Change::ServiceCidrs(cidrs),
        ];
        events.extend(lists.map(Event::Change));
        events
    }

    /// Looks at every file: reads those in `certain` and those that look different, forgets those that are gone.
    fn rescan(&mut self, certain: &BTreeSet<PathBuf>) -> Vec<Event> {
        let found = match fs::read_dir(&self.dir) {
            Ok(entries) => entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| is_manifest(path)),
            Err(error) => {
                // Like an API server that is away: the last state stands.
                let remedy = "the last state stands; put the folder back";
                return vec![self.warning(&self.dir, error.to_string(), remedy)];
            }
        };
        let mut paths: BTreeSet<PathBuf> = found.collect();
        paths.extend(self.files.keys().map(|path| path.to_path_buf()));
        let looks_same = |path: &PathBuf| {
            let state = self.files.get(path.as_path());
            let meta = fs::metadata(path);
            state
                .zip(meta.ok())
                .is_some_and(|(state, meta)| state.fingerprint == Fingerprint::of(&meta))
        };
        paths.retain(|path| certain.contains(path) || !looks_same(path));
        self.reread(paths)
    }

    /// Reads these files again, or forgets them if they are gone.
    fn reread(&mut self, paths: BTreeSet<PathBuf>) -> Vec<Event> {
        let mut events = Vec::new();
        let mut touched = BTreeSet::new();
        for path in paths {
            let (fingerprint, contents) = match self.read(&path) {
                Ok(Some(read)) => read,
                Ok(None) => {
                    let state = self.files.remove(path.as_path());
                    for key in state.into_iter().flat_map(|state| state.keys) {
                        self.drop_holder(&key, &path);
                        touched.insert(key);
                    }
                    continue;
                }
                Err(problem) => {
                    events.push(self.warning(&path, problem, "what the file said before stays; correct it"));
                    continue;
                }
            };
            events.extend(contents.warnings.into_iter().map(Event::Warning));
            let path: Arc<Path> = path.into();
            let before = self.files.remove(&path).map(|state| state.keys).unwrap_or_default();
            let mut keys: BTreeSet<Key> = contents.objects.keys().cloned().collect();
            for key in before.difference(&keys).cloned().collect::<Vec<_>>() {
                if contents.damaged {
                    keys.insert(key);
                } else {
                    self.drop_holder(&key, &path);
                    touched.insert(key);
                }
            }
            for (key, object) in contents.objects {
                self.holders
                    .entry(key.clone())
                    .or_default()
                    .insert(path.clone(), object);
                touched.insert(key);
            }
            self.files.insert(path, FileState { fingerprint, keys });
        }
        let changes = touched.iter().map(|key| {
            let object = self.holders.get(key).and_then(|holders| holders.values().next());
            Event::Change(Object::change(key, object))
        });
        events.extend(changes);
        events
    }

    /// `None` if the file is gone.
    fn read(&mut self, path: &Path) -> Result<Option<(Fingerprint, Contents)>, String> {
        let meta = match fs::metadata(path) {
            Ok(meta) if meta.is_file() => meta,
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        if meta.len() > MAX_FILE_BYTES {
            return Err(format!("has {} bytes, more than a manifest may have", meta.len()));
        }
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let contents = documents::read(&path.display().to_string(), &text, is_json, &mut self.converter);
        Ok(Some((Fingerprint::of(&meta), contents)))
    }

    fn drop_holder(&mut self, key: &Key, path: &Path) {
        if let Some(holders) = self.holders.get_mut(key) {
            holders.remove(path);
            if holders.is_empty() {
                self.holders.remove(key);
            }
        }
    }

    fn warning(&self, path: &Path, problem: String, remedy: &'static str) -> Event {
        Event::Warning(file_warning(path.display().to_string(), "file", problem, remedy))
    }
}

#[cfg(test)]
#[path = "manifests_tests.rs"]
mod tests;
