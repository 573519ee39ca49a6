//! The mounts by which a daemon in a container reaches the node, checked at its start: what a wrong manifest does is otherwise seen only when the
//! container is replaced, or at the first pod.

use std::fs;
use std::path::{Path, PathBuf};

use terway_core::errors::{self, Error};
use tracing::warn;

use crate::options::Options;

/// Where runtimes mount the network namespaces of pods.
const NETNS_DIR: &str = "/run/netns";

/// Checks the mounts of this process.
///
/// # Errors
/// [`errors::BPFFS_PRIVATE`]: what is pinned would end with the container, and with it the network of the node's pods.
pub(super) fn check(options: &Options) -> Result<(), Error> {
    if !is_in_container() {
        return Ok(());
    }
    let path = "/proc/self/mountinfo";
    let table = match fs::read_to_string(path) {
        Ok(table) => table,
        Err(error) => {
            warn!(%error, path, "the container's mounts cannot be checked");
            return Ok(());
        }
    };
    if let Some(error) = pods_are_unseen(&table, &real(Path::new(NETNS_DIR))) {
        warn!(code = error.code.id, detail = error.detail, remedy = error.code.remedy, "{}", error.code.cause);
    }
    bpffs_outlives_container(&table, &real(&options.bpffs))
}

/// Whether this process has mounts of its own: it is the first of its PID namespace, or the first has other mounts.
fn is_in_container() -> bool {
    let mounts_of = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    std::process::id() == 1 || mounts_of("1").is_some_and(|first| Some(first) != mounts_of("self"))
}

/// A path without symbolic links, as the table of mounts has it. Its end need not exist.
fn real(path: &Path) -> PathBuf {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Ok(real), ..) => real,
        (Err(_), Some(parent), Some(name)) => real(parent).join(name),
        _ => path.to_owned(),
    }
}

fn bpffs_outlives_container(table: &str, bpffs: &Path) -> Result<(), Error> {
    let Some(mount) = holding(table, bpffs) else { return Ok(()) };
    let refuse = |reason: String| Err(Error::new(errors::BPFFS_PRIVATE, reason));
    let point = mount.point;
    match (mount.kind, mount.is_propagated) {
        ("bpf", true) => Ok(()),
        ("bpf", false) => refuse(format!("the BPF file system at {point} was not propagated from the node")),
        (kind, _) => {
            refuse(format!("{} lies on a file system of the type {kind}, mounted at {point}", bpffs.display()))
        }
    }
}

fn pods_are_unseen(table: &str, folder: &Path) -> Option<Error> {
    let mount = holding(table, folder).filter(|mount| !mount.is_propagated)?;
    let (folder, point) = (folder.display(), mount.point);
    Some(Error::new(errors::NETNS_UNPROPAGATED, format!("{folder} is on the mount {point}, without propagation")))
}

/// A mount, from a line of proc_pid_mountinfo(5).
struct Mount<'a> {
    /// Mount point. Blanks in it are octal escapes, and none of the folders asked for has one.
    point: &'a str,
    /// Type of the file system.
    kind: &'a str,
    /// Mounts that the node makes below it appear here: it is in a peer group with the node's mount, or the slave of one. A bind mount with
    /// `HostToContainer` is a slave; a runtime refuses it where the node's mount is in no peer group.
    is_propagated: bool,
}

/// The mount on which a path lies: of the innermost mount points, the one mounted last.
fn holding<'a>(table: &'a str, path: &Path) -> Option<Mount<'a>> {
    let mounts = table.lines().filter_map(|line| {
        let (mount, rest) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        let is_propagated =
            mount.split(' ').skip(6).any(|field| field.starts_with("shared:") || field.starts_with("master:"));
        Some(Mount { point, kind: rest.split(' ').next()?, is_propagated })
    });
    mounts.filter(|mount| path.starts_with(mount.point)).max_by_key(|mount| Path::new(mount.point).components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container of containerd: root, /sys, and the mounts of the DaemonSet.
    fn table(bpffs: &str, netns: &str) -> String {
        format!(
            "700 650 0:90 / / ro,relatime - overlay overlay ro,lowerdir=/x\n\
             702 700 0:22 / /sys ro,nosuid - sysfs sysfs ro\n{bpffs}\n{netns}\nnot a line\n"
        )
    }

    const BPFFS: &str = "710 702 0:28 / /sys/fs/bpf rw,nosuid master:11 - bpf bpf rw,mode=700";
    const NETNS: &str = "711 700 0:24 /netns /run/netns rw,nosuid master:5 - tmpfs tmpfs rw";

    #[test]
    fn mounts_of_the_daemonset_are_accepted() {
        let table = table(BPFFS, NETNS);
        assert_eq!(bpffs_outlives_container(&table, Path::new("/sys/fs/bpf/terway")), Ok(()));
        assert_eq!(pods_are_unseen(&table, Path::new("/run/netns")), None);
    }

    #[test]
    fn private_bpffs_is_refused_with_its_mount_point() {
        let refused = |table: String| {
            let error = bpffs_outlives_container(&table, Path::new("/sys/fs/bpf/terway")).unwrap_err();
            assert_eq!(error.code, errors::BPFFS_PRIVATE);
            error.detail
        };
        assert!(refused(table(&BPFFS.replace("master:11 ", ""), NETNS)).contains("at /sys/fs/bpf was not propagated"));
        assert!(refused(table("", NETNS)).contains("type sysfs, mounted at /sys"));
        // One that the container mounts over the node's is the one that is used.
        let over = "720 710 0:99 / /sys/fs/bpf rw - bpf bpf rw";
        assert!(refused(table(&format!("{BPFFS}\n{over}"), NETNS)).contains("was not propagated"));
    }

    #[test]
    fn netns_folder_without_propagation_is_reported() {
        let detail = |netns: &str| pods_are_unseen(&table(BPFFS, netns), Path::new("/run/netns")).unwrap().detail;
        assert!(detail(&NETNS.replace("master:5 ", "")).contains("on the mount /run/netns"));
        assert!(detail("").contains("on the mount /,"));
        // A mount of the whole of /run serves as well.
        assert_eq!(pods_are_unseen(&table(BPFFS, &NETNS.replace("/run/netns", "/run")), Path::new("/run/netns")), None);
    }

    #[test]
    fn real_path_of_a_folder_that_does_not_exist_yet() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&target, target.join("link")).unwrap();
        assert_eq!(real(&target.join("link/later/still")), target.join("later/still"));
    }
}
