//! The HTTP server of the node: `/metrics` for Prometheus, `/healthz` and `/readyz` for the kubelet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use terway_core::errors::{self, Error};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::supervise;

/// Readiness check: whether the daemon could serve an ADD now, or what it waits for.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The first and the longest pause before a failed bind is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The HTTP server of metrics and probes.
pub struct Server {
    listen: SocketAddr,
    registry: Arc<Registry>,
    ready: Ready,
    failure: watch::Sender<Option<Error>>,
}

impl Server {
    /// Makes a server that does not listen yet.
    #[must_use]
    pub fn new(listen: SocketAddr, registry: Arc<Registry>, ready: Ready) -> Arc<Self> {
        Arc::new(Self { listen, registry, ready, failure: watch::Sender::new(None) })
    }

    /// Serves until the process ends. A port that another process holds is tried again: it may be free soon, and a node without metrics is
    /// better than one without pods.
    pub async fn run(self: Arc<Self>) {
        let mut pause = RETRY.0;
        loop {
            let error = match TcpListener::bind(self.listen).await {
                Ok(listener) => {
                    if self.failure.send_replace(None).is_some() {
                        info!(listen = %self.listen, "metrics and health are served now");
                    }
                    pause = RETRY.0;
                    let served =
                        axum::serve(listener, router(Arc::clone(&self.registry), Arc::clone(&self.ready))).await;
                    served.err().unwrap_or_else(|| std::io::Error::other("the listener ended"))
                }
                Err(error) => error,
            };
            let failure = Error::new(errors::HTTP_FAILED, format!("{}: {error}", self.listen));
            warn!(code = failure.code.id, listen = %self.listen, %error, retry_in = ?pause, "failed to serve metrics and health");
            self.failure.send_replace(Some(failure));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// Why the server does not listen, for `terway-cli status`.
    #[must_use]
    pub fn problem(&self) -> Option<Error> {
        self.failure.borrow().clone()
    }
}

fn router(registry: Arc<Registry>, ready: Ready) -> Router {
    Router::new()
        // Liveness: the process answers. A node whose cloud is away must not be restarted for it.
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || {
                contained(async move {
                    match ready() {
                        Ok(()) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
                        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
                    }
                })
            }),
        )
        .route("/metrics", get(move || contained(async move { metrics(&registry) })))
}

/// A request whose panic is a 500 of its own.
async fn contained(answer: impl Future<Output = Response>) -> Response {
    let answer = supervise::contain("http-request", answer).await;
    answer.unwrap_or_else(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response())
}

fn metrics(registry: &Registry) -> Response {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    /// A port that this process holds until the listener is dropped.
    async fn taken_port() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[tokio::test]
    async fn a_bind_that_fails_is_a_problem_and_tried_again() {
        let (holder, address) = taken_port().await;
        let server = Server::new(address, Arc::default(), Arc::new(|| Ok(())));
        let task = tokio::spawn(Arc::clone(&server).run());
        let mut failure = server.failure.subscribe();
        let error = failure.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!(error.code, errors::HTTP_FAILED);
        assert!(error.detail.contains(&address.to_string()), "{}", error.detail);
        drop(holder);
        failure.wait_for(Option::is_none).await.unwrap();
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
        assert_eq!(server.problem(), None);
        task.abort();
    }

    #[tokio::test]
    async fn a_panic_in_a_request_is_its_own_500_and_the_next_is_served() {
        let (holder, address) = taken_port().await;
        drop(holder);
        let panicked = std::sync::atomic::AtomicBool::new(false);
        let ready: Ready = Arc::new(move || {
            assert!(panicked.swap(true, std::sync::atomic::Ordering::SeqCst), "the first one panics");
            Err("no address".to_owned())
        });
        let server = Server::new(address, Arc::default(), ready);
        let task = tokio::spawn(Arc::clone(&server).run());
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let first = get(address, "/readyz").await;
        assert!(first.starts_with("HTTP/1.0 500") && first.contains("TW0108"), "{first}");
        let second = get(address, "/readyz").await;
        assert!(second.starts_with("HTTP/1.0 503") && second.ends_with("no address\n"), "{second}");
        task.abort();
    }
}
