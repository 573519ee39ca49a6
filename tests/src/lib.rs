//! What the suites and benchmarks share: packets, sandboxes, load, figures.

pub mod bench;
pub mod figures;
pub mod load;
pub mod packet;
pub mod prog_bench;
pub mod sandbox;
