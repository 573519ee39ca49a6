//! Translation of the configuration into the settings of its subscribers, at the start and at every change.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use terway_core::config::{Config, POOL_OPERATIONS};
use terway_core::errors::{self, Error};
use terway_core::ipam::{Backoff, PoolConfig, Reclaim};
use tokio::sync::watch::Receiver;
use tracing::error;

use crate::bpf::Datapath;
use crate::cloud::{Aliyun, CredentialSource};
use crate::engine::{Engine, PodOptions};
use crate::identity::Node;
use crate::options::Options;

/// Configuration of the address pool.
pub(crate) fn pool(options: &Options, config: &Config, node: &Node) -> PoolConfig {
    let zone = &node.identity.zone;
    let vswitches = config.vswitches_of(zone).to_vec();
    if vswitches.is_empty() {
        error!(zone, "eni_conf has no vSwitch in this node's zone: no ENI can be made");
    }
    let base = PoolConfig::new(node.identity.instance.clone(), node.limits, node.token_seed.clone());
    PoolConfig {
        min_enis: config.min_eni,
        max_enis: config.max_eni,
        eni_cap_permille: config.eni_cap_ratio.permille(),
        eni_cap_shift: config.eni_cap_shift,
        stack: config.ip_stack,
        prefixes: config.prefixes.enabled,
        min_prefixes: config.prefixes.v4_count,
        vswitches,
        vswitch_selection: config.vswitch_order,
        eni_selection: config.eni_selection,
        security_groups: config.security_groups.clone(),
        resource_group: config.resource_group.clone(),
        tags: config.eni_tags.clone(),
        tag_filter: config.eni_tag_filter.clone(),
        tag_block_list: config.eni_tag_block_list.iter().map(|t| (t.key.clone(), t.value.clone())).collect(),
        min_idle: config.min_idle,
        max_idle: config.max_idle,
        warm_up: config.warm_up,
        reclaim: config.reclaim.after.map(|after| Reclaim {
            after,
            interval: config.reclaim.interval,
            batch: config.reclaim.batch,
            jitter_permille: config.reclaim.jitter.permille(),
        }),
        degradation: config.degradation,
        cooling: Duration::from_secs(options.cooling),
        resync: config.sync_period,
        retry: backoff(config, base.retry),
        shrink_after: base.shrink_after / options.time_scale,
        consistency_window: base.consistency_window / options.time_scale,
        vswitch_backoff: base.vswitch_backoff / options.time_scale,
        refusal_backoff: base.refusal_backoff / options.time_scale,
        ..base
    }
}

fn backoff(config: &Config, default: Backoff) -> Backoff {
    let Some(given) = POOL_OPERATIONS.iter().find_map(|operation| config.backoff.get(*operation)) else {
        return default;
    };
    let initial = given.duration.filter(|first| !first.is_zero()).unwrap_or(default.initial);
    Backoff { initial, max: given.cap.unwrap_or(default.max).max(initial) }
}

/// Source of the cloud account's access keys.
pub(crate) fn credentials(options: &Options, config: &Config) -> CredentialSource {
    let key = config.access_key.as_ref().map(|key| (key.id.clone(), key.secret.clone()));
    CredentialSource::chain(&options.credentials_dir, key, config.credential_path.as_deref().map(Path::new))
}

/// Default options of pods.
pub(crate) fn pod_defaults(options: &Options, config: &Config) -> PodOptions {
    PodOptions { mtu: options.mtu.or(config.mtu), extra_routes: config.extra_routes.clone() }
}

/// Writes the destinations that are handled by the host's stack into the datapath.
///
/// # Errors
/// When the map cannot be written.
pub(crate) fn host_stack(config: &Config, addresses: &[IpNetwork], datapath: &Datapath) -> Result<(), Error> {
    let hosts = addresses.iter().map(|net| IpNetwork::from(net.ip()));
    let all: Vec<IpNetwork> = hosts.chain(config.host_stack_cidrs.iter().copied()).collect();
    datapath
        .host_prefixes()
        .set(&all)
        .map_err(|error| Error::new(errors::BPF_FAILED, format!("host addresses: {error}")))
}

/// Writes the sampling rate of new connections into the datapath.
///
/// # Errors
/// When the map cannot be written.
pub(crate) fn flow_events(config: &Config, datapath: &Datapath) -> Result<(), Error> {
    datapath
        .policies()
        .sample_flows(config.flow_events_one_in)
        .map_err(|error| Error::new(errors::BPF_FAILED, format!("flow events: {error}")))
}

/// Subscribers of the configuration: what takes a new one while the daemon runs.
pub(crate) struct ConfigSubscribers {
    pub(crate) options: Options,
    pub(crate) node: Node,
    pub(crate) cloud: Arc<Aliyun>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) datapath: Arc<Datapath>,
}

impl ConfigSubscribers {
    /// Applies every change of the configuration and of the node's addresses. Runs as long as the daemon.
    pub(crate) async fn run(self, mut config: Receiver<Arc<Config>>, mut addresses: Receiver<Arc<Vec<IpNetwork>>>) {
        let mut present = Arc::clone(&config.borrow_and_update());
        loop {
            let changed = tokio::select! {
                changed = config.changed() => changed,
                changed = addresses.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            let next = Arc::clone(&config.borrow_and_update());
            let addresses = Arc::clone(&addresses.borrow_and_update());
            let applied = host_stack(&next, &addresses, &self.datapath);
            if let Err(error) = applied.and_then(|()| flow_events(&next, &self.datapath)) {
                error!(%error, "failed to apply the configuration or the node's addresses to the datapath");
            }
            if next != present {
                self.apply(&present, &next);
                present = next;
            }
        }
    }

    fn apply(&self, old: &Config, new: &Config) {
        // A source of credentials that is set anew asks anew, which costs a call or a file.
        if (&old.access_key, &old.credential_path) != (&new.access_key, &new.credential_path) {
            self.cloud.set_credentials(credentials(&self.options, new));
        }
        self.cloud.set_rate_limits(&new.rate_limits);
        self.engine.reconfigure(pool(&self.options, new, &self.node), pod_defaults(&self.options, new));
    }
}
