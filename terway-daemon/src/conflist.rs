//! The CNI configuration list of the node: written by the daemon, kept in place, and compared with the files beside it, of which the
//! container runtime takes the first by name.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Map;
use terway_core::cni::conflist::{FILE_NAME, conflist};
use terway_core::errors::{self, Error};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::atomic_file;
use crate::file_watch::Watch;
use crate::options::Options;

/// Name of the network in the conflist; part of every attachment key, so it never changes.
const NETWORK: &str = "terway";

/// How often the folder is read although no change was seen.
const READ_EVERY: Duration = Duration::from_secs(60);

/// Extensions that runtimes read (containernetworking/cni, libcni/conf.go, `ConfFiles`).
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// What `--cni-exclusive` appends to the name of another plugin's file; no runtime reads such a name.
const SUFFIX: &str = ".terway_bak";

/// The conflist and its folder.
#[derive(Debug)]
pub(crate) struct Conflist {
    dir: PathBuf,
    content: String,
    is_exclusive: bool,
    problem: watch::Sender<Option<Error>>,
}

impl Conflist {
    pub(crate) fn new(options: &Options) -> Arc<Self> {
        let text = |path: &Path| path.display().to_string();
        let content = conflist(NETWORK, &text(&options.socket), &text(&options.spool_dir()), &Map::new());
        Arc::new(Self::in_folder(options.cni_conf_dir.clone(), content, options.cni_exclusive))
    }

    fn in_folder(dir: PathBuf, content: String, is_exclusive: bool) -> Self {
        Self { dir, content, is_exclusive, problem: watch::Sender::new(None) }
    }

    /// Writes the file by rename, with mode 0600 (CIS Kubernetes Benchmark 1.1.9), unless it is there. It stays in place when the daemon
    /// ends: without it a runtime refuses to delete pods.
    ///
    /// # Errors
    /// [`errors::STORE_FAILED`] with the path.
    pub(crate) fn write(&self) -> Result<(), Error> {
        let path = self.dir.join(FILE_NAME);
        let written = std::fs::create_dir_all(&self.dir)
            .and_then(|()| atomic_file::write_private_if_changed(&path, self.content.as_bytes()))
            .map_err(|error| Error::new(errors::STORE_FAILED, format!("{}: {error}", path.display())))?;
        if written {
            info!(path = %path.display(), "conflist written");
        }
        Ok(())
    }

    /// Follows the folder: writes the conflist again when it was removed or changed, and looks for files that go before it.
    pub(crate) async fn run(self: Arc<Self>) {
        loop {
            // Watch first, read then: what happens in between is seen.
            let watch = Watch::new(&[&self.dir]);
            self.check();
            watch.changed(READ_EVERY).await;
        }
    }

    fn check(&self) {
        let problem = match self.write().and_then(|()| self.before_ours().map_err(|error| self.unreadable(&error))) {
            Err(error) => Some(error),
            Ok(names) if names.is_empty() => None,
            Ok(names) if self.is_exclusive => self.move_aside(&names),
            Ok(names) => {
                let detail = format!("{} in {} before {FILE_NAME}", names.join(", "), self.dir.display());
                Some(Error::new(errors::CONFLIST_SHADOWED, detail))
            }
        };
        if let Some(error) = problem.as_ref().filter(|_| *self.problem.borrow() != problem) {
            warn!(code = error.code.id, detail = error.detail, remedy = error.code.remedy, "{}", error.code.cause);
        }
        self.problem.send_replace(problem);
    }

    fn unreadable(&self, error: &io::Error) -> Error {
        Error::new(errors::STORE_FAILED, format!("{}: {error}", self.dir.display()))
    }

    /// Names of network configurations that a runtime takes before ours, sorted as it sorts them.
    fn before_ours(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let is_read = path.extension().and_then(|e| e.to_str()).is_some_and(|e| EXTENSIONS.contains(&e));
            if let Some(name) = path.file_name().and_then(|name| name.to_str())
                && is_read
                && name < FILE_NAME
                && path.is_file()
            {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn move_aside(&self, names: &[String]) -> Option<Error> {
        let mut failed = None;
        for name in names {
            let to = format!("{name}{SUFFIX}");
            match std::fs::rename(self.dir.join(name), self.dir.join(&to)) {
                Ok(()) => warn!(name, to, "renamed the network configuration of another plugin (--cni-exclusive)"),
                Err(error) => {
                    failed = Some(Error::new(errors::CONFLIST_SHADOWED, format!("failed to rename {name}: {error}")));
                }
            }
        }
        failed
    }

    /// What keeps the runtime from using the conflist, for `terway-cli status`.
    pub(crate) fn problem(&self) -> Option<Error> {
        self.problem.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn files_that_sort_before_are_named_and_moved_only_on_demand() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "05-cilium.conflist",
            "10-aws.conflist",
            "10-calico.conf",
            "10-flannel.conflist",
            "00-readme.txt",
            "99-loopback.conf",
        ] {
            std::fs::write(dir.path().join(name), "{}").unwrap();
        }
        let conflist = Conflist::in_folder(dir.path().to_owned(), "{}\n".into(), false);
        conflist.check();
        let problem = conflist.problem().unwrap();
        assert_eq!(problem.code, errors::CONFLIST_SHADOWED);
        let list = "05-cilium.conflist, 10-aws.conflist, 10-calico.conf, 10-flannel.conflist in";
        assert!(problem.detail.starts_with(list), "{}", problem.detail);
        assert_eq!(names(dir.path()).len(), 7);

        let conflist = Conflist::in_folder(dir.path().to_owned(), "{}\n".into(), true);
        conflist.check();
        assert_eq!(conflist.problem(), None);
        assert_eq!(
            names(dir.path()),
            [
                "00-readme.txt",
                "05-cilium.conflist.terway_bak",
                "10-aws.conflist.terway_bak",
                "10-calico.conf.terway_bak",
                "10-flannel.conflist.terway_bak",
                FILE_NAME,
                "99-loopback.conf"
            ]
        );
    }

    #[tokio::test]
    async fn the_folder_is_followed_and_the_conflist_is_private_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, "{}\n").unwrap();
        let conflist = Arc::new(Conflist::in_folder(dir.path().to_owned(), "{}\n".into(), false));
        let task = tokio::spawn(Arc::clone(&conflist).run());
        let mut problem = conflist.problem.subscribe();
        let mode = || std::fs::metadata(&path).map(|meta| meta.permissions().mode() & 0o777).ok();
        while mode() != Some(0o600) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::fs::remove_file(&path).unwrap();
        while mode() != Some(0o600) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::fs::write(dir.path().join("10-aws.conflist"), "{}").unwrap();
        problem.wait_for(Option::is_some).await.unwrap();
        std::fs::remove_file(dir.path().join("10-aws.conflist")).unwrap();
        problem.wait_for(Option::is_none).await.unwrap();
        task.abort();
    }
}
