//! Objects from the manifests in a folder: for one machine without an API server, for demonstrations, tests and benchmarks.
//!
//! Every `*.yaml`, `*.yml` and `*.json` of the folder is read, subfolders are not. A file counts as written when its writer closes it or moves it
//! into place. A document that cannot be used is told and skipped; objects that its file held before stay until the file is right again or is
//! removed. Where two files hold the same object, the one whose name sorts first counts.

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

/// How often a folder that was removed is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The source.
#[derive(Debug)]
pub struct DirSource {
    path: PathBuf,
    inotify: AsyncFd<Descriptor>,
    view: View,
}

/// What the files hold. Objects themselves are not kept: the listener has them, and shares their names.
#[derive(Debug, Default)]
pub(super) struct View {
    files: BTreeMap<Arc<Path>, FileState>,
    /// The file that counts for an object: the first of those that hold it.
    counts: IndexMap<ObjectKey, Arc<Path>>,
    /// The others that hold it; few objects have any.
    besides: BTreeMap<ObjectKey, BTreeSet<Arc<Path>>>,
}

#[derive(Debug, Default)]
struct FileState {
    /// By key.
    objects: Box<[Held]>,
    problems: Vec<(usize, String)>,
}

/// An object as a file holds it.
#[derive(Debug)]
struct Held {
    key: ObjectKey,
    line: usize,
    hash: u64,
}

impl FileState {
    fn get(&self, key: &ObjectKey) -> Option<&Held> {
        let at = self.objects.binary_search_by(|held| held.key.cmp(key)).ok()?;
        self.objects.get(at)
    }
}

/// What the kernel said.
enum News {
    Files(BTreeSet<PathBuf>),
    /// It lost events, or a link to a whole folder of files was exchanged.
    LookAtAll,
    FolderGone,
}

impl DirSource {
    /// Begins to watch a folder.
    ///
    /// # Errors
    /// When the folder does not exist or inotify is not to be had.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, SourceError> {
        let path = path.into();
        let inotify = Self::watch(&path).map_err(|source| SourceError::Watch { path: path.clone(), source })?;
        Ok(Self { path, inotify, view: View::default() })
    }

    fn watch(path: &Path) -> io::Result<AsyncFd<Descriptor>> {
        let inotify = Descriptor::init()?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            // A link needs no writing.
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(path, flags)?;
        Descriptor::register(inotify)
    }

    /// Waits for events and takes all there are.
    async fn news(&self) -> io::Result<News> {
        let events = self.inotify.async_io(Interest::READABLE, |inotify| Ok(inotify.read_events()?)).await?;
        let mut files = BTreeSet::new();
        let mut more = Some(events);
        let gone = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_IGNORED;
        let mut all = false;
        while let Some(events) = more.take() {
            for event in &events {
                if event.mask.intersects(gone | AddWatchFlags::IN_UNMOUNT) {
                    return Ok(News::FolderGone);
                }
                let path = event.name.as_ref().map(|name| self.path.join(name));
                // kubelet mounts a ConfigMap as links into `..data`, and changes all of them by exchanging that.
                let whole = event.name.as_ref().is_some_and(|name| name == "..data");
                all |= whole || event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                let created = event.mask.contains(AddWatchFlags::IN_CREATE);
                files.extend(path.filter(|p| document::is_manifest(p) && (!created || p.is_symlink())));
            }
            more = match self.inotify.get_ref().read_events() {
                Ok(events) => Some(events),
                Err(Errno::EAGAIN) => None,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(if all { News::LookAtAll } else { News::Files(files) })
    }

    /// Waits until the folder is there again. Nothing is taken back meanwhile: a missing folder says nothing about the cluster.
    async fn look_again(&mut self) {
        warn!(path = %self.path.display(), "the folder of objects is gone; what it held stays in force until it is back");
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
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

    /// Everything, as lists of each kind.
    fn first(&mut self) -> Result<Batch, SourceError> {
        let mut by_kind: BTreeMap<Kind, Vec<Object>> = Kind::ALL.into_iter().map(|kind| (kind, Vec::new())).collect();
        let mut interner = Interner::default();
        for path in self.list()? {
            for update in self.view.load_with(&path, &mut interner) {
                if let Update::Change(Change::Upsert(object)) = update {
                    by_kind.entry(object.kind()).or_default().push(*object);
                }
            }
        }
        let updates: Vec<Update> = by_kind.into_iter().map(|(kind, all)| Update::Replace(kind, all)).collect();
        Ok(Batch { updates, problems: Some(self.view.problems()) })
    }

    fn later(&mut self, paths: &BTreeSet<PathBuf>) -> Batch {
        let before = self.view.problems();
        let updates = paths.iter().flat_map(|path| self.view.load(path)).collect();
        let problems = self.view.problems();
        Batch { updates, problems: (problems != before).then_some(problems) }
    }
}

#[async_trait]
impl ObjectSource for DirSource {
    async fn run(mut self: Box<Self>, news: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        let first = self.first()?;
        tell(&first);
        if news.send(first).await.is_err() {
            return Ok(());
        }
        loop {
            let told = tokio::select! {
                told = self.news() => told,
                () = news.closed() => return Ok(()),
            };
            let paths = match told.map_err(|source| SourceError::Watch { path: self.path.clone(), source })? {
                News::Files(paths) => paths,
                News::LookAtAll => self.everything()?,
                News::FolderGone => {
                    self.look_again().await;
                    self.everything()?
                }
            };
            let batch = self.later(&paths);
            tell(&batch);
            if batch != Batch::default() && news.send(batch).await.is_err() {
                return Ok(());
            }
        }
    }
}

impl DirSource {
    /// The files that are there and those that were.
    fn everything(&self) -> Result<BTreeSet<PathBuf>, SourceError> {
        let mut paths = self.list()?;
        paths.extend(self.view.files.keys().map(|path| path.to_path_buf()));
        Ok(paths)
    }
}

fn tell(batch: &Batch) {
    for problem in batch.problems.iter().flatten() {
        warn!("{problem}");
    }
}

impl View {
    /// Reads one file again, and tells what follows.
    pub(super) fn load(&mut self, path: &Path) -> Vec<Update> {
        self.load_with(path, &mut Interner::default())
    }

    /// The same for one of many files, whose objects share strings: what is freed again meanwhile is not scattered between what stays.
    fn load_with(&mut self, path: &Path, interner: &mut Interner) -> Vec<Update> {
        let (content, whole) = match std::fs::read_to_string(path) {
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
        let mut old: BTreeMap<ObjectKey, Held> =
            before.objects.into_iter().map(|held| (held.key.clone(), held)).collect();
        let Some(Content { objects, mut problems }) = content else {
            return self.settle(&path, old.into_keys().collect(), BTreeMap::new());
        };
        let broken = !whole || !problems.is_empty();
        let mut fresh: BTreeMap<ObjectKey, Object> = BTreeMap::new();
        let mut state: BTreeMap<ObjectKey, Held> = BTreeMap::new();
        let mut touched = BTreeSet::new();
        for (line, mut object) in objects {
            object.intern(interner);
            let key = object.key();
            if state.contains_key(&key) {
                problems.push((line, format!("{key} stands in this file twice; the first one counts")));
                continue;
            }
            let hash = fingerprint(&object);
            let known = old.remove(&key).map(|held| held.hash);
            state.insert(key.clone(), Held { key: key.clone(), line, hash });
            if known != Some(hash) {
                touched.insert(key.clone());
                fresh.insert(key, object);
            }
        }
        for (key, before) in old {
            // The document that cannot be used may well be this one's.
            if broken {
                state.insert(key, before);
            } else {
                touched.insert(key);
            }
        }
        problems.sort();
        let objects = state.into_values().collect();
        self.files.insert(Arc::clone(&path), FileState { objects, problems });
        self.settle(&path, touched, fresh)
    }

    /// Finds out, for objects whose state in one file changed, which file counts now.
    fn settle(
        &mut self,
        path: &Arc<Path>,
        touched: BTreeSet<ObjectKey>,
        mut fresh: BTreeMap<ObjectKey, Object>,
    ) -> Vec<Update> {
        let mut updates = Vec::new();
        for key in touched {
            let holds = self.files.get(path).is_some_and(|file| file.get(&key).is_some());
            let counted = self.counts.get(&key).cloned();
            match self.holder(path, &key, holds) {
                None => updates.push(Update::Change(Change::Delete(key))),
                Some(file) if file == *path => {
                    let object = fresh.remove(&key);
                    updates.extend(object.map(|object| Update::Change(Change::Upsert(Box::new(object)))));
                }
                // Another file held it all the while and counts from now on.
                Some(file) if counted.as_ref() != Some(&file) => {
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

    /// Notes whether a file holds an object, and tells which one counts for it now.
    fn holder(&mut self, path: &Arc<Path>, key: &ObjectKey, holds: bool) -> Option<Arc<Path>> {
        let first = self.counts.get(key);
        if first.is_none_or(|first| first == path) && !self.besides.contains_key(key) {
            if holds {
                self.counts.insert(key.clone(), Arc::clone(path));
                return Some(Arc::clone(path));
            }
            self.counts.swap_remove(key);
            return None;
        }
        let mut all = self.besides.remove(key).unwrap_or_default();
        all.extend(self.counts.swap_remove(key));
        if holds {
            all.insert(Arc::clone(path));
        } else {
            all.remove(path);
        }
        let first = all.pop_first()?;
        self.counts.insert(key.clone(), Arc::clone(&first));
        if !all.is_empty() {
            self.besides.insert(key.clone(), all);
        }
        Some(first)
    }

    /// All that is wrong at the moment.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let own = self.files.iter().flat_map(|(file, state)| {
            state.problems.iter().map(|(line, reason)| Problem {
                scope: Scope::Document { file: file.to_path_buf(), line: *line },
                reason: reason.clone(),
            })
        });
        let twice = self.besides.iter().flat_map(|(key, files)| {
            let first = self.counts.get(key).map(|first| first.display().to_string()).unwrap_or_default();
            files.iter().map(move |file| {
                let line = self.files.get(file).and_then(|state| state.get(key)).map_or(1, |held| held.line);
                let reason = format!("{key} stands in {first} too, and that one counts");
                Problem { scope: Scope::Document { file: file.to_path_buf(), line }, reason }
            })
        });
        let mut all: Vec<Problem> = own.chain(twice).collect();
        all.sort();
        all
    }
}

/// Two states of an object with the same number are taken as the same; it lives in this process only.
fn fingerprint(object: &Object) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}
