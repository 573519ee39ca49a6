//! The incremental planner: changes of objects in, operations on the maps out.

mod entries;
mod execute;
mod object_errors;
mod write;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use indexmap::IndexMap;
use ipnetwork::IpNetwork;
use smallvec::SmallVec;

use self::entries::{BackendEntry, BackendValue, FrontendEntry, OwnerState, PortState, Reference, TableEntry};
pub use self::execute::Executed;
use self::object_errors::ObjectErrors;
use super::actual::Unapplied;
use super::desired::{self, BackendFacts, DesiredPort, DesiredSelection, DesiredState, Weights};
use super::ids::Ids;
use super::model::{
    BackendId, BackendKey, BackendRef, Frontend, FrontendKey, MapContents, Op, Owner, Plan, PortId, Selection, Table,
    TableId,
};
use super::settings::{LocalNode, NodeFacts, Settings};
use crate::objects::{Applied, Delta, EndpointSlice, Node, ObjectKey, ObjectName, Objects, Pod, Protocol, Service};

/// A port as the command line shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortView {
    /// Whose it is.
    pub owner: Owner,
    /// Its name; may be empty.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Its id.
    pub id: PortId,
    /// Its frontends.
    pub frontends: Vec<FrontendKey>,
}

/// What one update has touched.
#[derive(Default)]
struct Touched {
    backends: Vec<BackendKey>,
    tables: Vec<Arc<Table>>,
    frontends: Vec<FrontendKey>,
    ranges_added: Vec<(PortId, IpNetwork)>,
    ranges_gone: Vec<(PortId, IpNetwork)>,
    ports_gone: Vec<PortId>,
}

/// The planner of Services: it knows the desired contents of the maps and plans their changes.
///
/// A plan is run by [`Planner::execute`] and, a grace period later, [`Planner::execute_retired`]. Operations may fail one by one: the planner keeps apart
/// what it wants and what the maps hold (`service/actual.rs`), [`Planner::retry`] plans the rest again, and [`Planner::unapplied_objects`] says which
/// objects are concerned. Only where the maps themselves cannot be read is a new planner made ([`Planner::restore`]).
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    facts: NodeFacts,
    node: LocalNode,
    weights: Weights,
    owners: BTreeMap<Arc<Owner>, OwnerState>,
    /// By Service: the names of its slices, in their order; all are in its namespace.
    slices_of: HashMap<ObjectName, SmallVec<[Arc<str>; 1]>>,
    // An index map has no empty places for large entries.
    backends: IndexMap<BackendKey, BackendEntry>,
    tables: HashMap<Arc<Table>, TableEntry>,
    frontends: IndexMap<FrontendKey, FrontendEntry>,
    health: BTreeMap<u16, BTreeMap<ObjectName, u32>>,
    errors: ObjectErrors,
    backend_ids: Ids,
    table_ids: Ids,
    port_ids: Ids,
    /// Ids and ranges that were in the maps at the start, until the first sync has taken them over.
    found_ports: HashMap<FrontendKey, PortId>,
    taken_ports: BTreeSet<PortId>,
    /// What was in the maps twice: a daemon ended between two operations.
    leftovers: Vec<Op>,
    found_ranges: BTreeSet<(PortId, IpNetwork)>,
    generation: u32,
    unapplied: Unapplied,
}

impl Planner {
    /// A planner for maps that are empty.
    #[must_use]
    pub fn new(facts: NodeFacts, settings: Settings) -> Self {
        Self::restore(facts, settings, MapContents::default())
    }

    /// A planner for maps that hold something already. Ids and generations of what stays are kept, so that running flows are.
    #[must_use]
    pub fn restore(facts: NodeFacts, settings: Settings, kernel: MapContents) -> Self {
        let known = kernel.backends.values().map(|b| b.generation).max().unwrap_or(0);
        let generation = known.max(kernel.generation);
        let ports: BTreeSet<u32> = kernel.frontends.values().map(|f| f.port.0).collect();
        let backend_ids = Ids::new(kernel.backends.keys().map(|id| id.0));
        let table_ids = Ids::new(kernel.tables.keys().map(|id| id.0));
        let mut planner = Self {
            node: LocalNode::new(&facts, None),
            settings,
            facts,
            weights: Weights::new(),
            owners: BTreeMap::new(),
            slices_of: HashMap::new(),
            backends: IndexMap::new(),
            tables: HashMap::new(),
            frontends: IndexMap::new(),
            health: BTreeMap::new(),
            errors: ObjectErrors::default(),
            backend_ids,
            table_ids,
            port_ids: Ids::new(ports.into_iter().chain(kernel.ranges.iter().map(|(port, _)| port.0))),
            found_ports: kernel.frontends.iter().map(|(key, f)| (*key, f.port)).collect(),
            taken_ports: BTreeSet::new(),
            leftovers: Vec::new(),
            found_ranges: kernel.ranges,
            generation,
            unapplied: Unapplied::default(),
        };
        for (id, backend) in kernel.backends {
            let entry = BackendEntry { id, written: Some(BackendValue::of(&backend)), references: SmallVec::new() };
            if let Some(twin) = planner.backends.insert(backend.key, entry) {
                let written = twin.written.map(|written| Op::RemoveBackend(twin.id, written.at(backend.key)));
                planner.leftovers.extend(written);
            }
        }
        for (id, table) in kernel.tables {
            if let Some(twin) = planner.tables.insert(table, TableEntry { id, written: true, users: 0 }) {
                planner.leftovers.push(Op::RemoveTable(twin.id));
            }
        }
        for (key, frontend) in kernel.frontends {
            planner.frontends.insert(key, FrontendEntry { written: Some(frontend), references: SmallVec::new() });
        }
        planner
    }

    /// Plans from all objects: the first time, when the view of the cluster is complete, and whenever the daemon's own facts have changed.
    pub fn sync(&mut self, objects: &Objects) -> Plan {
        let node = objects.nodes().get(&ObjectName::new("", &self.facts.name));
        self.node = LocalNode::new(&self.facts, node.map(|n| &**n));
        self.weights =
            objects.pods().iter().filter_map(|(name, pod)| Some((name.clone(), desired::weight(pod)?))).collect();
        self.slices_of.clear();
        for slice in objects.slices().values() {
            self.index(slice, true);
        }
        let mut dirty: BTreeSet<Arc<Owner>> = self.owners.keys().cloned().collect();
        dirty.extend(objects.services().keys().map(|name| Arc::new(Owner::Service(name.clone()))));
        let host_ports = objects.pods().iter().filter(|(_, pod)| desired::has_host_ports(pod, &self.node));
        dirty.extend(host_ports.map(|(name, _)| Arc::new(Owner::Pod(name.clone()))));
        let mut touched = Touched {
            backends: self.backends.keys().copied().collect(),
            tables: self.tables.keys().cloned().collect(),
            frontends: self.frontends.keys().copied().collect(),
            ..Touched::default()
        };
        self.plan(objects, dirty, &mut touched)
    }

    /// Plans what follows from changes that `objects` have taken in already.
    pub fn update(&mut self, objects: &Objects, changes: &[Applied]) -> Plan {
        let mut dirty = BTreeSet::new();
        for change in changes {
            match change {
                Applied::Service(delta) => drop(dirty.insert(Owner::Service(delta.name.clone()))),
                Applied::EndpointSlice(delta) => self.slice_changed(delta, &mut dirty),
                Applied::Pod(delta) => self.pod_changed(objects, delta, &mut dirty),
                Applied::Node(delta) if delta.name.name == self.facts.name => {
                    if LocalNode::new(&self.facts, delta.new.as_deref()) != self.node {
                        return self.sync(objects);
                    }
                }
                Applied::Node(Delta::<Node> { .. })
                | Applied::Namespace(_)
                | Applied::NetworkPolicy(_)
                | Applied::ClusterNetworkPolicy(_) => {}
            }
        }
        if dirty.is_empty() {
            return Plan::default();
        }
        let known = |owner: Owner| match self.owners.get_key_value(&owner) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(owner),
        };
        let dirty = dirty.into_iter().map(known).collect();
        self.plan(objects, dirty, &mut Touched::default())
    }

    /// Takes new facts of the node or new settings; [`Self::sync`] then plans what follows from them.
    pub fn configure(&mut self, facts: NodeFacts, settings: Settings) {
        self.facts = facts;
        self.settings = settings;
    }

    /// The desired contents of the maps: what they hold once all plans so far have been run without failures.
    #[must_use]
    pub fn map_contents(&self) -> MapContents {
        MapContents {
            backends: self.backends.iter().filter_map(|(key, e)| Some((e.id, e.written?.at(*key)))).collect(),
            tables: self.tables.iter().filter(|(_, e)| e.written).map(|(t, e)| (e.id, Arc::clone(t))).collect(),
            ranges: self.ports().flat_map(|(_, p)| p.ranges.iter().map(|net| (p.id, *net))).collect(),
            frontends: self.frontends.iter().filter_map(|(key, e)| Some((*key, e.written?))).collect(),
            generation: self.generation,
        }
    }

    /// Operations for later have been applied: the ids in them may be used again.
    pub fn retired(&mut self, retire: &[Op]) {
        for op in retire {
            match op {
                Op::RemoveBackend(id, _) => self.backend_ids.give_back(id.0),
                Op::RemoveTable(id) => self.table_ids.give_back(id.0),
                Op::ReleasePort(id) => self.port_ids.give_back(id.0),
                _ => {}
            }
        }
    }

    /// All ports with what they serve, by owner.
    pub fn views(&self) -> impl Iterator<Item = PortView> {
        self.ports().map(|(owner, port)| PortView {
            owner: (**owner).clone(),
            name: Arc::clone(&port.name),
            protocol: port.protocol,
            id: port.id,
            frontends: port.frontends.clone(),
        })
    }

    /// What is wrong with objects as they are, by object.
    #[must_use]
    pub fn object_errors(&self) -> BTreeMap<ObjectKey, BTreeSet<String>> {
        self.errors.all()
    }

    /// The health-check ports that are to be answered, each with its Service and the number of its ready endpoints on this node.
    #[must_use]
    pub fn health(&self) -> BTreeMap<u16, (ObjectName, u32)> {
        let first = |(port, services): (&u16, &BTreeMap<ObjectName, u32>)| {
            services.first_key_value().map(|(name, count)| (*port, (name.clone(), *count)))
        };
        self.health.iter().filter_map(first).collect()
    }

    fn ports(&self) -> impl Iterator<Item = (&Arc<Owner>, &PortState)> {
        self.owners.iter().flat_map(|(owner, state)| state.ports.iter().map(move |port| (owner, port)))
    }

    fn index(&mut self, slice: &EndpointSlice, present: bool) -> Option<ObjectName> {
        let ObjectName { namespace, name } = &slice.meta.object;
        let service = ObjectName { namespace: Arc::clone(namespace), name: Arc::clone(slice.service()?) };
        if present {
            let slices = self.slices_of.entry(service.clone()).or_default();
            if let Err(at) = slices.binary_search(name) {
                slices.insert(at, Arc::clone(name));
            }
        } else if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.retain(|other| other != name);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        Some(service)
    }

    fn slice_changed(&mut self, delta: &Delta<EndpointSlice>, dirty: &mut BTreeSet<Owner>) {
        for (slice, present) in [(&delta.old, false), (&delta.new, true)] {
            let service = slice.as_deref().and_then(|slice| self.index(slice, present));
            dirty.extend(service.map(Owner::Service));
        }
    }

    fn pod_changed(&mut self, objects: &Objects, delta: &Delta<Pod>, dirty: &mut BTreeSet<Owner>) {
        let sides = [delta.old.as_deref(), delta.new.as_deref()];
        if sides.into_iter().flatten().any(|pod| desired::has_host_ports(pod, &self.node)) {
            dirty.insert(Owner::Pod(delta.name.clone()));
        }
        let weight = delta.new.as_deref().and_then(desired::weight);
        let before = match weight {
            Some(weight) => self.weights.insert(delta.name.clone(), weight),
            None => self.weights.remove(&delta.name),
        };
        if before == weight {
            return;
        }
        // Weights change by hand, so a walk over the namespace's slices is cheap enough.
        let namespace = &delta.name.namespace;
        let from = ObjectName { namespace: Arc::clone(namespace), name: Arc::from("") };
        for (_, slice) in objects.slices().range(from..).take_while(|(name, _)| name.namespace == *namespace) {
            let targets = slice.endpoints.iter().filter_map(|e| e.target.as_ref());
            if targets.into_iter().any(|t| *t.name == *delta.name.name) {
                let service =
                    slice.service().map(|name| ObjectName { namespace: Arc::clone(namespace), name: Arc::clone(name) });
                dirty.extend(service.map(Owner::Service));
            }
        }
    }

    fn desired(&self, objects: &Objects, owner: &Owner) -> Option<DesiredState> {
        match owner {
            Owner::Pod(name) => objects.pods().get(name).map(|pod| desired::pod(pod, &self.node)),
            Owner::Service(name) => {
                let service: &Service = objects.services().get(name)?;
                let names = self.slices_of.get(name).into_iter().flatten();
                let named =
                    |slice: &Arc<str>| ObjectName { namespace: Arc::clone(&name.namespace), name: Arc::clone(slice) };
                let slices: Vec<Arc<EndpointSlice>> = names
                    .filter_map(|slice| objects.slices().get(&named(slice)))
                    .filter(|slice| !super::endpoints::ignored(&slice.meta))
                    .cloned()
                    .collect();
                Some(desired::service(service, &slices, &self.weights, &self.node, &self.settings))
            }
        }
    }

    fn plan(&mut self, objects: &Objects, dirty: BTreeSet<Arc<Owner>>, touched: &mut Touched) -> Plan {
        let mut plan = Plan::default();
        let want = |owner: Arc<Owner>| {
            let desired = self.desired(objects, &owner).unwrap_or_default();
            (owner, desired)
        };
        let wants: Vec<(Arc<Owner>, DesiredState)> = dirty.into_iter().map(want).collect();
        for (owner, desired) in &wants {
            self.claim_backends(owner, &desired.backends, touched);
        }
        touched.backends.sort_unstable();
        touched.backends.dedup();
        // Tables name a backend's generation, so all backends are settled before the first table.
        let mut worse = Vec::new();
        for key in &touched.backends {
            self.write_backend(*key, &mut plan, &mut worse);
        }
        for (owner, desired) in wants {
            self.errors.of_owner(&owner, &desired.problems);
            self.take_over(&owner, desired, touched, &mut plan);
        }
        if !self.found_ranges.is_empty() || !self.found_ports.is_empty() {
            self.finish_restore(touched);
        }
        self.write(touched, &mut plan, worse);
        plan.object_errors = self.errors.news();
        plan.retire.append(&mut self.leftovers);
        plan
    }

    fn claim_backends(
        &mut self,
        owner: &Arc<Owner>,
        desired: &BTreeMap<BackendKey, BackendFacts>,
        touched: &mut Touched,
    ) {
        for (key, facts) in desired {
            let id = &mut self.backend_ids;
            let entry = self.backends.entry(*key).or_insert_with(|| BackendEntry {
                id: BackendId(id.take()),
                written: None,
                references: SmallVec::new(),
            });
            match entry.references.iter_mut().find(|(who, _)| who == owner) {
                Some((_, known)) if known == facts => {}
                Some((_, known)) => {
                    *known = *facts;
                    touched.backends.push(*key);
                }
                None => {
                    entry.references.push((Arc::clone(owner), *facts));
                    touched.backends.push(*key);
                }
            }
        }
        let old = self.owners.get(owner).into_iter().flat_map(|state| &state.backends);
        for key in old.filter(|key| !desired.contains_key(key)) {
            if let Some(entry) = self.backends.get_mut(key) {
                entry.references.retain(|(who, _)| who != owner);
                touched.backends.push(*key);
            }
        }
    }

    /// Replaces what an owner holds by what it wants. What both have in common is claimed before the old is let go, so it survives.
    fn take_over(&mut self, owner: &Arc<Owner>, desired: DesiredState, touched: &mut Touched, plan: &mut Plan) {
        let old = self.owners.remove(owner).unwrap_or_default();
        let health = desired.health;
        self.note_health(owner, old.health, health, plan);
        let backends: Vec<BackendKey> = desired.backends.into_keys().collect();
        let mut before = old.ports;
        let mut ports = Vec::with_capacity(desired.ports.len());
        for (place, port) in (0..).zip(desired.ports) {
            let same = |held: &PortState| held.name == port.name && held.protocol == port.protocol;
            let held = before.iter().position(same).map(|at| before.swap_remove(at));
            ports.push(self.take_over_port(owner, place, port, held, touched));
        }
        for held in before {
            self.release_port(owner, &held, &[], touched);
            touched.ranges_gone.extend(held.ranges.iter().map(|net| (held.id, *net)));
            touched.ports_gone.push(held.id);
        }
        if !ports.is_empty() || !backends.is_empty() || health.is_some() {
            self.owners.insert(Arc::clone(owner), OwnerState { ports, backends, health: health.map(|(port, _)| port) });
        }
    }

    fn take_over_port(
        &mut self,
        owner: &Arc<Owner>,
        place: u32,
        desired: DesiredPort,
        held: Option<PortState>,
        touched: &mut Touched,
    ) -> PortState {
        let id = match &held {
            Some(held) => held.id,
            None => self.port_id(&desired),
        };
        let mut tables = Vec::with_capacity(desired.tables.len());
        for table in &desired.tables {
            let slots = table.slots.iter().filter_map(|key| {
                let entry = self.backends.get(key)?;
                Some(BackendRef { backend: entry.id, generation: entry.written?.generation })
            });
            let mut slots: Vec<BackendRef> = slots.collect();
            slots.shrink_to_fit();
            let content = Table { algorithm: table.algorithm, slots };
            tables.push(self.use_table(content, touched));
        }
        let resolve = |selection: DesiredSelection| match selection {
            DesiredSelection::Table(at) => tables
                .get(at)
                .and_then(|table| self.tables.get(table))
                .map_or(Selection::Reject, |entry| Selection::Table(entry.id)),
            DesiredSelection::Reject => Selection::Reject,
            DesiredSelection::Drop => Selection::Drop,
            DesiredSelection::Pass => Selection::Pass,
        };
        let frontends: Vec<(FrontendKey, Frontend)> = desired
            .frontends
            .iter()
            .map(|f| {
                let frontend = Frontend {
                    port: id,
                    kind: f.kind,
                    internal: resolve(f.internal),
                    external: resolve(f.external),
                    masquerade: f.masquerade,
                    check_source: f.check_source,
                    affinity_seconds: desired.affinity_seconds,
                };
                (f.key, frontend)
            })
            .collect();
        let keys: Vec<FrontendKey> = frontends.iter().map(|(key, _)| *key).collect();
        if let Some(held) = &held {
            self.release_port(owner, held, &keys, touched);
        }
        for (key, frontend) in frontends {
            self.claim(key, Reference { owner: Arc::clone(owner), place, frontend }, touched);
        }
        let ranges: BTreeSet<IpNetwork> = desired.ranges.into_iter().collect();
        let before = held.map(|held| held.ranges).unwrap_or_default();
        touched.ranges_added.extend(ranges.difference(&before).map(|net| (id, *net)));
        touched.ranges_gone.extend(before.difference(&ranges).map(|net| (id, *net)));
        PortState { name: desired.name, protocol: desired.protocol, id, ranges, tables, frontends: keys }
    }

    /// The id that the port's frontends had before the daemon started, or a new one.
    fn port_id(&mut self, desired: &DesiredPort) -> PortId {
        let found = desired.frontends.iter().filter(|f| f.key.protocol.is_some());
        let mut known = found.filter_map(|f| self.found_ports.get(&f.key).copied());
        if let Some(id) = known.find(|id| !self.taken_ports.contains(id)) {
            self.taken_ports.insert(id);
            return id;
        }
        PortId(self.port_ids.take())
    }

    fn use_table(&mut self, content: Table, touched: &mut Touched) -> Arc<Table> {
        if let Some((shared, _)) = self.tables.get_key_value(&content) {
            let shared = Arc::clone(shared);
            if let Some(entry) = self.tables.get_mut(&shared) {
                entry.users += 1;
            }
            return shared;
        }
        let shared = Arc::new(content);
        let entry = TableEntry { id: TableId(self.table_ids.take()), written: false, users: 1 };
        self.tables.insert(Arc::clone(&shared), entry);
        touched.tables.push(Arc::clone(&shared));
        shared
    }

    /// Lets go of a port's tables, and of its references on all frontends but `kept`.
    fn release_port(&mut self, owner: &Owner, held: &PortState, kept: &[FrontendKey], touched: &mut Touched) {
        for table in &held.tables {
            if let Some(entry) = self.tables.get_mut(table) {
                entry.users -= 1;
                if entry.users == 0 {
                    touched.tables.push(Arc::clone(table));
                }
            }
        }
        for key in &held.frontends {
            let Some(entry) = self.frontends.get_mut(key) else { continue };
            entry.references.retain(|claim| *claim.owner != *owner || claim.frontend.port != held.id);
            if !kept.contains(key) {
                touched.frontends.push(*key);
            }
        }
    }

    fn claim(&mut self, key: FrontendKey, claim: Reference, touched: &mut Touched) {
        let entry = self.frontends.entry(key).or_default();
        let at = entry.references.partition_point(|other| other.rank() < claim.rank());
        entry.references.insert(at, claim);
        // Of two references one loses, whichever was there first, and its owner is to be told.
        if entry.references.len() > 1 || entry.references.first().map(|first| &first.frontend) != entry.written.as_ref()
        {
            touched.frontends.push(key);
        }
    }

    fn note_health(&mut self, owner: &Owner, old: Option<u16>, new: Option<(u16, u32)>, plan: &mut Plan) {
        let Owner::Service(name) = owner else { return };
        if let Some(port) = old.filter(|port| new.is_none_or(|(new, _)| new != *port))
            && let Some(services) = self.health.get_mut(&port)
        {
            services.remove(name);
            let next = services.first_key_value().map(|(name, count)| (name.clone(), *count));
            if next.is_none() {
                self.health.remove(&port);
            }
            plan.health.insert(port, next);
        }
        if let Some((port, count)) = new {
            let services = self.health.entry(port).or_default();
            let before = services.insert(name.clone(), count);
            if before != Some(count) && services.keys().next() == Some(name) {
                plan.health.insert(port, Some((name.clone(), count)));
            }
        }
    }

    /// Ids and ranges that nobody took over belong to Services that are gone.
    fn finish_restore(&mut self, touched: &mut Touched) {
        let found = std::mem::take(&mut self.found_ranges);
        let ids = std::mem::take(&mut self.found_ports).into_values().chain(found.iter().map(|(id, _)| *id));
        let free: BTreeSet<PortId> = ids.filter(|id| !self.taken_ports.contains(id)).collect();
        touched.ports_gone.extend(free);
        self.taken_ports.clear();
        touched.ranges_added.retain(|range| !found.contains(range));
        let held: BTreeSet<(PortId, IpNetwork)> =
            self.ports().flat_map(|(_, p)| p.ranges.iter().map(|net| (p.id, *net))).collect();
        touched.ranges_gone.extend(found.difference(&held).copied());
    }
}
