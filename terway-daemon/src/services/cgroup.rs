//! The root cgroup of the cgroup2 hierarchy, wherever it is mounted.

use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The value of `--cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupAt {
    /// No cgroup: the socket programs are not attached.
    None,
    /// The folder of a cgroup.
    Path(PathBuf),
}

impl FromStr for CgroupAt {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "none" { Self::None } else { Self::Path(text.into()) })
    }
}

/// The folder of the root cgroup.
///
/// # Errors
/// The reason for which it cannot be found, with the remedy.
pub(super) fn find() -> Result<PathBuf, String> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    let mounts = mounts(&table);
    if let Some(root) = mounts.iter().find(|mount| is_root(mount)) {
        return Ok(root.clone());
    }
    let remedy = "mount one where terwayd sees it, or name it with --cgroup";
    Err(match mounts.first() {
        None => format!("no cgroup2 file system is mounted; {remedy}"),
        Some(other) => {
            format!(
                "{} is not the root of the cgroup2 hierarchy but a part of it in a container; {remedy}",
                other.display()
            )
        }
    })
}

/// A container that has a cgroup namespace of its own sees its part of the hierarchy as if it were all. The true root is the cgroup that
/// has no events (`CFTYPE_NOT_ON_ROOT`, kernel/cgroup/cgroup.c).
fn is_root(folder: &Path) -> bool {
    folder.join("cgroup.procs").exists() && !folder.join("cgroup.events").exists()
}

/// The mount points of cgroup2 file systems, from proc_pid_mountinfo(5): the one systemd uses comes first on a pure machine, and
/// `/sys/fs/cgroup/unified` is the only one on a hybrid machine.
fn mounts(table: &str) -> Vec<PathBuf> {
    let of = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let at = mount.split(' ').nth(4)?;
        (kind.split(' ').next()? == "cgroup2").then(|| PathBuf::from(unescape(at)))
    };
    table.lines().filter_map(of).collect()
}

/// Blanks, tabs, line feeds and backslashes in a path are octal escapes (fs/proc_namespace.c, `mangle`).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
26 23 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
27 26 0:23 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 26 0:31 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";

    #[test]
    fn cgroup2_mount_of_a_hybrid_hierarchy() {
        assert_eq!(mounts(HYBRID), [Path::new("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn cgroup2_mount_of_a_unified_hierarchy_and_escaped_paths() {
        let table = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
                     99 23 0:26 / /mnt/my\\040cgroup rw - cgroup2 none rw\n\
                     31 23 0:27 / /sys/fs/bpf rw - bpf bpf rw\nnot a line\n";
        assert_eq!(mounts(table), [Path::new("/sys/fs/cgroup"), Path::new("/mnt/my cgroup")]);
    }

    #[test]
    fn a_container_part_of_the_hierarchy_is_not_the_root() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_root(folder.path()));
        fs::write(folder.path().join("cgroup.procs"), "").unwrap();
        assert!(is_root(folder.path()));
        fs::write(folder.path().join("cgroup.events"), "").unwrap();
        assert!(!is_root(folder.path()));
    }

    #[test]
    fn cgroup_option_names_a_folder_or_none() {
        assert_eq!("none".parse(), Ok(CgroupAt::None));
        assert_eq!("/sys/fs/cgroup".parse(), Ok(CgroupAt::Path("/sys/fs/cgroup".into())));
    }
}
