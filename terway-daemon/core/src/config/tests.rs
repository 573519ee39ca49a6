//! What a configuration means, by example and by property.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn warnings(of: &ConfigDocuments) -> Vec<String> {
    of.check().unwrap().1.iter().map(ToString::to_string).collect()
}

fn with(keys: &Value) -> Value {
    let mut document = json!({"vswitches": {"z": ["vsw-1"]}, "security_group": "sg-1"});
    merge(&mut document, keys.clone());
    document
}

fn config(keys: &Value) -> Config {
    parse(&with(keys).to_string()).unwrap().0
}

fn refused(keys: &Value) -> Vec<InvalidValue> {
    parse(&with(keys).to_string()).unwrap_err()
}

/// A value unlike the default for every key of `eni_conf` that this version acts on.
fn examples() -> Value {
    let mut examples = json!({
        "ip_stack": "dual", "vswitches": {"z": ["vsw-2"]}, "vswitch_selection_policy": "random", "security_group": "sg-2",
        "security_groups": ["sg-3"], "resource_group_id": "rg-1", "eni_tags": {"a": "b"}, "eni_tag_filter": {"c": "d"},
        "eni_tag_block_list": [{"key": "x", "value": "y"}], "eni_selection_policy": "least_ips", "min_eni": 1, "max_eni": 2,
        "eni_cap_ratio": "0.5", "eni_cap_shift": -1, "min_pool_size": 2, "max_pool_size": 9, "ip_warm_up_size": 3,
        "idle_ip_reclaim_after": "30m", "idle_ip_reclaim_interval": "1m", "idle_ip_reclaim_batch_size": 7,
        "idle_ip_reclaim_jitter_factor": "0.2", "ip_pool_sync_period": 60, "enable_ip_prefix": true, "ipv4_prefix_count": 2,
        "ipv6_prefix_count": 1, "service_cidr": "172.16.0.0/16", "host_stack_cidrs": ["169.254.20.10"], "flow_events_one_in": 10,
        "extra_routes": [{"dst": "192.168.0.0/16"}], "region_id": "cn-hangzhou", "access_key": "id", "access_secret": "hush",
        "credential_path": "/var/addon/token-config", "rate_limit": {"DescribeVSwitches": 10},
        "backoff_override": {"eni_ops": {"Duration": "5s"}}, "degradation": "l1", "enable_patch_pod_ips": false,
    });
    let conntrack = json!({
        "bpf_ct_timeout_tcp": "1h", "bpf_ct_timeout_tcp_syn": "20s", "bpf_ct_timeout_tcp_fin": 5, "bpf_ct_timeout_udp": "2m",
        "bpf_ct_timeout_udp_single": "10s", "bpf_ct_timeout_icmp": "5s", "bpf_ct_timeout_any": "10m", "bpf_ct_max_v4": 262_144,
        "bpf_ct_max_v6": 4096, "bpf_map_dynamic_size_ratio": 0.01, "conntrack_gc_interval": "30s",
        "conntrack_gc_max_interval": "5m",
    });
    merge(&mut examples, conntrack);
    examples
}

#[test]
fn documented_defaults() {
    for (key, setting) in config(&json!({})).settings() {
        let shown = setting.to_string();
        match key.default {
            _ if key.name == "vswitches" || key.name == "security_groups" => {}
            // A length of time has several spellings.
            KeyDefault::Literal("120s") => assert_eq!(shown, "2m"),
            KeyDefault::Literal("1" | "0.1") => {
                assert_eq!(setting, Setting::Value(json!(shown.parse::<f64>().unwrap())));
            }
            KeyDefault::Literal("") => assert_eq!(shown, "\"\"", "{}", key.name),
            KeyDefault::Literal(text) => assert_eq!(shown, text, "{}", key.name),
            KeyDefault::Described(_) | KeyDefault::Required => {
                let empty = ["none", "{}", "[]"].contains(&shown.as_str()) || key.name == "eni_tag_block_list";
                assert!(empty, "{} {shown}", key.name);
            }
        }
    }
    assert!(parse(&with(&json!({})).to_string()).unwrap().1.is_empty());
}

#[test]
fn required_keys_of_eni_conf() {
    let required: Vec<_> = KEYS.iter().filter(|key| key.default == KeyDefault::Required).map(|key| key.name).collect();
    assert_eq!(required, ["vswitches", "eni_conf"]);
    assert_eq!(KeyDefault::Required.to_string(), "required");
    let refused = |bad: Vec<InvalidValue>| bad.into_iter().map(|bad| bad.key).collect::<Vec<_>>();
    assert_eq!(parse("{}").map_err(refused), Err(vec!["vswitches".to_owned()]));
    assert_eq!(ConfigDocuments::default().check().map_err(refused), Err(vec!["eni_conf".to_owned()]));
}

#[test]
fn documented_keys_take_effect_as_the_table_says() {
    let base = config(&json!({}));
    let examples = examples();
    for key in KEYS.iter().filter(|key| key.location == KeyLocation::EniConf) {
        if matches!(key.effect, TakesEffect::Never | TakesEffect::Unsupported) {
            continue;
        }
        let mut edit = json!({key.name: examples[key.name]});
        if key.name.starts_with("access_") {
            edit = json!({"access_key": "id", "access_secret": "hush"});
        }
        assert!(!examples[key.name].is_null(), "{} has no example", key.name);
        let name = if key.name == "security_group" { "security_groups" } else { key.name };
        let changed = base.diff(&config(&edit));
        let change = changed.iter().find(|c| c.key == name);
        assert_eq!(change.map(|c| c.effect), Some(key.effect), "{}", key.name);
    }
    assert!(!format!("{:?} {:?}", config(&examples), base.diff(&config(&examples))).contains("hush"));
}

#[test]
fn eni_conf_with_all_keys() {
    let config = config(&examples());
    assert_eq!(config.vswitches_of("z"), ["vsw-2".into()]);
    assert!(config.vswitches_of("other").is_empty());
    assert_eq!(config.security_groups, ["sg-2".into(), "sg-3".into()]);
    assert_eq!(config.reclaim.after, Some(Duration::from_secs(1800)));
    assert_eq!(config.sync_period, Duration::from_secs(60));
    assert_eq!((config.reclaim.batch, config.reclaim.jitter.get()), (7, 0.2));
    assert_eq!(config.eni_cap_ratio.get(), 0.5);
    assert_eq!(config.host_stack_cidrs, ["169.254.20.10/32".parse().unwrap()]);
    assert_eq!(config.eni_tags.get("c").map(String::as_str), Some("d"), "new ENIs must pass the filter");
    assert_eq!(config.eni_tag_block_list.len(), 3);
    assert_eq!(config.access_key.map(|key| key.secret.expose().to_owned()).as_deref(), Some("hush"));
    assert_eq!(config.backoff["eni_ops"].duration, Some(Duration::from_secs(5)));
}

#[test]
fn zero_means_default() {
    let config = config(
        &json!({"idle_ip_reclaim_batch_size": 0, "eni_cap_ratio": 0, "max_eni": 0, "idle_ip_reclaim_after": "0",
        "vswitch_selection_policy": "", "idle_ip_reclaim_interval": "", "min_pool_size": null}),
    );
    assert_eq!(config, self::config(&json!({})));
}

#[test]
fn all_invalid_values_are_reported_at_once() {
    let bad = refused(&json!({
        "ip_stack": "v4", "vswitches": {"z": ["vsw 1"]}, "min_pool_size": 7, "service_cidr": "10.0.0.0/99", "access_secret": "hush",
        "max_eni": -1, "idle_ip_reclaim_after": "5 minutes", "idle_ip_reclaim_jitter_factor": "2", "rate_limit": {"X": 0, "Y": "9"},
        "backoff_override": {"eni_ops": {"Steps": 0, "Duration": "soon"}}, "eni_tags": {"acs:x": "1"}, "credential_path": "token",
        "degradation": "l2", "eni_tag_filter": [], "enable_ip_prefix": "true", "extra_routes": [{"dst": "x"}], "ip_warm_up_size": 1.5,
    }));
    let keys: BTreeSet<&str> = bad.iter().map(|b| b.key.as_str()).collect();
    let expected = [
        "ip_stack",
        "vswitches",
        "min_pool_size",
        "service_cidr",
        "access_key",
        "max_eni",
        "idle_ip_reclaim_after",
        "idle_ip_reclaim_jitter_factor",
        "rate_limit",
        "backoff_override",
        "eni_tags",
        "credential_path",
        "degradation",
        "eni_tag_filter",
        "enable_ip_prefix",
        "extra_routes",
        "ip_warm_up_size",
    ];
    assert_eq!(keys, BTreeSet::from(expected));
    assert_eq!(bad.iter().filter(|b| b.key == "rate_limit").count(), 2);
    assert_eq!(bad.iter().filter(|b| b.key == "backoff_override").count(), 2);
    assert!(bad.iter().any(|b| b.to_string() == r#"ip_stack = "v4": must be one of ipv4, ipv6, dual"#), "{bad:?}");
    assert!(!format!("{bad:?}").contains("hush"));
}

#[test]
fn limits_of_lists_and_numbers() {
    let groups: Vec<String> = (0..11).map(|n| format!("sg-{n}")).collect();
    assert_eq!(refused(&json!({"security_groups": groups}))[0].key, "security_groups");
    let tags: Map<String, Value> = (0..21).map(|n| (format!("t{n}"), json!("v"))).collect();
    assert_eq!(refused(&json!({"eni_tags": tags}))[0].key, "eni_tags");
    assert_eq!(refused(&json!({"eni_tags": {"a": "1"}, "eni_tag_filter": {"a": "2"}}))[0].key, "eni_tag_filter");
    assert_eq!(refused(&json!({"min_eni": 3, "max_eni": 2}))[0].key, "min_eni");
    assert_eq!(refused(&json!({"vswitches": {"z": []}}))[0].key, "vswitches");
    let long = refused(&json!({"ip_stack": "x".repeat(10_000)}));
    assert!(long[0].value.chars().count() < 200);
}

#[test]
fn unknown_removed_misplaced_and_pending_keys_warn() {
    let document = with(&json!({
        "enable_eip_pool": "true", "max_pool_sizes": 3, "enable_erdma": true, "enable_eni_trunking": false, "ipam_type": "crd",
        "disable_network_policy": "true", "colour": 1, "rate_limit": {"DescribeVSwitch": 5}, "vswitches": {"z": ["subnet-1"]},
    }));
    let text = warnings(&ConfigDocuments::of(&document.to_string()));
    for (key, word) in [
        ("enable_eip_pool", "ack-extend-network-controller"),
        ("max_pool_sizes", "did you mean max_pool_size?"),
        ("enable_erdma", "no effect"),
        ("ipam_type", "no effect"),
        ("disable_network_policy", "beside eni_conf"),
        ("colour", "is not a known key and is ignored"),
        ("rate_limit", "DescribeVSwitches"),
        ("vswitches", "vsw-"),
    ] {
        assert!(text.iter().any(|w| w.starts_with(&format!("{key}: ")) && w.contains(word)), "{key}: {text:?}");
    }
    assert!(!text.iter().any(|w| w.contains("trunking")), "what is off anyway deserves no warning: {text:?}");
}

#[test]
fn document_type_errors_do_not_quote_the_document() {
    for bad in ["not json hush", "[\"hush\"]", "\"hush\"", "{\"access_secret\": \"hush\",}", "", "{\"a\":"] {
        let bad = parse(bad).unwrap_err();
        assert_eq!(bad[0].key, "eni_conf");
        assert!(!format!("{bad:?}").contains("hush"), "{bad:?}");
    }
    let bad = refused(&json!({"access_secret": ["hush"], "access_key": {"a": "hush"}}));
    assert!(!format!("{bad:?}").contains("hush"), "{bad:?}");
    assert_eq!(ConfigDocuments::default().check().unwrap_err()[0].key, "eni_conf");
}

#[test]
fn overlay_is_merged_over_cluster_config() {
    let mut documents = ConfigDocuments::of(
        &with(&json!({"vswitches": {"y": ["vsw-9"]}, "max_pool_size": 7, "eni_tags": {"a": "1"}})).to_string(),
    );
    let own = json!({"vswitches": {"z": ["vsw-2", "vsw-3"]}, "max_pool_size": null, "min_pool_size": 3});
    documents.overlay = Some(ConfigMapData::from([
        ("eni_conf".into(), own.to_string()),
        ("in_cluster_loadbalance".into(), "false".into()),
    ]));
    let (config, warnings) = documents.check().unwrap();
    assert_eq!(config.vswitches_of("z"), ["vsw-2".into(), "vsw-3".into()]);
    assert_eq!(config.vswitches_of("y"), ["vsw-9".into()]);
    assert_eq!((config.min_idle, config.max_idle, config.eni_tags.len()), (3, 5, 1));
    assert!(
        config.in_cluster_loadbalance && warnings.iter().any(|w| w.key == "in_cluster_loadbalance"),
        "{warnings:?}"
    );

    documents.overlay = Some(ConfigMapData::from([("eni_conf".into(), r#"{"max_pool_size": -1}"#.into())]));
    assert!(documents.check().unwrap_err()[0].reason.ends_with("own configuration)"));
    documents.overlay = Some(ConfigMapData::from([("eni_conf".into(), "[]".into())]));
    assert!(documents.check().unwrap_err()[0].key.contains("own configuration"));
    documents.overlay = Some(ConfigMapData::new());
    assert_eq!(documents.check().unwrap_err()[0].key, "eni_conf");
}

#[test]
fn config_map_keys_beside_eni_conf() {
    let beside = |pairs: &[(&str, &str)]| {
        let mut documents = ConfigDocuments::of(&with(&json!({})).to_string());
        documents.data.extend(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        documents
    };
    let read = |pairs: &[(&str, &str)]| beside(pairs).check().unwrap().0;
    for (value, enabled) in [("", true), ("0", true), ("false", true), ("true", false), ("1", false), ("yes", false)] {
        assert_eq!(read(&[("disable_network_policy", value)]).policy_enabled, enabled, "{value}");
    }
    for (value, on) in [("true", true), ("true\n", true), ("", false), ("false", false), ("1", false)] {
        assert_eq!(read(&[("in_cluster_loadbalance", value)]).in_cluster_loadbalance, on, "{value}");
    }
    assert!(read(&[]).policy_enabled && read(&[]).in_cluster_loadbalance);

    let conf = r#"{"cniVersion":"0.4.0","name":"terway","type":"terway","eniip_virtual_type":"IPVlan","mtu":1400,"host_stack_cidrs":["169.254.20.10/32"]}"#;
    let list = r#"{"cniVersion":"0.4.0","name":"terway-chainer","plugins":[{"type":"terway","mtu":1300},{"type":"cilium-cni"},{"type":"portmap"}]}"#;
    let config = read(&[("10-terway.conf", conf)]);
    assert_eq!((config.mtu, config.host_stack_cidrs.len()), (Some(1400), 1));
    assert_eq!(read(&[("10-terway.conf", conf), ("10-terway.conflist", list)]).mtu, Some(1300));
    let text = warnings(&beside(&[
        ("10-terway.conflist", list),
        ("felix_relay_service", "x"),
        ("eni_confs", ""),
        ("max_eni", "1"),
    ]));
    for word in ["portmap", "felix_relay_service", "did you mean eni_conf", "belongs into eni_conf"] {
        assert!(text.iter().any(|w| w.contains(word)), "{word}: {text:?}");
    }
    assert!(!text.iter().any(|w| w.contains("cilium")), "{text:?}");
    assert!(warnings(&beside(&[("10-terway.conf", conf)])).iter().any(|w| w.contains("datapathv2")));
    for bad in ["{", "[]", r#"{"plugins":{}}"#, r#"{"type":"terway","mtu":5}"#] {
        assert_eq!(beside(&[("10-terway.conf", bad)]).check().unwrap_err()[0].key, "10-terway.conf", "{bad}");
    }
}

const SECRETS: (&str, &str) = ("LTAI-hidden-id", "hidden/secret+of=cloud");

fn free_of_secrets(shown: &impl fmt::Debug) -> bool {
    let text = format!("{shown:?}");
    !text.contains(SECRETS.0) && !text.contains(SECRETS.1)
}

proptest! {
    #[test]
    fn config_diff_is_empty_only_for_equal_configs(a in arbitrary::eni_conf(None), b in arbitrary::eni_conf(Some(SECRETS))) {
        let (a, b) = (parse(&json!(a).to_string()).unwrap().0, parse(&json!(b).to_string()).unwrap().0);
        prop_assert!(a.diff(&a.clone()).is_empty());
        prop_assert_eq!(a.diff(&b).is_empty(), a == b);
        let there = a.diff(&b);
        prop_assert_eq!(there.len(), b.diff(&a).len());
        let shown: Vec<String> = there.iter().map(ToString::to_string).collect();
        prop_assert!(free_of_secrets(&(shown, there)));
    }

    #[test]
    fn config_diff_separates_keys_that_need_a_restart(a in arbitrary::eni_conf(None), b in arbitrary::eni_conf(None)) {
        let (a, b) = (parse(&json!(a).to_string()).unwrap().0, parse(&json!(b).to_string()).unwrap().0);
        let running = a.effective(&b);
        prop_assert!(a.diff(&running).iter().all(|c| c.effect != TakesEffect::Restart));
        prop_assert!(running.diff(&b).iter().all(|c| c.effect == TakesEffect::Restart));
        let (now, later) = (a.diff(&running).len(), running.diff(&b).len());
        prop_assert_eq!(now + later, a.diff(&b).len());
    }

    #[test]
    fn overlay_with_all_keys_replaces_the_config(a in arbitrary::eni_conf(None), b in arbitrary::eni_conf(None)) {
        let mut patch = b.clone();
        for name in a.keys().filter(|name| !b.contains_key(*name)) {
            patch.insert(name.clone(), Value::Null);
        }
        // Objects merge: their own names have to go too.
        for (name, value) in &a {
            if let (Some(own), Some(Value::Object(wanted))) = (value.as_object(), patch.get_mut(name)) {
                for inner in own.keys() {
                    match wanted.get_mut(inner) {
                        None => { wanted.insert(inner.clone(), Value::Null); }
                        Some(Value::Object(deep)) => {
                            for old in own[inner].as_object().into_iter().flat_map(Map::keys) {
                                deep.entry(old.clone()).or_insert(Value::Null);
                            }
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        let mut documents = ConfigDocuments::of(&json!(a).to_string());
        documents.overlay = Some(ConfigMapData::from([("eni_conf".to_owned(), json!(patch).to_string())]));
        prop_assert_eq!(documents.check().unwrap().0, parse(&json!(b).to_string()).unwrap().0);
    }

    #[test]
    fn mutated_config_shows_no_secret(
        good in arbitrary::eni_conf(Some(SECRETS)),
        edits in proptest::collection::vec((arbitrary::name(), arbitrary::json()), 1..4),
    ) {
        let mut keys = good;
        for (name, value) in edits {
            keys.insert(name, value);
        }
        // The secret in other shapes, and one half of the key alone, are edits too.
        let text = json!(keys).to_string();
        match parse(&text) {
            Ok((config, warnings)) => prop_assert!(free_of_secrets(&(config, warnings))),
            Err(bad) => {
                prop_assert!(!bad.is_empty());
                prop_assert!(free_of_secrets(&bad), "{:?}", bad);
            }
        }
    }

    #[test]
    fn secrets_are_redacted_in_any_shape(shape in arbitrary::json(), at in any::<proptest::sample::Index>(), key in any::<bool>()) {
        let hidden = [json!(SECRETS.1), json!([SECRETS.1, shape]), json!({SECRETS.1: shape, "a": SECRETS.1})];
        let name = if key { "access_key" } else { "access_secret" };
        let (value, bad) = (at.get(&hidden), parse(&with(&json!({name: at.get(&hidden)})).to_string()).unwrap_err());
        prop_assert!(free_of_secrets(&bad), "{} {:?}", value, bad);
    }

    #[test]
    fn invalid_json_shows_no_secret(
        good in arbitrary::eni_conf(Some(SECRETS)), cut in any::<proptest::sample::Index>(), junk in ".{0,6}", whole in ".{0,64}",
    ) {
        let mut text = json!(good).to_string();
        let at = (0..=cut.index(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.replace_range(at.., &junk);
        let mut documents = ConfigDocuments::of(&text);
        for text in [documents.clone(), { documents.data.insert("10-terway.conf".into(), whole.clone()); documents }] {
            let outcome = text.check();
            prop_assert!(free_of_secrets(&text));
            prop_assert!(outcome.is_err() || text.data.len() == 1);
            prop_assert!(free_of_secrets(&outcome));
        }
        let _ = parse(&whole);
    }
}
