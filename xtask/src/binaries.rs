//! The shipped programs, built as they are shipped, side by side in one folder; and the verbs that run one of them.
//!
//! The plugin is always the static, size-optimised one. The daemon comes in two builds: the development profile, with
//! overflow checks, for suites and the demonstration (its dependencies are compiled for the suites anyway), and the
//! release profile for benchmarks and images.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::process;
use crate::progress;
use crate::setup::{self, Part};
use crate::workspace::{Package, Workspace, cargo_home, is_root};

/// Tells suites, demonstration and benchmarks where the programs are.
const BIN_DIR: &str = "TERWAY_BIN_DIR";
const PLUGIN: &str = "terway";
const SIMULATOR: &str = "terway-sim";
const BENCH: &str = "bench";

/// A benchmark of the program `bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Benchmark {
    /// ADD and DEL against the reference plugin ptp; memory and CPU of the daemon with 100 pods.
    Add,
    /// The address pool: one decision, pods on an empty node, pods on a warm one.
    Ipam,
    /// Throughput and latency between pods against a plain veth pair.
    Path,
    /// Policies: compiling, the first packet of a connection, traffic.
    Policy,
    /// The programs: packets through them without a network.
    Prog,
    /// Services: programming them, and traffic against the direct way and against nftables.
    Svc,
}

/// Builds plugin, daemon and simulator for suites and returns their folder.
///
/// # Errors
/// Something does not build; cargo has then printed what.
pub(crate) fn for_tests(workspace: &Workspace, packages: &[Package]) -> Result<PathBuf> {
    let dir = workspace.target.join("terway-bin");
    let programs: Vec<_> =
        ["terwayd", "terway-cli", SIMULATOR].into_iter().filter(|p| owner(packages, p).is_some()).collect();
    // With --workspace, so that the features, and so the compiled dependencies, are those of the suites.
    let mut command = workspace.cargo("build");
    command.arg("--workspace").args(programs.iter().flat_map(|p| ["--bin", p]));
    progress::build(&mut command, "building the daemon")?;
    gather(&dir, &workspace.target.join("debug"), &programs)?;
    plugin(workspace, &dir)?;
    Ok(dir)
}

/// Builds everything with optimisation and returns its folder.
///
/// # Errors
/// As [`for_tests`].
pub(crate) fn for_release(workspace: &Workspace, packages: &[Package], extra: &[&str]) -> Result<PathBuf> {
    let dir = workspace.target.join("terway-bin-release");
    let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for program in ["terwayd", "terway-cli"].into_iter().chain(extra.iter().copied()) {
        let package = owner(packages, program).with_context(|| format!("the workspace has no program `{program}`"))?;
        wanted.entry(package).or_default().push(program);
    }
    for (package, programs) in wanted {
        // One package at a time: what ships must not get the features that another package asks for.
        let mut command = workspace.cargo("build");
        command.args(["--release", "--package", package]);
        command.args(programs.iter().flat_map(|p| ["--bin", p]));
        progress::build(&mut command, &format!("building {package} with optimisation"))?;
        gather(&dir, &workspace.target.join("release"), &programs)?;
    }
    plugin(workspace, &dir)?;
    Ok(dir)
}

/// Builds everything that the image holds, static and with optimisation, and returns its folder.
///
/// # Errors
/// As [`for_tests`].
pub(crate) fn for_image(workspace: &Workspace) -> Result<PathBuf> {
    let dir = workspace.target.join("terway-bin-image");
    let programs = ["terwayd", "terway-cli"];
    let mut command = static_build(workspace, "release", "terway-daemon");
    command.args(programs.iter().flat_map(|p| ["--bin", p]));
    progress::build(&mut command, "building the static daemon with optimisation")?;
    gather(&dir, &workspace.target.join(triple()).join("release"), &programs)?;
    plugin(workspace, &dir)?;
    Ok(dir)
}

/// The plugin: static, so that it starts without a loader and runs on any host.
fn plugin(workspace: &Workspace, dir: &Path) -> Result<()> {
    progress::build(&mut static_build(workspace, "cni", "terway-cni"), "building the plugin")?;
    gather(dir, &workspace.target.join(triple()).join("cni"), &[PLUGIN])
}

fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// A build of static programs that are the same whatever folders they are built in. glibc's resolver works statically since 2.34, which has
/// `files` and `dns` of nsswitch.conf built in.
fn static_build(workspace: &Workspace, profile: &str, package: &str) -> Command {
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", triple().to_uppercase().replace('-', "_"));
    let mut values = vec!["-Ctarget-feature=+crt-static".to_owned()];
    values.push(format!("--remap-path-prefix={}=/src", workspace.root.display()));
    values.extend(cargo_home().map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    let mut command = workspace.cargo("build");
    command
        .args(["--profile", profile, "--package", package, "--target", &triple()])
        // With --target these flags spare build scripts and macros, which cannot be static.
        .env(flags, values.join(" "));
    command
}

/// Puts programs into `dir`, each by one rename: a suite may be running the old one.
fn gather(dir: &Path, from: &Path, programs: &[&str]) -> Result<()> {
    fs::create_dir_all(dir)?;
    for program in programs {
        let (source, target) = (from.join(program), dir.join(program));
        let fresh = dir.join(format!(".{program}.new"));
        // A leftover of an interrupted run; usually there is none.
        drop(fs::remove_file(&fresh));
        if fs::hard_link(&source, &fresh).is_err() {
            fs::copy(&source, &fresh).with_context(|| source.display().to_string())?;
        }
        fs::rename(&fresh, &target)?;
        // When both are links to one file already, rename(2) does nothing and leaves the new name.
        drop(fs::remove_file(&fresh));
    }
    Ok(())
}

/// The package that has a program of this name.
fn owner<'a>(packages: &'a [Package], program: &str) -> Option<&'a str> {
    let has = |p: &&Package| p.targets.iter().any(|t| t.kind == "bin" && t.name == program);
    packages.iter().find(has).map(|p| p.name.as_str())
}

/// `cargo xtask demo`.
///
/// # Errors
/// Not root, set-up or build fail, or the simulator cannot be started.
pub(crate) fn demo(workspace: &Workspace, json: bool, keep: bool) -> Result<ExitCode> {
    if !is_root() {
        bail!("the demonstration makes network namespaces and starts containerd: run it as root");
    }
    setup::ensure(workspace, &[Part::Ebpf, Part::Net, Part::Cri])?;
    let packages = workspace.metadata()?;
    if owner(&packages, SIMULATOR).is_none() {
        bail!("the workspace has no program `{SIMULATOR}`");
    }
    let dir = for_tests(workspace, &packages)?;
    let mut command = Command::new(dir.join(SIMULATOR));
    command.arg("demo");
    become_program(workspace, &mut command, &dir, &[("--json", json), ("--keep", keep)])
}

/// `cargo xtask bench`.
///
/// # Errors
/// As [`demo`].
pub(crate) fn bench(workspace: &Workspace, names: &[Benchmark], json: bool) -> Result<ExitCode> {
    if !is_root() {
        bail!("the benchmarks make network namespaces and load eBPF programs: run them as root");
    }
    setup::ensure(workspace, &[Part::Ebpf, Part::Net, Part::Cri])?;
    let packages = workspace.metadata()?;
    let mut programs = vec![BENCH];
    programs.extend(owner(&packages, SIMULATOR).map(|_| SIMULATOR));
    let dir = for_release(workspace, &packages, &programs)?;
    let mut command = Command::new(dir.join(BENCH));
    command.args(names.iter().filter_map(|name| Some(name.to_possible_value()?.get_name().to_owned())));
    become_program(workspace, &mut command, &dir, &[("--json", json)])
}

/// Replaces xtask by the program: it then gets the terminal and its signals directly.
fn become_program(
    workspace: &Workspace,
    command: &mut Command,
    dir: &Path,
    flags: &[(&str, bool)],
) -> Result<ExitCode> {
    workspace.prepare(command);
    command.env(BIN_DIR, dir);
    command.args(flags.iter().filter(|(_, on)| *on).map(|(flag, _)| flag));
    process::release_signals();
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run `{}`", process::shown(command)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_replaces_and_leaves_nothing_else() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for content in ["one", "two", "two"] {
            fs::write(from.path().join("a"), content).unwrap();
            gather(to.path(), from.path(), &["a"]).unwrap();
            assert_eq!(fs::read_to_string(to.path().join("a")).unwrap(), content);
            assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
        }
        assert!(gather(to.path(), from.path(), &["gone"]).is_err());
    }

    #[test]
    fn the_plugin_belongs_to_its_package() {
        let packages = Workspace::find().unwrap().metadata().unwrap();
        assert_eq!(owner(&packages, PLUGIN), Some("terway-cni"));
        assert_eq!(owner(&packages, "nosuch"), None);
    }
}
