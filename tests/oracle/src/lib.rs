//! Oracles of tests, and the clusters that they and the benchmarks run on.
//!
//! An oracle is written from the documentation of Kubernetes and uses nothing of the product but its data types: documents as they are
//! parsed, and packets. The compiler's tests compare with its words what the netns suite compares with packets.

pub mod cluster_state;
pub mod large_cluster;
pub mod policy;
