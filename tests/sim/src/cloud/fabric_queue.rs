//! The queue from the cloud to the fabric: one thread, one command at a time, in the order of the commands.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, mpsc};

use ipnetwork::{Ipv4Network, Ipv6Network};
use terway_core::ident::{EniId, Mac};
use tokio::sync::oneshot;
use tracing::error;

use crate::fabric::{Fabric, FabricEni};

pub(super) enum Command {
    Hotplug {
        node: String,
        eni: FabricEni,
    },
    HotUnplug {
        node: String,
        eni: EniId,
        mac: Mac,
    },
    Addresses {
        eni: EniId,
        v4: Vec<Ipv4Addr>,
        v6: Vec<Ipv6Addr>,
    },
    Prefixes {
        eni: EniId,
        v4: Vec<Ipv4Network>,
        v6: Vec<Ipv6Network>,
    },
    /// Nothing; its answer says that all before it is done.
    Barrier,
}

type Answer = oneshot::Sender<anyhow::Result<()>>;

/// The sending end. The thread ends when the last one is dropped.
#[derive(Clone)]
pub(super) struct FabricQueue(mpsc::Sender<(Command, Option<Answer>)>);

impl FabricQueue {
    pub(super) fn new(fabric: Arc<dyn Fabric>) -> anyhow::Result<Self> {
        let (sender, receiver) = mpsc::channel::<(Command, Option<Answer>)>();
        std::thread::Builder::new().name("sim-fabric".to_owned()).spawn(move || {
            for (command, answer) in receiver {
                let result = run(&*fabric, &command);
                match answer {
                    // Nobody waits any more.
                    Some(answer) => drop(answer.send(result)),
                    None => {
                        if let Err(error) = result {
                            error!(error = format!("{error:#}"), "the fabric refused a command");
                        }
                    }
                }
            }
        })?;
        Ok(Self(sender))
    }

    /// Queues a command; failures are logged.
    pub(super) fn send(&self, command: Command) {
        if self.0.send((command, None)).is_err() {
            error!("the fabric's thread has died");
        }
    }

    /// Queues a command and waits until it is done.
    pub(super) async fn run(&self, command: Command) -> anyhow::Result<()> {
        let (answer, result) = oneshot::channel();
        self.0.send((command, Some(answer))).map_err(|_returned| anyhow::anyhow!("the fabric's thread has died"))?;
        result.await?
    }
}

fn run(fabric: &dyn Fabric, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Hotplug { node, eni } => fabric.hotplug(node, eni),
        Command::HotUnplug { node, eni, mac } => fabric.hot_unplug(node, eni, *mac),
        Command::Addresses { eni, v4, v6 } => fabric.set_addresses(eni, v4, v6),
        Command::Prefixes { eni, v4, v6 } => fabric.set_prefixes(eni, v4, v6),
        Command::Barrier => Ok(()),
    }
}
