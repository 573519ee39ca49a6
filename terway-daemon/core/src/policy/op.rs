//! Entries of the policy maps as values, and the operations that change them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ids::{Identity, PortTableId, SetId, VerdictOrTable};
use super::port_table::PortTableEntry;

/// The values of one map entry in both versions of the policy maps. [`Op::SetControlWord`] selects the version that the datapath reads, so one
/// write puts any number of changed entries into force at once.
pub type Versioned<T> = [T; 2];

/// A reference to a set from an endpoint's map entry, with the set's default verdicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SetRef {
    /// The set whose entries are looked up; 0 = none: all traffic passes.
    pub set: SetId,
    /// The result for identities without an entry in the set, by [`Identity::default_index`].
    pub defaults: [VerdictOrTable; 4],
}

/// The sets of an endpoint in one direction: first that of the admin tier, then, where no admin policy decides ([`super::NO_POLICY`]), that of
/// the other tiers.
pub type DirectionPolicy = [SetRef; 2];

/// The policy map entry of a local endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointPolicy {
    /// Identity of its IPv4 address, then of its IPv6 address; 0 where it has none. Other endpoints of the node read them here.
    pub identities: [Identity; 2],
    /// For traffic to it.
    pub ingress: DirectionPolicy,
    /// For traffic from it.
    pub egress: DirectionPolicy,
}

/// The flows whose policy verdict is to be revalidated: the datapath's epochs to raise after the maps are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowScope {
    /// Flows of a local endpoint, by its slot.
    Endpoint(u32),
    /// Flows with an address.
    Address(IpAddr),
    /// All flows.
    All,
}

/// An operation on the policy maps. Operations are run in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a port table that nothing refers to yet.
    PutPortTable {
        /// Its id.
        table: PortTableId,
        /// Its prefixes.
        entries: Vec<PortTableEntry>,
    },
    /// Removes a port table that nothing refers to any more.
    RemovePortTable {
        /// Its id.
        table: PortTableId,
        /// Its prefixes.
        entries: Vec<PortTableEntry>,
    },
    /// Writes a set's entry for a peer identity.
    PutPeer {
        /// The set.
        set: SetId,
        /// The peer's identity.
        identity: Identity,
        /// The result of the lookup; none = as if there were no entry.
        verdicts: Versioned<VerdictOrTable>,
    },
    /// Removes a set's entry for a peer identity.
    RemovePeer {
        /// The set.
        set: SetId,
        /// The peer's identity.
        identity: Identity,
    },
    /// Writes the identity of an address.
    PutAddress {
        /// The address.
        address: IpAddr,
        /// Its identity; 0 = that of the longest CIDR that contains it.
        identities: Versioned<Identity>,
    },
    /// Removes the identity of an address.
    RemoveAddress(IpAddr),
    /// Writes the identity of a CIDR's addresses that have no entry of their own.
    PutCidr {
        /// The CIDR.
        net: IpNetwork,
        /// Its identity, never 0: in a version without this CIDR it is that of the next shorter prefix.
        identities: Versioned<Identity>,
    },
    /// Removes a CIDR: the next shorter prefix counts.
    RemoveCidr(IpNetwork),
    /// Writes an endpoint's entry for one version.
    PutEndpoint {
        /// The endpoint's slot.
        slot: u32,
        /// The version it is written for.
        version: usize,
        /// The entry. Boxed, because it is the rarest operation and twice as large as the others.
        value: Box<EndpointPolicy>,
    },
    /// Writes the control word: the version that the datapath reads, and whether policies are enforced.
    SetControlWord {
        /// The version.
        version: usize,
        /// Whether policies are enforced.
        enforce: bool,
    },
    /// Has the policy verdict of established flows revalidated.
    Revalidate(FlowScope),
    /// Waits for an RCU grace period: no program runs any more that was running before.
    RcuBarrier,
}
