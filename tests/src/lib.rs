//! What the suites share: packets, sandboxes, measurements.

pub mod packet;
pub mod prog_bench;
pub mod sandbox;
