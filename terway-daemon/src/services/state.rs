//! What is known of Services, and the steps that change it. Steps block: they write maps.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::errors::{self, Error};
use terway_core::objects::{Applied, Delta, EndpointSlice, Kind, ObjectKey, ObjectName, Objects};
use terway_core::service::{Kernel, NodeFacts, Op, Plan, Planner, Problem, Settings};
use terway_proto::v1;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use super::metrics::ServiceMetrics;
use super::{take_in, view};
use crate::bpf::{BpfError, Datapath, RETIRE_AFTER};
use crate::objects::{self, Batch};
use crate::policy::News;

/// The first and the longest time until maps that refused a write are tried again. Not shorter than [`RETIRE_AFTER`]: reading the maps
/// forgets what was still to be retired, and its places may be used at once.
const RETRY: (Duration, Duration) = (RETIRE_AFTER, Duration::from_secs(60));

/// Problems that are told one by one; a folder of rubbish shall not make the status unreadable.
const TOLD: usize = 20;

/// What the planner finds wrong, by object.
type Complaints = BTreeMap<ObjectKey, BTreeSet<String>>;

/// One thing to do.
#[derive(Debug)]
pub(super) enum Work {
    News(Vec<Batch>),
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
    objects: Objects,
    /// None before the first sync, and after a failure.
    planner: Option<Planner>,
    synced: bool,
    /// Operations for later, and when; the earliest first.
    retire: VecDeque<(Instant, Vec<Op>)>,
    retry: Option<Instant>,
    patience: Duration,
    addresses: Vec<IpAddr>,
    documents: Vec<objects::Problem>,
    complaints: Complaints,
    failure: Option<Error>,
    listener: UnboundedSender<News>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("synced", &self.synced).field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl State {
    pub(super) fn new(
        datapath: Arc<Datapath>,
        facts: NodeFacts,
        settings: Settings,
        metrics: ServiceMetrics,
        listener: UnboundedSender<News>,
    ) -> Self {
        Self {
            datapath,
            facts,
            settings,
            metrics,
            objects: Objects::default(),
            planner: None,
            synced: false,
            retire: VecDeque::new(),
            retry: None,
            patience: RETRY.0,
            addresses: Vec::new(),
            documents: Vec::new(),
            complaints: BTreeMap::new(),
            failure: None,
            listener,
        }
    }

    /// Does it, and tells when there is more to do.
    pub(super) fn step(&mut self, work: Work) -> Option<Instant> {
        let start = Instant::now();
        let outcome = match work {
            Work::News(batches) => self.news(batches, start),
            Work::Addresses(addresses) => {
                self.addresses = addresses;
                self.datapath.set_node_addresses(&self.addresses)
            }
            Work::Due => self.due(start),
        };
        if let Err(error) = outcome {
            self.failed(&error);
        }
        let (frontends, backends) = self.datapath.service_counts();
        self.metrics.entries(frontends, backends);
        self.retire.front().map(|(due, _)| *due).into_iter().chain(self.retry).min()
    }

    fn news(&mut self, mut batches: Vec<Batch>, start: Instant) -> Result<(), BpfError> {
        if let Some(documents) = batches.iter_mut().rev().find_map(|batch| batch.problems.take()) {
            self.documents = documents;
        }
        let (changes, complete) = take_in(&mut self.objects, batches);
        // Policies go first: they decide whom Services let in. Nobody listens any more when the daemon ends.
        let _ = self.listener.send(News { changes: changes.clone(), complete });
        let first = complete && !self.synced;
        self.synced |= complete;
        if first {
            return self.restore(start);
        }
        // Without a planner, before the first sync or until the retry, the objects are enough.
        let Some(planner) = &mut self.planner else { return Ok(()) };
        let known = self.complaints.clone();
        // A Service that changes may end what is wrong with another: two claim one address, and one of them goes.
        let plan = if !known.is_empty() && changes.iter().any(|change| matches!(change, Applied::Service(_))) {
            self.complaints.clear();
            planner.sync(&self.objects)
        } else {
            for key in changes.iter().flat_map(owners) {
                self.complaints.remove(&key);
            }
            planner.update(&self.objects, &changes)
        };
        self.carry_out(plan, &known, start)
    }

    fn due(&mut self, now: Instant) -> Result<(), BpfError> {
        while let Some((_, ops)) = self.retire.pop_front_if(|(due, _)| *due <= now) {
            self.datapath.apply_services(&ops)?;
            if let Some(planner) = &mut self.planner {
                planner.retired(&ops);
            }
        }
        if self.retry.is_some_and(|retry| retry <= now) {
            self.retry = None;
            self.datapath.set_node_addresses(&self.addresses)?;
            if self.synced {
                self.restore(now)?;
                info!("Services are written again");
            }
        }
        Ok(())
    }

    /// Plans everything from what the maps hold.
    fn restore(&mut self, start: Instant) -> Result<(), BpfError> {
        self.retire.clear();
        let kernel = self.datapath.services()?;
        let found = kernel.frontends.len();
        let mut planner = Planner::restore(self.facts.clone(), self.settings.clone(), kernel);
        let plan = planner.sync(&self.objects);
        let (now, later) = (plan.ops.len(), plan.retire.len());
        self.planner = Some(planner);
        let known = std::mem::take(&mut self.complaints);
        self.carry_out(plan, &known, start)?;
        self.failure = None;
        self.patience = RETRY.0;
        let services = self.objects.services().len();
        info!(services, frontends_found = found, writes = now, for_later = later, took = ?start.elapsed(), "Services are in force");
        Ok(())
    }

    /// Runs a plan; problems that are not `known` go to the log.
    fn carry_out(&mut self, plan: Plan, known: &Complaints, start: Instant) -> Result<(), BpfError> {
        for Problem { object, message } in plan.problems {
            if known.get(&object).is_none_or(|messages| !messages.contains(&message)) {
                warn!(%object, "{message}");
            }
            self.complaints.entry(object).or_default().insert(message);
        }
        if plan.ops.is_empty() && plan.retire.is_empty() {
            return Ok(());
        }
        self.datapath.apply_services(&plan.ops)?;
        self.metrics.synced(start.elapsed());
        if !plan.retire.is_empty() {
            self.retire.push_back((Instant::now() + RETIRE_AFTER, plan.retire));
        }
        Ok(())
    }

    fn failed(&mut self, error: &BpfError) {
        error!(%error, again_in = ?self.patience, "Services are not written");
        self.failure = Some(Error::new(errors::SERVICES_FAILED, format!("{error}.")));
        self.distrust();
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
        let documents = self.documents.iter().map(|p| Error::new(errors::OBJECT_INVALID, format!("{p}.")));
        let complaints = self.complaints.iter().flat_map(|(object, messages)| {
            messages.iter().map(move |text| Error::new(errors::SERVICE_PROBLEM, format!("{object}: {text}.")))
        });
        let mut all: Vec<Error> = documents.chain(complaints).collect();
        self.metrics.problems(all.len());
        all.truncate(TOLD);
        self.failure.iter().cloned().chain(all).collect()
    }

    /// What is served.
    pub(super) fn list(&self, namespace: &str, name: &str) -> v1::ListServicesResponse {
        let Some(planner) = &self.planner else { return v1::ListServicesResponse::default() };
        let kernel: Kernel = planner.kernel();
        let wanted = |part: &str, filter: &str| filter.is_empty() || part == filter;
        let ports = planner.views().filter(|view| {
            let owner = view::name(&view.owner);
            wanted(&owner.namespace, namespace) && wanted(&owner.name, name)
        });
        v1::ListServicesResponse { ports: ports.map(|port| view::port(&port, &kernel)).collect(), synced: self.synced }
    }
}

/// Whose problems are judged anew when this changes.
fn owners(change: &Applied) -> Vec<ObjectKey> {
    let key = |kind, name: &ObjectName| ObjectKey { kind, name: name.clone() };
    match change {
        Applied::Service(delta) => vec![key(Kind::Service, &delta.name)],
        Applied::Pod(delta) => vec![key(Kind::Pod, &delta.name)],
        Applied::EndpointSlice(Delta { old, new, .. }) => {
            let service = |slice: &Arc<EndpointSlice>| {
                let namespace = Arc::clone(&slice.meta.object.namespace);
                let name = ObjectName { namespace, name: Arc::from(slice.service()?) };
                Some(ObjectKey { kind: Kind::Service, name })
            };
            old.iter().chain(new).filter_map(service).collect()
        }
        Applied::Node(_) | Applied::Namespace(_) | Applied::NetworkPolicy(_) | Applied::ClusterNetworkPolicy(_) => {
            Vec::new()
        }
    }
}
