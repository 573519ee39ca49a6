//! The gRPC service: decodes requests, hands them to the [`Engine`], encodes replies and errors. Decides nothing.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use terway_core::config::KeyChange;
use terway_core::errors::{self, Error};
use terway_core::ident::{AttachmentKey, PodRef};
use terway_core::kube_writes::Reason;
use terway_proto::v1;
use terway_proto::v1::node_network_server::{NodeNetwork, NodeNetworkServer};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};

use crate::config_source::{ConfigSource, ConfigStatus};
use crate::conflist::Conflist;
use crate::conntrack::Conntrack;
use crate::datapath_log::DatapathLog;
use crate::engine::{AddRequest, Engine, Filter, RecentAndLive, dropped_packet};
use crate::grpc::{self, attachment, error_detail};
use crate::http;
use crate::kube_writes::KubeWrites;
use crate::metrics::{Metrics, Phase, Verb};
use crate::objects::Feed;
use crate::policy::Policies;
use crate::services::Services;
use crate::supervise;

/// The limit for which an ADD waits for the first sync of Services: the largest sync takes two seconds, and the runtime retries anyway.
const SYNC_WITHIN: Duration = Duration::from_secs(10);

/// The gRPC service `terway.v1.NodeNetwork` on top of the daemon's actors.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) engine: Arc<Engine>,
    pub(crate) source: Arc<ConfigSource>,
    pub(crate) objects: Arc<Feed>,
    pub(crate) services: Arc<Services>,
    pub(crate) conntrack: Arc<Conntrack>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) http: Arc<http::Server>,
    pub(crate) conflist: Arc<Conflist>,
    pub(crate) datapath_log: Arc<DatapathLog>,
    pub(crate) metrics: Metrics,
    pub(crate) kube_writes: Arc<KubeWrites>,
}

impl Service {
    /// A tonic service that can be added to a server.
    pub(crate) fn into_server(self) -> NodeNetworkServer<Self> {
        NodeNetworkServer::new(self)
    }

    /// Waits until the maps hold the Services; the error names what is in the way as far as it is known.
    async fn services_synced(&self) -> Result<(), Error> {
        if self.services.wait_until_synced(SYNC_WITHIN).await {
            return Ok(());
        }
        let problem = self.objects.problems().into_iter().chain(self.services.problems()).next();
        let reason =
            problem.map_or_else(|| "The objects are still being read.".to_owned(), |problem| problem.to_string());
        Err(Error::new(errors::SERVICES_UNSYNCED, reason))
    }

    /// Answers one call: times it, counts it, and turns a panic in it into an error.
    async fn call<T>(
        &self,
        api: &'static str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<Response<T>, Status> {
        let start = Instant::now();
        let result = supervise::contain("grpc", work).await.flatten();
        let took = start.elapsed();
        match api {
            "AddPod" => self.metrics.phase(Verb::Add, Phase::Total, took),
            "DelPod" => self.metrics.phase(Verb::Del, Phase::Total, took),
            _ => {}
        }
        match result {
            Ok(reply) => {
                self.metrics.rpc(api, "", took);
                Ok(Response::new(reply))
            }
            Err(error) => {
                self.metrics.rpc(api, error.code.name, took);
                warn!(api, code = error.code.id, detail = error.detail, "call failed");
                Err(status(&error))
            }
        }
    }
}

/// Tells the outcome of an ADD as an event on its pod, also when the runtime gives up before there is one.
struct AddOutcome<'a> {
    service: &'a Service,
    pod: &'a PodRef,
    start: Instant,
    is_told: bool,
}

impl<'a> AddOutcome<'a> {
    const fn new(service: &'a Service, pod: &'a PodRef, start: Instant) -> Self {
        Self { service, pod, start, is_told: false }
    }

    fn tell(mut self, result: Result<v1::Network, Error>) -> Result<v1::Network, Error> {
        self.is_told = true;
        let writes = &self.service.kube_writes;
        match &result {
            Ok(network) => {
                let addresses: Vec<&str> =
                    network.addresses.iter().map(|a| a.cidr.split('/').next().unwrap_or_default()).collect();
                let message = format!("Alloc IP {} took {:?}", addresses.join(","), self.start.elapsed());
                writes.record_on_pod(self.pod, Reason::AllocIpSucceed, message);
            }
            Err(error) => {
                writes.record_on_pod(self.pod, Reason::AllocIpFailed, format!("{error} {}", error.code.remedy));
            }
        }
        result
    }
}

impl Drop for AddOutcome<'_> {
    fn drop(&mut self) {
        if !self.is_told {
            let error = self.service.engine.pool_state_view().1.into_iter().next();
            let error = error.unwrap_or_else(|| Error::new(errors::DEADLINE, ""));
            let message = format!("{error} {}", error.code.remedy);
            self.service.kube_writes.record_on_pod(self.pod, Reason::AllocIpFailed, message);
        }
    }
}

/// The gRPC status that carries an error of the catalogue.
fn status(error: &Error) -> Status {
    let code = match error.code {
        errors::CNI_NETNS | errors::CNI_CONFIG | errors::CNI_ENV => Code::InvalidArgument,
        errors::UNKNOWN_ATTACHMENT => Code::NotFound,
        errors::NO_ADDRESS
        | errors::VSWITCH_EXHAUSTED
        | errors::CLOUD_QUOTA
        | errors::ENI_SLOTS_FULL
        | errors::ENI_ADDRESSES_FULL
        | errors::ACCOUNT_ENI_QUOTA
        | errors::SECURITY_GROUP_FULL => Code::ResourceExhausted,
        errors::CHECK_FAILED => Code::FailedPrecondition,
        errors::INTERNAL => Code::Internal,
        _ => Code::Unavailable,
    };
    terway_proto::status(code, &error_detail(error))
}

/// The configuration as the contract writes it.
fn configuration(status: &ConfigStatus) -> v1::Configuration {
    let change = |changed: &KeyChange| v1::ConfigChange {
        key: changed.key.to_owned(),
        old: changed.old.to_string(),
        new: changed.new.to_string(),
        effect: changed.effect.as_str().to_owned(),
    };
    v1::Configuration {
        generation: status.generation,
        applied_at: status.applied_at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        failure: status.failure.as_ref().map(|failure| error_detail(&failure.error)),
        warnings: status.warnings.iter().map(ToString::to_string).collect(),
        pending_restart: status.pending_restart.iter().map(change).collect(),
        last_edit: status.recent.back().into_iter().flat_map(|edit| &edit.changed).map(change).collect(),
    }
}

/// Container ids and interface names become parts of keys, log lines and aliases: the limits of the CNI specification 1.1.0
/// ("Parameters") hold for every caller of the socket, not only for our plugin.
fn key(attachment: Option<v1::Attachment>) -> Result<AttachmentKey, Error> {
    let given = attachment.unwrap_or_default();
    let key = AttachmentKey { network: given.network, container_id: given.container_id, ifname: given.ifname };
    let id_like = |s: &str| {
        s.len() <= 253
            && s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    let ifname_like = |s: &str| {
        (1..=15).contains(&s.len())
            && s != "."
            && s != ".."
            && s.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
    };
    if !id_like(&key.network) {
        return Err(Error::new(errors::CNI_CONFIG, format!("network name {:?} is not valid", key.network)));
    }
    if !id_like(&key.container_id) {
        return Err(Error::new(errors::CNI_ENV, format!("container id {:?} is not valid", key.container_id)));
    }
    if !ifname_like(&key.ifname) {
        return Err(Error::new(errors::CNI_ENV, format!("interface name {:?} is not valid", key.ifname)));
    }
    Ok(key)
}

/// The stream of flow events of one client: the recent ones, then, if `follow` is set, live ones that the filter takes. A client that
/// lags misses some; drops are counted in any case.
fn event_stream(
    (recent, live): RecentAndLive,
    follow: bool,
    filter: Filter,
) -> Pin<Box<dyn Stream<Item = Arc<v1::FlowEvent>> + Send>> {
    let recent = tokio_stream::iter(recent);
    let Some(live) = live.filter(|_| follow) else { return Box::pin(recent) };
    let live = BroadcastStream::new(live).filter_map(Result::ok).filter(move |event| filter.takes(event));
    Box::pin(recent.chain(live))
}

#[tonic::async_trait]
impl NodeNetwork for Service {
    async fn add_pod(&self, request: Request<v1::AddPodRequest>) -> Result<Response<v1::AddPodResponse>, Status> {
        let start = Instant::now();
        let request = request.into_inner();
        let pod = request.pod.unwrap_or_default();
        let add = async {
            let add = AddRequest {
                key: key(request.attachment)?,
                pod: PodRef { namespace: pod.namespace, name: pod.name, uid: pod.uid },
                netns: request.netns,
                mtu: (request.mtu > 0).then_some(request.mtu),
            };
            let (key, pod) = (add.key.clone(), add.pod.clone());
            let outcome = AddOutcome::new(self, &pod, start);
            let added = async {
                self.services_synced().await?;
                self.engine.add(add).await
            };
            let network = outcome.tell(added.await)?;
            let addresses: Vec<&str> = network.addresses.iter().map(|a| a.cidr.as_str()).collect();
            info!(%pod, container = key.container_id, eni = network.eni, ?addresses, took = ?start.elapsed(), "pod added");
            Ok(v1::AddPodResponse { network: Some(network) })
        };
        self.call("AddPod", add).await
    }

    async fn del_pod(&self, request: Request<v1::DelPodRequest>) -> Result<Response<v1::DelPodResponse>, Status> {
        let start = Instant::now();
        let del = async {
            let key = key(request.into_inner().attachment)?;
            self.engine.del(key.clone()).await?;
            info!(container = key.container_id, ifname = key.ifname, took = ?start.elapsed(), "pod deleted");
            Ok(v1::DelPodResponse {})
        };
        self.call("DelPod", del).await
    }

    async fn check_pod(&self, request: Request<v1::CheckPodRequest>) -> Result<Response<v1::CheckPodResponse>, Status> {
        let request = request.into_inner();
        let check = async {
            self.engine.check(key(request.attachment)?, request.netns, request.addresses).await?;
            Ok(v1::CheckPodResponse {})
        };
        self.call("CheckPod", check).await
    }

    async fn gc_pods(&self, request: Request<v1::GcPodsRequest>) -> Result<Response<v1::GcPodsResponse>, Status> {
        let request = request.into_inner();
        let gc = async {
            let valid = request.valid.into_iter().map(|a| key(Some(a))).collect::<Result<Vec<_>, _>>()?;
            let removed = self.engine.gc(request.network, valid).await?;
            Ok(v1::GcPodsResponse { removed: removed.iter().map(attachment).collect() })
        };
        self.call("GcPods", gc).await
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let report = async {
            let mut status = self.engine.status();
            let configuration = configuration(&self.source.status());
            status.problems.extend(configuration.failure.clone());
            status.problems.extend(self.source.problem().iter().map(error_detail));
            status.configuration = Some(configuration);
            status.problems.extend(self.objects.problems().iter().map(error_detail));
            status.problems.extend(self.services.problems().iter().map(error_detail));
            status.problems.extend(self.kube_writes.problems().iter().map(error_detail));
            status.problems.extend(self.conflist.problem().iter().map(error_detail));
            status.problems.extend(self.http.problem().iter().map(error_detail));
            status.problems.extend(supervise::problems().iter().map(error_detail));
            status.socket_path = Some(grpc::services::socket_path(&self.services.socket_path().await));
            let (policy, problems) = self.policies.status().await;
            status.problems.extend(problems.iter().map(error_detail));
            status.policy = Some(grpc::policy::status(&policy));
            Ok(status)
        };
        self.call("Status", report).await
    }

    async fn list_services(
        &self,
        request: Request<v1::ListServicesRequest>,
    ) -> Result<Response<v1::ListServicesResponse>, Status> {
        let v1::ListServicesRequest { namespace, name } = request.into_inner();
        let list = async { Ok(grpc::services::list(&self.services.list(namespace, name).await)) };
        self.call("ListServices", list).await
    }

    async fn list_policies(
        &self,
        request: Request<v1::ListPoliciesRequest>,
    ) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        let v1::ListPoliciesRequest { namespace, name } = request.into_inner();
        let list = async { Ok(grpc::policy::list(&self.policies.list(namespace, name).await)) };
        self.call("ListPolicies", list).await
    }

    async fn explain_policy(
        &self,
        request: Request<v1::ExplainPolicyRequest>,
    ) -> Result<Response<v1::ExplainPolicyResponse>, Status> {
        let explain = async {
            let explained = match grpc::policy::connection(&request.into_inner()) {
                Ok(connection) => self.policies.explain(connection).await,
                Err(problem) => Err(problem),
            };
            Ok(grpc::policy::explanations(explained))
        };
        self.call("ExplainPolicy", explain).await
    }

    async fn list_flows(
        &self,
        request: Request<v1::ListFlowsRequest>,
    ) -> Result<Response<v1::ListFlowsResponse>, Status> {
        self.call("ListFlows", self.engine.flows(request.into_inner())).await
    }

    async fn flush_flows(
        &self,
        request: Request<v1::FlushFlowsRequest>,
    ) -> Result<Response<v1::FlushFlowsResponse>, Status> {
        let flush = async {
            let reply = self.engine.flush_flows(request.into_inner().filter).await?;
            info!(deleted = reply.deleted, "flows flushed");
            Ok(reply)
        };
        self.call("FlushFlows", flush).await
    }

    async fn flow_stats(&self, _: Request<v1::FlowStatsRequest>) -> Result<Response<v1::FlowStatsResponse>, Status> {
        let stats = async {
            let tracking = Some(self.conntrack.view());
            Ok(v1::FlowStatsResponse { tracking, ..self.engine.flow_stats().await? })
        };
        self.call("FlowStats", stats).await
    }

    async fn set_datapath_log(
        &self,
        request: Request<v1::SetDatapathLogRequest>,
    ) -> Result<Response<v1::SetDatapathLogResponse>, Status> {
        let switch = async {
            if let Some(enabled) = request.into_inner().enabled {
                self.datapath_log.switch(enabled).await?;
            }
            Ok(v1::SetDatapathLogResponse { enabled: self.datapath_log.is_enabled() })
        };
        self.call("SetDatapathLog", switch).await
    }

    type WatchDropsStream = Pin<Box<dyn Stream<Item = Result<v1::DroppedPacket, Status>> + Send>>;

    async fn watch_drops(
        &self,
        request: Request<v1::WatchDropsRequest>,
    ) -> Result<Response<Self::WatchDropsStream>, Status> {
        let events = event_stream(self.engine.drops(), request.into_inner().follow, Filter::drops());
        Ok(Response::new(Box::pin(events.map(|event| Ok(dropped_packet(&event))))))
    }

    type WatchFlowsStream = Pin<Box<dyn Stream<Item = Result<v1::FlowEvent, Status>> + Send>>;

    async fn watch_flows(
        &self,
        request: Request<v1::WatchFlowsRequest>,
    ) -> Result<Response<Self::WatchFlowsStream>, Status> {
        let request = request.into_inner();
        let filter = Filter::of(&request).map_err(|error| status(&error))?;
        let last = match request.last {
            0 => usize::MAX,
            last => last as usize,
        };
        let events = event_stream(self.engine.flow_events(&filter, last), request.follow, filter);
        Ok(Response::new(Box::pin(events.map(|event| Ok(Arc::unwrap_or_clone(event))))))
    }

    async fn get_pool(&self, request: Request<v1::GetPoolRequest>) -> Result<Response<v1::GetPoolResponse>, Status> {
        let pool = async { Ok(self.engine.pool(request.into_inner().ask_cloud).await) };
        self.call("GetPool", pool).await
    }

    async fn get_mapping(
        &self,
        request: Request<v1::GetMappingRequest>,
    ) -> Result<Response<v1::GetMappingResponse>, Status> {
        let mapping = async { Ok(self.engine.mapping(!request.into_inner().skip_cloud).await) };
        self.call("GetMapping", mapping).await
    }

    async fn get_metadata(
        &self,
        _: Request<v1::GetMetadataRequest>,
    ) -> Result<Response<v1::GetMetadataResponse>, Status> {
        self.call("GetMetadata", async { Ok(self.engine.metadata().await) }).await
    }

    async fn list_pods(&self, _: Request<v1::ListPodsRequest>) -> Result<Response<v1::ListPodsResponse>, Status> {
        self.call("ListPods", async { Ok(v1::ListPodsResponse { pods: self.engine.list() }) }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(network: &str, container_id: &str, ifname: &str) -> Option<v1::Attachment> {
        Some(v1::Attachment { network: network.into(), container_id: container_id.into(), ifname: ifname.into() })
    }

    #[test]
    fn keys_are_checked_for_every_caller() {
        assert!(key(attachment("terway", "abc_1.2-3", "eth0")).is_ok());
        for bad in [
            None,
            attachment("", "abc", "eth0"),
            attachment("terway", "../x", "eth0"),
            attachment("terway", "a/b", "eth0"),
            attachment("terway", "abc", ""),
            attachment("terway", "abc", ".."),
            attachment("terway", "abc", "a/b"),
            attachment("terway", "abc", "sixteen-letters!"),
            attachment("terway", "abc", "et h0"),
        ] {
            assert!(key(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
