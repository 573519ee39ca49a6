//! `terway-cli drops`: dropped packets, one a line.

use serde_json::json;
use terway_proto::v1;

use super::flows::{protocol, time};

pub(super) fn text(packet: &v1::DroppedPacket) -> String {
    let end = |address: &str, mac: &str, port: u32| match (address, port) {
        ("", _) => mac.to_owned(),
        (address, 0) => address.to_owned(),
        (address, port) if address.contains(':') => format!("[{address}]:{port}"),
        (address, port) => format!("{address}:{port}"),
    };
    let pod = packet.pod.as_ref().map(|pod| format!(" pod {}/{}", pod.namespace, pod.name)).unwrap_or_default();
    let decided = if packet.decided.is_empty() { String::new() } else { format!(" ({})", packet.decided) };
    let lost = if packet.lost > 0 { format!(" ({} not shown before)", packet.lost) } else { String::new() };
    format!(
        "{} {}{} {} -> {} at {} of {}{pod}: {}{decided}{lost}\n",
        time(packet.at_ms),
        packet.reason,
        protocol(packet.protocol),
        end(&packet.source, &packet.source_mac, packet.source_port),
        end(&packet.destination, &packet.destination_mac, packet.destination_port),
        packet.program,
        if packet.ifname.is_empty() { packet.ifindex.to_string() } else { packet.ifname.clone() },
        packet.text,
    )
}

/// One line, so that a follower can be read line by line.
pub(super) fn json(packet: &v1::DroppedPacket) -> String {
    let pod = packet.pod.as_ref().map(|pod| json!({"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}));
    let value = json!({
        "at_ms": packet.at_ms, "reason": packet.reason, "program": packet.program, "interface": packet.ifname,
        "ifindex": packet.ifindex, "source": packet.source, "destination": packet.destination,
        "protocol": packet.protocol, "sourcePort": packet.source_port, "destinationPort": packet.destination_port,
        "sourceMAC": packet.source_mac, "destinationMAC": packet.destination_mac, "length": packet.length,
        "lost": packet.lost, "pod": pod, "policy": packet.policy, "decided": packet.decided,
    });
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

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
            text(&packet),
            "01:02:03.004 spoofed_source TCP [fd00::1]:40000 -> 10.0.0.1:80 at from_pod of cali1 pod default/web: The source is not the pod's.\n"
        );
        assert_eq!(json(&packet).lines().count(), 1);
    }
}
