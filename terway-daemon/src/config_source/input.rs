//! Where the configuration is read from: mounted files, or ConfigMaps of the API server.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use terway_core::config::{ConfigOrigin, ConfigView};
use terway_core::objects::ObjectName;
use tokio::sync::watch;

use super::files::LastGood;
use super::{Paths, READ_EVERY, Reading};
use crate::file_watch::Watch;

/// The ConfigMap that `--config configmap` stands for.
const CONFIG_MAP: (&str, &str) = ("kube-system", "eni-config");

/// The value of `--config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigLocation {
    /// `PATH`: a mounted ConfigMap or a file.
    Path(PathBuf),
    /// `configmap`, `configmap:NAMESPACE/NAME`: a ConfigMap of the API server.
    ConfigMap(ObjectName),
}

impl FromStr for ConfigLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = match text.strip_prefix("configmap") {
            Some("") => Some(CONFIG_MAP),
            Some(rest) => match rest.strip_prefix(':') {
                Some(name) => Some(name.split_once('/').ok_or("is not configmap:NAMESPACE/NAME")?),
                None => None,
            },
            None => None,
        };
        let is_name = |text: &str| {
            let is_in = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
            !text.is_empty() && text.bytes().all(is_in)
        };
        match name {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self::ConfigMap(ObjectName::new(namespace, name)))
            }
            Some(_) => Err("is not configmap:NAMESPACE/NAME".to_owned()),
            None if text.is_empty() => Err("is empty".to_owned()),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for ConfigLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::ConfigMap(name) => write!(f, "configmap:{name}"),
        }
    }
}

/// What a [`ConfigSource`](super::ConfigSource) reads.
#[derive(Debug)]
pub enum Input {
    /// Mounted files.
    Files(Paths),
    /// ConfigMaps of the API server.
    ConfigMaps {
        /// The cluster's ConfigMap.
        cluster: ObjectName,
        /// What the API server has; `None` before the first reading.
        views: watch::Receiver<Option<ConfigView>>,
        /// Where the last good configuration is kept for the next start.
        kept: Option<PathBuf>,
    },
}

impl From<Paths> for Input {
    fn from(paths: Paths) -> Self {
        Self::Files(paths)
    }
}

/// One reading.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) documents: Reading,
    pub(super) origin: ConfigOrigin,
    /// Why the documents may be out of date.
    pub(super) stale: Option<String>,
}

impl Input {
    pub(super) fn read(&self) -> Read {
        match self {
            Self::Files(paths) => Read { documents: paths.read(), origin: ConfigOrigin::Files, stale: None },
            Self::ConfigMaps { cluster, views, .. } => {
                let unread = || ConfigView {
                    documents: Err(format!("ConfigMap {cluster} was not read yet: the API server has not answered")),
                    node_config: None,
                    stale: None,
                };
                let ConfigView { documents, node_config, stale } = views.borrow().clone().unwrap_or_else(unread);
                let origin = ConfigOrigin::ConfigMaps { cluster: cluster.clone(), node: node_config };
                Read { documents, origin, stale }
            }
        }
    }

    pub(super) fn last_good(&self) -> LastGood<'_> {
        let (Self::Files(Paths { kept, .. }) | Self::ConfigMaps { kept, .. }) = self;
        LastGood(kept.as_deref())
    }

    /// Calls `reload`, and again after every change, as long as the daemon runs.
    pub(super) async fn follow(&self, reload: impl Fn()) {
        match self {
            Self::Files(paths) => loop {
                // Watch first, read then: what happens in between is seen.
                let watch = Watch::new(&paths.sources());
                reload();
                watch.changed(READ_EVERY).await;
            },
            Self::ConfigMaps { views, .. } => {
                let mut views = views.clone();
                views.mark_changed();
                while views.changed().await.is_ok() {
                    views.borrow_and_update();
                    reload();
                }
                // The watch of the ConfigMaps has ended; it is started again or the daemon ends.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Files of the configuration that are mounted one by one.
    pub(super) fn mounted_files(&self) -> Vec<PathBuf> {
        let Self::Files(paths) = self else { return Vec::new() };
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        paths.sources().into_iter().flat_map(|path| mounted_files(&mounts, path, &|path| path.is_file())).collect()
    }
}

/// The mount points of `/proc/self/mountinfo` (proc_pid_mountinfo(5), field 5) that are the file `path`, or files in the folder `path`.
fn mounted_files(mounts: &str, path: &Path, is_file: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    // Blanks are escaped as octal numbers; no configuration lies behind one.
    points
        .map(Path::new)
        .filter(|point| (*point == path || point.parent() == Some(path)) && is_file(point))
        .map(Path::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_option_is_a_path_or_a_config_map() {
        for (text, shown) in [
            ("/etc/eni", "/etc/eni"),
            ("configmap", "configmap:kube-system/eni-config"),
            ("configmap:net/terway.v2", "configmap:net/terway.v2"),
            ("configmaps/eni_conf", "configmaps/eni_conf"),
        ] {
            assert_eq!(text.parse::<ConfigLocation>().unwrap().to_string(), shown);
        }
        for bad in ["", "configmap:", "configmap:a", "configmap:a/", "configmap:a/b/c", "configmap:a/../b"] {
            assert!(bad.parse::<ConfigLocation>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sub_path_mounts_are_found() {
        let mounts = "36 35 0:30 /pods/1/volume-subpaths/config/terway/0 /etc/eni/eni_conf ro - ext4 /dev/vda1 rw\n\
                      37 35 0:31 / /etc/eni ro - tmpfs tmpfs rw\n38 35 0:31 / /etc/eni/x/y ro - tmpfs tmpfs rw\n";
        let is_file = |path: &Path| path.ends_with("eni_conf");
        let found = |path: &str| mounted_files(mounts, Path::new(path), &is_file);
        assert_eq!(found("/etc/eni"), [Path::new("/etc/eni/eni_conf")]);
        assert_eq!(found("/etc/eni/eni_conf"), [Path::new("/etc/eni/eni_conf")]);
        assert!(found("/etc").is_empty() && found("/etc/eni/x").is_empty());
    }
}
