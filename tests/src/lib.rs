//! What the suites and benchmarks share: packets, SCTP, sandboxes, the CNI verb matrix, load, figures.

pub mod bench;
pub mod cni_matrix;
pub mod figures;
pub mod load;
pub mod packet;
pub mod prog_bench;
pub mod prog_harness;
pub mod sandbox;
pub mod sctp;
