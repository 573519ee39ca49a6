//! Writing a cpio archive in the "newc" format, which the kernel unpacks as its first root
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};

/// `st_mode` bits of the kinds of entries.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Names are relative to the root; parents come by themselves; a name given twice is kept once.
pub(super) struct Cpio<W> {
    out: W,
    names: BTreeSet<String>,
    written: u64,
}

impl<W: Write> Cpio<W> {
    /// An empty archive.
    pub(super) fn new(out: W) -> Self {
        Self { out, names: BTreeSet::new(), written: 0 }
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
        self.entry(name, DIRECTORY | permissions, (0, 0), &[])
    }

    /// A regular file.
    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | permissions, (0, 0), content)
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub(super) fn device(&mut self, name: &str, permissions: u32, number: (u32, u32)) -> io::Result<()> {
        self.entry(name, CHARACTER | permissions, number, &[])
    }

    /// Ends the archive and returns what it was written to. Archives may follow one another in one file, so the length
    /// is rounded up to 512 as other writers do.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.raw("TRAILER!!!", 0, (0, 0), &[])?;
        self.pad(512)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let name = name.trim_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/')
            && !self.names.contains(parent)
        {
            self.directory(parent, 0o755)?;
        }
        if !self.names.insert(name.to_owned()) {
            return Ok(());
        }
        self.raw(name, mode, device, content)
    }

    fn raw(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|e| io::Error::other(format!("{name} is too large: {e}")))?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let inode = u32::try_from(self.names.len()).map_err(io::Error::other)?;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(name);
        header.push('\0');
        self.put(header.as_bytes())?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self, unit: u64) -> io::Result<()> {
        let rest = self.written.next_multiple_of(unit) - self.written;
        self.written += rest;
        io::copy(&mut io::Read::take(io::repeat(0), rest), &mut self.out).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut cpio = Cpio::new(Vec::new());
        cpio.file("/usr/bin/tool", 0o755, b"abc").unwrap();
        cpio.file("usr/bin/tool", 0o644, b"second is ignored").unwrap();
        cpio.link("bin", "usr/bin").unwrap();
        cpio.device("dev/null", 0o666, (1, 3)).unwrap();
        cpio.finish().unwrap()
    }

    #[test]
    fn headers_are_aligned_and_parents_come_first() {
        let bytes = sample();
        assert_eq!(bytes.len() % 512, 0);
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
