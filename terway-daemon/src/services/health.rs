//! Health checks (`healthCheckNodePort`): for a Service with `externalTrafficPolicy: Local` the node answers by HTTP with its number of ready
//! endpoints, so that load balancers send to nodes that have one.
//!
//! The response equals kube-proxy's (pkg/proxy/healthcheck/service_health.go), for which load balancers are configured.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt, socket, sockopt,
};
use parking_lot::{Mutex, MutexGuard};
use serde_json::json;
use std::os::fd::AsRawFd as _;
use terway_core::errors::{self, Error};
use terway_core::objects::ObjectName;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::supervise;

/// The interval at which a port that is in use is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The backlog of connections, as axum's own listeners have it.
const BACKLOG: i32 = 128;

/// Health-check ports, each with its Service and the number of ready endpoints on this node.
pub(super) type Ports = BTreeMap<u16, (ObjectName, u32)>;

/// The state that health checks report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Health {
    pub(super) ports: Ports,
    /// Whether the maps are up to date.
    pub(super) in_force: bool,
}

/// Health-check ports that cannot be bound, with the reason.
#[derive(Debug, Default)]
pub(super) struct UnboundPorts(Mutex<BTreeMap<u16, Error>>);

impl UnboundPorts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, Error>> {
        self.0.lock()
    }

    /// One error for each port that is not served.
    pub(super) fn problems(&self) -> Vec<Error> {
        self.lock().values().cloned().collect()
    }
}

/// A server of a health-check port, closed when dropped: the task owns the listener.
struct OpenPort(JoinHandle<()>);

impl Drop for OpenPort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Opens and closes health-check ports as Services come and go. Runs until the sender is gone.
pub(super) async fn serve(mut state: watch::Receiver<Health>, unbound: Arc<UnboundPorts>) {
    let mut open: BTreeMap<u16, OpenPort> = BTreeMap::new();
    loop {
        let ports = state.borrow_and_update().ports.clone();
        open.retain(|port, _| {
            let keep = ports.contains_key(port);
            if !keep {
                info!(port, "closed a health-check port");
            }
            keep
        });
        unbound.lock().retain(|port, _| ports.contains_key(port));
        for (port, (service, _)) in &ports {
            if open.contains_key(port) {
                continue;
            }
            match listener(*port) {
                Ok(listener) => {
                    unbound.lock().remove(port);
                    info!(port, %service, "opened a health-check port");
                    let server = answer(listener, *port, state.clone());
                    open.insert(*port, OpenPort(supervise::spawn_contained("health-check", server)));
                }
                Err(error) => {
                    let error = Error::new(errors::HEALTH_PORT, format!("port {port} of Service {service}: {error}."));
                    if unbound.lock().insert(*port, error.clone()).is_none() {
                        warn!(%error, "cannot open a health-check port");
                    }
                }
            }
        }
        let waiting = !unbound.lock().is_empty();
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY_INTERVAL), if waiting => {}
        }
    }
}

/// A socket on all of the node's addresses, of both families where the node has both.
fn listener(port: u16) -> io::Result<TcpListener> {
    let made = socket_of(AddressFamily::Inet6, port).or_else(|error| match error.raw_os_error() {
        // No IPv6 here.
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => socket_of(AddressFamily::Inet, port),
        _ => Err(error),
    })?;
    TcpListener::from_std(made)
}

fn socket_of(family: AddressFamily, port: u16) -> io::Result<std::net::TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    // A restart must not wait for connections in TIME-WAIT.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if family == AddressFamily::Inet6 {
        setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        if let SocketAddr::V6(any) = any {
            bind(fd.as_raw_fd(), &SockaddrIn6::from(any))?;
        }
    } else {
        bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)))?;
    }
    listen(&fd, nix::sys::socket::Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

async fn answer(listener: TcpListener, port: u16, state: watch::Receiver<Health>) {
    // Any path and any method, as kube-proxy has it.
    let router = Router::new().fallback(move || {
        let reply = reply(&state.borrow(), port);
        async move { reply }
    });
    if let Err(error) = axum::serve(listener, router).await {
        warn!(port, %error, "the health-check server failed");
    }
}

fn reply(health: &Health, port: u16) -> Response {
    let Some((service, endpoints)) = health.ports.get(&port) else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let body = json!({
        "service": {"namespace": *service.namespace, "name": *service.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": health.in_force,
    });
    let good = *endpoints > 0 && health.in_force;
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (HeaderName::from_static("x-load-balancing-endpoint-weight"), HeaderValue::from(*endpoints)),
    ];
    (status, headers, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_check_fails_without_endpoints_or_with_stale_maps() {
        for (endpoints, in_force, status) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let ports = [(30_000, (ObjectName::new("ns", "web"), endpoints))].into();
            let reply = reply(&Health { ports, in_force }, 30_000);
            assert_eq!(reply.status().as_u16(), status);
            assert_eq!(reply.headers()["x-load-balancing-endpoint-weight"], endpoints.to_string().as_str());
        }
        assert_eq!(reply(&Health::default(), 30_000).status(), 503);
    }
}
