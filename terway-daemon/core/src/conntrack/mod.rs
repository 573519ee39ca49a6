//! Connection tracking: when an entry of the flow tables has outlived itself, how often the tables are gone through, how large they
//! are, and what is known of entries that the kernel took away by itself.
//!
//! The tables are the kernel's (`terway_abi::Flow`); the programs refresh entries and never look at a clock to refuse one. So all
//! that a timeout means is when an entry may be taken away.

mod evictions;
mod expiry;
mod gc_interval;
mod size;

pub use evictions::{EvictionInputs, GcPass, estimate_evictions};
pub use expiry::{Connection, DirectionState, Phase, Timeouts, Validity};
pub use gc_interval::{FLOOR, GcInterval, START};
pub use size::{CEILING, Cost, LEAST, SHARE_FLOOR, Sizing};
