//! The object source `kube`: an API server, by list and watch.
//!
//! One [`ListWatch`] for each resource sends its events to the [`Merger`], which turns them into batches for the feed. The node's own pods are read first
//! and by themselves, so that ADDs do not wait for the cluster; pods of other nodes are watched only while something needs them
//! ([`PodDemand`](terway_core::objects::PodDemand)), and policies that need them are delivered behind them.

mod client;
mod config_maps;
mod decode;
mod list_watch;
mod merge;
mod servers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::{AbortHandle, abortable};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use terway_core::objects::Kind;
use tokio::sync::{Semaphore, mpsc};

use self::list_watch::{ListWatch, Pacing, Resource};
use self::merge::Merger;
use self::servers::Servers;
use super::{Batch, NodeContext, ObjectSource, SourceError};
use crate::actor::sleep_until;

pub use client::{ApiClient, Credentials};
pub(crate) use client::{ApiError, PatchType};
pub use config_maps::ConfigMapWatch;

/// Batches of events that wait for the merger.
const WAITING: usize = 64;

/// The time for which pods of other nodes are still watched after the last object that needs them is gone.
const NARROW_AFTER: Duration = Duration::from_secs(600);

/// See the [module](self).
#[derive(Debug)]
pub struct KubeSource {
    api: Arc<ApiClient>,
    node: String,
    time_scale: u32,
}

impl KubeSource {
    /// Makes a source; it connects when it runs.
    #[must_use]
    pub const fn new(api: Arc<ApiClient>, node: String, time_scale: u32) -> Self {
        Self { api, node, time_scale }
    }
}

/// Makes the client of a cluster; it connects with its first request.
#[must_use]
pub(super) fn api_client(credentials: Credentials, context: &NodeContext) -> Arc<ApiClient> {
    let servers = Arc::new(Servers::open(context.api_servers_file.clone()));
    servers.add_configured(&context.api_servers);
    Arc::new(ApiClient::new(credentials, servers))
}

/// The streams of the source. Their order is the order in which they are listed: first what an ADD waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
enum Stream {
    OwnPods,
    OwnNode,
    Services,
    EndpointSlices,
    NetworkPolicies,
    ClusterNetworkPolicies,
    Namespaces,
    /// Pods of other nodes, on demand.
    OtherPods,
}

impl Stream {
    const ALL: [Self; 8] = [
        Self::OwnPods,
        Self::OwnNode,
        Self::Services,
        Self::EndpointSlices,
        Self::NetworkPolicies,
        Self::ClusterNetworkPolicies,
        Self::Namespaces,
        Self::OtherPods,
    ];

    const fn kind(self) -> Kind {
        match self {
            Self::OwnPods | Self::OtherPods => Kind::Pod,
            Self::OwnNode => Kind::Node,
            Self::Services => Kind::Service,
            Self::EndpointSlices => Kind::EndpointSlice,
            Self::NetworkPolicies => Kind::NetworkPolicy,
            Self::ClusterNetworkPolicies => Kind::ClusterNetworkPolicy,
            Self::Namespaces => Kind::Namespace,
        }
    }

    fn resource(self, node: &str) -> Resource {
        let node: String = form_urlencoded::byte_serialize(node.as_bytes()).collect();
        let (paths, fields): (&[&str], String) = match self {
            Self::OwnPods => (&["/api/v1/pods"], format!("spec.nodeName%3D{node}")),
            Self::OtherPods => (&["/api/v1/pods"], format!("spec.nodeName%21%3D{node}")),
            Self::OwnNode => (&["/api/v1/nodes"], format!("metadata.name%3D{node}")),
            Self::Services => (&["/api/v1/services"], String::new()),
            // Kubernetes before 1.21 has the beta version only.
            Self::EndpointSlices => (
                &["/apis/discovery.k8s.io/v1/endpointslices", "/apis/discovery.k8s.io/v1beta1/endpointslices"],
                String::new(),
            ),
            Self::NetworkPolicies => (&["/apis/networking.k8s.io/v1/networkpolicies"], String::new()),
            Self::ClusterNetworkPolicies => {
                (&["/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"], String::new())
            }
            Self::Namespaces => (&["/api/v1/namespaces"], String::new()),
        };
        Resource {
            kind: self.kind(),
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            fields,
            is_optional: self == Self::ClusterNetworkPolicies,
        }
    }
}

#[async_trait]
impl ObjectSource for KubeSource {
    async fn run(self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        let Self { api, node, time_scale } = *self;
        let turn = Arc::new(Semaphore::new(1));
        let (sender, mut events) = mpsc::channel(WAITING);
        let start = |stream: Stream| ListWatch {
            stream: stream as usize,
            api: Arc::clone(&api),
            resource: stream.resource(&node),
            pacing: Pacing::scaled(time_scale),
            turn: Arc::clone(&turn),
            events: sender.clone(),
        };
        // Polled by this task: no stream outlives its source, and a panic in one is the source's.
        let mut streams = FuturesUnordered::new();
        for stream in Stream::ALL.into_iter().filter(|stream| *stream != Stream::OtherPods) {
            streams.push(abortable(start(stream).run()).0);
        }
        let mut others: Option<AbortHandle> = None;
        let mut unneeded_since: Option<Instant> = None;
        let narrow_after = NARROW_AFTER / time_scale.max(1);
        let mut merger = Merger::new(Arc::clone(api.servers()));
        if batches.send(merger.begin()).await.is_err() {
            return Ok(());
        }
        loop {
            let (stream, received) = tokio::select! {
                event = events.recv() => match event {
                    Some(event) => event,
                    None => return Ok(()),
                },
                // The one of other nodes' pods, when it was ended.
                Some(_) = streams.next() => continue,
                () = sleep_until(unneeded_since.map(|since| since + narrow_after)) => {
                    unneeded_since = None;
                    if let Some(running) = others.take() {
                        running.abort();
                        if batches.send(merger.narrow()).await.is_err() {
                            return Ok(());
                        }
                    }
                    continue;
                }
                () = batches.closed() => return Ok(()),
            };
            let Some(stream) = Stream::ALL.get(stream).copied() else { continue };
            let batch = merger.merge(stream, received);
            if merger.needs_other_pods() {
                unneeded_since = None;
                if others.is_none() {
                    merger.widen();
                    let (stream, handle) = abortable(start(Stream::OtherPods).run());
                    streams.push(stream);
                    others = Some(handle);
                }
            } else if others.is_some() {
                unneeded_since.get_or_insert_with(Instant::now);
            }
            if !batch.is_empty() && batches.send(batch).await.is_err() {
                return Ok(());
            }
        }
    }
}
