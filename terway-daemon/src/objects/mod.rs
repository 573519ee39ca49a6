//! Kubernetes objects: sources read them, one [`Feed`] stores them and delivers changes to its subscribers.
//!
//! The contract between source, feed and subscribers is in [`feed`].

mod dir;
mod document;
pub mod feed;
mod metrics;
mod source;
mod store;
#[cfg(test)]
mod tests;

pub use dir::DirSource;
pub use feed::{Feed, KindStatus, Subscriber};
pub use metrics::ObjectMetrics;
pub use source::{Batch, EmptySource, ObjectSource, Origin, Problem, Scope, SourceError, Update};
pub use store::{ObjectChanges, ObjectStore, Stored};
