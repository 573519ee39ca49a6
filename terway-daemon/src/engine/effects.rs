//! Executes the pool's effects.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use terway_core::cloud::{CloudError, EniStatus, ErrorClass};
use terway_core::errors::{self, Error};
use terway_core::ident::{EniId, Family};
use terway_core::ipam::{Effect, Event};
use tracing::{debug, error, info, warn};

use super::{Engine, PoolState, TASK};
use crate::cloud::{CreateEni, EniFilter};
use crate::store::Gate;
use crate::supervise;

/// How long an attach or detach may take until the cloud is asked anew. Terway's own bound for ECS is two minutes.
const ATTACH_WITHIN: Duration = Duration::from_secs(120);

impl PoolState {
    /// Answers the waiting request, if the effect is an answer. The caller may be gone; the attachment stays for its DEL.
    fn answer(&mut self, effect: &Effect) -> bool {
        let Effect::Reply { ticket, result } = effect else { return false };
        if let Some(waiting) = self.waiting.remove(ticket) {
            let _ = waiting.send(result.clone());
        }
        true
    }
}

impl Engine {
    /// Hands writes to the store in order, then starts the rest when they are durable.
    pub(super) fn dispatch(self: &Arc<Self>, state: &mut PoolState, effects: Vec<Effect>) {
        let (mut write, mut gate) = (None, None);
        let mut rest = Vec::with_capacity(effects.len());
        let connects = effects.iter().any(|effect| matches!(effect, Effect::Connect { .. }));
        for effect in effects {
            match effect {
                Effect::Persist(changes) => {
                    state.written += 1;
                    if connects {
                        let (commit, opens) = self.store.commit_gated(changes);
                        (write, gate) = (Some(commit), Some(opens));
                    } else {
                        write = Some(self.store.commit(changes));
                    }
                }
                Effect::PersistLazily(changes) => self.store.commit_lazily(changes),
                Effect::WakeAt(moment) => {
                    self.wake.send_replace(Some(moment));
                }
                effect => rest.push(effect),
            }
        }
        let number = state.written;
        // With nothing left to wait for, an answer needs no task of its own: each one costs a thread's wake-up on the way of an ADD.
        if write.is_none() && *self.durable.borrow() >= number {
            rest.retain(|effect| !state.answer(effect));
        }
        if write.is_none() && rest.is_empty() {
            return;
        }
        // The first half of connecting a pod only prepares, and need not wait for the disk.
        if gate.is_some()
            && let Some(at) = rest.iter().position(|effect| matches!(effect, Effect::Connect { .. }))
        {
            let (engine, effect) = (Arc::clone(self), rest.remove(at));
            supervise::spawn(TASK, async move { engine.run(effect, gate).await });
        }
        let engine = Arc::clone(self);
        supervise::spawn(TASK, async move {
            if let Some(write) = write {
                if let Err(error) = write.await {
                    engine.fail(Error::new(errors::STORE_FAILED, error.to_string()));
                    return;
                }
                engine.durable.send_if_modified(|durable| {
                    let news = *durable < number;
                    *durable = (*durable).max(number);
                    news
                });
            } else if engine.durable.subscribe().wait_for(|durable| *durable >= number).await.is_err() {
                return;
            }
            let last = rest.pop();
            for effect in rest {
                let engine = Arc::clone(&engine);
                supervise::spawn(TASK, async move { engine.run(effect, None).await });
            }
            if let Some(effect) = last {
                engine.run(effect, None).await;
            }
        });
    }

    /// Ends the daemon after a failed write of the store; waiting requests get the error.
    fn fail(&self, reason: Error) {
        error!(code = reason.code.id, detail = reason.detail, "failed to write the store; the daemon ends");
        for (_, waiting) in self.pool_state().waiting.drain() {
            let _ = waiting.send(Err(reason.clone()));
        }
        self.fatal.send_replace(Some(reason));
    }

    /// Runs an effect whose write is on disk, or, with a gate, will be when that opens.
    async fn run(self: &Arc<Self>, effect: Effect, gate: Option<Gate>) {
        if self.fatal.borrow().is_some() || self.pool_state().answer(&effect) {
            return;
        }
        debug!(?effect, "effect");
        if let Some(report) = self.execute(effect, gate).await {
            self.feed(report);
        }
    }

    /// Executes one effect and returns its (last) report.
    async fn execute(self: &Arc<Self>, effect: Effect, gate: Option<Gate>) -> Option<Event> {
        Some(match effect {
            Effect::Connect { op, key, pod, netns, options, lease } => {
                match self.connect(&key, &pod, &netns, &options, &lease, gate).await {
                    Ok(()) => Event::Connected { op, key },
                    Err(error) => {
                        let undone = self.disconnect(&key, &pod, &lease, || {}).await.is_ok();
                        Event::ConnectFailed { op, key, error, undone }
                    }
                }
            }
            Effect::Disconnect { op, key, pod, netns: _, lease } => {
                let datapath_removed = || self.feed(Event::DatapathRemoved { op, key: key.clone() });
                match self.disconnect(&key, &pod, &lease, datapath_removed).await {
                    Ok(()) => Event::Disconnected { op, key },
                    Err(error) => Event::DisconnectFailed { op, key, error },
                }
            }
            Effect::CreateEni {
                op,
                token,
                vswitch,
                security_groups,
                v4,
                v6,
                v4_prefixes,
                v6_prefixes,
                resource_group,
                tags,
            } => {
                let request = CreateEni {
                    token: token.0,
                    vswitch,
                    security_groups,
                    v4_count: v4,
                    v6_count: v6,
                    v4_prefixes,
                    v6_prefixes,
                    tags,
                    resource_group,
                };
                Event::EniCreated { op, result: self.cloud.create_eni(&request).await }
            }
            Effect::AttachEni { op, eni } => {
                let result = self.attach(&eni).await;
                Event::EniAttached { op, eni, result }
            }
            Effect::ConfigureNic { op, eni, mac } => match self.configure_nic(mac).await {
                Ok((ifindex, subnet)) => Event::NicReady { op, eni, ifindex, subnet },
                Err(error) => Event::NicFailed { op, eni, error },
            },
            Effect::Assign { op, token, eni, family, count } => {
                let result = match family {
                    Family::V4 => self.cloud.assign_v4(&eni, count, &token.0).await.map(any),
                    Family::V6 => self.cloud.assign_v6(&eni, count, &token.0).await.map(any),
                };
                Event::Assigned { op, eni, family, result }
            }
            Effect::Unassign { op, eni, family, addresses } => {
                let result = self.unassign(&eni, &addresses).await;
                Event::Unassigned { op, eni, family, result }
            }
            Effect::AssignPrefixes { op, token, eni, family, count } => {
                let result = match family {
                    Family::V4 => self.cloud.assign_v4_prefixes(&eni, count, &token.0).await.map(any_net),
                    Family::V6 => self.cloud.assign_v6_prefixes(&eni, count, &token.0).await.map(any_net),
                };
                Event::PrefixesAssigned { op, eni, family, result }
            }
            Effect::UnassignPrefixes { op, eni, family, prefixes } => {
                let result = self.unassign_prefixes(&eni, &prefixes).await;
                Event::PrefixesUnassigned { op, eni, family, result }
            }
            Effect::DescribeVSwitches { op, ids } => Event::VSwitches { op, result: self.cloud.vswitches(&ids).await },
            Effect::ReportAddressLoss { key, pod, reason, .. } => {
                warn!(%key, %pod, code = reason.code.id, detail = reason.detail, "a pod's address is no longer on its ENI");
                return None;
            }
            Effect::ReportAddressRecovery { key, pod } => {
                info!(%key, %pod, "the pod's addresses are on its ENI again");
                return None;
            }
            Effect::Detach { op, eni } => {
                let result = self.detach(&eni).await;
                Event::Detached { op, eni, result }
            }
            Effect::Delete { op, eni } => {
                let result = self.cloud.delete_eni(&eni).await;
                Event::Deleted { op, eni, result }
            }
            Effect::TakeInventory { op } => {
                let result = self.cloud.enis(&EniFilter::of_instance(self.instance())).await;
                Event::Inventory { op, result }
            }
            Effect::Reply { .. } | Effect::Persist(_) | Effect::PersistLazily(_) | Effect::WakeAt(_) => return None,
        })
    }

    async fn attach(&self, eni: &EniId) -> Result<(), CloudError> {
        self.cloud.attach_eni(eni, self.instance()).await?;
        self.cloud.wait_eni(eni, EniStatus::InUse, ATTACH_WITHIN).await.map(|_| ())
    }

    async fn unassign(&self, eni: &EniId, addresses: &[IpAddr]) -> Result<(), CloudError> {
        let v4: Vec<_> = addresses.iter().filter_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None }).collect();
        let v6: Vec<_> = addresses.iter().filter_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None }).collect();
        if !v4.is_empty() {
            self.cloud.unassign_v4(eni, &v4).await?;
        }
        if !v6.is_empty() {
            self.cloud.unassign_v6(eni, &v6).await?;
        }
        Ok(())
    }

    async fn unassign_prefixes(&self, eni: &EniId, prefixes: &[IpNetwork]) -> Result<(), CloudError> {
        let v4: Vec<_> =
            prefixes.iter().filter_map(|p| if let IpNetwork::V4(p) = p { Some(*p) } else { None }).collect();
        let v6: Vec<_> =
            prefixes.iter().filter_map(|p| if let IpNetwork::V6(p) = p { Some(*p) } else { None }).collect();
        if !v4.is_empty() {
            self.cloud.unassign_v4_prefixes(eni, &v4).await?;
        }
        if !v6.is_empty() {
            self.cloud.unassign_v6_prefixes(eni, &v6).await?;
        }
        Ok(())
    }

    async fn detach(&self, eni: &EniId) -> Result<(), CloudError> {
        match self.cloud.describe_eni(eni).await {
            Ok(known) => self.release_nic(known.mac).await,
            Err(e) if e.class == ErrorClass::NotFound => return Ok(()),
            Err(e) => return Err(e),
        }
        self.cloud.detach_eni(eni, self.instance()).await?;
        match self.cloud.wait_eni(eni, EniStatus::Available, ATTACH_WITHIN).await {
            Err(e) if e.class == ErrorClass::NotFound => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

fn any<A: Into<IpAddr>>(addresses: Vec<A>) -> Vec<IpAddr> {
    addresses.into_iter().map(Into::into).collect()
}

fn any_net<N: Into<IpNetwork>>(prefixes: Vec<N>) -> Vec<IpNetwork> {
    prefixes.into_iter().map(Into::into).collect()
}
