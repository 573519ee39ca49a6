//! Handle of the programs' attachments to interfaces.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use terway_abi::Program;

use super::attach::{self, EniHook};
use super::clsact;
use super::error::BpfError;
use super::programs::Programs;

/// Handle of the attachments of programs to pods' interfaces and ENIs.
///
/// Its lock is that of the netlink socket, held for one request.
pub struct Interfaces {
    programs: Arc<Programs>,
    netlink: Mutex<clsact::Socket>,
    /// Folder of pinned links.
    links: PathBuf,
    /// ENIs are attached by TCX links.
    tcx: bool,
}

impl fmt::Debug for Interfaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interfaces").field("links", &self.links).field("tcx", &self.tcx).finish_non_exhaustive()
    }
}

impl Interfaces {
    pub(super) fn open(programs: Arc<Programs>, links: PathBuf, tcx: bool) -> Result<Self, BpfError> {
        Ok(Self { programs, netlink: Mutex::new(clsact::Socket::open()?), links, tcx })
    }

    /// Attaches `from_pod` and `to_pod` to the host end of a pod's veth, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError::Netlink`], with `ENODEV` if the interface is gone.
    pub fn attach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        let (from, to) = (self.programs.raw_fd(Program::FromPod)?, self.programs.raw_fd(Program::ToPod)?);
        self.netlink.lock().attach(ifindex, from, to)
    }

    /// Whether [`Self::attach_pod`] has attached to this interface and its filters are still in place.
    ///
    /// # Errors
    /// [`BpfError::Netlink`] when the kernel cannot be asked.
    pub fn pod_is_attached(&self, ifindex: u32) -> Result<bool, BpfError> {
        self.netlink.lock().is_attached(ifindex)
    }

    /// Detaches from the host end of a pod's veth. Deleting the interface does that by itself.
    ///
    /// # Errors
    /// [`BpfError::Netlink`].
    pub fn detach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        self.netlink.lock().detach(ifindex)
    }

    /// Attaches `from_vpc` and `to_vpc` to an ENI, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn attach_eni(&self, ifindex: u32) -> Result<EniHook, BpfError> {
        if self.tcx {
            attach::tcx(&mut self.programs.lock(), &self.links, ifindex)?;
            // A daemon that was told to use clsact may have left filters, which would see every packet a second time.
            self.netlink.lock().detach(ifindex)?;
            return Ok(EniHook::Tcx);
        }
        let (from, to) = (self.programs.raw_fd(Program::FromVpc)?, self.programs.raw_fd(Program::ToVpc)?);
        self.netlink.lock().attach(ifindex, from, to)?;
        attach::detach(&self.links, ifindex)?;
        Ok(EniHook::Clsact)
    }

    /// Detaches from an ENI. One that is gone, or was never attached, is no error.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn detach_eni(&self, ifindex: u32) -> Result<(), BpfError> {
        attach::detach(&self.links, ifindex)?;
        self.netlink.lock().detach(ifindex)
    }

    /// The ENIs that are attached by TCX links, by interface index. A clsact attachment goes with its interface and is not listed.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    #[cfg(feature = "test-api")]
    pub fn attached_enis(&self) -> Result<Vec<u32>, BpfError> {
        attach::pinned_ifindexes(&self.links)
    }
}
