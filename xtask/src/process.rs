//! Running other programs: always an argument vector, never a shell; a child is stopped when xtask is.
//!
//! Every child that xtask waits for leads its own process group, so that a time-out or Ctrl-C ends all it started.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The signal that asked us to stop, 0 while there is none.
static STOP: AtomicI32 = AtomicI32::new(0);

const TICK: Duration = Duration::from_millis(20);

extern "C" fn on_signal(signal: libc::c_int) {
    STOP.store(signal, Ordering::SeqCst);
}

/// From now on SIGINT, SIGTERM and SIGHUP end the running child first, and xtask after it.
pub(crate) fn catch_signals() {
    let handler: extern "C" fn(libc::c_int) = on_signal;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Undoes [`catch_signals`]; for a process that is about to become another program.
pub(crate) fn release_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: restores the default action, no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Fails once a signal has asked us to stop.
pub(crate) fn interrupted() -> Result<()> {
    match STOP.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => bail!("stopped by signal {signal}"),
    }
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs a command with our own output; failing is an error that names it.
///
/// # Errors
/// The program cannot be started, fails, or a signal arrives.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs a command with our own output and returns how it ended.
///
/// # Errors
/// The program cannot be started, or a signal arrives.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    let mut child = spawn(command.stdin(Stdio::null()))?;
    wait(&mut child, None)?.with_context(|| format!("`{}` timed out", shown(command)))
}

/// Runs a command quietly and returns its standard output.
///
/// # Errors
/// The program cannot be started or fails; the error then ends with the last lines of its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = shown(command);
    output_as(command, &name)
}

/// As [`output`]; an error calls the command `name`, for those whose options are many and tell a reader nothing.
///
/// # Errors
/// As [`output`].
pub(crate) fn output_as(command: &mut Command, name: &str) -> Result<String> {
    let bytes = bytes(command, name)?;
    String::from_utf8(bytes).with_context(|| format!("`{name}` printed something that is not UTF-8"))
}

/// As [`output`], for programs that print no text.
///
/// # Errors
/// As [`output`].
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let name = shown(command);
    bytes(command, &name)
}

fn bytes(command: &mut Command, name: &str) -> Result<Vec<u8>> {
    interrupted()?;
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", command.get_program().to_string_lossy()))?;
    interrupted()?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(4)..].join(" / ");
        bail!("`{name}` failed ({}): {tail}", out.status);
    }
    Ok(out.stdout)
}

/// How a watched command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself.
    Exit(ExitStatus),
    /// It took longer than it may and was killed with its process group.
    TimedOut,
}

/// Runs a command and hands each line of its output (both streams, in the order written) to `on_line`.
///
/// # Errors
/// The program cannot be started, or a signal arrives.
pub(crate) fn watch(command: &mut Command, limit: Duration, mut on_line: impl FnMut(&str)) -> Result<End> {
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = spawn(command)?;
    // The command still holds its ends of the pipe; the reader would never see the end of it.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });

    let started = Instant::now();
    let mut ended: Option<(ExitStatus, Instant)> = None;
    loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => on_line(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            // A process that outlives the command can keep the pipe open for ever.
            Err(RecvTimeoutError::Timeout) => {
                if ended.is_some_and(|(_, at)| at.elapsed() > Duration::from_secs(1)) {
                    break;
                }
            }
        }
        if ended.is_none() {
            if let Some(status) = child.try_wait()? {
                ended = Some((status, Instant::now()));
            } else if let Err(stop) = interrupted() {
                kill_group(&mut child);
                return Err(stop);
            } else if started.elapsed() > limit {
                kill_group(&mut child);
                return Ok(End::TimedOut);
            }
        }
    }
    match ended {
        Some((status, _)) => Ok(End::Exit(status)),
        None => Ok(wait(&mut child, Some(limit.saturating_sub(started.elapsed())))?.map_or(End::TimedOut, End::Exit)),
    }
}

/// Starts a command as the leader of its own process group.
///
/// # Errors
/// The program cannot be started.
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    interrupted()?;
    command
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run `{}`", command.get_program().to_string_lossy()))
}

/// Waits for a child that leads its group; `None` when `limit` passed and the group was killed.
fn wait(child: &mut Child, limit: Option<Duration>) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if let Err(stop) = interrupted() {
            kill_group(child);
            return Err(stop);
        }
        if limit.is_some_and(|l| started.elapsed() > l) {
            kill_group(child);
            return Ok(None);
        }
        std::thread::sleep(TICK);
    }
}

/// Ends a child and its group: SIGTERM, two seconds to clean up, SIGKILL.
pub(crate) fn kill_group(child: &mut Child) {
    let Ok(group) = libc::pid_t::try_from(child.id()) else { return };
    // SAFETY: a plain system call; the group is our own, unreaped child's, so its number cannot have been reused.
    unsafe { libc::killpg(group, libc::SIGTERM) };
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(TICK);
    }
    // SAFETY: as above; members that ignored SIGTERM keep the group's number in use.
    unsafe { libc::killpg(group, libc::SIGKILL) };
    // Reaps it; nothing is left to report when that fails.
    drop(child.wait());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn watch_sees_both_streams_in_order_and_the_status() {
        let mut lines = Vec::new();
        let end = watch(&mut sh("echo a; echo b >&2; printf c; exit 3"), Duration::from_secs(10), |l| {
            lines.push(l.to_owned());
        });
        assert_eq!(lines, ["a", "b", "c"]);
        let End::Exit(status) = end.unwrap() else { panic!("timed out") };
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn watch_kills_the_whole_group_when_time_is_up() {
        let mut pid = String::new();
        let end = watch(&mut sh("sleep 100 & echo $!; wait"), Duration::from_secs(2), |l| pid = l.to_owned());
        assert_eq!(end.unwrap(), End::TimedOut);
        assert!(!pid.is_empty());
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let gone = || state().is_empty() || state().contains(") Z ");
        let started = Instant::now();
        while !gone() && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(TICK);
        }
        assert!(gone(), "sleep {pid} survived: {}", state());
    }

    #[test]
    fn watch_does_not_wait_for_a_process_left_behind() {
        let started = Instant::now();
        let end = watch(&mut sh("setsid sleep 8 & exit 0"), Duration::from_secs(30), |_| {});
        assert!(matches!(end.unwrap(), End::Exit(s) if s.success()));
        assert!(started.elapsed() < Duration::from_secs(6));
    }

    #[test]
    fn a_failure_carries_the_end_of_standard_error() {
        let text = output(&mut sh("echo it broke >&2; exit 1")).unwrap_err().to_string();
        assert!(text.contains("it broke") && text.contains("exit status: 1"), "{text}");
    }
}
