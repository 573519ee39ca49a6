//! Phase "serve": the gRPC server, until a signal or a failure ends the daemon.

use std::sync::Arc;
use std::time::Duration;

use terway_core::errors::{self, Error};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::actors::Actors;
use super::background::Background;
use crate::config_source::ConfigSource;
use crate::conflist::Conflist;
use crate::kube_writes::NodeState;
use crate::metrics::Metrics;
use crate::server::Service;
use crate::socket;
use crate::supervise;

/// How long calls under way may take after SIGTERM.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Serves the socket, writes the conflist, which tells the runtime that the node can take pods, and waits for the end.
pub(super) async fn until_stopped(
    listener: UnixListener,
    source: &Arc<ConfigSource>,
    actors: &Actors,
    background: &Background,
    conflist: &Arc<Conflist>,
    metrics: &Metrics,
    serving: impl FnOnce(),
) -> Result<(), Error> {
    // Before it serves: who asks it to stop as soon as it does gets an orderly stop.
    let signalled = signalled();
    let (stop, stopped) = oneshot::channel::<()>();
    let service = Service {
        engine: Arc::clone(&actors.engine),
        source: Arc::clone(source),
        objects: Arc::clone(&actors.feed),
        services: Arc::clone(&actors.services),
        conntrack: Arc::clone(&actors.conntrack),
        policies: Arc::clone(&actors.policies),
        http: Arc::clone(&background.http),
        conflist: Arc::clone(conflist),
        datapath_log: Arc::clone(&background.datapath_log),
        metrics: metrics.clone(),
        kube_writes: Arc::clone(&actors.kube_writes),
    };
    let server = tonic::transport::Server::builder().add_service(service.into_server());
    let until_stopped = async {
        let _ = stopped.await;
    };
    let server = server.serve_with_incoming_shutdown(socket::trusted(listener), until_stopped);
    let mut server = supervise::spawn("grpc-server", server);
    conflist.write()?;
    supervise::spawn_restarting("conflist", {
        let conflist = Arc::clone(conflist);
        move || Arc::clone(&conflist).run()
    });
    actors.kube_writes.start(&(Arc::new(actors.node_state()) as Arc<dyn NodeState>));
    serving();

    let outcome = tokio::select! {
        () = signalled => Ok(()),
        reason = actors.engine.failed() => Err(reason),
        ended = &mut server => return Err(Error::new(errors::INTERNAL, format!("the gRPC server ended: {ended:?}"))),
    };
    // Pods keep their network: programs stay attached, maps and links stay pinned, the conflist stays in place.
    actors.engine.close_flow_streams();
    let _ = stop.send(());
    if tokio::time::timeout(STOP_WITHIN, server).await.is_err() {
        warn!("some calls did not finish in time; the next start takes them up");
    }
    info!("stopped; the datapath stays attached");
    outcome
}

/// Catches signals from now on; ends with the first one.
fn signalled() -> impl Future<Output = ()> {
    let both = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut term), Ok(mut int)) = both else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = term.recv() => info!("SIGTERM"),
            _ = int.recv() => info!("SIGINT"),
        }
    }
}
