//! Debian's kernels: fetched by apt with lists of its own, so signatures are checked and the machine's sources stay as
//! they are, and kept unpacked in the cache. Which mirror: the one that the machine's own sources name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::process;
use crate::progress::Step;
use crate::setup::PrivateApt;
use crate::workspace::Workspace;

/// The kernels that the datapath has to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Release {
    /// Debian 11; the oldest series a node may run.
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 12's newer one; TCX and netkit.
    #[value(name = "6.12")]
    V6_12,
    /// What Debian's next release has now.
    #[value(name = "newest")]
    Newest,
}

impl Release {
    /// All of them, oldest first.
    pub(crate) const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    /// The name on the command line and in the cache.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// Suite and metapackage: point releases vanish from the mirror once superseded, so only the name of the series is fixed.
    fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::V5_10 => ("bullseye-security", "linux-image-cloud-amd64"),
            Self::V6_1 => ("bookworm-security", "linux-image-cloud-amd64"),
            Self::V6_12 => ("bookworm-security", "linux-image-6.12-cloud-amd64"),
            Self::Newest => ("forky", "linux-image-cloud-amd64"),
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// `uname -r`.
    pub(crate) version: String,
    /// `…/lib/modules/VERSION`.
    pub(super) modules: PathBuf,
    /// The bzImage.
    pub(crate) image: PathBuf,
}

impl Kernel {
    /// The kernel of this release, from the cache, else from the mirror; `refresh` asks the mirror anyway.
    ///
    /// # Errors
    /// It is not in the cache, and apt is missing or the mirror cannot be reached.
    pub(super) fn get(workspace: &Workspace, release: Release, refresh: bool) -> Result<Self> {
        let dir = workspace.cache.join("kernels").join(release.name());
        if !refresh && let Ok(kernel) = Self::open(&dir) {
            return Ok(kernel);
        }
        let parent = workspace.cache.join("kernels");
        fs::create_dir_all(&parent)?;
        let mut attempts = 0;
        let (work, unpacked) = loop {
            // Next to its place, so that the rename below is one.
            let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&parent)?;
            let unpacked = work.path().join("kernel");
            attempts += 1;
            match fetch(release, work.path(), &unpacked) {
                Ok(()) => break (work, unpacked),
                // A mirror that is being updated gives lists and files that do not match; a moment later they do.
                Err(_) if attempts < 3 && process::interrupted().is_ok() => {
                    std::thread::sleep(std::time::Duration::from_secs(5));
                }
                Err(error) => return Err(error.context(format!("cannot fetch kernel {}", release.name()))),
            }
        };
        // Another run may have been faster; a rename onto a filled folder fails, so the old one is moved away first.
        if dir.exists() {
            fs::rename(&dir, work.path().join("old"))?;
        }
        fs::rename(&unpacked, &dir)?;
        Self::open(&dir)
    }

    /// Debian puts the image into /boot, from Debian 14 on beside the modules.
    fn open(dir: &Path) -> Result<Self> {
        for root in ["lib/modules", "usr/lib/modules"] {
            let Ok(entries) = fs::read_dir(dir.join(root)) else { continue };
            let mut versions: Vec<String> =
                entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
            versions.sort();
            for version in versions.into_iter().rev() {
                let modules = dir.join(root).join(&version);
                let images = [dir.join("boot").join(format!("vmlinuz-{version}")), modules.join("vmlinuz")];
                if let Some(image) = images.into_iter().find(|i| i.is_file()) {
                    return Ok(Self { version, modules, image });
                }
            }
        }
        bail!("no kernel in {}", dir.display())
    }
}

/// Downloads the newest kernel of a release and unpacks it into `target`; `work` is a scratch folder.
fn fetch(release: Release, work: &Path, target: &Path) -> Result<()> {
    let (suite, metapackage) = release.source();
    let _step = Step::start(&format!("fetching kernel {} of Debian's {suite}", release.name()));
    let apt = PrivateApt::open(work, suite, &["deb"])?;
    let mut depends = apt.command("apt-cache");
    depends.args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]);
    depends.args(["--no-replaces", "--no-enhances", metapackage]);
    let tree = process::output_as(&mut depends, &format!("apt-cache depends {metapackage}"))?;
    let packages = kernel_packages(&tree);
    if packages.is_empty() {
        bail!("{suite} has no package behind {metapackage}");
    }
    process::output_as(apt.command("apt-get").arg("download").args(&packages), "apt-get download")?;
    fs::create_dir_all(target)?;
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            process::output(Command::new("dpkg-deb").arg("-x").arg(&path).arg(target))?;
        }
    }
    Ok(())
}

/// The versioned kernel packages in the output of `apt-cache depends --recurse`: each package starts a line.
fn kernel_packages(tree: &str) -> Vec<String> {
    let parts = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];
    let versioned = |name: &str| {
        let rest = parts.iter().find_map(|p| name.strip_prefix(p))?;
        let (major, rest) = rest.split_once('.')?;
        let (minor, patch) = rest.split_once('.')?;
        let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        (number(major) && number(minor) && patch.starts_with(|c: char| c.is_ascii_digit())).then_some(())
    };
    let mut found: Vec<String> = tree.lines().filter(|l| versioned(l).is_some()).map(str::to_owned).collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versioned_kernel_packages_are_taken() {
        let tree = "linux-image-cloud-amd64\n  Depends: linux-image-6.12.9-cloud-amd64\nlinux-image-6.12.9-cloud-amd64\n\
                    kmod\nlinux-base\nlinux-modules-6.12.9+deb14-cloud-amd64\nlinux-image-6.12.9-cloud-amd64\n";
        assert_eq!(kernel_packages(tree), ["linux-image-6.12.9-cloud-amd64", "linux-modules-6.12.9+deb14-cloud-amd64"]);
    }

    #[test]
    fn both_layouts_of_a_kernel_package_open() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        fs::create_dir_all(old.join("lib/modules/5.10.1")).unwrap();
        assert!(Kernel::open(&old).is_err());
        fs::create_dir_all(old.join("boot")).unwrap();
        fs::write(old.join("boot/vmlinuz-5.10.1"), "").unwrap();
        assert_eq!(Kernel::open(&old).unwrap().version, "5.10.1");
        fs::create_dir_all(new.join("usr/lib/modules/7.2.1")).unwrap();
        fs::write(new.join("usr/lib/modules/7.2.1/vmlinuz"), "").unwrap();
        assert_eq!(Kernel::open(&new).unwrap().image, new.join("usr/lib/modules/7.2.1/vmlinuz"));
    }
}
