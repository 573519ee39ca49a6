//! The programs on sockets, attached to a cgroup by links that are pinned and so outlive the daemon; and the table of what they did.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use terway_abi::{Backend, SocketKey, SocketValue, TO_BACKEND, names};

use super::endpoints::{absent_is_fine, address_v4, address_v6};
use super::error::BpfError;
use super::object::{Programs, socket_program};
use super::pin::unlink;
use super::sys;

/// Entries read in one go. Reading begins again when the entry that was read last is evicted meanwhile (`htab_map_get_next_key`), so
/// that a table in turmoil would have no end; this is four times its size.
const ENOUGH: usize = 262_144;

/// What came of attaching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketPrograms {
    /// How many programs are attached.
    pub attached: usize,
    /// Why the node's own processes are not kept off the ports of Services, if they are not.
    pub unprotected: Option<String>,
}

fn pin_path(links: &Path, name: &str) -> PathBuf {
    links.join(format!("socket-{name}"))
}

/// Attaches all programs to the cgroup. A link that an earlier daemon left there gets the new program in place of its own.
pub(super) fn attach(programs: &mut Programs, links: &Path, cgroup: &Path) -> Result<SocketPrograms, BpfError> {
    let folder = File::open(cgroup).map_err(|source| BpfError::Cgroup { path: cgroup.to_owned(), source })?;
    for name in names::SOCKET_PROGRAMS {
        attach_one(programs, links, cgroup, &folder, name)?;
    }
    let mut result = SocketPrograms { attached: names::SOCKET_PROGRAMS.len(), unprotected: None };
    for name in names::BIND_PROGRAMS {
        // Services are served without it.
        match attach_one(programs, links, cgroup, &folder, name) {
            Ok(()) => result.attached += 1,
            Err(error) => result.unprotected = Some(error.to_string()),
        }
    }
    Ok(result)
}

fn attach_one(
    programs: &mut Programs,
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
    if let Some(link) = there_is(sys::pinned(&pin), &pin)?
        && sys::cgroup_of(link.as_fd()).map_err(failed)? == Some(number)
    {
        let fd = program.fd().map_err(BpfError::program(name))?;
        return sys::update(link.as_fd(), fd.as_fd()).map_err(failed);
    }
    // None yet, or of another cgroup.
    // The other modes are refused for links, which are all that they say anyway (`cgroup_bpf_link_attach`).
    let id = program.attach(folder, CgroupAttachMode::Single).map_err(BpfError::program(name))?;
    let link = program.take_link(id).map_err(BpfError::program(name))?;
    let link = FdLink::try_from(link).map_err(|source| BpfError::Link { ifindex: 0, source })?;
    unlink(&pin)?;
    link.pin(&pin).map(drop).map_err(|source| BpfError::Pin { path: pin, source: io::Error::other(source) })
}

/// Unpins, and thereby detaches, all programs: what translates goes before what translates back.
pub(super) fn detach(links: &Path) -> Result<(), BpfError> {
    all().rev().try_for_each(|name| unlink(&pin_path(links, name)))
}

/// How many of the programs are attached.
pub(super) fn attached(links: &Path) -> Result<usize, BpfError> {
    let mut count = 0;
    for name in all() {
        let pin = pin_path(links, name);
        let Some(link) = there_is(sys::pinned(&pin), &pin)? else { continue };
        let cgroup = sys::cgroup_of(link.as_fd()).map_err(|source| BpfError::Pin { path: pin, source })?;
        count += usize::from(cgroup.is_some());
    }
    Ok(count)
}

fn all() -> impl DoubleEndedIterator<Item = &'static str> {
    names::SOCKET_PROGRAMS.into_iter().chain(names::BIND_PROGRAMS)
}

/// What is there, and nothing if it is not.
fn there_is<T>(found: io::Result<T>, path: &Path) -> Result<Option<T>, BpfError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BpfError::Pin { path: path.to_owned(), source }),
    }
}

/// A socket whose peer was translated.
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
    /// The frontend that its owner believes to talk to.
    pub frontend: SocketAddr,
    /// Whether that backend still lives as it did then.
    pub alive: bool,
    /// It is only a note where the next datagram of a socket goes that is not connected.
    pub note: bool,
}

/// The maps.
pub(super) struct Table {
    sockets: HashMap<MapData, SocketKey, SocketValue>,
    backends: Array<MapData, Backend>,
}

impl Table {
    /// Opens the maps under their pins.
    pub(super) fn open(pins: &Path) -> Result<Self, BpfError> {
        fn typed<M: TryFrom<Map, Error = MapError>>(
            pins: &Path,
            name: &'static str,
            kind: impl FnOnce(MapData) -> Map,
        ) -> Result<M, BpfError> {
            let data = MapData::from_pin(pins.join(name)).map_err(BpfError::map(name))?;
            M::try_from(kind(data)).map_err(BpfError::map(name))
        }
        Ok(Self {
            sockets: typed(pins, names::SOCKETS, Map::LruHashMap)?,
            backends: typed(pins, names::BACKENDS, Map::Array)?,
        })
    }

    pub(super) fn list(&self) -> Result<Vec<SocketRow>, BpfError> {
        let (mut rows, mut lives) = (Vec::new(), std::collections::HashMap::new());
        for entry in self.sockets.iter().take(ENOUGH) {
            let (key, value) = entry.map_err(BpfError::map(names::SOCKETS))?;
            let life = *lives.entry(value.member.backend).or_insert_with_key(|number| {
                // A number beyond the map is of a map that was larger.
                self.backends.get(number, 0).unwrap_or_default().generation
            });
            rows.push(row(key, value, life == value.member.generation));
        }
        Ok(rows)
    }

    pub(super) fn forget(&mut self, rows: &[SocketRow]) -> Result<(), BpfError> {
        rows.iter()
            .try_for_each(|row| absent_is_fine(self.sockets.remove(&row.key)).map_err(BpfError::map(names::SOCKETS)))
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
    let note = key.kind != TO_BACKEND;
    let (backend, frontend) = if note { (other, named) } else { (named, other) };
    let number = |[low, high]: [u32; 2]| u64::from(low) | u64::from(high) << 32;
    SocketRow { key, cookie: number(key.cookie), netns: number(value.netns), protocol, backend, frontend, alive, note }
}
