//! The NetworkPolicy compiler: from Kubernetes objects to the contents of the policy maps, one change at a time.
//!
//! ```text
//! address ──► identity ──► verdict or port table ──► verdict      the datapath's lookups: ADR 0008
//!   exact, or   (set, identity),      longest prefix
//!   longest     or the set's          of protocol and port
//!   CIDR        default
//! ```
//!
//! An *identity* is a class of addresses that no rule distinguishes: pods of one namespace with the same values of every label key and port name that
//! rules look at, in the same *region* of the address space as cut by all ipBlocks. A *set* is what some policies decide in one direction about every
//! identity: priorities and the isolation are flattened into one verdict or port table. Endpoints that the same policies select share a set. The admin
//! tier has sets of its own, which are looked up first. Every verdict carries the id of its rule ([`MatchedRule`]).
//!
//! Each selector and CIDR that rules name is a *peer*, one for the whole cluster, with the list of the identities that it selects. So a change
//! evaluates only what it alters: a set is put together from the lists of its peers, and a new identity is matched with each peer once.
//!
//! [`Compiler::step`] takes one event and returns operations. Run in their order, every packet meets the state before the event or the state after it.
//! [`Compiler::execute`] runs them where operations may fail. [`Maps`] applies operations as the kernel's maps do.
//!
//! Modules, each using only those before it:
//!
//! 1. `ids`, `id_map`, `namespace_labels`, `peer_match`: ids, hash maps by id, what selectors see
//! 2. `cidr_region`, `pod_class`: regions of the address space, classes of pods
//! 3. `peers`, `rule`: selectors and CIDRs with the identities they select; policies in one form
//! 4. `port_table`, `op`, `matched_rule`, `maps`: entries of the maps, operations on them, their contents
//! 5. `set`, `state`, `change`, `failures`: sets; pods, addresses and endpoints; pending changes; failed entries
//! 6. `compiler`: the state of all of these, and the events
//! 7. `impl Compiler` by subject: `commit`, `identity`, `set_entries`, `pods`, `unknown_pods`, `execute`, `explain`, `takeover`
//!
//! What a policy means is in docs/networkpolicy.md.

mod change;
mod cidr_region;
mod commit;
mod compiler;
mod execute;
mod explain;
mod failures;
mod id_map;
mod identity;
mod ids;
mod maps;
mod matched_rule;
mod namespace_labels;
mod op;
mod peer_match;
mod peers;
mod pod_class;
mod pods;
mod port_table;
mod rule;
mod set;
mod set_entries;
mod state;
mod takeover;
mod unknown_pods;

pub use compiler::{Compiler, Effort, Event, Stats};
pub use explain::{DirectionVerdict, ExplainError, Explanation, FlowEnd};
pub use failures::{ApplyOp, Entry, Halted};
pub use ids::{Identity, IdentityKind, PortTableId, RuleId, SetId, Verdict, VerdictOrTable};
pub use maps::{Maps, Packet};
pub use matched_rule::{
    DISABLED, LOCAL_NODE, LOOPBACK, MatchedRule, NO_POLICY, NOT_PROGRAMMED, RuleIdChanges, UNKNOWN_POD,
};
pub use op::{DirectionPolicy, EndpointPolicy, FlowScope, Op, SetRef, Versioned};
pub use port_table::PortTableEntry;
