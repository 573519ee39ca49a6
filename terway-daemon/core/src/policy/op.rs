//! What the maps hold, as values, and the operations that change them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::number::{Identity, RowId, SetId, Target};
use super::row::RowEntry;

/// A value for each of the two phases; [`Op::Gate`] says which of them counts. So one write changes any number of values at once.
pub type Pair<T> = [T; 2];

/// What an endpoint's map entry says about one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Side {
    /// Whose entries to look up; 0 = none: all traffic passes.
    pub set: SetId,
    /// Where it leads when the set has no entry for the identity, by [`Identity::default_index`].
    pub defaults: [Target; 4],
}

/// What holds for an endpoint in one direction: first what policies of the admin tier say, then, where none of those decides
/// ([`super::NO_POLICY`]), what those of the other tiers do.
pub type Sides = [Side; 2];

/// A local endpoint in the policy maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointPolicy {
    /// Identity of its IPv4 address, then of its IPv6 address; 0 where it has none. Other endpoints of the node see it by these.
    pub identities: [Identity; 2],
    /// For traffic to it.
    pub ingress: Sides,
    /// For traffic by it.
    pub egress: Sides,
}

/// Whose flows are to be decided anew: the epochs to raise, after the maps are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stale {
    /// Flows of a local endpoint, by its slot.
    Endpoint(u32),
    /// Flows with an address.
    Address(IpAddr),
    /// All flows.
    All,
}

/// One operation on the maps. They are run in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a port table of a number that nothing refers to yet.
    Row {
        /// Its number.
        row: RowId,
        /// Its prefixes.
        entries: Vec<RowEntry>,
    },
    /// Removes a port table that nothing refers to any more.
    DropRow {
        /// Its number.
        row: RowId,
        /// Its prefixes.
        entries: Vec<RowEntry>,
    },
    /// Writes what a set says about an identity.
    Peer {
        /// The set.
        set: SetId,
        /// The identity.
        identity: Identity,
        /// Where it leads; none = as if there were no entry.
        targets: Pair<Target>,
    },
    /// Removes it.
    DropPeer {
        /// The set.
        set: SetId,
        /// The identity.
        identity: Identity,
    },
    /// Writes the identity of one address.
    Address {
        /// The address.
        address: IpAddr,
        /// Its identity; 0 = that of the longest block it is in.
        identities: Pair<Identity>,
    },
    /// Removes it.
    DropAddress(IpAddr),
    /// Writes the identity of the addresses of a block that have none of their own.
    Block {
        /// The block.
        net: IpNetwork,
        /// Their identity, never 0: a phase in which the block is not there has that of the next longer block.
        identities: Pair<Identity>,
    },
    /// Removes it: the next longer block counts.
    DropBlock(IpNetwork),
    /// Writes an endpoint's entry for one phase.
    Endpoint {
        /// The endpoint's slot.
        slot: u32,
        /// The phase it is written for.
        phase: usize,
        /// The entry. The rarest operation, and the largest: in a box, or each of the others would be twice as large.
        value: Box<EndpointPolicy>,
    },
    /// Says which phase counts, and whether policies are enforced at all.
    Gate {
        /// The phase.
        phase: usize,
        /// Whether policies are enforced.
        enforce: bool,
    },
    /// Makes flows be decided anew.
    Stale(Stale),
    /// Waits until no program runs that was running before (an RCU grace period).
    Fence,
}
