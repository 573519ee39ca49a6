//! `cargo xtask image`: the container image of the DaemonSet as an OCI archive (image-spec 1.1, image-layout.md), made
//! without a container engine: one layer with three static programs, root certificates and the bill of materials; no shell, no libraries.
//!
//! `ctr -n k8s.io images import FILE` takes it. The same sources and toolchain give the same digest, in whatever folder.

mod archive;
mod sbom;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use object::Endianness;
use object::elf::PT_INTERP;
use object::read::elf::{ElfFile64, ProgramHeader as _};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::archive::Archive;
use crate::binaries;
use crate::process;
use crate::setup::{self, Part};
use crate::workspace::Workspace;

/// Each program's place. The plugin lies where an init container copies it from.
const PROGRAMS: [(&str, &str); 3] =
    [("terwayd", "usr/bin/terwayd"), ("terway-cli", "usr/bin/terway-cli"), ("terway", "opt/cni/bin/terway")];
/// Root certificates: the daemon speaks TLS with the cloud.
const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// What the archive may take.
const SIZE_LIMIT: u64 = 25 << 20;

/// Builds the image and writes it to `output`, by default into cargo's build folder.
///
/// # Errors
/// The programs do not build, or a library or the root certificates are not on this machine.
pub(crate) fn run(workspace: &Workspace, output: Option<PathBuf>, name: &str) -> Result<()> {
    setup::ensure(workspace, &[Part::Ebpf])?;
    let dir = binaries::for_image(workspace)?;
    let output = output.unwrap_or_else(|| workspace.target.join("terway-image.tar"));
    let sbom = format!("{:#}\n", sbom::document(workspace, name)?);
    let work = tempfile::tempdir()?;
    let layer = layer(&dir, work.path(), sbom.as_bytes())?;
    let file = File::create(&output).with_context(|| output.display().to_string())?;
    let digest = archive(BufWriter::new(file), &layer, name)?;
    let beside = output.with_extension("spdx.json");
    fs::write(&beside, &sbom).with_context(|| beside.display().to_string())?;
    let size = fs::metadata(&output)?.len();
    println!("{}: {name}, {:.1} MiB, sha256:{digest}", output.display(), size as f64 / f64::from(1 << 20));
    println!("{}: its bill of materials, SPDX 2.3", beside.display());
    ensure!(size <= SIZE_LIMIT, "the image is larger than {} MiB", SIZE_LIMIT >> 20);
    Ok(())
}

/// The one layer, uncompressed.
fn layer(dir: &Path, work: &Path, sbom: &[u8]) -> Result<Vec<u8>> {
    let mut tar = Archive::new(Vec::new());
    // Mount points: the root file system of the DaemonSet's containers is read-only.
    for name in ["etc/cni/net.d", "etc/eni", "proc", "run/netns", "sys/fs/bpf", "tmp", "var/lib/cni/terway"] {
        tar.directory(name)?;
    }
    tar.link("var/run", "../run")?;
    tar.file("usr/share/doc/terway/sbom.spdx.json", 0o644, sbom)?;
    tar.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/usr/bin/terwayd\n")?;
    tar.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n")?;
    let certificates = fs::read(Path::new("/").join(CERTIFICATES))
        .context("no root certificates here; install the package ca-certificates")?;
    tar.file(CERTIFICATES, 0o644, &certificates)?;
    for (program, target) in PROGRAMS {
        let built = dir.join(program);
        let stripped = work.join(program);
        process::output(Command::new("strip").arg("-o").arg(&stripped).arg(&built))?;
        let content = fs::read(&stripped)?;
        ensure!(is_static(&content)?, "{} loads libraries, and the image has none", built.display());
        tar.file(target, 0o755, &content)?;
    }
    Ok(tar.finish()?)
}

/// Whether a program needs no loader (ELF: no segment of the type `PT_INTERP`).
fn is_static(program: &[u8]) -> Result<bool> {
    let elf = ElfFile64::<Endianness>::parse(program)?;
    let endian = elf.endian();
    Ok(!elf.elf_program_headers().iter().any(|header| header.p_type(endian) == PT_INTERP))
}

/// Compressed as registries store it: without the time and the name that gzip(1) adds.
fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(content)?;
    Ok(encoder.finish()?)
}

/// Writes the layout around a layer; returns the digest of the manifest, by which the image is known.
fn archive(out: impl Write, layer: &[u8], name: &str) -> Result<String> {
    let mut tar = Archive::new(out);
    tar.file("oci-layout", 0o644, &serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?)?;
    let mut blob = |kind: &str, content: &[u8]| -> Result<Value> {
        let digest = sha256(content);
        tar.file(&format!("blobs/sha256/{digest}"), 0o644, content)?;
        Ok(json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{digest}"),
            "size": content.len(),
        }))
    };
    let diff_id = format!("sha256:{}", sha256(layer));
    let layer = blob("layer.v1.tar+gzip", &gzip(layer)?)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Entrypoint": ["/usr/bin/terwayd"], "Env": ["PATH=/usr/bin:/usr/sbin"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let config = blob("config.v1+json", &serde_json::to_vec(&config)?)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
        "annotations": {
            "org.opencontainers.image.title": "terway",
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
        },
    });
    let mut manifest = blob("manifest.v1+json", &serde_json::to_vec(&manifest)?)?;
    let digest = manifest["digest"].as_str().unwrap_or_default().trim_start_matches("sha256:").to_owned();
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    // The first is the specification's, the second is what containerd names the image by.
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": tag, "io.containerd.image.name": name });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    tar.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
    tar.finish()?;
    Ok(digest)
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_blob_lies_under_its_digest_and_is_referred_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.tar");
        let digest = archive(File::create(&path).unwrap(), b"layer", "localhost/terway:1").unwrap();
        process::output(Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(dir.path())).unwrap();
        let blobs: Vec<_> = fs::read_dir(dir.path().join("blobs/sha256")).unwrap().flatten().collect();
        assert_eq!(blobs.len(), 3);
        for blob in &blobs {
            assert_eq!(sha256(&fs::read(blob.path()).unwrap()), blob.file_name().to_str().unwrap());
        }
        let read = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
        let index = read(dir.path().join("index.json"));
        assert_eq!(index["manifests"][0]["digest"], format!("sha256:{digest}"));
        let manifest = read(dir.path().join("blobs/sha256").join(&digest));
        assert_eq!(manifest["layers"][0]["digest"], format!("sha256:{}", sha256(&gzip(b"layer").unwrap())));
        let again = archive(Vec::new(), b"layer", "localhost/terway:1").unwrap();
        assert_eq!(again, digest, "the same input gives the same image");
    }
}
