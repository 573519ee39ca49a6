//! The node's and the pods' network, by rtnetlink alone. Plans come from `terway_core::route`; nothing is decided here but what it
//! takes to carry them out: what "exists already" means, whose a link is, and which thread may enter a pod.
//!
//! - [`Host`] executes plans, compares them with the kernel and removes what is left over;
//! - [`Watch`] tells when NICs and addresses come and go;
//! - [`PodNetns`] is a pod's open network namespace, [`NetnsPool`] the threads that may enter one.

mod apply;
mod cookie;
mod decode;
mod encode;
mod error;
mod host;
mod netns;
mod observe;
mod pod;
mod sockdiag;
mod socket;
mod watch;

pub use cookie::netns_cookie;
pub use error::NetError;
pub use host::{Host, Links, Took};
pub use netns::{NetnsPool, PodNetns, Worker};
pub use sockdiag::{Ended, Seen, SockDiag};
pub use watch::{Nic, NicEvent, Watch};
