//! Network policies: layouts of the policy maps (ADR 0008). Most values exist in two versions; [`CONTROL_VERSION`] selects the active one.

use core::mem::offset_of;

use crate::pod;

/// Bit of the control word: the active version, 0 or 1.
pub const CONTROL_VERSION: u32 = 1;
/// Bit of the control word: policies are enforced.
pub const CONTROL_ENFORCE: u32 = 1 << 1;
/// Shift of the sampling rate N in the control word: one in N new connections is reported, none if N is 0.
pub const CONTROL_SAMPLE_SHIFT: u32 = 8;

/// A value in two versions, indexed by [`CONTROL_VERSION`].
pub type Versioned = [u32; 2];

/// Bit of a peer entry: the entry is a verdict. Without the bit it is the number of a port table.
pub const PEER_VERDICT: u32 = 1 << 31;
/// Bit of a verdict: the packet passes. The bits below are the rule id.
pub const VERDICT_ALLOW: u32 = 1 << 30;

/// Reserved rule ids; the ids of policy rules are assigned by the policy compiler.
pub mod rule_id {
    /// No policy selects the pod in this direction, or none of this tier decides: the next tier is evaluated.
    pub const NO_POLICY: u32 = 1;
    /// Policy enforcement is switched off.
    pub const DISABLED: u32 = 2;
    /// A pod connects to itself.
    pub const LOOPBACK: u32 = 3;
    /// The local node connects to a pod of its own.
    pub const LOCAL_NODE: u32 = 4;
    /// The last reserved rule id. Connections allowed by a reserved rule are not counted.
    pub const LAST_RESERVED: u32 = 15;
}

/// Per-CPU counter of a policy rule. The daemon creates an entry for each rule in use; the programs count in existing entries only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCounter {
    /// Connections allowed, or packets dropped, by the rule.
    pub packets: u64,
    /// Bytes of these packets, Ethernet header included.
    pub bytes: u64,
    /// Identifies the rule to the daemon after a restart. The programs do not use it.
    pub tag: u64,
}

/// Mask of an identity's kind, bits 31-30. Kind 0 is outside the cluster.
pub const IDENTITY_KIND: u32 = 3 << 30;
/// Kind of identities of pods.
pub const IDENTITY_POD: u32 = 1 << 30;
/// Kind of the identities of the local node's addresses.
pub const IDENTITY_NODE: u32 = 2 << 30;
/// Bit of an identity: it is of an IPv6 address.
pub const IDENTITY_V6: u32 = 1 << 29;

/// The policies of one tier for a pod in one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyDirection {
    /// The policy set whose peer entries apply; 0 = none: the verdict is undecided.
    pub set: u32,
    /// Default peer entries, for identities without an entry of the set; see [`default_index`].
    pub defaults: [u32; 4],
}

/// The policies of a pod, in one version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyEndpoint {
    /// Identities of the pod's IPv4 and of its IPv6 address, used when it is the peer of another pod of the node.
    pub identities: [u32; 2],
    /// Ingress policies: those of the admin tier, then the others, evaluated if the admin tier is undecided.
    pub ingress: [PolicyDirection; 2],
    /// Egress policies, likewise.
    pub egress: [PolicyDirection; 2],
}

/// Index of an identity in [`PolicyDirection::defaults`]: bit 0 says IPv6, bit 1 says pod.
#[must_use]
pub const fn default_index(identity: u32) -> u32 {
    let pod = identity & IDENTITY_KIND == IDENTITY_POD;
    (pod as u32) << 1 | (identity >> 29 & 1)
}

/// Index of an endpoint's policies in the endpoint policy map.
#[must_use]
pub const fn policy_index(slot: u32, version: u32) -> u32 {
    slot << 1 | version & 1
}

/// The key of a peer entry: a policy set and the identity of the peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The policy set.
    pub set: u32,
    /// The peer's identity.
    pub identity: u32,
}

/// The key of an entry of a port table. As data of a longest-prefix map: 32 bits of the table, 8 of the protocol, 16 of the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// Number of the port table.
    pub table: u32,
    /// Four bytes: protocol, port as in the packet, zero.
    pub class: u32,
}

impl PortKey {
    /// Prefix length of a whole key: table, protocol and port.
    pub const BITS: u32 = 56;

    /// The key of a port in network byte order.
    #[must_use]
    pub const fn new(table: u32, protocol: u8, port: u16) -> Self {
        let [high, low] = port.to_ne_bytes();
        Self { table, class: u32::from_ne_bytes([protocol, high, low, 0]) }
    }
}

pod!(PolicyDirection: 20, PolicyEndpoint: 88, PeerKey: 8, PortKey: 8, PolicyCounter: 24);
const _: () = assert!(offset_of!(PolicyEndpoint, ingress) == 8 && offset_of!(PolicyEndpoint, egress) == 48);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_key_bytes_are_in_prefix_order() {
        let key = PortKey::new(7, 6, 443_u16.to_be());
        assert_eq!(key.class.to_ne_bytes(), [6, 1, 0xbb, 0]);
        assert_eq!(default_index(IDENTITY_POD | IDENTITY_V6 | 5), 3);
        assert_eq!(default_index(IDENTITY_NODE | 5), 0);
        assert_eq!((policy_index(5, 1), policy_index(5, 0)), (11, 10));
    }
}
