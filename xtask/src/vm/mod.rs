//! `cargo xtask vm KERNEL -- COMMAND`: run one command under a real Debian kernel in QEMU, without acceleration.
//!
//! The guest is an initramfs: no disk, no network card, about three seconds a boot. Exit code: the command's own
//! (128 and the number of a signal), 124 when its time was up, 125 when the guest died, 126 when it could not start.

pub(crate) mod guest;
mod initramfs;
mod kernel;
mod modules;
mod qemu;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

pub(crate) use self::guest::Payload;
pub(crate) use self::kernel::{Kernel, Release};
pub(crate) use self::qemu::{Machine, Outcome};
use crate::setup::{self, Part};
use crate::workspace::Workspace;

const TIMED_OUT: u8 = 124;
const DIED: u8 = 125;
const NOT_STARTED: u8 = 126;

/// Arguments of the verb.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which of Debian's kernels.
    #[arg(value_enum)]
    kernel: Release,
    /// A file or folder to put into the guest, with its libraries; at the same place, or at GUEST.
    #[arg(long, short, value_name = "HOST[:GUEST]")]
    file: Vec<String>,
    /// Programs of the host to put into the guest.
    #[arg(long, short, value_delimiter = ',', default_value = "ip,ping,tc,nft,bpftool")]
    tool: Vec<String>,
    /// Environment of the command; without a value, our own.
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Memory of the guest, MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Seconds for boot and command.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Keep the kernel's console in this file.
    #[arg(long)]
    console: Option<PathBuf>,
    /// Ask the mirror for a newer kernel of the series.
    #[arg(long)]
    refresh: bool,
    /// The command; a path of the host is copied into the guest.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The verb.
///
/// # Errors
/// None but a signal: failures to start are exit code 126 and one sentence.
pub(crate) fn run(workspace: &Workspace, args: Args) -> Result<ExitCode> {
    let files = args.file.iter().map(|f| match f.split_once(':') {
        Some((host, guest)) => (host.into(), guest.into()),
        None => (f.into(), std::path::absolute(f).unwrap_or_else(|_| f.into())),
    });
    let environment = args.env.iter().filter_map(|e| match e.split_once('=') {
        Some((name, value)) => Some((name.to_owned(), value.to_owned())),
        None => Some((e.clone(), std::env::var(e).ok()?)),
    });
    let payload =
        Payload { command: args.command, files: files.collect(), tools: args.tool, environment: environment.collect() };
    let machine = Machine { memory: args.memory, limit: Duration::from_secs(args.timeout), console: args.console };
    let mut stdout = std::io::stdout();
    let outcome = setup::ensure(workspace, &[Part::Vm]).and_then(|()| {
        boot(workspace, args.kernel, args.refresh, &payload, &machine, |bytes| {
            // A closed pipe on our side is no reason to stop the guest.
            drop(stdout.write_all(bytes).and_then(|()| stdout.flush()));
        })
    });
    Ok(ExitCode::from(match outcome {
        Ok(Outcome::Exit(code)) => code,
        Ok(Outcome::TimedOut) => {
            eprintln!("vm: not done after {} s, stopped", args.timeout);
            TIMED_OUT
        }
        Ok(Outcome::Died(console)) => {
            eprint!("{console}");
            eprintln!("vm: the guest ended without a result; above is the end of its console");
            DIED
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            NOT_STARTED
        }
    }))
}

/// Fetches the kernel if it is not cached, and boots it once.
///
/// # Errors
/// Something that the boot needs is missing, or a signal arrives.
pub(crate) fn boot(
    workspace: &Workspace,
    release: Release,
    refresh: bool,
    payload: &Payload,
    machine: &Machine,
    on_output: impl FnMut(&[u8]),
) -> Result<Outcome> {
    let kernel = Kernel::get(workspace, release, refresh)?;
    qemu::boot(workspace, &kernel, payload, machine, on_output)
}

/// The kernel of a release, fetched if it is not cached.
///
/// # Errors
/// The mirror cannot be reached.
pub(crate) fn kernel(workspace: &Workspace, release: Release) -> Result<Kernel> {
    Kernel::get(workspace, release, false)
}
