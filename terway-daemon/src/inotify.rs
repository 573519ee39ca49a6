//! An inotify descriptor that tokio can wait on, and whose end delays nobody.

use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::{io, mem};

use nix::errno::Errno;
use nix::sys::inotify::{InitFlags, Inotify, InotifyEvent};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::supervise::{self, OnPanic};

/// Closing one waits for a grace period of SRCU (fs/notify/group.c, `fsnotify_destroy_group`): milliseconds mostly, seconds on a busy machine.
/// So that is done on a thread of its own, never on one of the runtime's.
#[derive(Debug)]
pub(crate) struct Descriptor(Option<Inotify>);

impl Descriptor {
    /// Makes one that does not block.
    pub(crate) fn init() -> io::Result<Inotify> {
        Ok(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?)
    }

    /// Registers it with the runtime.
    pub(crate) fn register(inotify: Inotify) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is owned here, is the same one each time, and is closed only after this is dropped, which is in the `AsyncFd`.
        unsafe { AsyncFd::register_with_interest(Self(Some(inotify)), Interest::READABLE) }.map_err(Into::into)
    }

    /// What has happened; `EAGAIN` if nothing has.
    pub(crate) fn read_events(&self) -> Result<Vec<InotifyEvent>, Errno> {
        self.0.as_ref().map_or(Err(Errno::EBADF), Inotify::read_events)
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_ref().map_or(-1, |inotify| inotify.as_fd().as_raw_fd())
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let inotify = mem::take(&mut self.0);
        // Without a thread it is closed here, as the closure is dropped.
        let _detached = supervise::spawn_thread("inotify-close", OnPanic::Contain, move || drop(inotify));
    }
}
