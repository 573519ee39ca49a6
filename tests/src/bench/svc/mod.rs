//! `svc`: what Services cost: bringing a large cluster's into the maps, and sending through them.

pub mod sync;
pub mod traffic;
