//! Archives with the same bytes for the same input: no times, no owners.

use std::collections::BTreeSet;
use std::io::{self, Write};

use tar::{Builder, EntryType, Header};

/// A tar archive being written. Parents come by themselves; a name given twice is kept once.
pub(super) struct Archive<W: Write> {
    builder: Builder<W>,
    names: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub(super) fn new(out: W) -> Self {
        Self { builder: Builder::new(out), names: BTreeSet::new() }
    }

    /// A folder.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        if !self.is_new(name)? {
            return Ok(());
        }
        let mut header = header(EntryType::Directory, 0o755);
        self.builder.append_data(&mut header, format!("{name}/"), io::empty())
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        if !self.is_new(name)? {
            return Ok(());
        }
        self.builder.append_link(&mut header(EntryType::Symlink, 0o777), name, target)
    }

    /// A regular file.
    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        if !self.is_new(name)? {
            return Ok(());
        }
        let mut header = header(EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.builder.append_data(&mut header, name, content)
    }

    /// Ends the archive and returns what it was written to.
    pub(super) fn finish(self) -> io::Result<W> {
        let mut out = self.builder.into_inner()?;
        out.flush()?;
        Ok(out)
    }

    /// Notes a name and adds its parents; false when it is there already.
    fn is_new(&mut self, name: &str) -> io::Result<bool> {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.directory(parent)?;
        }
        Ok(self.names.insert(name.to_owned()))
    }
}

/// Of root, made at the beginning of 1970.
fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn another_program_reads_it() {
        let mut archive = Archive::new(Vec::new());
        archive.file("usr/bin/a", 0o755, b"content").unwrap();
        archive.file("usr/bin/a", 0o755, b"second is ignored").unwrap();
        archive.link("bin", "usr/bin").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar");
        std::fs::write(&path, bytes).unwrap();
        let out = Command::new("tar").arg("-tvf").arg(&path).env("LC_ALL", "C").output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let kinds: Vec<_> = text.lines().map(|l| l.split_whitespace().next().unwrap()).collect();
        assert_eq!(kinds, ["drwxr-xr-x", "drwxr-xr-x", "-rwxr-xr-x", "lrwxrwxrwx"], "{text}");
        let out = Command::new("tar").arg("-xOf").arg(&path).arg("usr/bin/a").output().unwrap();
        assert_eq!(out.stdout, b"content");
    }

    #[test]
    fn a_name_of_any_length_is_read_back() {
        let name = format!("{}/{}", "x".repeat(120), "y".repeat(200));
        let mut archive = Archive::new(Vec::new());
        archive.file(&name, 0o644, b"content").unwrap();
        let bytes = archive.finish().unwrap();
        let mut reader = tar::Archive::new(bytes.as_slice());
        let names: Vec<_> = reader.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
        assert!(names.iter().any(|path| path.to_str() == Some(&name)), "{names:?}");
    }
}
