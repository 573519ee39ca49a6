//! kube-apiserver, etcd and kubectl for the rung `kube`: those of `KUBEBUILDER_ASSETS`, else built once into the cache.
//!
//! Debian 12 has etcd and kubectl as packages and Kubernetes 1.20 as a source package with all that it vendors, but no package of the API server. The
//! source lacks two things: the generated OpenAPI definitions, and a reflect2 that Go from 1.18 on compiles.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::PrivateApt;
use super::apt;
use crate::process;
use crate::progress::Step;
use crate::workspace::{Workspace, which};

/// The programs of the rung.
const PROGRAMS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];
/// The suite that has them.
const SUITE: &str = "bookworm";
/// The compiler, the newer reflect2, and what is not built.
const PACKAGES: [&str; 5] =
    ["etcd-server", "golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev", "kubernetes-client"];

/// The folder of the cache in which the suites look.
fn folder(workspace: &Workspace) -> PathBuf {
    workspace.cache.join("kube")
}

fn is_complete(folder: &Path) -> bool {
    // kubectl may be the machine's own.
    PROGRAMS.iter().all(|name| folder.join(name).is_file() || (*name == "kubectl" && which(name).is_some()))
}

/// Makes sure of the programs; returns where they are, and whether they were built.
///
/// # Errors
/// The sources cannot be had or do not build.
pub(super) fn ensure(workspace: &Workspace) -> Result<(String, bool)> {
    let target = folder(workspace);
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    if let Some(folder) = assets.iter().chain([&target]).find(|folder| is_complete(folder)) {
        return Ok((folder.display().to_string(), false));
    }
    if which("apt-get").is_none() {
        bail!("no kube-apiserver here (KUBEBUILDER_ASSETS), and no apt to get its sources by");
    }
    apt::ensure(&["dpkg-dev"])?;
    fs::create_dir_all(&workspace.cache)?;
    let work = tempfile::Builder::new().prefix(".kube-").tempdir_in(&workspace.cache)?;
    build(work.path(), &target)?;
    Ok((target.display().to_string(), true))
}

fn build(work: &Path, target: &Path) -> Result<()> {
    let step = Step::start("building kube-apiserver, once (about five minutes on two cores)");
    step.detail("fetching sources and compiler");
    let apt = PrivateApt::open(work, SUITE, &["deb", "deb-src"])?;
    process::output_as(apt.command("apt-get").arg("download").args(PACKAGES), "apt-get download")?;
    let root = work.join("root");
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            process::output(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&root))?;
        }
    }
    let mut source = apt.command("apt-get");
    process::output_as(source.args(["source", "--download-only", "kubernetes"]), "apt-get source kubernetes")?;
    let description = fs::read_dir(work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("dsc")))
        .context("the source package has no description")?;
    // Where Go finds packages by their import path.
    let tree = work.join("go/src/k8s.io/kubernetes");
    fs::create_dir_all(tree.parent().context("a parent")?)?;
    process::output(Command::new("dpkg-source").arg("-x").arg(&description).arg(&tree).current_dir(work))?;
    replace_reflect2(&root, &tree)?;

    let go = Go { root: root.join("usr/lib/go-1.19"), work: work.to_owned(), tree };
    step.detail("generating OpenAPI definitions");
    go.generate_openapi()?;
    step.detail("compiling");
    let version = |package: &str| format!("-X k8s.io/kubernetes/vendor/k8s.io/{package}/version.gitVersion=v1.20.2");
    let flags = format!("-s -w {} {}", version("component-base"), version("client-go/pkg"));
    let out = work.join("out");
    fs::create_dir_all(&out)?;
    let mut compile = go.command();
    compile.args(["build", "-tags", "providerless", "-trimpath", "-ldflags", &flags, "-o"]);
    process::output_as(compile.arg(out.join("kube-apiserver")).arg("./cmd/kube-apiserver"), "go build kube-apiserver")?;
    for name in ["etcd", "kubectl"] {
        fs::copy(root.join("usr/bin").join(name), out.join(name)).with_context(|| name.to_owned())?;
    }
    if target.exists() {
        fs::rename(target, work.join("old"))?;
    }
    fs::rename(&out, target).with_context(|| target.display().to_string())
}

/// Puts Debian's reflect2 in the place of the vendored one, which Go from 1.18 on does not link.
fn replace_reflect2(root: &Path, tree: &Path) -> Result<()> {
    let below = "github.com/modern-go/reflect2";
    let (newer, vendored) = (root.join("usr/share/gocode/src").join(below), tree.join("vendor").join(below));
    fs::remove_dir_all(&vendored)?;
    fs::create_dir_all(&vendored)?;
    for entry in fs::read_dir(&newer).with_context(|| newer.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default().to_owned();
        if (name.ends_with(".go") || name.ends_with(".s")) && !name.ends_with("_test.go") {
            fs::copy(&path, vendored.join(name))?;
        }
    }
    Ok(())
}

/// The Go compiler on the unpacked source.
struct Go {
    root: PathBuf,
    work: PathBuf,
    tree: PathBuf,
}

impl Go {
    fn command(&self) -> Command {
        let mut command = Command::new(self.root.join("bin/go"));
        // The folder's name by which Go knows the package, also where the path leads through a link.
        command
            .current_dir(&self.tree)
            .env("PWD", &self.tree)
            .env("GOROOT", &self.root)
            .env("GOPATH", self.work.join("go"));
        command.env("GOCACHE", self.work.join("go-cache")).env("GOFLAGS", "").env("GOPROXY", "off");
        command.env("GO111MODULE", "off").env("CGO_ENABLED", "0");
        command
    }

    fn generate_openapi(&self) -> Result<()> {
        let generated = self.tree.join("pkg/generated/openapi/zz_generated.openapi.go");
        if generated.is_file() {
            return Ok(());
        }
        // The vendored packages of Kubernetes itself are links into staging.
        let staging = self.tree.join("staging/src/k8s.io");
        for entry in fs::read_dir(&staging)? {
            let entry = entry?;
            let link = self.tree.join("vendor/k8s.io").join(entry.file_name());
            if !link.exists() {
                symlink(entry.path(), link)?;
            }
        }
        let generator = self.work.join("openapi-gen");
        let mut compile = self.command();
        compile.args(["build", "-o"]).arg(&generator).arg("./vendor/k8s.io/kube-openapi/cmd/openapi-gen");
        process::output_as(&mut compile, "go build openapi-gen")?;
        let mut packages = Vec::new();
        for folder in ["cmd", "pkg", "vendor/k8s.io"] {
            marked(&self.tree.join(folder), &self.tree, &mut packages)?;
        }
        packages.sort();
        packages.dedup();
        let mut run = Command::new(&generator);
        run.current_dir(&self.tree)
            .env("PWD", &self.tree)
            .env("GOROOT", &self.root)
            .env("GOPATH", self.work.join("go"));
        run.env("GO111MODULE", "off").env("PATH", self.root.join("bin"));
        run.args(["--logtostderr", "-p", "k8s.io/kubernetes/pkg/generated/openapi", "-O", "zz_generated.openapi"]);
        run.args(["-h", "hack/boilerplate/boilerplate.generatego.txt", "-i", &packages.join(",")]);
        run.arg("-r").arg(self.work.join("violations.txt"));
        process::output_as(&mut run, "openapi-gen").map(drop)
    }
}

/// Import paths of the packages whose files carry the generator's marker.
fn marked(folder: &Path, tree: &Path, packages: &mut Vec<String>) -> Result<()> {
    let mut is_marked = false;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        // Follows links: vendored packages of Kubernetes itself are links.
        if path.is_dir() {
            if !name.starts_with("sample-") && !name.starts_with('_') && name != "testdata" {
                marked(&path, tree, packages)?;
            }
        } else if name.ends_with(".go") && !is_marked {
            let text = fs::read(&path)?;
            is_marked = String::from_utf8_lossy(&text).lines().any(|line| {
                line.strip_prefix("//")
                    .is_some_and(|rest| rest.trim_start_matches(' ').starts_with("+k8s:openapi-gen="))
            });
        }
    }
    if is_marked {
        let below = folder.strip_prefix(tree).context("a folder of the tree")?.display().to_string();
        packages
            .push(below.strip_prefix("vendor/").map_or_else(|| format!("k8s.io/kubernetes/{below}"), str::to_owned));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_packages_are_named_by_their_import_path() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("pkg/a/doc.go", "// +k8s:openapi-gen=true\n\npackage a\n");
        write("pkg/b/doc.go", "package b // +k8s:openapi-gen=true\n");
        write("vendor/k8s.io/api/core/v1/doc.go", "//+k8s:openapi-gen=true\npackage v1\n");
        write("vendor/k8s.io/sample-apiserver/doc.go", "// +k8s:openapi-gen=true\n");
        let mut packages = Vec::new();
        for folder in ["pkg", "vendor"] {
            marked(&dir.path().join(folder), dir.path(), &mut packages).unwrap();
        }
        packages.sort();
        assert_eq!(packages, ["k8s.io/api/core/v1", "k8s.io/kubernetes/pkg/a"]);
    }
}
