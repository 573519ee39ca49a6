//! One ENI of the pool: its stage, its addresses, and whether it fits the configuration.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;

use super::slot::{SlotState, Slots};
use crate::clock::Moment;
use crate::cloud::Eni;
use crate::errors::{self, Error};
use crate::ident::{AttachmentKey, EniId, Family, Mac, SecurityGroupId, VSwitchId};
use crate::ipam::config::{PoolConfig, PoolMode, addresses_per_prefix};
use crate::ipam::ids::OpId;
use crate::ipam::lease::Nic;
use crate::ipam::record::{EniRecord, EniStage};

/// How far an ENI is. `Creating` has no id yet and is a [`Creation`](super::creation::Creation); `Draining` is `InUse` and `draining`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Attaching,
    /// Attached; its NIC is awaited and configured.
    Configuring,
    InUse,
    Detaching,
    Deleting,
}

/// Why an ENI takes no new pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// Its vSwitch is not configured any more.
    VSwitch,
    /// Its security groups are others than those configured.
    SecurityGroups,
    /// It lacks a tag of the filter.
    TagFilter,
    /// It has a tag of the block list: no cloud call is made about it.
    Blocked(String, String),
}

#[derive(Debug)]
pub(crate) struct EniState {
    pub(crate) id: EniId,
    pub(crate) mac: Mac,
    pub(crate) vswitch: VSwitchId,
    /// It cannot be given back while the ENI lives.
    pub(crate) primary_v4: Ipv4Addr,
    /// As far as known.
    pub(crate) security_groups: Option<Vec<SecurityGroupId>>,
    /// As far as known.
    pub(crate) tags: Option<BTreeMap<String, String>>,
    pub(crate) stage: Stage,
    /// It is drained and then deleted; stored.
    pub(crate) draining: bool,
    /// Why it takes no new pods although it is not draining, and since when. May pass with the next configuration.
    pub(crate) mismatch: Option<(Mismatch, Moment)>,
    /// Why it is drained, for views.
    pub(crate) reason: Option<Error>,
    pub(crate) nic: Option<Nic>,
    pub(crate) v4: Slots,
    pub(crate) v6: Slots,
    /// The step of its life that is under way; `None` between steps and while one waits to be repeated.
    pub(crate) op: Option<OpId>,
    pub(crate) failures: u32,
    pub(crate) error: Option<Error>,
    /// Since when the cloud's list lacks it.
    pub(crate) missing: Option<Moment>,
    /// When a step of its life last went well.
    pub(crate) changed: Option<Moment>,
    /// Attachments that a restart found half wired and that wait for the NIC.
    pub(crate) unconnected: Vec<AttachmentKey>,
}

impl EniState {
    pub(crate) fn new(id: EniId, mac: Mac, vswitch: VSwitchId, primary_v4: Ipv4Addr, stage: Stage) -> Self {
        Self {
            id,
            mac,
            vswitch,
            primary_v4,
            security_groups: None,
            tags: None,
            stage,
            draining: false,
            mismatch: None,
            reason: None,
            nic: None,
            v4: Slots::default(),
            v6: Slots::default(),
            op: None,
            failures: 0,
            error: None,
            missing: None,
            changed: None,
            unconnected: Vec::new(),
        }
    }

    pub(crate) fn from_cloud(eni: &Eni, stage: Stage) -> Self {
        let mut state = Self::new(eni.id.clone(), eni.mac, eni.vswitch.clone(), eni.primary_v4, stage);
        state.security_groups = Some(eni.security_groups.clone());
        state.tags = Some(eni.tags.clone());
        state
    }

    pub(crate) const fn slots(&self, family: Family) -> &Slots {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    pub(crate) const fn slots_mut(&mut self, family: Family) -> &mut Slots {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    pub(crate) fn is_primary(&self, address: IpAddr) -> bool {
        address == IpAddr::V4(self.primary_v4)
    }

    /// New pods may be put here.
    pub(crate) const fn usable(&self) -> bool {
        matches!(self.stage, Stage::InUse) && !self.draining && self.missing.is_none() && self.mismatch.is_none()
    }

    /// Excluded from the pool by its tags.
    pub(crate) const fn blocked(&self) -> bool {
        matches!(self.mismatch, Some((Mismatch::Blocked(..), _)))
    }

    /// Nothing keeps it from being detached, except perhaps the step of its life that is under way.
    pub(crate) fn empty(&self) -> bool {
        !self.in_use() && !self.calling()
    }

    /// Detached or on the way there, with nothing to wait for but the cloud.
    pub(crate) fn leaving(&self) -> bool {
        matches!(self.stage, Stage::Detaching | Stage::Deleting) || (self.draining && self.empty())
    }

    /// On its way to being usable. One that keeps failing is not counted upon.
    pub(crate) const fn starting(&self) -> bool {
        matches!(self.stage, Stage::Attaching | Stage::Configuring)
            && !self.draining
            && self.missing.is_none()
            && self.mismatch.is_none()
            && self.failures < 2
    }

    /// The cloud takes calls about its addresses.
    pub(crate) const fn attached(&self) -> bool {
        matches!(self.stage, Stage::Configuring | Stage::InUse)
    }

    pub(crate) const fn in_use(&self) -> bool {
        self.v4.in_use() || self.v6.in_use()
    }

    /// A call about its addresses is under way. One that waits to be repeated counts too, unless it may never be.
    pub(crate) fn calling(&self) -> bool {
        let runs = |slots: &Slots| slots.call.as_ref().is_some_and(|call| call.op.is_some() || !self.blocked());
        runs(&self.v4) || runs(&self.v6)
    }

    pub(crate) fn record(&self) -> EniRecord {
        EniRecord {
            id: self.id.clone(),
            mac: self.mac,
            vswitch: self.vswitch.clone(),
            primary_v4: self.primary_v4,
            security_groups: self.security_groups.clone(),
            tags: self.tags.clone(),
            addresses: self.v4.singles().chain(self.v6.singles()).map(|(address, _)| address).collect(),
            prefixes: self.v4.prefixes().keys().chain(self.v6.prefixes().keys()).copied().collect(),
            nic: self.nic.clone(),
            stage: match self.stage {
                Stage::Attaching => EniStage::Attaching,
                Stage::Configuring | Stage::InUse if self.draining => EniStage::Draining,
                Stage::Configuring | Stage::InUse => EniStage::InUse,
                Stage::Detaching => EniStage::Detaching,
                Stage::Deleting => EniStage::Deleting,
            },
        }
    }

    /// Units (one address of each family of the stack) on this ENI.
    pub(crate) fn units(&self, config: &PoolConfig) -> Units {
        let least = |of: &dyn Fn(Family) -> u32| config.families().iter().map(|f| of(*f)).min().unwrap_or(0);
        let mut ready = least(&|f| self.slots(f).counts().idle);
        let mut coming = least(&|f| self.slots(f).counts().idle + self.slots(f).incoming());
        let mut cooling = least(&|f| self.slots(f).counts().cooling);
        if config.mode == PoolMode::Exclusive {
            // However many addresses it has, it carries one pod.
            let bound = self.v4.counts().bound + self.v6.counts().bound > 0;
            cooling = if bound { 0 } else { cooling.min(1) };
            let free = u32::from(!self.in_use() && self.has_idle_primary(config));
            (ready, coming) = (ready.min(free), coming.min(free));
        }
        Units { ready, pending: coming - ready, cooling, growth: self.growth(config, &|f| self.room(config, f, true)) }
    }

    /// Whether the address for the one pod of an exclusive ENI is idle.
    fn has_idle_primary(&self, config: &PoolConfig) -> bool {
        let primary = self.v4.get(self.primary_v4.into()).is_some_and(|slot| slot.state == SlotState::Idle);
        primary || !config.stack.v4()
    }

    /// The address of a family for the next pod, with when it was last used.
    pub(crate) fn offer(&self, config: &PoolConfig, family: Family) -> Option<(u64, IpAddr)> {
        if config.mode == PoolMode::Exclusive {
            if self.in_use() {
                return None;
            }
            if family == Family::V4 {
                let primary = IpAddr::V4(self.primary_v4);
                let slot = self.v4.get(primary).filter(|slot| slot.state == SlotState::Idle)?;
                return Some((slot.used, primary));
            }
        }
        self.slots(family).least_recently_used()
    }

    /// Addresses of a family that the ENI could still take, as prefixes or one by one.
    pub(crate) fn room(&self, config: &PoolConfig, family: Family, prefixes: bool) -> u32 {
        let slots = self.slots(family);
        // The limit may have shrunk with the instance type, or an assignment be larger than thought.
        let places = config.per_eni(family).saturating_sub(slots.places() + slots.incoming_places());
        if !(prefixes && config.uses_prefixes()) {
            return places;
        }
        let have = u32::try_from(slots.prefixes().len()).unwrap_or(u32::MAX) + slots.incoming_prefixes();
        places.min(config.prefixes_per_eni(family).saturating_sub(have)) * addresses_per_prefix(family)
    }

    /// Units that further calls could add, if they may add at most so many addresses of each family.
    pub(crate) fn growth(&self, config: &PoolConfig, room: &dyn Fn(Family) -> u32) -> u32 {
        let coming = |f: Family| self.slots(f).counts().idle + self.slots(f).incoming();
        let now = config.families().iter().map(|f| coming(*f)).min().unwrap_or(0);
        let then = config.families().iter().map(|f| coming(*f) + room(*f)).min().unwrap_or(0);
        if config.mode == PoolMode::Exclusive && self.in_use() { 0 } else { then - now }
    }
}

/// See [`EniState::units`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Units {
    /// Idle now.
    pub(crate) ready: u32,
    /// Idle when the calls under way are done.
    pub(crate) pending: u32,
    /// That further calls could add.
    pub(crate) growth: u32,
    /// Cooling.
    pub(crate) cooling: u32,
}

impl Mismatch {
    /// What is told of an ENI for this reason.
    pub(crate) fn explain(&self, eni: &EniState) -> Error {
        let detail = match self {
            Self::VSwitch => format!("{} is not among the configured vSwitches.", eni.vswitch),
            Self::SecurityGroups => {
                let has: Vec<_> = eni.security_groups.iter().flatten().map(ToString::to_string).collect();
                format!("Its security groups are {}.", has.join(", "))
            }
            Self::TagFilter => "It lacks a tag of eni_tag_filter.".to_owned(),
            Self::Blocked(key, value) => format!("It has the tag {key}={value}, so it is left alone."),
        };
        Error::new(errors::ENI_MISMATCH, detail)
    }
}

/// All single addresses of an ENI.
pub(crate) fn listed_addresses(eni: &Eni) -> impl Iterator<Item = IpAddr> {
    // The primary address is in the list of the real cloud; it is entered once in any case.
    let v4 = std::iter::once(eni.primary_v4).chain(eni.v4.iter().copied());
    v4.map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6))
}

/// All prefixes of an ENI.
pub(crate) fn listed_prefixes(eni: &Eni) -> impl Iterator<Item = IpNetwork> {
    let v4 = eni.v4_prefixes.iter().copied().map(IpNetwork::V4);
    v4.chain(eni.v6_prefixes.iter().copied().map(IpNetwork::V6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::InstanceLimits;
    use crate::ident::IpStack;
    use crate::ipam::ClientToken;
    use crate::ipam::state::slot::{Call, CallKind};

    #[test]
    fn dual_stack_units_of_unbalanced_eni() {
        let limits = InstanceLimits { adapters: 2, v4_per_adapter: 10, v6_per_adapter: 8 };
        let mut config = PoolConfig::new("i-1".into(), limits, "s");
        let mut eni = EniState::new("eni-1".into(), Mac([2; 6]), "vsw-1".into(), [10, 0, 0, 1].into(), Stage::InUse);
        for n in 1..=4u8 {
            eni.v4.enter([10, 0, 0, n].into(), SlotState::Idle);
        }
        assert_eq!(eni.units(&config), Units { ready: 4, pending: 0, growth: 6, cooling: 0 });
        config.stack = IpStack::Dual;
        assert_eq!(eni.units(&config), Units { ready: 0, pending: 0, growth: 8, cooling: 0 });
        let kind = CallKind::Assign { token: ClientToken("t".into()), count: 3 };
        eni.v6.call = Some(Call { kind, op: None, failures: 0, error: None, uncertain: false });
        assert_eq!(eni.units(&config), Units { ready: 0, pending: 3, growth: 5, cooling: 0 });
    }
}
