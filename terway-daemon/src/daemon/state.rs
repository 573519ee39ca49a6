//! Phase "persistent state": the instance lock, the configuration, the store, and the DELs that the plugin has queued.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use terway_core::errors::{self, Error};
use terway_core::ident::AttachmentKey;
use terway_core::ipam::Record;
use tracing::warn;

use super::failed;
use crate::config_source::{ConfigLocation, ConfigMetrics, ConfigSource, Input};
use crate::objects::{ApiClient, ConfigMapWatch};
use crate::options::Options;
use crate::queue;
use crate::socket::InstanceLock;
use crate::store::{self, Store};
use crate::supervise;

/// How long the start waits for the API server's configuration before it goes on with the last good one.
const FIRST_READING_WITHIN: Duration = Duration::from_secs(2);

/// Makes this process the only daemon on its state folder.
pub(super) fn lock(options: &Options) -> Result<InstanceLock, Error> {
    let dir = options.state_dir.display();
    InstanceLock::take(&options.state_dir).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => Error::new(errors::STORE_FAILED, format!("another terwayd holds {dir}")),
        _ => failed(errors::STORE_FAILED, &dir.to_string(), &error),
    })
}

/// Reads the configuration. ConfigMaps of an API server that does not answer are waited for, unless an earlier daemon has kept them.
pub(super) async fn open_configuration(
    options: &Options,
    api: Option<&Arc<ApiClient>>,
    registry: &mut Registry,
) -> Result<Arc<ConfigSource>, Error> {
    let metrics = ConfigMetrics::new(registry);
    let cluster = match &options.config {
        ConfigLocation::Path(path) => {
            return ConfigSource::open(options.config_paths(path.clone()), metrics).map(Arc::new);
        }
        ConfigLocation::ConfigMap(name) => name.clone(),
    };
    let needs_api = || Error::new(errors::CONFIG_INVALID, format!("--config {} needs --objects kube", options.config));
    let watch = ConfigMapWatch {
        api: Arc::clone(api.ok_or_else(needs_api)?),
        cluster: cluster.clone(),
        node: options.node_name(),
        time_scale: options.time_scale,
    };
    let (sender, mut views) = tokio::sync::watch::channel(None);
    supervise::spawn_restarting("config-maps", move || watch.clone().run(sender.clone()));
    drop(tokio::time::timeout(FIRST_READING_WITHIN, views.wait_for(Option::is_some)).await);
    loop {
        views.borrow_and_update();
        let input = Input::ConfigMaps {
            cluster: cluster.clone(),
            views: views.clone(),
            kept: Some(options.kept_config_path()),
        };
        match ConfigSource::open(input, metrics.clone()) {
            Ok(source) => return Ok(Arc::new(source)),
            // A node without any configuration cannot do anything else; the edit that mends it takes effect at once.
            Err(error) => {
                warn!(code = error.code.id, %error, remedy = error.code.remedy, "waiting for a usable configuration");
            }
        }
        views.changed().await.map_err(|_ended| needs_api())?;
    }
}

/// What earlier runs have left on disk.
pub(super) struct Persistent {
    pub(super) store: Store,
    pub(super) records: Vec<Record>,
    /// Attachments whose DEL waits in the plugin's queue: they are not adopted.
    pub(super) queued_dels: BTreeSet<AttachmentKey>,
}

impl Persistent {
    /// Opens the store. That of another instance, which a cloned disk has brought along, is set aside first: its ENIs are not this node's.
    pub(super) fn open(options: &Options, of_other_instance: bool) -> Result<Self, Error> {
        let path = options.store_path();
        let text = path.display().to_string();
        if of_other_instance && path.exists() {
            let aside = store::set_aside(&path, "other-instance")
                .map_err(|error| failed(errors::STORE_FAILED, &text, &error))?;
            warn!(aside = %aside.display(), "set aside the store of another instance");
            let _absent = std::fs::remove_file(options.subnets_path());
        }
        let store = Store::open(path).map_err(|error| failed(errors::STORE_FAILED, &text, &error))?;
        let records = store.load().map_err(|error| failed(errors::STORE_FAILED, "load", &error))?;
        let queued = queue::read(&options.spool_dir()).unwrap_or_else(|error| {
            warn!(dir = %options.spool_dir().display(), %error, "failed to read the queue of DELs");
            Vec::new()
        });
        let queued_dels = queued.into_iter().map(|(_, del)| del.attachment).collect();
        Ok(Self { store, records, queued_dels })
    }
}
