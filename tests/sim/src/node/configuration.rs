//! The ConfigMap of a node as a kubelet mounts it, and editing it.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use terway_core::config::merge;

use super::Node;

/// The folder `etc` and the file `overlay`.
#[derive(Debug)]
pub(super) struct Mounted {
    work: PathBuf,
    present: Mutex<Present>,
}

/// What the ConfigMap says.
#[derive(Debug, Default)]
struct Present {
    /// The document `eni_conf`.
    document: Value,
    /// The keys beside it.
    beside: BTreeMap<String, String>,
    /// How often it was mounted.
    version: u32,
}

impl Mounted {
    pub(super) fn create(work: &Path, document: Value) -> Result<Self> {
        let mounted = Self { work: work.to_owned(), present: Mutex::default() };
        fs::create_dir(mounted.folder())?;
        symlink("..data/eni_conf", mounted.folder().join("eni_conf"))?;
        mounted.mount(&document.to_string())?;
        mounted.present().document = document;
        mounted.overlay_is("{}")?;
        Ok(mounted)
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn folder(&self) -> PathBuf {
        self.work.join("etc")
    }

    pub(super) fn overlay(&self) -> PathBuf {
        self.work.join("overlay")
    }

    /// A new version in a folder of its own, then one rename (kubernetes/pkg/volume/util/atomic_writer.go).
    fn mount(&self, text: &str) -> Result<()> {
        let mut present = self.present();
        present.version += 1;
        let (folder, version) = (self.folder(), present.version);
        let name = format!("..{version}");
        fs::create_dir(folder.join(&name))?;
        fs::write(folder.join(&name).join("eni_conf"), text)?;
        for (key, text) in &present.beside {
            fs::write(folder.join(&name).join(key), text)?;
        }
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
            let mut present = self.configuration.present();
            merge(&mut present.document, patch);
            present.document.to_string()
        };
        self.configuration.mount(&text)
    }

    /// Sets a key of the ConfigMap beside `eni_conf`, such as `disable_network_policy`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn set_key(&self, key: &str, text: &str) -> Result<()> {
        let document = {
            let mut present = self.configuration.present();
            present.beside.insert(key.to_owned(), text.to_owned());
            present.document.to_string()
        };
        self.configuration.mount(&document)
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
    pub fn overwrite_mounted_conf(&self, text: &str) -> Result<()> {
        fs::write(self.configuration.folder().join("eni_conf"), text).context("write the mounted file")
    }

    /// The present document.
    #[must_use]
    pub fn conf(&self) -> Value {
        self.configuration.present().document.clone()
    }

    /// Replaces the node's own part of the configuration, as a label `terway-config` does.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_overlay(&self, document: &Value) -> Result<()> {
        self.configuration.overlay_is(&document.to_string())
    }
}
