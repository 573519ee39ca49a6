//! Flows of the datapath for the command line: listed, counted, flushed.

use std::net::IpAddr;
use std::sync::Arc;

use terway_abi::{Action, flow_flags};
use terway_core::errors::{self, Error};
use terway_proto::v1;

use super::Engine;
use crate::bpf::{FlowFilter, FlowRow};

/// Rows that one answer holds at the most: a gRPC message has 4 MiB, a row up to some 150 bytes.
const ROWS: usize = 20_000;

impl Engine {
    /// Flows that a filter means.
    ///
    /// # Errors
    /// A filter that makes no sense, or maps that cannot be read.
    pub async fn flows(self: &Arc<Self>, request: v1::ListFlowsRequest) -> Result<v1::ListFlowsResponse, Error> {
        let filter = self.flow_filter(request.filter)?;
        let limit = match request.limit as usize {
            0 => ROWS,
            given => given.min(ROWS),
        };
        let (rows, more) = self.with_datapath(move |datapath| datapath.flows().find(&filter, limit)).await?;
        Ok(v1::ListFlowsResponse { flows: rows.iter().map(flow).collect(), more })
    }

    /// Deletes flows that a filter means.
    ///
    /// # Errors
    /// As [`Engine::flows`].
    pub async fn flush_flows(
        self: &Arc<Self>,
        filter: Option<v1::FlowFilter>,
    ) -> Result<v1::FlushFlowsResponse, Error> {
        let filter = self.flow_filter(filter)?;
        let deleted = self.with_datapath(move |datapath| datapath.flows().flush(&filter)).await?;
        Ok(v1::FlushFlowsResponse { deleted })
    }

    /// The flow tables in numbers.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn flow_stats(self: &Arc<Self>) -> Result<v1::FlowStatsResponse, Error> {
        let stats = self.with_datapath(|datapath| datapath.flows().stats()).await?;
        let [used_v4, used_v6] = stats.used;
        Ok(v1::FlowStatsResponse {
            used_v4,
            used_v6,
            capacity_v4: stats.capacity[0].into(),
            capacity_v6: stats.capacity[1].into(),
            stale: stats.invalid,
            translated: stats.translated,
            protocols: stats.protocols.into_iter().map(|(protocol, n)| (protocol.into(), n)).collect(),
            tracking: None,
        })
    }

    fn flow_filter(&self, given: Option<v1::FlowFilter>) -> Result<FlowFilter, Error> {
        let given = given.unwrap_or_default();
        let bad = |what: &str| Error::new(errors::CNI_CONFIG, format!("{what} is not valid"));
        let mut addresses: Option<Vec<IpAddr>> = None;
        if !given.address.is_empty() {
            addresses = Some(vec![given.address.parse().map_err(|_invalid| bad(&given.address))?]);
        }
        if let Some(pod) = given.pod {
            let ours = self
                .list()
                .into_iter()
                .find(|known| known.pod.as_ref().is_some_and(|p| p.namespace == pod.namespace && p.name == pod.name));
            let unknown = || Error::new(errors::UNKNOWN_ATTACHMENT, format!("pod {}/{}.", pod.namespace, pod.name));
            let own = ours.ok_or_else(unknown)?.addresses;
            addresses.get_or_insert_default().extend(own.iter().filter_map(|text| text.parse::<IpAddr>().ok()));
        }
        Ok(FlowFilter {
            addresses,
            port: match given.port {
                0 => None,
                port => Some(u16::try_from(port).map_err(|_large| bad("the port"))?),
            },
            protocol: match given.protocol {
                0 => None,
                protocol => Some(u8::try_from(protocol).map_err(|_large| bad("the protocol"))?),
            },
        })
    }
}

fn flow(row: &FlowRow) -> v1::Flow {
    let flags = [
        (flow_flags::REPLY, "reply"),
        (flow_flags::SYN, "syn"),
        (flow_flags::FIN, "fin"),
        (flow_flags::RST, "rst"),
        (flow_flags::SEEN, "seen"),
    ];
    let actions = [(Action::Stack, "stack"), (Action::Local, "local"), (Action::Vpc, "vpc")];
    let action = actions.iter().find(|(action, _)| *action as u32 == row.action).map_or("", |(_, name)| *name);
    v1::Flow {
        source: row.source.address.to_string(),
        source_port: row.source.port.into(),
        destination: row.destination.address.to_string(),
        destination_port: row.destination.port.into(),
        protocol: row.protocol.into(),
        action: action.to_owned(),
        translated: row.flags & flow_flags::NAT != 0,
        flags: flags.iter().filter(|(bit, _)| row.flags & bit != 0).map(|(_, name)| (*name).to_owned()).collect(),
        packets: row.packets,
        bytes: row.bytes,
        idle_ms: u64::try_from(row.idle.as_millis()).unwrap_or(u64::MAX),
        valid: row.valid,
    }
}
