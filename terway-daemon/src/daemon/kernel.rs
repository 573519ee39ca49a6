//! Phase "kernel": netlink, the monitor of links and addresses, and the datapath's programs and maps.

use std::sync::Arc;

use prometheus_client::registry::Registry;
use terway_core::config::Config;
use terway_core::conntrack::Cost;
use terway_core::errors::{self, Error};
use tracing::{info, warn};

use super::failed;
use crate::bpf::{self, Datapath};
use crate::metrics;
use crate::net::{Host, NetMonitor};
use crate::options::Options;
use crate::supervise;

/// Handles of the kernel.
pub(super) struct Kernel {
    pub(super) host: Arc<Host>,
    pub(super) monitor: NetMonitor,
    pub(super) datapath: Arc<Datapath>,
}

impl Kernel {
    pub(super) fn open(options: &Options, config: &Config, registry: &mut Registry) -> Result<Self, Error> {
        let host = Arc::new(Host::new()?);
        let monitor = host.monitor()?;
        let datapath = Arc::new(open_datapath(options, config)?);
        metrics::register_datapath(registry, &datapath);
        Ok(Self { host, monitor, datapath })
    }
}

fn open_datapath(options: &Options, config: &Config) -> Result<Datapath, Error> {
    let [flows_v4, flows_v6] = match options.flow_entries {
        Some(entries) => [entries; 2],
        None => {
            let memory = memory().map_err(|error| failed(errors::INTERNAL, "the node's memory", &error))?;
            let [v4, v6] = bpf::FLOW_BYTES;
            let cost = Cost { v4: config.ip_stack.v4().then_some(v4), v6: config.ip_stack.v6().then_some(v6) };
            config.conntrack.sizing.entries(memory, cost)
        }
    };
    info!(flows_v4, flows_v6, "flow tables");
    let config = bpf::Config { flows_v4, flows_v6, debug: options.datapath_log, ..bpf::Config::new(&options.bpffs) };
    Datapath::open(&config).map_err(|error| failed(errors::BPF_FAILED, &options.bpffs.display().to_string(), &error))
}

/// The node's memory in bytes.
fn memory() -> std::io::Result<u64> {
    let info = nix::sys::sysinfo::sysinfo()?;
    Ok(info.ram_total())
}

/// Removes the maps of other ABI versions and sizes, once every pod and ENI has this daemon's programs. Those that stay only cost memory.
pub(super) async fn remove_other_maps(datapath: &Arc<Datapath>) {
    let datapath = Arc::clone(datapath);
    if let Err(error) = supervise::blocking(move || datapath.remove_other_versions()).await {
        warn!(%error, "failed to remove the maps of other versions and sizes");
    }
}
