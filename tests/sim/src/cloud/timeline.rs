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

/// How the later part of a call goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Course {
    /// It takes this much longer.
    pub(super) longer: Duration,
    /// Attaching fails.
    pub(super) fails: bool,
    /// The NIC stays away.
    pub(super) no_nic: bool,
}

/// Starts the later part of a call.
pub(super) fn begin(inner: &Arc<Inner>, follow: Follow, course: Course) {
    let inner = Arc::clone(inner);
    match follow {
        Follow::Nothing => {}
        Follow::Attach(eni, attachment) => drop(tokio::spawn(attach(inner, eni, attachment, course))),
        Follow::Detach(eni, attachment) => drop(tokio::spawn(detach(inner, eni, attachment, course))),
        Follow::Delete(eni) => drop(tokio::spawn(delete(inner, eni, course))),
    }
}

/// Changes an ENI if its attachment is still the same and it still exists.
fn change<R>(inner: &Inner, id: &EniId, attachment: u64, f: impl FnOnce(&mut EniRecord) -> R) -> Option<R> {
    inner.alter(|vpc| vpc.enis.get_mut(id).filter(|eni| eni.attachment == attachment).map(f))
}

async fn attach(inner: Arc<Inner>, id: EniId, attachment: u64, course: Course) {
    let (attaching, nic) = {
        let state = inner.state.lock();
        (Duration::from_millis(state.config.attach_ms), Duration::from_millis(state.config.nic_delay_ms))
    };
    sleep(attaching + course.longer).await;
    let attached = change(&inner, &id, attachment, |eni| {
        if course.fails {
            loose(eni);
        } else {
            eni.status = EniStatus::InUse;
        }
    });
    if attached.is_none() || course.fails || course.no_nic {
        return;
    }
    sleep(nic).await;
    inner.alter(|vpc| {
        let Some(eni) = vpc.enis.get_mut(&id).filter(|eni| eni.attachment == attachment) else { return };
        eni.plugged = true;
        let eni = eni.clone();
        // Under the lock: addresses that change from now on are told after the plug.
        if let (Some(node), Some(plug)) = (eni.node.clone(), vpc.for_fabric(&eni)) {
            vpc.wire.send(Command::Plug { node, eni: plug });
        }
        if !eni.v4_prefixes.is_empty() || !eni.v6_prefixes.is_empty() {
            vpc.announce_prefixes(&eni);
        }
    });
}

fn loose(eni: &mut EniRecord) {
    eni.status = EniStatus::Available;
    eni.instance = None;
    eni.node = None;
    eni.plugged = false;
}

async fn detach(inner: Arc<Inner>, id: EniId, attachment: u64, course: Course) {
    let detaching = Duration::from_millis(inner.state.lock().config.detach_ms);
    sleep(detaching + course.longer).await;
    let _gone_meanwhile = change(&inner, &id, attachment, |eni| {
        unplug(&inner.wire, eni);
        loose(eni);
    });
}

/// Detaches an ENI without delay, whatever was going on with it.
pub(super) fn detach_now(vpc: &mut Vpc, id: &EniId) {
    let wire = vpc.wire.clone();
    if let Some(eni) = vpc.enis.get_mut(id) {
        unplug(&wire, eni);
        loose(eni);
        eni.attachment += 1;
    }
}

async fn delete(inner: Arc<Inner>, id: EniId, course: Course) {
    let deleting = Duration::from_millis(inner.state.lock().config.delete_ms) + course.longer;
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
    unplug(&vpc.wire, eni);
    let singles = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
    vpc.addresses.give_back(singles);
    vpc.addresses.give_back_v4_prefixes(&eni.v4_prefixes);
    vpc.addresses.give_back_v6_prefixes(&eni.v6_prefixes);
}

fn unplug(wire: &super::wire::Wire, eni: &EniRecord) {
    if let (true, Some(node)) = (eni.plugged, &eni.node) {
        wire.send(Command::Unplug { node: node.clone(), eni: eni.id.clone(), mac: eni.mac });
    }
}
