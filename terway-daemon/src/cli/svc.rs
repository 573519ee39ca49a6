//! `terway-cli svc`: what this node serves.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, pretty};

/// `svc list`: a line for each frontend.
pub(super) fn list(reply: &v1::ListServicesResponse, style: Style) -> String {
    if style.is_json() {
        return json(reply);
    }
    let head = ["SERVICE", "PORT", "KIND", "FRONTEND", "BACKENDS", "EXTERNAL", "+ALGORITHM", "+AFFINITY", "+ID"];
    let wide = style.wide();
    let rows = reply.ports.iter().flat_map(move |port| {
        // Ports without an entry of their own are refused; only wide screens have room for that.
        let shown = port.frontends.iter().filter(move |f| f.port != 0 || wide);
        shown.map(move |f| {
            let internal = f.internal.clone().unwrap_or_default();
            vec![
                name(port),
                port.port_name.clone(),
                f.kind.clone(),
                place(port, f),
                verdict(f.internal.as_ref()),
                verdict(f.external.as_ref()),
                internal.algorithm,
                if f.affinity_seconds == 0 { String::new() } else { format!("{}s", f.affinity_seconds) },
                port.id.to_string(),
            ]
        })
    });
    let mut out = style.table(&head, rows);
    out.push_str(&problems(reply));
    if !reply.synced {
        out.push_str("not all is known yet: the source of objects has not told everything\n");
    }
    out
}

/// `svc show`: each frontend with its backends.
pub(super) fn show(reply: &v1::ListServicesResponse, style: Style) -> String {
    if style.is_json() {
        return json(reply);
    }
    let mut out = String::new();
    for port in &reply.ports {
        for frontend in &port.frontends {
            let _ = writeln!(out, "{} {} {}", name(port), frontend.kind, place(port, frontend));
            if !frontend.problem.is_empty() {
                let _ = writeln!(out, "  NOT PROGRAMMED: {}", frontend.problem);
            }
            for (side, choice) in [("internal", &frontend.internal), ("external", &frontend.external)] {
                let choice = choice.clone().unwrap_or_default();
                let _ = writeln!(out, "  {side:<7}  {} {}", choice.verdict, choice.algorithm);
                for b in &choice.backends {
                    let place = if b.local { "this node" } else { "other node" };
                    let at = endpoint(&b.address, b.port);
                    let _ = writeln!(out, "    {at}  {}  {place}  slots {}", b.state, b.slots);
                }
            }
        }
    }
    out.push_str(&problems(reply));
    out
}

/// Map entries that the kernel refused, by owner.
fn problems(reply: &v1::ListServicesResponse) -> String {
    let mut lines = BTreeSet::new();
    for port in &reply.ports {
        lines.extend(port.problems.iter().map(|problem| format!("not programmed: {}: {problem}\n", name(port))));
    }
    lines.into_iter().collect()
}

fn name(port: &v1::ServicePort) -> String {
    let pod = if port.kind == "Pod" { "pod " } else { "" };
    format!("{pod}{}/{}", port.namespace, port.name)
}

fn place(port: &v1::ServicePort, frontend: &v1::ServiceFrontend) -> String {
    if frontend.port == 0 {
        return format!("{} (all other ports)", frontend.address);
    }
    format!("{}/{}", endpoint(&frontend.address, frontend.port), port.protocol)
}

fn endpoint(address: &str, port: u32) -> String {
    match (address.parse::<IpAddr>(), u16::try_from(port)) {
        (Ok(address), Ok(port)) => SocketAddr::new(address, port).to_string(),
        _ => format!("{address} {port}"),
    }
}

fn verdict(choice: Option<&v1::ServiceChoice>) -> String {
    match choice {
        Some(choice) if choice.verdict == "backends" => {
            let ready = choice.backends.iter().filter(|b| b.state == "ready").count();
            format!("{ready}/{}", choice.backends.len())
        }
        Some(choice) => choice.verdict.clone(),
        None => String::new(),
    }
}

fn json(reply: &v1::ListServicesResponse) -> String {
    let ports: Vec<Value> = reply.ports.iter().map(value).collect();
    pretty(&json!({"synced": reply.synced, "ports": ports}))
}

fn value(port: &v1::ServicePort) -> Value {
    let choice = |choice: Option<&v1::ServiceChoice>| {
        let choice = choice.cloned().unwrap_or_default();
        json!({
            "verdict": choice.verdict, "algorithm": choice.algorithm,
            "backends": choice.backends.iter().map(|b| json!({
                "address": b.address, "port": b.port, "state": b.state, "local": b.local, "slots": b.slots,
            })).collect::<Vec<_>>(),
        })
    };
    json!({
        "kind": port.kind, "namespace": port.namespace, "name": port.name, "port": port.port_name,
        "protocol": port.protocol, "id": port.id, "problems": port.problems,
        "frontends": port.frontends.iter().map(|f| json!({
            "address": f.address, "port": f.port, "kind": f.kind, "affinitySeconds": f.affinity_seconds, "problem": f.problem,
            "internal": choice(f.internal.as_ref()), "external": choice(f.external.as_ref()),
        })).collect::<Vec<_>>(),
    })
}
