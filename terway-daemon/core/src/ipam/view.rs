//! The pool as others see it: numbers, lists, and what is wrong.

use std::net::IpAddr;

use super::effect::Grant;
use super::eni::{EniState, Stage};
use super::lifecycle::explain;
use super::pool::Pool;
use super::record::Phase;
use super::slot::CallKind;
use crate::cloud::Eni;
use crate::errors::{self, Error};
use crate::ident::{AttachmentKey, EniId, Family, Mac, PodRef, VSwitchId};

/// The pool in numbers. Units are what one pod needs: an address, or a pair with dual stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Units the node can have at most.
    pub capacity: u32,
    /// Units that could be bound this moment.
    pub idle: u32,
    /// Attachments that hold addresses.
    pub bound: u32,
    /// Units at rest between two pods.
    pub cooling: u32,
    /// Units asked of the cloud and not there yet.
    pub pending: u32,
    /// Adds without an address.
    pub waiting: u32,
    /// Addresses (not units) being given back.
    pub releasing: u32,
    /// ENIs of the pool, in any state.
    pub enis: u32,
}

/// One attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachmentView {
    /// Its key.
    pub key: AttachmentKey,
    /// Whose it is.
    pub pod: PodRef,
    /// Path of its network namespace.
    pub netns: String,
    /// What the engine gave with the Add.
    pub options: String,
    /// How far it is.
    pub phase: Phase,
    /// What it holds.
    pub grant: Grant,
    /// Addresses of it that the cloud's list lacks.
    pub missing: Vec<IpAddr>,
}

/// One ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EniView {
    /// Its id; `None` while it is being created.
    pub id: Option<EniId>,
    /// Its MAC; `None` while it is being created.
    pub mac: Option<Mac>,
    /// Its vSwitch.
    pub vswitch: VSwitchId,
    /// How far it is.
    pub phase: EniPhase,
    /// The NIC's index, once it was configured.
    pub ifindex: Option<u32>,
    /// Its addresses of both families.
    pub addresses: Vec<IpAddr>,
    /// How many of these pods have.
    pub bound: u32,
    /// What hinders it.
    pub error: Option<Error>,
}

/// How far an ENI is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EniPhase {
    /// Asked for.
    Creating,
    /// Being attached.
    Attaching,
    /// Attached; its NIC is awaited.
    Configuring,
    /// Carries pods.
    InUse,
    /// Takes no more pods.
    Draining,
    /// Being detached.
    Detaching,
    /// Being deleted.
    Deleting,
    /// The cloud's list lacks it.
    Missing,
}

impl EniPhase {
    /// In words, for tables and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Attaching => "attaching",
            Self::Configuring => "configuring",
            Self::InUse => "in-use",
            Self::Draining => "draining",
            Self::Detaching => "detaching",
            Self::Deleting => "deleting",
            Self::Missing => "missing",
        }
    }
}

impl Phase {
    /// In words, for tables and the gRPC contract.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SettingUp => "setting-up",
            Self::Ready => "ready",
            Self::Releasing => "releasing",
        }
    }
}

impl Pool {
    /// The pool in numbers.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let supply = self.supply();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let releasing = self.enis.values().map(|e| e.v4.counts().releasing + e.v6.counts().releasing);
        Stats {
            capacity: self.config.capacity(),
            idle: supply.ready,
            bound: count(self.attachments.len()),
            cooling: supply.cooling,
            pending: supply.pending,
            waiting: self.waiting.len(),
            releasing: releasing.sum(),
            enis: count(self.enis.len() + self.creations.len()),
        }
    }

    /// One attachment.
    #[must_use]
    pub fn get(&self, key: &AttachmentKey) -> Option<AttachmentView> {
        let attachment = self.attachments.get(key)?;
        let missing = |address: &IpAddr| {
            let eni = self.enis.get(&attachment.grant.eni);
            eni.and_then(|eni| eni.slots(Family::of(*address)).get(*address)).is_none_or(|slot| slot.missing)
        };
        Some(AttachmentView {
            key: key.clone(),
            pod: attachment.pod.clone(),
            netns: attachment.netns.clone(),
            options: attachment.options.clone(),
            phase: attachment.phase(),
            grant: attachment.grant.clone(),
            missing: attachment.grant.addresses.iter().filter(missing).collect(),
        })
    }

    /// Every attachment that holds addresses, in the order of their keys.
    #[must_use]
    pub fn list(&self) -> Vec<AttachmentView> {
        self.attachments.keys().filter_map(|key| self.get(key)).collect()
    }

    /// Every ENI of the pool.
    #[must_use]
    pub fn enis(&self) -> Vec<EniView> {
        let creating = self.creations.values().map(|creation| EniView {
            id: None,
            mac: None,
            vswitch: creation.record.vswitch.clone(),
            phase: EniPhase::Creating,
            ifindex: None,
            addresses: Vec::new(),
            bound: 0,
            error: creation.error.as_ref().map(explain),
        });
        self.enis.values().map(eni_view).chain(creating).collect()
    }

    /// ENIs of this instance that the pool leaves alone: in another vSwitch, of another kind, or not attached.
    #[must_use]
    pub fn foreign(&self) -> &[Eni] {
        &self.foreign
    }

    /// Everything that is wrong now, the gravest first; empty if all is well.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let mut problems = Vec::new();
        let stats = self.stats();
        if stats.capacity == 0 {
            problems.push(Error::new(errors::NO_ADDRESS, "The instance type takes no ENI for pods."));
        } else if stats.idle + stats.pending + stats.cooling == 0 && stats.bound >= stats.capacity {
            problems.push(Error::new(errors::NO_ADDRESS, format!("All {} addresses are bound.", stats.capacity)));
        }
        if let Some(error) = &self.inventory.error {
            problems.push(explain(error));
        }
        for (vswitch, _, error) in self.vswitches.blocked(self.now) {
            let Error { code, detail } = explain(error);
            problems.push(Error::new(code, format!("{vswitch}: {detail}")));
        }
        if let Some((until, error)) = &self.creation_blocked
            && *until > self.now
        {
            problems.push(explain(error));
        }
        problems.extend(self.creations.values().filter_map(|creation| creation.error.as_ref().map(explain)));
        for eni in self.enis.values() {
            let named = |Error { code, detail }: Error| Error::new(code, format!("{}: {detail}", eni.id));
            if eni.missing.is_some() {
                let detail = format!("{}: The cloud does not list this ENI as attached to the instance.", eni.id);
                problems.push(Error::new(errors::CLOUD_FAILED, detail));
            }
            problems.extend(eni.error.clone().map(named));
            for slots in [&eni.v4, &eni.v6] {
                let failing = slots.call.as_ref().and_then(|call| call.error.as_ref());
                let blocked = slots.blocked.as_ref().filter(|(until, _)| *until > self.now).map(|(_, error)| error);
                problems.extend(failing.into_iter().chain(blocked).map(|error| named(explain(error))));
            }
        }
        for (key, attachment) in &self.attachments {
            if let Some(error) = &attachment.error {
                problems.push(Error::new(error.code, format!("{key}: {}", error.detail)));
            }
        }
        if self.enis.values().any(|eni| eni.v4.missing() + eni.v6.missing() > 0) {
            for view in self.list().into_iter().filter(|view| !view.missing.is_empty()) {
                let detail = format!("{}: The cloud does not list {:?} on {}.", view.key, view.missing, view.grant.eni);
                problems.push(Error::new(errors::CLOUD_FAILED, detail));
            }
        }
        problems
    }
}

fn eni_view(eni: &EniState) -> EniView {
    let phase = match eni.stage {
        Stage::Attaching => EniPhase::Attaching,
        Stage::Configuring | Stage::InUse if eni.missing.is_some() => EniPhase::Missing,
        Stage::Configuring | Stage::InUse if eni.draining => EniPhase::Draining,
        Stage::Configuring => EniPhase::Configuring,
        Stage::InUse => EniPhase::InUse,
        Stage::Detaching => EniPhase::Detaching,
        Stage::Deleting => EniPhase::Deleting,
    };
    let calls = [&eni.v4, &eni.v6].into_iter().filter_map(|slots| slots.call.as_ref());
    // A failing release hinders nobody; a failing assignment does.
    let mut assigns = calls.filter(|call| matches!(call.kind, CallKind::Assign { .. }));
    EniView {
        id: Some(eni.id.clone()),
        mac: Some(eni.mac),
        vswitch: eni.vswitch.clone(),
        phase,
        ifindex: eni.nic.as_ref().map(|nic| nic.ifindex),
        addresses: eni.v4.iter().chain(eni.v6.iter()).map(|(address, _)| address).collect(),
        bound: eni.v4.counts().bound + eni.v6.counts().bound,
        error: eni.error.clone().or_else(|| assigns.find_map(|call| call.error.as_ref().map(explain))),
    }
}
