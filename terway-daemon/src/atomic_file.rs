//! Files that are either the old or the new one, whatever happens in between.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Writes `content` to `path` by a temporary file in the same folder, fsync, rename, and fsync of the folder.
///
/// The temporary name ends in `.tmp`: runtimes ignore it in their configuration folder.
///
/// # Errors
/// What the file system says; the old file is still there then.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = parent.join(name);
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(parent)?.sync_all()
}

/// As [`write`], but leaves an identical file alone. Tells whether it wrote.
///
/// # Errors
/// As [`write`].
pub fn write_if_changed(path: &Path, content: &[u8]) -> io::Result<bool> {
    if std::fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    write(path, content).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_and_only_when_different() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10-terway.conflist");
        assert!(write_if_changed(&path, b"one").unwrap());
        assert!(!write_if_changed(&path, b"one").unwrap());
        assert!(write_if_changed(&path, b"two").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
