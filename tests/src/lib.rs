//! What the suites share.

pub mod cni_matrix;
