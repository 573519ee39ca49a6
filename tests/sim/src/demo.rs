//! The demo: a cloud, two nodes with a real containerd each, and pods through our plugin; each capability is one named check.

mod checks;
mod edits;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cluster::{Cluster, Options};

/// How the demo runs.
#[derive(Clone, Debug, Default)]
pub struct Demo {
    /// One JSON object a line instead of text.
    pub json: bool,
    /// Leave everything running after the checks, until the process is interrupted.
    pub keep: bool,
    /// Where our programs are; default: beside this program.
    pub bin_dir: Option<PathBuf>,
    /// Where containerd is; default: Debian's.
    pub containerd: Option<PathBuf>,
}

/// The checks so far.
pub(crate) struct Report {
    json: bool,
    passed: u32,
    failed: u32,
    interrupted: Arc<AtomicBool>,
}

impl Report {
    /// Runs one check and prints what became of it; `check` gives back particulars worth showing.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) -> bool {
        if self.interrupted.load(Ordering::Acquire) {
            return false;
        }
        let start = Instant::now();
        let outcome = check();
        // What failed because the user interrupted it says nothing.
        if outcome.is_err() && self.interrupted.load(Ordering::Acquire) {
            return false;
        }
        self.tell(name, start.elapsed(), outcome)
    }

    fn tell(&mut self, name: &str, elapsed: Duration, outcome: Result<String>) -> bool {
        let passed = outcome.is_ok();
        *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
        let detail = outcome.unwrap_or_else(|error| format!("{error:#}"));
        let ms = elapsed.as_secs_f64() * 1000.0;
        if self.json {
            line(
                &json!({"check": name, "passed": passed, "ms": (ms * 10.0).round() / 10.0, "detail": detail})
                    .to_string(),
            );
            return passed;
        }
        let mark = if passed { "ok    " } else { "FAILED" };
        let mut text = format!("{mark} {ms:8.1} ms  {name}");
        if passed {
            if !detail.is_empty() {
                text.push_str(&format!("  ({detail})"));
            }
        } else {
            for detail in detail.lines() {
                text.push_str("\n            ");
                text.push_str(detail);
            }
        }
        line(&text);
        passed
    }

    fn say(&self, text: &str) {
        if !self.json {
            line(text);
        }
    }
}

/// Prints a line; a reader that went away is no reason to leave a cluster behind.
fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Runs the demo and gives back whether every check passed. Everything is cleared away in any case.
///
/// # Errors
/// When there can be no demo on this machine, or it was interrupted.
pub fn run(demo: &Demo) -> Result<bool> {
    let mut options = Options::new()?;
    if let Some(bin_dir) = &demo.bin_dir {
        options.bin_dir.clone_from(bin_dir);
    }
    options.bin_dir = options.bin_dir.canonicalize().with_context(|| options.bin_dir.display().to_string())?;
    let containerd = demo.containerd.clone().unwrap_or_else(|| "/usr/bin".into());
    if !containerd.join("containerd").exists() {
        bail!("{} is missing; run `cargo xtask setup`", containerd.join("containerd").display());
    }
    options.containerd = Some(containerd);
    options.cloud = edits::spare_vswitch;
    if let Some(obstacle) = Cluster::obstacle(&options) {
        bail!("{obstacle}; run `cargo xtask setup` and build the workspace as root");
    }
    let interrupted = interruption()?;
    options.interrupted = Arc::clone(&interrupted);
    let mut report = Report { json: demo.json, passed: 0, failed: 0, interrupted: Arc::clone(&interrupted) };

    let mut cluster = None;
    report.check("a cloud with a VPC, and two nodes with terwayd and containerd", || {
        let started = cluster.insert(Cluster::start(&options)?);
        let version = started.node(1).containerd()?.version();
        Ok(format!("containerd {version}"))
    });
    if let Some(cluster) = cluster {
        checks::all(&mut report, &cluster);
        edits::all(&mut report, &cluster);
        if demo.keep && !interrupted.load(Ordering::Acquire) {
            cluster.mark_kept()?;
            report.say(&how_to_look(&cluster));
            while !interrupted.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        // Also after an interruption: this is what clears away.
        let start = Instant::now();
        let finished = cluster.finish().map(|()| String::new());
        if finished.is_err() || demo.keep || !interrupted.load(Ordering::Acquire) {
            report.tell("all is cleared away, and the machine is as it was", start.elapsed(), finished);
        }
    }
    let Report { passed, failed, .. } = report;
    if interrupted.load(Ordering::Acquire) && !demo.keep {
        bail!("interrupted after {passed} checks passed and {failed} failed");
    }
    line(&if demo.json {
        json!({"passed": passed, "failed": failed}).to_string()
    } else {
        format!("demo: {passed} checks passed, {failed} failed")
    });
    Ok(failed == 0)
}

/// Becomes true on SIGINT, SIGTERM or SIGHUP, which then no longer end the process at once.
fn interruption() -> Result<Arc<AtomicBool>> {
    use nix::sys::signal::{SigSet, Signal};
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Blocked before any other thread exists, so that all inherit it and only the waiting thread gets them.
    signals.thread_block().context("block signals")?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            flag.store(true, Ordering::Release);
        }
    });
    Ok(interrupted)
}

fn how_to_look(cluster: &Cluster) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("\nEverything stays up. To look around:\n");
    for node in cluster.nodes() {
        let (ns, socket, work) = (node.netns().name(), node.socket(), node.work());
        let _ = writeln!(text, "  nsenter --net=/run/netns/{ns} terway-cli --socket {} status", socket.display());
        let _ = writeln!(text, "  ip -n {ns} route; tail {}", node.daemon_log().display());
        let _ = writeln!(text, "  ctr -a {}/c/c.sock -n k8s.io containers list", work.display());
    }
    let _ = write!(
        text,
        "  tcpdump of the wire: nsenter --net=/run/netns/{} tcpdump -ni any\n\
         To end it: Ctrl-C here, or `terway-sim clean` anywhere.",
        cluster.vpc().netns().name()
    );
    text
}
