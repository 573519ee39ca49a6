//! `svc`: what Services cost: bringing a large cluster's into the maps, and (another file) sending through them.

pub mod sync;
