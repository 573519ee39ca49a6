//! Files that are either the old or the new one, whatever happens in between.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Writes `content` to `path` by a temporary file in the same folder, fsync, rename, and fsync of the folder.
///
/// The temporary name ends in `.tmp`: runtimes ignore it in their configuration folder.
///
/// # Errors
/// What the file system says; the old file is still there then.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with(path, content, 0o666)
}

/// As [`write`], readable for the owner alone from its first byte on.
///
/// # Errors
/// As [`write`].
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with(path, content, 0o600)
}

/// As [`write`], executable for all.
///
/// # Errors
/// As [`write`].
pub fn write_executable(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with(path, content, 0o755)
}

fn write_with(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = parent.join(name);
    // A temporary file that a crash left behind could have another mode.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
    if mode & 0o111 != 0 {
        // The umask must not decide who may execute it.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
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

/// As [`write_private`], but leaves an identical file alone, whose mode it corrects if need be. Tells whether it changed anything.
///
/// # Errors
/// As [`write`].
pub fn write_private_if_changed(path: &Path, content: &[u8]) -> io::Result<bool> {
    let is_private = |path: &Path| Ok::<_, io::Error>(std::fs::metadata(path)?.permissions().mode() & 0o777 == 0o600);
    if std::fs::read(path).is_ok_and(|old| old == content) && is_private(path)? {
        return Ok(false);
    }
    write_private(path, content).map(|()| true)
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
        std::fs::write(dir.path().join("10-terway.conflist.tmp"), b"left by a crash").unwrap();
        write_private(&path, b"three").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!((std::fs::read(&path).unwrap(), mode & 0o777), (b"three".to_vec(), 0o600));
        assert!(!write_private_if_changed(&path, b"three").unwrap());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(write_private_if_changed(&path, b"three").unwrap());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!((std::fs::read(&path).unwrap(), mode & 0o777), (b"three".to_vec(), 0o600));
    }
}
