//! The DELs that the daemon could not take, as files. The protocol between plugin and daemon is told in
//! `terway_core::cni::queue`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use terway_core::cni::queue::{self, QueuedDel};
use terway_core::ident::AttachmentKey;

/// The file of `key`, whether it is there or not.
pub(crate) fn path(folder: &str, key: &AttachmentKey) -> PathBuf {
    Path::new(folder).join(queue::file_name(key))
}

/// Puts `del` into its file so that after a power loss the file is whole or absent.
///
/// # Errors
/// Those of the file system.
pub(crate) fn write(folder: &str, del: &QueuedDel) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let path = path(folder, &del.attachment);
    // Two DELs of one key may run at once (containerd repeats one whose caller is gone); each has its own temporary file.
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(del.encode().as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, &path));
    if let Err(error) = written {
        let _may_not_exist = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(folder)?.sync_all()
}

/// Removes the file of `key`, if there is one. Not synced: a file that comes back is carried out once more, to no effect.
pub(crate) fn remove(folder: &str, key: &AttachmentKey) {
    let _usually_absent = fs::remove_file(path(folder, key));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn del(container_id: &str) -> QueuedDel {
        let attachment =
            AttachmentKey { network: "terway".into(), container_id: container_id.into(), ifname: "eth0".into() };
        QueuedDel { attachment, netns: String::new() }
    }

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn one_file_for_each_key_and_no_remains() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("a/b");
        let text = folder.to_str().unwrap();
        for id in ["c1", "c1", "c2"] {
            write(text, &del(id)).unwrap();
        }
        assert_eq!(names(&folder).len(), 2);
        assert!(names(&folder).iter().all(|name| name.ends_with(queue::SUFFIX)));
        let content = fs::read(path(text, &del("c1").attachment)).unwrap();
        assert_eq!(QueuedDel::decode(&content).unwrap(), del("c1"));
        remove(text, &del("c1").attachment);
        remove(text, &del("c1").attachment);
        assert_eq!(names(&folder).len(), 1);
    }

    #[test]
    fn a_failed_write_leaves_no_file() {
        let parent = tempfile::tempdir().unwrap();
        let text = parent.path().to_str().unwrap();
        // A folder in the place of the file makes the rename fail.
        fs::create_dir(path(text, &del("c1").attachment)).unwrap();
        assert!(write(text, &del("c1")).is_err());
        assert_eq!(names(parent.path()).len(), 1);
        assert!(write("/dev/null/x", &del("c1")).is_err());
    }
}
