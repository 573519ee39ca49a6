//! Compiles the eBPF programs and leaves the object file in `OUT_DIR`, where `src/bpf` embeds it.

use std::env;
use std::path::{Path, PathBuf};

#[path = "../terway-ebpf/compile.rs"]
mod compile;

fn main() {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let (manifest, out_dir) = (folder("CARGO_MANIFEST_DIR"), folder("OUT_DIR"));
    let root = manifest.parent().unwrap_or(Path::new("."));
    for input in [
        "terway-ebpf/src",
        "terway-ebpf/Cargo.toml",
        "terway-ebpf/compile.rs",
        "terway-ebpf/abi/src",
        "terway-ebpf/abi/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    for name in [compile::SKIP, "TERWAY_BPF_CARGO", "TERWAY_BPF_RUSTC"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // `cargo::error` fails the build and is shown in full, without the backtrace of a panic.
    if let Err(reason) = compile::compile(root, &out_dir) {
        for line in reason.lines() {
            println!("cargo::error={line}");
        }
    }
}
