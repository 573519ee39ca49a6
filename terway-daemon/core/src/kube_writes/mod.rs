//! What the daemon writes to the Kubernetes API: events, and the desired state of its own Node and pods.
//!
//! State is level-triggered: each plan compares the object as the API has it with what it should be, so nothing is lost while the API
//! server is away, and what others remove comes back.

mod event;
mod node;
mod pod;
mod recorder;
mod repeat;
mod supply;
mod token_bucket;

pub use event::{Event, EventTarget, EventType, Reason};
pub use node::{MAX_AVAILABLE_IP, NodeFacts, NodeSettings, NodeWrite, network_unavailable, node_problems, node_writes};
pub use pod::{POD_IPS, pod_ips};
pub use recorder::{EventRecorder, EventWrite, Next, Recorded, Stamp, WriteOutcome};
pub use repeat::RepeatLimiter;
pub use supply::{AddressSupply, SupplyMonitor};

/// The field manager of all writes (`metadata.managedFields`).
pub const FIELD_MANAGER: &str = "terway";
