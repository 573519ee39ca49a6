//! The sub-machines of the pool. Each owns one part of the state, keeps its fields private, and knows nothing of the pool or of its
//! siblings above it in this list:
//!
//! ```text
//! batch timers sequence block slot vswitch     no other sub-machine
//! eni                                          slot
//! requests                                     none
//! attachment                                   requests
//! creation inventory                           block
//! demand idle                                  none
//! ```

mod attachment;
mod batch;
mod block;
mod creation;
mod demand;
mod eni;
mod idle;
mod inventory;
mod requests;
mod sequence;
mod slot;
mod timers;
mod vswitch;

pub(super) use attachment::{AddOutcome, Attachment, ReleaseOutcome};
pub(super) use batch::EffectBatch;
pub(super) use block::CallBlock;
pub(super) use creation::{Creation, CreationFailure, Creations, EniContents};
pub(super) use demand::DemandClock;
pub(super) use eni::{EniState, Mismatch, Stage, listed_addresses, listed_prefixes};
pub(super) use idle::IdleClock;
pub(super) use inventory::InventoryState;
pub(super) use requests::{Request, Requests, TicketOwner, Waiter};
pub(super) use sequence::Sequence;
pub(super) use slot::{Assigned, Call, CallKind, Counts, SlotState};
pub(super) use timers::{Timer, Timers};
pub(super) use vswitch::{VSwitchState, VSwitches};
