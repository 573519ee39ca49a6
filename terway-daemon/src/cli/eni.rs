//! `terway-cli eni list`, and the form in which ENIs and vSwitches are shown elsewhere.

use serde_json::{Value, json};
use terway_proto::v1;

use super::table::{Style, error_json, error_line, errors_json, pod_json, pool_json, pretty};

pub(super) fn render(reply: &v1::GetPoolResponse, style: Style) -> String {
    if style.is_json() { pretty(&pool_value(reply)) } else { enis(&reply.enis, style) }
}

/// All ENIs as a table.
pub(super) fn enis(enis: &[v1::Eni], style: Style) -> String {
    let head = [
        "ENI",
        "ROLE",
        "VSWITCH",
        "STATUS",
        "STATE",
        "USED/TOTAL",
        "INTERFACE",
        "REASON",
        "+PREFIXES",
        "+BACKOFF",
        "+MAC",
        "+SECURITY-GROUPS",
        "+TAGS",
        "+ERROR",
    ];
    let rows = enis.iter().map(|eni| {
        let tags: Vec<String> = eni.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
        vec![
            eni.id.clone(),
            eni.role.clone(),
            eni.vswitch.clone(),
            eni.status.clone(),
            eni.state.clone(),
            format!("{}/{}", bound(eni), eni.addresses.len()),
            eni.ifname.clone(),
            eni.reason.clone(),
            eni.prefixes.join(","),
            seconds(eni.backoff_seconds),
            eni.mac.clone(),
            eni.security_groups.join(","),
            tags.join(","),
            eni.error.as_ref().map(error_line).unwrap_or_default(),
        ]
    });
    style.table(&head, rows)
}

/// All vSwitches as a table.
pub(super) fn vswitches(vswitches: &[v1::VSwitch], style: Style) -> String {
    let head = [
        "VSWITCH",
        "ZONE",
        "CIDR",
        "AVAILABLE",
        "ENIS",
        "USED/TOTAL",
        "CONFIGURED",
        "BLOCKED",
        "+BACKOFF",
        "+PREFIXES",
    ];
    let rows = vswitches.iter().map(|v| {
        vec![
            v.id.clone(),
            v.zone.clone(),
            v.cidr.clone(),
            v.available.map(|n| n.to_string()).unwrap_or_default(),
            v.enis.to_string(),
            format!("{}/{}", v.bound, v.addresses),
            if v.configured { "yes" } else { "no" }.to_owned(),
            v.blocked.as_ref().map(error_line).unwrap_or_default(),
            seconds(v.backoff_seconds),
            if v.fragmented { "fragmented" } else { "" }.to_owned(),
        ]
    });
    style.table(&head, rows)
}

/// A back-off in seconds; empty if there is none.
fn seconds(seconds: u32) -> String {
    if seconds == 0 { String::new() } else { format!("{seconds}s") }
}

/// Addresses of the ENI that pods have.
pub(super) fn bound(eni: &v1::Eni) -> usize {
    eni.addresses.iter().filter(|address| address.state == "bound").count()
}

pub(super) fn pool_value(reply: &v1::GetPoolResponse) -> Value {
    json!({
        "pool": pool_json(reply.pool.as_ref()),
        "enis": reply.enis.iter().map(eni_value).collect::<Vec<_>>(),
        "vswitches": reply.vswitches.iter().map(vswitch_value).collect::<Vec<_>>(),
        "problems": errors_json(&reply.problems),
        "cloudError": error_json(reply.cloud_error.as_ref()),
    })
}

pub(super) fn eni_value(eni: &v1::Eni) -> Value {
    json!({
        "id": eni.id, "mac": eni.mac, "vswitch": eni.vswitch, "role": eni.role, "status": eni.status,
        "state": eni.state, "interface": eni.ifname, "securityGroups": eni.security_groups, "tags": eni.tags,
        "used": bound(eni), "total": eni.addresses.len(), "reason": eni.reason,
        "prefixes": eni.prefixes, "backoffSeconds": eni.backoff_seconds,
        "addresses": eni.addresses.iter().map(address_value).collect::<Vec<_>>(),
        "error": error_json(eni.error.as_ref()),
    })
}

pub(super) fn address_value(address: &v1::EniAddress) -> Value {
    json!({"address": address.address, "state": address.state, "pod": pod_json(address.pod.as_ref())})
}

pub(super) fn vswitch_value(v: &v1::VSwitch) -> Value {
    json!({
        "id": v.id, "zone": v.zone, "cidr": v.cidr, "available": v.available, "enis": v.enis,
        "addresses": v.addresses, "bound": v.bound, "blocked": error_json(v.blocked.as_ref()),
        "configured": v.configured, "backoffSeconds": v.backoff_seconds, "fragmented": v.fragmented,
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample;

    #[test]
    fn enis_of_every_role() {
        insta::assert_snapshot!("eni_list", sample::all(|style| super::render(&sample::pool(), style)));
    }
}
