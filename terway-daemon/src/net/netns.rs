//! Network namespaces of pods, and the thread pool that enters them.
//!
//! `setns(2)` changes the namespace of one thread. A runtime thread must never be moved, because its other tasks would run in the wrong
//! namespace; so this work runs on threads of its own. Work in the node's namespace runs there, too: it blocks on the kernel's RTNL mutex,
//! which a runtime thread must not do.
//!
//! A panic in a job is caught: its caller gets [`NetError::Worker`], the thread returns to the node's namespace and drops its socket, on which
//! replies may be pending. A thread that cannot return is replaced.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::NetError;
use super::socket::NetlinkSocket;
use crate::supervise::{self, OnPanic};

/// `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// Path of the calling thread's own namespace; `/proc/self` would be that of the process's main thread.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// An open network namespace. The open file keeps the namespace alive, even if its path is removed.
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

    /// Device and inode number of the namespace; equal for all paths to one namespace.
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

/// The thread pool. Dropping it lets the threads finish the queued jobs.
pub struct NetnsPool {
    shared: Arc<Shared>,
}

/// Port ids of the netlink sockets by which the pool changes the node's namespace.
#[derive(Debug, Default)]
pub(super) struct PortSet(Mutex<BTreeSet<u32>>);

impl PortSet {
    fn ports(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        // Nothing under the lock can panic.
        self.0.lock()
    }

    pub(super) fn contains(&self, port: u32) -> bool {
        self.ports().contains(&port)
    }
}

struct Shared {
    host_netns: PodNetns,
    ports: Arc<PortSet>,
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
        // No job runs under the lock, so a panic cannot leave the queue inconsistent.
        self.queue.lock()
    }

    /// Closes the pool after its threads could not be replaced: queued and later jobs fail with [`NetError::Worker`] instead of waiting forever.
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

/// State of one thread of the pool.
pub struct Worker {
    host_netns: PodNetns,
    /// Socket in the node's namespace, opened on first use.
    host: Option<NetlinkSocket>,
    ports: Arc<PortSet>,
    /// Set when the thread could not return to the node's namespace; it must end.
    cannot_return: bool,
}

impl NetnsPool {
    /// Starts a pool of `threads` threads. The calling thread's network namespace becomes the node's.
    ///
    /// # Errors
    /// When the own namespace cannot be opened or no thread can be started.
    pub fn new(threads: usize) -> Result<Self, NetError> {
        let shared = Arc::new(Shared {
            host_netns: PodNetns::own()?,
            ports: Arc::default(),
            queue: Mutex::default(),
            wake: Condvar::new(),
        });
        for _ in 0..threads {
            start(&shared, false).map_err(|source| NetError::io("start a network thread", source))?;
        }
        Ok(Self { shared })
    }

    /// The node's network namespace.
    pub(super) fn host_netns(&self) -> &PodNetns {
        &self.shared.host_netns
    }

    /// Port ids of the sockets by which the pool changes the node's namespace.
    pub(super) fn own_ports(&self) -> Arc<PortSet> {
        Arc::clone(&self.shared.ports)
    }

    /// Runs `job` on one of the threads.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let (done, result) = oneshot::channel();
        self.push(Box::new(move |worker| {
            // The caller's future may have been dropped; the job is finished all the same.
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
    pub async fn run_in_host<T: Send + 'static>(
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
        // Unlock first, so that the woken thread does not block on the mutex.
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
    pub(super) fn host(&mut self) -> Result<&mut NetlinkSocket, NetError> {
        if self.host.is_none() {
            let socket = NetlinkSocket::route()?;
            self.ports.ports().insert(socket.port());
            self.host = Some(socket);
        }
        // Opened one line above.
        self.host.as_mut().ok_or(NetError::Worker)
    }

    /// Closes the socket in the node's namespace; the next job opens another.
    fn close_host(&mut self) {
        if let Some(socket) = self.host.take() {
            self.ports.ports().remove(&socket.port());
        }
    }

    /// Runs `job` with this thread inside `netns`; `job` gets the socket of the node's namespace.
    pub(super) fn inside<T>(
        &mut self,
        netns: &PodNetns,
        job: impl FnOnce(&mut NetlinkSocket) -> Result<T, NetError>,
    ) -> Result<T, NetError> {
        self.host()?;
        netns.enter()?;
        let _return = ReturnToHost { host_netns: &self.host_netns, cannot_return: &mut self.cannot_return };
        self.host.as_mut().map_or(Err(NetError::Worker), job)
    }
}

/// Guard that moves the thread back into the node's namespace, after a panic, too.
struct ReturnToHost<'a> {
    host_netns: &'a PodNetns,
    cannot_return: &'a mut bool,
}

impl Drop for ReturnToHost<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.host_netns.enter() {
            tracing::error!(%error, "a network thread cannot return to the node's namespace and ends");
            *self.cannot_return = true;
        }
    }
}

fn start(shared: &Arc<Shared>, replacement: bool) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let body = move || serve(&shared, replacement);
    let builder = thread::Builder::new().stack_size(512 * 1024);
    supervise::spawn_thread_from(builder, "netns", OnPanic::Contain, body).map(drop)
}

fn serve(shared: &Arc<Shared>, replacement: bool) {
    // A thread inherits the namespace of its parent, and the parent of a replacement is in the wrong one.
    if replacement && let Err(error) = shared.host_netns.enter() {
        tracing::error!(%error, "a network thread cannot enter the node's namespace");
        shared.close();
        return;
    }
    let ports = Arc::clone(&shared.ports);
    let mut worker = Worker { host_netns: shared.host_netns.clone(), host: None, ports, cannot_return: false };
    while let Some(job) = next(shared) {
        if catch_unwind(AssertUnwindSafe(|| job(&mut worker))).is_err() {
            tracing::error!("a job of the network thread pool panicked");
            // Replies to a half-finished exchange may be pending in it.
            worker.close_host();
        }
        if worker.cannot_return {
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
        shared.wake.wait(&mut queue);
    }
}
