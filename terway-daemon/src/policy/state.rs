//! What is known of policies, and the steps that change it. Steps block: they write maps.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, Family, PodRef};
use terway_core::policy::{
    Compiler, EndpointPolicy, Event, Maps, MatchedRule, Op, SetId, SetRef, UNKNOWN_POD, Verdict, VerdictOrTable,
};
use terway_proto::v1;
use tracing::{error, info};

use super::KINDS;
use super::ledger::Ledger;
use super::metrics::PolicyMetrics;
use super::view;
use crate::bpf::{BpfError, Datapath};
use crate::objects::ObjectChanges;

/// The set of pods that are held back before there is a compiler: it has no entries, and its defaults deny. The compiler counts up from 1.
const HELD: SetId = SetId(u32::MAX - 1);

/// One thing to do.
#[derive(Debug)]
pub(super) enum Work {
    /// Objects have changed.
    Objects(Vec<Arc<ObjectChanges>>),
    /// The node has these addresses.
    Addresses(Vec<IpAddr>),
    /// Whether policies are enforced.
    Enforce(bool),
}

/// What an ADD waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The source of objects.
    View,
    /// The end of a step.
    Step,
    /// The pod's own object.
    Pod,
}

/// A pod whose policies stand in the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attached {
    pod: PodRef,
    addresses: Addresses,
}

/// See the [module](super).
pub(super) struct State {
    datapath: Arc<Datapath>,
    metrics: PolicyMetrics,
    ledger: Arc<Ledger>,
    /// The counters of an earlier daemon are not taken over yet.
    heir: bool,
    /// A policy has gone since the ledger was last tidied.
    policy_gone: bool,
    /// None before the view is complete.
    compiler: Option<Compiler>,
    /// What came before that, in order.
    early: Vec<Event>,
    /// What a compiler makes of the first so many of these, if a pod has asked.
    guess: Option<(Compiler, usize)>,
    attached: BTreeMap<u32, Attached>,
    /// What is not written yet, in order. Not empty only after the kernel refused the first of it.
    backlog: VecDeque<Op>,
    failure: Option<Error>,
    node: Vec<IpAddr>,
    enforce: bool,
    /// One more with every step.
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
        metrics: PolicyMetrics,
        ledger: Arc<Ledger>,
        node: Vec<IpAddr>,
        enforce: bool,
    ) -> Result<Self, BpfError> {
        // Maps that nobody has filled enforce nothing yet. What is written here says nothing about anybody, but is in force.
        if datapath.policies().read()?.cidrs.is_empty() {
            let (mut compiler, mut ops) = Compiler::new();
            ops.extend(compiler.step(Event::Enforce(enforce)));
            ops.iter().try_for_each(|op| datapath.policies().apply(op))?;
        }
        Ok(Self {
            datapath,
            metrics,
            ledger,
            heir: false,
            policy_gone: false,
            compiler: None,
            early: Vec::new(),
            guess: None,
            attached: BTreeMap::new(),
            backlog: VecDeque::new(),
            failure: None,
            node,
            enforce,
            generation: 0,
        })
    }

    pub(super) fn step(&mut self, work: Work) {
        let start = Instant::now();
        match work {
            Work::Objects(all) => {
                let complete = all.last().is_some_and(|last| last.has_synced(&KINDS));
                let events = all
                    .iter()
                    .flat_map(|batch| batch.changes.iter().cloned().filter_map(Event::from_applied))
                    .collect();
                self.events(events);
                if complete && self.compiler.is_none() {
                    self.take_over(start);
                }
            }
            Work::Addresses(addresses) => {
                self.node.clone_from(&addresses);
                if self.compiler.is_some() {
                    self.event(Event::NodeAddresses(addresses));
                }
            }
            Work::Enforce(enforce) => {
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
        self.measure();
    }

    /// Compiles from what an earlier daemon left to what is known.
    fn take_over(&mut self, start: Instant) {
        let found = match self.datapath.policies().read() {
            Ok(found) => found,
            Err(error) => return self.failed(&error),
        };
        let (pods, blocks) = (found.addresses.len(), found.cidrs.len());
        let known = [Event::NodeAddresses(self.node.clone()), Event::Enforce(self.enforce)];
        let events = known.into_iter().chain(std::mem::take(&mut self.early));
        self.guess = None;
        let (mut compiler, ops) = Compiler::take_over(&without_held(found), events);
        let stats = compiler.stats();
        self.ledger.follow(&mut compiler);
        self.heir = true;
        self.compiler = Some(compiler);
        let writes = ops.len();
        self.run(ops);
        info!(?stats, addresses_found = pods, blocks_found = blocks, writes, took = ?start.elapsed(), "policies are in force");
    }

    fn event(&mut self, event: Event) {
        self.events(vec![event]);
    }

    /// Takes events in; what follows from them is in the maps when this returns, unless the kernel refused.
    fn events(&mut self, mut events: Vec<Event>) {
        let Some(compiler) = &mut self.compiler else { return self.early.append(&mut events) };
        let gone =
            |event: &Event| matches!(event, Event::NetworkPolicy(_, None) | Event::ClusterNetworkPolicy(_, None));
        self.policy_gone |= events.iter().any(gone);
        let ops = compiler.steps(events);
        self.ledger.follow(compiler);
        self.run(ops);
    }

    fn run(&mut self, ops: Vec<Op>) {
        self.generation += 1;
        self.backlog.extend(ops);
        while let Some(op) = self.backlog.front() {
            if let Err(error) = self.datapath.policies().apply(op) {
                return self.failed(&error);
            }
            self.backlog.pop_front();
        }
        self.failure = None;
        // All is written: no packet meets a number of an earlier daemon any more.
        if std::mem::take(&mut self.heir) {
            self.ledger.inherit();
        }
    }

    fn failed(&mut self, error: &BpfError) {
        if self.failure.is_none() {
            error!(%error, "network policies are not written");
        }
        self.failure = Some(Error::new(errors::POLICY_FAILED, format!("{error}.")));
    }

    /// Tries again what was refused; whether there is still something.
    pub(super) fn retry(&mut self) -> bool {
        if !self.backlog.is_empty() {
            self.run(Vec::new());
        }
        self.failure.is_some()
    }

    /// If something can be done now that nothing happens, the generation in which that is so.
    pub(super) fn unsettled(&self) -> Option<u64> {
        let unsettled = self.compiler.as_ref().is_some_and(Compiler::has_deferred);
        (self.backlog.is_empty() && unsettled).then_some(self.generation)
    }

    /// Does what was left for later. A grace period has passed since `generation`; if anything has happened since, that was in vain. Whether
    /// there is more to do.
    pub(super) fn settle(&mut self, generation: u64) -> bool {
        if generation == self.generation
            && let Some(compiler) = &mut self.compiler
        {
            let ops = compiler.run_deferred().into_iter().filter(|op| *op != Op::RcuBarrier).collect();
            self.ledger.follow(compiler);
            if std::mem::take(&mut self.policy_gone) {
                self.ledger.forget(compiler);
            }
            self.run(ops);
            self.measure();
        }
        self.unsettled().is_some() || self.failure.is_some()
    }

    pub(super) fn awaits(&self, pod: &PodRef) -> Option<Awaited> {
        match &self.compiler {
            None => Some(Awaited::View),
            Some(compiler) => (self.enforce && compiler.lacks_labels(pod)).then_some(Awaited::Pod),
        }
    }

    pub(super) fn attach(&mut self, host_ifindex: u32, pod: &PodRef, addresses: Addresses) -> Result<(), Error> {
        let full = |error: BpfError| Error::new(errors::BPF_FAILED, error.to_string());
        let (slot, there) = self.datapath.endpoints().reserve_slot(host_ifindex).map_err(full)?;
        let new = Attached { pod: pod.clone(), addresses };
        if self.attached.get(&slot) != Some(&new) {
            self.attached.insert(slot, new);
            self.event(Event::Attach { slot, pod: pod.clone(), addresses });
            // An endpoint that is there has what an earlier daemon wrote; another pod's must not be inherited.
            if self.compiler.is_none() && !there {
                self.hold(slot, addresses);
            }
        }
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Denies a new pod, before the view is complete, what any policy known so far might deny it.
    fn hold(&mut self, slot: u32, addresses: Addresses) {
        let (guess, heard) = self.guess.get_or_insert_with(|| (Compiler::new().0, 0));
        guess.steps(self.early.iter().skip(*heard).cloned());
        *heard = self.early.len();
        let mut value = guess.endpoint(slot).unwrap_or_default();
        let held = SetRef { set: HELD, defaults: [VerdictOrTable::verdict(Verdict::deny(UNKNOWN_POD)); 4] };
        for sides in [&mut value.ingress, &mut value.egress] {
            let free = sides.iter().all(|side| side.set == SetId(0));
            *sides = [SetRef::default(), if free { SetRef::default() } else { held }];
        }
        for address in addresses.iter() {
            value.identities[Family::of(address) as usize] = match self.datapath.policies().identity(address) {
                Ok(identity) => identity,
                Err(error) => return self.failed(&error),
            };
        }
        self.run([0, 1].map(|version| Op::PutEndpoint { slot, version, value: Box::new(value) }).to_vec());
    }

    pub(super) fn forget_gone(&mut self) {
        let there = self.datapath.endpoints().slots();
        let gone: Vec<u32> = self.attached.keys().copied().filter(|slot| !there.contains(slot)).collect();
        for slot in gone {
            self.attached.remove(&slot);
            self.event(Event::Detach { slot });
            self.datapath.endpoints().release_slot(slot);
        }
    }

    fn measure(&self) {
        if let Some(compiler) = &self.compiler {
            self.metrics.stats(&compiler.stats(), compiler.pods_without_labels().len());
        }
    }

    pub(super) fn problems(&self) -> Vec<Error> {
        let held = self.compiler.as_ref().map(Compiler::pods_without_labels).unwrap_or_default();
        let held = (!held.is_empty() && self.enforce).then(|| {
            let names: Vec<String> = held.iter().take(5).map(ToString::to_string).collect();
            let more = if held.len() > names.len() {
                format!(" and {} more", held.len() - names.len())
            } else {
                String::new()
            };
            Error::new(errors::POLICY_INCOMPLETE, format!("{}{more}.", names.join(", ")))
        });
        self.failure.iter().cloned().chain(held).collect()
    }

    pub(super) fn status(&self) -> v1::PolicyStatus {
        let stats = self.compiler.as_ref().map(Compiler::stats).unwrap_or_default();
        let held = self.compiler.as_ref().map(Compiler::pods_without_labels).unwrap_or_default();
        view::status(&stats, &held, self.enforce, self.compiler.is_some())
    }

    pub(super) fn list(&self, request: &v1::ListPoliciesRequest) -> v1::ListPoliciesResponse {
        let Some(compiler) = &self.compiler else { return v1::ListPoliciesResponse::default() };
        let pods = |slot: &u32| self.attached.get(slot).map(|attached| attached.pod.clone());
        view::list(compiler, request, pods, self.enforce, &self.ledger)
    }

    /// The pod that has an address.
    pub(super) fn pod_at(&self, address: IpAddr) -> Option<v1::Pod> {
        let named = |namespace: &str, name: &str| v1::Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: String::new(),
        };
        if let Some(compiler) = &self.compiler {
            return compiler.pod_at(address).map(|pod| named(&pod.namespace, &pod.name));
        }
        let has = |attached: &&Attached| attached.addresses.iter().any(|own| own == address);
        self.attached.values().find(has).map(|attached| named(&attached.pod.namespace, &attached.pod.name))
    }

    /// What a decision of an event says; none if this node decides nothing there.
    pub(super) fn decision(&self, decision: u32) -> Option<v1::FlowDecision> {
        let decision = Verdict(decision);
        let number = decision.rule_id();
        let (reason, policies) = if number == UNKNOWN_POD {
            (MatchedRule::UnknownPod.to_string(), Vec::new())
        } else {
            let reason = self.compiler.as_ref().and_then(|compiler| compiler.rule(number));
            match reason {
                Some(reason) => (reason.to_string(), view::policies(reason)),
                None if number.0 == 0 => return None,
                None => ("a rule that is no more".to_owned(), Vec::new()),
            }
        };
        Some(v1::FlowDecision { allowed: decision.is_allowed(), reason, policies })
    }

    pub(super) fn explain(&self, request: &v1::ExplainPolicyRequest) -> v1::ExplainPolicyResponse {
        match &self.compiler {
            Some(compiler) => view::explain(compiler, request),
            None => v1::ExplainPolicyResponse {
                families: Vec::new(),
                problem: "the source of objects has not told everything yet".to_owned(),
            },
        }
    }
}

/// Maps without the set of pods that are held back, after which the compiler must not count.
fn without_held(mut found: Maps) -> Maps {
    for value in found.endpoints.values_mut().flatten() {
        let EndpointPolicy { ingress, egress, .. } = value;
        for side in ingress.iter_mut().chain(egress) {
            if side.set == HELD {
                *side = SetRef::default();
            }
        }
    }
    found
}
