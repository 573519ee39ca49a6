//! Generators of the property tests: any JSON, and documents that are right.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Any JSON document, a few levels deep.
pub(super) fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9_.,:/-]{0,8}|.{0,8}".prop_map(Value::from),
        // What several keys take.
        prop_oneof![Just("10m"), Just("0.1"), Just("ipv4"), Just("10.0.0.0/8"), Just("vsw-1"), Just("")]
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let name = "[a-c]|[a-z_]{0,6}";
        prop_oneof![vec(inner.clone(), 0..4).prop_map(Value::from), btree_map(name, inner, 0..4).prop_map(|m| json!(m))]
    })
}

fn one_of(words: &'static [&'static str]) -> BoxedStrategy<Value> {
    proptest::sample::select(words).prop_map(Value::from).boxed()
}

fn period() -> BoxedStrategy<Value> {
    prop_oneof![(1..600u32).prop_map(|s| json!(format!("{s}s"))), (1..600u32).prop_map(Value::from)].boxed()
}

fn cidr() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..200u8, 8..=32u8).prop_map(|(a, len)| format!("10.{a}.0.0/{len}")),
        (0..200u8, 48..=128u8).prop_map(|(a, len)| format!("fd00:{a}::/{len}")),
    ]
}

fn tags() -> BoxedStrategy<Value> {
    btree_map("[b-d]{1,2}", "[a-z]{0,2}", 0..3).prop_map(|m| json!(m)).boxed()
}

/// A right value for each key that this version acts on.
fn values() -> Vec<(&'static str, BoxedStrategy<Value>)> {
    let flag = || any::<bool>().prop_map(Value::from).boxed();
    let upto = |most: u32| (0..=most).prop_map(Value::from).boxed();
    let cidrs = || vec(cidr(), 0..3);
    let waits = btree_map(
        proptest::sample::select(&["InitialDelay", "Duration", "Cap", "factor", "Steps", "jitter"][..]),
        (1..5u32).prop_map(Value::from),
        0..4,
    );
    vec![
        ("ip_stack", one_of(&["ipv4", "ipv6", "dual"])),
        ("vswitch_selection_policy", one_of(&["ordered", "most", "random", ""])),
        ("security_group", one_of(&["sg-1", "sg-2", ""])),
        ("security_groups", vec("sg-[1-4]", 0..4).prop_map(|v| json!(v)).boxed()),
        ("resource_group_id", one_of(&["", "rg-1"])),
        ("eni_tags", btree_map("[e-h]{1,2}", "[a-z]{0,2}", 0..3).prop_map(|m| json!(m)).boxed()),
        ("eni_tag_filter", tags()),
        (
            "eni_tag_block_list",
            vec(("[a-c]?", "[a-c]?"), 0..3)
                .prop_map(|v| v.into_iter().map(|(k, v)| json!({"key": k, "value": v})).collect::<Value>())
                .boxed(),
        ),
        ("eni_selection_policy", one_of(&["most_ips", "least_ips"])),
        ("min_eni", upto(3)),
        ("max_eni", prop_oneof![Just(0u32), 3..6u32].prop_map(Value::from).boxed()),
        ("eni_cap_ratio", (0..40u32).prop_map(|n| json!(f64::from(n) / 10.0)).boxed()),
        ("eni_cap_shift", (-9..9i32).prop_map(Value::from).boxed()),
        ("min_pool_size", upto(5)),
        ("max_pool_size", (5..9u32).prop_map(Value::from).boxed()),
        ("ip_warm_up_size", upto(5)),
        ("idle_ip_reclaim_after", prop_oneof![period(), Just(json!("0")), Just(Value::Null)].boxed()),
        ("idle_ip_reclaim_interval", period()),
        ("idle_ip_reclaim_batch_size", upto(9)),
        ("idle_ip_reclaim_jitter_factor", prop_oneof![Just(json!("0.25")), Just(json!(0.5)), Just(json!(1))].boxed()),
        ("ip_pool_sync_period", period()),
        ("enable_ip_prefix", flag()),
        ("ipv4_prefix_count", upto(4)),
        ("ipv6_prefix_count", upto(1)),
        ("service_cidr", cidrs().prop_map(|v| json!(v.join(", "))).boxed()),
        ("host_stack_cidrs", cidrs().prop_map(|v| json!(v)).boxed()),
        ("extra_routes", cidrs().prop_map(|v| v.into_iter().map(|c| json!({"dst": c})).collect::<Value>()).boxed()),
        ("region_id", one_of(&["", "cn-hangzhou"])),
        ("credential_path", one_of(&["", "/var/addon/token-config"])),
        (
            "rate_limit",
            btree_map(
                one_of(&["", "DescribeVSwitches", "Other"]).prop_map(|v| v.as_str().unwrap_or_default().to_owned()),
                1..9u32,
                0..3,
            )
            .prop_map(|m| json!(m))
            .boxed(),
        ),
        (
            "backoff_override",
            btree_map("eni_ops|eni_create", waits.prop_map(|m| json!(m)), 0..3).prop_map(|m| json!(m)).boxed(),
        ),
        ("bpf_ct_timeout_tcp", period()),
        ("bpf_ct_timeout_tcp_syn", period()),
        ("bpf_ct_timeout_tcp_fin", period()),
        ("bpf_ct_timeout_udp", period()),
        ("bpf_ct_timeout_udp_single", period()),
        ("bpf_ct_timeout_icmp", period()),
        ("bpf_ct_timeout_any", period()),
        ("bpf_ct_max_v4", prop_oneof![Just(0u32), 1024..9000u32].prop_map(Value::from).boxed()),
        ("bpf_ct_max_v6", prop_oneof![Just(0u32), 1024..9000u32].prop_map(Value::from).boxed()),
        ("bpf_map_dynamic_size_ratio", prop_oneof![Just(json!("0.01")), Just(json!(0.25))].boxed()),
        ("conntrack_gc_interval", prop_oneof![period(), Just(json!("0s"))].boxed()),
        ("conntrack_gc_max_interval", (10..600u32).prop_map(|s| json!(format!("{s}s"))).boxed()),
        ("flow_events_one_in", upto(1000)),
        ("enable_patch_pod_ips", any::<bool>().prop_map(Value::from).boxed()),
        ("degradation", one_of(&["", "l0", "l1"])),
    ]
}

/// A right `eni_conf` with some of the keys, and an access key made of `secrets`.
pub(super) fn eni_conf(secrets: Option<(&'static str, &'static str)>) -> impl Strategy<Value = Map<String, Value>> {
    let values: Vec<BoxedStrategy<Option<(String, Value)>>> = values()
        .into_iter()
        .map(|(name, value)| {
            prop_oneof![3 => Just(None), 1 => value.prop_map(move |v| Some((name.to_owned(), v)))].boxed()
        })
        .collect();
    let zones = btree_map("z-[a-b]", vec("vsw-[1-3]", 1..4), 1..3);
    (values, zones).prop_map(move |(values, zones)| {
        let mut keys: Map<String, Value> = values.into_iter().flatten().collect();
        keys.insert("vswitches".into(), json!(zones));
        if let Some((id, secret)) = secrets {
            keys.insert("access_key".into(), id.into());
            keys.insert("access_secret".into(), secret.into());
        }
        keys
    })
}

/// The names of the keys above, and a few that nobody knows.
pub(super) fn name() -> impl Strategy<Value = String> {
    let known: Vec<String> = super::KEYS.iter().map(|key| key.name.to_owned()).collect();
    prop_oneof![4 => proptest::sample::select(known), 1 => "[a-z_]{0,12}"]
}
