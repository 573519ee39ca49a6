//! `terway-cli`: what the daemon of this node knows, for people and for scripts.

mod config;
mod render;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use terway_proto::v1;
use terway_proto::v1::node_network_client::NodeNetworkClient;
use tonic::transport::{Channel, Endpoint};

/// Looks into the terway daemon of this node.
#[derive(Debug, Parser)]
#[command(name = "terway-cli", version, about)]
pub struct Cli {
    /// The daemon's socket.
    #[arg(long, global = true, env = "TERWAY_SOCKET", default_value = terway_core::cni::DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For people with wide screens.
    Wide,
    /// One JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One screen: can this node take pods, and if not, why. Exit code 1 if it cannot.
    Status,
    /// The pods of this node with their addresses, ENI and interface.
    List,
    /// Dropped packets with reason, addresses and pod, the latest last.
    Drops {
        /// Stay and print those to come.
        #[arg(short, long)]
        follow: bool,
    },
    /// Checks, explains and compares configurations (eni-config); needs no daemon.
    Config {
        #[command(subcommand)]
        command: config::Command,
    },
    /// Explains an error code such as TW0202.
    Explain {
        /// The code.
        code: String,
    },
}

/// Runs a command line and returns the exit code.
#[must_use]
pub fn main(cli: &Cli) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("terway-cli: {error}");
            return ExitCode::from(2);
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("terway-cli: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.command {
        Command::Status => {
            let status = connect(cli, Some(REPLY_WITHIN))
                .await?
                .status(v1::StatusRequest {})
                .await
                .map_err(explain)?
                .into_inner();
            print(&match cli.output {
                Output::Json => render::status_json(&status),
                _ => render::status_text(&status),
            });
            Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::List => {
            let pods = connect(cli, Some(REPLY_WITHIN))
                .await?
                .list_pods(v1::ListPodsRequest {})
                .await
                .map_err(explain)?
                .into_inner()
                .pods;
            print(&match cli.output {
                Output::Json => render::pods_json(&pods),
                output => render::pods_text(&pods, output == Output::Wide),
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Drops { follow } => {
            let request = v1::WatchDropsRequest { follow: *follow };
            let mut packets = connect(cli, None).await?.watch_drops(request).await.map_err(explain)?.into_inner();
            while let Some(packet) = packets.message().await.map_err(explain)? {
                print(&match cli.output {
                    Output::Json => render::drop_json(&packet),
                    _ => render::drop_text(&packet),
                });
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { command } => config::run(command, cli.output),
        Command::Explain { code } => {
            let code = terway_core::errors::by_id(&code.to_uppercase())
                .with_context(|| format!("{code} is no error code of this version"))?;
            print(&format!("{} {}\n\n{}\n{}\n", code.id, code.name, code.cause, code.remedy));
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[expect(clippy::print_stdout, reason = "printing is this program's purpose")]
fn print(text: &str) {
    print!("{text}");
}

/// A reply that takes longer will not come.
const REPLY_WITHIN: Duration = Duration::from_secs(10);

async fn connect(cli: &Cli, within: Option<Duration>) -> Result<NodeNetworkClient<Channel>> {
    let path = cli.socket.display();
    let mut endpoint = Endpoint::try_from(format!("unix://{path}"))?.connect_timeout(Duration::from_secs(2));
    if let Some(within) = within {
        endpoint = endpoint.timeout(within);
    }
    let channel = endpoint
        .connect()
        .await
        .with_context(|| format!("the daemon does not answer on {path}; is terwayd running, and are you root?"))?;
    Ok(NodeNetworkClient::new(channel))
}

fn explain(status: tonic::Status) -> anyhow::Error {
    match terway_proto::detail(&status) {
        Some(detail) => anyhow::anyhow!("{}: {} {} {}", detail.code, detail.cause, detail.detail, detail.remedy),
        None => anyhow::anyhow!("the daemon answered: {}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
