//! State of the Service actor: the planner and what is to be written later. Its methods block: they write maps.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::errors::{self, Error};
use terway_core::objects::ObjectKey;
use terway_core::service::{Entry, NodeFacts, Op, Plan, Planner, Settings};
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use super::health::Health;
use super::metrics::ServiceMetrics;
use super::{KINDS, ServiceList, owner_name};
use crate::bpf::{BpfError, Datapath, RETIRE_AFTER};
use crate::memory;
use crate::objects::{ObjectChanges, ObjectStore};
use crate::supervise;

/// The first and the longest time until a failed write is retried. Not shorter than [`RETIRE_AFTER`]: the retry reads the maps anew, after which
/// places that were still to be retired may be reused at once.
const RETRY: (Duration, Duration) = (RETIRE_AFTER, Duration::from_secs(60));

/// Problems that the status lists one by one.
const LISTED: usize = 20;

/// Notifies the tasks that depend on Services.
#[derive(Debug)]
pub(super) struct Notifiers {
    /// Health checks: ports and numbers of endpoints.
    pub(super) health: watch::Sender<Health>,
    /// Becomes true once the maps hold the Services of all objects, and stays so.
    pub(super) in_force: watch::Sender<bool>,
}

/// Errors in objects as the planner reports them.
type ObjectErrors = BTreeMap<ObjectKey, BTreeSet<String>>;

/// A command of the Service actor.
#[derive(Debug)]
pub(super) enum Command {
    /// Objects have changed; the sender is used when the step is done.
    Objects(Arc<ObjectChanges>, oneshot::Sender<()>),
    /// The node has these addresses.
    Addresses(Vec<IpAddr>),
    /// The time that [`State::step`] returned has come.
    Due,
}

/// See the [module](self).
pub(super) struct State {
    datapath: Arc<Datapath>,
    facts: NodeFacts,
    settings: Settings,
    metrics: ServiceMetrics,
    objects: Arc<ObjectStore>,
    /// None before the first sync, and after a failure.
    planner: Option<Planner>,
    synced: bool,
    /// Operations to be run at a later time, the earliest first.
    retire: VecDeque<(Instant, Vec<Op>)>,
    retry: Option<Instant>,
    /// The time until the next retry after a failure.
    backoff: Duration,
    addresses: Vec<IpAddr>,
    object_errors: ObjectErrors,
    /// Objects that are not in the maps as planned, each with the map entries concerned.
    unapplied: ObjectErrors,
    failure: Option<Error>,
    notifiers: Notifiers,
    /// A backend was removed since [`State::take_backends_removed`].
    backends_removed: bool,
    /// When free memory is returned to the kernel.
    trim_memory: Option<Instant>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("synced", &self.synced).field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl State {
    pub(super) fn new(
        datapath: Arc<Datapath>,
        objects: Arc<ObjectStore>,
        facts: NodeFacts,
        settings: Settings,
        metrics: ServiceMetrics,
        notifiers: Notifiers,
    ) -> Self {
        // The Services of an earlier daemon are in the maps and served, before any object is read.
        if !datapath.services().is_empty() {
            notifiers.in_force.send_replace(true);
        }
        Self {
            datapath,
            facts,
            settings,
            metrics,
            objects,
            planner: None,
            synced: false,
            retire: VecDeque::new(),
            retry: None,
            backoff: RETRY.0,
            addresses: Vec::new(),
            object_errors: BTreeMap::new(),
            unapplied: BTreeMap::new(),
            failure: None,
            notifiers,
            backends_removed: false,
            trim_memory: None,
        }
    }

    /// Whether a backend was removed since the last call.
    pub(super) const fn take_backends_removed(&mut self) -> bool {
        std::mem::replace(&mut self.backends_removed, false)
    }

    /// Executes a command; returns when the next one is due.
    pub(super) fn step(&mut self, command: Command) -> Option<Instant> {
        let start = Instant::now();
        let mut waiting = None;
        let outcome = match command {
            Command::Objects(changes, done) => {
                waiting = Some(done);
                self.changed(&changes, changes.received.unwrap_or(start))
            }
            Command::Addresses(addresses) => {
                self.addresses = addresses;
                self.datapath.services().set_node_addresses(&self.addresses)
            }
            Command::Due => self.due(start),
        };
        if let Err(error) = outcome {
            self.failed(&error);
        }
        let (frontends, backends) = self.datapath.services().counts();
        self.metrics.entries(frontends, backends);
        if let Some(done) = waiting {
            let _ = done.send(());
        }
        self.retire.front().map(|(due, _)| *due).into_iter().chain(self.retry).chain(self.trim_memory).min()
    }

    fn changed(&mut self, changes: &ObjectChanges, start: Instant) -> Result<(), BpfError> {
        let first = changes.has_synced(&KINDS) && !self.synced;
        self.synced |= first;
        if first || (self.synced && changes.resync) {
            return self.restore(start);
        }
        // Without a planner, before the first sync or until the retry, the objects are enough.
        let Some(planner) = &mut self.planner else { return Ok(()) };
        let plan = planner.update(&self.objects.read(), &changes.changes);
        self.carry_out(plan, start);
        Ok(())
    }

    fn due(&mut self, now: Instant) -> Result<(), BpfError> {
        while let Some((_, ops)) = self.retire.pop_front_if(|(due, _)| *due <= now) {
            if let Some(planner) = &mut self.planner {
                let executed = planner.execute_retired(&ops, &mut |batch| self.datapath.services().apply(batch));
                self.backends_removed |= executed.backends_removed;
            }
            self.note_unapplied();
        }
        if self.retry.is_some_and(|retry| retry <= now) {
            self.retry = None;
            match &mut self.planner {
                Some(planner) => {
                    let plan = planner.retry();
                    self.carry_out(plan, now);
                }
                None => {
                    self.datapath.services().set_node_addresses(&self.addresses)?;
                    if self.synced {
                        self.restore(now)?;
                        info!("Services are programmed again");
                    }
                }
            }
        }
        if self.trim_memory.is_some_and(|trim_memory| trim_memory <= now) {
            self.trim_memory = None;
            memory::give_back();
        }
        Ok(())
    }

    /// Reads the maps and plans the difference between them and all objects.
    fn restore(&mut self, start: Instant) -> Result<(), BpfError> {
        self.retire.clear();
        let kernel = self.datapath.services().recover()?;
        let found = kernel.frontends.len();
        let mut planner = Planner::restore(self.facts.clone(), self.settings.clone(), kernel);
        let plan = planner.sync(&self.objects.read());
        let (now, later) = (plan.ops.len(), plan.retire.len());
        // A new planner reports errors, but not that earlier ones are gone.
        let errors = planner.object_errors();
        self.object_errors.retain(|object, _| errors.contains_key(object));
        self.planner = Some(planner);
        self.failure = None;
        self.carry_out(plan, start);
        self.notify_health();
        self.notifiers.in_force.send_replace(true);
        // Backends may have been removed while no daemon ran.
        self.backends_removed = true;
        let services = self.objects.read().services().len();
        // Not now: subscribers of the feed may still hold the first changes.
        self.trim_memory = Some(Instant::now() + RETIRE_AFTER);
        info!(services, frontends_found = found, writes = now, deferred = later, took = ?start.elapsed(), "Services are in force");
        Ok(())
    }

    /// Runs a plan; logs new errors in objects.
    fn carry_out(&mut self, mut plan: Plan, start: Instant) {
        for (object, messages) in std::mem::take(&mut plan.object_errors) {
            let known = self.object_errors.remove(&object).unwrap_or_default();
            for message in messages.difference(&known) {
                warn!(%object, "{message}");
            }
            if !messages.is_empty() {
                self.object_errors.insert(object, messages);
            }
        }
        if !plan.health.is_empty() {
            self.notify_health();
        }
        let Some(planner) = &mut self.planner else { return };
        if plan.ops.is_empty() && plan.retire.is_empty() {
            return;
        }
        supervise::injection_point("service-step");
        let executed = planner.execute(&plan, &mut |batch| self.datapath.services().apply(batch));
        self.backends_removed |= executed.backends_removed;
        self.metrics.synced(start.elapsed());
        if !plan.retire.is_empty() {
            self.retire.push_back((Instant::now() + RETIRE_AFTER, plan.retire));
        }
        self.note_unapplied();
    }

    /// Logs which objects are not in the maps as planned, and schedules a retry.
    fn note_unapplied(&mut self) {
        let Some(planner) = &self.planner else { return };
        if planner.is_applied() {
            if !std::mem::take(&mut self.unapplied).is_empty() {
                info!("all Services are programmed");
            }
            self.retry = None;
            self.backoff = RETRY.0;
        } else {
            let unapplied = planner.unapplied_objects();
            for (object, entries) in &unapplied {
                if !self.unapplied.contains_key(object) {
                    error!(%object, error = entries.first().map_or("", String::as_str), "failed to program a part of a Service");
                }
            }
            self.unapplied = unapplied;
            if self.retry.is_none() {
                self.retry = Some(self.next_retry());
            }
        }
        self.metrics.unapplied(self.unapplied.len());
    }

    /// The time of the next retry: the back-off grows, and is spread so that nodes do not retry at the same time.
    fn next_retry(&mut self) -> Instant {
        let backoff = self.backoff;
        self.backoff = (self.backoff * 2).min(RETRY.1);
        Instant::now() + backoff + backoff.mul_f64(fastrand::f64() / 4.0)
    }

    /// Publishes the health-check ports and their numbers of endpoints. Without a planner the numbers stay as they are.
    fn notify_health(&self) {
        let ports = self.planner.as_ref().map(Planner::health);
        self.notifiers.health.send_if_modified(|health| {
            let next = Health {
                ports: ports.unwrap_or_else(|| health.ports.clone()),
                in_force: self.failure.is_none() && self.planner.is_some(),
            };
            let changed = *health != next;
            *health = next;
            changed
        });
    }

    fn failed(&mut self, error: &BpfError) {
        error!(%error, retry_in = ?self.backoff, "failed to program Services");
        self.failure = Some(Error::new(errors::SERVICES_FAILED, format!("{error}.")));
        self.invalidate();
        self.notify_health();
    }

    /// Discards the planner and schedules a re-read of the maps; returns when.
    pub(super) fn invalidate(&mut self) -> Instant {
        self.planner = None;
        self.retire.clear();
        self.unapplied.clear();
        let retry = self.next_retry();
        self.retry = Some(retry);
        retry
    }

    /// What is wrong, the most important first.
    pub(super) fn problems(&self) -> Vec<Error> {
        let object_errors = self.object_errors.iter().flat_map(|(object, messages)| {
            messages.iter().map(move |text| Error::new(errors::SERVICE_PROBLEM, format!("{object}: {text}.")))
        });
        let mut object_errors: Vec<Error> = object_errors.collect();
        self.metrics.problems(object_errors.len());
        object_errors.truncate(LISTED);
        let unapplied = self.unapplied.iter().flat_map(|(object, entries)| {
            entries.iter().map(move |text| Error::new(errors::SERVICES_FAILED, format!("{object}: {text}.")))
        });
        self.failure.iter().cloned().chain(unapplied.take(LISTED)).chain(object_errors).collect()
    }

    /// The owners of ports by port id.
    pub(super) fn port_owners(&self, numbers: &BTreeSet<u32>) -> HashMap<u32, String> {
        let all = self.planner.iter().flat_map(Planner::views).filter(|view| numbers.contains(&view.id.0));
        all.map(|view| (view.id.0, owner_name(&view.owner).to_string())).collect()
    }

    /// The ports of a namespace and of an owner's name, where these are not empty.
    pub(super) fn list(&self, namespace: &str, name: &str) -> ServiceList {
        let Some(planner) = &self.planner else { return ServiceList::default() };
        let matches = |part: &str, filter: &str| filter.is_empty() || part == filter;
        let ports = planner.views().filter(|view| {
            let owner = owner_name(&view.owner);
            matches(&owner.namespace, namespace) && matches(&owner.name, name)
        });
        let frontend_problem = |(entry, error): (Entry, Option<&str>)| match entry {
            Entry::Frontend(key) => Some((key, error.unwrap_or("waits for another map entry").to_owned())),
            _ => None,
        };
        ServiceList {
            ports: ports.collect(),
            maps: planner.map_contents(),
            frontend_problems: planner.unapplied().filter_map(frontend_problem).collect(),
            unapplied: self.unapplied.clone(),
            is_synced: self.synced,
        }
    }
}
