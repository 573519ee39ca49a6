//! Flow events: the records of the programs' ring buffer.

use std::fmt;

use aya::maps::{Map, MapData, RingBuf};
use terway_abi::{FlowEvent, names};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::BpfError;

/// The stream of flow events, read from the ring buffer.
pub struct FlowEvents {
    buffer: AsyncFd<RingBuf<MapData>>,
}

impl fmt::Debug for FlowEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowEvents").finish_non_exhaustive()
    }
}

impl FlowEvents {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        let buffer = RingBuf::try_from(map).map_err(BpfError::map(names::EVENTS))?;
        // SAFETY: the buffer owns its descriptor, gives out the same one always, and keeps it open until it is dropped.
        let buffer = unsafe { AsyncFd::register_with_interest(buffer, Interest::READABLE) }
            .map_err(|error| BpfError::System { call: "epoll", source: error.into() })?;
        Ok(Self { buffer })
    }

    /// The next event; waits for one. Can be cancelled without losing any.
    ///
    /// # Errors
    /// [`BpfError::System`] when the runtime's poller fails.
    pub async fn next(&mut self) -> Result<FlowEvent, BpfError> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let mut ready =
                self.buffer.readable_mut().await.map_err(|source| BpfError::System { call: "epoll", source })?;
            // Readiness is edge-triggered: it is given up first and the buffer looked at after, so that no event falls between.
            ready.clear_ready();
        }
    }

    /// The next event, if there is one now.
    pub fn try_next(&mut self) -> Option<FlowEvent> {
        loop {
            let item = self.buffer.get_mut().next()?;
            if let Some(event) = decode(&item) {
                return Some(event);
            }
        }
    }
}

/// `None` if the record has another size: it is not an event of this version.
fn decode(bytes: &[u8]) -> Option<FlowEvent> {
    if bytes.len() != size_of::<FlowEvent>() {
        return None;
    }
    // SAFETY: the slice has the size of `FlowEvent`, which is Pod; the read does not ask for alignment.
    Some(unsafe { bytes.as_ptr().cast::<FlowEvent>().read_unaligned() })
}
