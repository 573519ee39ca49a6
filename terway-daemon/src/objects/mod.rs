//! Where the objects of Kubernetes come from.
//!
//! A source tells what there is, first everything, then [`Update::Synced`], then what changes. Whoever listens feeds it into
//! [`terway_core::objects::Objects`] and writes nothing into the kernel before the view is complete.

mod dir;
mod document;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use terway_core::objects::{Applied, Change, Kind, Object, Objects};
use tokio::sync::mpsc;

pub use dir::DirSource;

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// All objects of a kind: what is not among them is gone. A source that lost its place in the stream of changes says this.
    Replace(Kind, Vec<Object>),
    /// One object.
    Change(Change),
    /// The view is complete: every kind has been told in full. Said once.
    Synced,
}

/// A document that a source cannot use. Objects it told before stay as they were.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1.
    pub line: usize,
    /// Why it cannot be used.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.reason)
    }
}

/// News that belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The news, in order.
    pub updates: Vec<Update>,
    /// All documents that cannot be used at the moment, if that has changed.
    pub problems: Option<Vec<Problem>>,
}

impl Batch {
    /// Takes the news into the store. What comes back is what changed, and whether the view became complete.
    pub fn apply(self, objects: &mut Objects) -> (Vec<Applied>, bool) {
        let (mut applied, mut synced) = (Vec::new(), false);
        for update in self.updates {
            match update {
                Update::Replace(kind, all) => applied.extend(objects.replace(kind, all)),
                Update::Change(change) => applied.extend(objects.apply(change)),
                Update::Synced => synced = true,
            }
        }
        (applied, synced)
    }
}

/// Why a source cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The folder cannot be watched or listed.
    #[error("cannot watch {}: {source}", path.display())]
    Watch {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A source of objects.
#[async_trait]
pub trait ObjectSource: Send {
    /// Tells everything, then every change, until nobody listens any more.
    ///
    /// # Errors
    /// What it cannot recover from by itself.
    async fn run(self: Box<Self>, news: mpsc::Sender<Batch>) -> Result<(), SourceError>;
}
