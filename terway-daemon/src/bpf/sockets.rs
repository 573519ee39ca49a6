//! The programs on sockets, attached to a cgroup by links that are pinned and so outlive the daemon.

use std::fs::File;
use std::io;
use std::path::Path;

use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use terway_abi::names;

use super::error::BpfError;
use super::object::{Programs, socket_program};
use super::pin::unlink;

fn pin_path(links: &Path, name: &str) -> std::path::PathBuf {
    links.join(format!("socket-{name}"))
}

/// Attaches all programs to the cgroup, in place of those that an earlier daemon attached.
///
/// Links of cgroups cannot be updated with this version of aya, so for a moment both run. That changes nothing: what the first
/// has translated is no Service's any more.
pub(super) fn attach(programs: &mut Programs, links: &Path, cgroup: &Path) -> Result<(), BpfError> {
    let folder = File::open(cgroup).map_err(|source| BpfError::Pin { path: cgroup.to_owned(), source })?;
    for name in names::SOCKET_PROGRAMS {
        let program = socket_program(programs, name)?;
        // The other modes are refused for links, which are all that they say anyway (`cgroup_bpf_link_attach`).
        let id = program.attach(&folder, CgroupAttachMode::Single).map_err(BpfError::program(name))?;
        let link = program.take_link(id).map_err(BpfError::program(name))?;
        let link = FdLink::try_from(link).map_err(|source| BpfError::Link { ifindex: 0, source })?;
        let pin = pin_path(links, name);
        unlink(&pin)?;
        link.pin(&pin).map_err(|source| BpfError::Pin { path: pin.clone(), source: io::Error::other(source) })?;
    }
    Ok(())
}

/// Unpins, and thereby detaches, all programs.
pub(super) fn detach(links: &Path) -> Result<(), BpfError> {
    names::SOCKET_PROGRAMS.iter().try_for_each(|name| unlink(&pin_path(links, name)))
}
