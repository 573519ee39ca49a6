//! What exists in the VPC: ENIs, their addresses, their states.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::Serialize;
use serde_json::Value;
use terway_core::cloud::{EniKind, EniStatus};
use terway_core::ident::{EniId, Mac, VSwitchId};

use super::addresses::Addresses;
use super::config::{CloudConfig, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use super::fabric_queue::{Command, FabricQueue};
use super::history::{Enis, History};
use super::reply::Refusal;
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
    /// IPv4 prefixes.
    pub v4_prefixes: Vec<Ipv4Network>,
    /// IPv6 prefixes.
    pub v6_prefixes: Vec<Ipv6Network>,
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

impl EniRecord {
    /// What it takes of the instance type's limit of IPv4 addresses: a prefix counts as one.
    pub(super) fn v4_count(&self) -> usize {
        self.v4.len() + self.v4_prefixes.len()
    }

    /// As [`EniRecord::v4_count`], for IPv6.
    pub(super) fn v6_count(&self) -> usize {
        self.v6.len() + self.v6_prefixes.len()
    }

    pub(super) fn count(&self) -> usize {
        self.v4_count() + self.v6_count()
    }
}

pub(super) struct Vpc {
    pub(super) config: CloudConfig,
    pub(super) enis: BTreeMap<EniId, EniRecord>,
    /// `(action, ClientToken)` → what was asked and what was answered.
    pub(super) answered: HashMap<(String, String), (String, Value)>,
    pub(super) queue: FabricQueue,
    pub(super) addresses: Addresses,
    history: History,
    next_eni: u64,
    next_request: u64,
}

impl Vpc {
    pub(super) fn new(config: CloudConfig, queue: FabricQueue) -> anyhow::Result<Self> {
        let mut vpc = Self {
            enis: BTreeMap::new(),
            answered: HashMap::new(),
            queue,
            addresses: Addresses::default(),
            history: History::default(),
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
        vpc.remember_always();
        Ok(vpc)
    }

    fn add_instance(&mut self, instance: &InstanceConfig) -> anyhow::Result<()> {
        if self.instance_type(&instance.instance_type).is_none() {
            bail!("unknown instance type {}", instance.instance_type);
        }
        let vswitch = self.vswitch(&instance.vswitch).context("unknown vSwitch")?.clone();
        let v4 = match instance.primary_v4 {
            Some(address) if vswitch.cidr_v4.contains(address) && self.addresses.take(address) => vec![address],
            Some(address) => bail!("{address} is taken or not in {}", vswitch.cidr_v4),
            None => self.addresses.take_v4(&vswitch, 1).map_err(|refusal| anyhow::anyhow!(refusal.message))?,
        };
        let v6 = match vswitch.cidr_v6 {
            Some(_) => self.addresses.take_v6(&vswitch, 1).map_err(|refusal| anyhow::anyhow!(refusal.message))?,
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
            v4_prefixes: Vec::new(),
            v6_prefixes: Vec::new(),
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

    /// Writes the present state down, if somebody reads late.
    pub(super) fn remember(&mut self) {
        if self.config.describe_lag_ms.max(self.config.metadata_lag_ms) > 0 {
            self.remember_always();
        }
    }

    pub(super) fn remember_always(&mut self) {
        let keep = Duration::from_millis(self.config.describe_lag_ms.max(self.config.metadata_lag_ms));
        self.history.record(Instant::now(), &self.enis, keep);
    }

    /// The ENIs as a reader sees them who is `lag_ms` behind.
    pub(super) fn seen(&self, lag_ms: u64) -> Arc<Enis> {
        let late = if lag_ms == 0 { None } else { self.history.seen(Instant::now(), Duration::from_millis(lag_ms)) };
        late.unwrap_or_else(|| Arc::new(self.enis.clone()))
    }

    /// Tells the fabric an ENI's addresses, if it has the NIC.
    pub(super) fn push_addresses(&self, eni: &EniRecord) {
        if eni.plugged {
            self.queue.send(Command::Addresses { eni: eni.id.clone(), v4: eni.v4.clone(), v6: eni.v6.clone() });
        }
    }

    /// Tells the fabric an ENI's prefixes, if it has the NIC.
    pub(super) fn push_prefixes(&self, eni: &EniRecord) {
        if eni.plugged {
            let (v4, v6) = (eni.v4_prefixes.clone(), eni.v6_prefixes.clone());
            self.queue.send(Command::Prefixes { eni: eni.id.clone(), v4, v6 });
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
