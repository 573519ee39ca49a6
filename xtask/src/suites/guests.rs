//! The `vm` rung: suites of lower rungs under each of Debian's kernels, one boot per kernel.
//!
//! A suite that is to run here is one self-contained binary: it finds neither the source tree nor the network.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Built;
use super::libtest::{Reader, Tally};
use crate::process;
use crate::vm::{self, Machine, Outcome, Payload, Release};
use crate::workspace::Workspace;

/// Suites that run in the guests: that the programs fit these kernels, and that packets pass on them.
pub(super) const SUITES: &[&str] = &["verifier", "datapath"];
/// Host programs that suites may call in the guest.
const TOOLS: &[&str] = &["bpftool", "ip", "nft", "ping", "tc"];
/// For one kernel. Emulation is 5 to 13 times slower than the host, and CI's machines are busy.
const LIMIT: Duration = Duration::from_secs(600);
/// Starts a line of the guest's script, followed by what happens; no test prints it.
const MARK: &str = "@guest@";

/// Boots every kernel once and adds up what its suites say.
///
/// # Errors
/// A signal arrives.
pub(super) fn run(workspace: &Workspace, built: &Built) -> Result<Tally> {
    let suites: Vec<_> = SUITES.iter().filter_map(|name| built.suite(name)).collect();
    if suites.is_empty() {
        println!("skipped: none of its suites is there yet ({})", SUITES.join(", "));
        return Ok(Tally::skip("rung vm: none of its suites is there yet"));
    }
    let work = tempfile::tempdir()?;
    let script = work.path().join("run");
    let names: Vec<_> = suites.iter().map(|b| b.name.as_str()).collect();
    std::fs::write(&script, script_of(&names))?;
    let mut files: Vec<(PathBuf, PathBuf)> = vec![(script, "/t/run".into())];
    files.extend(suites.iter().map(|b| (b.program.clone(), PathBuf::from("/t").join(&b.name))));
    let payload = Payload {
        command: vec!["sh".into(), "/t/run".into()],
        files,
        tools: TOOLS.iter().map(|t| (*t).to_owned()).collect(),
        environment: Vec::new(),
    };

    let mut total = Tally::default();
    for release in Release::ALL {
        process::interrupted()?;
        total.add(kernel(workspace, release, &payload)?);
    }
    Ok(total)
}

fn kernel(workspace: &Workspace, release: Release, payload: &Payload) -> Result<Tally> {
    let version = match vm::version(workspace, release) {
        Ok(version) => version,
        Err(error) => {
            process::interrupted()?;
            println!("skipped kernel {}: {error:#}", release.name());
            return Ok(Tally::skip(&format!("kernel {}: {error:#}", release.name())));
        }
    };
    println!("   kernel {version}");
    let started = Instant::now();
    let mut transcript = Transcript::new(&version);
    let machine = Machine { limit: LIMIT, ..Machine::default() };
    let mut rest = Vec::new();
    let outcome = vm::boot(workspace, release, false, payload, &machine, |bytes| {
        rest.extend_from_slice(bytes);
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            transcript.line(String::from_utf8_lossy(&line).trim_end());
        }
    });
    let trouble = match outcome {
        Ok(Outcome::Exit(_)) => None,
        Ok(Outcome::TimedOut) => Some(format!("stopped after {} s", LIMIT.as_secs())),
        Ok(Outcome::Died(console)) => {
            print!("{console}");
            Some("the guest died".into())
        }
        Err(error) => {
            process::interrupted()?;
            Some(format!("{error:#}"))
        }
    };
    let tally = transcript.finish(trouble.as_deref());
    println!("   kernel {version}: {} ({:.1} s)", tally.line(), started.elapsed().as_secs_f32());
    Ok(tally)
}

/// The guest's command: each suite in turn, framed by marks.
fn script_of(suites: &[&str]) -> String {
    let mut script = String::new();
    for name in suites {
        script.push_str(&format!("echo '{MARK} begin {name}'\n"));
        script.push_str(&format!("/t/{name} --show-output --test-threads=1\n"));
        script.push_str(&format!("echo \"{MARK} end $?\"\n"));
    }
    script
}

/// Takes the guest's output apart again.
struct Transcript {
    version: String,
    total: Tally,
    open: Option<(String, Reader)>,
}

impl Transcript {
    fn new(version: &str) -> Self {
        Self { version: version.to_owned(), total: Tally::default(), open: None }
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
                    println!("{line}");
                }
            }
        }
    }

    fn finish(mut self, trouble: Option<&str>) -> Tally {
        match (self.open.take(), trouble) {
            (Some((name, reader)), trouble) => {
                self.total.add(reader.finish(&name, Some(trouble.unwrap_or("cut short"))));
            }
            (None, Some(trouble)) => self.total.add(Tally::fail(&format!("kernel {}: {trouble}", self.version))),
            (None, None) => {}
        }
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s";

    fn transcript(text: &str, trouble: Option<&str>) -> Tally {
        let mut transcript = Transcript::new("5.10");
        text.lines().for_each(|l| transcript.line(l));
        transcript.finish(trouble)
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
        let script = script_of(&["nosuch"]);
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text, format!("{MARK} begin nosuch\n{MARK} end 127\n"));
    }
}
