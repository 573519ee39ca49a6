//! The node daemon as a library: everything that `terwayd` runs and that the suites drive.

pub mod bpf;
