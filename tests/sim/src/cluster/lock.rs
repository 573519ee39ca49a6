//! How many clusters run on a machine at a time: as many as its CPUs can serve, or one alone.
//!
//! Clusters share nothing but the CPUs: names, folders, cgroups and namespaces carry the cluster's prefix. Locks are files in /tmp
//! (flock(2)), so that they hold between processes and end with them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Where the lock files are; the first part of their names.
const FILES: &str = "/tmp/terway-tests";

/// Overrides how many clusters may run at a time.
const CLUSTERS: &str = "TERWAY_CLUSTERS";

/// Time between two attempts to get a lock.
const RETRY: Duration = Duration::from_millis(10);

/// The permission to run a cluster; it ends on drop.
#[derive(Debug)]
pub(super) struct ClusterLock {
    _machine: Flock<File>,
    _slot: Option<Flock<File>>,
}

impl ClusterLock {
    /// Waits until a cluster may run: alone on the machine if `exclusive`, else beside at most `slots() - 1` others.
    ///
    /// # Errors
    /// When `interrupted` becomes true meanwhile, or a lock file cannot be opened.
    pub(super) fn acquire(exclusive: bool, interrupted: &AtomicBool) -> Result<Self> {
        Self::acquire_at(Path::new(FILES), slots(), exclusive, interrupted)
    }

    fn acquire_at(files: &Path, slots: usize, exclusive: bool, interrupted: &AtomicBool) -> Result<Self> {
        let file = |suffix: &str| PathBuf::from(format!("{}{suffix}", files.display()));
        // Held while waiting, so that clusters start in the order they came: one that wants to be alone would starve otherwise.
        let _queue = wait(&[file(".queue")], FlockArg::LockExclusiveNonblock, interrupted)?;
        let mode = if exclusive { FlockArg::LockExclusiveNonblock } else { FlockArg::LockSharedNonblock };
        let machine = wait(&[file(".lock")], mode, interrupted)?;
        let slots: Vec<PathBuf> = (0..slots).map(|number| file(&format!(".slot{number}"))).collect();
        let slot = if exclusive { None } else { Some(wait(&slots, FlockArg::LockExclusiveNonblock, interrupted)?) };
        Ok(Self { _machine: machine, _slot: slot })
    }
}

/// Clusters at a time, as long as none of them has to be alone: one for each CPU, and two at least, for a cluster waits more than it works.
fn slots() -> usize {
    let configured = std::env::var(CLUSTERS).ok().and_then(|text| text.parse().ok());
    configured.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from).max(2)).max(1)
}

/// Waits for the first of these files that can be locked.
fn wait(files: &[PathBuf], mode: FlockArg, interrupted: &AtomicBool) -> Result<Flock<File>> {
    loop {
        for path in files {
            let file = File::options().create(true).truncate(false).write(true).open(path);
            match Flock::lock(file.with_context(|| format!("open {}", path.display()))?, mode) {
                Ok(locked) => return Ok(locked),
                Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => {}
                Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
            }
        }
        if interrupted.load(Ordering::Acquire) {
            bail!("interrupted while other clusters run");
        }
        std::thread::sleep(RETRY);
    }
}

/// Waits until no other process clears clusters away.
pub(super) fn sweeping() -> Result<Flock<File>> {
    wait(&[PathBuf::from(format!("{FILES}.sweep"))], FlockArg::LockExclusiveNonblock, &AtomicBool::new(false))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    #[test]
    fn clusters_share_the_machine_up_to_the_number_of_slots() {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("t");
        let (sender, acquired) = channel();
        let go = AtomicBool::new(false);
        let first = ClusterLock::acquire_at(&files, 2, false, &go).unwrap();
        let _second = ClusterLock::acquire_at(&files, 2, false, &go).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let third = ClusterLock::acquire_at(&files, 2, false, &go).unwrap();
                sender.send(()).unwrap();
                drop(third);
            });
            assert!(acquired.recv_timeout(SOON).is_err(), "three clusters in two slots");
            drop(first);
            acquired.recv().unwrap();
        });
    }

    #[test]
    fn an_exclusive_cluster_is_alone_and_does_not_starve() {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("t");
        let (sender, acquired) = channel();
        let go = AtomicBool::new(false);
        let shared = ClusterLock::acquire_at(&files, 4, false, &go).unwrap();
        std::thread::scope(|scope| {
            let (files, go, early) = (&files, &go, sender.clone());
            scope.spawn(move || {
                let exclusive = ClusterLock::acquire_at(files, 4, true, go).unwrap();
                early.send("exclusive").unwrap();
                std::thread::sleep(SOON);
                drop(exclusive);
            });
            assert!(acquired.recv_timeout(SOON).is_err(), "an exclusive cluster beside another");
            let late = sender.clone();
            scope.spawn(move || {
                let _shared = ClusterLock::acquire_at(files, 4, false, go).unwrap();
                late.send("shared").unwrap();
            });
            assert!(acquired.recv_timeout(SOON).is_err(), "a later cluster overtakes the one that waits to be alone");
            drop(shared);
            assert_eq!((acquired.recv().unwrap(), acquired.recv().unwrap()), ("exclusive", "shared"));
        });
    }

    #[test]
    fn waiting_ends_with_an_interruption() {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("t");
        let _alone = ClusterLock::acquire_at(&files, 1, true, &AtomicBool::new(false)).unwrap();
        assert!(ClusterLock::acquire_at(&files, 1, false, &AtomicBool::new(true)).is_err());
    }
}
