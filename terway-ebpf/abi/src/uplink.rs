//! Uplinks: the ENIs through which external clients reach Services of this node.

use core::mem::offset_of;

use crate::{Endpoint, pod};

/// An uplink: an ENI through which external clients reach Services of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// The node's endpoint at this ENI: interface, gateways, and the node's addresses on the ENI. All other fields are 0.
    ///
    /// First field, and of the same type as a pod's endpoint: kernels before 5.13 do not track which of two pointer types a stack slot
    /// holds, so both must allow the same accesses.
    pub node: Endpoint,
    /// First source port (host byte order) of the SNAT range: connections masqueraded to another node get a port of this range. Sockets
    /// of the host must not use it.
    pub first_snat_port: u32,
    /// Number of ports of the SNAT range.
    pub snat_port_count: u32,
}

pod!(Uplink: 104);
const _: () = assert!(offset_of!(Uplink, node) == 0);

/// Maximum number of uplinks; the largest instance types have some thirty ENIs.
pub const MAX_UPLINKS: u32 = 256;
