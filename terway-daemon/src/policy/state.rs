//! State of the policy actor: the compiler, local endpoints, and operations that are not written yet. Its methods block: they write maps.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, Family, PodRef};
use terway_core::objects::{ObjectKey, ObjectName, Objects};
use terway_core::policy::{
    Compiler, EndpointPolicy, Event, Explanation, Halted, Maps, MatchedRule, Op, SetId, SetRef, UNKNOWN_POD, Verdict,
    VerdictOrTable,
};
use tracing::{error, info};

use super::counters::PolicyCounters;
use super::metrics::PolicyMetrics;
use super::report::{self, PolicyList, PolicyStatus, PolicyVerdict};
use super::{Connection, KINDS};
use crate::bpf::{BpfError, Datapath};
use crate::objects::{ObjectChanges, ObjectStore};
use crate::supervise;

/// The set of pods in quarantine: it has no entries, and its defaults deny. The compiler assigns ids from 1 upwards.
const QUARANTINE: SetId = SetId(u32::MAX - 1);

/// Pods in quarantine that the status lists by name.
const LISTED: usize = 5;

/// The first and the longest time until refused operations are retried.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A command of the policy actor.
#[derive(Debug)]
pub(super) enum Command {
    /// Objects have changed.
    Objects(Vec<Arc<ObjectChanges>>),
    /// The node has these addresses.
    Addresses(Vec<IpAddr>),
    /// Whether policies are enforced.
    Enforce(bool),
}

/// The reason for which an ADD waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitReason {
    /// The kinds of objects that policies need are not all synced.
    ObjectsUnsynced,
    /// The actor is busy with a step.
    StepInProgress,
    /// The pod's own object, with its labels, is not known.
    PodUnknown,
}

/// A pod of this node whose policies are in the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attached {
    pod: PodRef,
    addresses: Addresses,
}

/// See the [module](super).
pub(super) struct State {
    datapath: Arc<Datapath>,
    objects: Arc<ObjectStore>,
    /// Changes up to this revision of the store are compiled.
    revision: u64,
    metrics: PolicyMetrics,
    counters: Arc<PolicyCounters>,
    /// The counters of an earlier daemon are to be adopted once all operations are written.
    adopt_counters: bool,
    /// A policy was deleted since [`PolicyCounters::remove_deleted`].
    is_policy_deleted: bool,
    /// None before the objects are synced.
    compiler: Option<Compiler>,
    /// Events from before that, in order.
    early: Vec<Event>,
    /// A provisional compiler with the first so many of these events, for pods that are added before the objects are synced.
    provisional: Option<(Compiler, usize)>,
    attached: BTreeMap<u32, Attached>,
    /// The maps cannot be read, or an operation failed that must not be skipped.
    failure: Option<Error>,
    /// Objects that are not in the maps as compiled, each with the map entries concerned.
    unapplied: BTreeMap<ObjectKey, BTreeSet<String>>,
    /// When what is not applied is retried.
    retry: Option<Instant>,
    backoff: Duration,
    node: Vec<IpAddr>,
    enforce: bool,
    /// Incremented by every step.
    generation: u64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("attached", &self.attached.len())
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl State {
    pub(super) fn new(
        datapath: Arc<Datapath>,
        objects: Arc<ObjectStore>,
        metrics: PolicyMetrics,
        counters: Arc<PolicyCounters>,
        enforce: bool,
    ) -> Result<Self, BpfError> {
        // Empty maps enforce nothing yet. These operations select no pod, but enforcement begins.
        if datapath.policies().read()?.cidrs.is_empty() {
            let (mut compiler, mut ops) = Compiler::new();
            ops.extend(compiler.step(Event::Enforce(enforce)));
            ops.iter().try_for_each(|op| datapath.policies().apply(op))?;
        }
        Ok(Self {
            datapath,
            objects,
            revision: 0,
            metrics,
            counters,
            adopt_counters: false,
            is_policy_deleted: false,
            compiler: None,
            early: Vec::new(),
            provisional: None,
            attached: BTreeMap::new(),
            failure: None,
            unapplied: BTreeMap::new(),
            retry: None,
            backoff: RETRY.0,
            node: Vec::new(),
            enforce,
            generation: 0,
        })
    }

    pub(super) fn step(&mut self, command: Command) {
        let mut start = Instant::now();
        match command {
            Command::Objects(all) => {
                start = all.first().and_then(|first| first.received).unwrap_or(start);
                self.changed(&all, start);
            }
            Command::Addresses(addresses) => {
                self.node.clone_from(&addresses);
                if self.compiler.is_some() {
                    self.event(Event::NodeAddresses(addresses));
                }
            }
            Command::Enforce(enforce) => {
                if self.enforce != enforce {
                    info!(enforce, "network policies");
                }
                self.enforce = enforce;
                if self.compiler.is_some() {
                    self.event(Event::Enforce(enforce));
                }
            }
        }
        self.metrics.stepped(start.elapsed());
        self.update_metrics();
    }

    fn changed(&mut self, all: &[Arc<ObjectChanges>], start: Instant) {
        if all.iter().any(|changes| changes.resync) {
            return self.rebuild();
        }
        // Older changes are contained in what the last rebuild has read from the store.
        let new = all.iter().filter(|changes| changes.revision > self.revision);
        let events = new.flat_map(|changes| changes.changes.iter().cloned().filter_map(Event::from_applied)).collect();
        self.revision = all.last().map_or(0, |last| last.revision).max(self.revision);
        self.events(events);
        if self.compiler.is_none() && all.last().is_some_and(|last| last.has_synced(&KINDS)) {
            self.take_over(start);
        }
    }

    /// Makes the compiler anew from the object store and the pods of this node, over the maps as they are.
    pub(super) fn rebuild(&mut self) {
        let start = Instant::now();
        let is_synced;
        (self.early, is_synced) = {
            let stored = self.objects.read();
            self.revision = stored.revision();
            (object_events(&stored), stored.has_synced(&KINDS))
        };
        let attach = |(slot, attached): (&u32, &Attached)| Event::Attach {
            slot: *slot,
            pod: attached.pod.clone(),
            addresses: attached.addresses,
        };
        self.early.extend(self.attached.iter().map(attach));
        self.compiler = None;
        self.provisional = None;
        self.failure = None;
        self.retry = None;
        self.is_policy_deleted = false;
        self.counters.orphan();
        if is_synced {
            self.take_over(start);
        }
        self.update_metrics();
    }

    /// Compiles all known objects, and writes the difference to the maps of an earlier daemon.
    fn take_over(&mut self, start: Instant) {
        let found = match self.datapath.policies().read() {
            Ok(found) => found,
            Err(error) => return self.failed(&error),
        };
        let (pods, cidrs) = (found.addresses.len(), found.cidrs.len());
        let known = [Event::NodeAddresses(self.node.clone()), Event::Enforce(self.enforce)];
        let events = known.into_iter().chain(std::mem::take(&mut self.early));
        self.provisional = None;
        let (mut compiler, ops) = Compiler::take_over(&without_quarantine(found), events);
        let stats = compiler.stats();
        self.counters.update(&mut compiler);
        self.adopt_counters = true;
        self.compiler = Some(compiler);
        let writes = ops.len();
        self.run(ops);
        info!(?stats, addresses_found = pods, cidrs_found = cidrs, writes, took = ?start.elapsed(), "network policies are in force");
    }

    fn event(&mut self, event: Event) {
        self.events(vec![event]);
    }

    /// Compiles events and writes the result to the maps.
    fn events(&mut self, mut events: Vec<Event>) {
        let Some(compiler) = &mut self.compiler else { return self.early.append(&mut events) };
        let is_deletion =
            |event: &Event| matches!(event, Event::NetworkPolicy(_, None) | Event::ClusterNetworkPolicy(_, None));
        self.is_policy_deleted |= events.iter().any(is_deletion);
        let ops = compiler.steps(events);
        self.counters.update(compiler);
        supervise::injection_point("policy-step");
        self.run(ops);
    }

    /// Writes operations to the maps. Those that the kernel refuses are kept by the compiler and retried; all others are written.
    fn run(&mut self, ops: Vec<Op>) {
        self.generation += 1;
        let Some(compiler) = &mut self.compiler else { return };
        let executed = compiler.execute(ops, &mut |op| apply(&self.datapath, op));
        self.executed(executed);
    }

    fn executed(&mut self, executed: Result<(), Halted>) {
        match executed {
            Ok(()) => self.failure = None,
            Err(halted) => self.failed(&halted),
        }
        let Some(compiler) = &self.compiler else { return };
        if compiler.is_applied() {
            if !std::mem::take(&mut self.unapplied).is_empty() {
                info!("all network policies are programmed");
            }
            self.retry = None;
            self.backoff = RETRY.0;
            // No packet meets an id of an earlier daemon any more.
            if std::mem::take(&mut self.adopt_counters) {
                self.counters.adopt();
            }
        } else {
            let unapplied = compiler.unapplied_objects();
            for (object, entries) in &unapplied {
                if !self.unapplied.contains_key(object) {
                    let error = entries.first().map_or("", String::as_str);
                    error!(%object, error, "failed to program a part of the network policies");
                }
            }
            self.unapplied = unapplied;
            self.schedule_retry();
        }
    }

    /// Schedules the next retry: the back-off grows, and is spread so that nodes do not retry at the same time.
    fn schedule_retry(&mut self) {
        if self.retry.is_none() {
            let backoff = self.backoff;
            self.backoff = (backoff * 2).min(RETRY.1);
            self.retry = Some(Instant::now() + backoff + backoff.mul_f64(fastrand::f64() / 4.0));
        }
    }

    fn failed(&mut self, error: &dyn std::error::Error) {
        if self.failure.is_none() {
            error!(%error, "failed to write network policies");
        }
        self.failure = Some(Error::new(errors::POLICY_FAILED, format!("{error}.")));
        self.schedule_retry();
    }

    /// Retries what is not applied, if that is due; returns when it is next.
    pub(super) fn retry(&mut self) -> Option<Instant> {
        if self.retry.is_some_and(|retry| retry <= Instant::now()) {
            self.retry = None;
            if let Some(compiler) = &mut self.compiler {
                let executed = compiler.retry(&mut |op| apply(&self.datapath, op));
                self.executed(executed);
            } else if self.objects.read().has_synced(&KINDS) {
                self.take_over(Instant::now());
            }
            self.update_metrics();
        }
        self.retry
    }

    /// The generation in which the compiler has deferred operations, if it has any and can run them.
    pub(super) fn deferred(&self) -> Option<u64> {
        let has_deferred = self.compiler.as_ref().is_some_and(Compiler::has_deferred);
        (self.failure.is_none() && has_deferred).then_some(self.generation)
    }

    /// Runs deferred operations, if no step came since `generation`, after which an RCU grace period has passed. Returns whether there are more.
    pub(super) fn run_deferred(&mut self, generation: u64) -> bool {
        if generation == self.generation
            && let Some(compiler) = &mut self.compiler
        {
            let ops = compiler.run_deferred().into_iter().filter(|op| *op != Op::RcuBarrier).collect();
            self.counters.update(compiler);
            if std::mem::take(&mut self.is_policy_deleted) {
                self.counters.remove_deleted(compiler);
            }
            self.run(ops);
            self.update_metrics();
        }
        self.deferred().is_some()
    }

    /// The reason for which an ADD of the pod has to wait; none if its policies are known.
    pub(super) fn wait_reason(&self, pod: &PodRef) -> Option<WaitReason> {
        match &self.compiler {
            None => Some(WaitReason::ObjectsUnsynced),
            Some(compiler) => (self.enforce && compiler.lacks_labels(pod)).then_some(WaitReason::PodUnknown),
        }
    }

    pub(super) fn attach(&mut self, host_ifindex: u32, pod: &PodRef, addresses: Addresses) -> Result<(), Error> {
        let full = |error: BpfError| Error::new(errors::BPF_FAILED, error.to_string());
        let (slot, exists) = self.datapath.endpoints().reserve_slot(host_ifindex).map_err(full)?;
        let new = Attached { pod: pod.clone(), addresses };
        if self.attached.get(&slot) != Some(&new) {
            self.attached.insert(slot, new);
            self.event(Event::Attach { slot, pod: pod.clone(), addresses });
            // An endpoint that exists keeps what an earlier daemon wrote; a new one must not get another pod's policies.
            if self.compiler.is_none()
                && !exists
                && let Err(error) = self.quarantine(slot, addresses)
            {
                self.attached.remove(&slot);
                return Err(Error::new(errors::POLICY_FAILED, format!("{error}.")));
            }
        }
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        // A pod in lockdown would have no network; kubelet retries.
        let is_locked = |compiler: &Compiler| {
            let name = ObjectName::new(&pod.namespace, &pod.name);
            !compiler.is_applied() && compiler.locked_pods().contains(&name)
        };
        if self.compiler.as_ref().is_some_and(is_locked) {
            let entries = self.unapplied.values().flatten().next().cloned().unwrap_or_default();
            return Err(Error::new(errors::POLICY_FAILED, format!("The pod's policies are incomplete: {entries}.")));
        }
        Ok(())
    }

    /// Writes a new pod's endpoint before the objects are synced: a direction that a policy known so far may restrict is denied.
    fn quarantine(&mut self, slot: u32, addresses: Addresses) -> Result<(), BpfError> {
        let (provisional, applied) = self.provisional.get_or_insert_with(|| (Compiler::new().0, 0));
        provisional.steps(self.early.iter().skip(*applied).cloned());
        *applied = self.early.len();
        let mut value = provisional.endpoint(slot).unwrap_or_default();
        let denied = SetRef { set: QUARANTINE, defaults: [VerdictOrTable::verdict(Verdict::deny(UNKNOWN_POD)); 4] };
        for sides in [&mut value.ingress, &mut value.egress] {
            let is_unrestricted = sides.iter().all(|side| side.set == SetId(0));
            *sides = [SetRef::default(), if is_unrestricted { SetRef::default() } else { denied }];
        }
        for address in addresses.iter() {
            value.identities[Family::of(address) as usize] = self.datapath.policies().identity(address)?;
        }
        [0, 1].into_iter().try_for_each(|version| {
            self.datapath.policies().apply(&Op::PutEndpoint { slot, version, value: Box::new(value) })
        })
    }

    /// Detaches the pods whose endpoints were removed.
    pub(super) fn detach_removed(&mut self) {
        let slots = self.datapath.endpoints().slots();
        let removed: Vec<u32> = self.attached.keys().copied().filter(|slot| !slots.contains(slot)).collect();
        for slot in removed {
            self.attached.remove(&slot);
            self.event(Event::Detach { slot });
            self.datapath.endpoints().release_slot(slot);
        }
    }

    fn update_metrics(&self) {
        if let Some(compiler) = &self.compiler {
            self.metrics.stats(&compiler.stats(), compiler.pods_without_labels().len());
            let locked = if compiler.is_applied() { 0 } else { compiler.locked_pods().len() };
            self.metrics.unapplied(self.unapplied.len(), locked);
        }
    }

    fn quarantined(&self) -> Vec<ObjectName> {
        self.compiler.as_ref().map(Compiler::pods_without_labels).unwrap_or_default()
    }

    pub(super) fn problems(&self) -> Vec<Error> {
        let quarantined = self.quarantined();
        let incomplete = (!quarantined.is_empty() && self.enforce).then(|| {
            let names: Vec<String> = quarantined.iter().take(LISTED).map(ToString::to_string).collect();
            let more = match quarantined.len() - names.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            Error::new(errors::POLICY_INCOMPLETE, format!("{}{more}.", names.join(", ")))
        });
        let unapplied = self.unapplied.iter().flat_map(|(object, entries)| {
            entries.iter().map(move |text| Error::new(errors::POLICY_FAILED, format!("{object}: {text}.")))
        });
        self.failure.iter().cloned().chain(unapplied.take(LISTED)).chain(incomplete).collect()
    }

    pub(super) fn status(&self) -> PolicyStatus {
        PolicyStatus {
            is_enforced: self.enforce,
            is_synced: self.compiler.is_some(),
            stats: self.compiler.as_ref().map(Compiler::stats).unwrap_or_default(),
            quarantined: self.quarantined(),
        }
    }

    pub(super) fn list(&self, namespace: &str, name: &str) -> PolicyList {
        let Some(compiler) = &self.compiler else { return PolicyList::default() };
        let pod = |slot: &u32| self.attached.get(slot).map(|attached| attached.pod.clone());
        let policies = report::list(compiler, (namespace, name), pod, &self.counters, &self.unapplied);
        PolicyList { is_enforced: self.enforce, is_synced: true, policies }
    }

    /// The pod that has an address.
    pub(super) fn pod_at(&self, address: IpAddr) -> Option<ObjectName> {
        if let Some(compiler) = &self.compiler {
            return compiler.pod_at(address).cloned();
        }
        let has_address = |attached: &&Attached| attached.addresses.iter().any(|own| own == address);
        let pod = &self.attached.values().find(has_address)?.pod;
        Some(ObjectName::new(&pod.namespace, &pod.name))
    }

    /// The verdict of a flow event; none if policies of this node do not apply.
    pub(super) fn verdict(&self, number: u32) -> Option<PolicyVerdict> {
        let verdict = Verdict(number);
        let id = verdict.rule_id();
        let (rule, policies) = if id == UNKNOWN_POD {
            (MatchedRule::UnknownPod.to_string(), Vec::new())
        } else {
            match self.compiler.as_ref().and_then(|compiler| compiler.rule(id)) {
                Some(rule) => (rule.to_string(), report::policies(rule)),
                None if id.0 == 0 => return None,
                None => ("a rule that no longer exists".to_owned(), Vec::new()),
            }
        };
        Some(PolicyVerdict { is_allowed: verdict.is_allowed(), rule, policies })
    }

    pub(super) fn explain(&self, connection: &Connection) -> Result<Vec<Explanation>, String> {
        let Some(compiler) = &self.compiler else { return Err("not all objects are listed yet".to_owned()) };
        let Connection { from, to, protocol, port } = connection;
        compiler.explain(from, to, *protocol, *port).map_err(|unexplained| unexplained.to_string())
    }
}

/// Applies an operation to the policy maps.
fn apply(datapath: &Datapath, op: &Op) -> Result<(), String> {
    datapath.policies().apply(op).map_err(|error| error.to_string())
}

/// The events that lead from no objects to those of the store.
fn object_events(objects: &Objects) -> Vec<Event> {
    let namespaces =
        objects.namespaces().iter().map(|(name, new)| Event::Namespace(Arc::clone(&name.name), Some(Arc::clone(new))));
    let pods = objects.pods().iter().map(|(name, new)| Event::Pod(name.clone(), Some(Arc::clone(new))));
    let policies = objects.policies().iter();
    let policies = policies.map(|(name, new)| Event::NetworkPolicy(name.clone(), Some(Arc::clone(new))));
    let cluster = objects.cluster_policies().iter();
    let cluster = cluster.map(|(name, new)| Event::ClusterNetworkPolicy(name.clone(), Some(Arc::clone(new))));
    namespaces.chain(pods).chain(policies).chain(cluster).collect()
}

/// Maps without the quarantine set, whose id must not count for those that the compiler assigns.
fn without_quarantine(mut found: Maps) -> Maps {
    for value in found.endpoints.values_mut().flatten() {
        let EndpointPolicy { ingress, egress, .. } = value;
        for side in ingress.iter_mut().chain(egress) {
            if side.set == QUARANTINE {
                *side = SetRef::default();
            }
        }
    }
    found
}
