//! Construction of the engine, and restoration of kernel and datapath from the store.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use terway_core::cloud::NodeIdentity;
use terway_core::errors::Error;
use terway_core::ident::{Addresses, AttachmentKey, IpStack};
use terway_core::ipam::{AttachmentRecord, Effect, Event, Phase, Pool, Record};
use terway_core::reconcile::{NetnsState, pod_is_gone};
use terway_core::route::{KnownResources, alias, orphans};
use tokio::sync::{RwLock, watch};
use tracing::{info, warn};

use super::pod::{PodOptions, net_error};
use super::reaper::Reaper;
use super::subnets::Subnets;
use super::{Engine, PoolState};
use crate::bpf::Datapath;
use crate::cloud::Cloud;
use crate::metrics::Metrics;
use crate::net::{Host, NetError, NetMonitor};
use crate::policy::Policies;
use crate::store::Store;

/// Facts about the node that do not change while the daemon runs.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// The node's name.
    pub node: String,
    /// Instance, type, region, zone.
    pub identity: NodeIdentity,
    /// Address families of pods.
    pub stack: IpStack,
    /// The node's own addresses, used as source of ARP and ND on its ENIs.
    pub addresses: Addresses,
    /// MTU of the node's primary interface in bytes.
    pub nic_mtu: u32,
    /// The file that keeps the subnets of ENIs.
    pub subnets: PathBuf,
    /// Whether the node serves Services.
    pub services: bool,
    /// Source ports for masqueraded connections; no socket of the host uses them.
    pub own_ports: RangeInclusive<u16>,
    /// Limit for the NIC of an attached ENI to appear; after it the pool retries later.
    pub nic_within: Duration,
}

/// Dependencies of an engine.
pub struct Parts {
    /// The restored pool.
    pub pool: Pool,
    /// Time zero of the pool's clock.
    pub origin: Instant,
    /// The store.
    pub store: Store,
    /// The cloud.
    pub cloud: Arc<dyn Cloud>,
    /// The datapath.
    pub datapath: Arc<Datapath>,
    /// Network policies.
    pub policies: Arc<Policies>,
    /// The kernel's network.
    pub host: Arc<Host>,
    /// Reports rtnetlink events of NICs and addresses.
    pub links: NetMonitor,
    /// Facts about the node.
    pub info: NodeInfo,
    /// Default options of pods.
    pub defaults: PodOptions,
    /// Metrics.
    pub metrics: Metrics,
}

impl Engine {
    /// Makes an engine. Must be called on the runtime: the task that deletes links starts with it.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { pool, origin, store, cloud, datapath, policies, host, links, info, defaults, metrics } = parts;
        let pool_state = PoolState { pool, waiting: HashMap::new(), next_ticket: 0, written: 0 };
        let reaper = Reaper::start(Arc::clone(&host));
        Arc::new(Self {
            pool_state: Mutex::new(pool_state),
            durable: watch::Sender::new(0),
            wake: watch::Sender::new(None),
            stepped: watch::Sender::new(()),
            fatal: watch::Sender::new(None),
            origin,
            store,
            cloud,
            datapath,
            policies,
            host,
            links,
            reaper,
            subnets: Subnets::load(info.subnets.clone()),
            audit: super::audit::Audit::default(),
            wiring: RwLock::new(()),
            events: super::events::FlowLog::default(),
            flow_reader: tokio::sync::Mutex::new(None),
            info,
            defaults: Mutex::new(defaults),
            metrics,
        })
    }

    /// Restores the kernel's state from `records` and starts the pool's first effects.
    ///
    /// Pods that are there are adopted in place: their programs are replaced atomically, their endpoints rewritten if they differ. What is
    /// provably ours and of nobody who is known is removed. A pod whose DEL is queued is going to be removed and is not adopted.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn restore(
        self: &Arc<Self>,
        records: &[Record],
        queued_dels: &BTreeSet<AttachmentKey>,
        effects: Vec<Effect>,
    ) -> Result<(), Error> {
        let attachments: Vec<&AttachmentRecord> =
            records.iter().filter_map(|r| if let Record::Attachment(a) = r { Some(a) } else { None }).collect();
        self.remove_leftovers(&attachments).await?;
        let running = attachments.iter().filter(|a| a.phase == Phase::Ready && !queued_dels.contains(&a.key));
        for attachment in running {
            if let Err(error) = self.adopt(attachment).await {
                warn!(pod = %attachment.pod, key = %attachment.key, %error, "failed to adopt a running pod");
            }
        }
        {
            let mut state = self.pool_state();
            self.dispatch(&mut state, effects);
        }
        info!(attachments = attachments.len(), "restored");
        self.feed(Event::Tick);
        Ok(())
    }

    async fn adopt(&self, attachment: &AttachmentRecord) -> Result<(), Error> {
        let AttachmentRecord { key, pod, options, lease, .. } = attachment;
        let plan = self.plan(key, pod, lease, &PodOptions::decode(options));
        let state = self.host.observe(BTreeSet::new()).await.map_err(net_error)?;
        let link = state.links.get(&plan.inputs.host_ifname).filter(|link| link.alias.as_deref() == Some(&alias(key)));
        let Some(link) = link else {
            let detail = format!("the interface {} is missing", plan.inputs.host_ifname);
            return Err(Error::new(terway_core::errors::CHECK_FAILED, detail));
        };
        self.install_datapath(Self::endpoint(&plan, lease, link.index), pod).await
    }

    /// Removes links, rules, routes and endpoints of terway that belong to no attachment.
    async fn remove_leftovers(&self, attachments: &[&AttachmentRecord]) -> Result<(), Error> {
        let addresses: BTreeSet<IpAddr> = attachments.iter().flat_map(|a| a.lease.addresses.iter()).collect();
        let known = KnownResources {
            aliases: attachments.iter().map(|a| alias(&a.key)).collect(),
            addresses: addresses.clone(),
            enis: self.links.nics().iter().map(|nic| nic.ifindex).collect(),
        };
        let state = self.host.observe(BTreeSet::new()).await.map_err(net_error)?;
        let stale = orphans(&state, &known);
        if !stale.is_empty() {
            info!(?stale, "removing leftovers of earlier runs");
            self.host.remove(stale).await.map_err(net_error)?;
        }
        let stale = self
            .with_datapath(move |datapath| {
                let mut stale = 0;
                for endpoint in datapath.endpoints().list() {
                    if !endpoint.addresses.iter().any(|address| addresses.contains(&address)) {
                        datapath.endpoints().remove(endpoint.host_ifindex)?;
                        stale += 1;
                    }
                }
                Ok(stale)
            })
            .await?;
        if stale > 0 {
            info!(stale, "removed endpoints that belong to no pod");
        }
        self.forget_policies().await;
        Ok(())
    }
}

/// Those of `attachments` whose pods provably do not exist any more ([`pod_is_gone`]).
///
/// # Errors
/// When the kernel cannot be asked.
pub async fn vanished_pods(
    host: &Host,
    attachments: Vec<(AttachmentKey, String)>,
) -> Result<BTreeSet<AttachmentKey>, Error> {
    let mut suspects = attachments;
    suspects.retain(|(_, netns)| matches!(host.open_netns(netns), Err(NetError::Netns { .. })));
    if suspects.is_empty() {
        return Ok(BTreeSet::new());
    }
    let state = host.observe(BTreeSet::new()).await?;
    let gone = suspects.into_iter().map(|(key, _)| key).filter(|key| pod_is_gone(key, NetnsState::Absent, &state));
    Ok(gone.collect())
}
