//! What a new configuration changes, and when that takes effect.

use std::fmt;

use serde_json::{Map, Value, json};

use super::keys::{self, Key, TakesEffect};
use super::units::show_period;
use super::{AccessKey, BackoffOverride, Config, Secret};

/// The value of one key, as far as it can be shown.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting {
    /// Nothing is set.
    None,
    /// A value.
    Value(Value),
    /// A value that is never shown.
    Hidden(Secret),
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Value(Value::String(text)) if !text.is_empty() => f.write_str(text),
            Self::Value(value) => write!(f, "{value}"),
            Self::Hidden(_) => f.write_str("<secret>"),
        }
    }
}

impl<T: Into<Value>> From<T> for Setting {
    fn from(value: T) -> Self {
        match value.into() {
            Value::Null => Self::None,
            value => Self::Value(value),
        }
    }
}

/// One key whose value differs.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyChange {
    /// The key.
    pub key: &'static str,
    /// The value so far; displayed without secrets.
    pub old: Setting,
    /// The new value.
    pub new: Setting,
    /// When the new value takes effect.
    pub effect: TakesEffect,
}

impl fmt::Display for KeyChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {} ({})", self.key, self.old, self.new, self.effect)
    }
}

fn texts<T: fmt::Display>(list: &[T]) -> Value {
    list.iter().map(ToString::to_string).collect()
}

/// The word of an enum whose variants stand in the order of the table.
fn word(key: &Key, at: usize) -> Setting {
    match key.kind {
        keys::Kind::OneOf(words) => words.get(at).copied().into(),
        _ => Setting::None,
    }
}

fn waits(times: &BackoffOverride) -> Value {
    let BackoffOverride { initial_delay, duration, factor, jitter, steps, cap } = *times;
    let period = |p: Option<std::time::Duration>| p.map(|p| Value::from(show_period(p)));
    let ratio = |r: Option<super::Ratio>| r.map(|r| Value::from(r.get()));
    let all = [
        ("InitialDelay", period(initial_delay)),
        ("Duration", period(duration)),
        ("Factor", ratio(factor)),
        ("Jitter", ratio(jitter)),
        ("Steps", steps.map(Value::from)),
        ("Cap", period(cap)),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into()
}

impl Config {
    /// Every key this version acts on with its value, in the order of [`KEYS`](super::KEYS) as far as one key is one value.
    #[must_use]
    pub fn settings(&self) -> Vec<(&'static Key, Setting)> {
        // Without `..`: a new field does not compile until it is compared and shown.
        let Self {
            ip_stack,
            vswitches,
            vswitch_order,
            security_groups,
            resource_group,
            eni_tags,
            eni_tag_filter,
            eni_tag_block_list,
            eni_selection,
            min_eni,
            max_eni,
            eni_cap_ratio,
            eni_cap_shift,
            min_idle,
            max_idle,
            warm_up,
            reclaim,
            sync_period,
            prefixes,
            service_cidrs,
            host_stack_cidrs,
            extra_routes,
            mtu,
            region,
            access_key,
            credential_path,
            rate_limits,
            backoff,
            conntrack,
            degradation,
            policy_enabled,
            flow_events_one_in,
            patch_pod_ips,
            in_cluster_loadbalance,
        } = self;
        let (id, secret) = match access_key {
            Some(AccessKey { id, secret }) => (Setting::Hidden(id.clone()), Setting::Hidden(secret.clone())),
            None => (Setting::None, Setting::None),
        };
        let zones = vswitches.iter().map(|(zone, ids)| (zone.clone(), texts(ids)));
        let blocked = eni_tag_block_list.iter().map(|tag| json!({"key": tag.key, "value": tag.value}));
        let routes = extra_routes.iter().map(|net| json!({"dst": net.to_string()}));
        let backoff = backoff.iter().map(|(operation, times)| (operation.clone(), waits(times)));
        let mut all = vec![
            (keys::IP_STACK, word(keys::IP_STACK, *ip_stack as usize)),
            (keys::VSWITCHES, zones.collect::<Map<_, _>>().into()),
            (keys::VSWITCH_SELECTION_POLICY, word(keys::VSWITCH_SELECTION_POLICY, *vswitch_order as usize)),
            (keys::SECURITY_GROUPS, texts(security_groups).into()),
            (keys::RESOURCE_GROUP_ID, resource_group.clone().into()),
            (keys::ENI_TAGS, json!(eni_tags).into()),
            (keys::ENI_TAG_FILTER, json!(eni_tag_filter).into()),
            (keys::ENI_TAG_BLOCK_LIST, blocked.collect::<Value>().into()),
            (keys::ENI_SELECTION_POLICY, word(keys::ENI_SELECTION_POLICY, *eni_selection as usize)),
            (keys::MIN_ENI, (*min_eni).into()),
            (keys::MAX_ENI, (*max_eni).into()),
            (keys::ENI_CAP_RATIO, eni_cap_ratio.get().into()),
            (keys::ENI_CAP_SHIFT, (*eni_cap_shift).into()),
            (keys::MIN_POOL_SIZE, (*min_idle).into()),
            (keys::MAX_POOL_SIZE, (*max_idle).into()),
            (keys::IP_WARM_UP_SIZE, (*warm_up).into()),
            (keys::IDLE_IP_RECLAIM_AFTER, reclaim.after.map(show_period).into()),
            (keys::IDLE_IP_RECLAIM_INTERVAL, show_period(reclaim.interval).into()),
            (keys::IDLE_IP_RECLAIM_BATCH_SIZE, reclaim.batch.into()),
            (keys::IDLE_IP_RECLAIM_JITTER_FACTOR, reclaim.jitter.get().into()),
            (keys::IP_POOL_SYNC_PERIOD, show_period(*sync_period).into()),
            (keys::ENABLE_IP_PREFIX, prefixes.enabled.into()),
            (keys::IPV4_PREFIX_COUNT, prefixes.v4_count.into()),
            (keys::IPV6_PREFIX_COUNT, prefixes.v6_count.into()),
            (keys::SERVICE_CIDR, texts(service_cidrs).into()),
            (keys::HOST_STACK_CIDRS, texts(host_stack_cidrs).into()),
            (keys::EXTRA_ROUTES, routes.collect::<Value>().into()),
            (keys::REGION_ID, region.clone().into()),
            (keys::ACCESS_KEY, id),
            (keys::ACCESS_SECRET, secret),
            (keys::CREDENTIAL_PATH, credential_path.clone().into()),
            (keys::RATE_LIMIT, json!(rate_limits).into()),
            (keys::BACKOFF_OVERRIDE, backoff.collect::<Map<_, _>>().into()),
            (keys::DEGRADATION, word(keys::DEGRADATION, *degradation as usize)),
            (keys::DISABLE_NETWORK_POLICY, (!policy_enabled).into()),
            (keys::FLOW_EVENTS_ONE_IN, (*flow_events_one_in).into()),
            (keys::ENABLE_PATCH_POD_IPS, (*patch_pod_ips).into()),
            (keys::IN_CLUSTER_LOADBALANCE, (*in_cluster_loadbalance).into()),
            (keys::CNI_CONF, mtu.map(|mtu| json!({"mtu": mtu})).into()),
        ];
        all.extend(conntrack.settings());
        all
    }

    /// What changes from this configuration to `new`; empty exactly if the two are equal.
    #[must_use]
    pub fn diff(&self, new: &Self) -> Vec<KeyChange> {
        let pairs = self.settings().into_iter().zip(new.settings());
        pairs
            .filter(|((_, old), (_, new))| old != new)
            .map(|((key, old), (_, new))| KeyChange { key: key.name, old, new, effect: key.effect })
            .collect()
    }

    /// What a running daemon goes by after the edit to `new`: all of it but the keys that need a restart, which stay as they are here.
    #[must_use]
    pub fn effective(&self, new: &Self) -> Self {
        Self {
            ip_stack: self.ip_stack,
            warm_up: self.warm_up,
            service_cidrs: self.service_cidrs.clone(),
            region: self.region.clone(),
            in_cluster_loadbalance: self.in_cluster_loadbalance,
            mtu: self.mtu,
            conntrack: self.conntrack.effective(&new.conntrack),
            ..new.clone()
        }
    }
}
