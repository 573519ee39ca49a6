//! A scripted daemon: the contract served from memory, which does as it is told: be slow, refuse, break off, vanish.
//!
//! It stands in for `terwayd` only where a real one cannot be told to misbehave. It sets up no network; suites with a network
//! use the real one. It follows the queue protocol of `terway_core::cni::queue`, so that the plugin's half is tested.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use terway_core::cni::queue::{QueuedDel, SUFFIX};
use terway_core::errors::{self, Code};
use terway_proto::v1;
use terway_proto::v1::node_network_server::{NodeNetwork, NodeNetworkServer};
use terway_proto::v1::{
    AddPodRequest, AddPodResponse, Address, Attachment, CheckPodRequest, CheckPodResponse, DelPodRequest,
    DelPodResponse, DroppedPacket, ErrorDetail, GcPodsRequest, GcPodsResponse, ListPodsRequest, ListPodsResponse,
    Network, Route, StatusRequest, StatusResponse, WatchDropsRequest,
};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// What the next calls are to meet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    /// Answers wait until this is over.
    pub(crate) slow: bool,
    /// Calls are refused with this.
    pub(crate) refusal: Option<ErrorDetail>,
    /// The next call ends the connection, as the death of the daemon would.
    pub(crate) break_off: bool,
    /// The answer to STATUS; none is a ready node.
    pub(crate) status: Option<StatusResponse>,
}

/// A call that arrived.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Seen {
    Add(AddPodRequest, Option<Duration>),
    Del(DelPodRequest),
    Check(CheckPodRequest),
    Gc(GcPodsRequest),
    Status,
}

#[derive(Debug, Default)]
struct State {
    script: Script,
    seen: Vec<Seen>,
    attachments: BTreeMap<String, (Attachment, u8)>,
    /// Last octet of the addresses handed out.
    used: u8,
    runtime: Option<Runtime>,
}

/// The daemon, its folder and its socket.
#[derive(Clone, Debug)]
pub(crate) struct ScriptedDaemon {
    state: Arc<Mutex<State>>,
    socket: PathBuf,
    queue: PathBuf,
}

impl ScriptedDaemon {
    /// A daemon in `folder` that has been started.
    pub(crate) fn new(folder: &Path) -> Self {
        let daemon = Self { state: Arc::default(), socket: folder.join("t.sock"), queue: folder.join("queue") };
        daemon.start();
        daemon
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn queue(&self) -> &Path {
        &self.queue
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.state().script);
    }

    /// The calls since the last look.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }

    pub(crate) fn holds(&self, container_id: &str) -> bool {
        self.state().attachments.values().any(|(attachment, _)| attachment.container_id == container_id)
    }

    /// Ends all connections and leaves the socket's file behind, as SIGKILL does.
    pub(crate) fn stop(&self) {
        let runtime = self.state().runtime.take();
        if let Some(runtime) = runtime {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// Listens, carries out what is queued, then serves, and looks into the queue from time to time.
    pub(crate) fn start(&self) {
        let listener = self.listen();
        self.drain();
        self.serve(listener);
    }

    pub(crate) fn listen(&self) -> UnixListener {
        if self.socket.exists() {
            std::fs::remove_file(&self.socket).unwrap();
        }
        let listener = UnixListener::bind(&self.socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    pub(crate) fn serve(&self, listener: UnixListener) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (service, again) = (self.clone(), self.clone());
        runtime.spawn(async move {
            let incoming = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener).unwrap());
            tonic::transport::Server::builder()
                .add_service(NodeNetworkServer::new(service))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                again.drain();
            }
        });
        self.state().runtime = Some(runtime);
    }

    fn drain(&self) {
        for entry in std::fs::read_dir(&self.queue).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.to_str().is_some_and(|path| path.ends_with(SUFFIX))
                && let Ok(content) = std::fs::read(&path)
            {
                let key = QueuedDel::decode(&content).unwrap().attachment.to_string();
                self.state().attachments.remove(&key);
                std::fs::remove_file(&path).unwrap();
            }
        }
    }

    /// Notes a call and does what the script says before its answer.
    async fn meet(&self, seen: Seen) -> Result<(), Status> {
        let script = {
            let mut state = self.state();
            state.seen.push(seen);
            let script = state.script.clone();
            state.script.break_off = false;
            script
        };
        if script.break_off {
            // From a thread of its own, since a runtime cannot be ended from within.
            let daemon = self.clone();
            std::thread::spawn(move || {
                daemon.stop();
                daemon.start();
            });
            return std::future::pending().await;
        }
        while self.state().script.slow {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        match script.refusal {
            Some(detail) => Err(terway_proto::status(tonic::Code::FailedPrecondition, &detail)),
            None => Ok(()),
        }
    }
}

/// An error of the catalogue as the daemon sends it.
pub(crate) fn detail(code: Code, particulars: &str) -> ErrorDetail {
    ErrorDetail {
        code: code.id.to_owned(),
        cause: code.cause.to_owned(),
        remedy: code.remedy.to_owned(),
        detail: particulars.to_owned(),
        cni_code: code.cni,
    }
}

fn key(attachment: Option<&Attachment>) -> String {
    attachment.map(|a| format!("{}/{}/{}", a.network, a.container_id, a.ifname)).unwrap_or_default()
}

fn network(octet: u8) -> Network {
    let address = |cidr: String, gateway: &str| Address { cidr, gateway: gateway.to_owned() };
    let route = |dst: &str, gw: &str| Route { dst: dst.to_owned(), gw: gw.to_owned() };
    Network {
        host_ifname: format!("calimatrix{octet}"),
        host_mac: "02:00:00:00:00:01".to_owned(),
        pod_mac: "02:00:00:00:00:02".to_owned(),
        mtu: 8500,
        addresses: vec![
            address(format!("10.9.0.{octet}/32"), "169.254.1.1"),
            address(format!("fd00:9::{octet:x}/128"), "fe80::1"),
        ],
        routes: vec![route("169.254.1.1/32", ""), route("0.0.0.0/0", "169.254.1.1"), route("::/0", "fe80::1")],
        eni: "eni-scripted".to_owned(),
    }
}

#[tonic::async_trait]
impl NodeNetwork for ScriptedDaemon {
    async fn add_pod(&self, request: Request<AddPodRequest>) -> Result<Response<AddPodResponse>, Status> {
        let timeout = request.metadata().get("grpc-timeout").and_then(|text| text.to_str().ok()).and_then(timeout);
        let request = request.into_inner();
        self.meet(Seen::Add(request.clone(), timeout)).await?;
        let mut state = self.state();
        let next = state.used.wrapping_add(1);
        let attachment = request.attachment.clone().unwrap_or_default();
        let octet = state.attachments.entry(key(Some(&attachment))).or_insert((attachment, next)).1;
        state.used = next;
        Ok(Response::new(AddPodResponse { network: Some(network(octet)) }))
    }

    async fn del_pod(&self, request: Request<DelPodRequest>) -> Result<Response<DelPodResponse>, Status> {
        let request = request.into_inner();
        self.meet(Seen::Del(request.clone())).await?;
        self.state().attachments.remove(&key(request.attachment.as_ref()));
        Ok(Response::new(DelPodResponse {}))
    }

    async fn check_pod(&self, request: Request<CheckPodRequest>) -> Result<Response<CheckPodResponse>, Status> {
        let request = request.into_inner();
        self.meet(Seen::Check(request.clone())).await?;
        let state = self.state();
        let Some((_, octet)) = state.attachments.get(&key(request.attachment.as_ref())) else {
            return Err(terway_proto::status(tonic::Code::NotFound, &detail(errors::UNKNOWN_ATTACHMENT, "")));
        };
        let expected: Vec<String> = network(*octet).addresses.into_iter().map(|address| address.cidr).collect();
        if request.addresses == expected {
            Ok(Response::new(CheckPodResponse {}))
        } else {
            let particulars = format!("{:?} instead of {expected:?}.", request.addresses);
            Err(terway_proto::status(tonic::Code::FailedPrecondition, &detail(errors::CHECK_FAILED, &particulars)))
        }
    }

    async fn gc_pods(&self, request: Request<GcPodsRequest>) -> Result<Response<GcPodsResponse>, Status> {
        let request = request.into_inner();
        self.meet(Seen::Gc(request.clone())).await?;
        let keep =
            |attachment: &Attachment| attachment.network != request.network || request.valid.contains(attachment);
        self.state().attachments.retain(|_, (attachment, _)| keep(attachment));
        Ok(Response::new(GcPodsResponse { removed: Vec::new() }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.meet(Seen::Status).await?;
        let scripted = self.state().script.status.clone();
        Ok(Response::new(scripted.unwrap_or_else(|| StatusResponse { ready: true, ..StatusResponse::default() })))
    }

    async fn list_pods(&self, _: Request<ListPodsRequest>) -> Result<Response<ListPodsResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn get_pool(&self, _: Request<v1::GetPoolRequest>) -> Result<Response<v1::GetPoolResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn get_mapping(&self, _: Request<v1::GetMappingRequest>) -> Result<Response<v1::GetMappingResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn get_metadata(
        &self,
        _: Request<v1::GetMetadataRequest>,
    ) -> Result<Response<v1::GetMetadataResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn list_services(
        &self,
        _: Request<v1::ListServicesRequest>,
    ) -> Result<Response<v1::ListServicesResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn list_flows(&self, _: Request<v1::ListFlowsRequest>) -> Result<Response<v1::ListFlowsResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn flush_flows(&self, _: Request<v1::FlushFlowsRequest>) -> Result<Response<v1::FlushFlowsResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn list_policies(
        &self,
        _: Request<v1::ListPoliciesRequest>,
    ) -> Result<Response<v1::ListPoliciesResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn explain_policy(
        &self,
        _: Request<v1::ExplainPolicyRequest>,
    ) -> Result<Response<v1::ExplainPolicyResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn flow_stats(&self, _: Request<v1::FlowStatsRequest>) -> Result<Response<v1::FlowStatsResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    async fn set_datapath_log(
        &self,
        _: Request<v1::SetDatapathLogRequest>,
    ) -> Result<Response<v1::SetDatapathLogResponse>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    type WatchDropsStream = tokio_stream::Empty<Result<DroppedPacket, Status>>;

    async fn watch_drops(&self, _: Request<WatchDropsRequest>) -> Result<Response<Self::WatchDropsStream>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }

    type WatchFlowsStream = tokio_stream::Empty<Result<v1::FlowEvent, Status>>;

    async fn watch_flows(&self, _: Request<v1::WatchFlowsRequest>) -> Result<Response<Self::WatchFlowsStream>, Status> {
        Err(Status::unimplemented("the plugin never asks"))
    }
}

/// `grpc-timeout`: a number and a unit (gRPC over HTTP/2, "Requests").
fn timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    match unit {
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}
