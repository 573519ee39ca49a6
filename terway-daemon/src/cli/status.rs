//! `terway-cli status`: one screen.

use std::fmt::Write as _;

use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, error_json, errors_json, pool_json, pretty};

pub(super) fn render(status: &v1::StatusResponse, style: Style) -> String {
    if style.is_json() { json(status) } else { text(status, style) }
}

fn text(status: &v1::StatusResponse, style: Style) -> String {
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
    if let Some(path) = &status.socket_path {
        out.push_str(&socket_path_text(path));
    }
    if let Some(policy) = &status.policy {
        let state = match (policy.complete, policy.enforced) {
            (false, _) => "waiting for objects",
            (true, true) => "enforced",
            (true, false) => "switched off",
        };
        let held =
            if policy.held.is_empty() { String::new() } else { format!(", {} pods held back", policy.held.len()) };
        let _ = writeln!(
            out,
            "policy     {state}: {} policies, {} pods in the cluster, {} here{held}",
            policy.policies, policy.pods, policy.endpoints
        );
    }
    if let Some(configuration) = &status.configuration {
        out.push_str(&configuration_text(configuration));
    }
    if !status.enis.is_empty() {
        let rows = status.enis.iter().map(|e| {
            let used = format!("{}/{}", e.bound, e.addresses);
            vec![e.id.clone(), e.ifname.clone(), e.mac.clone(), e.vswitch.clone(), e.state.clone(), used]
        });
        out.push('\n');
        out.push_str(&style.table(&["ENI", "INTERFACE", "MAC", "VSWITCH", "STATE", "BOUND/ADDRESSES"], rows));
    }
    out
}

fn socket_path_text(path: &v1::SocketPath) -> String {
    let mut out = if path.cgroup.is_empty() {
        "sockets    not attached".to_owned()
    } else {
        format!("sockets    {} programs on {}, {} sockets ended", path.programs, path.cgroup, path.ended)
    };
    if !path.reason.is_empty() {
        let _ = write!(out, ": {}", path.reason);
    }
    out.push('\n');
    out
}

fn configuration_text(configuration: &v1::Configuration) -> String {
    let mut out = String::new();
    let refused = if configuration.failure.is_some() { "; the files as they are now are refused" } else { "" };
    let _ = writeln!(out, "config     generation {}{refused}", configuration.generation);
    for warning in &configuration.warnings {
        let _ = writeln!(out, "  warning  {warning}");
    }
    for change in &configuration.pending_restart {
        let _ = writeln!(out, "  restart  {}: {} becomes {} with the next start", change.key, change.old, change.new);
    }
    out
}

fn configuration_json(configuration: Option<&v1::Configuration>) -> Value {
    let Some(c) = configuration else { return Value::Null };
    let changes = |all: &[v1::ConfigChange]| -> Value {
        all.iter().map(|c| json!({"key": c.key, "old": c.old, "new": c.new, "effect": c.effect})).collect()
    };
    json!({
        "generation": c.generation, "appliedAt": c.applied_at, "failure": error_json(c.failure.as_ref()),
        "warnings": c.warnings, "pendingRestart": changes(&c.pending_restart), "lastEdit": changes(&c.last_edit),
    })
}

fn json(status: &v1::StatusResponse) -> String {
    let datapath = status.datapath.clone().unwrap_or_default();
    pretty(&json!({
        "ready": status.ready,
        "node": status.node,
        "version": status.version,
        "problems": errors_json(&status.problems),
        "pool": pool_json(status.pool.as_ref()),
        "configuration": configuration_json(status.configuration.as_ref()),
        "socketPath": status.socket_path.as_ref().map(|path| json!({
            "cgroup": path.cgroup, "programs": path.programs, "reason": path.reason, "ended": path.ended,
        })),
        "enis": status.enis.iter().map(|e| json!({
            "id": e.id, "mac": e.mac, "vswitch": e.vswitch, "state": e.state, "interface": e.ifname,
            "addresses": e.addresses, "bound": e.bound,
        })).collect::<Vec<_>>(),
        "datapath": {
            "podHook": datapath.pod_hook, "eniHook": datapath.eni_hook, "abiVersion": datapath.abi_version,
            "endpoints": datapath.endpoints, "drops": datapath.drops,
        },
        "policy": status.policy.as_ref().map(|p| json!({
            "enforced": p.enforced, "complete": p.complete, "policies": p.policies, "pods": p.pods,
            "endpoints": p.endpoints, "identities": p.identities, "held": p.held,
        })),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::sample;

    #[test]
    fn a_sick_node() {
        insta::assert_snapshot!("status", sample::all(|style| super::render(&sample::status(), style)));
    }
}
