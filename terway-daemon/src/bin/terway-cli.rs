//! The command line of the node daemon; see `terway_daemon::cli`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    terway_daemon::cli::main(&terway_daemon::cli::Cli::parse())
}
