//! What the suites share: the CNI verb matrix, packets, sandboxes, measurements.

pub mod cni_matrix;
pub mod packet;
pub mod prog_bench;
pub mod sandbox;
