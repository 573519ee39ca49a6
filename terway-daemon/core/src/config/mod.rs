//! `eni_conf`: what an administrator writes ([`raw`]) becomes what the node does ([`Config`]), with every default explicit.
//!
//! A wrong value is refused with its key, the value and the reason; nothing of a refused configuration takes effect.

mod raw;
mod secret;

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;

use crate::ident::{IpStack, SecurityGroupId, VSwitchId};

pub use self::secret::Secret;

/// An access key of the cloud account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessKey {
    /// Its id.
    pub id: Secret,
    /// Its secret.
    pub secret: Secret,
}

/// In which order vSwitches of the node's zone are tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VSwitchOrder {
    /// The order of the list.
    #[default]
    Ordered,
    /// Most free addresses first.
    Most,
    /// Any.
    Random,
}

/// The checked configuration of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Families that pods get addresses of (`ip_stack`, default `ipv4`).
    pub ip_stack: IpStack,
    /// vSwitches of pods by zone (`vswitches`).
    pub vswitches: BTreeMap<String, Vec<VSwitchId>>,
    /// Order of trying them (`vswitch_selection_policy`, default `ordered`).
    pub vswitch_order: VSwitchOrder,
    /// Security groups of new ENIs (`security_group` and `security_groups`), at most 10.
    pub security_groups: Vec<SecurityGroupId>,
    /// Tags of new ENIs (`eni_tags`).
    pub eni_tags: BTreeMap<String, String>,
    /// Idle addresses to keep ready (`min_pool_size`, default 0).
    pub min_idle: u32,
    /// Idle addresses above which they are given back (`max_pool_size`, default 5).
    pub max_idle: u32,
    /// Upper bound of ENIs for pods (`max_eni`, default: what the instance type carries).
    pub max_eni: Option<u32>,
    /// Service address ranges (`service_cidr`).
    pub service_cidrs: Vec<IpNet>,
    /// Destinations handed to the host stack rather than to the VPC (`host_stack_cidrs`).
    pub host_stack_cidrs: Vec<IpNet>,
    /// Region (`region_id`, default: from the metadata service).
    pub region: Option<String>,
    /// Access key (`access_key` and `access_secret`, default: the node's RAM role).
    pub access_key: Option<AccessKey>,
}

/// Something the administrator should know that is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The key.
    pub key: String,
    /// One sentence.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// A refused value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: {reason}")]
pub struct Invalid {
    /// The key.
    pub key: String,
    /// The value as it was written; `<secret>` for secret keys.
    pub value: String,
    /// Why it is refused.
    pub reason: String,
}

/// Reads `eni_conf`.
///
/// # Errors
/// Every refused value at once, so that one edit can mend them all.
pub fn parse(text: &str) -> Result<(Config, Vec<Warning>), Vec<Invalid>> {
    let (raw, warnings) = raw::read(text).map_err(|e| vec![e])?;
    check(&raw).map(|config| (config, warnings))
}

/// ECS API reference, CreateNetworkInterface: an ENI joins at most 10 security groups (5 by default quota).
const MAX_SECURITY_GROUPS: usize = 10;

fn check(raw: &raw::EniConf) -> Result<Config, Vec<Invalid>> {
    let mut bad = Vec::new();
    let mut refuse =
        |key: &str, value: String, reason: &str| bad.push(Invalid { key: key.into(), value, reason: reason.into() });

    let ip_stack = match raw.ip_stack.as_deref().unwrap_or("ipv4") {
        "ipv4" => IpStack::Ipv4,
        "ipv6" => IpStack::Ipv6,
        "dual" => IpStack::Dual,
        other => {
            refuse("ip_stack", other.into(), "must be one of ipv4, ipv6, dual");
            IpStack::Ipv4
        }
    };
    let vswitch_order = match raw.vswitch_selection_policy.as_deref().unwrap_or("ordered") {
        "ordered" => VSwitchOrder::Ordered,
        "most" => VSwitchOrder::Most,
        "random" => VSwitchOrder::Random,
        other => {
            refuse("vswitch_selection_policy", other.into(), "must be one of ordered, most, random");
            VSwitchOrder::Ordered
        }
    };

    let mut security_groups: Vec<SecurityGroupId> = Vec::new();
    for group in raw.security_group.iter().chain(raw.security_groups.iter().flatten()).filter(|g| !g.is_empty()) {
        let group = SecurityGroupId::new(group.as_str());
        if !security_groups.contains(&group) {
            security_groups.push(group);
        }
    }
    if security_groups.len() > MAX_SECURITY_GROUPS {
        refuse("security_groups", security_groups.len().to_string(), "an ENI joins at most 10 security groups");
    }

    let vswitches: BTreeMap<String, Vec<VSwitchId>> = raw.vswitches.clone().unwrap_or_default();
    if vswitches.values().all(Vec::is_empty) {
        refuse("vswitches", "{}".into(), "at least one vSwitch is needed, as {\"zone\": [\"vsw-…\"]}");
    }

    let min_idle = count("min_pool_size", raw.min_pool_size, 0, &mut refuse);
    let max_idle = count("max_pool_size", raw.max_pool_size, 5, &mut refuse);
    if min_idle > max_idle {
        refuse("min_pool_size", min_idle.to_string(), "must not be above max_pool_size");
    }
    let max_eni = match raw.max_eni {
        None | Some(0) => None,
        some => Some(count("max_eni", some, 0, &mut refuse)),
    };

    let service_cidrs = cidrs("service_cidr", raw.service_cidr.as_deref().unwrap_or("").split(','), &mut refuse);
    let host_stack_cidrs =
        cidrs("host_stack_cidrs", raw.host_stack_cidrs.iter().flatten().map(String::as_str), &mut refuse);

    let access_key = match (raw.access_key.as_deref().unwrap_or(""), raw.access_secret.as_deref().unwrap_or("")) {
        ("", "") => None,
        (id, "") => {
            refuse("access_secret", "<secret>".into(), "missing although access_key is set");
            Some(AccessKey { id: Secret::new(id), secret: Secret::new("") })
        }
        ("", _) => {
            refuse("access_key", String::new(), "missing although access_secret is set");
            None
        }
        (id, secret) => Some(AccessKey { id: Secret::new(id), secret: Secret::new(secret) }),
    };

    let config = Config {
        ip_stack,
        vswitches,
        vswitch_order,
        security_groups,
        eni_tags: raw.eni_tags.clone().unwrap_or_default(),
        min_idle,
        max_idle,
        max_eni,
        service_cidrs,
        host_stack_cidrs,
        region: raw.region_id.clone().filter(|r| !r.is_empty()),
        access_key,
    };
    if bad.is_empty() { Ok(config) } else { Err(bad) }
}

fn count(key: &str, value: Option<i64>, default: u32, refuse: &mut impl FnMut(&str, String, &str)) -> u32 {
    match value {
        None => default,
        Some(n) => u32::try_from(n).ok().filter(|n| *n <= 10_000).unwrap_or_else(|| {
            refuse(key, n.to_string(), "must be a whole number from 0 to 10000");
            default
        }),
    }
}

fn cidrs<'a>(
    key: &str,
    list: impl Iterator<Item = &'a str>,
    refuse: &mut impl FnMut(&str, String, &str),
) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for text in list.map(str::trim).filter(|t| !t.is_empty()) {
        match text.parse::<IpNet>() {
            Ok(net) => nets.push(net.trunc()),
            Err(_) => refuse(key, text.into(), "is not a CIDR such as 172.16.0.0/16"),
        }
    }
    nets
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"version":"1","vswitches":{"z-a":["vsw-1","vsw-2"]},"security_group":"sg-1","security_groups":["sg-1","sg-2"],
        "service_cidr":"172.16.0.0/16, fd00::/112","max_pool_size":10,"ip_stack":"dual","access_key":"id","access_secret":"hush"}"#;

    #[test]
    fn defaults_are_explicit() {
        let (config, warnings) = parse(r#"{"vswitches":{"z":["vsw-1"]}}"#).unwrap();
        assert!(warnings.is_empty());
        assert_eq!((config.ip_stack, config.min_idle, config.max_idle, config.max_eni), (IpStack::Ipv4, 0, 5, None));
        assert_eq!((config.vswitch_order, config.access_key), (VSwitchOrder::Ordered, None));
    }

    #[test]
    fn a_full_configuration_is_read() {
        let (config, _) = parse(GOOD).unwrap();
        assert_eq!(config.security_groups.len(), 2);
        assert_eq!(config.service_cidrs.len(), 2);
        assert_eq!(config.ip_stack, IpStack::Dual);
        assert!(!format!("{config:?}").contains("hush"), "a secret must never be printed");
    }

    #[test]
    fn every_bad_value_is_named_at_once() {
        let bad = parse(r#"{"ip_stack":"v4","min_pool_size":7,"service_cidr":"10.0.0.0/99","access_secret":"hush"}"#)
            .unwrap_err();
        let keys: Vec<&str> = bad.iter().map(|b| b.key.as_str()).collect();
        assert_eq!(keys, ["ip_stack", "vswitches", "min_pool_size", "service_cidr", "access_key"]);
        assert!(!format!("{bad:?}").contains("hush"));
    }

    #[test]
    fn unknown_removed_and_pending_keys_warn() {
        let (_, warnings) =
            parse(r#"{"vswitches":{"z":["v"]},"enable_eip_pool":"true","max_pool_sizes":3,"enable_ip_prefix":true}"#)
                .unwrap();
        let text: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        assert!(
            text.iter().any(|w| w.starts_with("enable_eip_pool") && w.contains("ack-extend-network-controller")),
            "{text:?}"
        );
        assert!(text.iter().any(|w| w.starts_with("max_pool_sizes") && w.contains("max_pool_size")), "{text:?}");
        assert!(text.iter().any(|w| w.starts_with("enable_ip_prefix") && w.contains("no effect")), "{text:?}");
    }

    #[test]
    fn wrong_types_name_the_key_and_never_a_secret() {
        let bad = parse(r#"{"vswitches":{"z":["v"]},"max_pool_size":"ten"}"#).unwrap_err();
        assert_eq!(bad[0].key, "max_pool_size");
        let bad = parse(r#"{"access_secret":["hush"]}"#).unwrap_err();
        assert!(!format!("{bad:?}").contains("hush"), "{bad:?}");
        assert!(parse("not json").is_err());
        assert!(parse("[]").is_err());
    }
}
