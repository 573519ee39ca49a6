//! A cloud in memory: limits, tokens, exhausted vSwitches, lists that lag.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use terway_core::clock::Moment;
use terway_core::cloud::{CloudError, Eni, EniKind, EniStatus, ErrorClass, Subnet};
use terway_core::ident::{EniId, Family, Mac, VSwitchId};
use terway_core::ipam::{Effect, PoolConfig, Token};

pub(crate) const INSTANCE: &str = "i-1";

pub(crate) fn error(class: ErrorClass, code: &str) -> CloudError {
    CloudError { action: "Call".into(), class, code: code.into(), message: "no".into(), request_id: "r".into() }
}

pub(crate) fn subnet() -> Subnet {
    Subnet {
        cidr_v4: "10.0.0.0/16".parse().unwrap(),
        gateway_v4: [10, 0, 255, 253].into(),
        cidr_v6: Some("fd00::/64".parse().unwrap()),
        gateway_v6: Some("fd00::ffff".parse().unwrap()),
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cloud {
    pub(crate) enis: BTreeMap<EniId, Eni>,
    free: BTreeMap<VSwitchId, BTreeSet<Ipv4Addr>>,
    next_v6: u16,
    next_eni: u8,
    created: BTreeMap<Token, EniId>,
    assigned: BTreeMap<Token, Vec<IpAddr>>,
    /// Lists by the moment they were true.
    history: Vec<(Moment, Vec<Eni>)>,
    /// How many calls of each kind were made.
    pub(crate) calls: BTreeMap<&'static str, u32>,
    pub(crate) limits: Option<(u32, u32, u32)>,
}

impl Cloud {
    /// A vSwitch per entry with so many addresses. Freed addresses are handed out again at once, which is the hard case.
    pub(crate) fn new(config: &PoolConfig, sizes: &[u16]) -> Self {
        let mut cloud = Self::default();
        let limits = config.limits;
        cloud.limits = Some((limits.adapters, limits.v4_per_adapter, limits.v6_per_adapter));
        for (i, (vswitch, size)) in (0u8..).zip(config.vswitches.iter().zip(sizes)) {
            cloud.free.insert(
                vswitch.clone(),
                (1..=*size).map(|n| Ipv4Addr::from_bits(u32::from_be_bytes([10, i, 0, 0]) + u32::from(n))).collect(),
            );
        }
        cloud
    }

    pub(crate) fn list(&self) -> Vec<Eni> {
        self.enis.values().cloned().collect()
    }

    /// Remembers the list as of `now`, for those who ask for a stale one.
    pub(crate) fn note(&mut self, now: Moment) {
        let list = self.list();
        if self.history.last().is_none_or(|(_, last)| *last != list) {
            self.history.push((now, list));
        }
    }

    /// A list that was true at some moment at most `lag` ago.
    pub(crate) fn stale_list(&self, now: Moment, lag: Duration, choice: usize) -> Vec<Eni> {
        let mut lists: Vec<_> = (0..self.history.len())
            .filter(|i| self.history.get(i + 1).is_none_or(|(ended, _)| ended.after(lag) > now))
            .map(|i| self.history[i].1.clone())
            .collect();
        lists.push(self.list());
        lists.swap_remove(choice % lists.len())
    }

    fn take(&mut self, vswitch: &VSwitchId, count: u32) -> Result<Vec<Ipv4Addr>, CloudError> {
        let free =
            self.free.get_mut(vswitch).ok_or_else(|| error(ErrorClass::NotFound, "InvalidVSwitchId.NotFound"))?;
        if free.len() < count as usize {
            return Err(error(ErrorClass::VSwitchExhausted, "InvalidVSwitchId.IpNotEnough"));
        }
        Ok((0..count).filter_map(|_| free.pop_first()).collect())
    }

    fn take_v6(&mut self, count: u32) -> Vec<Ipv6Addr> {
        (0..count)
            .map(|_| {
                self.next_v6 += 1;
                Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, self.next_v6)
            })
            .collect()
    }

    fn attached(&self) -> usize {
        self.enis.values().filter(|eni| eni.status == EniStatus::InUse).count()
    }

    pub(crate) fn create(&mut self, effect: &Effect) -> Result<Eni, CloudError> {
        let Effect::CreateEni { token, vswitch, v4, v6, tags, security_groups, .. } = effect else { unreachable!() };
        *self.calls.entry("create").or_default() += 1;
        if let Some(id) = self.created.get(token) {
            return self.enis.get(id).cloned().ok_or_else(|| error(ErrorClass::NotFound, "InvalidEniId.NotFound"));
        }
        let v4 = self.take(vswitch, *v4)?;
        let v6 = self.take_v6(*v6);
        self.next_eni += 1;
        let id = EniId::new(format!("eni-{:02}", self.next_eni));
        let eni = Eni {
            id: id.clone(),
            mac: Mac([2, 0, 0, 0, 0, self.next_eni]),
            vswitch: vswitch.clone(),
            status: EniStatus::Available,
            kind: EniKind::Secondary,
            instance: None,
            primary_v4: v4[0],
            v4,
            v6,
            v4_prefixes: Vec::new(),
            v6_prefixes: Vec::new(),
            security_groups: security_groups.clone(),
            tags: tags.clone(),
        };
        self.enis.insert(id.clone(), eni.clone());
        self.created.insert(token.clone(), id);
        Ok(eni)
    }

    fn eni(&mut self, id: &EniId) -> Result<&mut Eni, CloudError> {
        self.enis.get_mut(id).ok_or_else(|| error(ErrorClass::NotFound, "InvalidEniId.NotFound"))
    }

    fn shift(&mut self, id: &EniId, from: EniStatus, to: EniStatus) -> Result<(), CloudError> {
        let eni = self.eni(id)?;
        if eni.status != from {
            return Err(error(ErrorClass::InvalidState, "InvalidOperation.InvalidEniState"));
        }
        eni.status = to;
        eni.instance = (to == EniStatus::InUse).then(|| INSTANCE.into());
        Ok(())
    }

    pub(crate) fn attach(&mut self, id: &EniId) -> Result<(), CloudError> {
        *self.calls.entry("attach").or_default() += 1;
        let adapters = self.limits.map_or(0, |(adapters, ..)| adapters as usize);
        if self.eni(id)?.status == EniStatus::Available && self.attached() + 1 >= adapters {
            return Err(error(ErrorClass::Quota, "EniPerInstanceLimitExceeded"));
        }
        self.shift(id, EniStatus::Available, EniStatus::InUse)
    }

    pub(crate) fn detach(&mut self, id: &EniId) -> Result<(), CloudError> {
        *self.calls.entry("detach").or_default() += 1;
        self.shift(id, EniStatus::InUse, EniStatus::Available)
    }

    pub(crate) fn delete(&mut self, id: &EniId) -> Result<(), CloudError> {
        *self.calls.entry("delete").or_default() += 1;
        if self.eni(id)?.status != EniStatus::Available {
            return Err(error(ErrorClass::InvalidState, "InvalidOperation.InvalidEniState"));
        }
        if let Some(eni) = self.enis.remove(id) {
            self.free.entry(eni.vswitch).or_default().extend(eni.v4);
        }
        Ok(())
    }

    pub(crate) fn assign(
        &mut self,
        token: &Token,
        id: &EniId,
        family: Family,
        count: u32,
    ) -> Result<Vec<IpAddr>, CloudError> {
        *self.calls.entry("assign").or_default() += 1;
        if let Some(addresses) = self.assigned.get(token) {
            return Ok(addresses.clone());
        }
        let addresses = self.add(id, family, count)?;
        self.assigned.insert(token.clone(), addresses.clone());
        Ok(addresses)
    }

    /// Adds addresses, asked by whomever.
    pub(crate) fn add(&mut self, id: &EniId, family: Family, count: u32) -> Result<Vec<IpAddr>, CloudError> {
        let (_, most_v4, most_v6) = self.limits.unwrap_or_default();
        let eni = self.eni(id)?.clone();
        if eni.status != EniStatus::InUse {
            return Err(error(ErrorClass::InvalidState, "InvalidOperation.InvalidEniState"));
        }
        let (held, most) = match family {
            Family::V4 => (eni.v4.len(), most_v4),
            Family::V6 => (eni.v6.len(), most_v6),
        };
        if held + count as usize > most as usize {
            return Err(error(ErrorClass::Quota, "InvalidOperation.Ipv4CountExceeded"));
        }
        Ok(match family {
            Family::V4 => {
                let new = self.take(&eni.vswitch, count)?;
                self.eni(id)?.v4.extend(&new);
                new.into_iter().map(IpAddr::V4).collect()
            }
            Family::V6 => {
                let new = self.take_v6(count);
                self.eni(id)?.v6.extend(&new);
                new.into_iter().map(IpAddr::V6).collect()
            }
        })
    }

    pub(crate) fn unassign(&mut self, id: &EniId, addresses: &[IpAddr]) -> Result<(), CloudError> {
        *self.calls.entry("unassign").or_default() += 1;
        let eni = self.eni(id)?;
        assert!(!addresses.contains(&IpAddr::V4(eni.primary_v4)), "the primary address of {id} was given back");
        if !addresses.iter().all(|address| holds(eni, *address)) {
            return Err(error(ErrorClass::NotFound, "InvalidIp.IpUnassigned"));
        }
        eni.v4.retain(|a| !addresses.contains(&IpAddr::V4(*a)));
        eni.v6.retain(|a| !addresses.contains(&IpAddr::V6(*a)));
        let vswitch = eni.vswitch.clone();
        let freed = addresses.iter().filter_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
        self.free.entry(vswitch).or_default().extend(freed);
        Ok(())
    }

    pub(crate) fn has(&self, id: &EniId, address: IpAddr) -> bool {
        self.enis.get(id).is_some_and(|eni| eni.status == EniStatus::InUse && holds(eni, address))
    }
}

fn holds(eni: &Eni, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => eni.v4.contains(&a),
        IpAddr::V6(a) => eni.v6.contains(&a),
    }
}
