//! What the tasks have in common that follow several sources of news and do one step for each: Services and policies.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnetwork::IpNetwork;
use tokio::sync::watch;

/// The node's addresses as they are now; those that come later are news again.
pub(crate) fn addresses(of: &mut watch::Receiver<Arc<Vec<IpNetwork>>>) -> Vec<IpAddr> {
    of.borrow_and_update().iter().map(IpNetwork::ip).collect()
}

/// The first piece of news with all that wait behind it, so that a burst is one step.
pub(crate) fn burst<T>(first: T, more: impl FnMut() -> Option<T>) -> Vec<T> {
    std::iter::once(first).chain(std::iter::from_fn(more)).collect()
}

/// Waits for a time that may never come.
pub(crate) async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
