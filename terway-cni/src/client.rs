//! One gRPC call over the daemon's unix socket, within a deadline.
//!
//! Plain HTTP/2 on one socket, on the calling thread: the time from exec to exit is what a pod waits for.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use terway_core::cni::{Failure, NetConf, Verb};
use terway_core::errors::{DAEMON_UNREACHABLE, DEADLINE, Error, INTERNAL};
use terway_proto::v1::node_network_client::NodeNetworkClient;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::{Code, Request, Response, Status};

/// First pause before another attempt to connect; doubles up to `PAUSE_MAX`.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// How often a call is sent whose connection broke under way: a daemon that is being replaced breaks it once.
const ATTEMPTS: u32 = 3;

/// What the daemon gets less than the plugin waits, so that its own word on the delay arrives.
const ANSWER_TIME: Duration = Duration::from_millis(50);

/// The time of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// When the answer has to be on stdout.
    deadline: Instant,
    /// How long the plugin waits for a daemon that does not listen.
    connect: Duration,
}

impl Budget {
    /// The time of `verb`, counted from the plugin's start.
    ///
    /// kubelet gives up RunPodSandbox after 240 s and every other call after 120 s (runtimeRequestTimeout, doubled for sandboxes), and
    /// containerd kills the plugin then; an answer of our own says more. An ADD waits for a daemon that restarts: after an error kubelet
    /// tries again only ten seconds later. A DEL and a STATUS are better answered soon: the one can be queued, the other holds up the
    /// node's status.
    pub(crate) fn new(verb: Verb, conf: &NetConf, started: Instant) -> Self {
        let (whole, connect) = match verb {
            Verb::Add => (110_000, 8_000),
            Verb::Del => (30_000, 500),
            Verb::Check => (30_000, 2_000),
            Verb::Gc => (60_000, 2_000),
            Verb::Status | Verb::Version => (1_500, 700),
        };
        let whole = conf.timeout.unwrap_or(Duration::from_millis(whole));
        Self { deadline: started + whole, connect: Duration::from_millis(connect).min(whole / 2) }
    }

    /// The same operation, for a daemon that is known to be away: one attempt.
    pub(crate) fn without_waiting(self) -> Self {
        Self { connect: Duration::ZERO, ..self }
    }

    fn left(self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum CallError {
    /// No process listens on the socket.
    Unreachable(String),
    /// The connection broke under way: the daemon died, or is being replaced.
    Broken(String),
    /// The deadline has passed.
    Late,
    /// The daemon answered with an error.
    Refused(Failure),
}

impl CallError {
    /// The error of the catalogue that the runtime is told.
    pub(crate) fn failure(self, socket: &str) -> Failure {
        match self {
            Self::Unreachable(reason) | Self::Broken(reason) => {
                Error::new(DAEMON_UNREACHABLE, format!("{socket}: {reason}.")).into()
            }
            Self::Late => Error::new(DEADLINE, format!("{socket}: no answer in time.")).into(),
            Self::Refused(failure) => failure,
        }
    }
}

/// Client of the contract over one connection.
pub(crate) type Client = NodeNetworkClient<Connection>;

/// Sends one call, again where the connection broke: all calls of the contract may be repeated.
pub(crate) async fn call<M, R, F>(
    socket: &str,
    budget: Budget,
    message: M,
    send: impl Fn(Client, Request<M>) -> F,
) -> Result<R, CallError>
where
    M: Clone,
    F: Future<Output = Result<Response<R>, Status>>,
{
    let mut attempt = 1;
    loop {
        let whole = async {
            let client = connect(Path::new(socket), budget).await?;
            let mut request = Request::new(message.clone());
            request.set_timeout(budget.left().saturating_sub(ANSWER_TIME));
            send(client, request).await.map(Response::into_inner).map_err(classify)
        };
        match tokio::time::timeout(budget.left(), whole).await {
            Err(_elapsed) => return Err(CallError::Late),
            Ok(Err(CallError::Broken(_))) if attempt < ATTEMPTS => attempt += 1,
            Ok(answer) => return answer,
        }
    }
}

/// Connects, waiting a while for a daemon that is being started.
async fn connect(socket: &Path, budget: Budget) -> Result<Client, CallError> {
    let until = Instant::now() + budget.connect;
    let mut pause = PAUSE_MIN;
    let stream = loop {
        let error = match UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            Err(error) => error,
        };
        if !is_transient(&error) || Instant::now() + pause > until {
            return Err(CallError::Unreachable(error.to_string()));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    };
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| CallError::Broken(error.to_string()))?;
    // Ends with the runtime; its errors show in the call.
    tokio::spawn(connection);
    Ok(NodeNetworkClient::with_origin(Connection(sender), http::Uri::from_static("http://terway")))
}

/// Errors of a daemon that restarts: no socket yet, the socket of its predecessor, or a full backlog (unix(7)).
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

/// Tells the daemon's own errors from failures of the connection.
fn classify(status: Status) -> CallError {
    if let Some(detail) = terway_proto::detail(&status) {
        return CallError::Refused(Failure::from_parts(
            detail.cni_code,
            &detail.code,
            &detail.cause,
            &detail.detail,
            &detail.remedy,
        ));
    }
    // A status with a source was made on this side, out of an error of the connection.
    let local = std::error::Error::source(&status).is_some();
    match status.code() {
        Code::DeadlineExceeded => CallError::Late,
        Code::Unavailable => CallError::Broken(status.message().to_owned()),
        // A server whose `grpc-timeout` has passed answers Cancelled (tonic's server does).
        Code::Cancelled if !local => CallError::Late,
        _ if local => CallError::Broken(status.message().to_owned()),
        code => CallError::Refused(
            Error::new(INTERNAL, format!("The daemon answered {code:?}: {}.", status.message())).into(),
        ),
    }
}

/// The connection, in the shape that the generated client wants.
#[derive(Debug)]
pub(crate) struct Connection(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
