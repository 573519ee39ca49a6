//! Reading the documents of a configuration, and keeping the last good ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use terway_core::config::{ConfigDocuments, ConfigMapData, KeyLocation, by_name};
use tracing::warn;

use super::Reading;
use crate::atomic_file;
use crate::file_watch::SWAPPED;

/// The largest ConfigMap there is ("ConfigMaps" in the Kubernetes documentation: 1 MiB).
const LARGEST: u64 = 1 << 20;

/// The name a single file is read under.
const ENI_CONF: &str = "eni_conf";

/// Where the configuration lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The cluster's: a folder with the data of the ConfigMap, or `eni_conf` itself.
    pub config: PathBuf,
    /// The node's own, in the same two forms.
    pub overlay: Option<PathBuf>,
    /// Where the last good configuration is kept for the next start.
    pub kept: Option<PathBuf>,
}

impl Paths {
    /// What is watched.
    pub(super) fn sources(&self) -> Vec<&Path> {
        [Some(&self.config), self.overlay.as_ref()].into_iter().flatten().map(PathBuf::as_path).collect()
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub fn read(&self) -> Reading {
        Ok(ConfigDocuments {
            data: read_data(&self.config)?,
            overlay: self.overlay.as_ref().map(|path| read_data(path)).transpose()?,
        })
    }
}

/// Where the last good configuration is kept, if anywhere.
#[derive(Debug)]
pub(super) struct LastGood<'a>(pub(super) Option<&'a Path>);

impl LastGood<'_> {
    /// Keeps what was read. The file has the access key in it, as the ConfigMap has, and is for root alone.
    pub(super) fn save(&self, read: &Reading) {
        let (Some(path), Ok(ConfigDocuments { data, overlay })) = (self.0, read) else { return };
        let document = json!({"data": data, "overlay": overlay}).to_string();
        if fs::read(path).is_ok_and(|old| old == document.as_bytes()) {
            return;
        }
        if let Err(error) = atomic_file::write_private(path, document.as_bytes()) {
            warn!(path = %path.display(), %error, "the configuration is not kept for a start without it");
        }
    }

    /// What was kept, if it can be read.
    pub(super) fn load(&self) -> Option<ConfigDocuments> {
        let mut kept: Value = serde_json::from_slice(&fs::read(self.0?).ok()?).ok()?;
        let data = |value: Value| serde_json::from_value::<Option<ConfigMapData>>(value).ok();
        Some(ConfigDocuments { data: data(kept["data"].take())??, overlay: data(kept["overlay"].take())? })
    }
}

pub(crate) fn read_data(path: &Path) -> Result<ConfigMapData, String> {
    let of = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let meta = fs::metadata(path).map_err(|error| of(path, &error))?;
    if !meta.is_dir() {
        let text = read_text(path).map_err(|error| of(path, &error))?;
        return Ok(ConfigMapData::from([(ENI_CONF.to_owned(), text)]));
    }
    let folder = match fs::canonicalize(path.join(SWAPPED)) {
        Ok(version) => version,
        Err(_) => path.to_owned(),
    };
    let mut data = ConfigMapData::new();
    for entry in fs::read_dir(&folder).map_err(|error| of(&folder, &error))? {
        let file = entry.map_err(|error| of(&folder, &error))?.path();
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else { continue };
        // Editors leave their own files with a dot in front or a tilde behind.
        if name.starts_with('.') || name.ends_with('~') || !fs::metadata(&file).is_ok_and(|meta| meta.is_file()) {
            continue;
        }
        // Only the name of a stranger counts, for the warning.
        let known = by_name(name).is_some_and(|key| key.location == KeyLocation::ConfigMap);
        let text = if known { read_text(&file).map_err(|error| of(&file, &error))? } else { String::new() };
        data.insert(name.to_owned(), text);
    }
    Ok(data)
}

fn read_text(path: &Path) -> io::Result<String> {
    use std::io::Read as _;

    let mut text = String::new();
    let read = fs::File::open(path)?.take(LARGEST + 1).read_to_string(&mut text)?;
    if read as u64 > LARGEST {
        return Err(io::Error::other("is larger than a ConfigMap can be"));
    }
    Ok(text)
}
