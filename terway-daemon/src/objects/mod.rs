//! Kubernetes objects: sources read them, one [`Feed`] stores them and delivers changes to its subscribers.
//!
//! The contract between source, feed and subscribers is in [`feed`].

mod dir;
mod document;
pub mod feed;
mod kube;
mod metrics;
mod source;
mod store;
#[cfg(test)]
mod tests;

pub use dir::DirSource;
pub use feed::{Feed, KindStatus, Subscriber};
pub use kube::{ApiClient, ConfigMapWatch, Credentials, KubeSource};
pub(crate) use kube::{ApiError, PatchType};
pub use metrics::ObjectMetrics;
pub use source::{Batch, EmptySource, NodeContext, ObjectSource, Origin, Problem, Scope, SourceError, Update};
pub use store::{ObjectChanges, ObjectStore, Stored};

/// Reads a file of manifests; for fuzz targets.
#[cfg(feature = "test-api")]
pub(crate) fn fuzz_document(path: &std::path::Path, text: &str) {
    let content = document::read(path, text);
    let lines = text.lines().count() + 1;
    assert!(content.problems.iter().all(|(line, _)| (1..=lines).contains(line)), "a line that the file does not have");
}
