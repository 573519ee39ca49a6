//! The one interface to all chores. Run as `cargo xtask <verb>`; `cargo xtask help` lists the verbs.
//!
//! CI calls the same verbs that a person does. An error is one sentence on stderr and exit code 1.

mod binaries;
mod ci;
mod codegen;
mod image;
mod manifests;
mod process;
mod progress;
mod setup;
mod suites;
mod tidy;
mod vm;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::binaries::Benchmark;
use crate::setup::Part;
use crate::suites::Rung;
use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The chores of this workspace.")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building and testing need on a Debian machine.
    Setup {
        /// Only these parts.
        #[arg(long, value_enum)]
        only: Vec<Part>,
    },
    /// Run rungs of the test ladder; without a name, all that can run here.
    Test {
        /// The rungs.
        #[arg(value_enum)]
        rungs: Vec<Rung>,
        /// Run the guests of `vm` although they passed before with the same inputs.
        #[arg(long)]
        fresh: bool,
    },
    /// Check the rules that no compiler checks.
    Tidy {
        /// Record the present ABI; refused while ABI_VERSION is the one recorded.
        #[arg(long)]
        bless_abi: bool,
    },
    /// Write the files that are generated and committed.
    Codegen {
        /// Only say whether they are up to date.
        #[arg(long)]
        check: bool,
    },
    /// Run the demonstration: a simulated cloud, two nodes, real pods.
    Demo {
        /// Print machine-readable events.
        #[arg(long)]
        json: bool,
        /// Leave everything running for a look around.
        #[arg(long)]
        keep: bool,
    },
    /// Measure, each against an alternative in the same run.
    Bench {
        /// These benchmarks; without a name, all of them.
        #[arg(value_enum)]
        names: Vec<Benchmark>,
        /// Print machine-readable results.
        #[arg(long)]
        json: bool,
    },
    /// Render kustomize folders and Helm chart, compare them, and check alerts and dashboards.
    Manifests,
    /// Make the container image of the DaemonSet as an OCI archive.
    Image {
        /// Where to write it; by default into cargo's build folder.
        #[arg(long)]
        output: Option<PathBuf>,
        /// The image's name and tag.
        #[arg(long, default_value = concat!("localhost/terway:", env!("CARGO_PKG_VERSION")))]
        name: String,
    },
    /// Everything that a submission must pass.
    Ci,
    /// Run a command under a Debian kernel in QEMU.
    Vm(vm::Args),
}

fn main() -> ExitCode {
    process::catch_signals();
    match run(Args::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let verdict = |good: bool| if good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    match verb {
        Verb::Setup { only } => {
            setup::run(&workspace, if only.is_empty() { &Part::ALL } else { &only })?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Test { rungs, fresh } => Ok(verdict(suites::run(&workspace, &rungs, fresh)?)),
        Verb::Tidy { bless_abi } => Ok(verdict(tidy::run(&workspace, bless_abi)?)),
        Verb::Codegen { check } => {
            codegen::run(&workspace, check)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Demo { json, keep } => binaries::demo(&workspace, json, keep),
        Verb::Bench { names, json } => binaries::bench(&workspace, &names, json),
        Verb::Manifests => {
            manifests::run(&workspace)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Image { output, name } => {
            image::run(&workspace, output, &name)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Ci => Ok(verdict(ci::run(&workspace)?)),
        Verb::Vm(args) => vm::run(&workspace, args),
    }
}
