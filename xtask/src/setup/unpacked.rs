//! Debian packages unpacked into a folder of the cache: their programs run from there, and nothing of the machine changes.
//!
//! For a part whose packages apt could only install by removing others, or that a user without root needs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt;
use crate::process;
use crate::progress::Step;
use crate::workspace::{Workspace, which};

/// Where programs of a package are.
const PROGRAMS: [&str; 4] = ["usr/bin", "usr/sbin", "bin", "sbin"];
/// Where libraries of a package are; folders of an architecture lie below.
const LIBRARIES: [&str; 2] = ["usr/lib", "lib"];

/// Programs of the machine, and of a folder of unpacked packages where the machine has none.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    root: PathBuf,
}

impl Unpacked {
    /// The folder `name` of the cache, which need not exist.
    pub(crate) fn open(workspace: &Workspace, name: &str) -> Self {
        Self { root: workspace.cache.join("packages").join(name) }
    }

    /// A program: the machine's own, else an unpacked one.
    pub(crate) fn find(&self, program: &str) -> Option<PathBuf> {
        which(program).or_else(|| self.own(program))
    }

    fn own(&self, program: &str) -> Option<PathBuf> {
        PROGRAMS.iter().map(|folder| self.root.join(folder).join(program)).find(|path| path.is_file())
    }

    /// A command that runs a program; an unpacked one with its own libraries.
    ///
    /// # Errors
    /// There is no such program.
    pub(crate) fn command(&self, program: &str) -> Result<Command> {
        let path = self.find(program).with_context(|| format!("no program `{program}`; run `cargo xtask setup`"))?;
        let mut command = Command::new(&path);
        if self.holds(&path) {
            command.env("LD_LIBRARY_PATH", self.libraries());
        }
        Ok(command)
    }

    /// Whether a file is one of the unpacked ones.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
    }

    /// Where an unpacked file would be if its package were installed; other paths stay.
    pub(crate) fn installed_at(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).map_or_else(|_| path.to_owned(), |below| Path::new("/").join(below))
    }

    /// An unpacked folder, if it is there.
    pub(crate) fn folder(&self, below: &str) -> Option<PathBuf> {
        Some(self.root.join(below)).filter(|path| path.is_dir())
    }

    /// The folders of unpacked libraries, for `LD_LIBRARY_PATH`.
    pub(crate) fn libraries(&self) -> OsString {
        let mut folders = Vec::new();
        for folder in LIBRARIES.map(|folder| self.root.join(folder)) {
            let below = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
            folders.extend(below.filter(|path| path.to_string_lossy().ends_with("-linux-gnu")));
            folders.push(folder);
        }
        std::env::join_paths(folders).unwrap_or_default()
    }

    /// Downloads packages with all that they depend on and the machine lacks, and unpacks them; they replace what was unpacked before.
    ///
    /// # Errors
    /// A package is not to be had, or apt finds no way to install it.
    pub(super) fn fetch(&self, packages: &[&str]) -> Result<()> {
        let parent = self.root.parent().context("the cache has no folder")?;
        fs::create_dir_all(parent)?;
        let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(parent)?;
        let files = work.path().join("files");
        fs::create_dir_all(&files)?;
        let chosen = choose(packages)?;
        let _step = Step::start(&format!("downloading {} packages into {}", chosen.len(), self.root.display()));
        let mut download = Command::new("apt-get");
        download.args(["-q", "-o", "Acquire::Retries=5", "-o", "APT::Sandbox::User=root", "download"]);
        process::output_as(download.args(&chosen).current_dir(&files), "apt-get download")?;
        let tree = work.path().join("tree");
        fs::create_dir_all(&tree)?;
        for entry in fs::read_dir(&files)? {
            process::output(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&tree))?;
        }
        // A rename onto a filled folder fails, so the old one is moved away first.
        if self.root.exists() {
            fs::rename(&self.root, work.path().join("old"))?;
        }
        fs::rename(&tree, &self.root).with_context(|| self.root.display().to_string())
    }
}

/// The packages that apt would install or upgrade, as `NAME=VERSION`. What it would remove is of no interest: nothing is installed.
fn choose(packages: &[&str]) -> Result<Vec<String>> {
    let mut simulation = Command::new("apt-get");
    simulation.args(["-s", "-y", "-q", "--no-install-recommends", "install"]).args(packages).env("LC_ALL", "C");
    let chosen = planned(&process::output_as(&mut simulation, "apt-get -s install")?);
    if chosen.is_empty() {
        bail!("apt would install nothing for {}", packages.join(" "));
    }
    Ok(chosen)
}

/// `NAME=VERSION` of each line `Inst NAME [INSTALLED] (VERSION …)`.
fn planned(simulation: &str) -> Vec<String> {
    let package = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some(format!("{name}={version}"))
    };
    simulation.lines().filter_map(package).collect()
}

/// Downloads and unpacks `packages` unless each of `programs` is on the machine or among what was unpacked; says whether it did.
///
/// # Errors
/// As [`Unpacked::fetch`].
pub(super) fn ensure(unpacked: &Unpacked, programs: &[&str], packages: &[&str]) -> Result<bool> {
    let missing = |programs: &[&str]| -> Vec<String> {
        programs.iter().filter(|p| unpacked.find(p).is_none()).map(|p| (*p).to_owned()).collect()
    };
    if missing(programs).is_empty() {
        return Ok(false);
    }
    if which("apt-get").is_none() {
        bail!("no {} here, and no apt to get it by", missing(programs).join(", "));
    }
    if unpacked.fetch(packages).is_err() {
        // The lists of a fresh machine are empty, those of an old one name files that the mirror no longer has.
        apt::update()?;
        unpacked.fetch(packages)?;
    }
    match missing(programs).as_slice() {
        [] => Ok(true),
        missing => bail!("{} do not contain {}", packages.join(", "), missing.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_would_install_or_upgrade_is_fetched_and_nothing_is_removed() {
        let planned = planned(
            "Reading package lists...\nRemv qemu-utils [1:10]\nInst bpftool (7.1.0+6.1.192-3 Debian [amd64])\n\
             Inst linux-perf [6.1.187-1] (6.1.192-3 Debian [amd64])\nInst seabios (1.16 Debian [all]) []\n\
             Conf bpftool (7.1.0 Debian [amd64])\n",
        );
        assert_eq!(planned, ["bpftool=7.1.0+6.1.192-3", "linux-perf=6.1.192-3", "seabios=1.16"]);
    }

    #[test]
    fn unpacked_programs_are_second_choice_and_get_their_libraries() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace { root: dir.path().into(), target: dir.path().into(), cache: dir.path().into() };
        let unpacked = Unpacked::open(&workspace, "x");
        let root = dir.path().join("packages/x");
        fs::create_dir_all(root.join("usr/lib/x86_64-linux-gnu")).unwrap();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/sh"), "").unwrap();
        fs::write(root.join("usr/bin/only-unpacked"), "").unwrap();
        assert!(!unpacked.holds(&unpacked.find("sh").unwrap()), "the machine's own comes first");
        let own = unpacked.find("only-unpacked").unwrap();
        assert_eq!(unpacked.installed_at(&own), Path::new("/usr/bin/only-unpacked"));
        assert_eq!(unpacked.installed_at(Path::new("/bin/sh")), Path::new("/bin/sh"));
        let command = unpacked.command("only-unpacked").unwrap();
        let variable = command.get_envs().find_map(|(k, v)| (k == "LD_LIBRARY_PATH").then(|| v.unwrap().to_owned()));
        assert!(variable.unwrap().to_string_lossy().contains("packages/x/usr/lib/x86_64-linux-gnu"));
        assert!(unpacked.command("sh").unwrap().get_envs().all(|(k, _)| k != "LD_LIBRARY_PATH"));
        assert!(unpacked.command("nosuch").is_err());
    }
}
