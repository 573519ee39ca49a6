//! An inotify watch of files and folders that follows the links on the way to them.
//!
//! A file is where its path leads, and every folder and link on the way can be replaced: kubelet swaps a link, editors write beside and rename,
//! people move folders. So every folder on the way is watched, each for the one name that matters in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::inotify::Descriptor;

/// kubelet mounts a ConfigMap as links through this one, and swaps it by rename: what is read below its target is of one version
/// (kubernetes/pkg/volume/util/atomic_writer.go).
pub(crate) const SWAPPED: &str = "..data";

/// A change is over when nothing more came for this long.
const QUIET: Duration = Duration::from_millis(100);
/// A change that does not end is looked at after this long.
const AT_MOST: Duration = Duration::from_secs(1);
/// How often to look where nothing can be watched.
const BLIND: Duration = Duration::from_secs(5);
/// As the kernel's limit on links in a path (`MAXSYMLINKS`, include/linux/namei.h).
const MOST_LINKS: usize = 40;

/// Names that matter in a folder; `None` for all.
type Names = Option<BTreeSet<OsString>>;

/// A watch of some files as their paths led when it was made.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: Option<AsyncFd<Descriptor>>,
    names: HashMap<WatchDescriptor, Names>,
    /// A folder went away while the watch was made: look again soon.
    incomplete: bool,
}

impl Watch {
    /// Starts to watch. Where that is impossible, logs it and polls instead.
    pub(crate) fn new(paths: &[&Path]) -> Self {
        match Self::of(paths) {
            Ok(watch) => watch,
            Err(error) => {
                warn!(?paths, %error, every = ?BLIND, "failed to watch files; polling them instead");
                Self { inotify: None, names: HashMap::new(), incomplete: false }
            }
        }
    }

    fn of(paths: &[&Path]) -> std::io::Result<Self> {
        let inotify = Descriptor::init()?;
        let mask = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let mut watch = Self { inotify: None, names: HashMap::new(), incomplete: false };
        for (folder, names) in interests(paths) {
            match inotify.add_watch(&folder, mask) {
                // Two paths to one folder share a descriptor.
                Ok(descriptor) => match (watch.names.entry(descriptor).or_insert_with(|| Some(BTreeSet::new())), names)
                {
                    (Some(all), Some(names)) => all.extend(names),
                    (held, _) => *held = None,
                },
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => watch.incomplete = true,
                Err(error) => return Err(error.into()),
            }
        }
        watch.inotify = Some(Descriptor::register(inotify)?);
        Ok(watch)
    }

    /// Returns when something happened and is over, or after `at_most`.
    pub(crate) async fn changed(&self, at_most: Duration) {
        let Some(inotify) = &self.inotify else { return tokio::time::sleep(BLIND.min(at_most)).await };
        let at_most = if self.incomplete { QUIET } else { at_most };
        if timeout_at(Instant::now() + at_most, self.next(inotify)).await.is_err() {
            return;
        }
        let end = Instant::now() + AT_MOST;
        while Instant::now() < end {
            if timeout_at((Instant::now() + QUIET).min(end), self.next(inotify)).await.is_err() {
                return;
            }
        }
    }

    /// The next event that matters; never without one.
    async fn next(&self, inotify: &AsyncFd<Descriptor>) {
        loop {
            let Ok(mut ready) = inotify.readable().await else { return std::future::pending().await };
            match inotify.get_ref().read_events() {
                Ok(events) => {
                    let whole = AddWatchFlags::IN_IGNORED
                        | AddWatchFlags::IN_Q_OVERFLOW
                        | AddWatchFlags::IN_DELETE_SELF
                        | AddWatchFlags::IN_MOVE_SELF
                        | AddWatchFlags::IN_UNMOUNT;
                    let matters = |name: Option<&OsStr>, wd| match (self.names.get(&wd), name) {
                        (Some(Some(names)), Some(name)) => names.contains(name),
                        (Some(None), Some(_)) => true,
                        _ => false,
                    };
                    if events.iter().any(|e| e.mask.intersects(whole) || matters(e.name.as_deref(), e.wd)) {
                        return;
                    }
                }
                Err(_) => ready.clear_ready(),
            }
        }
    }
}

/// Every folder on the way to the files with the names that matter in it.
fn interests(paths: &[&Path]) -> BTreeMap<PathBuf, Names> {
    let mut found = BTreeMap::new();
    for path in paths {
        if let Some(folder) = walk(path, &mut found).filter(|end| end.is_dir()) {
            for inner in [walk(&folder.join(SWAPPED), &mut found), Some(folder)].into_iter().flatten() {
                found.insert(inner, None);
            }
        }
    }
    found
}

/// Goes the way of a path, notes each step, and returns where it ends, if it does.
fn walk(path: &Path, found: &mut BTreeMap<PathBuf, Names>) -> Option<PathBuf> {
    let mut here = if path.is_absolute() { PathBuf::from("/") } else { std::env::current_dir().ok()? };
    let mut steps: Vec<OsString> = Vec::new();
    let push = |steps: &mut Vec<OsString>, path: &Path| {
        steps.extend(path.components().rev().filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        }));
    };
    push(&mut steps, path);
    let mut links = 0;
    while let Some(step) = steps.pop() {
        if step == ".." {
            here.pop();
            continue;
        }
        if let Some(names) = found.entry(here.clone()).or_insert_with(|| Some(BTreeSet::new())) {
            names.insert(step.clone());
        }
        let next = here.join(&step);
        match std::fs::read_link(&next) {
            Ok(target) => {
                links += 1;
                if links > MOST_LINKS {
                    return None;
                }
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                push(&mut steps, &target);
            }
            // Not a link, or not there: the last step that can be watched is noted.
            Err(_) if next.symlink_metadata().is_ok() => here = next,
            Err(_) => return None,
        }
    }
    Some(here)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn every_step_of_a_linked_path_is_watched_for_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("eni/..1")).unwrap();
        std::fs::write(root.join("eni/..1/eni_conf"), "{}").unwrap();
        symlink("..1", root.join("eni/..data")).unwrap();
        symlink("..data/eni_conf", root.join("eni/eni_conf")).unwrap();
        symlink(root.join("eni/eni_conf"), root.join("alias")).unwrap();

        let found = interests(&[&root.join("alias")]);
        let names = |folder: &str| found.get(&root.join(folder)).cloned().flatten().unwrap();
        assert_eq!(names(""), ["alias", "eni"].map(OsString::from).into());
        assert_eq!(names("eni"), ["..data", "..1", "eni_conf"].map(OsString::from).into());
        assert_eq!(names("eni/..1"), ["eni_conf"].map(OsString::from).into());

        let found = interests(&[&root.join("eni")]);
        assert_eq!(found.get(&root.join("eni")), Some(&None), "every name of the folder itself");
        assert_eq!(found.get(&root.join("eni/..1")), Some(&None));
    }

    #[test]
    fn a_path_that_is_not_there_is_watched_where_it_would_begin() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let found = interests(&[&root.join("a/b/eni_conf")]);
        assert_eq!(found.get(&root).cloned().flatten(), Some(["a"].map(OsString::from).into()));
        symlink("loop", root.join("loop")).unwrap();
        assert!(interests(&[&root.join("loop")]).contains_key(&root));
    }
}
