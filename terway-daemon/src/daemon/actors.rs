//! Phase "actors": policies, the engine with its restored pool, Services, the feed of Kubernetes objects and connection tracking, in the
//! order in which they depend on each other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use terway_core::clock::Moment;
use terway_core::cloud::Eni;
use terway_core::errors::{self, Error};
use terway_core::ipam::{NodeFacts, Pool, Record, Snapshot};
use terway_core::service;
use tracing::warn;

use super::failed;
use super::kernel::{self, Kernel};
use super::node::Identified;
use super::state::Persistent;
use crate::bpf::Datapath;
use crate::cloud::{Cloud, EniFilter};
use crate::config_source::ConfigSource;
use crate::conntrack::{Conntrack, ConntrackMetrics};
use crate::engine::{self, Engine, NodeInfo, Parts};
use crate::identity::Node;
use crate::kube_writes::{self, KubeWriteMetrics, KubeWrites};
use crate::metrics::Metrics;
use crate::net::Host;
use crate::objects::{ApiClient, Feed, ObjectMetrics, ObjectStore, Subscriber, feed};
use crate::options::Options;
use crate::policy::{self, Policies, PolicyMetrics};
use crate::reload;
use crate::services::{self, ServiceMetrics, Services};

/// How long the start waits for the cloud's list of ENIs before it goes on with what the store says.
const INVENTORY_WITHIN: Duration = Duration::from_secs(10);

/// The parts of the daemon that own state and run as long as it does.
pub(super) struct Actors {
    pub(super) engine: Arc<Engine>,
    pub(super) feed: Arc<Feed>,
    pub(super) services: Arc<Services>,
    pub(super) policies: Arc<Policies>,
    pub(super) conntrack: Arc<Conntrack>,
    pub(super) datapath: Arc<Datapath>,
    pub(super) kube_writes: Arc<KubeWrites>,
}

impl Actors {
    #[expect(clippy::too_many_arguments, reason = "each is the result of one phase")]
    pub(super) async fn start(
        options: &Options,
        api: Option<Arc<ApiClient>>,
        source: &Arc<ConfigSource>,
        kernel: Kernel,
        identified: &Identified,
        info: NodeInfo,
        state: Persistent,
        metrics: &Metrics,
        registry: &mut Registry,
    ) -> Result<Self, Error> {
        let Kernel { host, monitor, datapath } = kernel;
        let Persistent { store, records, queued_dels } = state;
        let Identified { node, cloud, .. } = identified;
        let config = source.config();

        let snapshot = Snapshot {
            records: records.clone(),
            enis: list_enis(&**cloud, node).await,
            facts: vanished_pods(&host, &records).await?,
        };
        let (pool, effects) = Pool::restore(reload::pool(options, &config, node), snapshot, Moment::ZERO)
            .map_err(|error| failed(errors::STORE_FAILED, "restore", &error))?;
        let objects = Arc::new(ObjectStore::default());
        let policies = Policies::start(policy::Setup {
            datapath: Arc::clone(&datapath),
            objects: Arc::clone(&objects),
            addresses: monitor.addresses(),
            config: source.subscribe(),
            metrics: PolicyMetrics::new(registry),
        })?;
        let services = services::Setup {
            objects: Arc::clone(&objects),
            has_source: options.objects.is_some(),
            facts: service::NodeFacts {
                name: info.node.as_str().into(),
                zone: Some(info.identity.zone.as_str().into()),
            },
            settings: service::Settings { in_cluster_loadbalance: config.in_cluster_loadbalance, ..Default::default() },
            datapath: Arc::clone(&datapath),
            addresses: monitor.addresses(),
            metrics: ServiceMetrics::new(registry),
            cgroup: options.cgroup.clone(),
            end_sockets: options.end_sockets,
            host: Arc::clone(&host),
        };
        let context = options.node_context();
        let kube_writes = KubeWrites::new(kube_writes::Setup {
            api: api.clone(),
            objects: Arc::clone(&objects),
            node: info.node.clone(),
            settings: options.node_settings(),
            events: options.events,
            config: source.subscribe(),
            metrics: KubeWriteMetrics::new(registry),
            time_scale: options.time_scale,
        });
        let engine = Engine::new(Parts {
            pool,
            origin: Instant::now(),
            store,
            cloud: Arc::clone(cloud) as Arc<dyn Cloud>,
            datapath: Arc::clone(&datapath),
            policies: Arc::clone(&policies),
            host,
            links: monitor,
            info,
            defaults: reload::pod_defaults(options, &config),
            metrics: metrics.clone(),
        });
        engine.restore(&records, &queued_dels, effects).await?;
        kernel::remove_other_maps(&datapath).await;
        let pods = Arc::clone(&engine);
        let services = Services::start(services, move || pods.pod_namespaces());
        let feed = Feed::start(feed::Setup {
            open: feed::open(options.objects.clone(), context, api),
            store: objects,
            // The order of delivery: see the feed's contract.
            subscribers: vec![
                Arc::clone(&policies) as Arc<dyn Subscriber>,
                Arc::clone(&services) as Arc<dyn Subscriber>,
                Arc::clone(&kube_writes) as Arc<dyn Subscriber>,
            ],
            metrics: ObjectMetrics::new(registry),
        });
        let conntrack = Conntrack::start(
            Arc::clone(&datapath),
            source.subscribe(),
            ConntrackMetrics::new(registry),
            options.time_scale,
        );
        Ok(Self { engine, feed, services, policies, conntrack, datapath, kube_writes })
    }
}

/// The cloud's list of the instance's ENIs; `None` if it does not answer in time.
async fn list_enis(cloud: &dyn Cloud, node: &Node) -> Option<Vec<Eni>> {
    let filter = EniFilter::of_instance(&node.identity.instance);
    match tokio::time::timeout(INVENTORY_WITHIN, cloud.enis(&filter)).await {
        Ok(Ok(enis)) => Some(enis),
        Ok(Err(error)) => {
            warn!(%error, "failed to list the ENIs; starting with those of the store");
            None
        }
        Err(_) => {
            warn!(waited = ?INVENTORY_WITHIN, "the cloud does not answer; starting with the ENIs of the store");
            None
        }
    }
}

/// Attachments whose pods are gone without a DEL.
async fn vanished_pods(host: &Host, records: &[Record]) -> Result<NodeFacts, Error> {
    let attachments = records.iter().filter_map(|record| match record {
        Record::Attachment(a) => Some((a.key.clone(), a.netns.clone())),
        _ => None,
    });
    let netns_gone: BTreeSet<_> = engine::vanished_pods(host, attachments.collect()).await?;
    Ok(NodeFacts { netns_gone })
}
