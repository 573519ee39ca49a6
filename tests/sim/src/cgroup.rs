//! A cgroup of version 2 for each node: what the node's programs on sockets are attached to, and what its processes are put into.
//!
//! A socket belongs to the cgroup of the thread that makes it. So that threads of one test can act for different nodes, such cgroups are
//! *threaded* (Documentation/admin-guide/cgroup-v2.rst, "Threads"), which they can be below the root, where the process must be then.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::containerd::remove_tree;

/// How long a cgroup may be busy: until the last of its processes is reaped.
const BUSY: Duration = Duration::from_secs(2);

/// Mounts the hierarchy at `at`, which is made: every mount shows the same one.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_at(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), at, Some("cgroup2"), flags, None::<&str>).context("mount the cgroup hierarchy")
}

/// The cgroup of a node.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Where processes and threads are put; open, so that a child can use them between fork and exec.
    members: Option<(File, File)>,
}

impl Cgroup {
    /// Makes `name` in the hierarchy mounted at `root`. With `members`, threads of this process may enter it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(root: &Path, name: &str, members: bool) -> Result<Self> {
        let path = root.join(name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let mut cgroup = Self { path, members: None };
        if members {
            // A service manager may have put us elsewhere; nothing is lost by leaving, for a test has no limits to keep.
            let own = fs::read_to_string("/proc/self/cgroup")?;
            if !own.lines().any(|line| line == "0::/") {
                fs::write(root.join("cgroup.procs"), "0").context("move to the root cgroup")?;
            }
            fs::write(cgroup.path.join("cgroup.type"), "threaded").context("make a threaded cgroup")?;
            let open = |name| File::options().write(true).open(cgroup.path.join(name));
            cgroup.members = Some((open("cgroup.procs")?, open("cgroup.threads")?));
        }
        Ok(cgroup)
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the calling thread into it.
    ///
    /// # Errors
    /// When it takes no members, or the kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        let (_, threads) = self.members.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mut threads: &File = threads;
        threads.write_all(b"0")
    }

    /// What a child process writes `0` to, to be in it.
    #[must_use]
    pub fn door(&self) -> Option<BorrowedFd<'_>> {
        self.members.as_ref().map(|(processes, _)| processes.as_fd())
    }

    /// Removes it with all below it.
    ///
    /// # Errors
    /// When somebody is still in it after two seconds.
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + BUSY;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("remove {}", self.path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}
