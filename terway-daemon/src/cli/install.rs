//! `terway-cli install`: puts the CNI plugin on the node, as the init container of the DaemonSet does.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use terway_core::cni::{ABOUT, PLUGIN};

use crate::atomic_file;

/// The plugin that runtimes call for the pod's `lo`.
const LOOPBACK: &str = "loopback";

#[derive(Debug, Args)]
pub(super) struct Install {
    /// Folder of the runtime's CNI plugins.
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    to: PathBuf,
    /// The plugin to install.
    #[arg(long, default_value = "/opt/cni/bin/terway", value_name = "FILE")]
    plugin: PathBuf,
}

/// What happened to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Written,
    Unchanged,
    /// Another project's plugin of this name serves as well.
    KeptForeign,
}

impl Outcome {
    const fn text(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Unchanged => "is up to date",
            Self::KeptForeign => "is another project's and stays",
        }
    }
}

/// Installs the plugin and, if the node has none, `loopback`. Running plugins are not disturbed: each file is replaced by a rename.
///
/// # Errors
/// The text names the path and what to do about it.
pub(super) fn run(install: &Install) -> Result<String, String> {
    let plugin = fs::read(&install.plugin).map_err(|error| explain("read", &install.plugin, &error))?;
    if !is_ours(&plugin) {
        return Err(format!("{} is not the CNI plugin of this project; --plugin names it", install.plugin.display()));
    }
    fs::create_dir_all(&install.to).map_err(|error| explain("create", &install.to, &error))?;
    let mut report = String::new();
    for (name, keeps_foreign) in [(PLUGIN, false), (LOOPBACK, true)] {
        let path = install.to.join(name);
        let outcome = put(&path, &plugin, keeps_foreign).map_err(|error| explain("write", &path, &error))?;
        report += &format!("{} {}\n", path.display(), outcome.text());
    }
    Ok(report)
}

fn put(path: &Path, plugin: &[u8], keeps_foreign: bool) -> io::Result<Outcome> {
    match fs::read(path) {
        Ok(present) if keeps_foreign && !is_ours(&present) => return Ok(Outcome::KeptForeign),
        Ok(present) if present == plugin && fs::metadata(path)?.permissions().mode() & 0o111 != 0 => {
            return Ok(Outcome::Unchanged);
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    atomic_file::write_executable(path, plugin).map(|()| Outcome::Written)
}

/// Whether a file is the plugin of this project, of whatever version: it tells a human what it is.
fn is_ours(content: &[u8]) -> bool {
    content.windows(ABOUT.len()).any(|window| window == ABOUT.as_bytes())
}

fn explain(what: &str, path: &Path, error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as root; if AppArmor or SELinux denies it, `dmesg` of the node has a line with the path"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "mount the folder of the node writable (hostPath), or name another with --to and in the runtime's bin_dir"
        }
        io::ErrorKind::NotFound => "mount the node's folder into the container, or name another path",
        io::ErrorKind::StorageFull => "free space on the node's disk",
        _ => "see the error",
    };
    format!("cannot {what} {}: {error}; {remedy}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(dir: &Path, content: &str) -> Install {
        fs::write(dir.join("source"), content).unwrap();
        Install { to: dir.join("bin"), plugin: dir.join("source") }
    }

    #[test]
    fn install_writes_plugin_and_loopback_once() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        let first = run(&install(dir.path(), &format!("v1 {ABOUT}"))).unwrap();
        assert_eq!(first.matches("written").count(), 2, "{first}");
        let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(bin.join(name)).unwrap());
        let (plugin, loopback) = (inode(PLUGIN), inode(LOOPBACK));
        let again = run(&install(dir.path(), &format!("v1 {ABOUT}"))).unwrap();
        assert_eq!(again.matches("up to date").count(), 2, "{again}");
        assert_eq!((inode(PLUGIN), inode(LOOPBACK)), (plugin, loopback));
        run(&install(dir.path(), &format!("v2 {ABOUT}"))).unwrap();
        for name in [PLUGIN, LOOPBACK] {
            assert!(fs::read_to_string(bin.join(name)).unwrap().starts_with("v2"), "{name}");
            assert_eq!(fs::metadata(bin.join(name)).unwrap().permissions().mode() & 0o777, 0o755);
        }
        assert_eq!(fs::read_dir(&bin).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn foreign_loopback_is_kept_and_foreign_plugin_is_not_installed() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join(LOOPBACK), "another").unwrap();
        let report = run(&install(dir.path(), ABOUT)).unwrap();
        assert!(report.contains("another project's"), "{report}");
        assert_eq!(fs::read_to_string(bin.join(LOOPBACK)).unwrap(), "another");
        assert!(run(&install(dir.path(), "something")).unwrap_err().contains("is not the CNI plugin"));
        let absent = Install { to: bin, plugin: dir.path().join("absent") };
        assert!(run(&absent).unwrap_err().contains("mount"));
    }
}
