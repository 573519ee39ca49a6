//! What happens later: attaching, detaching and deleting take their time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use terway_core::cloud::EniStatus;
use terway_core::ident::EniId;
use tokio::time::sleep;

use super::Inner;
use super::actions::Follow;
use super::vpc::{EniRecord, Vpc};
use super::wire::Command;

/// Starts the later part of a call.
pub(super) fn begin(inner: &Arc<Inner>, follow: Follow) {
    let inner = Arc::clone(inner);
    match follow {
        Follow::Nothing => {}
        Follow::Attach(eni, attachment) => drop(tokio::spawn(attach(inner, eni, attachment))),
        Follow::Detach(eni, attachment) => drop(tokio::spawn(detach(inner, eni, attachment))),
        Follow::Delete(eni) => drop(tokio::spawn(delete(inner, eni))),
    }
}

/// Changes an ENI if its attachment is still the same and it still exists.
fn change<R>(inner: &Inner, id: &EniId, attachment: u64, f: impl FnOnce(&mut EniRecord) -> R) -> Option<R> {
    inner.state.lock().enis.get_mut(id).filter(|eni| eni.attachment == attachment).map(f)
}

async fn attach(inner: Arc<Inner>, id: EniId, attachment: u64) {
    let (attaching, nic) = {
        let state = inner.state.lock();
        (Duration::from_millis(state.config.attach_ms), Duration::from_millis(state.config.nic_delay_ms))
    };
    sleep(attaching).await;
    if change(&inner, &id, attachment, |eni| eni.status = EniStatus::InUse).is_none() {
        return;
    }
    sleep(nic).await;
    let mut state = inner.state.lock();
    let Some(eni) = state.enis.get_mut(&id).filter(|eni| eni.attachment == attachment) else { return };
    eni.plugged = true;
    let eni = eni.clone();
    // Under the lock: addresses that change from now on are told after the plug.
    if let (Some(node), Some(eni)) = (eni.node.clone(), state.for_fabric(&eni)) {
        inner.wire.send(Command::Plug { node, eni });
    }
}

async fn detach(inner: Arc<Inner>, id: EniId, attachment: u64) {
    let detaching = Duration::from_millis(inner.state.lock().config.detach_ms);
    sleep(detaching).await;
    let _gone_meanwhile = change(&inner, &id, attachment, |eni| {
        unplug(&inner.wire, eni);
        eni.status = EniStatus::Available;
        eni.instance = None;
        eni.node = None;
        eni.plugged = false;
    });
}

async fn delete(inner: Arc<Inner>, id: EniId) {
    let deleting = Duration::from_millis(inner.state.lock().config.delete_ms);
    if !deleting.is_zero() {
        sleep(deleting).await;
    }
    let mut state = inner.state.lock();
    if let Some(eni) = state.enis.remove(&id) {
        release(&mut state, &eni);
    }
}

/// Takes the NIC and the addresses of an ENI that is no longer in the list.
pub(super) fn release(vpc: &mut Vpc, eni: &EniRecord) {
    unplug(&vpc.wire, eni);
    vpc.give_back(eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6)));
}

fn unplug(wire: &super::wire::Wire, eni: &EniRecord) {
    if let (true, Some(node)) = (eni.plugged, &eni.node) {
        wire.send(Command::Unplug { node: node.clone(), eni: eni.id.clone(), mac: eni.mac });
    }
}
