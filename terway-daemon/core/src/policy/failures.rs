//! Failed map operations: what the compiler wants in the maps and what they hold are kept apart, entry by entry.
//!
//! An operation on a hash map or LPM trie may fail: the map is full, the kernel has no memory. [`super::Compiler::execute`] notes the entry and goes on with the
//! next operation; [`super::Compiler::retry`] writes the entries again from the desired state. Until then the endpoints whose sets are incomplete are in
//! *lockdown* (as Cilium's `enable-endpoint-lockdown-on-policy-overflow`): all their traffic that a policy may decide about is denied, with the rule id
//! [`NOT_PROGRAMMED`]. So a rule that could not be written never lets anything pass; all other endpoints are as their policies say.
//!
//! An address or CIDR whose identity could not be written has the identity of the next shorter prefix until the retry.
//!
//! The other operations are on arrays, whose elements are all allocated. If one of those fails, the map itself is unusable: the rest of the operations
//! waits in its order ([`Halted`]) and is run first by the next call.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ids::{Identity, PortTableId, SetId, Verdict, VerdictOrTable};
use super::matched_rule::NOT_PROGRAMMED;
use super::op::{EndpointPolicy, Op, SetRef};

/// The set of endpoints in lockdown: it has no entries, and its defaults deny. [`super::ids::Counter`] never gives out this id.
pub(super) const LOCKDOWN: SetId = SetId(u32::MAX);

/// The reference to [`LOCKDOWN`].
pub(super) const LOCKED: SetRef =
    SetRef { set: LOCKDOWN, defaults: [VerdictOrTable::verdict(Verdict::deny(NOT_PROGRAMMED)); 4] };

/// A map entry whose operation may fail by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// A port table.
    PortTable(PortTableId),
    /// A set's entry for a peer identity.
    Peer(SetId, Identity),
    /// The identity of a CIDR.
    Cidr(IpNetwork),
    /// The identity of an address.
    Address(IpAddr),
}

impl Entry {
    /// The entry that an operation changes; none for operations that cannot fail by themselves.
    #[must_use]
    pub const fn of(op: &Op) -> Option<Self> {
        match op {
            Op::PutPortTable { table, .. } | Op::RemovePortTable { table, .. } => Some(Self::PortTable(*table)),
            Op::PutPeer { set, identity, .. } | Op::RemovePeer { set, identity } => Some(Self::Peer(*set, *identity)),
            Op::PutAddress { address, .. } | Op::RemoveAddress(address) => Some(Self::Address(*address)),
            Op::PutCidr { net, .. } | Op::RemoveCidr(net) => Some(Self::Cidr(*net)),
            Op::PutEndpoint { .. } | Op::SetControlWord { .. } | Op::Revalidate(_) | Op::RcuBarrier => None,
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortTable(table) => write!(f, "port table {table}"),
            Self::Peer(set, identity) => write!(f, "entry of set {set} for identity {:#x}", identity.0),
            Self::Cidr(net) => write!(f, "identity of CIDR {net}"),
            Self::Address(address) => write!(f, "identity of address {address}"),
        }
    }
}

/// An operation that cannot fail by itself has failed: the operations from it on wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Halted {
    /// The operation's error.
    pub error: String,
}

/// Applies one operation to the maps.
pub type ApplyOp<'a> = dyn FnMut(&Op) -> Result<(), String> + 'a;

/// An entry whose last operation failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) op: Op,
    pub(super) error: String,
}

/// Entries whose last operation failed, and the sets that are incomplete by that.
#[derive(Debug, Default)]
pub(super) struct Failures {
    pub(super) entries: BTreeMap<Entry, Failed>,
    /// Sets in use with a failed entry.
    pub(super) incomplete: BTreeSet<SetId>,
    /// Those whose endpoints are in lockdown.
    pub(super) locked: BTreeSet<SetId>,
    pub(super) backlog: VecDeque<Op>,
}

impl Failures {
    /// Whether endpoints with this set are in lockdown.
    pub(super) fn is_locked(&self, set: SetId) -> bool {
        self.locked.contains(&set)
    }

    /// An endpoint's map entry with references to incomplete sets replaced.
    pub(super) fn locked(&self, mut value: EndpointPolicy) -> EndpointPolicy {
        for reference in value.ingress.iter_mut().chain(&mut value.egress) {
            if self.incomplete.contains(&reference.set) {
                *reference = LOCKED;
            }
        }
        value
    }
}
