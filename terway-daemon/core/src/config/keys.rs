//! Every key an administrator can set, with its shape, default, unit and the time it takes effect.
//!
//! This table is the only place that says so: the reader takes shapes, limits and defaults from it, `terway-cli config explain` prints it,
//! and `cargo xtask codegen` makes docs/configuration.md of it.

use std::fmt;
use std::time::Duration;

use super::units::show_period;

/// When a changed value takes effect on a running node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TakesEffect {
    /// At once.
    Now,
    /// For what is made from now on: ENIs, addresses, pods. What is there stays as it is while a pod uses it.
    NewAllocations,
    /// When the daemon starts the next time.
    Restart,
    /// Never: the key is a note to the reader.
    Never,
    /// The key belongs to the format and this version does not act on it.
    Unsupported,
}

impl TakesEffect {
    /// One or two words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::NewAllocations => "new allocations",
            Self::Restart => "restart",
            Self::Never => "no effect",
            Self::Unsupported => "not in this version",
        }
    }
}

impl fmt::Display for TakesEffect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyLocation {
    /// In the JSON document `eni_conf`.
    EniConf,
    /// Beside `eni_conf` in the data of the ConfigMap.
    ConfigMap,
}

/// The shape of a value. Displayed, it completes "must be …".
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A string.
    Text,
    /// A string that is never shown.
    Secret,
    /// True or false.
    Flag,
    /// `"true"` or `"false"` in the data of a ConfigMap, which knows strings only.
    TextFlag,
    /// One of some words.
    OneOf(&'static [&'static str]),
    /// A whole number within limits.
    Whole {
        /// The least.
        least: i64,
        /// The most.
        most: i64,
    },
    /// A number within limits, also as a string.
    Number {
        /// The least.
        least: f64,
        /// The most.
        most: f64,
    },
    /// A length of time in Go's notation, or a number of seconds.
    Period {
        /// The least.
        least: Duration,
        /// The most.
        most: Duration,
    },
    /// CIDRs in one string with commas between them.
    CidrText,
    /// CIDRs in a list.
    CidrList,
    /// Strings in a list.
    Texts,
    /// Strings by name.
    TextMap,
    /// vSwitch ids by zone.
    VSwitches,
    /// Tags as objects in a list.
    Tags,
    /// Routes as objects in a list.
    Routes,
    /// Calls a minute by API action.
    RateLimits,
    /// Waiting times by operation.
    Backoffs,
    /// The JSON document of this page.
    EniConf,
    /// A CNI configuration, or a list of them.
    CniConf,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text | Self::Secret => f.write_str("a string"),
            Self::Flag => f.write_str("true or false, without quotes"),
            Self::TextFlag => f.write_str("\"true\" or \"false\""),
            Self::OneOf(words) => {
                f.write_str("one of")?;
                for (i, word) in words.iter().enumerate() {
                    let word = if word.is_empty() { "\"\"" } else { word };
                    write!(f, "{} {word}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Self::Whole { least, most } => write!(f, "a whole number from {least} to {most}"),
            Self::Number { least, most } => write!(f, "a number from {least} to {most}"),
            Self::Period { least, most } => {
                write!(f, "a time such as 10m or 90s, from {} to {}", show_period(*least), show_period(*most))
            }
            Self::CidrText => {
                f.write_str("a string of CIDRs with commas between them, such as 172.16.0.0/16,fd00::/112")
            }
            Self::CidrList => f.write_str("a list of CIDRs, such as [\"169.254.20.10/32\"]"),
            Self::Texts => f.write_str("a list of strings"),
            Self::TextMap => f.write_str("an object of strings, such as {\"team\": \"a\"}"),
            Self::VSwitches => f.write_str("an object of lists by zone, such as {\"cn-hangzhou-k\": [\"vsw-1\"]}"),
            Self::Tags => f.write_str("a list of tags, such as [{\"key\": \"a\", \"value\": \"b\"}]"),
            Self::Routes => f.write_str("a list of routes, such as [{\"dst\": \"192.168.0.0/16\"}]"),
            Self::RateLimits => {
                f.write_str("an object of whole numbers from 1 to 100000, such as {\"DescribeVSwitches\": 300}")
            }
            Self::Backoffs => {
                f.write_str("an object of objects, such as {\"eni_ip_ops\": {\"Duration\": \"5s\", \"Factor\": 2}}")
            }
            Self::EniConf => f.write_str("a JSON object"),
            Self::CniConf => f.write_str("a CNI configuration in JSON"),
        }
    }
}

/// The default of a key that is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyDefault {
    /// A value, written as in the document.
    Literal(&'static str),
    /// A default that depends on the node or the account, in words.
    Described(&'static str),
    /// None: a configuration without the key is refused.
    Required,
}

impl fmt::Display for KeyDefault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal("") => f.write_str("\"\""),
            Self::Literal(text) | Self::Described(text) => f.write_str(text),
            Self::Required => f.write_str("required"),
        }
    }
}

/// One key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// Where it is written.
    pub location: KeyLocation,
    /// The shape of its value.
    pub kind: Kind,
    /// What holds without it.
    pub default: KeyDefault,
    /// What its numbers count; empty where they count nothing.
    pub unit: &'static str,
    /// When a change takes effect.
    pub effect: TakesEffect,
    /// What it does, in whole sentences.
    pub about: &'static str,
}

macro_rules! keys {
    ($($const:ident = $name:literal, $location:ident, $kind:expr, $default:expr, $unit:literal, $effect:ident, $about:literal;)*) => {
        $(
            pub(super) const $const: &Key = &Key {
                name: $name, location: KeyLocation::$location, kind: $kind, default: $default, unit: $unit, effect: TakesEffect::$effect, about: $about,
            };
        )*
        /// Every key, in the order of the documentation.
        pub const KEYS: &[Key] = &[$(*$const),*];
    };
}

use KeyDefault::{Described, Literal, Required};
use Kind::{
    Backoffs, CidrList, CidrText, CniConf, EniConf, Flag, Number, OneOf, Period, RateLimits, Routes, Secret, Tags,
    Text, TextFlag, TextMap, Texts, VSwitches, Whole,
};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);
/// More ENIs or addresses than any instance type carries.
const MANY: i64 = 10_000;
/// As many flows as Cilium allows in a table (`LimitTableMax`, pkg/option/config.go): 4 GiB of them.
const MOST_FLOWS: i64 = 1 << 24;
/// What the datapath has room for (`terway_abi::CONTROL_SAMPLE_SHIFT`).
const MOST_SAMPLED: i64 = (1 << 24) - 1;

keys! {
    VERSION = "version", EniConf, Text, Described("none"), "", Never,
        "The version of the format, \"1\".";
    IP_STACK = "ip_stack", EniConf, OneOf(&["ipv4", "ipv6", "dual"]), Literal("ipv4"), "", Restart,
        "The families that pods get addresses of. Dual gives each pod one of both.";
    VSWITCHES = "vswitches", EniConf, VSwitches, Required, "", NewAllocations,
        "The vSwitches that pods get addresses from, by zone; a node uses those of its own zone. ENIs in a vSwitch that is no longer listed get no new pods and are given back when they are empty.";
    VSWITCH_SELECTION_POLICY = "vswitch_selection_policy", EniConf, OneOf(&["ordered", "most", "random"]), Literal("ordered"), "", NewAllocations,
        "Which vSwitch a new ENI is made in: the first of the list with free addresses, the one with the most free addresses, or any. (The reference project reads ordered as most; here the word means what it says.)";
    SECURITY_GROUP = "security_group", EniConf, Text, Described("none"), "", NewAllocations,
        "One security group of new ENIs; joined with security_groups.";
    SECURITY_GROUPS = "security_groups", EniConf, Texts, Described("none"), "", NewAllocations,
        "The security groups of new ENIs, 10 at most together with security_group.";
    RESOURCE_GROUP_ID = "resource_group_id", EniConf, Text, Described("the account's default group"), "", NewAllocations,
        "The resource group of new ENIs.";
    ENI_TAGS = "eni_tags", EniConf, TextMap, Described("none"), "", NewAllocations,
        "Tags of new ENIs, 20 at most.";
    ENI_TAG_FILTER = "eni_tag_filter", EniConf, TextMap, Described("every ENI of the instance is used"), "", Now,
        "Only ENIs that have all these tags are used. New ENIs get them too.";
    ENI_TAG_BLOCK_LIST = "eni_tag_block_list", EniConf, Tags, Described("the built-in entries"), "", Now,
        "ENIs that have one of these tags belong to others and are left alone. creator=alibabacloud-erdma-controller and terway.alibabacloud.com/excluded=true are always in the list.";
    ENI_SELECTION_POLICY = "eni_selection_policy", EniConf, OneOf(&["most_ips", "least_ips"]), Literal("most_ips"), "", NewAllocations,
        "Which ENI a new address or pod goes to: the fullest, so that others can be given back, or the emptiest, so that load spreads.";
    MIN_ENI = "min_eni", EniConf, Whole { least: 0, most: MANY }, Literal("0"), "ENIs", Now,
        "ENIs for pods that are kept even when they are empty.";
    MAX_ENI = "max_eni", EniConf, Whole { least: 0, most: MANY }, Described("what the instance type carries"), "ENIs", Now,
        "ENIs for pods at most; 0 leaves it to the instance type. Lowering it takes no ENI from running pods.";
    ENI_CAP_RATIO = "eni_cap_ratio", EniConf, Number { least: 0.0, most: 10.0 }, Literal("1"), "", Now,
        "The number of ENIs the instance type carries is multiplied by this before eni_cap_shift is added; 0 stands for 1. The result never exceeds what the type carries.";
    ENI_CAP_SHIFT = "eni_cap_shift", EniConf, Whole { least: -MANY, most: MANY }, Literal("0"), "ENIs", Now,
        "Added to the number of ENIs the instance type carries; negative to leave adapters to others.";
    MIN_POOL_SIZE = "min_pool_size", EniConf, Whole { least: 0, most: MANY }, Literal("0"), "addresses", Now,
        "Idle addresses that are kept ready. Not above max_pool_size.";
    MAX_POOL_SIZE = "max_pool_size", EniConf, Whole { least: 0, most: MANY }, Literal("5"), "addresses", Now,
        "Idle addresses beyond this go back to the vSwitch.";
    IP_WARM_UP_SIZE = "ip_warm_up_size", EniConf, Whole { least: 0, most: MANY }, Literal("0"), "addresses", Restart,
        "Addresses fetched once when the daemon starts on a node that has none yet, before the first pod asks.";
    IDLE_IP_RECLAIM_AFTER = "idle_ip_reclaim_after", EniConf, Period { least: Duration::ZERO, most: DAY.saturating_mul(30) }, Described("off"), "time", Now,
        "When no address was bound or freed for this long, idle addresses are given back down to min_pool_size. 0 is off.";
    IDLE_IP_RECLAIM_INTERVAL = "idle_ip_reclaim_interval", EniConf, Period { least: SECOND, most: DAY }, Literal("10m"), "time", Now,
        "The pause between two batches that are given back.";
    IDLE_IP_RECLAIM_BATCH_SIZE = "idle_ip_reclaim_batch_size", EniConf, Whole { least: 0, most: 100 }, Literal("5"), "addresses", Now,
        "How many idle addresses are given back at a time; 0 stands for 5.";
    IDLE_IP_RECLAIM_JITTER_FACTOR = "idle_ip_reclaim_jitter_factor", EniConf, Number { least: 0.0, most: 1.0 }, Literal("0.1"), "", Now,
        "The pause is longer by a random part of itself up to this, so that nodes do not call the API in step.";
    IP_POOL_SYNC_PERIOD = "ip_pool_sync_period", EniConf, Period { least: SECOND, most: DAY }, Literal("120s"), "time", Now,
        "How often the pool is compared with the cloud at least.";
    ENABLE_IP_PREFIX = "enable_ip_prefix", EniConf, Flag, Literal("false"), "", NewAllocations,
        "Addresses are fetched as prefixes, 16 IPv4 addresses (a /28) at a time. Where a vSwitch has no whole prefix left, single addresses are. What the node has of the other kind stays in use.";
    IPV4_PREFIX_COUNT = "ipv4_prefix_count", EniConf, Whole { least: 0, most: MANY }, Literal("0"), "prefixes", Now,
        "IPv4 prefixes that the node has at least; 0 lets demand and the watermarks decide. Needs enable_ip_prefix.";
    IPV6_PREFIX_COUNT = "ipv6_prefix_count", EniConf, Whole { least: 0, most: 1 }, Literal("0"), "prefixes", Now,
        "IPv6 prefixes of each ENI on a node with ip_stack ipv6; a dual node has one per ENI by itself. Needs enable_ip_prefix. Accepted for compatibility: with prefixes, an ENI gets its /80 when a pod needs it.";
    SERVICE_CIDR = "service_cidr", EniConf, CidrText, Described("none"), "", Restart,
        "The address ranges of Services. Kept for Services in the datapath, which are to come.";
    HOST_STACK_CIDRS = "host_stack_cidrs", EniConf, CidrList, Described("none"), "", Now,
        "Destinations that pods reach by the node's own network stack rather than by their ENI, such as a node-local DNS cache. Joined with host_stack_cidrs of the CNI configuration.";
    EXTRA_ROUTES = "extra_routes", EniConf, Routes, Described("none"), "", NewAllocations,
        "Further routes of pods by their first interface.";
    REGION_ID = "region_id", EniConf, Text, Described("from the metadata service"), "", Restart,
        "The region whose API is called.";
    ACCESS_KEY = "access_key", EniConf, Secret, Described("the node's RAM role"), "", Now,
        "The id of an access key. Needs access_secret.";
    ACCESS_SECRET = "access_secret", EniConf, Secret, Described("the node's RAM role"), "", Now,
        "The secret of the access key.";
    CREDENTIAL_PATH = "credential_path", EniConf, Text, Described("none"), "", Now,
        "A file with a temporary token that somebody keeps fresh. An access key goes before it, and it before the RAM role.";
    RATE_LIMIT = "rate_limit", EniConf, RateLimits, Described("built-in limits"), "calls a minute", Now,
        "Calls a minute of this node by API action; the empty name stands for every action that is not named. A whole minute's worth may go at once.";
    BACKOFF_OVERRIDE = "backoff_override", EniConf, Backoffs, Described("built-in times"), "time", Now,
        "Waiting times between attempts by operation: InitialDelay, Duration, Factor, Jitter, Steps, Cap. Times are strings such as 5s, or whole nanoseconds.";
    BPF_CT_TIMEOUT_TCP = "bpf_ct_timeout_tcp", EniConf, Period { least: SECOND, most: DAY.saturating_mul(30) }, Literal("2h13m20s"), "time", Now,
        "A TCP connection that has been silent for longer is forgotten, once both ends have been heard.";
    BPF_CT_TIMEOUT_TCP_SYN = "bpf_ct_timeout_tcp_syn", EniConf, Period { least: SECOND, most: DAY }, Literal("1m"), "time", Now,
        "The same for a TCP connection that nobody has answered.";
    BPF_CT_TIMEOUT_TCP_FIN = "bpf_ct_timeout_tcp_fin", EniConf, Period { least: SECOND, most: DAY }, Literal("10s"), "time", Now,
        "The same for a TCP connection that both ends have closed, or one has reset.";
    BPF_CT_TIMEOUT_UDP = "bpf_ct_timeout_udp", EniConf, Period { least: SECOND, most: DAY }, Literal("1m"), "time", Now,
        "The same for UDP, once both ends have been heard.";
    BPF_CT_TIMEOUT_UDP_SINGLE = "bpf_ct_timeout_udp_single", EniConf, Period { least: SECOND, most: DAY }, Literal("30s"), "time", Now,
        "The same for UDP that nobody has answered.";
    BPF_CT_TIMEOUT_ICMP = "bpf_ct_timeout_icmp", EniConf, Period { least: SECOND, most: DAY }, Literal("30s"), "time", Now,
        "The same for ICMP and ICMPv6.";
    BPF_CT_TIMEOUT_ANY = "bpf_ct_timeout_any", EniConf, Period { least: SECOND, most: DAY }, Literal("1m"), "time", Now,
        "The same for every other protocol.";
    BPF_CT_MAX_V4 = "bpf_ct_max_v4", EniConf, Whole { least: 0, most: MOST_FLOWS }, Described("by the node's memory"), "entries", Restart,
        "Size of the IPv4 flow table; 0 leaves it to bpf_map_dynamic_size_ratio. A direct connection takes one entry, one that is translated two. Running connections are carried over into a table of another size.";
    BPF_CT_MAX_V6 = "bpf_ct_max_v6", EniConf, Whole { least: 0, most: MOST_FLOWS }, Described("by the node's memory"), "entries", Restart,
        "Size of the IPv6 flow table, likewise.";
    BPF_MAP_DYNAMIC_SIZE_RATIO = "bpf_map_dynamic_size_ratio", EniConf, Number { least: 0.000_1, most: 0.5 }, Literal("0.0025"), "", Restart,
        "The part of the node's memory that flow tables without a size of their own share; each gets 65536 entries at least and 1048576 at most.";
    CONNTRACK_GC_INTERVAL = "conntrack_gc_interval", EniConf, Period { least: Duration::ZERO, most: DAY }, Described("adapted"), "time", Now,
        "Time from one pass that deletes dead flows to the next; 0 adapts it: shorter where a quarter of a table was dead, longer where next to nothing was.";
    CONNTRACK_GC_MAX_INTERVAL = "conntrack_gc_max_interval", EniConf, Period { least: SECOND.saturating_mul(10), most: DAY }, Literal("30m"), "time", Now,
        "The longest time that it is adapted to.";
    DEGRADATION = "degradation", EniConf, OneOf(&["", "l0", "l1"]), Literal(""), "", Now,
        "For emergencies: l0 makes no call of the cloud API at all and serves pods from what the node has; l1 makes none that releases something.";
    FLOW_EVENTS_ONE_IN = "flow_events_one_in", EniConf, Whole { least: 0, most: MOST_SAMPLED }, Literal("0"), "", Now,
        "New connections that terway-cli flows shows: 1 all, N one in N by chance, 0 none; fifty a second for each CPU at most. Dropped packets are shown in any case.";
    ENABLE_PATCH_POD_IPS = "enable_patch_pod_ips", EniConf, Flag, Literal("true"), "", Now,
        "Writes the addresses of a pod into its annotation k8s.aliyun.com/pod-ips; needs --objects kube.";
    DISABLE_NETWORK_POLICY = "disable_network_policy", ConfigMap, TextFlag, Literal("false"), "", Now,
        "Turns NetworkPolicy off. Every value but false, 0 and the empty string does.";
    IN_CLUSTER_LOADBALANCE = "in_cluster_loadbalance", ConfigMap, TextFlag, Literal("true"), "", Restart,
        "Connections of pods to external addresses of Services go straight to the backends. Every value but true turns it off. Kept for Services in the datapath, which are to come.";
    CNI_CONFLIST = "10-terway.conflist", ConfigMap, CniConf, Described("none"), "", Restart,
        "A CNI configuration list; its plugin of type terway is read as 10-terway.conf is, and goes before it. The daemon writes the list for the container runtime itself.";
    CNI_CONF = "10-terway.conf", ConfigMap, CniConf, Described("none"), "", Restart,
        "A CNI configuration. mtu and host_stack_cidrs count; the daemon writes the configuration for the container runtime itself.";
    ENI_CONF = "eni_conf", ConfigMap, EniConf, Required, "", Never,
        "The document that holds the other keys of this page.";
    ENABLE_ENI_TRUNKING = "enable_eni_trunking", EniConf, Flag, Literal("false"), "", Unsupported,
        "Pods with their own member ENI on a trunk ENI.";
    ENABLE_ERDMA = "enable_erdma", EniConf, Flag, Literal("false"), "", Unsupported,
        "ENIs with elastic RDMA.";
    CUSTOM_STATEFUL_WORKLOAD_KINDS = "custom_stateful_workload_kinds", EniConf, Texts, Literal("[]"), "", Unsupported,
        "Kinds of workload whose pods keep their address, as those of a StatefulSet do.";
    IPAM_TYPE = "ipam_type", EniConf, Text, Literal(""), "", Unsupported,
        "crd has a controller allocate for all nodes. Here every node allocates for itself.";
    DISABLE_DEVICE_PLUGIN = "disable_device_plugin", EniConf, Flag, Literal("true"), "", Unsupported,
        "The device plugin offers ENIs as extended resources.";
    KUBE_CLIENT_QPS = "kube_client_qps", EniConf, Number { least: 0.0, most: 100_000.0 }, Literal("0"), "requests a second", Unsupported,
        "Requests to the API server at most.";
    KUBE_CLIENT_BURST = "kube_client_burst", EniConf, Whole { least: 0, most: 100_000 }, Literal("0"), "requests", Unsupported,
        "Requests to the API server at once.";
    FELIX_RELAY_SERVICE = "felix_relay_service", ConfigMap, Text, Literal(""), "", Unsupported,
        "The relay of an external policy agent; policies are enforced by the daemon's own datapath.";
}

/// Keys that the format no longer has, with their successor in a whole sentence.
pub const REMOVED: &[(&str, &str)] = &[
    ("allow_eip_rob", "EIPs of pods moved to ack-extend-network-controller."),
    ("enable_eip_migrate", "EIPs of pods moved to ack-extend-network-controller."),
    ("enable_eip_pool", "EIPs of pods moved to ack-extend-network-controller."),
    ("hot_plug", "ENIs are always attached and detached as needed; min_eni and max_eni bound them."),
    ("prefix", "The VPC route mode is gone; pods get addresses of vswitches."),
];

/// The key of this name, wherever it stands.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The known name that `name` most likely was meant to be.
#[must_use]
pub fn nearest(name: &str) -> Option<&'static str> {
    closest(name, KEYS.iter().map(|key| key.name))
}

/// The nearest of some names, if it is near enough to be a slip of the keyboard.
pub(super) fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A slip is a few letters; what differs in half of them is another word.
    let limit = (name.chars().count() / 2).min(3);
    let wanted = name.to_ascii_lowercase();
    known
        .map(|known| (distance(&wanted, &known.to_ascii_lowercase()), known))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
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
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn edit_distance() {
        for (a, b, d) in
            [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("max_pool_sizes", "max_pool_size", 1)]
        {
            assert_eq!(distance(a, b), d, "{a} {b}");
        }
    }

    #[test]
    fn misspelled_key_is_suggested() {
        assert_eq!(nearest("max_pool_sizes"), Some("max_pool_size"));
        assert_eq!(nearest("Max_Pool_Size"), Some("max_pool_size"));
        assert_eq!(nearest("vswitchs"), Some("vswitches"));
        assert_eq!(nearest("colour"), None);
        assert_eq!(nearest("x"), None);
        assert_eq!(nearest(""), None);
    }

    #[test]
    fn names_are_unique_and_sentences_end() {
        let names: BTreeSet<_> = KEYS.iter().map(|k| k.name).chain(REMOVED.iter().map(|r| r.0)).collect();
        assert_eq!(names.len(), KEYS.len() + REMOVED.len());
        for key in KEYS {
            assert!(key.about.ends_with('.') || key.about.ends_with(".)"), "{}", key.name);
            assert_eq!(by_name(key.name).map(|k| k.about), Some(key.about));
        }
        assert!(REMOVED.iter().all(|(_, successor)| successor.ends_with('.')));
    }
}
