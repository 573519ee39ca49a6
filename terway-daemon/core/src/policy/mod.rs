//! Network policies: from Kubernetes objects to the contents of the datapath's maps, one change at a time.
//!
//! ```text
//! address ──► identity ──► target ──► verdict        the datapath's way: ADR 0008
//!   exact, or   (set, identity),  port table:
//!   longest     or the set's      longest prefix
//!   block       default
//! ```
//!
//! An *identity* is a class of addresses that no rule can tell apart: pods of one namespace with the same values of every label key and
//! port name that rules look at, in the same *cell* of the address space as cut by all ipBlocks. A *set* is what some policies say in one
//! direction about every identity: priorities and the isolation flattened into one *target*, a verdict or a port table. Endpoints that the same
//! policies select share a set. The admin tier has sets of its own, which are asked first. Every verdict carries the number of its [`MatchedRule`].
//!
//! Each selector and block that rules name is a *peer*, one for the whole cluster; of those in use it is kept which identities they select. So no
//! change asks more than what it alters: a set is put together from what its peers select, a new identity asks each peer once.
//!
//! [`Compiler::step`] takes one event and returns operations; run in order, no packet ever meets a state other than the one before the
//! event or the one after it. [`Maps`] does with them what the kernel's maps do.
//!
//! What a policy means is in docs/networkpolicy.md.

mod cidr_region;
mod commit;
mod compiler;
mod explain;
mod failures;
mod id_map;
mod identity;
mod ids;
mod maps;
mod matched_rule;
mod op;
mod peers;
mod pod_class;
mod pods;
mod port_table;
mod rule;
mod set;
mod set_entries;
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
