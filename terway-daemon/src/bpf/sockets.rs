//! Handle of Service translation at the socket: programs on a cgroup, attached by links that are pinned and so outlive the daemon; and the
//! table of sockets whose peer they translated.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use parking_lot::Mutex;
use terway_abi::{Backend, SOCKET_REVERSE_NAT, SocketKey, SocketValue, names};

use super::address::{address_v4, address_v6};
use super::elements::Elements;
use super::error::{BpfError, ignore_absent};
use super::object::{LoadedPrograms, socket_program, take};
use super::pin::unlink;
use super::programs::Programs;
use super::sys;

/// The most entries of one listing, four times the size of the table. Iteration starts again at the beginning when the entry that was
/// read last is evicted meanwhile (`htab_map_get_next_key`, kernel/bpf/hashtab.c), so without a limit it might never end.
const LIST_LIMIT: usize = 262_144;

/// The result of attaching the socket programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketPrograms {
    /// The number of programs that are attached.
    pub attached: usize,
    /// Why the node's own processes can still bind the ports of Services, if they can.
    pub unprotected: Option<String>,
}

fn pin_path(links: &Path, name: &str) -> PathBuf {
    links.join(format!("socket-{name}"))
}

/// A socket entry: a socket whose peer was translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketRow {
    key: SocketKey,
    /// The socket's cookie.
    pub cookie: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// The backend that it was sent to.
    pub backend: SocketAddr,
    /// The frontend that its owner sees as peer.
    pub frontend: SocketAddr,
    /// Whether the backend is still of the generation that was chosen.
    pub alive: bool,
    /// The entry only tells where the next datagram of an unconnected socket goes.
    pub note: bool,
}

/// Handle of the socket programs and of the table that they write.
///
/// Its lock is that of the table, held for one listing; attaching takes the lock of the programs alone.
pub struct SocketTable {
    programs: Arc<Programs>,
    /// Folder of pinned links.
    links: PathBuf,
    sockets: Mutex<HashMap<MapData, SocketKey, SocketValue>>,
    /// Read only; [`ServiceMaps`](super::ServiceMaps) writes it.
    backends: Elements<u32, Backend>,
}

impl fmt::Debug for SocketTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketTable").field("links", &self.links).finish_non_exhaustive()
    }
}

impl SocketTable {
    pub(super) fn open(
        sockets: HashMap<MapData, SocketKey, SocketValue>,
        pins: &Path,
        programs: Arc<Programs>,
        links: PathBuf,
    ) -> Result<Self, BpfError> {
        let backends = Elements::open(pins, names::BACKENDS)?;
        Ok(Self { programs, links, sockets: Mutex::new(sockets), backends })
    }

    /// Attaches the programs that translate Services at the socket to a cgroup (version 2) and all below it, in place of those that an
    /// earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed; calling again completes it.
    pub fn attach(&self, cgroup: &Path) -> Result<SocketPrograms, BpfError> {
        attach(&mut self.programs.lock(), &self.links, cgroup)
    }

    /// The number of programs that are attached now. A cgroup that is removed takes its programs with it.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    pub fn attached(&self) -> Result<usize, BpfError> {
        attached(&self.links)
    }

    /// Detaches the programs. Not attached is no error.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    pub fn detach(&self) -> Result<(), BpfError> {
        detach(&self.links)
    }

    /// The sockets whose peer was translated, as far as the LRU table still has them, compared with their backend's current generation.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn list(&self) -> Result<Vec<SocketRow>, BpfError> {
        let (mut rows, mut generations) = (Vec::new(), std::collections::HashMap::new());
        for entry in self.sockets.lock().iter().take(LIST_LIMIT) {
            let (key, value) = entry.map_err(BpfError::map(names::SOCKET_NAT))?;
            let generation = *generations.entry(value.backend_ref.backend).or_insert_with_key(|number| {
                // A number beyond the map is from a map that was larger.
                self.backends.get(number).ok().flatten().unwrap_or_default().generation
            });
            rows.push(row(key, value, generation == value.backend_ref.generation));
        }
        Ok(rows)
    }

    /// Removes entries; the next replies that these sockets receive are not translated back.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn forget(&self, rows: &[SocketRow]) -> Result<(), BpfError> {
        let mut sockets = self.sockets.lock();
        rows.iter()
            .try_for_each(|row| ignore_absent(sockets.remove(&row.key)).map_err(BpfError::map(names::SOCKET_NAT)))
    }
}

/// The socket map out of the loaded object.
pub(super) fn take_sockets(loaded: &mut Ebpf) -> Result<HashMap<MapData, SocketKey, SocketValue>, BpfError> {
    take(loaded, names::SOCKET_NAT)
}

/// Attaches all programs to the cgroup. A link of an earlier daemon is updated in place.
fn attach(programs: &mut LoadedPrograms, links: &Path, cgroup: &Path) -> Result<SocketPrograms, BpfError> {
    let folder = File::open(cgroup).map_err(|source| BpfError::Cgroup { path: cgroup.to_owned(), source })?;
    for name in names::SOCKET_PROGRAMS {
        attach_one(programs, links, cgroup, &folder, name)?;
    }
    let mut result = SocketPrograms { attached: names::SOCKET_PROGRAMS.len(), unprotected: None };
    for name in names::BIND_PROGRAMS {
        // Without it Services are still served.
        match attach_one(programs, links, cgroup, &folder, name) {
            Ok(()) => result.attached += 1,
            Err(error) => result.unprotected = Some(error.to_string()),
        }
    }
    Ok(result)
}

fn attach_one(
    programs: &mut LoadedPrograms,
    links: &Path,
    cgroup: &Path,
    folder: &File,
    name: &'static str,
) -> Result<(), BpfError> {
    let failed = |source| BpfError::Cgroup { path: cgroup.to_owned(), source };
    // The number of a cgroup is that of its folder (fs/kernfs: `kernfs_id`).
    let number = folder.metadata().map_err(failed)?.ino();
    let program = socket_program(programs, name)?;
    let pin = pin_path(links, name);
    if let Some(link) = if_exists(sys::pinned(&pin), &pin)?
        && sys::cgroup_of(link.as_fd()).map_err(failed)? == Some(number)
    {
        let fd = program.fd().map_err(BpfError::program(name))?;
        return sys::update(link.as_fd(), fd.as_fd()).map_err(failed);
    }
    // There is no link yet, or it is of another cgroup.
    // Links only take this mode; they always allow several programs (`cgroup_bpf_link_attach`, kernel/bpf/cgroup.c).
    let id = program.attach(folder, CgroupAttachMode::Single).map_err(BpfError::program(name))?;
    let link = program.take_link(id).map_err(BpfError::program(name))?;
    let link = FdLink::try_from(link).map_err(|source| BpfError::Link { ifindex: 0, source })?;
    unlink(&pin)?;
    link.pin(&pin).map(drop).map_err(|source| BpfError::Pin { path: pin, source: io::Error::other(source) })
}

/// Unpins, and thereby detaches, all programs; those that translate replies last.
fn detach(links: &Path) -> Result<(), BpfError> {
    all().rev().try_for_each(|name| unlink(&pin_path(links, name)))
}

/// The number of programs that are attached.
fn attached(links: &Path) -> Result<usize, BpfError> {
    let mut count = 0;
    for name in all() {
        let pin = pin_path(links, name);
        let Some(link) = if_exists(sys::pinned(&pin), &pin)? else { continue };
        let cgroup = sys::cgroup_of(link.as_fd()).map_err(|source| BpfError::Pin { path: pin, source })?;
        count += usize::from(cgroup.is_some());
    }
    Ok(count)
}

fn all() -> impl DoubleEndedIterator<Item = &'static str> {
    names::SOCKET_PROGRAMS.into_iter().chain(names::BIND_PROGRAMS)
}

/// Nothing instead of the error that there is no such file.
fn if_exists<T>(found: io::Result<T>, path: &Path) -> Result<Option<T>, BpfError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BpfError::Pin { path: path.to_owned(), source }),
    }
}

fn row(key: SocketKey, value: SocketValue, alive: bool) -> SocketRow {
    let [high, low, version, protocol] = key.class.to_ne_bytes();
    let address = |words: [u32; 4]| match version {
        4 => IpAddr::V4(address_v4(words[0])),
        _ => IpAddr::V6(address_v6(words)),
    };
    let [value_high, value_low, ..] = value.port.to_ne_bytes();
    let named = SocketAddr::new(address(key.address), u16::from_be_bytes([high, low]));
    let other = SocketAddr::new(address(value.address), u16::from_be_bytes([value_high, value_low]));
    let note = key.kind != SOCKET_REVERSE_NAT;
    let (backend, frontend) = if note { (other, named) } else { (named, other) };
    let number = |[low, high]: [u32; 2]| u64::from(low) | u64::from(high) << 32;
    SocketRow { key, cookie: number(key.cookie), netns: number(value.netns), protocol, backend, frontend, alive, note }
}
