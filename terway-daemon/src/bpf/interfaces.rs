//! Handle of the programs' attachments to interfaces.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use terway_abi::Program;

use super::attach::{self, EniHook};
use super::clsact;
use super::error::BpfError;
use super::object::LoadedPrograms;
use super::programs::Programs;

/// Handle of the attachments of programs to pods' interfaces and ENIs.
///
/// Its lock is that of the netlink socket and of what is attached, held for one attachment or the exchange of all.
pub struct Interfaces {
    programs: Arc<Programs>,
    attached: Mutex<Attached>,
    /// Folder of pinned links.
    links: PathBuf,
    /// ENIs are attached by TCX links.
    tcx: bool,
}

struct Attached {
    netlink: clsact::Socket,
    /// What this daemon has attached, by interface index. Of pods that are gone an entry stays until the index is used again.
    interfaces: BTreeMap<u32, Side>,
}

/// Which programs an interface has.
#[derive(Clone, Copy, Debug)]
enum Side {
    Pod,
    Eni,
}

impl fmt::Debug for Interfaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interfaces").field("links", &self.links).field("tcx", &self.tcx).finish_non_exhaustive()
    }
}

impl Interfaces {
    pub(super) fn open(programs: Arc<Programs>, links: PathBuf, tcx: bool) -> Result<Self, BpfError> {
        let attached = Attached { netlink: clsact::Socket::open()?, interfaces: BTreeMap::new() };
        Ok(Self { programs, attached: Mutex::new(attached), links, tcx })
    }

    /// Attaches `from_pod` and `to_pod` to the host end of a pod's veth, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError::Netlink`], with `ENODEV` if the interface is gone.
    pub fn attach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        let mut attached = self.attached.lock();
        self.put_on_pod(&mut attached.netlink, ifindex)?;
        attached.interfaces.insert(ifindex, Side::Pod);
        Ok(())
    }

    fn put_on_pod(&self, netlink: &mut clsact::Socket, ifindex: u32) -> Result<(), BpfError> {
        let (from, to) = (self.programs.raw_fd(Program::FromPod)?, self.programs.raw_fd(Program::ToPod)?);
        netlink.attach(ifindex, from, to)
    }

    /// Whether [`Self::attach_pod`] has attached to this interface and its filters are still in place.
    ///
    /// # Errors
    /// [`BpfError::Netlink`] when the kernel cannot be asked.
    pub fn pod_is_attached(&self, ifindex: u32) -> Result<bool, BpfError> {
        self.attached.lock().netlink.is_attached(ifindex)
    }

    /// Detaches from the host end of a pod's veth. Deleting the interface does that by itself.
    ///
    /// # Errors
    /// [`BpfError::Netlink`].
    pub fn detach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        let mut attached = self.attached.lock();
        attached.interfaces.remove(&ifindex);
        attached.netlink.detach(ifindex)
    }

    /// Attaches `from_vpc` and `to_vpc` to an ENI, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn attach_eni(&self, ifindex: u32) -> Result<EniHook, BpfError> {
        let mut attached = self.attached.lock();
        let hook = self.put_on_eni(&mut attached.netlink, ifindex)?;
        attached.interfaces.insert(ifindex, Side::Eni);
        Ok(hook)
    }

    fn put_on_eni(&self, netlink: &mut clsact::Socket, ifindex: u32) -> Result<EniHook, BpfError> {
        if self.tcx {
            attach::tcx(&mut self.programs.lock(), &self.links, ifindex)?;
            // A daemon that was told to use clsact may have left filters, which would see every packet a second time.
            netlink.detach(ifindex)?;
            return Ok(EniHook::Tcx);
        }
        let (from, to) = (self.programs.raw_fd(Program::FromVpc)?, self.programs.raw_fd(Program::ToVpc)?);
        netlink.attach(ifindex, from, to)?;
        attach::detach(&self.links, ifindex)?;
        Ok(EniHook::Clsact)
    }

    /// Replaces the programs of every interface by others of this version, one interface after the other and each without a gap. When one
    /// attachment fails, the others are still replaced; that interface keeps its programs, which use the same maps.
    pub(super) fn exchange(&self, loaded: LoadedPrograms) -> Result<(), BpfError> {
        let mut attached = self.attached.lock();
        let Attached { netlink, interfaces } = &mut *attached;
        self.programs.replace(loaded);
        let mut outcome = Ok(());
        interfaces.retain(|&ifindex, side| {
            let put = match side {
                Side::Pod => self.put_on_pod(netlink, ifindex),
                Side::Eni => self.put_on_eni(netlink, ifindex).map(drop),
            };
            match put {
                // Gone with its pod.
                Err(error) if error.is_absent_interface() => return false,
                Err(error) => outcome = Err(error),
                Ok(()) => {}
            }
            true
        });
        outcome
    }

    /// Detaches from an ENI. One that is gone, or was never attached, is no error.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn detach_eni(&self, ifindex: u32) -> Result<(), BpfError> {
        let mut attached = self.attached.lock();
        attached.interfaces.remove(&ifindex);
        attach::detach(&self.links, ifindex)?;
        attached.netlink.detach(ifindex)
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
