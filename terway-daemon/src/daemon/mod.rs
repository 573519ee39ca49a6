//! The life of `terwayd`: the phases of its start, the wait for a signal or a failure, and its stop.

mod actors;
mod background;
mod kernel;
mod mounts;
mod node;
mod node_state;
mod serve;
mod state;

use std::time::Instant;

use terway_core::errors::{self, Error};
use tracing::info;

use crate::conflist::Conflist;
use crate::memory;
use crate::metrics;
use crate::net;
use crate::options::Options;
use crate::reload;
use crate::socket;

use self::actors::Actors;
use self::background::Background;
use self::kernel::Kernel;
use self::state::Persistent;

/// Runs the daemon until a signal or a failure ends it.
///
/// # Errors
/// Why it could not start or go on. The datapath stays as it is in every case.
pub async fn run(options: Options) -> Result<(), Error> {
    let start = Instant::now();
    memory::map_large_tables();
    net::set_sysctl_dir(options.sysctl_dir.clone());
    let (mut registry, metrics) = metrics::new_registry();

    mounts::check(&options)?;
    let _lock = state::lock(&options)?;
    let context = options.node_context();
    let api = options.objects.as_ref().and_then(|origin| origin.api_client(&context));
    let source = state::open_configuration(&options, api.as_ref(), &mut registry).await?;
    let config = source.config();
    let kernel = Kernel::open(&options, &config, &mut registry)?;

    let node = node::identify(&options, &config, &kernel.monitor, &metrics).await?;
    let info = node::prepare(&options, &config, &node, &kernel.host).await?;
    let state = Persistent::open(&options, node.is_other_instance)?;

    reload::host_stack(&config, &kernel.monitor.addresses().borrow().clone(), &kernel.datapath)?;
    reload::flow_events(&config, &kernel.datapath)?;

    let actors = Actors::start(&options, api, &source, kernel, &node, info, state, &metrics, &mut registry).await?;

    // Listening comes before reading the queue: see terway_core::cni::queue for why nothing falls in between.
    let listener = socket::bind(&options.socket)
        .map_err(|error| failed(errors::INTERNAL, &options.socket.display().to_string(), &error))?;
    let conflist = Conflist::new(&options);
    let background = Background::start(&options, &source, &node, &actors, &metrics, registry).await;
    serve::until_stopped(listener, &source, &actors, &background, &conflist, &metrics, || {
        metrics.started(start.elapsed());
        info!(took = ?start.elapsed(), node = options.node_name(), "serving");
    })
    .await
}

fn failed(code: errors::Code, what: &str, error: &dyn std::error::Error) -> Error {
    Error::new(code, format!("{what}: {error}"))
}
