//! Network policies: what the maps of ADR 0008 hold. Most values stand for two phases, of which [`GATE_PHASE`] says the one that counts.

use core::mem::offset_of;

use crate::pod;

/// Bit of the gate: the phase that counts, 0 or 1.
pub const GATE_PHASE: u32 = 1;
/// Bit of the gate: policies are enforced.
pub const GATE_ENFORCE: u32 = 1 << 1;
/// The gate shifted right by so many bits is N: one in N new connections is reported, or none if it is 0.
pub const GATE_SAMPLE: u32 = 8;

/// A value for each phase.
pub type Phases = [u32; 2];

/// Bit of a target: it is a decision, and no port table.
pub const TARGET_DECISION: u32 = 1 << 31;
/// Bit of a decision: the packet passes. Below it is the number of the reason.
pub const DECISION_ALLOW: u32 = 1 << 30;

/// Numbers of reasons that are always the same; those of rules come from the compiler.
pub mod policy_reason {
    /// No policy says anything about the pod in this direction, or none of those that were asked decides: the next tier is asked.
    pub const NO_POLICY: u32 = 1;
    /// Policies are switched off.
    pub const DISABLED: u32 = 2;
    /// A pod speaks with itself.
    pub const LOOPBACK: u32 = 3;
    /// The resident node speaks with its pod.
    pub const RESIDENT_NODE: u32 = 4;
    /// Numbers up to this one are fixed. What they let pass is not counted.
    pub const FIXED: u32 = 15;
}

/// What a reason decided. The daemon makes an entry for each reason that is in use; the programs count in those that are there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCounter {
    /// Connections that it let begin, or packets that it had dropped.
    pub packets: u64,
    /// Bytes of these packets, Ethernet header included.
    pub bytes: u64,
    /// What the reason is, as the daemon knows it again after a restart. The programs leave it alone.
    pub tag: u64,
}

/// The nature of an identity: bits 31-30. 0 is the world outside the cluster.
pub const IDENTITY_NATURE: u32 = 3 << 30;
/// The nature of pods.
pub const IDENTITY_POD: u32 = 1 << 30;
/// The nature of the resident node's addresses.
pub const IDENTITY_NODE: u32 = 2 << 30;
/// Bit of an identity: of an IPv6 address.
pub const IDENTITY_V6: u32 = 1 << 29;

/// What policies say about a pod in one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicySide {
    /// The set whose entries count; 0 = none, nothing is decided.
    pub set: u32,
    /// Targets of identities for which the set has no entry; see [`default_index`].
    pub defaults: [u32; 4],
}

/// What policies say about a pod, in one phase.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyEndpoint {
    /// Identities of its IPv4 and of its IPv6 address, by which other pods of the node see it.
    pub identities: [u32; 2],
    /// For packets to it: what policies of the admin tier say, then what the others do where none of those decides.
    pub ingress: [PolicySide; 2],
    /// For packets from it, likewise.
    pub egress: [PolicySide; 2],
}

/// Which of [`PolicySide::defaults`] is an identity's: bit 0 says IPv6, bit 1 says pod.
#[must_use]
pub const fn default_index(identity: u32) -> u32 {
    let pod = identity & IDENTITY_NATURE == IDENTITY_POD;
    (pod as u32) << 1 | (identity >> 29 & 1)
}

/// Where an endpoint's value of a phase stands.
#[must_use]
pub const fn policy_index(slot: u32, phase: u32) -> u32 {
    slot << 1 | phase & 1
}

/// A set and an identity.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The set.
    pub set: u32,
    /// The identity.
    pub identity: u32,
}

/// A place in a port table. As data of a longest-prefix map: 32 bits of the table, 8 of the protocol, 16 of the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// The table.
    pub table: u32,
    /// Four bytes: protocol, port as in the packet, zero.
    pub class: u32,
}

impl PortKey {
    /// Bits of table, protocol and port.
    pub const BITS: u32 = 56;

    /// The key of a port as it stands in the packet.
    #[must_use]
    pub const fn new(table: u32, protocol: u8, port: u16) -> Self {
        let [high, low] = port.to_ne_bytes();
        Self { table, class: u32::from_ne_bytes([protocol, high, low, 0]) }
    }
}

pod!(PolicySide: 20, PolicyEndpoint: 88, PeerKey: 8, PortKey: 8, PolicyCounter: 24);
const _: () = assert!(offset_of!(PolicyEndpoint, ingress) == 8 && offset_of!(PolicyEndpoint, egress) == 48);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_key_is_in_the_order_of_the_longest_prefix() {
        let key = PortKey::new(7, 6, 443_u16.to_be());
        assert_eq!(key.class.to_ne_bytes(), [6, 1, 0xbb, 0]);
        assert_eq!(default_index(IDENTITY_POD | IDENTITY_V6 | 5), 3);
        assert_eq!(default_index(IDENTITY_NODE | 5), 0);
        assert_eq!((policy_index(5, 1), policy_index(5, 0)), (11, 10));
    }
}
