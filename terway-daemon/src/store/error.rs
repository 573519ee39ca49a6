//! What can be wrong with the store.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use terway_core::errors::{self, Error};
use terway_core::ipam::RecordError;

/// A failure of the store. To the user it is always [`errors::STORE_FAILED`] with the path in its detail.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("{}: in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a store, or a damaged one, or of a later file format.
    #[error("{}: unreadable: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What redb said.
        reason: String,
    },
    /// The file is sound but a record in it is not for this daemon.
    #[error("{}: record {key}: {source}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The record's key.
        key: String,
        /// What is wrong with it: a newer version, or no record at all.
        source: Arc<RecordError>,
    },
    /// A write failed; nothing later was written either.
    #[error("{}: cannot write: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What redb said, shared by all who waited.
        source: Arc<redb::Error>,
    },
    /// A record could not be encoded.
    #[error("{}: cannot encode: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What serde said.
        source: Arc<RecordError>,
    },
    /// The writer is gone.
    #[error("{}: the store is closed", path.display())]
    Stopped {
        /// The file.
        path: PathBuf,
    },
}

impl StoreError {
    pub(super) fn unreadable(path: &Path, source: &impl fmt::Display) -> Self {
        Self::Unreadable { path: path.to_owned(), reason: source.to_string() }
    }

    /// Whether the file itself is damaged, so that [`set_aside`](super::set_aside) is the only way on.
    /// A newer daemon's records are no damage: go back to that daemon.
    #[must_use]
    pub const fn is_damage(&self) -> bool {
        matches!(self, Self::Unreadable { .. })
    }
}

impl From<&StoreError> for Error {
    fn from(error: &StoreError) -> Self {
        Self::new(errors::STORE_FAILED, error.to_string())
    }
}
