//! `cargo xtask test [RUNG…]`: the test ladder. A rung sets up what it needs, everything is built once, each suite is one
//! test binary; suites of a rung run side by side. A rung that cannot run says why and counts as skipped.
//!
//! The last line is always `N passed, M failed, K skipped`.

mod compile;
mod guests;
mod inputs;
mod libtest;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use self::compile::Binary;
use self::libtest::Reader;
pub(crate) use self::libtest::Tally;
use crate::binaries;
use crate::process::{self, End};
use crate::progress::{self, Step};
use crate::setup::{self, Part};
use crate::workspace::{Package, Workspace, is_root};

/// The package of the suites.
const SUITES: &str = "terway-tests";
/// What one suite may take; the longest (a thousand pods, two hundred kills) needs a fraction of it.
const LIMIT: Duration = Duration::from_secs(1800);

/// How many of the slowest tests are named at the end.
const SLOWEST: usize = 10;

/// A rung of the ladder, from cheap and near to dear and real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Rung {
    /// Every crate's own tests, documentation included.
    Unit,
    /// Every program in every feature shape through the kernel's verifier.
    Verifier,
    /// Packets through the programs by `BPF_PROG_TEST_RUN`.
    Prog,
    /// Plugin, daemon and simulated cloud in network namespaces.
    Netns,
    /// The same under containerd.
    Cri,
    /// A real API server.
    Kube,
    /// Suites of the lower rungs under Debian's kernels in QEMU.
    Vm,
}

impl Rung {
    /// All rungs, in the order they run.
    pub(crate) const ALL: [Self; 7] =
        [Self::Unit, Self::Verifier, Self::Prog, Self::Netns, Self::Cri, Self::Kube, Self::Vm];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Verifier => "verifier",
            Self::Prog => "prog",
            Self::Netns => "netns",
            Self::Cri => "cri",
            Self::Kube => "kube",
            Self::Vm => "vm",
        }
    }

    /// The files of tests/tests that belong to it, in their order.
    fn suites(self) -> &'static [&'static str] {
        match self {
            Self::Unit | Self::Vm => &[],
            Self::Verifier => &["verifier"],
            Self::Prog => {
                &["prog", "prog_service", "prog_conntrack", "prog_nodeport", "prog_policy", "socket", "datapath"]
            }
            Self::Netns => &["net", "cloud", "cni", "netns", "isolation"],
            Self::Cri => &["cri"],
            Self::Kube => &["kube"],
        }
    }

    /// What it needs of the machine besides the eBPF toolchain, which the build needs.
    fn parts(self) -> &'static [Part] {
        match self {
            Self::Unit | Self::Verifier | Self::Prog => &[],
            Self::Kube => &[Part::Net, Part::Kube],
            Self::Netns => &[Part::Net],
            Self::Cri => &[Part::Net, Part::Cri],
            Self::Vm => &[Part::Vm],
        }
    }

    /// Why it cannot run here, if so.
    fn obstacle(self, workspace: &Workspace, present: &[&str]) -> Option<String> {
        if !matches!(self, Self::Unit | Self::Vm) {
            if !is_root() {
                return Some("needs root".into());
            }
            if !self.suites().iter().any(|s| present.contains(s)) {
                return Some(format!("none of its suites is there yet ({})", self.suites().join(", ")));
            }
        }
        setup::ensure(workspace, self.parts()).err().map(|error| format!("{error:#}"))
    }
}

/// Runs rungs (none named: all) and prints the closing line; true when nothing failed.
///
/// # Errors
/// The workspace cannot be read, or a signal arrives.
pub(crate) fn run(workspace: &Workspace, rungs: &[Rung], fresh: bool) -> Result<bool> {
    let (tally, _) = climb(workspace, if rungs.is_empty() { &Rung::ALL } else { rungs }, fresh)?;
    println!("{}", tally.line());
    Ok(tally.failed == 0)
}

/// Runs rungs and prints everything but the closing line; gives back their results and the rungs in which no test passed. With `fresh`,
/// no result of an earlier run counts.
///
/// # Errors
/// As [`run`].
pub(crate) fn climb(workspace: &Workspace, rungs: &[Rung], fresh: bool) -> Result<(Tally, Vec<Rung>)> {
    // The daemon's build script compiles the programs, so without this part nothing can be built.
    setup::ensure(workspace, &[Part::Ebpf])?;
    let packages = workspace.metadata()?;
    let present = names(&packages, true);
    let mut total = Tally::default();
    for stray in present.iter().filter(|s| !Rung::ALL.iter().any(|r| r.suites().contains(s))) {
        total.add(Tally::fail(&format!("tests/tests/{stray}: no rung runs it; name it in xtask/src/suites/mod.rs")));
    }

    let planned: Vec<(Rung, Option<String>)> =
        rungs.iter().map(|&rung| (rung, rung.obstacle(workspace, &present))).collect();
    let runs = |rung: Rung| planned.iter().any(|(r, obstacle)| *r == rung && obstacle.is_none());
    let built = match build(workspace, &packages, &present, runs) {
        Ok(built) => built,
        Err(error) => {
            process::interrupted()?;
            total.add(Tally::fail(&format!("build: {error:#}")));
            summary(&[], &total);
            return Ok((total, rungs.to_vec()));
        }
    };

    let (mut table, mut empty) = (Vec::new(), Vec::new());
    for (rung, obstacle) in planned {
        let started = Instant::now();
        println!("\n== {}", rung.name());
        let tally = match obstacle {
            Some(reason) => {
                println!("skipped: {reason}");
                Tally::skip(&format!("rung {}: {reason}", rung.name()))
            }
            None if rung == Rung::Vm => guests::run(workspace, &packages, &built, fresh)?,
            None => built.rung(workspace, rung)?,
        };
        println!("-- {}: {} ({:.0} s)", rung.name(), tally.line(), started.elapsed().as_secs_f32());
        table.push((rung, tally.line(), started.elapsed()));
        if tally.passed == 0 {
            empty.push(rung);
        }
        total.add(tally);
    }
    summary(&table, &total);
    Ok((total, empty))
}

fn summary(table: &[(Rung, String, Duration)], total: &Tally) {
    println!("\n== the slowest tests");
    for (test, seconds) in total.slowest(SLOWEST) {
        println!("{seconds:7.1} s  {test}");
    }
    println!("\n== summary");
    for (rung, line, time) in table {
        println!("{:<9} {line} ({:.0} s)", rung.name(), time.as_secs_f32());
    }
    for (reason, count) in &total.reasons {
        println!("skipped {count}: {reason}");
    }
    for failure in &total.failures {
        println!("FAILED {failure}");
    }
}

/// Names of the integration tests: those of the suites' package, or of all others.
fn names(packages: &[Package], suites: bool) -> Vec<&str> {
    let packages = packages.iter().filter(|p| (p.name == SUITES) == suites);
    packages.flat_map(|p| &p.targets).filter(|t| t.kind == "test").map(|t| t.name.as_str()).collect()
}

/// What the rungs run.
struct Built {
    tests: Vec<Binary>,
    /// The programs as shipped; suites find it in `TERWAY_BIN_DIR`.
    bin_dir: Option<PathBuf>,
}

fn build(workspace: &Workspace, packages: &[Package], present: &[&str], runs: impl Fn(Rung) -> bool) -> Result<Built> {
    let mut targets: Vec<String> = Vec::new();
    let mut wanted = Vec::new();
    if runs(Rung::Unit) {
        targets.extend(["--lib".into(), "--bins".into()]);
        wanted.extend(names(packages, false));
    }
    for rung in Rung::ALL.into_iter().filter(|r| runs(*r)) {
        let in_guests = guests::SUITES.iter().map(|g| g.suite).filter(|_| rung == Rung::Vm);
        wanted.extend(in_guests.chain(rung.suites().iter().copied()).filter(|s| present.contains(s)));
    }
    wanted.sort_unstable();
    wanted.dedup();
    targets.extend(wanted.iter().flat_map(|name| ["--test".to_owned(), (*name).to_owned()]));
    let started = Instant::now();
    let programs =
        runs(Rung::Netns) || runs(Rung::Cri) || (runs(Rung::Vm) && guests::SUITES.iter().any(|g| g.programs));
    let bin_dir = if programs { Some(binaries::for_tests(workspace, packages)?) } else { None };
    let tests = if targets.is_empty() { Vec::new() } else { compile::tests(workspace, &targets)? };
    println!("built in {:.0} s", started.elapsed().as_secs_f32());
    Ok(Built { tests, bin_dir })
}

impl Built {
    /// A suite of the suites' package.
    fn suite(&self, name: &str) -> Option<&Binary> {
        self.tests.iter().find(|b| b.package == SUITES && b.kind == "test" && b.name == name)
    }

    fn rung(&self, workspace: &Workspace, rung: Rung) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut suites = Vec::new();
        if rung == Rung::Unit {
            // Cargo builds what is there to document anew, on all CPUs: side by side with the tests nothing would be won.
            let own = self.tests.iter().filter(|b| b.package != SUITES || b.kind != "test");
            suites.extend(own.map(|binary| self.suite_of(workspace, binary, None)));
            tally.add(Suite::documentation(workspace).run(workspace, true)?);
        }
        for name in rung.suites() {
            match self.suite(name) {
                // One test at a time unless the suite says otherwise: these tests share the machine's kernel.
                Some(binary) => suites.push(self.suite_of(workspace, binary, Some(threads(&binary.source)))),
                None => {
                    println!("skipped: tests/tests/{name} is not there yet");
                    tally.add(Tally::skip(&format!("suite {name} is not there yet")));
                }
            }
        }
        // Suites that start nodes need both cores of a small machine: beside each other they miss time limits that are the product's, not theirs.
        let at_once = if matches!(rung, Rung::Netns | Rung::Cri | Rung::Kube) { 1 } else { cpus() };
        tally.add(side_by_side(workspace, suites, at_once)?);
        Ok(tally)
    }

    fn suite_of(&self, workspace: &Workspace, binary: &Binary, threads: Option<usize>) -> Suite {
        let title = format!("{} {}", binary.package, binary.name);
        let mut command = Command::new(&binary.program);
        workspace.prepare(&mut command);
        command
            .args(libtest::OPTIONS)
            .env(libtest::UNSTABLE.0, libtest::UNSTABLE.1)
            .current_dir(&binary.folder)
            .env("CARGO_MANIFEST_DIR", &binary.folder);
        if let Some(threads) = threads {
            command.arg(format!("--test-threads={threads}"));
        }
        if let Some(dir) = &self.bin_dir {
            command.env("TERWAY_BIN_DIR", dir);
        }
        Suite { title, command }
    }
}

/// A program that runs tests.
struct Suite {
    title: String,
    command: Command,
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs suites, `at_once` at a time, and adds up their results.
fn side_by_side(workspace: &Workspace, suites: Vec<Suite>, at_once: usize) -> Result<Tally> {
    let at_once = at_once.min(suites.len());
    let live = at_once < 2;
    let (queue, total) = (Mutex::new(suites.into_iter()), Mutex::new(Tally::default()));
    let next = || queue.lock().ok()?.next();
    let work = || -> Result<()> {
        while let Some(suite) = next() {
            let tally = suite.run(workspace, live)?;
            total.lock().map_err(|poisoned| anyhow!("a suite: {poisoned}"))?.add(tally);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    total.into_inner().map_err(|poisoned| anyhow!("a suite: {poisoned}"))
}

impl Suite {
    /// The examples in documentation.
    fn documentation(workspace: &Workspace) -> Self {
        let mut command = workspace.cargo("test");
        command.args(["--workspace", "--doc", "--quiet", "--", "--show-output"]);
        Self { title: "documentation".into(), command }
    }

    /// Runs it, shows what matters of its output, at once if `live` and else at the end, and keeps all of it in a log.
    fn run(mut self, workspace: &Workspace, live: bool) -> Result<Tally> {
        let title = self.title.as_str();
        let (started, step) = (Instant::now(), Step::start(title));
        let dir = workspace.target.join("test-logs");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(format!("{}.log", title.replace(' ', "-")));
        let mut log = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        let mut reader = Reader::new();
        let mut shown = String::new();
        let end = process::watch(&mut self.command, LIMIT, |line| {
            // A full disk must not fail a test; the log is for people only.
            drop(writeln!(log, "{line}"));
            let show = reader.line(line);
            step.detail(&reader.position());
            if show {
                if live {
                    progress::line(line);
                } else {
                    shown.push_str(line);
                    shown.push('\n');
                }
            }
        })?;
        let trouble = match end {
            End::Exit(status) => (!status.success()).then(|| status.to_string()),
            End::TimedOut => Some(format!("stopped after {} s", LIMIT.as_secs())),
        };
        let tally = reader.finish(title, trouble.as_deref());
        shown.push_str(&format!("   {title}: {} ({:.1} s)\n", tally.line(), started.elapsed().as_secs_f32()));
        if tally.failed > 0 {
            shown.push_str(&format!("   whole output: {}\n", path.display()));
        }
        // In one piece, for others print meanwhile.
        progress::line(shown.trim_end());
        Ok(tally)
    }
}

/// How many tests of a suite may run at a time: its header may say `Threads: N`.
fn threads(source: &Path) -> usize {
    let text = std::fs::read_to_string(source).unwrap_or_default();
    let mut header = text.lines().take_while(|l| l.starts_with("//!"));
    header
        .find_map(|l| l.split_once("Threads:")?.1.split_whitespace().next()?.trim_end_matches('.').parse().ok())
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_belongs_to_one_rung() {
        let mut all: Vec<_> = Rung::ALL.iter().flat_map(|r| r.suites()).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(guests::SUITES.iter().all(|g| all.contains(&&g.suite)));
    }

    #[test]
    fn the_header_of_a_suite_sets_its_threads() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.rs");
        std::fs::write(&file, "//! A suite.\n//! Threads: 4.\nfn main() {}\n").unwrap();
        assert_eq!(threads(&file), 4);
        std::fs::write(&file, "//! A suite.\n\n//! Threads: 4\n").unwrap();
        assert_eq!(threads(&file), 1);
        assert_eq!(threads(&dir.path().join("gone")), 1);
    }
}
