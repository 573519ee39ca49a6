//! Compiles the eBPF programs: one quiet function, shared by the daemon's build script and `cargo xtask` through `#[path]`.
//!
//! It needs a compiler that carries the source of `core` (there is no prebuilt one for the BPF target) and `bpf-linker`. The stable
//! toolchain that builds everything else has no such source here, so the compiler is chosen separately. std only: a build script
//! should not have dependencies of its own.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Set to 1 to build without the programs, for clippy and documentation. The result is an empty file.
pub(crate) const SKIP: &str = "TERWAY_SKIP_EBPF";

const TARGET: &str = "bpfel-unknown-none";
const BIN: &str = "terway-programs";

/// Compiles package `terway-ebpf` of the workspace at `root` and puts the object file into `out_dir`.
///
/// Several runs at once are safe: cargo locks the target folder, which this build shares with no other, so nobody who waits for
/// it holds what it needs.
///
/// # Errors
/// One sentence when a tool is missing; the compiler's output when the programs do not compile.
pub(crate) fn compile(root: &Path, out_dir: &Path) -> Result<PathBuf, String> {
    let object = out_dir.join("terway.o");
    if env::var_os(SKIP).is_some_and(|value| value == "1") {
        return write(&object, &[]).map(|()| object);
    }
    let linker = find_linker()?;
    let (cargo, rustc) = find_compiler()?;
    let target_dir = target_dir(root, out_dir);

    // The unit separator keeps spaces in arguments intact. `cpu=v3` (32-bit instructions, Linux 5.1) is what 5.10 knows; v4 needs 6.6.
    let flags = [
        "--cfg=bpf_target_arch=\"x86_64\"".into(),
        "-Cdebuginfo=2".into(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(),
    ]
    .join("\u{1f}");
    let mut command = Command::new(&cargo);
    command
        .current_dir(root)
        .args(["build", "--quiet", "--locked", "--release", "--package", "terway-ebpf", "--bin", BIN])
        .args(["-Z", "build-std=core", "--target", TARGET, "--color", "never", "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", &rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    // What an outer cargo or clippy sets for its own compiler would mislead the inner one.
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "CARGO_MAKEFLAGS",
        "MAKEFLAGS",
        "CLIPPY_ARGS",
    ] {
        command.env_remove(name);
    }
    let output = command.output().map_err(|e| format!("cannot run {}: {e}", cargo.display()))?;
    if !output.status.success() {
        return Err(format!(
            "the eBPF programs do not compile ({} with {}):\n{}{}",
            cargo.display(),
            rustc.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let built = target_dir.join(TARGET).join("release").join(BIN);
    let bytes = fs::read(&built).map_err(|e| format!("cannot read {}: {e}", built.display()))?;
    write(&object, &bytes).map(|()| object)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// `bpf` inside the workspace's target folder, whichever that is, so that all profiles share one build.
fn target_dir(root: &Path, out_dir: &Path) -> PathBuf {
    // Cargo marks its target folder with this file; a build script's OUT_DIR lies some levels below.
    let marked = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    marked.map_or_else(|| root.join("target"), Path::to_path_buf).join("bpf")
}

fn find_linker() -> Result<PathBuf, String> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    folders.extend(home.map(|home| home.join("bin")));
    folders
        .into_iter()
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| "bpf-linker is not installed: run `cargo xtask setup`".into())
}

/// The cargo and rustc to use: as the environment says, else a rustup nightly with the source of core, else Debian's.
fn find_compiler() -> Result<(PathBuf, PathBuf), String> {
    let from = |name: &str| env::var_os(name).map(PathBuf::from);
    match (from("TERWAY_BPF_CARGO"), from("TERWAY_BPF_RUSTC")) {
        (Some(cargo), Some(rustc)) => return Ok((cargo, rustc)),
        (None, None) => {}
        _ => return Err("set both of TERWAY_BPF_CARGO and TERWAY_BPF_RUSTC, or none".into()),
    }
    let rustup_home = from("RUSTUP_HOME").or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".rustup")));
    let nightly = rustup_home.and_then(|home| newest_nightly(&home.join("toolchains")));
    let debian =
        has_source(Path::new("/usr")).then(|| (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc")));
    nightly.or(debian).filter(|(cargo, rustc)| cargo.is_file() && rustc.is_file()).ok_or_else(|| {
        "no Rust compiler with the source of core (rust-src) is installed: run `cargo xtask setup`".into()
    })
}

fn newest_nightly(toolchains: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut names: Vec<OsString> = fs::read_dir(toolchains).ok()?.flatten().map(|entry| entry.file_name()).collect();
    names.retain(|name| name.to_string_lossy().starts_with("nightly"));
    // Names are `nightly-<date>-<host>` or `nightly-<host>`; the undated one is the one that rustup keeps up to date.
    names.sort_by_key(|name| (!name.to_string_lossy().starts_with("nightly-2"), name.clone()));
    let sysroot = names.into_iter().rev().map(|name| toolchains.join(name)).find(|sysroot| has_source(sysroot))?;
    Some((sysroot.join("bin/cargo"), sysroot.join("bin/rustc")))
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}
