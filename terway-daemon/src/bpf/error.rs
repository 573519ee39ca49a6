//! What can go wrong between the daemon and the kernel's BPF.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;

/// A failed step of the datapath.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The daemon was built with `TERWAY_SKIP_EBPF=1`.
    #[error("this build has no eBPF programs: it was made with TERWAY_SKIP_EBPF=1")]
    NoPrograms,
    /// A file or folder on the bpffs.
    #[error("cannot use {}: {source} (is a bpffs mounted there?)", path.display())]
    Pin {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A cgroup, or a link to one.
    #[error("cannot attach to the cgroup {}: {source}", path.display())]
    Cgroup {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A pinned map is not what this version makes.
    #[error("the pinned map {} has {found}, but this version needs {wanted}; delete it to have it made anew", path.display())]
    Layout {
        /// Where it is pinned.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: String,
    },
    /// The object file could not be loaded.
    #[error("cannot load the eBPF object: {0}")]
    Object(#[from] aya::EbpfError),
    /// The object file lacks a map or a program.
    #[error("the eBPF object has no `{0}`")]
    Missing(String),
    /// The kernel refused a program, a link or a test run.
    #[error("program {name}: {source}")]
    Program {
        /// Which.
        name: String,
        /// Why; holds the verifier's words.
        source: Box<aya::programs::ProgramError>,
    },
    /// A pinned link could not be used.
    #[error("link of interface {ifindex}: {source}")]
    Link {
        /// The interface.
        ifindex: u32,
        /// Why.
        source: aya::programs::links::LinkError,
    },
    /// The kernel refused a map operation.
    #[error("map {name}: {source}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        source: MapError,
    },
    /// A netlink request failed.
    #[error("interface {ifindex}: {source}")]
    Netlink {
        /// Interface index; 0 if the request is about none.
        ifindex: u32,
        /// The request and its error.
        source: crate::net::NetError,
    },
    /// More endpoints than the datapath holds.
    #[error("the datapath holds at most {0} endpoints")]
    Full(u32),
    /// A Service map is full.
    #[error("the datapath holds at most {limit} {what}")]
    NoRoom {
        /// Of what.
        what: &'static str,
        /// How many it holds.
        limit: u32,
    },
    /// A map operation was not run because one that it depends on was refused.
    #[error("{0} was refused")]
    Dependency(&'static str),
    /// Some of several map operations were refused; the others are in effect.
    #[error("{count} map operations were refused, the first: {first}")]
    Refused {
        /// How many.
        count: usize,
        /// Why the first of them was.
        first: String,
    },
    /// The events are being read already.
    #[error("the drop events are being read already")]
    EventsTaken,
    /// A system call that none of the above covers.
    #[error("{call}: {source}")]
    System {
        /// Which.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl BpfError {
    /// Whether the interface that a step was about does not exist any more.
    pub(super) fn is_absent_interface(&self) -> bool {
        let errno = match self {
            Self::Netlink { source, .. } => source.errno(),
            Self::System { source, .. } => source.raw_os_error(),
            _ => None,
        };
        matches!(errno, Some(libc::ENODEV | libc::ENXIO))
    }

    /// One error for those of several operations; none if there are none.
    ///
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn of_all(errors: impl ExactSizeIterator<Item = String>) -> Result<(), Self> {
        let (count, mut errors) = (errors.len(), errors);
        errors.next().map_or(Ok(()), |first| Err(Self::Refused { count, first }))
    }

    /// Whether this says that the interface does not exist (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Netlink { source, .. } => matches!(source.errno(), Some(libc::ENODEV | libc::ENXIO)),
            Self::System { source, .. } => matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)),
            _ => false,
        }
    }

    pub(super) fn map(name: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Map { name, source }
    }

    pub(super) fn program(name: &str) -> impl FnOnce(aya::programs::ProgramError) -> Self {
        move |source| Self::Program { name: name.to_owned(), source: Box::new(source) }
    }
}

/// A deletion without the error that there was nothing to delete.
pub(super) fn ignore_absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
