//! ENIs as the programs see them: by which of its interfaces, and as whom, the node answers clients outside.

use core::mem::offset_of;

use crate::{Endpoint, pod};

/// An ENI by which clients outside reach Services of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// The node at this ENI: the ENI's interface and gateways, and the node's own addresses that the VPC takes from it. All else is 0.
    ///
    /// It comes first and is of the pods' type because kernels before 5.13 do not remember, of two kinds of pointers on the stack,
    /// which is which: where one may be taken, both must do.
    pub node: Endpoint,
    /// The first of the source ports, as a number, that are the datapath's own: connections that it sends on in the node's name
    /// have one of these. The host's sockets must stay away from them.
    pub first_port: u32,
    /// How many they are.
    pub ports: u32,
}

pod!(Uplink: 104);
const _: () = assert!(offset_of!(Uplink, node) == 0);

/// ENIs an instance can have; the largest types end at some thirty.
pub const MAX_UPLINKS: u32 = 256;
