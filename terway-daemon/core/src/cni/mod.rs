//! The CNI protocol as data: what a runtime hands to a plugin, and the documents a plugin answers with.
//!
//! Covers specification 0.3.0 to 1.1.0 (<https://www.cni.dev/docs/spec/>; earlier texts are tags `spec-v…` of
//! containernetworking/cni). Nothing here reads stdin, the environment or a file: `terway-cni` does, and prints what comes out.
//! Where the runtimes in use differ from the specification, the code says which of them does so.

pub mod conf;
pub mod conflist;
pub mod env;
pub mod failure;
mod json;
pub mod queue;
pub mod result;
pub mod runtime;
pub mod version;

pub use conf::NetConf;
pub use env::{Request, Verb};
pub use failure::Failure;
pub use queue::QueuedDel;
pub use result::CniResult;
pub use version::Version;

/// The file name of the plugin, which is also its `type` in a network configuration.
pub const PLUGIN: &str = "terway";

/// The text by which the plugin introduces itself to a human. The installer knows files of this project by it.
pub const ABOUT: &str = "CNI plugin for Kubernetes on Alibaba Cloud";

/// The daemon's unix socket, unless `daemon_socket` in the network configuration names another.
pub const DEFAULT_SOCKET: &str = "/var/run/eni/terway.socket";

/// Folder of the DELs that came while the daemon was away, unless `queue_dir` in the network configuration names another.
///
/// On disk and not in /run, because the address must still be released when a node loses power between a DEL and the start of the daemon.
pub const DEFAULT_QUEUE_DIR: &str = "/var/lib/cni/terway/del";
