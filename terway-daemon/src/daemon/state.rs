//! Phase "persistent state": the instance lock, the configuration, the store, and the DELs that the plugin has queued.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use terway_core::errors::{self, Error};
use terway_core::ident::AttachmentKey;
use terway_core::ipam::Record;
use tracing::warn;

use super::failed;
use crate::config_source::{ConfigMetrics, ConfigSource};
use crate::options::Options;
use crate::queue;
use crate::socket::InstanceLock;
use crate::store::{self, Store};

/// Makes this process the only daemon on its state folder.
pub(super) fn lock(options: &Options) -> Result<InstanceLock, Error> {
    let dir = options.state_dir.display();
    InstanceLock::take(&options.state_dir).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => Error::new(errors::STORE_FAILED, format!("another terwayd holds {dir}")),
        _ => failed(errors::STORE_FAILED, &dir.to_string(), &error),
    })
}

pub(super) fn open_configuration(options: &Options, registry: &mut Registry) -> Result<Arc<ConfigSource>, Error> {
    ConfigSource::open(options.config_paths(), ConfigMetrics::new(registry)).map(Arc::new)
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
