//! A cloud in memory: limits, tokens, exhausted vSwitches, lists that lag.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use terway_core::clock::Moment;
use terway_core::cloud::{CloudError, Eni, EniKind, EniStatus, ErrorClass, Subnet, VSwitch};
use terway_core::ident::{EniId, Family, Mac, VSwitchId};
use terway_core::ipam::{ClientToken, Effect, PoolConfig};

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
    created: BTreeMap<ClientToken, EniId>,
    assigned: BTreeMap<ClientToken, Vec<IpAddr>>,
    assigned_prefixes: BTreeMap<ClientToken, Vec<IpNetwork>>,
    next_v6_prefix: u16,
    /// ENIs, and addresses of ENIs, that somebody took away behind the pool's back. The addresses are nobody's from then on.
    pub(crate) taken: BTreeSet<(EniId, Option<IpAddr>)>,
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
        if self.history.last().is_none_or(|(_, last)| !last.iter().eq(self.enis.values())) {
            self.history.push((now, self.list()));
        }
    }

    /// A list that was true at some moment at most `lag` ago; `usize::MAX` chooses the present one.
    pub(crate) fn stale_list(&self, now: Moment, lag: Duration, choice: usize) -> Vec<Eni> {
        // Each list ends when the next begins.
        let first = self.history.iter().skip(1).take_while(|(ended, _)| ended.after(lag) <= now).count();
        let told = self.history.get(first..).unwrap_or_default();
        let index = if choice == usize::MAX { told.len() } else { choice % (told.len() + 1) };
        told.get(index).map_or_else(|| self.list(), |(_, list)| list.clone())
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

    /// Whole blocks only, so a vSwitch can have addresses and no prefix.
    fn take_prefixes(&mut self, vswitch: &VSwitchId, count: u32) -> Result<Vec<Ipv4Network>, CloudError> {
        let free =
            self.free.get_mut(vswitch).ok_or_else(|| error(ErrorClass::NotFound, "InvalidVSwitchId.NotFound"))?;
        let whole = |a: &&Ipv4Addr| {
            a.octets()[3].is_multiple_of(16) && (0..16).all(|n| free.contains(&Ipv4Addr::from_bits(a.to_bits() + n)))
        };
        let found: Vec<_> =
            free.iter().filter(whole).take(count as usize).map(|a| Ipv4Network::new(*a, 28).unwrap()).collect();
        if found.len() < count as usize {
            return Err(error(ErrorClass::VSwitchExhausted, "InvalidVSwitchId.IpNotEnough"));
        }
        for address in found.iter().flat_map(of) {
            free.remove(&address);
        }
        Ok(found)
    }

    fn take_v6_prefixes(&mut self, count: u32) -> Vec<Ipv6Network> {
        (0..count)
            .map(|_| {
                self.next_v6_prefix += 1;
                Ipv6Network::new(Ipv6Addr::new(0xfd00, 0, 0, 1, self.next_v6_prefix, 0, 0, 0), 80).unwrap()
            })
            .collect()
    }

    fn attached(&self) -> usize {
        self.enis.values().filter(|eni| eni.status == EniStatus::InUse).count()
    }

    pub(crate) fn create(&mut self, effect: &Effect) -> Result<Eni, CloudError> {
        let Effect::CreateEni { token, vswitch, v4, v6, v4_prefixes, v6_prefixes, tags, security_groups, .. } = effect
        else {
            unreachable!()
        };
        assert!(*v4_prefixes == 0 || *v4 == 1, "the API takes addresses or prefixes, not both");
        assert!((*v4 <= 50) && (*v6 <= 10) && (*v6_prefixes == 0 || *v6 == 0));
        *self.calls.entry("create").or_default() += 1;
        if let Some(id) = self.created.get(token) {
            return self.enis.get(id).cloned().ok_or_else(|| error(ErrorClass::NotFound, "InvalidEniId.NotFound"));
        }
        let v4_prefixes = self.take_prefixes(vswitch, *v4_prefixes)?;
        let v4 = match self.take(vswitch, *v4) {
            Ok(v4) => v4,
            Err(error) => {
                self.free.entry(vswitch.clone()).or_default().extend(v4_prefixes.iter().flat_map(of));
                return Err(error);
            }
        };
        let v6 = self.take_v6(*v6);
        let v6_prefixes = self.take_v6_prefixes(*v6_prefixes);
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
            v4_prefixes,
            v6_prefixes,
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
            let free = self.free.entry(eni.vswitch).or_default();
            free.extend(eni.v4_prefixes.iter().flat_map(of));
            free.extend(eni.v4);
        }
        Ok(())
    }

    pub(crate) fn assign(
        &mut self,
        token: &ClientToken,
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
            Family::V4 => (eni.v4.len() + eni.v4_prefixes.len(), most_v4),
            Family::V6 => (eni.v6.len() + eni.v6_prefixes.len(), most_v6),
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

    pub(crate) fn assign_prefixes(
        &mut self,
        token: &ClientToken,
        id: &EniId,
        family: Family,
        count: u32,
    ) -> Result<Vec<IpNetwork>, CloudError> {
        *self.calls.entry("assign").or_default() += 1;
        if let Some(prefixes) = self.assigned_prefixes.get(token) {
            return Ok(prefixes.clone());
        }
        let (_, most_v4, most_v6) = self.limits.unwrap_or_default();
        let eni = self.eni(id)?.clone();
        if eni.status != EniStatus::InUse {
            return Err(error(ErrorClass::InvalidState, "InvalidOperation.InvalidEniState"));
        }
        let (held, most) = match family {
            Family::V4 => (eni.v4.len() + eni.v4_prefixes.len(), most_v4),
            Family::V6 => (eni.v6.len() + eni.v6_prefixes.len(), most_v6),
        };
        if held + count as usize > most as usize {
            return Err(error(ErrorClass::Quota, "InvalidOperation.Ipv4CountExceeded"));
        }
        let new: Vec<IpNetwork> = match family {
            Family::V4 => {
                let new = self.take_prefixes(&eni.vswitch, count)?;
                self.eni(id)?.v4_prefixes.extend(&new);
                new.into_iter().map(IpNetwork::V4).collect()
            }
            Family::V6 => {
                let new = self.take_v6_prefixes(count);
                self.eni(id)?.v6_prefixes.extend(&new);
                new.into_iter().map(IpNetwork::V6).collect()
            }
        };
        self.assigned_prefixes.insert(token.clone(), new.clone());
        Ok(new)
    }

    pub(crate) fn unassign_prefixes(&mut self, id: &EniId, prefixes: &[IpNetwork]) -> Result<(), CloudError> {
        *self.calls.entry("unassign").or_default() += 1;
        let eni = self.eni(id)?;
        if !prefixes.iter().all(|prefix| prefixes_of(eni).contains(prefix)) {
            return Err(error(ErrorClass::NotFound, "InvalidIp.IpUnassigned"));
        }
        eni.v4_prefixes.retain(|p| !prefixes.contains(&IpNetwork::V4(*p)));
        eni.v6_prefixes.retain(|p| !prefixes.contains(&IpNetwork::V6(*p)));
        let vswitch = eni.vswitch.clone();
        let freed = prefixes.iter().filter_map(|p| if let IpNetwork::V4(p) = p { Some(*p) } else { None });
        self.free.entry(vswitch).or_default().extend(freed.flat_map(|p| of(&p).collect::<Vec<_>>()));
        Ok(())
    }

    pub(crate) fn count(&mut self, ids: &[VSwitchId]) -> Vec<VSwitch> {
        *self.calls.entry("count").or_default() += 1;
        let known = ids.iter().filter_map(|id| self.free.get(id).map(|free| (id, free.len())));
        known
            .map(|(id, available)| VSwitch {
                id: id.clone(),
                zone: "z".into(),
                available: u32::try_from(available).unwrap(),
                cidr_v4: "10.0.0.0/16".parse().unwrap(),
                cidr_v6: None,
            })
            .collect()
    }

    /// Whether a call like this, by its token, was served before.
    pub(crate) fn knows(&self, effect: &Effect) -> bool {
        match effect {
            Effect::CreateEni { token, .. } => self.created.contains_key(token),
            Effect::Assign { token, .. } => self.assigned.contains_key(token),
            Effect::AssignPrefixes { token, .. } => self.assigned_prefixes.contains_key(token),
            _ => false,
        }
    }

    /// IPv4 addresses of a vSwitch that are free or single ones of an ENI.
    pub(crate) fn supply(&self, vswitch: &VSwitchId) -> usize {
        let held = self.enis.values().filter(|eni| eni.vswitch == *vswitch).map(|eni| eni.v4.len());
        self.free.get(vswitch).map_or(0, BTreeSet::len) + held.sum::<usize>()
    }

    /// An admin deletes an ENI in the console, or takes one address away. The primary ENI of the story is not in the model.
    pub(crate) fn tamper(&mut self, id: &EniId, address: Option<IpAddr>) {
        self.taken.insert((id.clone(), address));
        match (address, self.enis.get_mut(id)) {
            (None, _) => drop(self.enis.remove(id)),
            (Some(address), Some(eni)) => {
                eni.v4.retain(|a| IpAddr::V4(*a) != address);
                eni.v6.retain(|a| IpAddr::V6(*a) != address);
            }
            _ => {}
        }
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

fn of(prefix: &Ipv4Network) -> impl Iterator<Item = Ipv4Addr> + use<> {
    let first = prefix.network().to_bits();
    (0..16).map(move |n| Ipv4Addr::from_bits(first + n))
}

pub(crate) fn prefixes_of(eni: &Eni) -> Vec<IpNetwork> {
    let v4 = eni.v4_prefixes.iter().map(|p| IpNetwork::V4(*p));
    v4.chain(eni.v6_prefixes.iter().map(|p| IpNetwork::V6(*p))).collect()
}

fn holds(eni: &Eni, address: IpAddr) -> bool {
    if prefixes_of(eni).iter().any(|prefix| prefix.contains(address)) {
        return true;
    }
    match address {
        IpAddr::V4(a) => eni.v4.contains(&a),
        IpAddr::V6(a) => eni.v6.contains(&a),
    }
}
