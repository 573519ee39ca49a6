//! The debug log of the datapath, switched while the daemon runs.

use std::sync::Arc;

use terway_core::errors::{self, Error};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::bpf::Datapath;
use crate::supervise;

/// Switches the programs' debug log and publishes its records.
pub(crate) struct DatapathLog {
    datapath: Arc<Datapath>,
    enabled: watch::Sender<bool>,
}

impl DatapathLog {
    pub(crate) fn new(datapath: Arc<Datapath>) -> Arc<Self> {
        let enabled = watch::Sender::new(datapath.debug());
        Arc::new(Self { datapath, enabled })
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.datapath.debug()
    }

    /// Exchanges the programs for those with or without the debug log.
    ///
    /// # Errors
    /// [`errors::BPF_FAILED`]: the programs were refused and the present ones stay, or some interface keeps the present ones.
    pub(crate) async fn switch(&self, enabled: bool) -> Result<(), Error> {
        let datapath = Arc::clone(&self.datapath);
        let switched = supervise::blocking(move || datapath.set_debug(enabled)).await;
        if self.enabled.send_replace(self.is_enabled()) != self.is_enabled() {
            info!(enabled, "the debug log of the datapath was switched");
        }
        switched.map_err(|error| Error::new(errors::BPF_FAILED, error.to_string()))
    }

    /// Publishes records as long as the log is enabled. Its ring buffer can be taken once: should the task panic, the log ends until it is
    /// switched off and on, and nothing else does.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut switched = self.enabled.subscribe();
        while self.publish(&mut switched).await.is_some() {}
    }

    /// Publishes until the next switch; `None` at the end of the daemon.
    async fn publish(&self, switched: &mut watch::Receiver<bool>) -> Option<()> {
        if *switched.borrow_and_update() {
            let ended = match self.datapath.programs().take_debug_log() {
                Ok(mut records) => tokio::select! {
                    ended = records.run() => ended,
                    changed = switched.changed() => return changed.ok(),
                },
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                warn!(%error, "failed to read the debug log of the datapath");
            }
        }
        switched.changed().await.ok()
    }
}
