//! The source `dir:PATH`: objects from the manifests of a folder, for machines without an API server, demonstrations, tests and benchmarks.
//!
//! Every `*.yaml`, `*.yml` and `*.json` of the folder is read, subfolders are not. A file is read when its writer closes it or moves it
//! into place. A document that cannot be read is a problem and skipped; objects that its file held before stay until the whole file can be read or is
//! removed. If several files hold an object, the file whose name sorts first is the effective one.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use indexmap::IndexMap;
use nix::errno::Errno;
use nix::sys::inotify::AddWatchFlags;
use terway_core::objects::{Change, Interner, Kind, Object, ObjectKey};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::document::{self, Content};
use super::{Batch, ObjectSource, Problem, Scope, SourceError, Update};
use crate::inotify::Descriptor;

/// The interval at which a removed folder is looked for.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The source of a folder, watched by inotify.
#[derive(Debug)]
pub struct DirSource {
    path: PathBuf,
    inotify: AsyncFd<Descriptor>,
    index: FileIndex,
}

/// The index of files: which objects each holds, and which file is effective for an object. The objects themselves are in the store only.
#[derive(Debug, Default)]
pub(super) struct FileIndex {
    files: BTreeMap<Arc<Path>, FileState>,
    /// The effective file of an object: the first of those that hold it.
    effective: IndexMap<ObjectKey, Arc<Path>>,
    /// The other files that hold an object; few objects have any.
    shadowed: BTreeMap<ObjectKey, BTreeSet<Arc<Path>>>,
}

#[derive(Debug, Default)]
struct FileState {
    /// Ordered by key.
    objects: Box<[FileObject]>,
    problems: Vec<(usize, String)>,
}

/// An object in a file.
#[derive(Debug)]
struct FileObject {
    key: ObjectKey,
    line: usize,
    hash: u64,
}

impl FileState {
    fn get(&self, key: &ObjectKey) -> Option<&FileObject> {
        let at = self.objects.binary_search_by(|object| object.key.cmp(key)).ok()?;
        self.objects.get(at)
    }
}

/// A change of the folder.
enum FolderEvent {
    Files(BTreeSet<PathBuf>),
    /// Events were lost, or the symlink `..data` was replaced: all files may have changed.
    AllFiles,
    FolderRemoved,
}

impl DirSource {
    /// Starts to watch a folder.
    ///
    /// # Errors
    /// When the folder does not exist or inotify is not available.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, SourceError> {
        let path = path.into();
        let inotify = Self::watch(&path).map_err(|source| SourceError::Watch { path: path.clone(), source })?;
        Ok(Self { path, inotify, index: FileIndex::default() })
    }

    fn watch(path: &Path) -> io::Result<AsyncFd<Descriptor>> {
        let inotify = Descriptor::init()?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            // A symlink is complete when it is created.
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(path, flags)?;
        Descriptor::register(inotify)
    }

    /// Waits for events and reads all there are.
    async fn next_event(&self) -> io::Result<FolderEvent> {
        let events = self.inotify.async_io(Interest::READABLE, |inotify| Ok(inotify.read_events()?)).await?;
        let mut files = BTreeSet::new();
        let mut next = Some(events);
        let removed = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_IGNORED;
        let mut all = false;
        while let Some(events) = next.take() {
            for event in &events {
                if event.mask.intersects(removed | AddWatchFlags::IN_UNMOUNT) {
                    return Ok(FolderEvent::FolderRemoved);
                }
                let path = event.name.as_ref().map(|name| self.path.join(name));
                // kubelet mounts a ConfigMap as symlinks into `..data`, and updates all files by replacing that symlink.
                let is_data_link = event.name.as_ref().is_some_and(|name| name == "..data");
                all |= is_data_link || event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                let is_created = event.mask.contains(AddWatchFlags::IN_CREATE);
                files.extend(path.filter(|p| document::is_manifest(p) && (!is_created || p.is_symlink())));
            }
            next = match self.inotify.get_ref().read_events() {
                Ok(events) => Some(events),
                Err(Errno::EAGAIN) => None,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(if all { FolderEvent::AllFiles } else { FolderEvent::Files(files) })
    }

    /// Waits until the folder exists again. Meanwhile the last state stays in force: a missing folder does not mean that objects were deleted.
    async fn wait_for_folder(&mut self) {
        warn!(path = %self.path.display(), "the folder of objects was removed; the last state stays in force until it is back");
        loop {
            tokio::time::sleep(RETRY_INTERVAL).await;
            if let Ok(inotify) = Self::watch(&self.path) {
                self.inotify = inotify;
                info!(path = %self.path.display(), "the folder of objects is back");
                return;
            }
        }
    }

    fn list(&self) -> Result<BTreeSet<PathBuf>, SourceError> {
        let list = || -> io::Result<_> {
            let paths = std::fs::read_dir(&self.path)?.map(|entry| entry.map(|e| e.path()));
            paths.filter(|path| path.as_ref().map_or(true, |p| document::is_manifest(p))).collect()
        };
        list().map_err(|source| SourceError::Watch { path: self.path.clone(), source })
    }

    /// A complete list of every kind.
    fn list_all(&mut self) -> Result<Batch, SourceError> {
        let mut by_kind: BTreeMap<Kind, Vec<Object>> = Kind::ALL.into_iter().map(|kind| (kind, Vec::new())).collect();
        let mut interner = Interner::default();
        for path in self.list()? {
            for update in self.index.load_with(&path, &mut interner) {
                if let Update::Change(Change::Upsert(object)) = update {
                    by_kind.entry(object.kind()).or_default().push(*object);
                }
            }
        }
        let updates: Vec<Update> = by_kind.into_iter().map(|(kind, all)| Update::Replace(kind, all)).collect();
        Ok(Batch { updates, problems: Some(self.index.problems()) })
    }

    fn read_files(&mut self, paths: &BTreeSet<PathBuf>) -> Batch {
        let before = self.index.problems();
        let updates = paths.iter().flat_map(|path| self.index.load(path)).collect();
        let problems = self.index.problems();
        Batch { updates, problems: (problems != before).then_some(problems) }
    }
}

#[async_trait]
impl ObjectSource for DirSource {
    async fn run(mut self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        let first = self.list_all()?;
        log_problems(&first);
        if batches.send(first).await.is_err() {
            return Ok(());
        }
        loop {
            let event = tokio::select! {
                event = self.next_event() => event,
                () = batches.closed() => return Ok(()),
            };
            let paths = match event.map_err(|source| SourceError::Watch { path: self.path.clone(), source })? {
                FolderEvent::Files(paths) => paths,
                FolderEvent::AllFiles => self.all_files()?,
                FolderEvent::FolderRemoved => {
                    self.wait_for_folder().await;
                    self.all_files()?
                }
            };
            let batch = self.read_files(&paths);
            log_problems(&batch);
            if batch != Batch::default() && batches.send(batch).await.is_err() {
                return Ok(());
            }
        }
    }
}

impl DirSource {
    /// The files that exist and those that existed.
    fn all_files(&self) -> Result<BTreeSet<PathBuf>, SourceError> {
        let mut paths = self.list()?;
        paths.extend(self.index.files.keys().map(|path| path.to_path_buf()));
        Ok(paths)
    }
}

fn log_problems(batch: &Batch) {
    for problem in batch.problems.iter().flatten() {
        warn!("{problem}");
    }
}

impl FileIndex {
    /// Reads a file again; returns the resulting updates.
    pub(super) fn load(&mut self, path: &Path) -> Vec<Update> {
        self.load_with(path, &mut Interner::default())
    }

    /// The same for one of many files whose objects share strings, which avoids fragmented memory.
    fn load_with(&mut self, path: &Path, interner: &mut Interner) -> Vec<Update> {
        let (content, is_read) = match std::fs::read_to_string(path) {
            Ok(text) => (Some(document::read(path, &text)), true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (None, true),
            Err(error) => {
                let problems = vec![(1, format!("cannot be read: {error}"))];
                (Some(Content { objects: Vec::new(), problems }), false)
            }
        };
        let (path, before) = match self.files.remove_entry(path) {
            Some((path, before)) => (path, before),
            None => (Arc::from(path), FileState::default()),
        };
        let mut old: BTreeMap<ObjectKey, FileObject> =
            before.objects.into_iter().map(|object| (object.key.clone(), object)).collect();
        let Some(Content { objects, mut problems }) = content else {
            return self.resolve(&path, old.into_keys().collect(), BTreeMap::new());
        };
        let is_broken = !is_read || !problems.is_empty();
        let mut fresh: BTreeMap<ObjectKey, Object> = BTreeMap::new();
        let mut state: BTreeMap<ObjectKey, FileObject> = BTreeMap::new();
        let mut touched = BTreeSet::new();
        for (line, mut object) in objects {
            object.intern(interner);
            let key = object.key();
            if state.contains_key(&key) {
                problems.push((line, format!("{key} is in this file twice; the first one is used")));
                continue;
            }
            let hash = fingerprint(&object);
            let known = old.remove(&key).map(|object| object.hash);
            state.insert(key.clone(), FileObject { key: key.clone(), line, hash });
            if known != Some(hash) {
                touched.insert(key.clone());
                fresh.insert(key, object);
            }
        }
        for (key, before) in old {
            // The document that cannot be read may be this object.
            if is_broken {
                state.insert(key, before);
            } else {
                touched.insert(key);
            }
        }
        problems.sort();
        let objects = state.into_values().collect();
        self.files.insert(Arc::clone(&path), FileState { objects, problems });
        self.resolve(&path, touched, fresh)
    }

    /// Finds the effective file of objects whose state in one file has changed; returns the resulting updates.
    fn resolve(
        &mut self,
        path: &Arc<Path>,
        touched: BTreeSet<ObjectKey>,
        mut fresh: BTreeMap<ObjectKey, Object>,
    ) -> Vec<Update> {
        let mut updates = Vec::new();
        for key in touched {
            let is_in_file = self.files.get(path).is_some_and(|file| file.get(&key).is_some());
            let previous = self.effective.get(&key).cloned();
            match self.update_effective(path, &key, is_in_file) {
                None => updates.push(Update::Change(Change::Delete(key))),
                Some(file) if file == *path => {
                    let object = fresh.remove(&key);
                    updates.extend(object.map(|object| Update::Change(Change::Upsert(Box::new(object)))));
                }
                // Another file holds the object too and becomes the effective one.
                Some(file) if previous.as_ref() != Some(&file) => {
                    let object = std::fs::read_to_string(&file).ok().and_then(|text| {
                        document::read(&file, &text).objects.into_iter().find(|(_, o)| o.key() == key)
                    });
                    updates.extend(object.map(|(_, object)| Update::Change(Change::Upsert(Box::new(object)))));
                }
                Some(_) => {}
            }
        }
        updates
    }

    /// Records whether a file holds an object; returns the effective file.
    fn update_effective(&mut self, path: &Arc<Path>, key: &ObjectKey, is_in_file: bool) -> Option<Arc<Path>> {
        let first = self.effective.get(key);
        if first.is_none_or(|first| first == path) && !self.shadowed.contains_key(key) {
            if is_in_file {
                self.effective.insert(key.clone(), Arc::clone(path));
                return Some(Arc::clone(path));
            }
            self.effective.swap_remove(key);
            return None;
        }
        let mut all = self.shadowed.remove(key).unwrap_or_default();
        all.extend(self.effective.swap_remove(key));
        if is_in_file {
            all.insert(Arc::clone(path));
        } else {
            all.remove(path);
        }
        let first = all.pop_first()?;
        self.effective.insert(key.clone(), Arc::clone(&first));
        if !all.is_empty() {
            self.shadowed.insert(key.clone(), all);
        }
        Some(first)
    }

    /// All problems at the moment.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let own = self.files.iter().flat_map(|(file, state)| {
            state.problems.iter().map(|(line, reason)| Problem {
                scope: Scope::Document { file: file.to_path_buf(), line: *line },
                reason: reason.clone(),
            })
        });
        let shadowed = self.shadowed.iter().flat_map(|(key, files)| {
            let first = self.effective.get(key).map(|first| first.display().to_string()).unwrap_or_default();
            files.iter().map(move |file| {
                let line = self.files.get(file).and_then(|state| state.get(key)).map_or(1, |object| object.line);
                let reason = format!("{key} is in {first} too, which is used");
                Problem { scope: Scope::Document { file: file.to_path_buf(), line }, reason }
            })
        });
        let mut all: Vec<Problem> = own.chain(shadowed).collect();
        all.sort();
        all
    }
}

/// A hash by which two states of an object are compared, valid in this process only.
fn fingerprint(object: &Object) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}
