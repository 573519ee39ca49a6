//! The address pool of one node: which ENIs it has, which address belongs to which pod, and what to ask of the cloud next.
//!
//! [`Pool`] is a state machine without IO. The daemon's engine feeds it [`Event`]s and runs the [`Effect`]s it returns:
//!
//! ```text
//! slot   Absent → Creating → Idle → Bound → Cooling → Idle | Releasing → Absent
//! ENI    Creating → Attaching → Configuring → InUse → Draining → Detaching → Deleting → gone
//! pod    (waiting) → SettingUp → Ready → Releasing → gone        the stored phases; waiting is not stored
//! ```
//!
//! # Contract of the engine
//!
//! 1. Effects are in order, over all calls of [`Pool::step`]. **An effect other than a `Persist` starts only when every `Persist` before it,
//!    in this batch or an earlier one, is durable.** `Persist` and `PersistLazily` themselves are handed to the store in order and at once, without
//!    waiting for each other, so that many share one flush. Everything else may run in parallel. A batch holds at most one write, and it is the first.
//!    So the engine calls `step` and hands over the write it returned under one lock, and starts the rest after it:
//!
//!    ```text
//!    lock { effects = pool.step(event, now); if the first is a write { barrier = store.commit(changes) } }
//!    for each other effect, in parallel: wait for barrier; run it; feed its report as the next event
//!    ```
//! 2. Every effect with an `op` gets exactly one report with that number (`Disconnect`: `DatapathRemoved` at most once, then one of the
//!    others), however long it takes, unless the process ends. Reports of effects that the pool no longer waits for are ignored, so late and repeated
//!    ones do no harm.
//! 3. `Connect`, `Disconnect`, `ConfigureNic` and all cloud calls are idempotent: after a crash they come again.
//!    `ReportAddressLoss` and `ReportAddressRecovery` are notifications without a report.
//! 4. A `Cancel` is sent at the deadline of a request; its answer then comes in the same batch.
//! 5. A write that fails ends the process: what is promised must be on disk.
//! 6. A changed configuration comes as [`Event::Configure`]; a changed stack needs a new pool. One event at a time, like all others.
//! 7. After [`Pool::new`] a first `Tick` starts the warm-up. [`Pool::restore`] returns its effects itself.
//!
//! So a crash leaves the store with a prefix of the writes, the kernel and the cloud with some of the effects before the end of that
//! prefix, and `restore` finishes or undoes every one of them.
//!
//! # Invariants
//!
//! - No address is bound to two pods; a bound, cooling or unknown address is never given back to the cloud, nor is its ENI.
//! - An address is bound on disk before a pod is wired with it, and stays so until nothing of the pod is left in the kernel.
//! - A `Del` is answered with success only when the release is on disk and the datapath forgot the pod; nothing wires it again.
//! - Pods keep their addresses while the cloud does not answer, and when an address is missing from its lists.
//! - A call that makes something in the cloud is on disk with its token before it is sent, and is repeated with the same token until its outcome is known.
//! - An ENI that does not match the configuration, or that the cloud does not list, takes no new pods and keeps those it has until they are deleted.
//! - No cloud call is made about a primary ENI, a trunk or its members, or an ENI that a tag excludes from the pool.
//! - One call at a time per ENI and family, because the outcome of two could not be told apart in the cloud's lists.

// The modules form a DAG: each uses only those before it in this list.
//
// 1. `ids`, `config`, `lease`: numbers, settings, and the lease of a pod.
// 2. `record`, `effect`, `event`: what goes to the store, to the engine, and comes from it.
// 3. `problem`, `state`: errors, and the sub-machines with private state (their own order is in `state/mod.rs`).
// 4. `pool`: the composition of the sub-machines, and the dispatch of events.
// 5. `pods`, `lifecycle`, `addresses`, `vswitch_counts`, `reconcile`, `demand`, `reshape`, `shrink`, `restore`, `view`:
//    the handlers of events, steps of planning and views, as methods of the pool. They do not use each other's types.
mod addresses;
mod config;
mod demand;
mod effect;
mod event;
mod ids;
mod lease;
mod lifecycle;
mod pods;
mod pool;
mod problem;
mod reconcile;
mod record;
mod reshape;
mod restore;
mod shrink;
mod state;
mod view;
mod vswitch_counts;

pub use config::{
    ADDRESSES_PER_V4_PREFIX, ADDRESSES_PER_V6_PREFIX, ALWAYS_BLOCKED, Backoff, Degradation, EniSelection, PoolConfig,
    PoolMode, Reclaim, VSwitchSelection,
};
pub use effect::{Effect, Reply};
pub use event::{Add, Event};
pub use ids::{ClientToken, OpId, Ticket};
pub use lease::{Lease, Nic};
pub use pool::Pool;
pub use record::{
    AddressRecord, AssignmentRecord, AttachmentRecord, Change, CreationRecord, EniRecord, EniStage, Phase,
    PrefixRecord, Quarantine, Record, RecordError, RecordKey, VERSION,
};
pub use restore::{NodeFacts, RestoreError, Snapshot};
pub use view::{AddressState, AddressView, AttachmentView, EniPhase, EniView, PrefixView, Stats, VSwitchView};

/// The tag that carries an ENI's creation token, by which it is recognised when the reply to its creation was lost.
pub const TOKEN_TAG: &str = "terway-token";
