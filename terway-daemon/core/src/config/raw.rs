//! `eni_conf` as it is written: the shape of the JSON document, nothing about its meaning.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Invalid, Warning};
use crate::ident::VSwitchId;

/// The keys this version acts on.
#[derive(Debug, Default)]
pub(super) struct EniConf {
    pub(super) ip_stack: Option<String>,
    pub(super) vswitches: Option<BTreeMap<String, Vec<VSwitchId>>>,
    pub(super) vswitch_selection_policy: Option<String>,
    pub(super) security_group: Option<String>,
    pub(super) security_groups: Option<Vec<String>>,
    pub(super) eni_tags: Option<BTreeMap<String, String>>,
    pub(super) min_pool_size: Option<i64>,
    pub(super) max_pool_size: Option<i64>,
    pub(super) max_eni: Option<i64>,
    pub(super) service_cidr: Option<String>,
    pub(super) host_stack_cidrs: Option<Vec<String>>,
    pub(super) region_id: Option<String>,
    pub(super) access_key: Option<String>,
    pub(super) access_secret: Option<String>,
}

const ACTED_ON: &[&str] = &[
    "access_key",
    "access_secret",
    "eni_tags",
    "host_stack_cidrs",
    "ip_stack",
    "max_eni",
    "max_pool_size",
    "min_pool_size",
    "region_id",
    "security_group",
    "security_groups",
    "service_cidr",
    "version",
    "vswitch_selection_policy",
    "vswitches",
];

/// Keys of the format that have no effect in this version; accepted, so that an existing ConfigMap can be kept as it is.
const NO_EFFECT: &[&str] = &[
    "backoff_override",
    "credential_path",
    "custom_stateful_workload_kinds",
    "disable_device_plugin",
    "enable_eni_trunking",
    "enable_erdma",
    "enable_ip_prefix",
    "enable_patch_pod_ips",
    "eni_cap_ratio",
    "eni_cap_shift",
    "eni_selection_policy",
    "eni_tag_block_list",
    "eni_tag_filter",
    "extra_routes",
    "idle_ip_reclaim_after",
    "idle_ip_reclaim_batch_size",
    "idle_ip_reclaim_interval",
    "idle_ip_reclaim_jitter_factor",
    "ip_pool_sync_period",
    "ip_warm_up_size",
    "ipam_type",
    "ipv4_prefix_count",
    "ipv6_prefix_count",
    "kube_client_burst",
    "kube_client_qps",
    "min_eni",
    "prefix",
    "rate_limit",
    "resource_group_id",
];

/// Keys that the format no longer has, with their successor.
const REMOVED: &[(&str, &str)] = &[
    ("allow_eip_rob", "EIPs moved to ack-extend-network-controller"),
    ("enable_eip_migrate", "EIPs moved to ack-extend-network-controller"),
    ("enable_eip_pool", "EIPs moved to ack-extend-network-controller"),
];

const SECRET: &[&str] = &["access_key", "access_secret"];

pub(super) fn read(text: &str) -> Result<(EniConf, Vec<Warning>), Invalid> {
    let invalid = |reason: String| Invalid { key: "eni_conf".into(), value: format!("{} bytes", text.len()), reason };
    // The parser's message could quote a secret; its position cannot.
    let value: Value = serde_json::from_str(text)
        .map_err(|e| invalid(format!("is not JSON: error at line {}, column {}", e.line(), e.column())))?;
    let Value::Object(mut keys) = value else { return Err(invalid("is not a JSON object".into())) };

    let warnings = keys.keys().filter_map(|key| warn(key)).collect();
    let raw = EniConf {
        ip_stack: take(&mut keys, "ip_stack", "a string")?,
        vswitches: take(&mut keys, "vswitches", "an object of lists of vSwitch ids by zone")?,
        vswitch_selection_policy: take(&mut keys, "vswitch_selection_policy", "a string")?,
        security_group: take(&mut keys, "security_group", "a string")?,
        security_groups: take(&mut keys, "security_groups", "a list of strings")?,
        eni_tags: take(&mut keys, "eni_tags", "an object of strings")?,
        min_pool_size: take(&mut keys, "min_pool_size", "a whole number")?,
        max_pool_size: take(&mut keys, "max_pool_size", "a whole number")?,
        max_eni: take(&mut keys, "max_eni", "a whole number")?,
        service_cidr: take(&mut keys, "service_cidr", "a string of comma-separated CIDRs")?,
        host_stack_cidrs: take(&mut keys, "host_stack_cidrs", "a list of CIDRs")?,
        region_id: take(&mut keys, "region_id", "a string")?,
        access_key: take(&mut keys, "access_key", "a string")?,
        access_secret: take(&mut keys, "access_secret", "a string")?,
    };
    Ok((raw, warnings))
}

fn take<T: DeserializeOwned>(keys: &mut Map<String, Value>, key: &str, shape: &str) -> Result<Option<T>, Invalid> {
    let Some(value) = keys.remove(key) else { return Ok(None) };
    let shown = if SECRET.contains(&key) { "<secret>".into() } else { value.to_string() };
    Option::<T>::deserialize(value).ok().ok_or_else(|| Invalid {
        key: key.into(),
        value: shown,
        reason: format!("must be {shape}"),
    })
}

fn warn(key: &str) -> Option<Warning> {
    let message = if ACTED_ON.contains(&key) {
        return None;
    } else if NO_EFFECT.contains(&key) {
        "has no effect in this version".to_owned()
    } else if let Some((_, successor)) = REMOVED.iter().find(|(removed, _)| *removed == key) {
        format!("was removed: {successor}")
    } else {
        let nearest = ACTED_ON.iter().chain(NO_EFFECT).min_by_key(|known| distance(key, known));
        match nearest {
            Some(known) if distance(key, known) <= 3 => format!("is not a known key; did you mean {known}?"),
            _ => "is not a known key and is ignored".to_owned(),
        }
    };
    Some(Warning { key: key.to_owned(), message })
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let above = *cell;
            left = (diagonal + usize::from(x != *y)).min(above + 1).min(left + 1);
            diagonal = above;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn distances() {
        for (a, b, d) in
            [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("max_pool_sizes", "max_pool_size", 1)]
        {
            assert_eq!(distance(a, b), d, "{a} {b}");
        }
    }
}
