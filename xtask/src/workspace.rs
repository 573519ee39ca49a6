//! Where things are: the workspace, its build folder, the caches, and how cargo is called.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;

/// Tells suites and the demonstration where downloads are kept.
const CACHE_DIR: &str = "TERWAY_CACHE_DIR";

/// The folders that chores work in.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    /// The folder of the root Cargo.toml.
    pub(crate) root: PathBuf,
    /// Cargo's build folder.
    pub(crate) target: PathBuf,
    /// Downloads that outlive a checkout: `$TERWAY_CACHE_DIR`, else `$XDG_CACHE_HOME/terway`, else `~/.cache/terway`.
    pub(crate) cache: PathBuf,
}

impl Workspace {
    /// The workspace that this xtask was built from.
    ///
    /// # Errors
    /// The environment tells neither a manifest folder nor a home.
    pub(crate) fn find() -> Result<Self> {
        // At run time, so that a checkout may be moved; the compiled-in value serves a binary started by hand.
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().context("xtask has no parent folder")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache = match (variable(CACHE_DIR), variable("XDG_CACHE_HOME")) {
            (Some(dir), _) => dir,
            (None, Some(dir)) => dir.join("terway"),
            (None, None) => home()?.join(".cache/terway"),
        };
        Ok(Self { root, target, cache })
    }

    /// A `cargo` of the same toolchain that built xtask, without the variables that `cargo run` set for xtask itself.
    pub(crate) fn cargo(&self, verb: &str) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.arg(verb);
        self.prepare(&mut command);
        command
    }

    /// The compiler that cargo uses.
    pub(crate) fn rustc(&self) -> Command {
        let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        self.prepare(&mut command);
        command
    }

    /// Gives a command our folder, a PATH that ends with the places of our tools, and a clean environment.
    pub(crate) fn prepare(&self, command: &mut Command) {
        command.current_dir(&self.root).env("PATH", search_path()).env(CACHE_DIR, &self.cache);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if matches!(&*text, "CARGO" | "CARGO_MANIFEST_DIR" | "CARGO_MANIFEST_PATH")
                || text.starts_with("CARGO_PKG_")
            {
                command.env_remove(&name);
            }
        }
        // `cargo run` points it at its own toolchain's libraries, which are not for programs of the other toolchain.
        if std::env::var_os("CARGO").is_some() {
            command.env_remove("LD_LIBRARY_PATH");
        }
    }

    /// `cargo metadata` of our own packages.
    ///
    /// # Errors
    /// Cargo cannot read a manifest.
    pub(crate) fn metadata(&self) -> Result<Vec<Package>> {
        let text = process::output(self.cargo("metadata").args(["--no-deps", "--format-version=1"]))?;
        let value: Value = serde_json::from_str(&text).context("cargo metadata")?;
        packages(&value).context("cargo metadata has an unknown shape")
    }
}

/// One package of the workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest: PathBuf,
    pub(crate) targets: Vec<Target>,
    pub(crate) dependencies: Vec<Dependency>,
}

/// One build target of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) name: String,
    /// `lib`, `bin`, `test`, `proc-macro`, …
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
}

/// One line of a package's dependency tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) optional: bool,
    /// `dev` or `build`; normal ones have none.
    pub(crate) kind: Option<String>,
    /// The `cfg(...)` or triple it is limited to.
    pub(crate) target: Option<String>,
}

fn packages(value: &Value) -> Option<Vec<Package>> {
    let text = |v: &Value, key: &str| Some(v.get(key)?.as_str()?.to_owned());
    let mut found = Vec::new();
    for package in value.get("packages")?.as_array()? {
        let mut targets = Vec::new();
        for target in package.get("targets")?.as_array()? {
            targets.push(Target {
                name: text(target, "name")?,
                kind: target.get("kind")?.get(0)?.as_str()?.to_owned(),
                source: text(target, "src_path")?.into(),
            });
        }
        let mut dependencies = Vec::new();
        for dependency in package.get("dependencies")?.as_array()? {
            dependencies.push(Dependency {
                name: text(dependency, "name")?,
                optional: dependency.get("optional")?.as_bool()?,
                kind: text(dependency, "kind"),
                target: text(dependency, "target"),
            });
        }
        let manifest = text(package, "manifest_path")?.into();
        found.push(Package { name: text(package, "name")?, manifest, targets, dependencies });
    }
    Some(found)
}

/// The caller's home.
///
/// # Errors
/// `HOME` is not set.
pub(crate) fn home() -> Result<PathBuf> {
    std::env::var_os("HOME").filter(|v| !v.is_empty()).map(PathBuf::from).context("HOME is not set")
}

/// Cargo's own folder, where `cargo install` puts binaries below `bin`.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| home().ok().map(|h| h.join(".cargo")))
}

/// Our PATH with what `cargo install` and root's programs need added at its end.
pub(crate) fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    let mut more: Vec<PathBuf> = cargo_home().into_iter().map(|h| h.join("bin")).collect();
    more.extend(["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from));
    for dir in more {
        if !std::env::split_paths(&path).any(|p| p == dir) {
            if !path.is_empty() {
                path.push(":");
            }
            path.push(dir);
        }
    }
    path
}

/// The file that `name` would run.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Path::new(name).is_file().then(|| name.into());
    }
    std::env::split_paths(&search_path()).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_of_this_very_workspace() {
        let packages = Workspace::find().unwrap().metadata().unwrap();
        let xtask = packages.iter().find(|p| p.name == "xtask").unwrap();
        assert!(xtask.targets.iter().any(|t| t.kind == "bin" && t.name == "xtask" && t.source.is_file()));
        assert!(xtask.dependencies.iter().any(|d| d.name == "anyhow" && d.kind.is_none() && !d.optional));
        let abi = packages.iter().find(|p| p.name == "terway-abi").unwrap();
        assert!(abi.dependencies.iter().any(|d| d.name == "aya" && d.optional));
    }

    #[test]
    fn the_search_path_ends_with_the_places_of_our_tools() {
        let path = search_path();
        assert!(std::env::split_paths(&path).any(|p| p == Path::new("/usr/sbin")));
        assert!(which("sh").is_some());
        assert_eq!(which("no-such-program-anywhere"), None);
    }
}
