//! What is known of Services, and the steps that change it. Steps block: they write maps.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::errors::{self, Error};
use terway_core::objects::ObjectKey;
use terway_core::service::{MapContents, NodeFacts, Op, Plan, Planner, Settings, invalidates_backend};
use terway_proto::v1;
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use super::health::Health;
use super::metrics::ServiceMetrics;
use super::{KINDS, view};
use crate::bpf::{BpfError, Datapath, RETIRE_AFTER};
use crate::memory;
use crate::objects::{ObjectChanges, ObjectStore};

/// The first and the longest time until maps that refused a write are tried again. Not shorter than [`RETIRE_AFTER`]: reading the maps
/// forgets what was still to be retired, and its places may be used at once.
const RETRY: (Duration, Duration) = (RETIRE_AFTER, Duration::from_secs(60));

/// Problems that the status lists one by one.
const TOLD: usize = 20;

/// Where news go.
#[derive(Debug)]
pub(super) struct Outlets {
    /// To those who answer health checks.
    pub(super) health: watch::Sender<Health>,
    /// True for good once the maps have held what follows from all objects.
    pub(super) in_force: watch::Sender<bool>,
}

/// What the planner finds wrong, by object.
type Complaints = BTreeMap<ObjectKey, BTreeSet<String>>;

/// One thing to do.
#[derive(Debug)]
pub(super) enum Work {
    /// Objects have changed; the sender is used when the step is done.
    Objects(Arc<ObjectChanges>, oneshot::Sender<()>),
    /// The node has these addresses.
    Addresses(Vec<IpAddr>),
    /// A time that [`State::step`] named has come.
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
    /// Operations for later, and when; the earliest first.
    retire: VecDeque<(Instant, Vec<Op>)>,
    retry: Option<Instant>,
    patience: Duration,
    addresses: Vec<IpAddr>,
    complaints: Complaints,
    failure: Option<Error>,
    outlets: Outlets,
    /// A backend's life has ended since somebody asked.
    lives_ended: bool,
    /// When free memory is given back.
    tidy: Option<Instant>,
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
        outlets: Outlets,
    ) -> Self {
        // An earlier daemon's Services are served, whoever reads objects now.
        if !datapath.services().is_empty() {
            outlets.in_force.send_replace(true);
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
            patience: RETRY.0,
            addresses: Vec::new(),
            complaints: BTreeMap::new(),
            failure: None,
            outlets,
            lives_ended: false,
            tidy: None,
        }
    }

    /// Whether a backend's life has ended since this was asked last.
    pub(super) const fn lives_ended(&mut self) -> bool {
        std::mem::replace(&mut self.lives_ended, false)
    }

    /// Does it, and tells when there is more to do.
    pub(super) fn step(&mut self, work: Work) -> Option<Instant> {
        let start = Instant::now();
        let mut waiting = None;
        let outcome = match work {
            Work::Objects(changes, done) => {
                waiting = Some(done);
                self.changed(&changes, start)
            }
            Work::Addresses(addresses) => {
                self.addresses = addresses;
                self.datapath.services().set_node_addresses(&self.addresses)
            }
            Work::Due => self.due(start),
        };
        if let Err(error) = outcome {
            self.failed(&error);
        }
        let (frontends, backends) = self.datapath.services().counts();
        self.metrics.entries(frontends, backends);
        if let Some(done) = waiting {
            let _ = done.send(());
        }
        self.retire.front().map(|(due, _)| *due).into_iter().chain(self.retry).chain(self.tidy).min()
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
        self.carry_out(plan, start)
    }

    fn due(&mut self, now: Instant) -> Result<(), BpfError> {
        while let Some((_, ops)) = self.retire.pop_front_if(|(due, _)| *due <= now) {
            self.datapath.services().apply(&ops)?;
            self.lives_ended |= ops.iter().any(invalidates_backend);
            if let Some(planner) = &mut self.planner {
                planner.retired(&ops);
            }
        }
        if self.retry.is_some_and(|retry| retry <= now) {
            self.retry = None;
            self.datapath.services().set_node_addresses(&self.addresses)?;
            if self.synced {
                self.restore(now)?;
                info!("Services are written again");
            }
        }
        if self.tidy.is_some_and(|tidy| tidy <= now) {
            self.tidy = None;
            memory::give_back();
        }
        Ok(())
    }

    /// Plans everything from what the maps hold.
    fn restore(&mut self, start: Instant) -> Result<(), BpfError> {
        self.retire.clear();
        let kernel = self.datapath.services().recover()?;
        let found = kernel.frontends.len();
        let mut planner = Planner::restore(self.facts.clone(), self.settings.clone(), kernel);
        let plan = planner.sync(&self.objects.read());
        let (now, later) = (plan.ops.len(), plan.retire.len());
        // What was wrong and no longer is, is in no news of a planner that has only begun.
        let wrong = planner.object_errors();
        self.complaints.retain(|object, _| wrong.contains_key(object));
        self.planner = Some(planner);
        self.carry_out(plan, start)?;
        self.failure = None;
        self.tell_health();
        self.outlets.in_force.send_replace(true);
        self.patience = RETRY.0;
        // Some may have ended before this daemon looked.
        self.lives_ended = true;
        let services = self.objects.read().services().len();
        // Not now: those who were told of all objects have not yet let go of them.
        self.tidy = Some(Instant::now() + RETIRE_AFTER);
        info!(services, frontends_found = found, writes = now, for_later = later, took = ?start.elapsed(), "Services are in force");
        Ok(())
    }

    /// RangeAllocator a plan; what is newly wrong goes to the log.
    fn carry_out(&mut self, plan: Plan, start: Instant) -> Result<(), BpfError> {
        for (object, messages) in plan.object_errors {
            let known = self.complaints.remove(&object).unwrap_or_default();
            for message in messages.difference(&known) {
                warn!(%object, "{message}");
            }
            if !messages.is_empty() {
                self.complaints.insert(object, messages);
            }
        }
        if !plan.health.is_empty() {
            self.tell_health();
        }
        if plan.ops.is_empty() && plan.retire.is_empty() {
            return Ok(());
        }
        self.datapath.services().apply(&plan.ops)?;
        self.lives_ended |= plan.ops.iter().any(invalidates_backend);
        self.metrics.synced(start.elapsed());
        if !plan.retire.is_empty() {
            self.retire.push_back((Instant::now() + RETIRE_AFTER, plan.retire));
        }
        Ok(())
    }

    /// Tells how many endpoints the ports for health checks are to name. A planner that failed leaves the numbers as they are.
    fn tell_health(&self) {
        let ports = self.planner.as_ref().map(Planner::health);
        self.outlets.health.send_if_modified(|health| {
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
        error!(%error, again_in = ?self.patience, "Services are not written");
        self.failure = Some(Error::new(errors::SERVICES_FAILED, format!("{error}.")));
        self.distrust();
        self.tell_health();
    }

    /// Forgets what it believes of the maps; when they are read again.
    pub(super) fn distrust(&mut self) -> Instant {
        self.planner = None;
        self.retire.clear();
        let retry = Instant::now() + self.patience;
        self.patience = (self.patience * 2).min(RETRY.1);
        self.retry = Some(retry);
        retry
    }

    /// All that is wrong, the worst first.
    pub(super) fn problems(&self) -> Vec<Error> {
        let complaints = self.complaints.iter().flat_map(|(object, messages)| {
            messages.iter().map(move |text| Error::new(errors::SERVICE_PROBLEM, format!("{object}: {text}.")))
        });
        let mut all: Vec<Error> = complaints.collect();
        self.metrics.problems(all.len());
        all.truncate(TOLD);
        self.failure.iter().cloned().chain(all).collect()
    }

    /// The owners of ports, by their numbers.
    pub(super) fn names(&self, numbers: &BTreeSet<u32>) -> HashMap<u32, String> {
        let all = self.planner.iter().flat_map(Planner::views).filter(|view| numbers.contains(&view.id.0));
        all.map(|view| (view.id.0, view::name(&view.owner).to_string())).collect()
    }

    /// What is served.
    pub(super) fn list(&self, namespace: &str, name: &str) -> v1::ListServicesResponse {
        let Some(planner) = &self.planner else { return v1::ListServicesResponse::default() };
        let kernel: MapContents = planner.map_contents();
        let wanted = |part: &str, filter: &str| filter.is_empty() || part == filter;
        let ports = planner.views().filter(|view| {
            let owner = view::name(&view.owner);
            wanted(&owner.namespace, namespace) && wanted(&owner.name, name)
        });
        v1::ListServicesResponse { ports: ports.map(|port| view::port(&port, &kernel)).collect(), synced: self.synced }
    }
}
