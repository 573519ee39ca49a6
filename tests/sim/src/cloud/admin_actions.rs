//! What an administrator, another tenant or the weather does to the cloud, beside the calls.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use terway_core::cidr;
use terway_core::cloud::{EniKind, EniStatus};
use terway_core::ident::EniId;

use super::fabric_queue::Command;
use super::faults::{Buckets, Fault};
use super::reply::Refusal;
use super::vpc::Vpc;
use super::{Inner, timeline};

/// One change. An ENI is named by its id, or as `secondary:N`: the Nth one by id, from 1, without the primary ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdminAction {
    /// Deletes an ENI, whatever its state; its NIC goes with it.
    RemoveEni {
        /// Which.
        eni: String,
    },
    /// Detaches an ENI at once.
    DetachEni {
        /// Which.
        eni: String,
    },
    /// Attaches an ENI that somebody else made, with three addresses of each family, as a recycled instance carries them.
    AttachForeignEni {
        /// The node.
        node: String,
        /// The ENI's vSwitch.
        vswitch: String,
        /// Its security group.
        security_group: String,
        /// Its tags.
        #[serde(default)]
        tags: BTreeMap<String, String>,
    },
    /// Assigns one more address of each family to an ENI.
    Assign {
        /// To which.
        eni: String,
    },
    /// Changes the account's quota of ENIs; without limit if not given.
    MaxEnis(Option<u32>),
    /// Takes an address (not the primary one) or a prefix off an ENI.
    Unassign {
        /// From which.
        eni: String,
        /// The address, or the prefix in CIDR notation.
        address: String,
    },
    /// Lets others take all but `leave` of a vSwitch's IPv4 addresses.
    Occupy {
        /// Which.
        vswitch: String,
        /// Addresses left.
        leave: u32,
    },
    /// Lets others take one address in every free block of a vSwitch: single addresses are left, prefixes are not.
    Fragment {
        /// Which.
        vswitch: String,
    },
    /// Lets others give back what they took.
    Vacate {
        /// Which.
        vswitch: String,
    },
    /// Replaces all faults.
    Faults(Vec<Fault>),
    /// Adds faults.
    AddFaults(Vec<Fault>),
    /// Ends all temporary keys; the metadata service gives out new ones from now on.
    ExpireKeys,
    /// Makes every metadata token invalid.
    ForgetMetadataTokens,
    /// Makes an access key unknown.
    RevokeKey {
        /// Its id.
        id: String,
    },
    /// Adds an access key.
    AddKey {
        /// Its id.
        id: String,
        /// Its secret.
        secret: String,
    },
    /// Sets the cloud's clock.
    Clock {
        /// Seconds ahead of this machine's.
        offset: i64,
    },
    /// Replaces the server's limits in calls a minute, by action; full buckets.
    RateLimits(BTreeMap<String, u32>),
    /// Replaces the latencies in milliseconds, by action.
    Latency(BTreeMap<String, u64>),
    /// Changes durations; those not given stay.
    Timing(Timing),
}

/// Durations of [`CloudConfig`](super::CloudConfig), in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timing {
    /// `attach_ms`.
    pub attach_ms: Option<u64>,
    /// `nic_delay_ms`.
    pub nic_delay_ms: Option<u64>,
    /// `detach_ms`.
    pub detach_ms: Option<u64>,
    /// `delete_ms`.
    pub delete_ms: Option<u64>,
    /// `describe_lag_ms`.
    pub describe_lag_ms: Option<u64>,
    /// `metadata_lag_ms`.
    pub metadata_lag_ms: Option<u64>,
}

impl Inner {
    /// Does what is ordered, at once.
    pub(super) fn apply_action(self: &Arc<Self>, order: AdminAction) -> anyhow::Result<()> {
        match order {
            AdminAction::RemoveEni { eni } => self.alter(|vpc| {
                let id = find(vpc, &eni)?;
                let eni = vpc.enis.remove(&id).with_context(|| format!("no ENI {id}"))?;
                timeline::release(vpc, &eni);
                Ok(())
            }),
            AdminAction::DetachEni { eni } => self.alter(|vpc| {
                let id = find(vpc, &eni)?;
                timeline::detach_now(vpc, &id);
                Ok(())
            }),
            AdminAction::AttachForeignEni { node, vswitch, security_group, tags } => {
                self.alter(|vpc| attach_foreign_eni(vpc, &node, &vswitch, security_group, tags))
            }
            AdminAction::Assign { eni } => self.alter(|vpc| assign(vpc, &eni)),
            AdminAction::MaxEnis(most) => {
                self.state.lock().config.max_enis = most;
                Ok(())
            }
            AdminAction::Unassign { eni, address } => self.alter(|vpc| unassign(vpc, &eni, &address)),
            AdminAction::Occupy { vswitch, leave } => self.alter(|vpc| {
                let vswitch = vpc.vswitch(&vswitch).context("no such vSwitch")?.clone();
                vpc.addresses.occupy(&vswitch, leave);
                Ok(())
            }),
            AdminAction::Fragment { vswitch } => self.alter(|vpc| {
                let vswitch = vpc.vswitch(&vswitch).context("no such vSwitch")?.clone();
                vpc.addresses.fragment(&vswitch);
                Ok(())
            }),
            AdminAction::Vacate { vswitch } => {
                self.state.lock().addresses.vacate(&vswitch);
                Ok(())
            }
            AdminAction::Faults(faults) => {
                self.faults.lock().set(faults);
                Ok(())
            }
            AdminAction::AddFaults(faults) => {
                self.faults.lock().add(faults);
                Ok(())
            }
            AdminAction::ExpireKeys => {
                let now = self.now();
                self.sessions.lock().forget_roles();
                self.keys.lock().expire_temporary(now);
                Ok(())
            }
            AdminAction::ForgetMetadataTokens => {
                self.sessions.lock().forget_tokens();
                Ok(())
            }
            AdminAction::RevokeKey { id } => {
                self.keys.lock().remove(&id);
                Ok(())
            }
            AdminAction::AddKey { id, secret } => {
                self.keys.lock().insert(&id, &secret);
                Ok(())
            }
            AdminAction::Clock { offset } => {
                self.clock_offset.store(offset, Ordering::Relaxed);
                Ok(())
            }
            AdminAction::RateLimits(limits) => {
                *self.buckets.lock() = Buckets::new(limits);
                Ok(())
            }
            AdminAction::Latency(latency) => {
                self.state.lock().config.latency_ms = latency;
                Ok(())
            }
            AdminAction::Timing(timing) => {
                let mut vpc = self.state.lock();
                // What was true until now is what a reader with a lag may still see.
                vpc.remember_always();
                let config = &mut vpc.config;
                for (to, from) in [
                    (&mut config.attach_ms, timing.attach_ms),
                    (&mut config.nic_delay_ms, timing.nic_delay_ms),
                    (&mut config.detach_ms, timing.detach_ms),
                    (&mut config.delete_ms, timing.delete_ms),
                    (&mut config.describe_lag_ms, timing.describe_lag_ms),
                    (&mut config.metadata_lag_ms, timing.metadata_lag_ms),
                ] {
                    *to = from.unwrap_or(*to);
                }
                Ok(())
            }
        }
    }
}

fn find(vpc: &Vpc, name: &str) -> anyhow::Result<EniId> {
    let Some(number) = name.strip_prefix("secondary:") else {
        let id = EniId::from(name);
        return if vpc.enis.contains_key(&id) { Ok(id) } else { bail!("no ENI {name}") };
    };
    let number: usize = number.parse().with_context(|| format!("{name} has no number"))?;
    let mut secondary = vpc.enis.values().filter(|eni| eni.kind != EniKind::Primary);
    let eni = number.checked_sub(1).and_then(|n| secondary.nth(n)).with_context(|| format!("no ENI {name}"))?;
    Ok(eni.id.clone())
}

fn attach_foreign_eni(
    vpc: &mut Vpc,
    node: &str,
    vswitch: &str,
    security_group: String,
    tags: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let refused = |refusal: Refusal| anyhow::anyhow!(refusal.message);
    let instance = vpc.config.instances.iter().find(|known| known.node == node).context("no such node")?.id.clone();
    let of = vpc.vswitch(vswitch).context("no such vSwitch")?.clone();
    let v4 = vpc.addresses.take_v4(&of, 3).map_err(refused)?;
    let v6 = match of.cidr_v6 {
        Some(_) => vpc.addresses.take_v6(&of, 3).map_err(refused)?,
        None => Vec::new(),
    };
    let mut eni = vpc.new_eni(vswitch, EniKind::Secondary, v4, v6);
    eni.status = EniStatus::InUse;
    (eni.instance, eni.node, eni.plugged) = (Some(instance), Some(node.to_owned()), true);
    (eni.security_groups, eni.tags) = (vec![security_group], tags);
    if let Some(nic) = vpc.for_fabric(&eni) {
        vpc.queue.send(Command::Hotplug { node: node.to_owned(), eni: nic });
    }
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(())
}

fn assign(vpc: &mut Vpc, eni: &str) -> anyhow::Result<()> {
    let refused = |refusal: Refusal| anyhow::anyhow!(refusal.message);
    let id = find(vpc, eni)?;
    let vswitch = vpc.enis.get(&id).map(|eni| eni.vswitch.clone()).unwrap_or_default();
    let of = vpc.vswitch(&vswitch).context("no such vSwitch")?.clone();
    let v4 = vpc.addresses.take_v4(&of, 1).map_err(refused)?;
    let v6 = match of.cidr_v6 {
        Some(_) => vpc.addresses.take_v6(&of, 1).map_err(refused)?,
        None => Vec::new(),
    };
    let eni = vpc.enis.get_mut(&id).with_context(|| format!("no ENI {id}"))?;
    eni.v4.extend(v4);
    eni.v6.extend(v6);
    let eni = eni.clone();
    vpc.push_addresses(&eni);
    Ok(())
}

fn unassign(vpc: &mut Vpc, eni: &str, what: &str) -> anyhow::Result<()> {
    let id = find(vpc, eni)?;
    let eni = vpc.enis.get_mut(&id).with_context(|| format!("no ENI {id}"))?;
    let before = eni.count();
    match (what.parse::<IpAddr>(), cidr::parse::<IpNetwork>(what)) {
        (Ok(address), _) if eni.v4.first().copied().map(IpAddr::V4) != Some(address) => {
            eni.v4.retain(|own| IpAddr::V4(*own) != address);
            eni.v6.retain(|own| IpAddr::V6(*own) != address);
            vpc.addresses.give_back([address]);
        }
        (_, Ok(IpNetwork::V4(prefix))) => {
            eni.v4_prefixes.retain(|own| *own != prefix);
            vpc.addresses.give_back_v4_prefixes(&[prefix]);
        }
        (_, Ok(IpNetwork::V6(prefix))) => {
            eni.v6_prefixes.retain(|own| *own != prefix);
            vpc.addresses.give_back_v6_prefixes(&[prefix]);
        }
        _ => bail!("{what} is the primary address, or no address"),
    }
    let eni = eni.clone();
    if eni.count() == before {
        bail!("{id} has no {what}");
    }
    vpc.push_addresses(&eni);
    Ok(())
}

/// Whether no ENI is on its way.
pub(super) fn quiet(vpc: &Vpc) -> bool {
    vpc.enis.values().all(|eni| matches!(eni.status, EniStatus::Available | EniStatus::InUse))
}
