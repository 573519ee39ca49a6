//! The debug log of the programs: records of aya-log, published as `tracing` events of the target [`TARGET`].

use std::fmt;

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::BpfError;

/// The target of the events, at level info: whoever switches the log on wants to see it.
const TARGET: &str = "terway_datapath";

/// The ring buffer of aya-log-ebpf.
pub(super) const MAP: &str = "AYA_LOGS";
/// Its size with the debug log, and without it: aya creates the map in any case, and a ring buffer takes at least one page.
pub(super) const MAP_BYTES: (u32, u32) = (1 << 17, 1 << 12);

/// Hands records of the `log` crate, which aya-log writes, to `tracing`.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        tracing::enabled!(target: TARGET, tracing::Level::INFO)
    }

    fn log(&self, record: &Record<'_>) {
        tracing::info!(target: TARGET, "{}", record.args());
    }

    fn flush(&self) {}
}

/// The stream of debug log records.
pub struct DebugLog {
    logger: AsyncFd<EbpfLogger<ToTracing>>,
}

impl fmt::Debug for DebugLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugLog").finish_non_exhaustive()
    }
}

impl DebugLog {
    /// Takes the ring buffer out of the object, whose programs are loaded.
    pub(super) fn take(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let logger = EbpfLogger::init_with_logger(loaded, ToTracing)
            .map_err(|_no_such_map| BpfError::Missing(MAP.to_owned()))?;
        // SAFETY: the logger owns its descriptor, always gives out the same one, and keeps it open until it is dropped.
        let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .map_err(|error| BpfError::System { call: "epoll", source: error.into() })?;
        Ok(Self { logger })
    }

    /// Publishes records as they arrive; ends with an error only.
    ///
    /// # Errors
    /// [`BpfError::System`] when the runtime's poller fails.
    pub async fn run(&mut self) -> Result<(), BpfError> {
        loop {
            // Readiness is edge-triggered: it is cleared before the buffer is read, so that no record is missed.
            self.logger
                .readable_mut()
                .await
                .map_err(|source| BpfError::System { call: "epoll", source })?
                .clear_ready();
            self.logger.get_mut().flush();
        }
    }
}
