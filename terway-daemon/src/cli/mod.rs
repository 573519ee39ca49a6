//! `terway-cli`: the command line of the node daemon, for people and for scripts.
//!
//! Exit codes: 0 all is well, 1 the answer tells of a problem or mismatch (or the daemon refused), 2 wrong usage, 3 the daemon does not
//! answer. The JSON is a contract: keys are added, never renamed (docs/operating.md).

mod config;
mod config_input;
mod ct;
mod daemon;
mod drops;
mod eni;
mod flows;
mod mapping;
mod metadata;
mod pods;
mod policy;
#[cfg(test)]
mod sample;
mod show;
mod status;
mod svc;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use terway_proto::v1;

use self::daemon::Failure;
use self::table::Style;

/// Inspects the terway daemon of this node: pods, ENIs, Services, network policies, flows, configuration.
#[derive(Debug, Parser)]
#[command(name = "terway-cli", version)]
#[command(after_help = "Examples:
  terway-cli status                        is this node healthy, and if not, what to do
  terway-cli list -o wide                  pods with addresses, ENI and container id
  terway-cli show pod default/web-0        one pod, every layer compared
  terway-cli drops -f                      dropped packets as they come
  terway-cli policy explain --from default/web-0 --to default/db-0:5432
  terway-cli explain TW0202                cause and remedy of an error code

Exit codes: 0 no problem, 1 a problem or mismatch was found or the daemon answered with an error, 2 wrong usage,
3 the daemon does not answer.")]
pub struct Cli {
    /// Socket of the daemon.
    #[arg(long, global = true, env = "TERWAY_SOCKET", default_value = terway_core::cni::DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// Output format.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    output: Output,
    /// Print tables without the header line.
    #[arg(long, global = true)]
    no_headers: bool,
    #[command(subcommand)]
    command: Command,
}

/// Output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table of the most important columns.
    #[value(alias = "text")]
    Table,
    /// A table of all columns.
    Wide,
    /// One JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show whether this node can take pods, and every problem with its remedy. Exit code 1 if there is a problem.
    Status,
    /// List the pods of this node with addresses, ENI and interface.
    List,
    /// Show one pod, ENI, vSwitch or address; without an argument, all vSwitches and ENIs.
    #[command(after_help = "Examples:
  terway-cli show
  terway-cli show pod default/web-0
  terway-cli show address 10.0.2.11")]
    Show {
        #[command(subcommand)]
        what: Option<show::What>,
    },
    /// Compare each pod's state in store, kernel, datapath and cloud. Exit code 1 if they differ.
    Mapping {
        /// Do not ask the cloud API.
        #[arg(long)]
        no_cloud: bool,
    },
    /// Show what the metadata service says about this node.
    Metadata,
    /// ENIs of this instance.
    Eni {
        #[command(subcommand)]
        verb: EniVerb,
    },
    /// Print dropped packets with reason, addresses and pod, oldest first.
    Drops {
        /// Wait for further packets and print them.
        #[arg(short, long)]
        follow: bool,
    },
    /// Print flow events: new connections (sampled, see flow_events_one_in) and dropped packets, with pods, Service and deciding policies.
    #[command(after_help = "Examples:
  terway-cli flows --last 20
  terway-cli flows -f --pod default/web-0 --verdict dropped")]
    Flows {
        #[command(flatten)]
        filter: flows::Filter,
    },
    /// Services and host ports that this node serves.
    Svc {
        #[command(subcommand)]
        verb: SvcVerb,
    },
    /// Network policies, and why a connection is allowed or denied.
    Policy {
        #[command(subcommand)]
        verb: policy::Verb,
    },
    /// Connection tracking: the datapath's flow tables.
    Ct {
        #[command(subcommand)]
        verb: ct::Verb,
    },
    /// Switch the debug log of the datapath, whose records go to the daemon's log; without an argument, tell whether it is on.
    #[command(
        after_help = "A line for each decision of the slow path: packet, backend, route, policy verdicts. Packets of established connections write none.
Connections go on. It lasts until it is switched off or the daemon restarts."
    )]
    DatapathLog {
        /// On or off.
        #[arg(value_name = "on|off", value_parser = switch)]
        enabled: Option<bool>,
    },
    /// Put the CNI plugin into the runtime's folder, as the DaemonSet's init container does; needs no daemon.
    Install(install::Install),
    /// Check, explain and compare configurations (eni-config); needs no daemon.
    Config {
        #[command(subcommand)]
        command: config::Command,
    },
    /// Explain an error code such as TW0202; needs no daemon.
    Explain {
        /// The code.
        #[arg(value_name = "CODE")]
        code: String,
    },
}

#[derive(Debug, Subcommand)]
enum EniVerb {
    /// List all ENIs: role, vSwitch, state, addresses in use, and why an ENI is not used.
    List,
}

#[derive(Debug, Subcommand)]
enum SvcVerb {
    /// List all Services: a line for each address and port, with ready and all backends.
    List,
    /// Show one Service with its backends. Exit code 1 if this node does not serve it.
    Show {
        /// Namespace and name of the Service.
        #[arg(value_name = "NS/NAME", value_parser = qualified)]
        name: (String, String),
    },
}

fn qualified(text: &str) -> Result<(String, String), String> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| "is not NAMESPACE/NAME".to_owned())?;
    Ok((namespace.to_owned(), name.to_owned()))
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("is neither on nor off".to_owned()),
    }
}

/// Runs a command line and returns the exit code.
#[must_use]
pub fn main(cli: &Cli) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("terway-cli: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("terway-cli: {error:#}");
            error.downcast_ref::<Failure>().map_or(ExitCode::FAILURE, Failure::code)
        }
    }
}

async fn run(cli: &Cli) -> Result<ExitCode> {
    let style = Style { output: cli.output, headers: !cli.no_headers };
    match &cli.command {
        Command::Status => {
            let status = daemon::call(cli, v1::StatusRequest {}, |mut c, r| async move { c.status(r).await }).await?;
            print(&status::render(&status, style));
            Ok(verdict(status.ready && status.problems.is_empty()))
        }
        Command::List => {
            let reply =
                daemon::call(cli, v1::ListPodsRequest {}, |mut c, r| async move { c.list_pods(r).await }).await?;
            print(&pods::render(&reply.pods, style));
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { what } => show::run(cli, what.as_ref(), style).await,
        Command::Mapping { no_cloud } => {
            let reply = daemon::mapping(cli, *no_cloud).await?;
            print(&mapping::render(&reply, style));
            Ok(verdict(mapping::agrees(&reply)))
        }
        Command::Metadata => {
            let request = v1::GetMetadataRequest {};
            let reply = daemon::call(cli, request, |mut c, r| async move { c.get_metadata(r).await }).await?;
            print(&metadata::render(&reply, style));
            Ok(verdict(reply.errors.is_empty()))
        }
        Command::Eni { verb: EniVerb::List } => {
            let reply = daemon::pool(cli).await?;
            print(&eni::render(&reply, style));
            Ok(verdict(complete(&reply)))
        }
        Command::Drops { follow } => {
            let request = v1::WatchDropsRequest { follow: *follow };
            let mut packets = daemon::drops(cli, request).await?;
            while let Some(packet) = packets.message().await.map_err(Failure::from)? {
                print(&match cli.output {
                    Output::Json => drops::json(&packet),
                    Output::Table | Output::Wide => drops::text(&packet),
                });
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Flows { filter } => {
            let mut events = daemon::flows(cli, filter.message()).await?;
            while let Some(event) = events.message().await.map_err(Failure::from)? {
                print(&match cli.output {
                    Output::Json => flows::json(&event),
                    Output::Table | Output::Wide => flows::text(&event),
                });
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Svc { verb } => services(cli, verb, style).await,
        Command::Policy { verb } => policies(cli, verb, style).await,
        Command::Ct { verb } => tracking(cli, verb, style).await,
        Command::DatapathLog { enabled } => {
            let request = v1::SetDatapathLogRequest { enabled: *enabled };
            let reply = daemon::call(cli, request, |mut c, r| async move { c.set_datapath_log(r).await }).await?;
            print(&if style.is_json() {
                table::pretty(&serde_json::json!({"datapathLog": reply.enabled}))
            } else {
                format!("The debug log of the datapath is {}.\n", if reply.enabled { "on" } else { "off" })
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Install(arguments) => {
            print(&install::run(arguments).map_err(Failure::Refused)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { command } => config::run(command, style),
        Command::Explain { code } => {
            let unknown = || Failure::Usage(format!("{code} is no error code of this version"));
            let code = terway_core::errors::by_id(&code.to_uppercase()).ok_or_else(unknown)?;
            print(&format!("{} {}\n\n{}\n{}\n", code.id, code.name, code.cause, code.remedy));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn services(cli: &Cli, verb: &SvcVerb, style: Style) -> Result<ExitCode> {
    let (namespace, name) = match verb {
        SvcVerb::List => (String::new(), String::new()),
        SvcVerb::Show { name } => name.clone(),
    };
    let request = v1::ListServicesRequest { namespace, name };
    let reply = daemon::call(cli, request, |mut c, r| async move { c.list_services(r).await }).await?;
    match verb {
        SvcVerb::List => {
            print(&svc::list(&reply, style));
            Ok(ExitCode::SUCCESS)
        }
        SvcVerb::Show { name: (namespace, name) } if reply.ports.is_empty() => {
            Err(Failure::Refused(format!("this node serves no {namespace}/{name}")).into())
        }
        SvcVerb::Show { .. } => {
            print(&svc::show(&reply, style));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn policies(cli: &Cli, verb: &policy::Verb, style: Style) -> Result<ExitCode> {
    if let policy::Verb::Explain { from, to } = verb {
        let request = v1::ExplainPolicyRequest {
            from: Some(from.clone()),
            to: Some(to.party.clone()),
            protocol: to.protocol,
            port: to.port,
        };
        let reply = daemon::call(cli, request, |mut c, r| async move { c.explain_policy(r).await }).await?;
        if !reply.problem.is_empty() {
            return Err(Failure::Refused(reply.problem).into());
        }
        print(&policy::explain(&reply, style));
        return Ok(verdict(reply.families.iter().all(|family| family.allowed)));
    }
    let reply = daemon::call(cli, policy::request(verb), |mut c, r| async move { c.list_policies(r).await }).await?;
    match verb {
        policy::Verb::Show { name } if reply.policies.is_empty() => {
            Err(Failure::Refused(format!("no network policy {name} is known")).into())
        }
        policy::Verb::Show { .. } => {
            print(&policy::show(&reply, style));
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            print(&policy::list(&reply, style));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn tracking(cli: &Cli, verb: &ct::Verb, style: Style) -> Result<ExitCode> {
    let text = match verb {
        ct::Verb::List { filter, limit } => {
            let request = v1::ListFlowsRequest { filter: filter.message(), limit: *limit };
            let reply = daemon::call(cli, request, |mut c, r| async move { c.list_flows(r).await }).await?;
            ct::list(&reply, style)
        }
        ct::Verb::Stats => {
            let request = v1::FlowStatsRequest {};
            ct::stats(&daemon::call(cli, request, |mut c, r| async move { c.flow_stats(r).await }).await?, style)
        }
        ct::Verb::Flush { filter, all } => {
            if filter.is_empty() && !all {
                return Err(Failure::Usage("ct flush needs a filter, or --all".to_owned()).into());
            }
            let request = v1::FlushFlowsRequest { filter: filter.message() };
            let reply = daemon::call(cli, request, |mut c, r| async move { c.flush_flows(r).await }).await?;
            if style.is_json() {
                table::pretty(&serde_json::json!({"deleted": reply.deleted}))
            } else {
                format!("{} entries deleted\n", reply.deleted)
            }
        }
    };
    print(&text);
    Ok(ExitCode::SUCCESS)
}

fn verdict(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether the cloud added its part. If not, what follows is said on stderr, where it disturbs no parser.
fn complete(reply: &v1::GetPoolResponse) -> bool {
    if let Some(error) = &reply.cloud_error {
        eprintln!("terway-cli: without the cloud's part: {} {} {}", error.code, error.detail, error.remedy);
    }
    reply.cloud_error.is_none()
}

#[expect(clippy::print_stdout, reason = "printing is this program's purpose")]
fn print(text: &str) {
    print!("{text}");
}

#[cfg(test)]
mod help;
mod install;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn forms_of_show_are_understood_and_others_are_wrong_usage() {
        let parse = |words: &[&str]| Cli::try_parse_from(["terway-cli"].iter().chain(words));
        for good in [
            &["show"][..],
            &["show", "pod", "default/web"],
            &["show", "eni", "eni-1", "-o", "wide"],
            &["show", "vswitch", "vsw-1"],
            &["show", "address", "fd00::1"],
            &["eni", "list", "-o", "text", "--no-headers"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
        for bad in [&["show", "pod", "web"][..], &["show", "address", "10.0.0"], &["eni"], &["list", "-o", "xml"]] {
            assert_eq!(parse(bad).map(drop).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
