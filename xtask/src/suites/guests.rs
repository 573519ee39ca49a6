//! The `vm` rung: suites of lower rungs under each of Debian's kernels, one boot per kernel.
//!
//! A suite that is to run here is one self-contained binary: it finds neither the source tree nor the network.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::Built;
use super::inputs::{Inputs, Results};
use super::libtest::{self, Reader, Tally};
use crate::process;
use crate::progress::{self, Step};
use crate::setup;
use crate::vm::{self, Machine, Outcome, Payload, Release};
use crate::workspace::{Package, Workspace};

/// A suite for the guests.
pub(super) struct Guest {
    /// Its file in tests/tests.
    pub(super) suite: &'static str,
    /// Only tests with this in their name: emulation has no time for all of a long suite.
    pub(super) filter: Option<&'static str>,
    /// Whether it starts the shipped programs, which then lie in the guest's `TERWAY_BIN_DIR`.
    pub(super) programs: bool,
}

/// That the programs fit these kernels, that packets pass on them, and that they take the links, routes and rules of a pod.
pub(super) const SUITES: &[Guest] = &[
    Guest { suite: "verifier", filter: None, programs: false },
    Guest { suite: "datapath", filter: None, programs: false },
    Guest { suite: "socket", filter: Some("_services"), programs: false },
    Guest { suite: "net", filter: Some("applied_and_undone"), programs: false },
];
/// Host programs that suites may call in the guest.
const TOOLS: &[&str] = &["bpftool", "ip", "nft", "ping", "tc"];
/// Where the shipped programs lie in the guest.
const BIN_DIR: &str = "/t/bin";
/// For one kernel. Emulation is 5 to 13 times slower than the host, and CI's machines are busy.
const LIMIT: Duration = Duration::from_secs(600);
/// Boots at a time.
const AT_ONCE: usize = 2;
/// Starts a line of the guest's script, followed by what happens; no test prints it.
const MARK: &str = "@guest@";

/// Boots every kernel once and adds up what its suites say; a kernel on which they passed before with the same inputs is not booted
/// unless `fresh`.
///
/// # Errors
/// A signal arrives.
pub(super) fn run(workspace: &Workspace, packages: &[Package], built: &Built, fresh: bool) -> Result<Tally> {
    let suites: Vec<_> = SUITES.iter().filter_map(|guest| Some((guest, built.suite(guest.suite)?))).collect();
    if suites.is_empty() {
        let reason = "none of its suites is there yet";
        println!("skipped: {reason}");
        return Ok(Tally::skip(&format!("rung vm: {reason}")));
    }
    let work = tempfile::tempdir()?;
    let mut files: Vec<(PathBuf, PathBuf)> = Vec::new();
    for (guest, binary) in &suites {
        files.push((stripped(&binary.program, work.path())?, Path::new("/t").join(guest.suite)));
    }
    if let Some(dir) = built.bin_dir.as_ref().filter(|_| suites.iter().any(|(guest, _)| guest.programs)) {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            files.push((stripped(&path, work.path())?, Path::new(BIN_DIR).join(path.file_name().unwrap_or_default())));
        }
    }
    let script = work.path().join("run");
    let guests: Vec<_> = suites.iter().map(|(guest, _)| *guest).collect();
    std::fs::write(&script, script_of(&guests))?;
    files.push((script, "/t/run".into()));
    let payload = Payload {
        command: vec!["sh".into(), "/t/run".into()],
        files,
        tools: TOOLS.iter().map(|t| (*t).to_owned()).collect(),
        environment: vec![("TERWAY_BIN_DIR".into(), BIN_DIR.into())],
    };

    let inputs = inputs(workspace, packages, &guests)?;
    let results = Results::open(workspace);
    // Each emulator keeps one CPU busy, and the machines have two or more.
    let (queue, total) = (Mutex::new(Release::ALL.into_iter()), Mutex::new(Tally::default()));
    let next = || queue.lock().map(|mut q| q.next()).ok().flatten();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(release) = next() {
                    let (text, tally) = kernel(workspace, release, &payload, inputs.clone(), &results, fresh);
                    if let Ok(mut total) = total.lock() {
                        progress::line(text.trim_end());
                        total.add(tally);
                    }
                }
            });
        }
    });
    process::interrupted()?;
    total.into_inner().map_err(|poisoned| anyhow!("a boot: {poisoned}"))
}

/// What the results of all kernels depend on.
fn inputs(workspace: &Workspace, packages: &[Package], guests: &[&Guest]) -> Result<Inputs> {
    let programs = if guests.iter().any(|guest| guest.programs) { &["terway-cni"][..] } else { &[] };
    let suites: Vec<_> = guests.iter().map(|guest| guest.suite).collect();
    let mut inputs = Inputs::of_sources(workspace, packages, programs, &suites)?;
    // How guests are made and what they run.
    for source in ["xtask/src/vm", "xtask/src/suites/guests.rs"] {
        inputs.folder(&workspace.root, &workspace.root.join(source), &|_| false)?;
    }
    let tools = setup::vm_programs(workspace);
    for name in TOOLS.iter().chain(&vm::guest::STARTERS).chain(&["busybox", "sh"]) {
        let Some(path) = tools.find(name) else { continue };
        let libraries = vm::guest::libraries(&path, tools.holds(&path).then(|| tools.libraries()).as_deref())?;
        for file in std::iter::once(path).chain(libraries) {
            inputs.bytes(&tools.installed_at(&file).to_string_lossy(), &std::fs::read(&file)?);
        }
    }
    let emulator = process::output(tools.command("qemu-system-x86_64")?.arg("--version"))?;
    inputs.text("qemu", &emulator);
    Ok(inputs)
}

/// One boot: what to print, and the results.
fn kernel(
    workspace: &Workspace,
    release: Release,
    payload: &Payload,
    mut inputs: Inputs,
    results: &Results,
    fresh: bool,
) -> (String, Tally) {
    let (version, image) = match vm::kernel(workspace, release) {
        Ok(kernel) => (kernel.version, kernel.image),
        Err(error) => {
            let reason = format!("kernel {}: {error:#}", release.name());
            return (format!("   skipped {reason}\n"), Tally::skip(&reason));
        }
    };
    // Debian's versions name one build; the length tells a file that was cut short.
    let length = std::fs::metadata(&image).map_or(0, |meta| meta.len());
    inputs.text("kernel", &format!("{version} {length}"));
    if !fresh && let Some(tally) = results.get(&inputs) {
        return (format!("   kernel {version}: {} (cached: passed before with the same inputs)", tally.line()), tally);
    }
    let (started, step) = (Instant::now(), Step::start(&format!("kernel {version}")));
    let mut transcript = Transcript::new(&version);
    let machine = Machine { limit: LIMIT, ..Machine::default() };
    let mut rest = Vec::new();
    let outcome = vm::boot(workspace, release, false, payload, &machine, |bytes| {
        rest.extend_from_slice(bytes);
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            transcript.line(String::from_utf8_lossy(&line).trim_end());
            step.detail(&transcript.position());
        }
    });
    let trouble = match outcome {
        Ok(Outcome::Exit(_)) => None,
        Ok(Outcome::TimedOut) => Some(format!("stopped after {} s", LIMIT.as_secs())),
        Ok(Outcome::Died(console)) => {
            transcript.shown.push_str(&console);
            Some("the guest died".into())
        }
        Err(error) => Some(format!("{error:#}")),
    };
    let (mut text, tally) = transcript.finish(trouble.as_deref());
    if let Err(error) = results.put(&inputs, &tally) {
        text.push_str(&format!("   the result is not kept: {error:#}\n"));
    }
    text.push_str(&format!("   kernel {version}: {} ({:.1} s)\n", tally.line(), started.elapsed().as_secs_f32()));
    (text, tally)
}

/// A copy without debug information, which is most of a test binary and would have to be unpacked in the guest.
fn stripped(program: &Path, work: &Path) -> Result<PathBuf> {
    let copy = work.join(program.file_name().unwrap_or_default());
    process::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&copy).arg(program))?;
    Ok(copy)
}

/// The guest's command: each suite in turn, framed by marks.
fn script_of(guests: &[&Guest]) -> String {
    let mut script = String::new();
    for guest in guests {
        let (name, filter) = (guest.suite, guest.filter.unwrap_or_default());
        script.push_str(&format!("echo '{MARK} begin {name}'\n"));
        let (variable, value) = libtest::UNSTABLE;
        let options = libtest::OPTIONS.join(" ");
        script.push_str(&format!("{variable}={value} /t/{name} {options} --test-threads=1 {filter}\n"));
        script.push_str(&format!("echo \"{MARK} end $?\"\n"));
    }
    script
}

/// Takes the guest's output apart again.
struct Transcript {
    version: String,
    total: Tally,
    /// What a person wants to see of it.
    shown: String,
    open: Option<(String, Reader)>,
}

impl Transcript {
    fn new(version: &str) -> Self {
        Self { version: version.to_owned(), total: Tally::default(), shown: String::new(), open: None }
    }

    fn line(&mut self, line: &str) {
        match line.strip_prefix(MARK).map(|l| l.split_whitespace().collect::<Vec<_>>()).as_deref() {
            Some(["begin", name]) => self.open = Some((format!("{name} on {}", self.version), Reader::new())),
            Some(["end", code]) => {
                if let Some((name, reader)) = self.open.take() {
                    let trouble = (*code != "0").then(|| format!("exit status: {code}"));
                    self.total.add(reader.finish(&name, trouble.as_deref()));
                }
            }
            _ => {
                if let Some((_, reader)) = &mut self.open
                    && reader.line(line)
                {
                    self.shown.push_str(line);
                    self.shown.push('\n');
                }
            }
        }
    }

    /// How far it is, for a person.
    fn position(&self) -> String {
        self.open.as_ref().map_or_else(String::new, |(name, reader)| format!("{name}, {}", reader.position()))
    }

    fn finish(mut self, trouble: Option<&str>) -> (String, Tally) {
        match (self.open.take(), trouble) {
            (Some((name, reader)), trouble) => {
                self.total.add(reader.finish(&name, Some(trouble.unwrap_or("cut short"))));
            }
            (None, Some(trouble)) => self.total.add(Tally::fail(&format!("kernel {}: {trouble}", self.version))),
            (None, None) => {}
        }
        (self.shown, self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s";

    fn transcript(text: &str, trouble: Option<&str>) -> Tally {
        let mut transcript = Transcript::new("5.10");
        text.lines().for_each(|l| transcript.line(l));
        transcript.finish(trouble).1
    }

    #[test]
    fn suites_of_a_boot_add_up() {
        let one = format!("{MARK} begin verifier\n{GOOD}\n{MARK} end 0\n");
        assert_eq!(transcript(&format!("{one}{one}"), None).line(), "2 passed, 0 failed, 0 skipped");
    }

    #[test]
    fn a_boot_that_ends_early_fails_the_suite_it_was_in() {
        let tally = transcript(&format!("{MARK} begin verifier\nrunning 2 tests\n"), Some("the guest died"));
        assert_eq!(tally.failures, ["verifier on 5.10: the guest died"]);
        assert_eq!(transcript("", Some("no qemu")).failures, ["kernel 5.10: no qemu"]);
        let killed = transcript(&format!("{MARK} begin verifier\n{MARK} end 137\n"), None);
        assert_eq!(killed.failures, ["verifier on 5.10: exit status: 137"]);
    }

    #[test]
    fn the_script_runs_in_a_shell() {
        let script = script_of(&[&Guest { suite: "nosuch", filter: Some("first"), programs: false }]);
        let out = Command::new("sh").args(["-c", &script]).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text, format!("{MARK} begin nosuch\n{MARK} end 127\n"));
    }
}
