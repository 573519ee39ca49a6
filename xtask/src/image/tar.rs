//! Writing a tar archive in the ustar format (POSIX.1-2008, pax: "ustar Interchange Format"), the same bytes for the same
//! input: no times, no owners.

use std::collections::BTreeSet;
use std::io::{self, Write};

const BLOCK: usize = 512;

/// An archive being written. Parents come by themselves; a name given twice is kept once.
pub(super) struct Tar<W> {
    out: W,
    names: BTreeSet<String>,
}

impl<W: Write> Tar<W> {
    /// An empty archive.
    pub(super) fn new(out: W) -> Self {
        Self { out, names: BTreeSet::new() }
    }

    /// A folder.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        if self.fresh(name)? { self.header(&format!("{name}/"), 0o755, 0, b'5', "") } else { Ok(()) }
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        if self.fresh(name)? { self.header(name, 0o777, 0, b'2', target) } else { Ok(()) }
    }

    /// A regular file.
    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        if !self.fresh(name)? {
            return Ok(());
        }
        self.header(name, mode, content.len(), b'0', "")?;
        self.out.write_all(content)?;
        self.out.write_all(&vec![0; content.len().next_multiple_of(BLOCK) - content.len()])
    }

    /// Ends the archive: two empty blocks.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Notes a name and adds its parents; false when it is there already.
    fn fresh(&mut self, name: &str) -> io::Result<bool> {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.directory(parent)?;
        }
        Ok(self.names.insert(name.to_owned()))
    }

    fn header(&mut self, name: &str, mode: u32, size: usize, kind: u8, target: &str) -> io::Result<()> {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, room: usize, bytes: &[u8]| {
            if bytes.len() > room {
                return Err(io::Error::other(format!("{name}: a field of {room} bytes is too small for it")));
            }
            block[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        put(0, 100, name.as_bytes())?;
        put(100, 8, format!("{mode:07o}").as_bytes())?;
        put(108, 8, b"0000000")?; // uid
        put(116, 8, b"0000000")?; // gid
        put(124, 12, format!("{size:011o}").as_bytes())?;
        put(136, 12, b"00000000000")?; // mtime
        put(148, 8, b"        ")?; // checksum, counted as blanks
        put(156, 1, &[kind])?;
        put(157, 100, target.as_bytes())?;
        put(257, 8, b"ustar\x0000")?;
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.out.write_all(&block)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn another_program_reads_it() {
        let mut tar = Tar::new(Vec::new());
        tar.file("usr/bin/a", 0o755, b"content").unwrap();
        tar.file("usr/bin/a", 0o755, b"second is ignored").unwrap();
        tar.link("bin", "usr/bin").unwrap();
        let bytes = tar.finish().unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
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
    fn a_name_that_does_not_fit_is_an_error() {
        assert!(Tar::new(Vec::new()).file(&"x".repeat(101), 0o644, b"").is_err());
    }
}
