//! What happens later: attaching, detaching and deleting take their time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use terway_core::cloud::EniStatus;
use terway_core::ident::EniId;
use tokio::time::sleep;

use super::Inner;
use super::actions::FollowUp;
use super::fabric_queue::Command;
use super::vpc::{EniRecord, Vpc};

/// How the later part of a call goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Completion {
    /// It takes this much longer.
    pub(super) longer: Duration,
    /// Attaching fails.
    pub(super) fails: bool,
    /// The NIC stays away.
    pub(super) no_nic: bool,
}

/// Starts the later part of a call.
pub(super) fn begin(inner: &Arc<Inner>, follow_up: FollowUp, completion: Completion) {
    let inner = Arc::clone(inner);
    match follow_up {
        FollowUp::Nothing => {}
        FollowUp::Attach(eni, attachment) => drop(tokio::spawn(attach(inner, eni, attachment, completion))),
        FollowUp::Detach(eni, attachment) => drop(tokio::spawn(detach(inner, eni, attachment, completion))),
        FollowUp::Delete(eni) => drop(tokio::spawn(delete(inner, eni, completion))),
    }
}

/// Changes an ENI if its attachment is still the same and it still exists.
fn change<R>(inner: &Inner, id: &EniId, attachment: u64, f: impl FnOnce(&mut EniRecord) -> R) -> Option<R> {
    inner.alter(|vpc| vpc.enis.get_mut(id).filter(|eni| eni.attachment == attachment).map(f))
}

async fn attach(inner: Arc<Inner>, id: EniId, attachment: u64, completion: Completion) {
    let (attaching, nic) = {
        let state = inner.state.lock();
        (Duration::from_millis(state.config.attach_ms), Duration::from_millis(state.config.nic_delay_ms))
    };
    sleep(attaching + completion.longer).await;
    let attached = change(&inner, &id, attachment, |eni| {
        if completion.fails {
            mark_available(eni);
        } else {
            eni.status = EniStatus::InUse;
        }
    });
    if attached.is_none() || completion.fails || completion.no_nic {
        return;
    }
    sleep(nic).await;
    inner.alter(|vpc| {
        let Some(eni) = vpc.enis.get_mut(&id).filter(|eni| eni.attachment == attachment) else { return };
        eni.plugged = true;
        let eni = eni.clone();
        // Under the lock: addresses that change from now on are told after the hotplug.
        if let (Some(node), Some(nic)) = (eni.node.clone(), vpc.for_fabric(&eni)) {
            vpc.queue.send(Command::Hotplug { node, eni: nic });
        }
        if !eni.v4_prefixes.is_empty() || !eni.v6_prefixes.is_empty() {
            vpc.push_prefixes(&eni);
        }
    });
}

fn mark_available(eni: &mut EniRecord) {
    eni.status = EniStatus::Available;
    eni.instance = None;
    eni.node = None;
    eni.plugged = false;
}

async fn detach(inner: Arc<Inner>, id: EniId, attachment: u64, completion: Completion) {
    let detaching = Duration::from_millis(inner.state.lock().config.detach_ms);
    sleep(detaching + completion.longer).await;
    let _gone_meanwhile = change(&inner, &id, attachment, |eni| {
        hot_unplug(&inner.queue, eni);
        mark_available(eni);
    });
}

/// Detaches an ENI without delay, whatever was going on with it.
pub(super) fn detach_now(vpc: &mut Vpc, id: &EniId) {
    let queue = vpc.queue.clone();
    if let Some(eni) = vpc.enis.get_mut(id) {
        hot_unplug(&queue, eni);
        mark_available(eni);
        eni.attachment += 1;
    }
}

async fn delete(inner: Arc<Inner>, id: EniId, completion: Completion) {
    let deleting = Duration::from_millis(inner.state.lock().config.delete_ms) + completion.longer;
    if !deleting.is_zero() {
        sleep(deleting).await;
    }
    inner.alter(|vpc| {
        if let Some(eni) = vpc.enis.remove(&id) {
            release(vpc, &eni);
        }
    });
}

/// Takes the NIC and the addresses of an ENI that is no longer in the list.
pub(super) fn release(vpc: &mut Vpc, eni: &EniRecord) {
    hot_unplug(&vpc.queue, eni);
    let singles = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
    vpc.addresses.give_back(singles);
    vpc.addresses.give_back_v4_prefixes(&eni.v4_prefixes);
    vpc.addresses.give_back_v6_prefixes(&eni.v6_prefixes);
}

fn hot_unplug(queue: &super::fabric_queue::FabricQueue, eni: &EniRecord) {
    if let (true, Some(node)) = (eni.plugged, &eni.node) {
        queue.send(Command::HotUnplug { node: node.clone(), eni: eni.id.clone(), mac: eni.mac });
    }
}
