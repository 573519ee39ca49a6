//! Raw to checked: what only several keys together, or the API's own limits, can tell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::documents::ConfigMapExtras;
use super::keys::{self, Key, closest};
use super::raw::Reader;
use super::units::{Ratio, parse_period};
use super::{AccessKey, BackoffOverride, Config, Conntrack, Prefixes, Reclaim, Secret, Tag};
use crate::cidr::{self, Cidr};
use crate::ident::{IpStack, SecurityGroupId, VSwitchId};
use crate::ipam::{ALWAYS_BLOCKED, Degradation, EniSelection, VSwitchSelection};

/// ECS API reference, CreateNetworkInterface: an ENI joins at most 10 security groups (5 by default quota).
const MAX_SECURITY_GROUPS: usize = 10;
/// ECS API reference, CreateNetworkInterface: `Tag.N`, N from 1 to 20, keys and values up to 128 characters.
const MAX_TAGS: usize = 20;
const MAX_TAG_CHARS: usize = 128;

/// Actions of `rate_limit` that are called here; the format also has others (EFLO), which are harmless.
const ACTIONS: &[&str] = &[
    "",
    "AssignIpv6Addresses",
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "DeleteNetworkInterface",
    "DescribeInstanceTypes",
    "DescribeNetworkInterfaceAttribute",
    "DescribeNetworkInterfaces",
    "DescribeVSwitches",
    "DetachNetworkInterface",
    "UnassignIpv6Addresses",
    "UnassignPrivateIpAddresses",
];
const MAX_RATE: i64 = 100_000;

/// Operations of `backoff_override` that change addresses or ENIs; the first of them that is given sets the pool's waiting times.
pub const POOL_OPERATIONS: [&str; 5] = ["eni_ip_ops", "eni_ops", "eni_create", "eni_release", ""];

/// Operations of `backoff_override` in the format.
const OPERATIONS: &[&str] = &[
    "",
    "eni_create",
    "eni_delete_confirm",
    "eni_ip_ops",
    "eni_ops",
    "eni_release",
    "meta_assign_private_ip",
    "meta_unassign_private_ip",
    "wait_ecs_hdeni_status",
    "wait_ecs_leni_status",
    "wait_eni_ip_removed",
    "wait_eni_status",
    "wait_hdeni_status",
    "wait_leni_status",
    "wait_member_eni_status",
    "wait_networkinterface_status",
    "wait_node_status",
    "wait_podeni_status",
    "wait_sts_token_ready",
];

/// Takes every key out of the document. Refused values stand in the reader afterwards, and the result is then worth nothing.
pub(super) fn check(reader: &mut Reader, extras: ConfigMapExtras) -> Config {
    let ip_stack = reader.choice(keys::IP_STACK, [IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual]);
    let orders = [VSwitchSelection::Ordered, VSwitchSelection::Most, VSwitchSelection::Random];
    let (min_idle, max_idle) = watermarks(reader);
    let (min_eni, max_eni) = eni_bounds(reader);
    let (eni_tags, eni_tag_filter) = tags(reader);
    let cap_ratio = reader.ratio(keys::ENI_CAP_RATIO);
    let _note = reader.text(keys::VERSION);
    let config = Config {
        ip_stack,
        vswitches: vswitches(reader),
        vswitch_order: reader.choice(keys::VSWITCH_SELECTION_POLICY, orders),
        security_groups: security_groups(reader),
        resource_group: reader.text(keys::RESOURCE_GROUP_ID),
        eni_tags,
        eni_tag_filter,
        eni_tag_block_list: block_list(reader),
        eni_selection: reader.choice(keys::ENI_SELECTION_POLICY, [EniSelection::MostIps, EniSelection::LeastIps]),
        min_eni,
        max_eni,
        eni_cap_ratio: if cap_ratio.get() > 0.0 { cap_ratio } else { Ratio::ONE },
        eni_cap_shift: reader.whole(keys::ENI_CAP_SHIFT).and_then(|n| i32::try_from(n).ok()).unwrap_or_default(),
        min_idle,
        max_idle,
        warm_up: reader.count(keys::IP_WARM_UP_SIZE),
        reclaim: reclaim(reader),
        sync_period: reader.period(keys::IP_POOL_SYNC_PERIOD).unwrap_or_default(),
        prefixes: prefixes(reader, ip_stack),
        service_cidrs: service_cidrs(reader, ip_stack),
        host_stack_cidrs: host_stack_cidrs(reader, &extras.host_stack_cidrs),
        extra_routes: extra_routes(reader),
        mtu: extras.mtu,
        region: reader.text(keys::REGION_ID),
        access_key: access_key(reader),
        credential_path: credential_path(reader),
        rate_limits: rate_limits(reader),
        backoff: backoff(reader),
        conntrack: Conntrack::read(reader),
        degradation: reader.choice(keys::DEGRADATION, [Degradation::None, Degradation::L0, Degradation::L1]),
        policy_enabled: extras.policy_enabled,
        flow_events_one_in: reader.count(keys::FLOW_EVENTS_ONE_IN),
        patch_pod_ips: reader.flag(keys::ENABLE_PATCH_POD_IPS),
        in_cluster_loadbalance: extras.in_cluster_loadbalance,
    };
    reader.rest();
    config
}

fn watermarks(reader: &mut Reader) -> (u32, u32) {
    let (min, max) = (reader.count(keys::MIN_POOL_SIZE), reader.count(keys::MAX_POOL_SIZE));
    if min > max {
        reader.refuse(keys::MIN_POOL_SIZE, &min.into(), format!("must not be above max_pool_size, which is {max}"));
    }
    (min, max)
}

fn eni_bounds(reader: &mut Reader) -> (u32, Option<u32>) {
    let (min, max) = (reader.count(keys::MIN_ENI), reader.count(keys::MAX_ENI));
    let max = (max > 0).then_some(max);
    if let Some(max) = max.filter(|max| min > *max) {
        reader.refuse(keys::MIN_ENI, &min.into(), format!("must not be above max_eni, which is {max}"));
    }
    (min, max)
}

fn vswitches(reader: &mut Reader) -> BTreeMap<String, Vec<VSwitchId>> {
    let Some(value) = reader.take(keys::VSWITCHES) else {
        reader.refuse(keys::VSWITCHES, &Value::Null, format!("must be {} and have one at least", keys::VSWITCHES.kind));
        return BTreeMap::new();
    };
    let Ok(by_zone) = BTreeMap::<String, Vec<String>>::deserialize(&value) else {
        reader.refuse(keys::VSWITCHES, &value, format!("must be {}", keys::VSWITCHES.kind));
        return BTreeMap::new();
    };
    if by_zone.values().all(Vec::is_empty) {
        reader.refuse(keys::VSWITCHES, &value, "needs one vSwitch at least");
    }
    let mut checked = BTreeMap::new();
    for (zone, ids) in by_zone {
        let mut list: Vec<VSwitchId> = Vec::new();
        for id in ids {
            if !is_id(&id) {
                reader.refuse(keys::VSWITCHES, &Value::String(id), format!("is no vSwitch id (zone {zone})"));
                continue;
            }
            if !id.starts_with("vsw-") {
                reader.warn(
                    keys::VSWITCHES.name,
                    format!("{id} does not look like a vSwitch id, which begins with vsw-"),
                );
            }
            let id = VSwitchId::new(id);
            if !list.contains(&id) {
                list.push(id);
            }
        }
        checked.insert(zone, list);
    }
    checked
}

/// Letters, digits and dashes, as every id of the cloud.
fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn security_groups(reader: &mut Reader) -> Vec<SecurityGroupId> {
    let one = reader.text(keys::SECURITY_GROUP);
    let many: Vec<String> = reader.many(keys::SECURITY_GROUPS);
    let mut groups: Vec<SecurityGroupId> = Vec::new();
    for (key, id) in one
        .map(|id| (keys::SECURITY_GROUP, id))
        .into_iter()
        .chain(many.into_iter().map(|id| (keys::SECURITY_GROUPS, id)))
    {
        if id.is_empty() {
            continue;
        }
        if !is_id(&id) {
            reader.refuse(key, &Value::String(id), "is no security group id");
            continue;
        }
        let id = SecurityGroupId::new(id);
        if !groups.contains(&id) {
            groups.push(id);
        }
    }
    if groups.len() > MAX_SECURITY_GROUPS {
        let reason = format!("an ENI joins at most {MAX_SECURITY_GROUPS} security groups");
        reader.refuse(keys::SECURITY_GROUPS, &groups.len().into(), reason);
    }
    if groups.is_empty() {
        reader.warn(keys::SECURITY_GROUPS.name, "is empty: the cloud makes no ENI without a security group");
    }
    groups
}

/// Tags of new ENIs and the tags an ENI must have; the former include the latter, or new ENIs would not be used.
fn tags(reader: &mut Reader) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let mut tags: BTreeMap<String, String> = reader.many(keys::ENI_TAGS);
    let mut filter: BTreeMap<String, String> = reader.many(keys::ENI_TAG_FILTER);
    filter.remove("");
    for (key, own) in [(keys::ENI_TAGS, &tags), (keys::ENI_TAG_FILTER, &filter)] {
        let mut bad = Vec::new();
        for (name, value) in own {
            // ECS API reference, CreateNetworkInterface, `Tag.N.Key` and `Tag.N.Value`.
            let url = |text: &str| text.contains("http://") || text.contains("https://");
            let reserved = name.starts_with("aliyun") || name.starts_with("acs:");
            let long = name.chars().count() > MAX_TAG_CHARS || value.chars().count() > MAX_TAG_CHARS;
            if name.is_empty() || reserved || long || url(name) || url(value) {
                bad.push(format!("{name}={value}"));
            }
        }
        for tag in bad {
            let reason = "a tag has a name and at most 128 characters, does not begin with aliyun or acs: and holds no http:// or https://";
            reader.refuse(key, &Value::String(tag), reason);
        }
    }
    for (name, value) in &filter {
        match tags.get(name) {
            Some(other) if other != value => {
                let reason = format!("differs from {name} of eni_tags: new ENIs would not pass the filter");
                reader.refuse(keys::ENI_TAG_FILTER, &Value::String(format!("{name}={value}")), reason);
            }
            _ => {
                tags.insert(name.clone(), value.clone());
            }
        }
    }
    if tags.len() > MAX_TAGS {
        reader.refuse(keys::ENI_TAGS, &tags.len().into(), format!("an ENI has at most {MAX_TAGS} tags"));
    }
    (tags, filter)
}

#[derive(Deserialize)]
struct RawTag {
    #[serde(default)]
    key: String,
    #[serde(default)]
    value: String,
}

fn block_list(reader: &mut Reader) -> Vec<Tag> {
    let listed: Vec<RawTag> = reader.many(keys::ENI_TAG_BLOCK_LIST);
    let built_in = ALWAYS_BLOCKED.iter().map(|(key, value)| Tag { key: (*key).into(), value: (*value).into() });
    let listed = listed.into_iter().filter(|tag| !tag.key.is_empty()).map(|tag| Tag { key: tag.key, value: tag.value });
    built_in.chain(listed).collect::<BTreeSet<Tag>>().into_iter().collect()
}

fn reclaim(reader: &mut Reader) -> Reclaim {
    Reclaim {
        after: reader.period(keys::IDLE_IP_RECLAIM_AFTER).filter(|after| !after.is_zero()),
        interval: reader.period(keys::IDLE_IP_RECLAIM_INTERVAL).unwrap_or_default(),
        batch: match reader.count(keys::IDLE_IP_RECLAIM_BATCH_SIZE) {
            // A number that nobody wrote is 0 in the format.
            0 => 5,
            batch => batch,
        },
        jitter: reader.ratio(keys::IDLE_IP_RECLAIM_JITTER_FACTOR),
    }
}

fn prefixes(reader: &mut Reader, stack: IpStack) -> Prefixes {
    let prefixes = Prefixes {
        enabled: reader.flag(keys::ENABLE_IP_PREFIX),
        v4_count: reader.count(keys::IPV4_PREFIX_COUNT),
        v6_count: reader.count(keys::IPV6_PREFIX_COUNT),
    };
    for (key, count, family) in [
        (keys::IPV4_PREFIX_COUNT, prefixes.v4_count, stack.v4()),
        (keys::IPV6_PREFIX_COUNT, prefixes.v6_count, stack.v6()),
    ] {
        if count > 0 && !prefixes.enabled {
            reader.warn(key.name, "has no effect without enable_ip_prefix");
        } else if count > 0 && !family {
            reader.warn(key.name, "has no effect: ip_stack does not have this family");
        }
    }
    prefixes
}

fn block(reader: &mut Reader, key: &Key, text: &str) -> Option<IpNetwork> {
    // A bare address is what people write for a single host.
    let net =
        cidr::parse::<IpNetwork>(text).ok().or_else(|| Some(IpNetwork::from(text.parse::<std::net::IpAddr>().ok()?)));
    if net.is_none() {
        reader.refuse(key, &text.into(), "is not a CIDR such as 172.16.0.0/16");
    }
    net.map(|net| net.truncated())
}

fn service_cidrs(reader: &mut Reader, stack: IpStack) -> Vec<IpNetwork> {
    let text = reader.text(keys::SERVICE_CIDR).unwrap_or_default();
    let mut nets: Vec<IpNetwork> = Vec::new();
    for text in text.split(',').map(str::trim).filter(|t| !t.is_empty()) {
        let Some(net) = block(reader, keys::SERVICE_CIDR, text) else { continue };
        if !(if net.ip().is_ipv4() { stack.v4() } else { stack.v6() }) {
            reader.warn(keys::SERVICE_CIDR.name, format!("{net} is of a family that ip_stack does not have"));
        }
        if !nets.contains(&net) {
            nets.push(net);
        }
    }
    nets
}

fn host_stack_cidrs(reader: &mut Reader, extras: &[IpNetwork]) -> Vec<IpNetwork> {
    let listed: Vec<String> = reader.many(keys::HOST_STACK_CIDRS);
    let listed: Vec<IpNetwork> =
        listed.iter().filter_map(|text| block(reader, keys::HOST_STACK_CIDRS, text.trim())).collect();
    let all: BTreeSet<IpNetwork> = listed.into_iter().chain(extras.iter().map(Cidr::truncated)).collect();
    all.into_iter().collect()
}

#[derive(Deserialize)]
struct RawRoute {
    dst: String,
}

fn extra_routes(reader: &mut Reader) -> Vec<IpNetwork> {
    let listed: Vec<RawRoute> = reader.many(keys::EXTRA_ROUTES);
    let listed: BTreeSet<IpNetwork> =
        listed.iter().filter_map(|route| block(reader, keys::EXTRA_ROUTES, route.dst.trim())).collect();
    listed.into_iter().collect()
}

fn access_key(reader: &mut Reader) -> Option<AccessKey> {
    match (reader.text(keys::ACCESS_KEY), reader.text(keys::ACCESS_SECRET)) {
        (None, None) => None,
        (Some(id), Some(secret)) => Some(AccessKey { id: Secret::new(id), secret: Secret::new(secret) }),
        (Some(_), None) => {
            reader.refuse(keys::ACCESS_SECRET, &Value::Null, "is missing although access_key is set");
            None
        }
        (None, Some(_)) => {
            reader.refuse(keys::ACCESS_KEY, &Value::Null, "is missing although access_secret is set");
            None
        }
    }
}

fn credential_path(reader: &mut Reader) -> Option<String> {
    let path = reader.text(keys::CREDENTIAL_PATH)?;
    if !path.starts_with('/') || path.contains('\0') {
        reader.refuse(keys::CREDENTIAL_PATH, &Value::String(path), "must be an absolute path");
        return None;
    }
    Some(path)
}

fn rate_limits(reader: &mut Reader) -> BTreeMap<String, u32> {
    let Some(value) = reader.take(keys::RATE_LIMIT) else { return BTreeMap::new() };
    let Value::Object(limits) = &value else {
        reader.refuse(keys::RATE_LIMIT, &value, format!("must be {}", keys::RATE_LIMIT.kind));
        return BTreeMap::new();
    };
    let mut checked = BTreeMap::new();
    for (action, limit) in limits {
        match limit.as_i64().filter(|n| (1..=MAX_RATE).contains(n)).and_then(|n| u32::try_from(n).ok()) {
            Some(limit) => {
                if let Some(hint) = stranger(action, ACTIONS) {
                    reader.warn(keys::RATE_LIMIT.name, format!("no action {action:?} is called here{hint}"));
                }
                checked.insert(action.clone(), limit);
            }
            None => {
                let reason = format!("must be a whole number from 1 to {MAX_RATE} (action {action:?})");
                reader.refuse(keys::RATE_LIMIT, limit, reason);
            }
        }
    }
    checked
}

/// Nothing for a known name, else a hint at the nearest one.
fn stranger(name: &str, known: &[&'static str]) -> Option<String> {
    if known.contains(&name) {
        return None;
    }
    Some(closest(name, known.iter().copied()).map_or_else(String::new, |near| format!("; did you mean {near:?}?")))
}

fn backoff(reader: &mut Reader) -> BTreeMap<String, BackoffOverride> {
    let Some(value) = reader.take(keys::BACKOFF_OVERRIDE) else { return BTreeMap::new() };
    let mut checked = BTreeMap::new();
    let Value::Object(operations) = &value else {
        reader.refuse(keys::BACKOFF_OVERRIDE, &value, format!("must be {}", keys::BACKOFF_OVERRIDE.kind));
        return checked;
    };
    for (operation, times) in operations {
        if let Some(hint) = stranger(operation, OPERATIONS) {
            reader.warn(keys::BACKOFF_OVERRIDE.name, format!("no operation {operation:?} is known{hint}"));
        } else if !POOL_OPERATIONS.contains(&operation.as_str()) {
            let words =
                format!("has no effect on {operation}: this version waits for events there, or for fixed times");
            reader.warn(keys::BACKOFF_OVERRIDE.name, words);
        }
        match times {
            Value::Object(times) => {
                checked.insert(operation.clone(), one_backoff(reader, operation, times));
            }
            other => {
                reader.refuse(keys::BACKOFF_OVERRIDE, other, format!("must be an object (operation {operation:?})"));
            }
        }
    }
    checked
}

fn one_backoff(reader: &mut Reader, operation: &str, times: &Map<String, Value>) -> BackoffOverride {
    // Go reads names of fields without regard to case, and lengths of time as whole nanoseconds.
    let period = |value: &Value| match value {
        Value::String(text) => parse_period(text),
        value => value.as_u64().map(Duration::from_nanos),
    };
    let ratio = |value: &Value| value.as_f64().and_then(Ratio::new);
    let mut checked = BackoffOverride::default();
    for (name, value) in times.iter().filter(|(_, value)| !value.is_null()) {
        let wanted = match name.to_ascii_lowercase().as_str() {
            "initialdelay" => {
                (period(value).map(|p| checked.initial_delay = Some(p)), "a time such as 5s, or whole nanoseconds")
            }
            "duration" => {
                (period(value).map(|p| checked.duration = Some(p)), "a time such as 5s, or whole nanoseconds")
            }
            "cap" => (period(value).map(|p| checked.cap = Some(p)), "a time such as 5s, or whole nanoseconds"),
            "factor" => (
                ratio(value).filter(|r| r.get() >= 1.0).map(|r| checked.factor = Some(r)),
                "a number that is not below 1",
            ),
            "jitter" => (ratio(value).map(|r| checked.jitter = Some(r)), "a number that is not below 0"),
            "steps" => {
                let steps = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
                (steps.map(|n| checked.steps = Some(n)), "a whole number above 0")
            }
            _ => {
                let message = format!(
                    "{name:?} of operation {operation:?} is none of InitialDelay, Duration, Factor, Jitter, Steps, Cap"
                );
                reader.warn(keys::BACKOFF_OVERRIDE.name, message);
                continue;
            }
        };
        if let (None, shape) = wanted {
            let reason = format!("must be {shape} ({name} of operation {operation:?})");
            reader.refuse(keys::BACKOFF_OVERRIDE, value, reason);
        }
    }
    checked
}
