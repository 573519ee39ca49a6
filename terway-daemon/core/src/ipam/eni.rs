//! One ENI of the pool.

use std::net::{IpAddr, Ipv4Addr};

use super::config::PoolConfig;
use super::effect::Nic;
use super::event::OpId;
use super::record::{EniRecord, EniStage};
use super::slot::Slots;
use crate::clock::Moment;
use crate::cloud::Eni;
use crate::errors::Error;
use crate::ident::{AttachmentKey, EniId, Family, Mac, VSwitchId};

/// How far an ENI is. `Creating` has no id yet and is a [`Creation`](super::lifecycle::Creation); `Draining` is `InUse` and `draining`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Attaching,
    /// Attached; its NIC is awaited and configured.
    Configuring,
    InUse,
    Detaching,
    Deleting,
}

#[derive(Debug)]
pub(super) struct EniState {
    pub(super) id: EniId,
    pub(super) mac: Mac,
    pub(super) vswitch: VSwitchId,
    /// It cannot be given back while the ENI lives.
    pub(super) primary_v4: Ipv4Addr,
    pub(super) stage: Stage,
    pub(super) draining: bool,
    pub(super) nic: Option<Nic>,
    pub(super) v4: Slots,
    pub(super) v6: Slots,
    /// The step of its life that is under way; `None` between steps and while one waits to be repeated.
    pub(super) op: Option<OpId>,
    pub(super) failures: u32,
    pub(super) error: Option<Error>,
    /// Since when the cloud's list lacks it.
    pub(super) missing: Option<Moment>,
    /// When a step of its life last went well.
    pub(super) changed: Option<Moment>,
    /// Attachments that a restart found half wired and that wait for the NIC.
    pub(super) unconnected: Vec<AttachmentKey>,
}

impl EniState {
    pub(super) fn new(id: EniId, mac: Mac, vswitch: VSwitchId, primary_v4: Ipv4Addr, stage: Stage) -> Self {
        Self {
            id,
            mac,
            vswitch,
            primary_v4,
            stage,
            draining: false,
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

    pub(super) fn from_cloud(eni: &Eni, stage: Stage) -> Self {
        Self::new(eni.id.clone(), eni.mac, eni.vswitch.clone(), eni.primary_v4, stage)
    }

    pub(super) const fn slots(&self, family: Family) -> &Slots {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    pub(super) const fn slots_mut(&mut self, family: Family) -> &mut Slots {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    pub(super) fn is_primary(&self, address: IpAddr) -> bool {
        address == IpAddr::V4(self.primary_v4)
    }

    /// New pods may be put here.
    pub(super) const fn usable(&self) -> bool {
        matches!(self.stage, Stage::InUse) && !self.draining && self.missing.is_none()
    }

    /// On its way to being usable. One that keeps failing is not counted upon.
    pub(super) const fn starting(&self) -> bool {
        matches!(self.stage, Stage::Attaching | Stage::Configuring)
            && !self.draining
            && self.missing.is_none()
            && self.failures < 2
    }

    /// The cloud takes calls about its addresses.
    pub(super) const fn attached(&self) -> bool {
        matches!(self.stage, Stage::Configuring | Stage::InUse)
    }

    pub(super) const fn in_use(&self) -> bool {
        self.v4.in_use() || self.v6.in_use()
    }

    pub(super) const fn calling(&self) -> bool {
        self.v4.call.is_some() || self.v6.call.is_some()
    }

    pub(super) fn record(&self) -> EniRecord {
        EniRecord {
            id: self.id.clone(),
            mac: self.mac,
            vswitch: self.vswitch.clone(),
            primary_v4: self.primary_v4,
            addresses: self.v4.iter().chain(self.v6.iter()).map(|(address, _)| address).collect(),
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
    pub(super) fn units(&self, config: &PoolConfig) -> Units {
        let least = |of: &dyn Fn(Family) -> u32| config.families().iter().map(|f| of(*f)).min().unwrap_or(0);
        let ready = least(&|f| self.slots(f).counts().idle);
        let coming = least(&|f| self.slots(f).counts().idle + self.slots(f).incoming());
        let cooling = least(&|f| self.slots(f).counts().cooling);
        Units { ready, pending: coming - ready, cooling, growth: self.growth(config, &|_| u32::MAX) }
    }

    /// Units that further calls could add, if they may add at most so many addresses of each family.
    pub(super) fn growth(&self, config: &PoolConfig, most: &dyn Fn(Family) -> u32) -> u32 {
        let coming = |f: Family| self.slots(f).counts().idle + self.slots(f).incoming();
        let free = |f: Family| {
            // The limit may have shrunk with the instance type, or an assignment be larger than thought.
            config.per_eni(f).saturating_sub(self.slots(f).len() + self.slots(f).incoming())
        };
        let now = config.families().iter().map(|f| coming(*f)).min().unwrap_or(0);
        let then = config.families().iter().map(|f| coming(*f) + free(*f).min(most(*f))).min().unwrap_or(0);
        then - now
    }
}

/// See [`EniState::units`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Units {
    /// Idle now.
    pub(super) ready: u32,
    /// Idle when the calls under way are done.
    pub(super) pending: u32,
    /// That further calls could add.
    pub(super) growth: u32,
    /// Cooling.
    pub(super) cooling: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::InstanceLimits;
    use crate::ident::IpStack;
    use crate::ipam::Token;
    use crate::ipam::slot::{Call, CallKind, SlotState};

    #[test]
    fn units_of_a_lopsided_dual_stack_eni() {
        let limits = InstanceLimits { adapters: 2, v4_per_adapter: 10, v6_per_adapter: 8 };
        let mut config = PoolConfig::new("i-1".into(), limits, "s");
        let mut eni = EniState::new("eni-1".into(), Mac([2; 6]), "vsw-1".into(), [10, 0, 0, 1].into(), Stage::InUse);
        for n in 1..=4u8 {
            eni.v4.enter([10, 0, 0, n].into(), SlotState::Idle);
        }
        assert_eq!(eni.units(&config), Units { ready: 4, pending: 0, growth: 6, cooling: 0 });
        config.stack = IpStack::Dual;
        assert_eq!(eni.units(&config), Units { ready: 0, pending: 0, growth: 8, cooling: 0 });
        let kind = CallKind::Assign { token: Token("t".into()), count: 3 };
        eni.v6.call = Some(Call { kind, op: None, failures: 0, error: None, uncertain: false });
        assert_eq!(eni.units(&config), Units { ready: 0, pending: 3, growth: 5, cooling: 0 });
    }
}
