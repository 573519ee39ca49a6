//! Writing an initramfs: a cpio archive in the "newc" format, which the kernel unpacks as its first root
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};

use cpio::newc::{self, ModeFileType};

/// An archive being written. Names are relative to the root; parents come by themselves; a name given twice is kept once.
pub(super) struct Initramfs<W> {
    out: W,
    names: BTreeSet<String>,
}

impl<W: Write> Initramfs<W> {
    /// An empty archive.
    pub(super) fn new(out: W) -> Self {
        Self { out, names: BTreeSet::new() }
    }

    /// Whether an entry of this name is in the archive.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name.trim_matches('/'))
    }

    /// Takes names for present that an earlier archive of the same initramfs holds.
    pub(super) fn assume(&mut self, names: &[&str]) {
        self.names.extend(names.iter().map(|n| (*n).to_owned()));
    }

    /// A folder.
    pub(super) fn directory(&mut self, name: &str, permissions: u32) -> io::Result<()> {
        self.entry(name, (ModeFileType::Directory, permissions), (0, 0), &[])
    }

    /// A regular file.
    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, (ModeFileType::Regular, permissions), (0, 0), content)
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, (ModeFileType::Symlink, 0o777), (0, 0), target.as_bytes())
    }

    /// A character device.
    pub(super) fn device(&mut self, name: &str, permissions: u32, number: (u32, u32)) -> io::Result<()> {
        self.entry(name, (ModeFileType::Char, permissions), number, &[])
    }

    /// Ends the archive and returns what it was written to. Archives may follow one another in one file: each ends on a multiple of four.
    pub(super) fn finish(self) -> io::Result<W> {
        let mut out = newc::trailer(self.out)?;
        out.flush()?;
        Ok(out)
    }

    fn entry(
        &mut self,
        name: &str,
        (kind, permissions): (ModeFileType, u32),
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let name = name.trim_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/')
            && !self.names.contains(parent)
        {
            self.directory(parent, 0o755)?;
        }
        if !self.names.insert(name.to_owned()) {
            return Ok(());
        }
        let size = u32::try_from(content.len()).map_err(|e| io::Error::other(format!("{name} is too large: {e}")))?;
        let entry = newc::Builder::new(name)
            .ino(u32::try_from(self.names.len()).map_err(io::Error::other)?)
            .mode(permissions)
            .set_mode_file_type(kind)
            .rdev_major(device.0)
            .rdev_minor(device.1);
        let mut writer = entry.write(&mut self.out, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Initramfs::new(Vec::new());
        archive.file("/usr/bin/tool", 0o755, b"abc").unwrap();
        archive.file("usr/bin/tool", 0o644, b"second is ignored").unwrap();
        archive.link("bin", "usr/bin").unwrap();
        archive.device("dev/null", 0o666, (1, 3)).unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn headers_are_aligned_and_parents_come_first() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        let at = |needle: &[u8]| bytes.windows(needle.len()).position(|w| w == needle).unwrap();
        assert!(at(b"usr\0") < at(b"usr/bin\0") && at(b"usr/bin\0") < at(b"usr/bin/tool\0"));
        // The header of the file: 110 bytes and the name, then the content on a multiple of four.
        assert_eq!(at(b"abc") % 4, 0);
        assert!(at(b"TRAILER!!!\0") > at(b"abc"));
    }

    #[test]
    fn another_program_reads_it() {
        let Some(busybox) = crate::workspace::which("busybox") else {
            println!("SKIP: no busybox here to read the archive");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.cpio"), sample()).unwrap();
        let out = Command::new(busybox)
            .args(["cpio", "-itv"])
            .stdin(std::fs::File::open(dir.path().join("a.cpio")).unwrap())
            .stderr(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{text}");
        let line = |name: &str| text.lines().find(|l| l.ends_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        assert!(line("usr/bin/tool").starts_with("-rwxr-xr-x"));
        assert!(line("bin -> usr/bin").starts_with('l'));
        assert!(line("dev/null").starts_with("crw-rw-rw-"));
    }
}
