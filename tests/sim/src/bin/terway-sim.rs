//! `terway-sim`: runs the demo, and clears away what one left behind.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use terway_sim::cluster;
use terway_sim::demo::{self, Demo};

/// A cloud and a cluster on one machine.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Two nodes with containerd, pods, and a check of every capability; exit code 1 when one fails.
    Demo {
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
        /// Leave everything running afterwards, until Ctrl-C or `terway-sim clean`.
        #[arg(long)]
        keep: bool,
        /// Where terwayd, terway-cli and terway are [default: beside this program].
        #[arg(long, env = "TERWAY_BIN_DIR", value_name = "DIR")]
        bin_dir: Option<PathBuf>,
        /// Where containerd, ctr and containerd-shim-runc-v2 are.
        #[arg(long, default_value = "/usr/bin", value_name = "DIR")]
        containerd: PathBuf,
    },
    /// Ends kept demos and clears away what killed demos and suites left.
    Clean,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is this program's purpose")]
fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo { json, keep, bin_dir, containerd } => {
            demo::run(&Demo { json, keep, bin_dir, containerd: Some(containerd) })
        }
        Command::Clean => cluster::clean().map(|cleared| {
            println!("cleared away: {}", if cleared.is_empty() { "nothing".to_owned() } else { cleared.join(", ") });
            true
        }),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("terway-sim: {error:#}");
            ExitCode::from(2)
        }
    }
}
