//! `terway-cli status`: one screen.

use std::fmt::Write as _;

use serde_json::json;
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
    if let Some(config) = &status.config {
        let _ = writeln!(
            out,
            "config     generation {}{}",
            config.generation,
            if config.failure.is_some() { ", the latest edit is refused" } else { "" }
        );
        for note in config.pending.iter().chain(&config.warnings) {
            let _ = writeln!(out, "  note     {} {}", note.code, note.detail);
        }
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

fn json(status: &v1::StatusResponse) -> String {
    let datapath = status.datapath.clone().unwrap_or_default();
    let config = status.config.clone().unwrap_or_default();
    pretty(&json!({
        "ready": status.ready,
        "node": status.node,
        "version": status.version,
        "problems": errors_json(&status.problems),
        "pool": pool_json(status.pool.as_ref()),
        "enis": status.enis.iter().map(|e| json!({
            "id": e.id, "mac": e.mac, "vswitch": e.vswitch, "state": e.state, "interface": e.ifname,
            "addresses": e.addresses, "bound": e.bound,
        })).collect::<Vec<_>>(),
        "datapath": {
            "podHook": datapath.pod_hook, "eniHook": datapath.eni_hook, "abiVersion": datapath.abi_version,
            "endpoints": datapath.endpoints, "drops": datapath.drops,
        },
        "config": {
            "generation": config.generation, "appliedMs": config.applied_ms,
            "failure": error_json(config.failure.as_ref()), "pending": error_json(config.pending.as_ref()),
            "warnings": errors_json(&config.warnings),
        },
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
