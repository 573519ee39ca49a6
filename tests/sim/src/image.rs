//! An OCI image of one static busybox, so that containers run without a registry or any outside address.
//!
//! Formats: OCI image layout 1.0.0, image manifest v1.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// The name under which the image is imported; it serves as the sandbox image too.
pub const NAME: &str = "localhost/terway-sim:1";

/// The applets that get a link in `/bin`.
const APPLETS: &[&str] = &[
    "arp",
    "arping",
    "ash",
    "cat",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "ip",
    "kill",
    "ls",
    "mkdir",
    "nc",
    "netstat",
    "nslookup",
    "ping",
    "ping6",
    "printf",
    "ps",
    "rm",
    "route",
    "sed",
    "seq",
    "sh",
    "sleep",
    "tail",
    "test",
    "touch",
    "traceroute",
    "traceroute6",
    "true",
    "wc",
    "wget",
];

/// Ends at once on TERM, so that stopping a container never waits for its SIGKILL.
const PAUSE: &[u8] = b"#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 86400 & wait $!; done\n";

/// Writes the image to `out` as a tar of an OCI layout, as `ctr images import` takes it. `extra` are host files and where they go
/// inside, without leading slash; dynamically linked ones do not run there.
///
/// # Errors
/// When busybox or an extra file cannot be read, or `out` cannot be written.
pub fn write(out: &Path, extra: &[(PathBuf, &str)]) -> Result<()> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|path| Path::new(path).exists())
        .context("busybox is missing (Debian package busybox-static)")?;
    let mut layer = Archive::new();
    for (folder, mode) in
        [("bin", 0o755), ("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("root", 0o755), ("sys", 0o755)]
            .into_iter()
            .chain([("tmp", 0o1777), ("www", 0o755)])
    {
        layer.folder(folder, mode)?;
    }
    layer.file("bin/busybox", 0o755, &fs::read(busybox).with_context(|| format!("read {busybox}"))?)?;
    for applet in APPLETS {
        layer.link(&format!("bin/{applet}"), "busybox")?;
    }
    layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")?;
    layer.file("etc/group", 0o644, b"root:x:0:\nnobody:x:65534:\n")?;
    layer.file("www/index.html", 0o644, b"served by a pod\n")?;
    layer.file("pause", 0o755, PAUSE)?;
    for (from, to) in extra {
        layer.file(to, 0o755, &fs::read(from).with_context(|| format!("read {}", from.display()))?)?;
    }
    let layer = layer.finish()?;

    let config = json!({
        "architecture": oci_arch(), "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/bin"], "Entrypoint": ["/pause"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "terway-sim"}],
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len()}],
    })
    .to_string()
    .into_bytes();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&manifest), "size": manifest.len(),
            "platform": {"architecture": oci_arch(), "os": "linux"},
            "annotations": {"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "1"},
        }],
    })
    .to_string()
    .into_bytes();

    let mut image = Archive::new();
    image.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    image.file("index.json", 0o644, &index)?;
    for blob in [&config, &manifest, &layer] {
        image.file(&format!("blobs/sha256/{}", hex::encode(Sha256::digest(blob))), 0o644, blob)?;
    }
    fs::write(out, image.finish()?).with_context(|| format!("write {}", out.display()))
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(blob)))
}

const fn oci_arch() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// A tar archive in memory.
struct Archive(Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let mut header = header(EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, name, content)
    }

    fn folder(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.0.append_data(&mut header(EntryType::Directory, mode), name, io::empty())
    }

    fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.0.append_link(&mut header(EntryType::Symlink, 0o777), name, target)
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        self.0.into_inner()
    }
}

/// Of root, made at the beginning of 1970, so that the same input gives the same image.
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
    use super::*;

    #[test]
    fn tar_reads_what_we_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("image.tar");
        let extra = folder.path().join("extra");
        fs::write(&extra, vec![7u8; 1000]).unwrap();
        write(&out, &[(extra, "bin/extra")]).unwrap();
        let list = std::process::Command::new("tar").arg("-tvf").arg(&out).output().unwrap();
        let list = String::from_utf8(list.stdout).unwrap();
        assert_eq!(list.lines().count(), 5, "{list}");
        let index: serde_json::Value = serde_json::from_slice(
            &std::process::Command::new("tar").arg("-xOf").arg(&out).arg("index.json").output().unwrap().stdout,
        )
        .unwrap();
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], NAME);
        let layer = list.lines().last().unwrap().split_whitespace().last().unwrap().to_owned();
        let inner = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("tar -xOf {} {layer} | tar -tvf -", out.display()))
            .output()
            .unwrap();
        let inner = String::from_utf8(inner.stdout).unwrap();
        assert!(inner.contains("bin/ping -> busybox") && inner.contains("1000 1970"), "{inner}");
        assert!(inner.contains("drwxrwxrwt"), "{inner}");
    }
}
