//! ENIs as the programs see them: by which of its interfaces, and as whom, the node answers clients outside.

use crate::pod;

/// An ENI by which clients outside reach Services of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// The ENI's interface.
    pub ifindex: u32,
    /// The first of the source ports, as a number, that are the datapath's own: connections that it sends on in the node's name
    /// have one of these. The host's sockets must stay away from them.
    pub first_port: u32,
    /// How many they are.
    pub ports: u32,
    /// The node's own IPv4 address that the VPC takes from this ENI; 0 if there is none.
    pub v4: u32,
    /// The node's own IPv6 address that the VPC takes from this ENI; all 0 if there is none.
    pub v6: [u32; 4],
    /// The ENI's IPv4 gateway; 0 if it has none.
    pub gateway_v4: u32,
    /// The ENI's IPv6 gateway; all 0 if it has none.
    pub gateway_v6: [u32; 4],
}

pod!(Uplink: 52);

/// ENIs an instance can have; the largest types end at some thirty.
pub const MAX_UPLINKS: u32 = 256;
