//! The ConfigMap of a node as a kubelet mounts it, and editing it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use terway_core::config::merge;

use super::Node;

/// The folder `etc` and the file `overlay`.
#[derive(Debug)]
pub(super) struct Mounted {
    work: PathBuf,
    /// The document and how often it was mounted.
    present: Mutex<(Value, u32)>,
}

impl Mounted {
    pub(super) fn create(work: &Path, document: Value) -> Result<Self> {
        let mounted = Self { work: work.to_owned(), present: Mutex::new((Value::Null, 0)) };
        fs::create_dir(mounted.folder())?;
        symlink("..data/eni_conf", mounted.folder().join("eni_conf"))?;
        mounted.mount(&document.to_string())?;
        mounted.present.lock().unwrap_or_else(PoisonError::into_inner).0 = document;
        mounted.overlay_is("{}")?;
        Ok(mounted)
    }

    pub(super) fn folder(&self) -> PathBuf {
        self.work.join("etc")
    }

    pub(super) fn overlay(&self) -> PathBuf {
        self.work.join("overlay")
    }

    /// A new version in a folder of its own, then one rename (kubernetes/pkg/volume/util/atomic_writer.go).
    fn mount(&self, text: &str) -> Result<()> {
        let (folder, version) = {
            let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            present.1 += 1;
            (self.folder(), present.1)
        };
        let name = format!("..{version}");
        fs::create_dir(folder.join(&name))?;
        fs::write(folder.join(&name).join("eni_conf"), text)?;
        let fresh = folder.join("..data_tmp");
        symlink(&name, &fresh)?;
        fs::rename(&fresh, folder.join("..data"))?;
        match fs::remove_dir_all(folder.join(format!("..{}", version - 1))) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("remove the old version"),
            _ => Ok(()),
        }
    }

    fn overlay_is(&self, text: &str) -> Result<()> {
        let fresh = self.work.join("overlay.new");
        fs::write(&fresh, text)?;
        fs::rename(fresh, self.overlay()).context("replace the overlay")
    }
}

impl Node {
    /// Edits `eni_conf` by a JSON Merge Patch, as an admin does; the daemon follows by itself.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn edit_conf(&self, patch: Value) -> Result<()> {
        let text = {
            let mut present = self.configuration.present.lock().unwrap_or_else(PoisonError::into_inner);
            merge(&mut present.0, patch);
            present.0.to_string()
        };
        self.configuration.mount(&text)
    }

    /// Mounts any text as `eni_conf`; the next [`Node::edit_conf`] begins where the last one ended.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn write_conf(&self, text: &str) -> Result<()> {
        self.configuration.mount(text)
    }

    /// Writes into the mounted file itself, as one does who edits on the node.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn scribble_conf(&self, text: &str) -> Result<()> {
        fs::write(self.configuration.folder().join("eni_conf"), text).context("write the mounted file")
    }

    /// The present document.
    #[must_use]
    pub fn conf(&self) -> Value {
        self.configuration.present.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Replaces the node's own part of the configuration, as a label `terway-config` does.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_overlay(&self, document: &Value) -> Result<()> {
        self.configuration.overlay_is(&document.to_string())
    }
}
