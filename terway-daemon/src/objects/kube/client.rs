//! The HTTP client of the API server: one HTTP/2 connection, fail-over between servers, and credentials that are read again.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::{HttpConnector, HttpInfo};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder};
use tower_http::decompression::DecompressionLayer;

use super::decode::Status;
use super::servers::Servers;

/// The time for connecting, shared by the addresses that are tried one after the other: fail-over takes no longer.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// A silent connection is pinged after this time …
const PING_AFTER: Duration = Duration::from_secs(15);
/// … and is dead without an answer after this one: noticed within 30 s.
const PING_WITHIN: Duration = Duration::from_secs(15);
/// The time for the head of a reply. A list of a large cluster is made before its first byte is sent.
const HEAD_WITHIN: Duration = Duration::from_secs(60);
/// The time for the next chunk of a list.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);
/// The time for the answer to a write.
const WRITE_WITHIN: Duration = Duration::from_secs(30);
/// The largest reply to a write that is read: an object has at most 1.5 MiB in etcd.
const WRITE_REPLY: usize = 8 << 20;
/// The name that requests carry; the connector resolves every name to [`Servers::in_order`].
const HOST: &str = "kubernetes.default.svc";
/// The largest body of an error that is read.
const ERROR_BODY: usize = 64 << 10;

/// Where credentials and the address of the cluster come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// The service account that Kubernetes mounts into a container.
    InCluster,
    /// A kubeconfig file.
    Kubeconfig(PathBuf),
}

/// Why a request has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The credentials cannot be read or used.
    #[error("credentials: {0}")]
    Credentials(String),
    /// No server could be reached, or the connection broke.
    #[error("{0}")]
    Connection(String),
    /// The server refused.
    #[error("HTTP status {}: {message}", status.as_u16())]
    Status {
        /// The status.
        status: StatusCode,
        /// The server's words.
        message: String,
        /// The pause that it asks for (`Retry-After`, RFC 9110 section 10.2.3).
        retry_after: Option<Duration>,
    },
    /// The reply cannot be used.
    #[error("{0}")]
    Reply(String),
}

impl ApiError {
    /// The HTTP status, if the server answered with an error.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// How the body of a PATCH request is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PatchType {
    /// JSON Merge Patch (RFC 7396).
    Merge,
    /// Kubernetes' own, which merges lists by key.
    Strategic,
    /// JSON Patch (RFC 6902).
    Json,
    /// Server-side apply.
    Apply,
}

impl PatchType {
    const fn content_type(self) -> &'static str {
        match self {
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
            Self::Json => "application/json-patch+json",
            // JSON is YAML.
            Self::Apply => "application/apply-patch+yaml",
        }
    }
}

/// A client of one cluster's API: everything that the daemon asks and writes shares its connection.
pub struct ApiClient {
    credentials: Credentials,
    servers: Arc<Servers>,
    /// None until the first request, and after the server has refused the credentials.
    current: Mutex<Option<kube::Client>>,
}

impl fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiClient").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

impl ApiClient {
    pub(super) fn new(credentials: Credentials, servers: Arc<Servers>) -> Self {
        Self { credentials, servers, current: Mutex::new(None) }
    }

    /// The addresses of the cluster's servers.
    pub(super) const fn servers(&self) -> &Arc<Servers> {
        &self.servers
    }

    /// Sends a GET request. A reply that is not a success is an error.
    ///
    /// `encoded` allows the server to compress the body; a watch must not, because each of its events is to be decoded at once.
    pub(super) async fn get(&self, path: &str, encoded: bool) -> Result<Response<Body>, ApiError> {
        let mut request = Request::get(path)
            .header(header::ACCEPT, "application/json")
            .body(Body::empty())
            .map_err(|error| ApiError::Reply(format!("{path}: {error}")))?;
        if !encoded {
            request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        self.send(request, HEAD_WITHIN).await
    }

    /// Creates an object by a POST request to the path of its collection.
    pub(crate) async fn create(&self, path: &str, object: &serde_json::Value) -> Result<(), ApiError> {
        self.write(Request::post(path).header(header::CONTENT_TYPE, "application/json"), object).await
    }

    /// Changes an object by a PATCH request to its path.
    pub(crate) async fn patch(&self, path: &str, kind: PatchType, patch: &serde_json::Value) -> Result<(), ApiError> {
        self.write(Request::patch(path).header(header::CONTENT_TYPE, kind.content_type()), patch).await
    }

    async fn write(&self, request: http::request::Builder, body: &serde_json::Value) -> Result<(), ApiError> {
        let request = request
            .header(header::ACCEPT, "application/json")
            .body(Body::from(body.to_string().into_bytes()))
            .map_err(|error| ApiError::Reply(error.to_string()))?;
        let reply = self.send(request, WRITE_WITHIN).await?;
        // Read to its end, so that the stream is closed in good order.
        let body = http_body_util::Limited::new(reply.into_body(), WRITE_REPLY).collect();
        // The write has happened, whatever becomes of its reply.
        let _read = timeout(CHUNK_WITHIN, body).await;
        Ok(())
    }

    /// Sends a request. A reply that is not a success is an error.
    async fn send(&self, request: Request<Body>, within: Duration) -> Result<Response<Body>, ApiError> {
        let client = self.client().await?;
        let reply = match timeout(within, client.send(request)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => return Err(ApiError::Connection(chain(&error))),
            Err(_) => {
                // The connection may be dead without a word; the next request makes another one.
                self.forget().await;
                return Err(ApiError::Connection(format!("no answer within {} s", within.as_secs())));
            }
        };
        if let Some(info) = reply.extensions().get::<HttpInfo>() {
            self.servers.answered(info.remote_addr());
        }
        if reply.status().is_success() {
            return Ok(reply);
        }
        if reply.status() == StatusCode::UNAUTHORIZED {
            // A token that was replaced on disk is read with the next request.
            self.forget().await;
        }
        Err(refusal(reply).await)
    }

    /// Closes the connection and reads the credentials again before the next request.
    pub(super) async fn forget(&self) {
        *self.current.lock().await = None;
    }

    async fn client(&self) -> Result<kube::Client, ApiError> {
        let mut current = self.current.lock().await;
        if let Some(client) = &*current {
            return Ok(client.clone());
        }
        let client = self.connect().await?;
        *current = Some(client.clone());
        Ok(client)
    }

    async fn connect(&self) -> Result<kube::Client, ApiError> {
        let bad = |error: &dyn std::error::Error| ApiError::Credentials(chain(error));
        let mut config = match &self.credentials {
            Credentials::InCluster => kube::Config::incluster().map_err(|e| bad(&e))?,
            Credentials::Kubeconfig(path) => {
                let kubeconfig = Kubeconfig::read_from(path).map_err(|e| bad(&e))?;
                let options = KubeConfigOptions::default();
                kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|e| bad(&e))?
            }
        };
        let host = config.cluster_url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = config.cluster_url.port_u16().unwrap_or(443);
        self.note_cluster_address(&host, port).await;
        // The certificate is checked against the name or address that the credentials give, whichever server answers.
        config.tls_server_name.get_or_insert(host);
        let scheme = config.cluster_url.scheme_str().unwrap_or("https");
        config.cluster_url = format!("{scheme}://{HOST}/").parse().map_err(|e| bad(&e))?;

        let servers = Arc::clone(&self.servers);
        let resolve = move |_: Name| {
            let addresses = servers.in_order();
            async move { Ok::<_, io::Error>(addresses.into_iter()) }
        };
        let mut tcp = HttpConnector::new_with_resolver(tower::service_fn(resolve));
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_WITHIN));
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(PING_AFTER));
        let tls = config.rustls_client_config().map_err(|e| bad(&e))?;
        let tls = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
        let name = config.tls_server_name.clone().unwrap_or_default();
        let name = rustls::pki_types::ServerName::try_from(name).map_err(|e| bad(&e))?;
        let tls = tls.with_server_name_resolver(hyper_rustls::FixedServerNameResolver::new(name));
        let connector = tls.enable_http1().enable_http2().wrap_connector(tcp);
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .http2_keep_alive_interval(PING_AFTER)
            .http2_keep_alive_timeout(PING_WITHIN)
            .http2_keep_alive_while_idle(true)
            .http2_adaptive_window(true)
            .build(connector);
        let auth = config.auth_layer().map_err(|e| bad(&e))?;
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .layer(DecompressionLayer::new().no_br().no_deflate().no_zstd())
            .option_layer(auth)
            .map_err(BoxError::from)
            .service(http);
        Ok(kube::Client::new(service, config.default_namespace))
    }

    /// What the credentials say about the cluster's address: a real one of a kubeconfig, or the ClusterIP that a container is told.
    async fn note_cluster_address(&self, host: &str, port: u16) {
        let addresses: Vec<SocketAddr> =
            tokio::net::lookup_host((host, port)).await.map(Iterator::collect).unwrap_or_default();
        match self.credentials {
            Credentials::InCluster => self.servers.set_cluster_ip(addresses.first().copied()),
            Credentials::Kubeconfig(_) => self.servers.add_configured(&addresses),
        }
    }
}

async fn refusal(reply: Response<Body>) -> ApiError {
    let status = reply.status();
    let seconds = reply.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let body = http_body_util::Limited::new(reply.into_body(), ERROR_BODY).collect();
    let body = timeout(CHUNK_WITHIN, body).await.ok().and_then(Result::ok).map(|body| body.to_bytes());
    let message =
        body.as_deref().and_then(|body| serde_json::from_slice::<Status>(body).ok()).map(|status| status.message);
    let canonical = || status.canonical_reason().unwrap_or("unknown").to_owned();
    ApiError::Status {
        status,
        message: message.filter(|message| !message.is_empty()).unwrap_or_else(canonical),
        retry_after: seconds.map(Duration::from_secs),
    }
}

/// Forwards the chunks of a body until it ends, is silent for too long, or the receiver is gone.
pub(super) async fn forward(body: Body, chunks: mpsc::Sender<io::Result<Bytes>>) {
    let mut body = body;
    loop {
        let chunk = match timeout(CHUNK_WITHIN, body.frame()).await {
            Ok(None) => return,
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => Ok(data),
                // Trailers.
                Err(_) => continue,
            },
            Ok(Some(Err(error))) => Err(io::Error::other(chain(&error))),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the server stopped in the middle of a list")),
        };
        let failed = chunk.is_err();
        if chunks.send(chunk).await.is_err() || failed {
            return;
        }
    }
}

/// An error with its causes; layers of the client say the same thing more than once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
