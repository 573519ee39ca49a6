//! The lease of a pod: its addresses and the ENI that carries them.

use serde::{Deserialize, Serialize};

use crate::cloud::Subnet;
use crate::ident::{Addresses, EniId, Mac};

/// The addresses that a pod holds, with their ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The ENI that all addresses belong to. The VPC drops the pod's packets on any other.
    pub eni: EniId,
    /// The ENI's MAC.
    pub mac: Mac,
    /// The NIC and its subnet.
    pub nic: Nic,
    /// The pod's own addresses.
    pub addresses: Addresses,
}

/// The NIC of an attached ENI, as the node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The kernel's interface index in the node's network namespace.
    pub ifindex: u32,
    /// CIDR blocks and gateways of the vSwitch.
    pub subnet: Subnet,
}
