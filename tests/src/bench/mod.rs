//! The benchmarks of `cargo xtask bench`, one file each. All measure against an alternative in the same run, round by round in turn, so that
//! a machine whose speed drifts drifts for both.

pub mod add;
pub mod ipam;
pub mod path;
pub mod policy;
pub mod prog;
pub mod svc;
