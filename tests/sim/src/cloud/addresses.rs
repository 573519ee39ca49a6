//! Which addresses of the vSwitches are taken: single ones and blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use terway_core::cidr;

use super::config::VSwitchConfig;
use super::reply::Refusal;

/// Addresses of an IPv4 prefix: a /28 ("IP prefixes", ECS user guide).
const BLOCK: u32 = 16;
/// Length of an IPv6 prefix.
const V6_PREFIX: u8 = 80;
/// IPv6 prefixes come from the upper half of a /64, single addresses from its lower end.
const FIRST_V6_BLOCK: u16 = 0x8000;

/// All that is taken.
#[derive(Default)]
pub(super) struct Addresses {
    used: BTreeSet<IpAddr>,
    v6_blocks: BTreeSet<Ipv6Network>,
    /// Where the search for a free address goes on: an address is reused as late as possible.
    next_v4: BTreeMap<String, u32>,
    next_v6: BTreeMap<String, u128>,
    next_block: BTreeMap<String, u16>,
    /// Taken by nobody in particular, on order.
    occupied: BTreeMap<String, Vec<IpAddr>>,
}

impl Addresses {
    /// Takes one address; false if it is taken.
    pub(super) fn take(&mut self, address: Ipv4Addr) -> bool {
        self.used.insert(address.into())
    }

    /// Takes `count` free IPv4 addresses, all or none.
    pub(super) fn take_v4(&mut self, vswitch: &VSwitchConfig, count: u32) -> Result<Vec<Ipv4Addr>, Refusal> {
        if self.available(vswitch) < count {
            return Err(not_enough(vswitch, "IpAddress"));
        }
        let (first, last) = usable(vswitch);
        let next = self.next_v4.entry(vswitch.id.clone()).or_insert(first);
        let mut taken = Vec::new();
        while taken.len() < count as usize {
            let address = Ipv4Addr::from_bits(*next);
            *next = if *next == last { first } else { *next + 1 };
            if self.used.insert(address.into()) {
                taken.push(address);
            }
        }
        Ok(taken)
    }

    /// Takes `count` whole free blocks, all or none.
    ///
    /// The references name no code of its own for a vSwitch that has addresses but no block; the one for an empty vSwitch is assumed.
    pub(super) fn take_v4_prefixes(
        &mut self,
        vswitch: &VSwitchConfig,
        count: u32,
    ) -> Result<Vec<Ipv4Network>, Refusal> {
        let taken: Vec<u32> = self.free_blocks(vswitch).take(count as usize).collect();
        if taken.len() < count as usize {
            return Err(not_enough(vswitch, "contiguous IpAddress for a prefix"));
        }
        for start in &taken {
            self.used.extend((*start..start + BLOCK).map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits))));
        }
        Ok(taken.into_iter().map(|start| cidr::v4(Ipv4Addr::from_bits(start), 28)).collect())
    }

    fn free_blocks(&self, vswitch: &VSwitchConfig) -> impl Iterator<Item = u32> {
        let (first, last) = usable(vswitch);
        let starts = (first.next_multiple_of(BLOCK)..=last.saturating_sub(BLOCK - 1)).step_by(BLOCK as usize);
        starts.filter(|start| {
            let (a, z) = (Ipv4Addr::from_bits(*start), Ipv4Addr::from_bits(start + BLOCK - 1));
            self.used.range(IpAddr::from(a)..=IpAddr::from(z)).next().is_none()
        })
    }

    /// Takes `count` free IPv6 addresses. A /64 does not run out.
    pub(super) fn take_v6(&mut self, vswitch: &VSwitchConfig, count: u32) -> Result<Vec<Ipv6Addr>, Refusal> {
        let block = v6_of(vswitch)?;
        let next = self.next_v6.entry(vswitch.id.clone()).or_insert(block.network().to_bits() + 1);
        let mut taken = Vec::new();
        while taken.len() < count as usize {
            let address = Ipv6Addr::from_bits(*next);
            *next += 1;
            if self.used.insert(address.into()) {
                taken.push(address);
            }
        }
        Ok(taken)
    }

    /// Takes `count` free IPv6 prefixes.
    pub(super) fn take_v6_prefixes(
        &mut self,
        vswitch: &VSwitchConfig,
        count: u32,
    ) -> Result<Vec<Ipv6Network>, Refusal> {
        let block = v6_of(vswitch)?;
        let next = self.next_block.entry(vswitch.id.clone()).or_insert(FIRST_V6_BLOCK);
        let mut taken = Vec::new();
        // As many turns as there are blocks.
        for _ in FIRST_V6_BLOCK..=u16::MAX {
            if taken.len() == count as usize {
                break;
            }
            let bits = block.network().to_bits() | u128::from(*next) << 48;
            *next = next.checked_add(1).unwrap_or(FIRST_V6_BLOCK);
            let prefix = cidr::v6(Ipv6Addr::from_bits(bits), V6_PREFIX);
            if self.v6_blocks.insert(prefix) {
                taken.push(prefix);
            }
        }
        if taken.len() < count as usize {
            self.give_back_v6_prefixes(&taken);
            return Err(not_enough(vswitch, "Ipv6Prefix"));
        }
        Ok(taken)
    }

    pub(super) fn give_back(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.used.remove(&address);
        }
    }

    pub(super) fn give_back_v4_prefixes(&mut self, prefixes: &[Ipv4Network]) {
        for prefix in prefixes {
            let start = prefix.network().to_bits();
            self.give_back((start..start + BLOCK).map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits))));
        }
    }

    pub(super) fn give_back_v6_prefixes(&mut self, prefixes: &[Ipv6Network]) {
        for prefix in prefixes {
            self.v6_blocks.remove(prefix);
        }
    }

    /// `AvailableIpAddressCount`.
    pub(super) fn available(&self, vswitch: &VSwitchConfig) -> u32 {
        let (first, last) = usable(vswitch);
        let ends = IpAddr::from(Ipv4Addr::from_bits(first))..=IpAddr::from(Ipv4Addr::from_bits(last));
        (last - first + 1).saturating_sub(u32::try_from(self.used.range(ends).count()).unwrap_or(u32::MAX))
    }

    /// Takes all but `leave` of the IPv4 addresses that are left, as other instances would.
    pub(super) fn occupy(&mut self, vswitch: &VSwitchConfig, leave: u32) {
        let count = self.available(vswitch).saturating_sub(leave);
        // As many as are there cannot be too many.
        let taken = self.take_v4(vswitch, count).unwrap_or_default();
        self.occupied.entry(vswitch.id.clone()).or_default().extend(taken.into_iter().map(IpAddr::V4));
    }

    /// Takes one address of every free block.
    pub(super) fn fragment(&mut self, vswitch: &VSwitchConfig) {
        let taken: Vec<IpAddr> =
            self.free_blocks(vswitch).map(|start| Ipv4Addr::from_bits(start + BLOCK / 2).into()).collect();
        self.used.extend(&taken);
        self.occupied.entry(vswitch.id.clone()).or_default().extend(taken);
    }

    /// Gives back what [`Addresses::occupy`] and [`Addresses::fragment`] took.
    pub(super) fn vacate(&mut self, vswitch: &str) {
        let taken = self.occupied.remove(vswitch).unwrap_or_default();
        self.give_back(taken);
    }
}

fn not_enough(vswitch: &VSwitchConfig, what: &str) -> Refusal {
    let message = format!("The specified VSwitch \"{}\" has not enough {what}.", vswitch.id);
    Refusal::new(403, "InvalidVSwitchId.IpNotEnough", message)
}

fn v6_of(vswitch: &VSwitchConfig) -> Result<Ipv6Network, Refusal> {
    vswitch.cidr_v6.ok_or_else(|| {
        let message = format!("IPv6 is not turned on for the VSwitch {}.", vswitch.id);
        Refusal::new(400, "InvalidVSwitch.IPv6NotTurnOn", message)
    })
}

impl VSwitchConfig {
    /// The last address but two, as in the real cloud (10.0.0.253 of 10.0.0.0/24).
    #[must_use]
    pub fn gateway_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.cidr_v4.broadcast().to_bits() - 2)
    }

    /// The last address but two.
    #[must_use]
    pub fn gateway_v6(&self) -> Option<Ipv6Addr> {
        self.cidr_v6.map(|block| Ipv6Addr::from_bits(block.broadcast().to_bits() - 2))
    }
}

/// The first and last address that can be given out: the first and the last three of a vSwitch are the cloud's own ("VPC limits").
fn usable(vswitch: &VSwitchConfig) -> (u32, u32) {
    (vswitch.cidr_v4.network().to_bits() + 1, vswitch.cidr_v4.broadcast().to_bits() - 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vswitch(v4: &str) -> VSwitchConfig {
        let (cidr_v4, cidr_v6) = (v4.parse().unwrap(), Some("fd00::/64".parse().unwrap()));
        VSwitchConfig { id: "v".into(), zone: "z".into(), cidr_v4, cidr_v6 }
    }

    #[test]
    fn prefixes_are_whole_aligned_free_and_come_back() {
        let (mut addresses, vswitch) = (Addresses::default(), vswitch("10.0.0.0/25"));
        let all = addresses.available(&vswitch);
        assert_eq!(all, 124);
        // The first and the last block hold addresses of the cloud's own.
        assert!(addresses.take_v4_prefixes(&vswitch, 7).is_err());
        let six = addresses.take_v4_prefixes(&vswitch, 6).unwrap();
        assert_eq!((six[0].to_string(), six[5].to_string()), ("10.0.0.16/28".into(), "10.0.0.96/28".into()));
        assert_eq!(addresses.available(&vswitch), all - 96);
        let singles = addresses.take_v4(&vswitch, all - 96).unwrap();
        assert!(singles.iter().all(|address| !six.iter().any(|prefix| prefix.contains(*address))));
        addresses.give_back_v4_prefixes(&six);
        assert_eq!(addresses.available(&vswitch), 96);
        let v6 = addresses.take_v6_prefixes(&vswitch, 2).unwrap();
        assert_eq!(v6[1].to_string(), "fd00::8001:0:0:0/80");
        assert!(!v6[0].contains(addresses.take_v6(&vswitch, 1).unwrap()[0]));
    }

    #[test]
    fn what_is_occupied_on_order_leaves_room_for_single_addresses_only() {
        let (mut addresses, vswitch) = (Addresses::default(), vswitch("10.0.0.0/24"));
        addresses.fragment(&vswitch);
        assert_eq!(addresses.take_v4_prefixes(&vswitch, 1).unwrap_err().code, "InvalidVSwitchId.IpNotEnough");
        assert_eq!(addresses.take_v4(&vswitch, 100).unwrap().len(), 100);
        addresses.occupy(&vswitch, 3);
        assert_eq!(addresses.available(&vswitch), 3);
        addresses.vacate("v");
        assert_eq!(addresses.available(&vswitch), 152);
    }
}
