//! Phase "background": the tasks that run beside the gRPC server as long as the daemon does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tracing::{info, warn};

use super::actors::Actors;
use super::node::Identified;
use crate::config_source::ConfigSource;
use crate::datapath_log::DatapathLog;
use crate::engine::Engine;
use crate::http;
use crate::metrics::Metrics;
use crate::options::Options;
use crate::queue;
use crate::reload::ConfigSubscribers;
use crate::supervise;

/// How often the plugin's queue is read, for DELs whose call came too late for an answer.
const QUEUE_EVERY: Duration = Duration::from_secs(5);

/// Handles of background tasks that `terway-cli status` asks.
pub(super) struct Background {
    pub(super) http: Arc<http::Server>,
    pub(super) datapath_log: Arc<DatapathLog>,
}

impl Background {
    /// Carries out the queued DELs, then starts the tasks.
    pub(super) async fn start(
        options: &Options,
        source: &Arc<ConfigSource>,
        identified: &Identified,
        actors: &Actors,
        metrics: &Metrics,
        registry: Registry,
    ) -> Self {
        let engine = &actors.engine;
        supervise::spawn("uplink", Arc::clone(engine).serve_external_clients());
        supervise::spawn("engine-timer", Arc::clone(engine).run_timer());
        supervise::spawn_restarting("flow-log", {
            let (engine, services) = (Arc::clone(engine), Arc::clone(&actors.services));
            move || Arc::clone(&engine).run_flow_log(Arc::clone(&services))
        });
        let datapath_log = DatapathLog::new(Arc::clone(&actors.datapath));
        supervise::spawn_restarting("datapath-log", {
            let datapath_log = Arc::clone(&datapath_log);
            move || Arc::clone(&datapath_log).run()
        });
        let subscribers = ConfigSubscribers {
            options: options.clone(),
            node: identified.node.clone(),
            cloud: Arc::clone(&identified.cloud),
            engine: Arc::clone(engine),
            datapath: Arc::clone(&actors.datapath),
        };
        supervise::spawn("config-subscribers", subscribers.run(source.subscribe(), engine.node_addresses()));
        supervise::spawn_restarting("config-source", {
            let source = Arc::clone(source);
            move || Arc::clone(&source).run()
        });

        work_off_queue(engine, &options.spool_dir(), metrics).await;
        supervise::spawn("del-queue", {
            let (engine, dir, metrics) = (Arc::clone(engine), options.spool_dir(), metrics.clone());
            async move {
                loop {
                    tokio::time::sleep(QUEUE_EVERY).await;
                    work_off_queue(&engine, &dir, &metrics).await;
                }
            }
        });
        supervise::spawn("audit", {
            let (engine, interval) = (Arc::clone(engine), Duration::from_secs(options.audit_interval.max(1)));
            async move {
                loop {
                    tokio::time::sleep(interval).await;
                    engine.audit().await;
                }
            }
        });
        supervise::spawn("audit-on-deletion", Arc::clone(engine).repair_deletions());
        Self { http: start_http(options, engine, registry), datapath_log }
    }
}

fn start_http(options: &Options, engine: &Arc<Engine>, registry: Registry) -> Arc<http::Server> {
    let ready: http::Ready = {
        let engine = Arc::clone(engine);
        Arc::new(move || {
            engine.refresh_gauges();
            engine.ready().map_err(|error| error.to_string())
        })
    };
    let http = http::Server::new(options.listen, Arc::new(registry), ready);
    supervise::spawn_restarting("http", {
        let http = Arc::clone(&http);
        move || Arc::clone(&http).run()
    });
    http
}

/// Carries out the DELs that the plugin has queued.
async fn work_off_queue(engine: &Arc<Engine>, dir: &Path, metrics: &Metrics) {
    let queued = match queue::read(dir) {
        Ok(queued) => queued,
        Err(error) => {
            warn!(dir = %dir.display(), %error, "failed to read the queue of DELs");
            return;
        }
    };
    for (path, del) in queued {
        match engine.del(del.attachment.clone()).await {
            Ok(()) => {
                info!(key = %del.attachment, "carried out a queued DEL");
                metrics.spooled_del();
                let _ = std::fs::remove_file(path);
            }
            Err(error) => warn!(key = %del.attachment, %error, "failed to carry out a queued DEL; it stays queued"),
        }
    }
}
