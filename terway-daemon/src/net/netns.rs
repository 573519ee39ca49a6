//! Pods' network namespaces, and the threads that enter them.
//!
//! A thread that has called `setns(2)` must never run anything else, so that work is done by a few threads of its own kind, and no runtime
//! thread is ever moved. Work in the node's namespace runs there too: it waits for the kernel's RTNL mutex, which a runtime thread
//! should not.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};
use tokio::sync::oneshot;

use super::NetError;
use super::socket::Netlink;

/// `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// Where a thread finds the namespace it is in itself; `/proc/self` would be the process's first thread.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// An open network namespace. As long as one is held, the kernel keeps the namespace, whatever becomes of its path.
#[derive(Clone, Debug)]
pub struct PodNetns {
    file: Arc<File>,
    id: (u64, u64),
}

impl PodNetns {
    /// Opens the network namespace of a pod.
    ///
    /// # Errors
    /// [`NetError::Netns`] if the path is not there, is no network namespace, or is the calling thread's own.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetError> {
        let path = path.as_ref();
        let wrong = |reason: String| NetError::Netns { path: path.display().to_string(), reason };
        let netns = Self::open_any(path).map_err(wrong)?;
        let own = Self::open_any(Path::new(OWN_NETNS)).map_err(wrong)?;
        if netns.id == own.id {
            return Err(wrong("this is the node's own network namespace".to_owned()));
        }
        Ok(netns)
    }

    /// The calling thread's network namespace.
    pub(super) fn own() -> Result<Self, NetError> {
        Self::open_any(Path::new(OWN_NETNS)).map_err(|reason| NetError::Netns { path: OWN_NETNS.to_owned(), reason })
    }

    fn open_any(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let kind = fstatfs(&file).map_err(|errno| errno.to_string())?.filesystem_type();
        // SAFETY: the request takes no argument and the descriptor is open.
        let is_net = || unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) } == libc::CLONE_NEWNET;
        if kind != NSFS_MAGIC || !is_net() {
            return Err("this is no network namespace".to_owned());
        }
        let meta = file.metadata().map_err(|error| error.to_string())?;
        Ok(Self { file: Arc::new(file), id: (meta.dev(), meta.ino()) })
    }

    /// Device and inode number: two paths lead to one namespace if these are equal.
    #[must_use]
    pub const fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Moves the calling thread into this namespace.
    pub(super) fn enter(&self) -> Result<(), NetError> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetError::io("enter a network namespace", errno))
    }
}

impl AsRawFd for PodNetns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for PodNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// The threads. Dropping the pool lets them finish what is queued.
pub struct NetnsPool {
    shared: Arc<Shared>,
}

struct Shared {
    home: PodNetns,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // No job runs under the lock, so that a panic leaves the queue whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up: what is queued, and what will be, fails with [`NetError::Worker`] instead of waiting for ever.
    fn close(&self) {
        let abandoned = {
            let mut queue = self.queue();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        drop(abandoned);
        self.wake.notify_all();
    }
}

/// What a thread of the pool has at hand.
pub struct Worker {
    home: PodNetns,
    host: Option<Netlink>,
    /// The thread could not return to the node's namespace and must end.
    stray: bool,
}

impl NetnsPool {
    /// Starts `threads` threads whose home is the calling thread's network namespace.
    ///
    /// # Errors
    /// When the own namespace cannot be opened or no thread can be started.
    pub fn new(threads: usize) -> Result<Self, NetError> {
        let shared = Arc::new(Shared { home: PodNetns::own()?, queue: Mutex::default(), wake: Condvar::new() });
        for _ in 0..threads {
            start(&shared, false).map_err(|source| NetError::io("start a network thread", source))?;
        }
        Ok(Self { shared })
    }

    /// The namespace that the threads come from: the node's.
    pub(super) fn home(&self) -> &PodNetns {
        &self.shared.home
    }

    /// Runs `job` on one of the threads.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let (done, result) = oneshot::channel();
        self.push(Box::new(move |worker| {
            // The caller may have lost its patience; the work is done all the same.
            let _ = done.send(job(worker));
        }));
        result.await.unwrap_or(Err(NetError::Worker))
    }

    /// Runs `job` on one of the threads, inside the namespace `netns`.
    ///
    /// # Errors
    /// [`NetError::Worker`] if the job panicked; else the job's own, or why the namespace could not be entered.
    pub async fn run_in<T: Send + 'static>(
        &self,
        netns: &PodNetns,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetError> {
        let netns = netns.clone();
        self.run(move |worker| worker.inside(&netns, |_| Ok(job()))).await
    }

    /// Runs `job` on one of the threads, in the node's namespace.
    ///
    /// # Errors
    /// [`NetError::Worker`] if the job panicked.
    pub async fn run_at_home<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetError> {
        self.run(move |_| Ok(job())).await
    }

    fn push(&self, job: Job) {
        let mut queue = self.shared.queue();
        if !queue.closed {
            queue.jobs.push_back(job);
        }
        // A thread that wakes must not find the lock still held.
        drop(queue);
        self.shared.wake.notify_one();
    }
}

impl Drop for NetnsPool {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Worker {
    /// The socket in the node's namespace.
    pub(super) fn host(&mut self) -> Result<&mut Netlink, NetError> {
        if self.host.is_none() {
            self.host = Some(Netlink::open()?);
        }
        // Opened one line above.
        self.host.as_mut().ok_or(NetError::Worker)
    }

    /// Runs `job` with this thread inside `netns`, and the socket in the node's namespace at hand.
    pub(super) fn inside<T>(
        &mut self,
        netns: &PodNetns,
        job: impl FnOnce(&mut Netlink) -> Result<T, NetError>,
    ) -> Result<T, NetError> {
        self.host()?;
        netns.enter()?;
        let _way_back = WayBack { home: &self.home, stray: &mut self.stray };
        self.host.as_mut().map_or(Err(NetError::Worker), job)
    }
}

/// Brings the thread home, be it by return or by panic.
struct WayBack<'a> {
    home: &'a PodNetns,
    stray: &'a mut bool,
}

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.home.enter() {
            tracing::error!(%error, "a network thread cannot return to the node's namespace and ends");
            *self.stray = true;
        }
    }
}

fn start(shared: &Arc<Shared>, replacement: bool) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let body = move || serve(&shared, replacement);
    thread::Builder::new().name("netns".to_owned()).stack_size(512 * 1024).spawn(body).map(drop)
}

fn serve(shared: &Arc<Shared>, replacement: bool) {
    // A thread starts where its parent is, and the parent of a replacement is astray.
    if replacement && let Err(error) = shared.home.enter() {
        tracing::error!(%error, "a network thread cannot enter the node's namespace");
        shared.close();
        return;
    }
    let mut worker = Worker { home: shared.home.clone(), host: None, stray: false };
    while let Some(job) = next(shared) {
        if catch_unwind(AssertUnwindSafe(|| job(&mut worker))).is_err() {
            tracing::error!("a network job panicked");
            // It may have left half an exchange behind.
            worker.host = None;
        }
        if worker.stray {
            if let Err(error) = start(shared, true) {
                tracing::error!(%error, "cannot replace a network thread");
                shared.close();
            }
            return;
        }
    }
}

fn next(shared: &Shared) -> Option<Job> {
    let mut queue = shared.queue();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            return Some(job);
        }
        if queue.closed {
            return None;
        }
        queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}
