//! Audits of the node, once a minute and after deletions by other processes: the kernel's and the datapath's state is compared with the
//! store, differences are repaired, and leftovers removed.
//!
//! What counts as evidence, and what it justifies, is decided by [`terway_core::reconcile`]. Here it is read and done. Corrections exclude the
//! wiring and unwiring of pods ([`Engine::wiring`]) and look at the store again, so that they never act on what was true a moment ago.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use terway_core::errors::{self, Error};
use terway_core::ident::{AttachmentKey, Mac};
use terway_core::ipam::{AttachmentView, Event, Phase};
use terway_core::reconcile::{
    Action, AuditSnapshot, Confirmation, Endpoint, Finding, FindingKind, Inventory, NetnsState, StoredAttachment,
    StoredEni, findings, sysctls,
};
use terway_core::route::{EniPlan, Orphan, Step, alias};
use tracing::{info, warn};

use super::Engine;
use super::pod::{PodOptions, net_error};
use crate::cloud::EniFilter;
use crate::net::NetError;

/// Time from the first deletion by another process to the audit: one that deletes an entry often deletes several.
const COLLECT_DELETIONS: Duration = Duration::from_millis(100);
/// Pause after such an audit, so that a process that deletes again and again does not keep the daemon busy.
const PAUSE_BETWEEN_REPAIRS: Duration = Duration::from_millis(900);

/// The actions that an audit takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AuditScope {
    /// All that are due.
    Everything,
    /// Repairs. Removals need two audits with the regular interval between them.
    RepairsOnly,
}

/// State of the audits.
#[derive(Default)]
pub(super) struct Audit {
    /// Plan of each ENI that is set up, by its MAC.
    plans: Mutex<BTreeMap<Mac, EniPlan>>,
    confirmation: Mutex<Confirmation>,
    /// Differences that the last audit could not correct.
    problems: Mutex<Vec<Error>>,
}

impl Audit {
    pub(super) fn eni_is_set_up(&self, mac: Mac, plan: EniPlan) {
        self.plans.lock().insert(mac, plan);
    }

    pub(super) fn eni_is_released(&self, mac: Mac) {
        self.plans.lock().remove(&mac);
    }

    pub(super) fn problems(&self) -> Vec<Error> {
        self.problems.lock().clone()
    }
}

/// State of the node as read from every source, and the errors of sources that could not be read.
pub(super) struct Observation {
    pub(super) snapshot: AuditSnapshot,
    pub(super) kernel: Result<(), Error>,
    pub(super) datapath: Result<(), Error>,
    pub(super) cloud: Option<Result<(), Error>>,
}

impl Engine {
    /// Reads every source. The store comes first and last: only what it says both times is compared with what was read in between.
    pub(super) async fn look(&self, ask_cloud: bool) -> Observation {
        let before = self.pool_state().pool.list();
        let plans: BTreeMap<Mac, EniPlan> = self.audit.plans.lock().clone();

        let kernel = self.host.observe(sysctls(plans.values())).await.map_err(net_error);
        let endpoints = self
            .with_datapath(|datapath| {
                let stored = datapath.endpoints().read()?.into_iter();
                stored
                    .map(|e| datapath.interfaces().pod_is_attached(e.host_ifindex).map(|attached| (e, attached)))
                    .collect()
            })
            .await
            .map(|stored: Vec<_>| stored.into_iter().map(|(e, attached)| endpoint(&e, attached)).collect());
        let cloud = match ask_cloud {
            true => Some(self.answered(self.cloud.enis(&EniFilter::of_instance(self.instance()))).await),
            false => None,
        };

        let (after, enis) = {
            let state = self.pool_state();
            (state.pool.list(), state.pool.enis())
        };
        let mut attachments = Vec::new();
        for view in &after {
            let steady =
                before.iter().any(|old| old.key == view.key && old.phase == view.phase && old.lease == view.lease);
            attachments.push(self.stored(view, if steady { view.phase } else { Phase::SettingUp }));
        }
        for view in before.iter().filter(|old| !after.iter().any(|view| view.key == old.key)) {
            attachments.push(self.stored(view, Phase::Releasing));
        }
        let enis = enis.into_iter().filter_map(|eni| {
            let plan = eni.mac.and_then(|mac| plans.get(&mac).cloned());
            Some(StoredEni { id: eni.id?, plan, addresses: eni.addresses.into_iter().collect() })
        });
        Observation {
            kernel: kernel.as_ref().map(drop).map_err(Error::clone),
            datapath: endpoints.as_ref().map(drop).map_err(Error::clone),
            cloud: cloud.as_ref().map(|listed| listed.as_ref().map(drop).map_err(Error::clone)),
            snapshot: AuditSnapshot {
                attachments,
                enis: enis.collect(),
                nics: self.links.nics().iter().map(|nic| nic.ifindex).collect(),
                kernel: kernel.ok(),
                endpoints: endpoints.ok(),
                cloud: cloud.and_then(Result::ok).map(|enis| Inventory { instance: self.instance().clone(), enis }),
            },
        }
    }

    fn stored(&self, view: &AttachmentView, phase: Phase) -> StoredAttachment {
        let plan = self.plan(&view.key, &view.pod, &view.lease, &PodOptions::decode(&view.options));
        let netns = match phase {
            Phase::Ready => match self.host.open_netns(&view.netns) {
                Ok(_) => NetnsState::Present,
                Err(NetError::Netns { .. }) => NetnsState::Absent,
                Err(_) => NetnsState::Unknown,
            },
            Phase::SettingUp | Phase::Releasing => NetnsState::Unknown,
        };
        StoredAttachment { pod: view.pod.clone(), phase, eni: view.lease.eni.clone(), plan, netns }
    }

    /// Compares, repairs, removes, and frees what pods left without a DEL (runtimes do forget some).
    pub async fn audit(self: &Arc<Self>) {
        self.audit_within(AuditScope::Everything).await;
    }

    /// Repairs rules, routes and addresses soon after another process has deleted them. Runs as long as the daemon.
    pub async fn repair_deletions(self: Arc<Self>) {
        let mut deletions = self.links.deletions();
        while deletions.changed().await.is_ok() {
            tokio::time::sleep(COLLECT_DELETIONS).await;
            deletions.mark_unchanged();
            self.audit_within(AuditScope::RepairsOnly).await;
            tokio::time::sleep(PAUSE_BETWEEN_REPAIRS).await;
        }
    }

    async fn audit_within(self: &Arc<Self>, scope: AuditScope) {
        let Observation { snapshot, kernel, datapath, .. } = self.look(false).await;
        for error in [kernel, datapath].into_iter().filter_map(Result::err) {
            warn!(%error, "the audit failed to read a source");
        }
        let found = findings(&snapshot);
        for kind in FindingKind::ALL {
            self.metrics.findings(kind.name(), found.iter().filter(|finding| finding.kind == kind).count());
        }
        let mut problems: Vec<Error> = found
            .iter()
            .filter(|f| f.action == Action::None && f.kind.is_mismatch())
            .map(|f| problem(&snapshot, f))
            .collect();
        let due = match scope {
            AuditScope::Everything => self.audit.confirmation.lock().due(found),
            AuditScope::RepairsOnly => found.into_iter().filter(|finding| finding.action.is_repair()).collect(),
        };
        let due: Vec<Finding> = due.into_iter().filter(|finding| finding.action != Action::None).collect();
        if !due.is_empty() {
            let _alone = self.wiring.write().await;
            for finding in due {
                let outcome = self.correct(&snapshot, &finding).await;
                let Finding { kind, subject, evidence, action, .. } = &finding;
                match outcome {
                    Ok(false) => {}
                    Ok(true) => {
                        self.metrics.corrected(action.name());
                        let code = errors::NET_DRIFT.id;
                        warn!(
                            code,
                            kind = kind.name(),
                            subject,
                            evidence,
                            action = action.name(),
                            "corrected a difference between the node and the store"
                        );
                    }
                    Err(error) => {
                        warn!(kind = kind.name(), subject, evidence, action = action.name(), %error, "failed to correct a difference between the node and the store");
                        problems.push(problem(&snapshot, &finding));
                    }
                }
            }
        }
        *self.audit.problems.lock() = problems;
    }

    /// Carries out one action; `false` if the store has moved on and there is nothing to do any more.
    async fn correct(self: &Arc<Self>, snapshot: &AuditSnapshot, finding: &Finding) -> Result<bool, Error> {
        match &finding.action {
            // Fencing is the pool's, which sees the same in its inventory.
            Action::None | Action::ReportAddressLoss => Ok(false),
            Action::Repair(step) => {
                if !self.still_wanted(snapshot, finding, step) {
                    return Ok(false);
                }
                self.host.repair(vec![step.clone()], None).await.map_err(net_error)?;
                Ok(true)
            }
            Action::RestoreEndpoint(ifindex) => {
                let Some(view) = self.steady(snapshot, finding.key.as_ref()) else { return Ok(false) };
                let plan = self.plan(&view.key, &view.pod, &view.lease, &PodOptions::decode(&view.options));
                self.with_datapath(|datapath| datapath.endpoints().recover()).await?;
                self.install_datapath(Self::endpoint(&plan, &view.lease, *ifindex), &view.pod).await?;
                Ok(true)
            }
            Action::Remove(orphan) => {
                if self.is_known(orphan) {
                    return Ok(false);
                }
                self.host.remove(vec![orphan.clone()]).await.map_err(net_error)?;
                Ok(true)
            }
            Action::RemoveEndpoint(ifindex, addresses) => {
                let (ifindex, known) = (*ifindex, self.known_addresses());
                if !known.is_disjoint(addresses) {
                    return Ok(false);
                }
                let removed = self
                    .with_datapath(move |datapath| {
                        datapath.endpoints().recover()?;
                        datapath.endpoints().remove(ifindex)
                    })
                    .await;
                self.forget_policies().await;
                removed
            }
            Action::Release => {
                let Some(key) = finding.key.clone() else { return Ok(false) };
                info!(%key, "the pod is gone without a DEL; freeing its addresses");
                self.feed(Event::NetnsGone { key });
                Ok(true)
            }
        }
    }

    /// The attachment, if it is ready and has the addresses it had when the snapshot was looked at.
    fn steady(&self, snapshot: &AuditSnapshot, key: Option<&AttachmentKey>) -> Option<AttachmentView> {
        let view = self.pool_state().pool.get(key?)?;
        let stored = snapshot.attachments.iter().find(|stored| stored.plan.inputs.key == view.key)?;
        let same = stored.plan.inputs.addresses == view.lease.addresses && stored.eni == view.lease.eni;
        (same && view.phase == Phase::Ready).then_some(view)
    }

    fn still_wanted(&self, snapshot: &AuditSnapshot, finding: &Finding, step: &Step) -> bool {
        match &finding.key {
            Some(key) => self.steady(snapshot, Some(key)).is_some(),
            None => self.audit.plans.lock().values().any(|plan| plan.steps.contains(step)),
        }
    }

    fn known_addresses(&self) -> BTreeSet<IpAddr> {
        self.pool_state()
            .pool
            .list()
            .into_iter()
            .flat_map(|view| view.lease.addresses.iter().collect::<Vec<_>>())
            .collect()
    }

    fn is_known(&self, orphan: &Orphan) -> bool {
        match orphan {
            Orphan::Link { alias: owner, .. } => {
                let known = self.pool_state().pool.list();
                known.iter().any(|view| Some(alias(&view.key)) == *owner)
            }
            Orphan::Route(route) if route.dst.prefix() == 0 => {
                self.links.nics().iter().any(|nic| nic.name == route.dev)
            }
            Orphan::Route(route) => self.known_addresses().contains(&route.dst.ip()),
            Orphan::Rule(rule) => self.known_addresses().contains(&rule.selector.net().ip()),
        }
    }
}

fn endpoint(stored: &crate::bpf::Endpoint, attached: bool) -> Endpoint {
    Endpoint {
        ifindex: stored.host_ifindex,
        host_mac: stored.host_mac,
        pod_mac: stored.pod_mac,
        addresses: stored.addresses,
        eni_ifindex: stored.eni_ifindex,
        attached: Some(attached),
    }
}

/// The problem of a finding that is not corrected, for `terway-cli status`.
fn problem(snapshot: &AuditSnapshot, finding: &Finding) -> Error {
    let code = match finding.kind {
        FindingKind::NicMissing => errors::NIC_MISSING,
        _ => errors::NET_DRIFT,
    };
    let stored = snapshot.attachments.iter().find(|stored| Some(&stored.plan.inputs.key) == finding.key.as_ref());
    let whose = stored.map(|stored| format!("{} ({}): ", stored.pod, stored.plan.inputs.key)).unwrap_or_default();
    let advice = match finding.kind {
        FindingKind::LinkMissing => "; delete the pod, its replacement gets a new interface",
        _ => "",
    };
    Error::new(code, format!("{whose}{}: {}{advice}.", finding.subject, finding.evidence))
}
