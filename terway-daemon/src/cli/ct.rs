//! `terway-cli ct`: the datapath's flows, which are its connection tracking.

use std::net::IpAddr;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, block, pretty};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List flows: a line for each direction that has seen a packet.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Print at most N lines.
        #[arg(long, default_value_t = 1000, value_name = "N")]
        limit: u32,
    },
    /// Show how full the flow tables are, and of what.
    Stats,
    /// Delete flows; their next packet takes the slow path. Connections to Services may get another backend, and break.
    Flush {
        #[command(flatten)]
        filter: Filter,
        /// Delete all flows, where no filter is given.
        #[arg(long)]
        all: bool,
    },
}

/// Filter of flows; all conditions must match.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Filter {
    /// Flows of this pod of the node.
    #[arg(long, value_name = "NS/NAME", value_parser = super::qualified)]
    pod: Option<(String, String)>,
    /// Flows with this source or destination address.
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Flows with this source or destination port.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Flows of this protocol: tcp, udp, sctp, icmp, icmpv6, or a number.
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol)]
    proto: Option<u8>,
}

const PROTOCOLS: [(&str, u8); 5] = [("tcp", 6), ("udp", 17), ("sctp", 132), ("icmp", 1), ("icmpv6", 58)];

fn protocol(text: &str) -> Result<u8, String> {
    let named = PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, number)| *number);
    named.or_else(|| text.parse().ok()).ok_or_else(|| "is no protocol".to_owned())
}

impl Filter {
    pub(super) const fn is_empty(&self) -> bool {
        self.pod.is_none() && self.address.is_none() && self.port.is_none() && self.proto.is_none()
    }

    pub(super) fn message(&self) -> Option<v1::FlowFilter> {
        let pod = self.pod.clone();
        Some(v1::FlowFilter {
            pod: pod.map(|(namespace, name)| v1::Pod { namespace, name, uid: String::new() }),
            address: self.address.map(|address| address.to_string()).unwrap_or_default(),
            port: self.port.map_or(0, u32::from),
            protocol: self.proto.map_or(0, u32::from),
        })
    }
}

fn protocol_name(number: u32) -> String {
    let named = PROTOCOLS.iter().find(|(_, known)| u32::from(*known) == number);
    named.map_or_else(|| number.to_string(), |(name, _)| (*name).to_owned())
}

fn end(address: &str, port: u32) -> String {
    match address.parse() {
        Ok(IpAddr::V6(v6)) if port != 0 => format!("[{v6}]:{port}"),
        _ if port != 0 => format!("{address}:{port}"),
        _ => address.to_owned(),
    }
}

pub(super) fn list(reply: &v1::ListFlowsResponse, style: Style) -> String {
    if style.is_json() {
        let flows: Vec<Value> = reply.flows.iter().map(value).collect();
        return pretty(&json!({"more": reply.more, "flows": flows}));
    }
    let head = ["PROTO", "SOURCE", "DESTINATION", "TO", "FLAGS", "PACKETS", "BYTES", "IDLE", "+TRANSLATED", "+VALID"];
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let rows = reply.flows.iter().map(|f| {
        vec![
            protocol_name(f.protocol),
            end(&f.source, f.source_port),
            end(&f.destination, f.destination_port),
            f.action.clone(),
            f.flags.join(","),
            f.packets.to_string(),
            f.bytes.to_string(),
            format!("{}.{}s", f.idle_ms / 1000, f.idle_ms % 1000 / 100),
            yes(f.translated),
            yes(f.valid),
        ]
    });
    let mut out = style.table(&head, rows);
    if reply.more {
        out.push_str("there are more; --limit tells how many are shown\n");
    }
    out
}

fn value(f: &v1::Flow) -> Value {
    json!({
        "protocol": f.protocol, "source": f.source, "sourcePort": f.source_port, "destination": f.destination,
        "destinationPort": f.destination_port, "action": f.action, "translated": f.translated, "flags": f.flags,
        "packets": f.packets, "bytes": f.bytes, "idleMilliseconds": f.idle_ms, "valid": f.valid,
    })
}

pub(super) fn stats(reply: &v1::FlowStatsResponse, style: Style) -> String {
    let mut protocols: Vec<(String, u64)> = reply.protocols.iter().map(|(p, n)| (protocol_name(*p), *n)).collect();
    protocols.sort();
    if style.is_json() {
        let protocols: serde_json::Map<String, Value> = protocols.into_iter().map(|(p, n)| (p, n.into())).collect();
        return pretty(&json!({
            "usedV4": reply.used_v4, "usedV6": reply.used_v6, "capacity": reply.capacity_v4, "capacityV4": reply.capacity_v4,
            "capacityV6": reply.capacity_v6, "stale": reply.stale, "translated": reply.translated,
            "protocols": protocols, "tracking": reply.tracking.as_ref().map(tracking),
        }));
    }
    let known = reply.tracking.unwrap_or_default();
    let protocols: Vec<String> = protocols.iter().map(|(p, n)| format!("{p} {n}")).collect();
    let part = |used: u64, capacity: u64| {
        format!("{used} of {capacity} ({:.1}%)", used as f64 * 100.0 / capacity.max(1) as f64)
    };
    let seconds = |ms: u64| format!("{}.{}s", ms / 1000, ms % 1000 / 100);
    block(&[
        ("IPv4", part(reply.used_v4, reply.capacity_v4)),
        ("IPv6", part(reply.used_v6, reply.capacity_v6)),
        ("translated", reply.translated.to_string()),
        ("stale", reply.stale.to_string()),
        ("protocols", protocols.join(", ")),
        ("made", format!("{}, refused {}, evicted {} (estimate)", known.made, known.refused, known.lost)),
        ("deleted", format!("{} stale, {} expired", known.deleted_stale, known.deleted_expired)),
        (
            "collecting",
            format!(
                "every {}, {} passes; last counted {} ago in {}.{}ms, {} deleted",
                seconds(known.interval_ms),
                known.passes,
                seconds(known.last_ms_ago),
                known.last_took_us / 1000,
                known.last_took_us % 1000 / 100,
                known.last_deleted
            ),
        ),
    ])
}

fn tracking(known: &v1::FlowTracking) -> Value {
    json!({
        "pressureV4": known.pressure_v4, "pressureV6": known.pressure_v6, "made": known.made, "refused": known.refused,
        "evictedEstimate": known.lost, "intervalMilliseconds": known.interval_ms, "passes": known.passes,
        "lastMillisecondsAgo": known.last_ms_ago, "lastMicroseconds": known.last_took_us,
        "lastDeleted": known.last_deleted, "deletedStale": known.deleted_stale, "deletedExpired": known.deleted_expired,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_understood() {
        assert_eq!(protocol("UDP"), Ok(17));
        assert_eq!(protocol("47"), Ok(47));
        assert!(protocol("quic").is_err() && protocol("300").is_err());
        assert_eq!(end("fd00::1", 80), "[fd00::1]:80");
        let filter = Filter { port: Some(53), proto: Some(17), ..Filter::default() };
        assert!(!filter.is_empty() && Filter::default().is_empty());
        let message = filter.message().unwrap();
        assert_eq!((message.port, message.protocol, message.pod), (53, 17, None));
    }
}
