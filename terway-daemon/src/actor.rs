//! Building blocks of the actors (policies, Services, the object feed): tasks that wait for several inputs and take one step for each.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnetwork::IpNetwork;
use tokio::sync::watch;

/// The node's present addresses; marks them as seen, so that only later changes wake the receiver.
pub(crate) fn current_addresses(receiver: &mut watch::Receiver<Arc<Vec<IpNetwork>>>) -> Vec<IpAddr> {
    receiver.borrow_and_update().iter().map(IpNetwork::ip).collect()
}

/// A batch of the first message and all that are queued behind it, so that a burst is one step.
pub(crate) fn batch<T>(first: T, next: impl FnMut() -> Option<T>) -> Vec<T> {
    std::iter::once(first).chain(std::iter::from_fn(next)).collect()
}

/// Sleeps until `due`; without one, for ever.
pub(crate) async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
