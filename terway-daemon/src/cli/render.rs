//! Replies of the daemon as text and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};
use terway_proto::v1;

pub(super) fn status_text(status: &v1::StatusResponse) -> String {
    let mut out = String::new();
    let verdict = if status.ready { "ready" } else { "NOT READY" };
    let _ = writeln!(out, "node       {}  terway {}  {verdict}", status.node, status.version);
    for problem in &status.problems {
        let _ = writeln!(out, "problem    {} {} {}", problem.code, problem.cause, problem.detail);
        let _ = writeln!(out, "  remedy   {}", problem.remedy);
    }
    if let Some(pool) = &status.pool {
        let _ = writeln!(
            out,
            "addresses  {} bound, {} idle, {} cooling, {} pending, of {} possible",
            pool.bound, pool.idle, pool.cooling, pool.pending, pool.capacity
        );
    }
    if let Some(datapath) = &status.datapath {
        let _ = writeln!(
            out,
            "datapath   {} endpoints, ABI {}, pods by {}, ENIs by {}",
            datapath.endpoints, datapath.abi_version, datapath.pod_hook, datapath.eni_hook
        );
        let mut drops: Vec<_> = datapath.drops.iter().filter(|(_, n)| **n > 0).collect();
        drops.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        for (reason, packets) in drops {
            let _ = writeln!(out, "  dropped  {packets} packets: {reason}");
        }
    }
    if !status.enis.is_empty() {
        let rows = status.enis.iter().map(|e| {
            let used = format!("{}/{}", e.bound, e.addresses);
            vec![e.id.clone(), e.ifname.clone(), e.mac.clone(), e.vswitch.clone(), e.state.clone(), used]
        });
        out.push('\n');
        out.push_str(&table(&["ENI", "INTERFACE", "MAC", "VSWITCH", "STATE", "BOUND/ADDRESSES"], rows));
    }
    out
}

pub(super) fn status_json(status: &v1::StatusResponse) -> String {
    let pool = status.pool.unwrap_or_default();
    let datapath = status.datapath.clone().unwrap_or_default();
    pretty(&json!({
        "ready": status.ready,
        "node": status.node,
        "version": status.version,
        "problems": status.problems.iter().map(|p| json!({
            "code": p.code, "cause": p.cause, "remedy": p.remedy, "detail": p.detail,
        })).collect::<Vec<_>>(),
        "pool": {
            "capacity": pool.capacity, "idle": pool.idle, "bound": pool.bound, "cooling": pool.cooling, "pending": pool.pending,
        },
        "enis": status.enis.iter().map(|e| json!({
            "id": e.id, "mac": e.mac, "vswitch": e.vswitch, "state": e.state, "interface": e.ifname,
            "addresses": e.addresses, "bound": e.bound,
        })).collect::<Vec<_>>(),
        "datapath": {
            "podHook": datapath.pod_hook, "eniHook": datapath.eni_hook, "abiVersion": datapath.abi_version,
            "endpoints": datapath.endpoints, "drops": datapath.drops,
        },
    }))
}

pub(super) fn pods_text(pods: &[v1::PodState], wide: bool) -> String {
    let mut head = vec!["POD", "ADDRESSES", "ENI", "INTERFACE", "PHASE"];
    if wide {
        head.extend(["CONTAINER", "IFNAME", "UID"]);
    }
    let rows = pods.iter().map(|p| {
        let (pod, key) = (p.pod.clone().unwrap_or_default(), p.attachment.clone().unwrap_or_default());
        let name = if pod.name.is_empty() { "-".to_owned() } else { format!("{}/{}", pod.namespace, pod.name) };
        let mut row = vec![name, p.addresses.join(","), p.eni.clone(), p.host_ifname.clone(), p.phase.clone()];
        if wide {
            row.extend([key.container_id, key.ifname, pod.uid]);
        }
        row
    });
    table(&head, rows)
}

pub(super) fn pods_json(pods: &[v1::PodState]) -> String {
    let pods: Vec<Value> = pods
        .iter()
        .map(|p| {
            let (pod, key) = (p.pod.clone().unwrap_or_default(), p.attachment.clone().unwrap_or_default());
            json!({
                "namespace": pod.namespace, "name": pod.name, "uid": pod.uid,
                "network": key.network, "containerID": key.container_id, "ifname": key.ifname,
                "addresses": p.addresses, "eni": p.eni, "hostInterface": p.host_ifname, "phase": p.phase,
            })
        })
        .collect();
    pretty(&Value::Array(pods))
}

pub(super) fn drop_text(packet: &v1::DroppedPacket) -> String {
    let clock = packet.at_ms / 1000 % 86_400;
    let time = format!("{:02}:{:02}:{:02}.{:03}", clock / 3600, clock / 60 % 60, clock % 60, packet.at_ms % 1000);
    let end = |address: &str, mac: &str, port: u32| match (address, port) {
        ("", _) => mac.to_owned(),
        (address, 0) => address.to_owned(),
        (address, port) if address.contains(':') => format!("[{address}]:{port}"),
        (address, port) => format!("{address}:{port}"),
    };
    let protocol = match packet.protocol {
        0 => String::new(),
        1 => " ICMP".to_owned(),
        6 => " TCP".to_owned(),
        17 => " UDP".to_owned(),
        58 => " ICMPv6".to_owned(),
        132 => " SCTP".to_owned(),
        other => format!(" protocol {other}"),
    };
    let pod = packet.pod.as_ref().map(|pod| format!(" pod {}/{}", pod.namespace, pod.name)).unwrap_or_default();
    let lost = if packet.lost > 0 { format!(" ({} not shown before)", packet.lost) } else { String::new() };
    format!(
        "{time} {}{protocol} {} -> {} at {} of {}{pod}: {}{lost}\n",
        packet.reason,
        end(&packet.source, &packet.source_mac, packet.source_port),
        end(&packet.destination, &packet.destination_mac, packet.destination_port),
        packet.program,
        if packet.ifname.is_empty() { packet.ifindex.to_string() } else { packet.ifname.clone() },
        packet.text,
    )
}

/// One line, so that a follower can be read line by line.
pub(super) fn drop_json(packet: &v1::DroppedPacket) -> String {
    let pod = packet.pod.as_ref().map(|pod| json!({"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}));
    let value = json!({
        "at_ms": packet.at_ms, "reason": packet.reason, "program": packet.program, "interface": packet.ifname,
        "ifindex": packet.ifindex, "source": packet.source, "destination": packet.destination,
        "protocol": packet.protocol, "sourcePort": packet.source_port, "destinationPort": packet.destination_port,
        "sourceMAC": packet.source_mac, "destinationMAC": packet.destination_mac, "length": packet.length,
        "lost": packet.lost, "pod": pod,
    });
    format!("{value}\n")
}

pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Columns as wide as their widest cell, two spaces between them.
pub(super) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines: Vec<Vec<String>> = vec![head.iter().map(|h| (*h).to_owned()).collect()];
    lines.extend(rows);
    let mut widths = vec![0; head.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_do_not_trail() {
        let text = table(&["A", "LONGER"], [vec!["wide cell".into(), "x".into()]].into_iter());
        assert_eq!(text, "A          LONGER\nwide cell  x\n");
    }

    #[test]
    fn a_drop_is_one_line_with_everything() {
        let packet = v1::DroppedPacket {
            at_ms: 3_723_004,
            reason: "spoofed_source".into(),
            text: "The source is not the pod's.".into(),
            program: "from_pod".into(),
            ifname: "cali1".into(),
            source: "fd00::1".into(),
            destination: "10.0.0.1".into(),
            protocol: 6,
            source_port: 40_000,
            destination_port: 80,
            pod: Some(v1::Pod { namespace: "default".into(), name: "web".into(), uid: String::new() }),
            ..Default::default()
        };
        assert_eq!(
            drop_text(&packet),
            "01:02:03.004 spoofed_source TCP [fd00::1]:40000 -> 10.0.0.1:80 at from_pod of cali1 pod default/web: The source is not the pod's.\n"
        );
        assert_eq!(drop_json(&packet).lines().count(), 1);
    }

    #[test]
    fn a_status_names_problem_and_remedy() {
        let status = v1::StatusResponse {
            problems: vec![v1::ErrorDetail {
                code: "TW0202".into(),
                remedy: "Add a vSwitch.".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = status_text(&status);
        assert!(text.contains("NOT READY") && text.contains("TW0202") && text.contains("Add a vSwitch."), "{text}");
    }
}
