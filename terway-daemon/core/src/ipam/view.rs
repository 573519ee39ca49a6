//! The pool as others see it: numbers, lists, and what is wrong.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::lease::Lease;
use super::pool::Pool;
use super::problem;
use super::record::Phase;
use super::state::{Counts, Creation, EniState, SlotState, Stage, VSwitchState, listed_addresses};
use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniKind};
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
    /// ENIs of the pool that take no new pods because they do not fit the configuration.
    pub mismatched: u32,
    /// ENIs of this instance that are not the pool's, the primary one not counted.
    pub foreign: u32,
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
    pub lease: Lease,
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
    /// Its prefixes.
    pub prefixes: Vec<PrefixView>,
    /// How many of its addresses, those of its prefixes included, pods have.
    pub bound: u32,
    /// How many are free.
    pub idle: u32,
    /// How many rest between two pods.
    pub cooling: u32,
    /// How many are being given back.
    pub releasing: u32,
    /// Why it takes no new pods: it does not fit the configuration, is being replaced, or is not the pool's.
    pub reason: Option<Error>,
    /// No address is asked for on it until then.
    pub backoff_until: Option<Moment>,
    /// What hinders it.
    pub error: Option<Error>,
}

/// One prefix of an ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixView {
    /// The block.
    pub prefix: IpNetwork,
    /// How many of its addresses pods have, or had a moment ago.
    pub in_use: u32,
    /// How many addresses are handed out of it.
    pub slots: u32,
    /// It is being given back.
    pub releasing: bool,
}

/// What an address is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressState {
    /// Free.
    Idle,
    /// A pod's.
    Bound,
    /// A pod's until a moment ago.
    Cooling,
    /// Being given back to the cloud.
    Releasing,
    /// A pod's, and the cloud does not list it.
    Missing,
}

impl AddressState {
    /// In words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Bound => "bound",
            Self::Cooling => "cooling",
            Self::Releasing => "releasing",
            Self::Missing => "missing",
        }
    }
}

/// One address of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressView {
    /// The address.
    pub address: IpAddr,
    /// Its ENI.
    pub eni: EniId,
    /// The prefix it came with, if it did.
    pub prefix: Option<IpNetwork>,
    /// What it is doing.
    pub state: AddressState,
    /// Who has it.
    pub owner: Option<(AttachmentKey, PodRef)>,
}

/// One vSwitch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VSwitchView {
    /// Its id.
    pub id: VSwitchId,
    /// New ENIs may be put there.
    pub configured: bool,
    /// Free addresses by the cloud's last count, less what was asked for since; known only if the selection needs it.
    pub available: Option<u32>,
    /// Left alone until then, because it has no address left.
    pub backoff_until: Option<Moment>,
    /// No prefix is asked for until then, because it has no whole one left.
    pub fragmented_until: Option<Moment>,
    /// The cloud's last refusal, while it counts.
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
    /// Does not fit the configuration; goes with its last pod.
    Mismatched,
    /// Not the pool's; never touched.
    Foreign,
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
            Self::Mismatched => "mismatched",
            Self::Foreign => "foreign",
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
            capacity: self.capacity(),
            idle: supply.ready,
            bound: count(self.attachments.len()),
            cooling: supply.cooling,
            pending: supply.pending,
            waiting: self.requests.waiting(),
            releasing: releasing.sum(),
            enis: count(self.enis.len() + self.creations.count()),
            mismatched: count(self.enis.values().filter(|eni| eni.mismatch.is_some()).count()),
            foreign: self.inventory.foreign_on(&self.config.instance),
        }
    }

    /// One attachment.
    #[must_use]
    pub fn get(&self, key: &AttachmentKey) -> Option<AttachmentView> {
        let attachment = self.attachments.get(key)?;
        let missing = |address: &IpAddr| {
            let eni = self.enis.get(&attachment.lease().eni);
            let gone = eni.is_none_or(|eni| eni.missing.is_some());
            gone || eni.and_then(|eni| eni.slots(Family::of(*address)).get(*address)).is_none_or(|slot| slot.missing)
        };
        Some(AttachmentView {
            key: key.clone(),
            pod: attachment.pod().clone(),
            netns: attachment.netns().to_owned(),
            options: attachment.options().to_owned(),
            phase: attachment.phase(),
            lease: attachment.lease().clone(),
            missing: attachment.lease().addresses.iter().filter(missing).collect(),
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
        let creating = self.creations.iter().map(|creation| EniView {
            error: creation.error().map(CloudError::explain),
            ..blank(None, creation.record().vswitch.clone(), EniPhase::Creating)
        });
        self.enis.values().map(|eni| eni_view(eni, self.now)).chain(creating).collect()
    }

    /// ENIs of this instance that are not the pool's, with the reason, as [`Pool::enis`] shows its own.
    #[must_use]
    pub fn foreign_enis(&self) -> Vec<EniView> {
        let view = |eni: &Eni| {
            let reason = match eni.kind {
                EniKind::Trunk | EniKind::Member => "It is a trunk, or a member of one.".to_owned(),
                _ if eni.instance.as_ref() != Some(&self.config.instance) => "It is not attached here.".to_owned(),
                _ => match self.config.blocked_by(&eni.tags) {
                    Some((key, value)) => format!("It has the tag {key}={value}."),
                    None if !self.config.passes_filter(&eni.tags) => "It lacks a tag of eni_tag_filter.".to_owned(),
                    None => format!("It is {:?} by the cloud's word.", eni.status),
                },
            };
            EniView {
                id: Some(eni.id.clone()),
                addresses: listed_addresses(eni).collect::<std::collections::BTreeSet<_>>().into_iter().collect(),
                reason: Some(Error::new(errors::ENI_MISMATCH, reason)),
                ..blank(Some(eni.mac), eni.vswitch.clone(), EniPhase::Foreign)
            }
        };
        self.inventory.foreign().iter().map(view).collect()
    }

    /// Every address of the pool, by ENI.
    #[must_use]
    pub fn addresses(&self) -> Vec<AddressView> {
        let mut owners = BTreeMap::new();
        for (key, attachment) in &self.attachments {
            for address in attachment.lease().addresses.iter() {
                owners.insert((attachment.lease().eni.clone(), address), (key.clone(), attachment.pod().clone()));
            }
        }
        let of_eni = |eni: &EniState, owners: &mut BTreeMap<_, _>| -> Vec<AddressView> {
            let all = eni.v4.iter().chain(eni.v6.iter());
            all.map(|(address, slot)| AddressView {
                address,
                eni: eni.id.clone(),
                prefix: eni.slots(Family::of(address)).prefix_of(address),
                state: match slot.state {
                    SlotState::Bound if slot.missing || eni.missing.is_some() => AddressState::Missing,
                    SlotState::Bound => AddressState::Bound,
                    SlotState::Idle => AddressState::Idle,
                    SlotState::Cooling { .. } => AddressState::Cooling,
                    SlotState::Releasing => AddressState::Releasing,
                },
                owner: owners.remove(&(eni.id.clone(), address)),
            })
            .collect()
        };
        self.enis.values().flat_map(|eni| of_eni(eni, &mut owners)).collect()
    }

    /// Every vSwitch that is configured, or was and has something to tell.
    #[must_use]
    pub fn vswitches(&self) -> Vec<VSwitchView> {
        let view = |v: &VSwitchState| {
            let blocked = v.blocked.as_ref().filter(|(until, _)| *until > self.now);
            let fragmented = v.tight_prefixes.filter(|(cap, until)| *cap == 0 && *until > self.now);
            VSwitchView {
                id: v.id.clone(),
                configured: v.configured,
                available: v.available,
                backoff_until: blocked.map(|(until, _)| *until),
                fragmented_until: fragmented.map(|(_, until)| until),
                error: blocked
                    .map(|(_, error)| error.explain())
                    .or_else(|| fragmented.map(|_| Error::new(errors::PREFIX_FRAGMENTED, v.id.to_string()))),
            }
        };
        self.vswitches.iter().map(view).collect()
    }

    /// ENIs of this instance that the pool leaves alone: somebody else's by their tags, of another kind, or not attached.
    #[must_use]
    pub fn foreign(&self) -> &[Eni] {
        self.inventory.foreign()
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
        if !self.may_ask() {
            problems.push(problem::degraded());
        }
        problems.extend(self.inventory.error().map(CloudError::explain));
        problems.extend(self.vswitches.trouble(self.now).map(CloudError::explain));
        for (vswitch, _, error) in self.vswitches.blocked(self.now) {
            let Error { code, detail } = error.explain();
            problems.push(Error::new(code, format!("{vswitch}: {detail}")));
        }
        let blocked = [self.creations.blocked(self.now), self.assign_block.get(self.now)].into_iter().flatten();
        problems.extend(blocked.map(|(_, error)| error.clone()));
        problems.extend(self.creations.iter().filter_map(Creation::error).map(CloudError::explain));
        for eni in self.enis.values() {
            let named = |Error { code, detail }: Error| Error::new(code, format!("{}: {detail}", eni.id));
            // An ENI with pods is told of by them, below.
            if eni.missing.is_some() && !self.attachments.values().any(|a| a.lease().eni == eni.id) {
                let detail = format!("{}: The cloud does not list it as attached to the instance.", eni.id);
                problems.push(Error::new(errors::ENI_UNKNOWN, detail));
            }
            problems.extend(eni.error.clone().or_else(|| eni.reason.clone()).map(named));
            for slots in [&eni.v4, &eni.v6] {
                let failing = slots.call.as_ref().and_then(|call| call.error.as_ref());
                let blocked = slots.blocked.as_ref().filter(|(until, _)| *until > self.now).map(|(_, error)| error);
                problems.extend(failing.into_iter().chain(blocked).map(|error| named(error.explain())));
            }
        }
        for (key, attachment) in &self.attachments {
            if let Some(error) = attachment.error() {
                problems.push(Error::new(error.code, format!("{key}: {}", error.detail)));
            }
        }
        if self.enis.values().any(|eni| eni.missing.is_some() || eni.v4.missing() + eni.v6.missing() > 0) {
            for view in self.list().into_iter().filter(|view| !view.missing.is_empty()) {
                let whole = self.enis.get(&view.lease.eni).is_none_or(|eni| eni.missing.is_some());
                problems.push(problem::address_loss(&view.pod.to_string(), &view.lease.eni, &view.missing, whole));
            }
        }
        problems
    }
}

/// A view of an ENI of which nothing else is known.
const fn blank(mac: Option<Mac>, vswitch: VSwitchId, phase: EniPhase) -> EniView {
    EniView {
        id: None,
        mac,
        vswitch,
        phase,
        ifindex: None,
        addresses: Vec::new(),
        prefixes: Vec::new(),
        bound: 0,
        idle: 0,
        cooling: 0,
        releasing: 0,
        reason: None,
        backoff_until: None,
        error: None,
    }
}

fn eni_view(eni: &EniState, now: Moment) -> EniView {
    let phase = match eni.stage {
        Stage::Attaching => EniPhase::Attaching,
        Stage::Configuring | Stage::InUse if eni.missing.is_some() => EniPhase::Missing,
        Stage::Configuring | Stage::InUse if eni.draining => EniPhase::Draining,
        Stage::Configuring | Stage::InUse if eni.mismatch.is_some() => EniPhase::Mismatched,
        Stage::Configuring => EniPhase::Configuring,
        Stage::InUse => EniPhase::InUse,
        Stage::Detaching => EniPhase::Detaching,
        Stage::Deleting => EniPhase::Deleting,
    };
    let families = [&eni.v4, &eni.v6];
    let calls = families.into_iter().filter_map(|slots| slots.call.as_ref());
    // A failing release hinders nobody; a failing assignment does.
    let mut assigns = calls.filter(|call| call.kind.token().is_some());
    let blocks = families.into_iter().filter_map(|slots| slots.blocked.as_ref());
    let prefixes = families.into_iter().flat_map(|slots| slots.prefixes()).map(|(prefix, state)| PrefixView {
        prefix: *prefix,
        in_use: state.in_use,
        slots: state.slots,
        releasing: state.releasing,
    });
    let sum = |of: fn(Counts) -> u32| families.into_iter().map(|slots| of(slots.counts())).sum();
    EniView {
        id: Some(eni.id.clone()),
        ifindex: eni.nic.as_ref().map(|nic| nic.ifindex),
        addresses: eni.v4.iter().chain(eni.v6.iter()).map(|(address, _)| address).collect(),
        prefixes: prefixes.collect(),
        bound: sum(|counts| counts.bound),
        idle: sum(|counts| counts.idle),
        cooling: sum(|counts| counts.cooling),
        releasing: sum(|counts| counts.releasing),
        reason: eni.reason.clone().or_else(|| eni.mismatch.as_ref().map(|(mismatch, _)| mismatch.explain(eni))),
        backoff_until: blocks.map(|(until, _)| *until).filter(|until| *until > now).max(),
        error: eni.error.clone().or_else(|| assigns.find_map(|call| call.error.as_ref().map(CloudError::explain))),
        ..blank(Some(eni.mac), eni.vswitch.clone(), phase)
    }
}
