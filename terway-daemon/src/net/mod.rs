//! Network configuration of the node and its pods by netlink. The plans come from `terway_core::route`. What is decided here is only how
//! to execute them: which error means "already done", which attachment owns a link, and which thread may enter a pod's network namespace.
//!
//! - [`Host`] executes plans, compares them with the kernel's state and removes leftovers;
//! - [`NetMonitor`] reports rtnetlink events of NICs and addresses;
//! - [`PodNetns`] is an open network namespace of a pod, [`NetnsPool`] the threads that may enter one;
//! - [`SockDiag`] lists and destroys sockets.
//!
//! ADR 9 says which netlink library is used where.

mod apply;
mod cookie;
mod decode;
mod error;
mod host;
mod messages;
mod monitor;
mod netns;
mod observe;
mod pod;
mod sockdiag;
pub(crate) mod socket;

pub use apply::set_sysctl_dir;
pub use cookie::netns_cookie;
pub use error::NetError;
pub use host::{ConnectTimings, Host, Links};
pub use monitor::{NetMonitor, Nic, NicEvent};
pub use netns::{NetnsPool, PodNetns, Worker};
pub use sockdiag::{DestroyOutcome, SockDiag, SocketInfo};
