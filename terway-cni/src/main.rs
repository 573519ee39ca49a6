//! The CNI plugin `terway`: environment and stdin in, one gRPC call to the node's daemon, one JSON document on stdout.
//!
//! It decides nothing: what the protocol means is `terway_core::cni`, what a pod's network is the daemon knows. It keeps no
//! state and writes no log; its only file is a DEL that the daemon could not take (`spool`). SIGKILL at any point is safe:
//! whatever the daemon was asked, it carries out or undoes by the attachment's key.

mod client;
mod loopback;
mod netns;
mod spool;
mod verbs;

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::Value;
use terway_core::cni::{ABOUT, Failure, NetConf, Request, Version, version};
use terway_core::errors::{CNI_DECODE, CNI_IO, Error, INTERNAL};

/// Most bytes of stdin that are read; a GC list of ten thousand attachments is about one MiB.
const STDIN_MAX: u64 = 16 << 20;

/// What goes to stdout, and whether it is an error.
struct Answer {
    document: Option<Value>,
    failed: bool,
}

fn main() -> ExitCode {
    let started = Instant::now();
    std::panic::set_hook(Box::new(|info| {
        // A runtime that finds no JSON on stdout shows its user a riddle.
        let failure = Failure::from(Error::new(INTERNAL, format!("The plugin {info}.")));
        print(&failure.document(None));
        std::process::exit(1);
    }));
    match Request::parse(|name| std::env::var_os(name)) {
        Ok(None) => {
            about();
            ExitCode::SUCCESS
        }
        Ok(Some(request)) => finish(match read_stdin() {
            Ok(stdin) => answer(&request, &stdin, started),
            Err(error) => failed(error.into(), None),
        }),
        Err(error) => {
            // The error should be of the configuration's version; a human at a terminal has none to type.
            let stdin = if std::io::stdin().is_terminal() { Vec::new() } else { read_stdin().unwrap_or_default() };
            finish(failed(error.into(), NetConf::version_of(&stdin)))
        }
    }
}

fn read_stdin() -> Result<Vec<u8>, Error> {
    let mut stdin = Vec::new();
    match std::io::stdin().lock().take(STDIN_MAX + 1).read_to_end(&mut stdin) {
        Err(error) => Err(Error::new(CNI_IO, format!("{error}."))),
        Ok(_) if stdin.len() as u64 > STDIN_MAX => {
            Err(Error::new(CNI_DECODE, format!("stdin is longer than {STDIN_MAX} bytes.")))
        }
        Ok(_) => Ok(stdin),
    }
}

/// The whole of a call, up to printing.
fn answer(request: &Request, stdin: &[u8], started: Instant) -> Answer {
    if matches!(request, Request::Version) {
        return match NetConf::version_asked(stdin) {
            Ok(asked) => Answer { document: Some(version::supported(asked.as_deref())), failed: false },
            Err(error) => failed(error.into(), None),
        };
    }
    let conf = match NetConf::decode(stdin) {
        Ok(conf) => conf,
        Err(error) => return failed(error.into(), NetConf::version_of(stdin)),
    };
    let run = || if is_loopback() { loopback::run(request, &conf) } else { verbs::run(request, &conf, started) };
    match conf.version.require(request.verb()).map_err(Failure::from).and_then(|()| run()) {
        Ok(document) => Answer { document, failed: false },
        Err(failure) => failed(failure, Some(conf.version)),
    }
}

/// Whether the runtime called the plugin `loopback`, which is this binary under another name.
fn is_loopback() -> bool {
    std::env::args_os().next().is_some_and(|path| Path::new(&path).file_name() == Some(loopback::NAME.as_ref()))
}

fn failed(failure: Failure, version: Option<Version>) -> Answer {
    Answer { document: Some(failure.document(version)), failed: true }
}

fn finish(answer: Answer) -> ExitCode {
    let printed = answer.document.as_ref().is_none_or(print);
    // An ADD whose result nobody read is not undone here: the runtime sees the exit code and calls DEL (containerd does so
    // too when it has killed the plugin).
    if answer.failed || !printed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Writes the document to stdout in one go; `false` when the reader is gone.
fn print(document: &Value) -> bool {
    let mut line = document.to_string();
    line.push('\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).is_ok()
}

/// For a human who called without `CNI_COMMAND`. The text goes to stderr, as in the reference plugins.
fn about() {
    let versions = Version::ALL.map(Version::as_str).join(", ");
    let text = format!(
        "terway {}: {ABOUT}.\nCNI versions: {versions}. Called by the container runtime, with CNI_COMMAND set.\n",
        env!("CARGO_PKG_VERSION")
    );
    let _nobody_listens = std::io::stderr().write_all(text.as_bytes());
}
