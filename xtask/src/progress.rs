//! What long steps do now and how far they are: bars on a terminal, else a line every few seconds.
//!
//! While steps run, other output goes through [`line`] or [`error_line`], so that it does not end up inside a bar.

use std::io::{BufReader, IsTerminal, Read};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::process;

/// Time between two lines about running steps where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// A step that takes long; it ends on drop.
#[derive(Debug)]
pub(crate) struct Step(Arc<State>);

#[derive(Debug)]
struct State {
    name: String,
    started: Instant,
    detail: Mutex<String>,
    bar: Option<ProgressBar>,
}

/// Where progress is shown.
struct Display {
    /// None where there is no terminal.
    bars: Option<MultiProgress>,
    steps: Mutex<Vec<Weak<State>>>,
}

fn display() -> &'static Display {
    static DISPLAY: OnceLock<Display> = OnceLock::new();
    DISPLAY.get_or_init(|| {
        if is_terminal() {
            return Display { bars: Some(MultiProgress::new()), steps: Mutex::default() };
        }
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(EVERY);
                let steps: Vec<_> = lock(&display().steps).iter().filter_map(Weak::upgrade).collect();
                if let Some(line) = status(&steps) {
                    eprintln!("{line}");
                }
            }
        });
        Display { bars: None, steps: Mutex::default() }
    })
}

fn is_terminal() -> bool {
    std::io::stderr().is_terminal() && std::io::stdout().is_terminal()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One line about all steps that run; nothing when there is none.
fn status(steps: &[Arc<State>]) -> Option<String> {
    let parts: Vec<String> = steps.iter().map(|step| step.text()).collect();
    (!parts.is_empty()).then(|| format!("   ... {}", parts.join("; ")))
}

impl State {
    fn text(&self) -> String {
        let (detail, seconds) = (lock(&self.detail), self.started.elapsed().as_secs());
        let colon = if detail.is_empty() { "" } else { ": " };
        format!("{}{colon}{detail} ({seconds} s)", self.name)
    }
}

impl Step {
    /// Begins a step of this name.
    pub(crate) fn start(name: &str) -> Self {
        let display = display();
        let bar = display.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let state = State { name: name.to_owned(), started: Instant::now(), detail: Mutex::default(), bar };
        let state = Arc::new(state);
        let mut steps = lock(&display.steps);
        steps.retain(|step| step.strong_count() > 0);
        steps.push(Arc::downgrade(&state));
        Self(state)
    }

    /// Says what the step does now, and how far it is.
    pub(crate) fn detail(&self, text: &str) {
        if let Some(bar) = &self.0.bar {
            bar.set_message(text.to_owned());
        }
        text.clone_into(&mut lock(&self.0.detail));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.0.bar {
            bar.finish_and_clear();
        }
    }
}

/// Prints a line on standard output.
pub(crate) fn line(text: &str) {
    match &display().bars {
        Some(bars) => bars.suspend(|| println!("{text}")),
        None => println!("{text}"),
    }
}

/// Prints a line on standard error.
pub(crate) fn error_line(text: &str) {
    match &display().bars {
        Some(bars) => bars.suspend(|| eprintln!("{text}")),
        None => eprintln!("{text}"),
    }
}

/// Runs a build by cargo as a step called `name`: which crates are compiled is shown, diagnostics are printed. Gives back what cargo wrote
/// to its standard output.
///
/// # Errors
/// Something does not build; cargo has then printed what. Or a signal arrives.
pub(crate) fn build(command: &mut Command, name: &str) -> Result<String> {
    let step = Step::start(name);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Cargo's own bar names the crates that are being compiled; it is read here and not shown.
    command.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "160");
    command.env("CARGO_TERM_COLOR", if is_terminal() { "always" } else { "never" });
    let mut child = process::spawn(command)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let output = std::thread::spawn(move || {
        let mut text = Vec::new();
        stdout.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut text)).map(|_| text)
    });
    let messages = std::thread::spawn(move || {
        let Some(pipe) = stderr else { return };
        for_each_line(pipe, |text| match Message::of(text) {
            Message::Compiling(what) => step.detail(&what),
            Message::Status => {}
            Message::Diagnostic => error_line(text),
        });
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let Err(stop) = process::interrupted() {
            process::kill_group(&mut child);
            return Err(stop);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    drop(messages.join());
    let output = output.join().ok().context("the reader of cargo's output panicked")??;
    if !status.success() {
        bail!("{name} failed: `{}` ({status})", process::shown(command));
    }
    String::from_utf8(output).context("cargo printed something that is not UTF-8")
}

/// Hands over what ends with a line feed or, as cargo's bar does, with a carriage return.
fn for_each_line(pipe: impl Read, mut on_line: impl FnMut(&str)) {
    let mut line = Vec::new();
    for byte in BufReader::new(pipe).bytes() {
        match byte {
            Ok(b'\n' | b'\r') => on_line(&String::from_utf8_lossy(&std::mem::take(&mut line))),
            Ok(byte) => line.push(byte),
            Err(_) => break,
        }
    }
    if !line.is_empty() {
        on_line(&String::from_utf8_lossy(&line));
    }
}

/// A line of cargo's standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Message {
    /// What is compiled now.
    Compiling(String),
    /// That something began or ended.
    Status,
    /// For a person.
    Diagnostic,
}

impl Message {
    fn of(line: &str) -> Self {
        let plain = without_escapes(line);
        // A status is a word set flush right in twelve columns.
        let (word, rest) = plain.trim_start().split_once(' ').unwrap_or((plain.trim_start(), ""));
        let flush_right = plain.len() >= 12 && plain.find(word).is_some_and(|at| at + word.len() == 12);
        match word {
            // `Building [====>   ] 12/345: serde, tokio`
            "Building" if rest.trim_start().starts_with('[') => {
                let what = rest.rsplit_once("] ").map_or(rest, |(_, what)| what);
                Self::Compiling(what.trim().to_owned())
            }
            "Blocking" | "Updating" | "Downloading" if flush_right => Self::Compiling(plain.trim().to_owned()),
            _ if flush_right && word.chars().all(char::is_alphabetic) => Self::Status,
            "" => Self::Status,
            _ => Self::Diagnostic,
        }
    }
}

/// A line without terminal control sequences (ECMA-48, CSI).
fn without_escapes(line: &str) -> String {
    let mut text = String::new();
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        if c == '\u{1b}' {
            let _end = characters.by_ref().skip(1).find(|c| ('@'..='~').contains(c));
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo_are_told_apart() {
        let of = Message::of;
        assert_eq!(
            of("\u{1b}[1m\u{1b}[36m    Building\u{1b}[0m [==>  ] 12/345: serde, tokio(test)"),
            Message::Compiling("12/345: serde, tokio(test)".into())
        );
        assert_eq!(of("   Compiling serde v1.0.0"), Message::Status);
        assert_eq!(of("    Finished `dev` profile [unoptimized] target(s) in 1s"), Message::Status);
        let waits = "    Blocking waiting for file lock on build directory";
        assert_eq!(of(waits), Message::Compiling(waits.trim().into()));
        for text in ["error[E0425]: cannot find value", "warning: unused variable", "  --> src/lib.rs:1:2", "   |"] {
            assert_eq!(of(text), Message::Diagnostic, "{text}");
        }
    }

    #[test]
    fn lines_end_with_either_character() {
        let mut lines = Vec::new();
        for_each_line(&b"a\rb\nc"[..], |line| lines.push(line.to_owned()));
        assert_eq!(lines, ["a", "b", "c"]);
    }

    #[test]
    fn running_steps_are_named_with_what_they_do() {
        let (one, two) = (Step::start("build"), Step::start("apt-get"));
        one.detail("3/7: serde");
        let text = status(&[Arc::clone(&one.0), Arc::clone(&two.0)]).unwrap();
        assert_eq!(text, "   ... build: 3/7: serde (0 s); apt-get (0 s)");
        assert_eq!(status(&[]), None);
    }

    #[test]
    fn a_build_that_fails_is_named() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo error: x >&2; exit 1"]);
        let error = build(&mut command, "building it").unwrap_err().to_string();
        assert!(error.contains("building it failed"), "{error}");
        assert_eq!(build(Command::new("echo").arg("out"), "echo").unwrap(), "out\n");
    }
}
