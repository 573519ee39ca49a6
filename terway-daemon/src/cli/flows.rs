//! `terway-cli flows`: new connections and dropped packets, one a line, with names and what decided.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use terway_proto::v1;

/// Filter of flow events; all conditions must match.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Filter {
    /// Wait for further events and print them.
    #[arg(short, long)]
    follow: bool,
    /// Events with this pod as source, destination or backend.
    #[arg(long, value_name = "NS/POD", value_parser = super::qualified)]
    pod: Option<(String, String)>,
    /// Events with this verdict.
    #[arg(long, value_enum)]
    verdict: Option<Verdict>,
    /// Events that this network policy decided, at either end.
    #[arg(long, value_name = "[NS/]NAME")]
    policy: Option<String>,
    /// Events with this source, destination or backend port.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Print at most the latest N of the events that the daemon remembers.
    #[arg(long, value_name = "N")]
    last: Option<u32>,
}

/// Verdict of a flow event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Verdict {
    /// New connections (sampled, see flow_events_one_in).
    Allowed,
    /// Dropped packets.
    Dropped,
}

impl Filter {
    pub(super) fn message(&self) -> v1::WatchFlowsRequest {
        let pod = self.pod.clone();
        v1::WatchFlowsRequest {
            follow: self.follow,
            pod: pod.map(|(namespace, name)| v1::Pod { namespace, name, uid: String::new() }),
            verdict: match self.verdict {
                None => "",
                Some(Verdict::Allowed) => "allowed",
                Some(Verdict::Dropped) => "dropped",
            }
            .to_owned(),
            policy: self.policy.clone().unwrap_or_default(),
            port: self.port.map_or(0, u32::from),
            last: self.last.unwrap_or_default(),
        }
    }
}

/// The time of day of an event, in UTC.
pub(super) fn time(at_ms: u64) -> String {
    let clock = at_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", clock / 3600, clock / 60 % 60, clock % 60, at_ms % 1000)
}

/// A protocol as it is written between other words.
pub(super) fn protocol(number: u32) -> String {
    match number {
        0 => String::new(),
        1 => " ICMP".to_owned(),
        6 => " TCP".to_owned(),
        17 => " UDP".to_owned(),
        58 => " ICMPv6".to_owned(),
        132 => " SCTP".to_owned(),
        other => format!(" protocol {other}"),
    }
}

fn end(end: &v1::FlowEnd, mac: &str) -> String {
    let at = match (end.address.parse(), end.port) {
        (Err(_), _) => mac.to_owned(),
        (Ok(IpAddr::V6(v6)), port) if port != 0 => format!("[{v6}]:{port}"),
        (Ok(address), 0) => address.to_string(),
        (Ok(address), port) => format!("{address}:{port}"),
    };
    match &end.pod {
        Some(pod) => format!("{}/{} ({at})", pod.namespace, pod.name),
        None => at,
    }
}

pub(super) fn text(event: &v1::FlowEvent) -> String {
    let ends = |at: &Option<v1::FlowEnd>| at.clone().unwrap_or_default();
    let source = end(&ends(&event.source), &event.source_mac);
    let mut destination = end(&ends(&event.destination), &event.destination_mac);
    if !event.service.is_empty() {
        destination = format!("Service {} ({destination})", event.service);
    }
    if let Some(backend) = &event.backend {
        destination = format!("{destination} -> {}", end(backend, ""));
    }
    let mut why = Vec::new();
    if !event.reason.is_empty() {
        let lost = if event.lost > 0 { format!(" ({} not shown before)", event.lost) } else { String::new() };
        why.push(format!("{} at {} of {}{lost}", event.reason, event.program, interface(event)));
    }
    for (direction, side) in [("egress", &event.egress), ("ingress", &event.ingress)] {
        if let Some(side) = side {
            why.push(format!("{direction} {}: {}", if side.allowed { "allowed" } else { "denied" }, side.reason));
        }
    }
    let why = if why.is_empty() { String::new() } else { format!("; {}", why.join("; ")) };
    format!("{} {}{} {source} -> {destination}{why}\n", time(event.at_ms), event.verdict, protocol(event.protocol))
}

fn interface(event: &v1::FlowEvent) -> String {
    if event.ifname.is_empty() { event.ifindex.to_string() } else { event.ifname.clone() }
}

/// One line, so that a follower can be read line by line.
pub(super) fn json(event: &v1::FlowEvent) -> String {
    let pod = |pod: &Option<v1::Pod>| {
        pod.as_ref().map_or(Value::Null, |pod| json!({"namespace": pod.namespace, "name": pod.name}))
    };
    let end = |end: &Option<v1::FlowEnd>| {
        end.as_ref().map_or(Value::Null, |end| json!({"address": end.address, "port": end.port, "pod": pod(&end.pod)}))
    };
    let side = |side: &Option<v1::FlowDecision>| {
        side.as_ref().map_or(
            Value::Null,
            |side| json!({"allowed": side.allowed, "reason": side.reason, "policies": side.policies}),
        )
    };
    let value = json!({
        "atMilliseconds": event.at_ms, "verdict": event.verdict, "protocol": event.protocol,
        "source": end(&event.source), "destination": end(&event.destination), "service": event.service,
        "backend": end(&event.backend), "egress": side(&event.egress), "ingress": side(&event.ingress),
        "reason": event.reason, "program": event.program, "interface": event.ifname, "ifindex": event.ifindex,
        "interfacePod": pod(&event.pod), "length": event.length, "sourceMAC": event.source_mac,
        "destinationMAC": event.destination_mac, "lost": event.lost,
    });
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(address: &str, port: u32, pod: &str) -> Option<v1::FlowEnd> {
        let pod = (!pod.is_empty()).then(|| v1::Pod { namespace: "shop".into(), name: pod.into(), uid: String::new() });
        Some(v1::FlowEnd { address: address.into(), port, pod })
    }

    fn side(allowed: bool, reason: &str, policies: &[&str]) -> Option<v1::FlowDecision> {
        let policies = policies.iter().map(ToString::to_string).collect();
        Some(v1::FlowDecision { allowed, reason: reason.into(), policies })
    }

    /// A connection to a Service, a packet that a policy forbids, and one whose family nobody knows.
    fn events() -> [v1::FlowEvent; 3] {
        let rule = "NetworkPolicy shop/db, ingress rule 0: Accept";
        let isolated = "isolated in ingress by NetworkPolicy shop/db, none of whose rules allows it";
        let shared = v1::FlowEvent { at_ms: 3_723_004, program: "from_pod".into(), ..Default::default() };
        [
            v1::FlowEvent {
                verdict: "allowed".into(),
                source: end("10.0.0.5", 40_000, "web-0"),
                destination: end("10.96.0.1", 5432, ""),
                protocol: 6,
                service: "shop/db".into(),
                backend: end("10.0.0.9", 15_432, "db-0"),
                egress: side(true, "no policy decides about it", &[]),
                ingress: side(true, rule, &["NetworkPolicy shop/db"]),
                ifindex: 7,
                ifname: "cali1".into(),
                length: 74,
                ..shared.clone()
            },
            v1::FlowEvent {
                verdict: "dropped".into(),
                source: end("fd00::7", 40_001, "mole-0"),
                destination: end("fd00::9", 81, "db-0"),
                protocol: 17,
                ingress: side(false, isolated, &["NetworkPolicy shop/db"]),
                reason: "policy_ingress".into(),
                text: "A network policy forbids the receiving pod this connection.".into(),
                ifindex: 8,
                pod: Some(v1::Pod { namespace: "shop".into(), name: "mole-0".into(), uid: "1".into() }),
                length: 62,
                lost: 3,
                ..shared.clone()
            },
            v1::FlowEvent {
                verdict: "dropped".into(),
                source: end("", 0, ""),
                destination: end("", 0, ""),
                reason: "unknown_ethertype".into(),
                source_mac: "02:00:00:00:00:01".into(),
                destination_mac: "02:00:00:00:00:fe".into(),
                ifname: "cali2".into(),
                ..shared
            },
        ]
    }

    #[test]
    fn events_are_one_line_each() {
        let lines: String = events().iter().map(text).collect();
        insta::assert_snapshot!("flows", lines);
        let lines: String = events().iter().map(json).collect();
        assert_eq!(lines.lines().count(), 3);
        insta::assert_snapshot!("flows_json", lines);
    }

    #[test]
    fn filters_are_understood() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            filter: Filter,
        }
        let read = |words: &[&str]| {
            <Line as clap::Parser>::try_parse_from(["flows"].iter().chain(words)).map(|line| line.filter.message())
        };
        let all =
            ["-f", "--pod", "shop/web-0", "--verdict", "dropped", "--policy", "shop/db", "--port", "80", "--last", "5"];
        let expected = v1::WatchFlowsRequest {
            follow: true,
            pod: Some(v1::Pod { namespace: "shop".into(), name: "web-0".into(), uid: String::new() }),
            verdict: "dropped".into(),
            policy: "shop/db".into(),
            port: 80,
            last: 5,
        };
        assert_eq!(read(&all).unwrap(), expected);
        assert_eq!(read(&[]).unwrap(), v1::WatchFlowsRequest::default());
        for bad in [&["--verdict", "denied"][..], &["--pod", "web-0"], &["--port", "70000"]] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
