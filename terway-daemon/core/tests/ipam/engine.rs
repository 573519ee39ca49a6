//! The engine of the story: it runs effects against the cloud and the kernel, and says what came of them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use terway_core::cloud::{CloudError, EniStatus, ErrorClass};
use terway_core::errors::{self, Error};
use terway_core::ident::AttachmentKey;
use terway_core::ipam::{Effect, Event, Lease, OpId, RecordKey};

use crate::cloud::{Cloud, error, prefixes_of, subnet};
use crate::world::{LAG, Outcome, Pending, Task, Wired, World};

impl World {
    /// Runs a task and returns what is to be reported.
    pub(crate) fn execute(&mut self, seq: u64, task: Task, outcome: Outcome, choice: usize) -> Vec<Event> {
        self.note(|| format!("  run {task:?} {outcome:?}"));
        let effect = match task {
            Task::Links { op, key } => {
                if outcome != Outcome::Fine {
                    return vec![Event::DisconnectFailed { op, key, error: Error::new(errors::NET_FAILED, "") }];
                }
                self.kernel.remove(&key);
                return vec![Event::Disconnected { op, key }];
            }
            Task::Run(effect) => effect,
        };
        // A request that was served is not refused when it comes again: its token is known.
        let outcome = match outcome {
            Outcome::Fails(ErrorClass::Quota | ErrorClass::VSwitchExhausted) if self.cloud.knows(&effect) => {
                Outcome::Fine
            }
            outcome => outcome,
        };
        let events = match &effect {
            Effect::Connect { op, key, lease, .. } => vec![self.connect(*op, key, lease, outcome)],
            Effect::Disconnect { op, key, .. } => {
                if let Outcome::Fails(_) = outcome {
                    let error = Error::new(errors::BPF_FAILED, "");
                    return vec![Event::DisconnectFailed { op: *op, key: key.clone(), error }];
                }
                if let Some(wired) = self.kernel.get_mut(key) {
                    wired.datapath = false;
                }
                self.pending.push(Pending { seq, task: Task::Links { op: *op, key: key.clone() } });
                vec![Event::DatapathRemoved { op: *op, key: key.clone() }]
            }
            Effect::Reply { ticket, result } => {
                self.answered(*ticket, result.clone());
                vec![]
            }
            Effect::CreateEni { op, .. } => {
                vec![Event::EniCreated { op: *op, result: self.call(outcome, |cloud| cloud.create(&effect)) }]
            }
            Effect::AttachEni { op, eni } => {
                let result = self.call(outcome, |cloud| cloud.attach(eni));
                vec![Event::EniAttached { op: *op, eni: eni.clone(), result }]
            }
            Effect::ConfigureNic { op, eni, .. } => {
                let there = self.cloud.enis.get(eni).is_some_and(|eni| eni.status == EniStatus::InUse);
                let (op, eni) = (*op, eni.clone());
                vec![if there && outcome == Outcome::Fine {
                    Event::NicReady { op, eni, ifindex: 7, subnet: subnet() }
                } else {
                    Event::NicFailed { op, eni, error: Error::new(errors::NIC_MISSING, "") }
                }]
            }
            Effect::Assign { op, token, eni, family, count } => {
                assert!(*count > 0 && *count <= self.config.batch);
                let result = self.call(outcome, |cloud| cloud.assign(token, eni, *family, *count));
                vec![Event::Assigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::Unassign { op, eni, family, addresses } => {
                let nets: Vec<_> = addresses.iter().map(|a| IpNetwork::from(*a)).collect();
                self.check_unheld(eni, &nets);
                let result = self.call(outcome, |cloud| cloud.unassign(eni, addresses));
                vec![Event::Unassigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::AssignPrefixes { op, token, eni, family, count } => {
                assert!(*count > 0 && *count <= self.config.batch);
                let result = self.call(outcome, |cloud| cloud.assign_prefixes(token, eni, *family, *count));
                vec![Event::PrefixesAssigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::UnassignPrefixes { op, eni, family, prefixes } => {
                self.check_unheld(eni, prefixes);
                let result = self.call(outcome, |cloud| cloud.unassign_prefixes(eni, prefixes));
                vec![Event::PrefixesUnassigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::DescribeVSwitches { op, ids } => {
                let result = self.call(outcome, |cloud| Ok(cloud.count(ids)));
                vec![Event::VSwitches { op: *op, result }]
            }
            Effect::Detach { op, eni } => {
                let held: Vec<_> = self
                    .cloud
                    .enis
                    .get(eni)
                    .into_iter()
                    .flat_map(|e| {
                        let v4 = e.v4.iter().map(|a| IpNetwork::from(IpAddr::V4(*a)));
                        v4.chain(e.v6.iter().map(|a| IpNetwork::from(IpAddr::V6(*a)))).chain(prefixes_of(e))
                    })
                    .collect();
                self.check_unheld(eni, &held);
                let result = self.call(outcome, |cloud| cloud.detach(eni));
                vec![Event::Detached { op: *op, eni: eni.clone(), result }]
            }
            Effect::Delete { op, eni } => {
                let result = self.call(outcome, |cloud| cloud.delete(eni));
                vec![Event::Deleted { op: *op, eni: eni.clone(), result }]
            }
            Effect::TakeInventory { op } => {
                let lists = self.cloud.stale_list(self.now, LAG, choice);
                let result = match outcome {
                    Outcome::Fine => Ok(lists),
                    _ => Err(error(ErrorClass::Unknown, "")),
                };
                vec![Event::Inventory { op: *op, result }]
            }
            Effect::Persist(_)
            | Effect::PersistLazily(_)
            | Effect::WakeAt(_)
            | Effect::ReportAddressLoss { .. }
            | Effect::ReportAddressRecovery { .. } => unreachable!(),
        };
        if is_cloud_call(&effect) {
            self.cloud.note(self.now);
        }
        events
    }

    fn call<T>(
        &mut self,
        outcome: Outcome,
        call: impl FnOnce(&mut Cloud) -> Result<T, CloudError>,
    ) -> Result<T, CloudError> {
        match outcome {
            Outcome::Fine => call(&mut self.cloud),
            Outcome::Lost => {
                let _lost = call(&mut self.cloud);
                Err(error(ErrorClass::Unknown, ""))
            }
            Outcome::Fails(class) => Err(error(class, "Injected")),
        }
    }

    fn connect(&mut self, op: OpId, key: &AttachmentKey, lease: &Lease, outcome: Outcome) -> Event {
        let key = key.clone();
        if let Some(del) = self.dead.get(&key) {
            assert!(self.last_add.get(&key) > Some(del), "{key} is wired after its DEL was answered");
        }
        let bound = self.bound.get(&key).unwrap_or_else(|| panic!("{key} is wired and unknown to the pool"));
        assert_eq!(bound.addresses, lease.addresses, "{key}");
        assert!(self.store.contains_key(&RecordKey::Attachment(key.clone())), "{key} is wired and not on disk");
        for (other, wired) in &self.kernel {
            let shared = wired.lease.addresses.iter().any(|a| lease.addresses.iter().any(|b| a == b));
            assert!(*other == key || !shared, "{key} and {other} share an address: {lease:?}");
        }
        for address in lease.addresses.iter() {
            let taken = |what| self.cloud.taken.contains(&(lease.eni.clone(), what));
            let excused = taken(None) || taken(Some(address));
            assert!(excused || self.cloud.has(&lease.eni, address), "{address} is not on {}", lease.eni);
        }
        let error = Error::new(errors::NET_FAILED, "injected");
        match outcome {
            Outcome::Fine => {
                self.kernel.insert(key.clone(), Wired { lease: lease.clone(), datapath: true, links: true });
                Event::Connected { op, key }
            }
            Outcome::Lost => {
                self.kernel.insert(key.clone(), Wired { lease: lease.clone(), datapath: false, links: true });
                Event::ConnectFailed { op, key, error, undone: false }
            }
            Outcome::Fails(_) => {
                self.kernel.remove(&key);
                Event::ConnectFailed { op, key, error, undone: true }
            }
        }
    }
}

pub(crate) const fn is_cloud_call(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::CreateEni { .. }
            | Effect::AttachEni { .. }
            | Effect::Assign { .. }
            | Effect::Unassign { .. }
            | Effect::AssignPrefixes { .. }
            | Effect::UnassignPrefixes { .. }
            | Effect::Detach { .. }
            | Effect::Delete { .. }
    )
}

pub(crate) fn op_of(effect: &Effect) -> Option<OpId> {
    match effect {
        Effect::Connect { op, .. }
        | Effect::Disconnect { op, .. }
        | Effect::CreateEni { op, .. }
        | Effect::AttachEni { op, .. }
        | Effect::ConfigureNic { op, .. }
        | Effect::Assign { op, .. }
        | Effect::Unassign { op, .. }
        | Effect::AssignPrefixes { op, .. }
        | Effect::UnassignPrefixes { op, .. }
        | Effect::DescribeVSwitches { op, .. }
        | Effect::Detach { op, .. }
        | Effect::Delete { op, .. }
        | Effect::TakeInventory { op } => Some(*op),
        Effect::Persist(_)
        | Effect::PersistLazily(_)
        | Effect::Reply { .. }
        | Effect::ReportAddressLoss { .. }
        | Effect::ReportAddressRecovery { .. }
        | Effect::WakeAt(_) => None,
    }
}
