//! What exists in the VPC: ENIs, their addresses, their states.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use serde::Serialize;
use serde_json::Value;
use terway_core::cloud::{EniKind, EniStatus};
use terway_core::ident::{EniId, Mac, VSwitchId};

use super::config::{CloudConfig, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use super::reply::Refusal;
use super::wire::{Command, Wire};
use crate::fabric::FabricEni;

/// An ENI as the cloud has it.
#[derive(Clone, Debug, Serialize)]
pub struct EniRecord {
    /// Its id.
    pub id: EniId,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its vSwitch.
    pub vswitch: String,
    /// State.
    pub status: EniStatus,
    /// Role.
    pub kind: EniKind,
    /// The id of the instance it is attached to, or on its way to or from.
    pub instance: Option<String>,
    /// The node of that instance.
    pub node: Option<String>,
    /// IPv4 addresses, the primary one first.
    pub v4: Vec<Ipv4Addr>,
    /// IPv6 addresses.
    pub v6: Vec<Ipv6Addr>,
    /// Security groups.
    pub security_groups: Vec<String>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Whether the NIC is in the node (by the cloud's order; the fabric may take a moment).
    pub plugged: bool,
    #[serde(skip)]
    pub(super) description: String,
    #[serde(skip)]
    pub(super) created: SystemTime,
    /// Counts attachments, so that a late step of an earlier one is recognised.
    #[serde(skip)]
    pub(super) attachment: u64,
}

pub(super) struct Vpc {
    pub(super) config: CloudConfig,
    pub(super) enis: BTreeMap<EniId, EniRecord>,
    /// `(action, ClientToken)` → what was asked and what was answered.
    pub(super) answered: HashMap<(String, String), (String, Value)>,
    pub(super) wire: Wire,
    used: BTreeSet<IpAddr>,
    /// Where the search for a free address goes on: an address is reused as late as possible.
    next_v4: BTreeMap<String, u32>,
    next_v6: BTreeMap<String, u128>,
    next_eni: u64,
    next_request: u64,
}

impl Vpc {
    pub(super) fn new(config: CloudConfig, wire: Wire) -> anyhow::Result<Self> {
        let mut vpc = Self {
            enis: BTreeMap::new(),
            answered: HashMap::new(),
            wire,
            used: BTreeSet::new(),
            next_v4: BTreeMap::new(),
            next_v6: BTreeMap::new(),
            next_eni: 0,
            next_request: 0,
            config,
        };
        // Fixed addresses first, so that the others keep clear of them.
        let mut instances = vpc.config.instances.clone();
        instances.sort_by_key(|instance| instance.primary_v4.is_none());
        for instance in instances {
            vpc.add_instance(&instance).with_context(|| format!("instance {}", instance.id))?;
        }
        Ok(vpc)
    }

    fn add_instance(&mut self, instance: &InstanceConfig) -> anyhow::Result<()> {
        if self.instance_type(&instance.instance_type).is_none() {
            bail!("unknown instance type {}", instance.instance_type);
        }
        let vswitch = self.vswitch(&instance.vswitch).context("unknown vSwitch")?.clone();
        let v4 = match instance.primary_v4 {
            Some(address) if vswitch.cidr_v4.contains(&address) && self.used.insert(address.into()) => vec![address],
            Some(address) => bail!("{address} is taken or not in {}", vswitch.cidr_v4),
            None => self.take_v4(&vswitch, 1).map_err(|refusal| anyhow::anyhow!(refusal.message))?,
        };
        let v6 = match vswitch.cidr_v6 {
            Some(_) => self.take_v6(&vswitch, 1).map_err(|refusal| anyhow::anyhow!(refusal.message))?,
            None => Vec::new(),
        };
        let mut eni = self.new_eni(&instance.vswitch, EniKind::Primary, v4, v6);
        eni.status = EniStatus::InUse;
        eni.instance = Some(instance.id.clone());
        eni.node = Some(instance.node.clone());
        eni.security_groups = self.config.security_groups.first().cloned().into_iter().collect();
        self.enis.insert(eni.id.clone(), eni);
        Ok(())
    }

    /// A new ENI, not yet in the list.
    pub(super) fn new_eni(&mut self, vswitch: &str, kind: EniKind, v4: Vec<Ipv4Addr>, v6: Vec<Ipv6Addr>) -> EniRecord {
        self.next_eni += 1;
        let [.., a, b] = self.next_eni.to_be_bytes();
        // 00:16:3e is what ENIs of the real cloud have.
        let [.., seed] = self.config.seed.to_be_bytes();
        EniRecord {
            id: EniId::new(format!("eni-{:x}s{:08x}", self.config.seed, self.next_eni)),
            mac: Mac([0x00, 0x16, 0x3e, seed, a, b]),
            vswitch: vswitch.to_owned(),
            status: EniStatus::Available,
            kind,
            instance: None,
            node: None,
            v4,
            v6,
            security_groups: Vec::new(),
            tags: BTreeMap::new(),
            plugged: false,
            description: String::new(),
            created: SystemTime::now(),
            attachment: 0,
        }
    }

    pub(super) fn request_id(&mut self) -> String {
        self.next_request += 1;
        format!("{:08X}-0000-4000-8000-{:012X}", self.config.seed, self.next_request)
    }

    pub(super) fn vswitch(&self, id: &str) -> Option<&VSwitchConfig> {
        self.config.vswitches.iter().find(|vswitch| vswitch.id == id)
    }

    pub(super) fn instance(&self, id: &str) -> Option<&InstanceConfig> {
        self.config.instances.iter().find(|instance| instance.id == id)
    }

    pub(super) fn instance_type(&self, id: &str) -> Option<&InstanceTypeConfig> {
        self.config.instance_types.iter().find(|t| t.id == id)
    }

    /// What the instance an ENI is attached to allows; `None` while it is not attached.
    pub(super) fn limits(&self, eni: &EniRecord) -> Option<&InstanceTypeConfig> {
        self.instance_type(&self.instance(eni.instance.as_deref()?)?.instance_type)
    }

    pub(super) fn eni(&self, id: &str) -> Result<&EniRecord, Refusal> {
        self.enis.get(&EniId::from(id)).ok_or_else(|| Refusal::eni_not_found(id))
    }

    pub(super) fn eni_mut(&mut self, id: &str) -> Result<&mut EniRecord, Refusal> {
        self.enis.get_mut(&EniId::from(id)).ok_or_else(|| Refusal::eni_not_found(id))
    }

    pub(super) fn primary_of(&self, node: &str) -> Option<&EniRecord> {
        self.enis.values().find(|eni| eni.kind == EniKind::Primary && eni.node.as_deref() == Some(node))
    }

    /// Takes `count` free IPv4 addresses, all or none.
    pub(super) fn take_v4(&mut self, vswitch: &VSwitchConfig, count: u32) -> Result<Vec<Ipv4Addr>, Refusal> {
        if self.available_v4(vswitch) < count {
            return Err(Refusal::new(
                403,
                "InvalidVSwitchId.IpNotEnough",
                format!("The specified VSwitch {} has not enough private IP addresses.", vswitch.id),
            ));
        }
        let (first, last) = usable_v4(vswitch);
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

    /// Takes `count` free IPv6 addresses. A /64 does not run out.
    pub(super) fn take_v6(&mut self, vswitch: &VSwitchConfig, count: u32) -> Result<Vec<Ipv6Addr>, Refusal> {
        let Some(block) = vswitch.cidr_v6 else {
            let message = format!("IPv6 is not turned on for the VSwitch {}.", vswitch.id);
            return Err(Refusal::new(400, "InvalidVSwitch.IPv6NotTurnOn", message));
        };
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

    pub(super) fn give_back(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.used.remove(&address);
        }
    }

    /// `AvailableIpAddressCount`.
    pub(super) fn available_v4(&self, vswitch: &VSwitchConfig) -> u32 {
        let (first, last) = usable_v4(vswitch);
        let ends = IpAddr::from(Ipv4Addr::from_bits(first))..=IpAddr::from(Ipv4Addr::from_bits(last));
        (last - first + 1).saturating_sub(u32::try_from(self.used.range(ends).count()).unwrap_or(u32::MAX))
    }

    /// Tells the fabric an ENI's addresses, if it has the NIC.
    pub(super) fn announce(&self, eni: &EniRecord) {
        if eni.plugged {
            self.wire.send(Command::Addresses { eni: eni.id.clone(), v4: eni.v4.clone(), v6: eni.v6.clone() });
        }
    }

    /// The ENI as the fabric has to know it.
    pub(super) fn for_fabric(&self, eni: &EniRecord) -> Option<FabricEni> {
        let vswitch = self.vswitch(&eni.vswitch)?;
        Some(FabricEni {
            id: eni.id.clone(),
            mac: eni.mac,
            primary: eni.kind == EniKind::Primary,
            vswitch: VSwitchId::new(&*eni.vswitch),
            cidr_v4: vswitch.cidr_v4,
            gateway_v4: vswitch.gateway_v4(),
            cidr_v6: vswitch.cidr_v6,
            gateway_v6: vswitch.gateway_v6(),
            v4: eni.v4.clone(),
            v6: eni.v6.clone(),
        })
    }
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
fn usable_v4(vswitch: &VSwitchConfig) -> (u32, u32) {
    (vswitch.cidr_v4.network().to_bits() + 1, vswitch.cidr_v4.broadcast().to_bits() - 3)
}
