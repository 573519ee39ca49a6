//! Calls to the daemon, and what their failures mean for the exit code.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use terway_proto::v1::node_network_client::NodeNetworkClient;
use terway_proto::{ANSWER_BYTES, v1};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use super::Cli;

/// A reply that takes longer will not come. The cloud's part of an answer may take some seconds.
const REPLY_WITHIN: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The daemon answered with an error, or knows no such thing.
    #[error("{0}")]
    Refused(String),
    /// The daemon did not answer.
    #[error("{0}")]
    Unreachable(String),
}

impl Failure {
    /// The exit code of `terway-cli`.
    pub(super) fn code(&self) -> ExitCode {
        match self {
            Self::Refused(_) => ExitCode::FAILURE,
            Self::Usage(_) => ExitCode::from(2),
            Self::Unreachable(_) => ExitCode::from(3),
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        match terway_proto::detail(&status) {
            Some(detail) => {
                Self::Refused(format!("{}: {} {} {}", detail.code, detail.cause, detail.detail, detail.remedy))
            }
            None if status.code() == tonic::Code::Unimplemented => {
                Self::Refused("the daemon is of another version and does not know this call".to_owned())
            }
            None => Self::Unreachable(format!("the daemon did not answer: {}", status.message())),
        }
    }
}

/// One call and its reply.
pub(super) async fn call<Q, A, F>(
    cli: &Cli,
    request: Q,
    ask: impl FnOnce(NodeNetworkClient<Channel>, Q) -> F,
) -> Result<A, Failure>
where
    F: Future<Output = Result<Response<A>, Status>>,
{
    let client = connect(cli, Some(REPLY_WITHIN)).await?;
    Ok(ask(client, request).await?.into_inner())
}

/// ENIs and vSwitches, with the cloud's part.
pub(super) async fn pool(cli: &Cli) -> Result<v1::GetPoolResponse, Failure> {
    call(cli, v1::GetPoolRequest { ask_cloud: true }, |mut c, r| async move { c.get_pool(r).await }).await
}

/// The comparison.
pub(super) async fn mapping(cli: &Cli, skip_cloud: bool) -> Result<v1::GetMappingResponse, Failure> {
    call(cli, v1::GetMappingRequest { skip_cloud }, |mut c, r| async move { c.get_mapping(r).await }).await
}

/// The stream of dropped packets, however long it lasts.
pub(super) async fn drops(cli: &Cli, request: v1::WatchDropsRequest) -> Result<Streaming<v1::DroppedPacket>, Failure> {
    Ok(connect(cli, None).await?.watch_drops(request).await?.into_inner())
}

/// The stream of flow events, however long it lasts.
pub(super) async fn flows(cli: &Cli, request: v1::WatchFlowsRequest) -> Result<Streaming<v1::FlowEvent>, Failure> {
    Ok(connect(cli, None).await?.watch_flows(request).await?.into_inner())
}

async fn connect(cli: &Cli, within: Option<Duration>) -> Result<NodeNetworkClient<Channel>, Failure> {
    let path = cli.socket.display();
    let mut endpoint = Endpoint::try_from(format!("unix://{path}"))
        .map_err(|error| Failure::Usage(format!("{path}: {error}")))?
        .connect_timeout(CONNECT_WITHIN);
    if let Some(within) = within {
        endpoint = endpoint.timeout(within);
    }
    let channel = endpoint.connect().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})")).unwrap_or_default();
        Failure::Unreachable(format!(
            "the daemon does not answer on {path}; is terwayd running, and are you root?{cause}"
        ))
    })?;
    Ok(NodeNetworkClient::new(channel).max_decoding_message_size(ANSWER_BYTES))
}
