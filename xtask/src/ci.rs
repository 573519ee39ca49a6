//! `cargo xtask ci`: everything that a submission must pass, in the order of cost. A failed check does not stop the rest,
//! so that one run tells all; it counts as one failed in the closing line.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::codegen;
use crate::manifests;
use crate::process;
use crate::progress;
use crate::setup::{self, Part};
use crate::suites::{self, Rung, Tally};
use crate::tidy;
use crate::workspace::{Workspace, which};

/// The rungs that must have run.
const REQUIRED: [Rung; 6] = [Rung::Unit, Rung::Verifier, Rung::Prog, Rung::Netns, Rung::Cri, Rung::Vm];

/// Runs all checks and all rungs; true when nothing failed.
///
/// # Errors
/// The eBPF toolchain cannot be had, or a signal arrives.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let started = Instant::now();
    let mut steps = Steps::default();
    // Without this part nothing builds; the others only cost their rungs, which then say so.
    setup::run(workspace, &[Part::Ebpf])?;
    for part in Part::ALL {
        if let Err(error) = setup::ensure(workspace, &[part]) {
            process::interrupted()?;
            println!("{error:#}");
        }
    }
    steps.step("fmt", || process::check(workspace.cargo("fmt").args(["--all", "--check"])))?;
    steps.step("tidy", || if tidy::run(workspace, false)? { Ok(()) } else { bail!("see above") })?;
    steps.step("codegen", || codegen::run(workspace, true))?;
    steps.step("manifests", || match setup::ensure(workspace, &[Part::Manifests]) {
        Ok(()) => manifests::run(workspace),
        Err(error) => {
            println!("skipped: {error:#}");
            Ok(())
        }
    })?;
    steps.step("deny", || deny(workspace))?;
    steps.step("clippy", || {
        let mut command = workspace.cargo("clippy");
        command.args(["--workspace", "--all-targets", "--", "-D", "warnings"]);
        progress::build(&mut command, "clippy").map(drop)
    })?;
    let rungs = Instant::now();
    let (mut tally, empty) = suites::climb(workspace, &Rung::ALL, false)?;
    for rung in empty.into_iter().filter(|rung| REQUIRED.contains(rung)) {
        tally.add(Tally::fail(&format!("rung {}: no test passed, and a submission must have climbed it", rung.name())));
    }
    println!("\n== time");
    for (name, seconds) in &steps.times {
        println!("{name:<9} {seconds:.0} s");
    }
    println!("{:<9} {:.0} s", "test", rungs.elapsed().as_secs_f32());
    println!("{:<9} {:.0} s", "all", started.elapsed().as_secs_f32());
    tally.add(steps.failed);
    for failure in &tally.failures {
        println!("FAILED {failure}");
    }
    println!("{}", tally.line());
    Ok(tally.failed == 0)
}

#[derive(Default)]
struct Steps {
    times: Vec<(&'static str, f32)>,
    failed: Tally,
}

impl Steps {
    fn step(&mut self, name: &'static str, check: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n== {name}");
        let started = Instant::now();
        if let Err(error) = check() {
            process::interrupted()?;
            println!("{error:#}");
            self.failed.add(Tally::fail(&format!("{name}: {error:#}")));
        }
        self.times.push((name, started.elapsed().as_secs_f32()));
        Ok(())
    }
}

/// Licences, bans and sources. Not advisories: their database is a download that CI's machines cannot make; a person
/// with a network runs `cargo deny check`.
fn deny(workspace: &Workspace) -> Result<()> {
    if which("cargo-deny").is_none() {
        println!("skipped: cargo-deny is not installed");
        return Ok(());
    }
    let mut command = Command::new("cargo-deny");
    workspace.prepare(&mut command);
    command.args(["--log-level", "error", "check", "bans", "licenses", "sources"]);
    process::check(&mut command)
}
