//! The modules of the node daemon. Each acts on one thing outside the process; what to do is decided in `terway-core`.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a panic in a test is the test's failure"))]

mod actor;
pub mod atomic_file;
pub mod bpf;
pub mod cli;
pub mod cloud;
pub mod config_source;
mod conflist;
pub mod conntrack;
pub mod daemon;
mod datapath_log;
pub mod engine;
mod file_watch;

#[cfg(feature = "test-api")]
pub mod fuzz;
mod grpc;
pub mod http;
pub mod identity;
mod inotify;
pub mod kube_writes;
mod memory;
pub mod metrics;
pub mod net;
pub mod objects;
pub mod options;
pub mod policy;
pub mod queue;
mod reload;
pub mod server;
pub mod services;
pub mod socket;
pub mod store;
pub mod supervise;
