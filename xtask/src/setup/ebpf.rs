//! The eBPF toolchain: a compiler with the sources of `core`, and bpf-linker on an LLVM that reads its bitcode.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt;
use crate::process;
use crate::progress;
use crate::workspace::{Workspace, cargo_home, is_root, which};

/// The version that the programs are known to pass the verifier with.
const BPF_LINKER: &str = "0.13.0";
/// Debian's toolchain for building browsers: kept new in a stable release by its security updates.
const BROWSER: [&str; 3] = ["cargo-web", "rust-web-src", "rustc-web"];
/// New enough in releases after Debian 13.
const PLAIN: [&str; 3] = ["cargo", "rust-src", "rustc"];
/// The oldest 1.x that compiles the programs: `rust-version` of terway-ebpf.
const OLDEST: u32 = 90;
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// Makes sure of compiler and linker; returns what is there, and whether something was installed.
///
/// # Errors
/// As [`apt::ensure`]; or bpf-linker does not build.
pub(super) fn ensure(workspace: &Workspace) -> Result<(String, bool)> {
    let system = Path::new(SYSTEM_RUSTC);
    let mut installed = false;
    let rustc = match nightly() {
        Some(rustc) => rustc,
        None => {
            if !usable(system) {
                system_compiler()?;
                installed = true;
            }
            system.to_path_buf()
        }
    };
    if !linker_is_right() {
        let llvm = llvm_of(&rustc)?;
        let (devel, polly) = (format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"));
        // libpolly: LLVM names it among its libraries; libzstd: it was built with it; g++: for libstdc++.
        apt::ensure(&[&devel, &polly, "libzstd-dev", "g++"])?;
        install_linker(workspace, llvm)?;
        installed = true;
    }
    Ok((format!("{}, bpf-linker {BPF_LINKER}", rustc.display()), installed))
}

/// The compiler of the programs: a nightly, else Debian's.
pub(crate) fn compiler() -> PathBuf {
    nightly().unwrap_or_else(|| SYSTEM_RUSTC.into())
}

/// Installs Debian's compiler with its sources.
fn system_compiler() -> Result<()> {
    if !is_root() {
        // Fails with the sentence that names them.
        return apt::get(&BROWSER);
    }
    apt::ensure_lists()?;
    let new_enough = |packages: &&[&str; 3]| {
        let version = apt::candidate(packages[2]);
        version.as_deref().and_then(minor).is_some_and(|minor| minor >= OLDEST)
    };
    let choose = || [&BROWSER, &PLAIN].into_iter().find(new_enough);
    let mut chosen = choose();
    if chosen.is_none() {
        // The sources may have changed since the lists were fetched.
        apt::update()?;
        chosen = choose();
    }
    let Some(packages) = chosen else {
        bail!(
            "the machine's apt sources have no rustc from 1.{OLDEST} on; enable Debian's security updates in them, or \
             add rust-src to a rustup nightly"
        );
    };
    apt::get(packages)?;
    if !usable(Path::new(SYSTEM_RUSTC)) {
        bail!("{} are installed, but {SYSTEM_RUSTC} has no sources of core", packages.join(", "));
    }
    Ok(())
}

/// The newest rustup nightly that has rust-src.
fn nightly() -> Option<PathBuf> {
    let rustup = match std::env::var_os("RUSTUP_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => crate::workspace::home().ok()?.join(".rustup"),
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(rustup.join("toolchains"))
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nightly"))
        .map(|entry| entry.path().join("bin/rustc"))
        .filter(|rustc| usable(rustc))
        .collect();
    found.sort();
    found.pop()
}

/// Whether a compiler is there, new enough, and has the sources of `core`.
fn usable(rustc: &Path) -> bool {
    let ask = |args: &[&str]| process::output(Command::new(rustc).args(args).env_remove("RUSTUP_TOOLCHAIN")).ok();
    rustc.is_file()
        && ask(&["--version"]).and_then(|text| minor(&text)).is_some_and(|minor| minor >= OLDEST)
        && ask(&["--print", "sysroot"])
            .is_some_and(|dir| Path::new(dir.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file())
}

/// `96` of `rustc 1.96.0 (…)`, or of the package's version `1.96.0+dfsg1-1`.
fn minor(version: &str) -> Option<u32> {
    version.trim_start_matches("rustc ").strip_prefix("1.")?.split('.').next()?.parse().ok()
}

/// The major version of the LLVM inside a compiler: bitcode is readable by the same or a newer one only.
fn llvm_of(rustc: &Path) -> Result<u32> {
    let text = process::output(Command::new(rustc).arg("-vV"))?;
    llvm_major(&text).with_context(|| format!("{} does not tell its LLVM version", rustc.display()))
}

fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|l| l.strip_prefix("LLVM version:"))?;
    line.trim().split('.').next()?.parse().ok()
}

fn linker_is_right() -> bool {
    which("bpf-linker")
        .and_then(|path| process::output(Command::new(path).arg("--version")).ok())
        .is_some_and(|text| text.split_whitespace().any(|word| word == BPF_LINKER))
}

fn install_linker(workspace: &Workspace, llvm: u32) -> Result<()> {
    let mut command = workspace.cargo("install");
    command
        .args(["bpf-linker", "--version", BPF_LINKER, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        // Its release profile has full debug information, which takes longest; LLVM does the linker's work, and is there already.
        .args(["--config", "profile.release.debug=false", "--config", "profile.release.opt-level=1"])
        // Its build script asks the llvm-config of this prefix.
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"));
    progress::build(&mut command, "building bpf-linker")
        .with_context(|| format!("bpf-linker does not build against LLVM {llvm}"))?;
    if !linker_is_right() {
        let place = cargo_home().map_or_else(String::new, |h| h.join("bin").display().to_string());
        bail!("bpf-linker {BPF_LINKER} is installed in {place}, but another version comes first in PATH");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_of_a_compiler() {
        assert_eq!(llvm_major("rustc 1.96.0\nhost: x86_64\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
        assert_eq!(minor("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n"), Some(96));
        assert_eq!(minor("1.85.0+dfsg3-1~deb12u3"), Some(85));
        assert_eq!(minor("cargo 1.96.0\n"), None);
    }
}
