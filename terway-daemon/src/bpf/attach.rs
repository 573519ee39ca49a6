//! Programs on ENIs by TCX links, which are pinned so that they outlive the daemon and are updated in place by the next one.
//!
//! Links are pinned outside of the versioned folder: the next version of the daemon takes them over.

use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{ProgramError, TcAttachType};
use terway_abi::Program;

use super::error::BpfError;
use super::object::LoadedPrograms;
use super::pin::unlink;

/// How an ENI was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EniHook {
    /// By TCX links.
    Tcx,
    /// By classifiers of a clsact qdisc.
    Clsact,
}

const HOOKS: [(TcAttachType, Program, &str); 2] =
    [(TcAttachType::Ingress, Program::FromVpc, "ingress"), (TcAttachType::Egress, Program::ToVpc, "egress")];

fn pin_path(links: &Path, ifindex: u32, hook: &str) -> PathBuf {
    links.join(format!("eni-{ifindex}-{hook}"))
}

pub(super) fn tcx(programs: &mut LoadedPrograms, links: &Path, ifindex: u32) -> Result<(), BpfError> {
    for (hook, program, name) in HOOKS {
        let pin = pin_path(links, ifindex, name);
        if adopt(programs, program, &pin)? {
            continue;
        }
        // aya takes names only. A rename between the two calls would attach to nothing or to another interface; the daemon is the
        // one who names these.
        let interface = nix::net::if_::if_indextoname(ifindex)
            .map_err(|errno| BpfError::System { call: "if_indextoname", source: errno.into() })?;
        let interface = interface.to_string_lossy();
        let failed = |source| BpfError::program(program.name())(source);
        let classifier = programs.get_mut(program)?;
        let id = classifier
            .attach_with_options(&interface, hook, TcAttachOptions::TcxOrder(LinkOrder::default()))
            .map_err(failed)?;
        let link = classifier.take_link(id).map_err(failed)?;
        let link = FdLink::try_from(link).map_err(|source| BpfError::Link { ifindex, source })?;
        link.pin(&pin).map_err(|source| BpfError::Pin { path: pin.clone(), source: io::Error::other(source) })?;
    }
    Ok(())
}

/// Puts the new program into the link that an earlier daemon pinned; `false` if there is none that still works.
fn adopt(programs: &mut LoadedPrograms, program: Program, pin: &Path) -> Result<bool, BpfError> {
    let link = match PinnedLink::from_pin(pin) {
        Ok(link) => link,
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(BpfError::Pin { path: pin.to_owned(), source: io::Error::other(error) }),
    };
    let classifier = programs.get_mut(program)?;
    let updated = SchedClassifierLink::try_from(FdLink::from(link))
        .map_err(ProgramError::from_link_error)
        .and_then(|link| classifier.attach_to_link(link))
        // Taken and closed: the pin holds the link.
        .and_then(|id| classifier.take_link(id));
    match updated {
        Ok(link) => {
            drop(link);
            Ok(true)
        }
        Err(error) => {
            // The interface is gone and another one has its index (`tcx_link_update`: ENOLINK), or the pin is something else.
            tracing::info!(pin = %pin.display(), %error, "a pinned link cannot be updated and is made anew");
            unlink(pin)?;
            Ok(false)
        }
    }
}

/// A link error as a program error, so that both kinds of failure are handled in one place.
trait FromLinkError {
    fn from_link_error(error: LinkError) -> Self;
}

impl FromLinkError for ProgramError {
    fn from_link_error(error: LinkError) -> Self {
        Self::IOError(io::Error::other(error))
    }
}

/// Unpins, and thereby detaches, the links of an interface.
pub(super) fn detach(links: &Path, ifindex: u32) -> Result<(), BpfError> {
    HOOKS.iter().try_for_each(|(_, _, name)| unlink(&pin_path(links, ifindex, name)))
}

/// The interface indices that have pinned links.
#[cfg(feature = "test-api")]
pub(super) fn pinned_ifindexes(links: &Path) -> Result<Vec<u32>, BpfError> {
    let failed = |source| BpfError::Pin { path: links.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(links).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let ifindex = name.to_str().and_then(|name| name.strip_prefix("eni-")?.split('-').next()?.parse::<u32>().ok());
        found.extend(ifindex);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
