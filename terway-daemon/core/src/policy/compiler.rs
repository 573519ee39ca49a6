//! The compiler's state, and what it does with policies, namespaces and the switch. Pods are in `pods`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::change::{Change, Deferred, append};
use super::cidr_region::CidrRegions;
use super::failures::{Failures, LOCKDOWN};
use super::id_map::{NumberMap, NumberSet};
use super::ids::{Counter, Identity, IdentityKind, PodId, PolicyVersion, PortTableId, RuleId, SetId};
use super::maps::Maps;
use super::matched_rule::{MatchedRule, RuleIdChanges, RuleIds};
use super::namespace_labels::with_name;
use super::op::{FlowScope, Op};
use super::peer_match::{Namespaces, Pods};
use super::peers::Peers;
use super::pod_class::Classes;
use super::rule::Policy;
use super::set::{Set, SetKey};
use super::state::{Claim, Endpoint, PodState};
use crate::ident::{Addresses, PodRef};
use crate::objects::{
    Applied, ClusterNetworkPolicy, Direction, Kind, Labels, Namespace, NetworkPolicy, ObjectKey, ObjectName, Pod,
};

/// Something the compiler has to know. Objects come as their source tells them; `None` means gone.
#[derive(Clone, Debug)]
pub enum Event {
    /// A namespace, by name.
    Namespace(Arc<str>, Option<Arc<Namespace>>),
    /// A pod of the cluster.
    Pod(ObjectName, Option<Arc<Pod>>),
    /// A NetworkPolicy.
    NetworkPolicy(ObjectName, Option<Arc<NetworkPolicy>>),
    /// A ClusterNetworkPolicy.
    ClusterNetworkPolicy(ObjectName, Option<Arc<ClusterNetworkPolicy>>),
    /// A pod of this node gets an interface. Its operations are run before the interface carries packets.
    Attach {
        /// Where its policies stand: free, or the same pod's.
        slot: u32,
        /// Whose interface it is; without a namespace no policy applies to it.
        pod: PodRef,
        /// The interface's addresses.
        addresses: Addresses,
    },
    /// The interface carries packets no more.
    Detach {
        /// Its slot.
        slot: u32,
    },
    /// The local node's own addresses, all of them.
    NodeAddresses(Vec<IpAddr>),
    /// Whether policies are enforced (the opposite of `disable_network_policy`).
    Enforce(bool),
}

impl Event {
    /// Whether it is about a policy, and not about whom policies select.
    #[must_use]
    pub const fn is_policy_change(&self) -> bool {
        matches!(self, Self::NetworkPolicy(..) | Self::ClusterNetworkPolicy(..))
    }

    /// The event of a changed object, if it is of a kind that policies look at.
    #[must_use]
    pub fn from_applied(applied: Applied) -> Option<Self> {
        match applied {
            Applied::Namespace(delta) => Some(Self::Namespace(delta.name.name, delta.new)),
            Applied::Pod(delta) => Some(Self::Pod(delta.name, delta.new)),
            Applied::NetworkPolicy(delta) => Some(Self::NetworkPolicy(delta.name, delta.new)),
            Applied::ClusterNetworkPolicy(delta) => Some(Self::ClusterNetworkPolicy(delta.name, delta.new)),
            Applied::Node(_) | Applied::Service(_) | Applied::EndpointSlice(_) => None,
        }
    }
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Policies of both kinds.
    pub policies: usize,
    /// Pods of the cluster.
    pub pods: usize,
    /// Classes of pods.
    pub classes: usize,
    /// Identities in use.
    pub identities: usize,
    /// Blocks, the two whole families among them.
    pub cidrs: usize,
    /// Sets in use.
    pub sets: usize,
    /// Entries of all sets.
    pub entries: usize,
    /// Port tables of all sets.
    pub port_tables: usize,
    /// Local endpoints.
    pub endpoints: usize,
}

/// What compiling has taken so far, counted in what it is made of, so that a test can tell work from time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Questions to selectors: of subjects, of peers about pods, of peers about namespaces.
    pub selector_evaluations: u64,
    /// Questions to sets: what one says about one identity.
    pub set_evaluations: u64,
}

/// Compiles policies to the contents of maps, one change at a time.
#[derive(Debug)]
pub struct Compiler {
    pub(super) namespaces: HashMap<Arc<str>, Labels>,
    network: HashMap<Arc<str>, BTreeMap<Arc<str>, Arc<Policy>>>,
    cluster: BTreeMap<Arc<str>, Arc<Policy>>,
    versions: u64,

    pub(super) peers: Peers,
    pub(super) classes: Classes,
    pub(super) cells: CidrRegions,
    pub(super) reasons: RuleIds,
    pub(super) sets: BTreeMap<SetId, Set>,
    pub(super) set_keys: HashMap<SetKey, SetId>,
    pub(super) port_tables: NumberSet<PortTableId>,
    /// Sets that are to be asked about every pod.
    pub(super) wildcard_sets: BTreeSet<SetId>,
    pub(super) effort: Effort,
    pub(super) set_counter: Counter,
    pub(super) port_table_counter: Counter,

    pub(super) pods: NumberMap<PodId, PodState>,
    pub(super) names: HashMap<ObjectName, PodId>,
    pub(super) pod_counter: Counter,
    pub(super) claims: BTreeMap<IpAddr, Claim>,
    pub(super) node: BTreeSet<IpAddr>,
    pub(super) endpoints: BTreeMap<u32, Endpoint>,
    pub(super) slots: HashMap<ObjectName, BTreeSet<u32>>,
    pub(super) addresses: HashMap<IpAddr, u32>,

    pub(super) version: usize,
    pub(super) enforce: bool,
    pub(super) change: Change,
    /// Policies have changed since endpoints were selected: those of these namespaces, or of any.
    reselect: Option<Option<BTreeSet<Arc<str>>>>,
    pub(super) deferred: Deferred,
    pub(super) failures: Failures,
}

impl Compiler {
    /// A compiler that knows nothing, and the operations that fill empty maps with that.
    #[must_use]
    pub fn new() -> (Self, Vec<Op>) {
        Self::after(&Maps { enforce: true, ..Maps::default() })
    }

    /// A compiler that continues after maps which another has filled: it gives out none of their numbers.
    pub(super) fn after(maps: &Maps) -> (Self, Vec<Op>) {
        let number = |identity: &Identity| identity.0 & (Identity::NUMBERS - 1);
        let used = maps.addresses.values().chain(maps.cidrs.values()).flatten();
        let used = used.chain(maps.peers.keys().map(|(_, identity)| identity));
        let mut classes = Classes::new(used.map(number).max().unwrap_or(0));
        let cells = CidrRegions::new(|family, cell| {
            classes.identity(IdentityKind::World, None, cell, &super::cidr_region::whole(family)).0
        });
        let sets = maps.endpoints.values().flatten().flat_map(|e| [e.ingress, e.egress]).flatten().map(|side| side.set);
        let sets = sets.filter(|set| *set != LOCKDOWN);
        let sets = sets.chain(maps.peers.keys().map(|(set, _)| *set));
        let reasons = maps.port_tables.values().flatten().map(|entry| entry.verdict.rule_id());
        let sides = maps.endpoints.values().flatten().flat_map(|e| [&e.ingress, &e.egress]).flatten();
        let inline = maps.peers.values().flatten().chain(sides.flat_map(|side| &side.defaults));
        let inline = inline.filter_map(|target| target.resolve().ok()).map(|d| d.rule_id());
        let mut compiler = Self {
            namespaces: HashMap::new(),
            network: HashMap::new(),
            cluster: BTreeMap::new(),
            versions: 0,
            peers: Peers::new(),
            wildcard_sets: BTreeSet::new(),
            effort: Effort::default(),
            classes,
            cells,
            reasons: RuleIds::new(reasons.chain(inline).map(|reason| reason.0).max().unwrap_or(0)),
            set_counter: Counter::new(sets.map(|set| set.0).max().unwrap_or(0), u32::MAX),
            port_table_counter: Counter::new(maps.port_tables.keys().map(|table| table.0).max().unwrap_or(0), 1 << 31),
            sets: BTreeMap::new(),
            set_keys: HashMap::new(),
            port_tables: NumberSet::default(),
            pods: NumberMap::default(),
            names: HashMap::new(),
            pod_counter: Counter::new(0, u32::MAX),
            claims: BTreeMap::new(),
            node: BTreeSet::new(),
            endpoints: BTreeMap::new(),
            slots: HashMap::new(),
            addresses: HashMap::new(),
            version: maps.version,
            enforce: maps.enforce,
            change: Change::default(),
            reselect: None,
            deferred: Deferred::default(),
            failures: Failures::default(),
        };
        let blocks: Vec<_> = compiler.blocks().collect();
        let writes = blocks.into_iter().map(|(net, identity)| Op::PutCidr { net, identities: [identity; 2] });
        compiler.change.fresh.extend(writes);
        let mut ops = std::mem::take(&mut compiler.change).fresh;
        ops.push(Op::SetControlWord { version: compiler.version, enforce: compiler.enforce });
        (compiler, ops)
    }

    /// Takes an event in. The operations are to be run in order; when they have run, the event is in force for every packet.
    pub fn step(&mut self, event: Event) -> Vec<Op> {
        self.steps([event])
    }

    /// The same of many, one after the other; but policies that follow each other come into force together. So a thousand of them that come at
    /// once cost an endpoint one selection, and one set of tables.
    pub fn steps(&mut self, events: impl IntoIterator<Item = Event>) -> Vec<Op> {
        let mut all = Vec::new();
        for event in events {
            if event.is_policy_change() {
                self.take(event);
                continue;
            }
            append(&mut all, self.commit_policies());
            self.take(event);
            append(&mut all, self.commit());
        }
        append(&mut all, self.commit_policies());
        all
    }

    /// Selects again where policies have changed.
    fn commit_policies(&mut self) -> Vec<Op> {
        let Some(namespaces) = self.reselect.take() else { return Vec::new() };
        let concerned = |e: &Endpoint| namespaces.as_ref().is_none_or(|names| names.contains(&e.pod.namespace));
        self.select_again(concerned);
        self.commit()
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Namespace(name, namespace) => self.namespace(name, namespace.as_deref()),
            Event::Pod(name, pod) => self.pod(name, pod.as_deref()),
            Event::NetworkPolicy(name, policy) => {
                let version = self.next_policy_version();
                let new = policy.map(|policy| Arc::new(Policy::network(version, &policy, &mut self.peers)));
                let all = self.network.entry(Arc::clone(&name.namespace)).or_default();
                let old = all.get(&name.name).cloned();
                self.prepare(new.as_deref());
                let all = self.network.entry(Arc::clone(&name.namespace)).or_default();
                match &new {
                    Some(policy) => all.insert(Arc::clone(&name.name), Arc::clone(policy)),
                    None => all.remove(&name.name),
                };
                if all.is_empty() {
                    self.network.remove(&name.namespace);
                }
                if let Some(namespaces) = self.reselect.get_or_insert_with(|| Some(BTreeSet::new())) {
                    namespaces.insert(Arc::clone(&name.namespace));
                }
                self.retire(old.as_deref());
            }
            Event::ClusterNetworkPolicy(name, policy) => {
                let version = self.next_policy_version();
                let new = policy.map(|policy| Arc::new(Policy::cluster(version, &policy, &mut self.peers)));
                self.prepare(new.as_deref());
                let old = match &new {
                    Some(policy) => self.cluster.insert(name.name, Arc::clone(policy)),
                    None => self.cluster.remove(&name.name),
                };
                self.reselect = Some(None);
                self.retire(old.as_deref());
            }
            Event::Attach { slot, pod, addresses } => self.attach(slot, pod, addresses),
            Event::Detach { slot } => self.detach(slot),
            Event::NodeAddresses(addresses) => self.node_addresses(addresses),
            Event::Enforce(enforce) => {
                if enforce != self.enforce {
                    self.change.enforce = Some(enforce);
                    self.change.stale.insert(FlowScope::All);
                }
            }
        }
    }

    fn next_policy_version(&mut self) -> PolicyVersion {
        self.versions += 1;
        PolicyVersion(self.versions)
    }

    /// Makes identities fine enough for a policy before anything is compiled with it.
    fn prepare(&mut self, new: Option<&Policy>) {
        let Some(policy) = new else { return };
        self.look_at(policy);
        let nets: Vec<_> = policy.nets(&self.peers).collect();
        for net in nets {
            if self.cells.enlist(net) {
                self.insert_block(net);
            }
            self.deferred.blocks.remove(&net);
        }
        self.refresh_identities();
    }

    /// Lets go of the blocks and selectors of a policy that is gone.
    fn retire(&mut self, old: Option<&Policy>) {
        let Some(policy) = old else { return };
        for net in policy.nets(&self.peers) {
            if self.cells.release(net) {
                self.deferred.blocks.insert(net);
            }
        }
        for peer in policy.peers() {
            self.peers.release(peer);
        }
    }

    /// Finds again which policies select these endpoints.
    fn select_again(&mut self, concerned: impl Fn(&Endpoint) -> bool) {
        let slots: Vec<u32> = self.endpoints.iter().filter(|(_, e)| concerned(e)).map(|(slot, _)| *slot).collect();
        for slot in slots {
            self.select(slot);
        }
    }

    fn namespace(&mut self, name: Arc<str>, namespace: Option<&Namespace>) {
        let old = self.namespace_labels(&name);
        let new = with_name(&name, &namespace.map(|n| n.meta.labels.clone()).unwrap_or_default());
        match namespace {
            Some(_) => self.namespaces.insert(Arc::clone(&name), new.clone()),
            None => self.namespaces.remove(&name),
        };
        if old != new {
            self.ask_again(&name, &old);
            self.select_again(|e| e.pod.namespace == name);
        }
    }

    fn node_addresses(&mut self, addresses: Vec<IpAddr>) {
        let new: BTreeSet<IpAddr> = addresses.into_iter().collect();
        let changed: Vec<IpAddr> = self.node.symmetric_difference(&new).copied().collect();
        self.node = new;
        for address in changed {
            self.claims.entry(address).or_default();
            self.resolve(address, false);
        }
    }

    /// Policies that select a pod, in the order in which they are asked.
    pub(super) fn selecting(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<Arc<Policy>> {
        let of_namespace = self.namespace_labels(namespace);
        let selects = |subject: &Pods| {
            let there = match &subject.namespaces {
                Namespaces::Own(own) => own == namespace,
                Namespaces::Selected(selector) => selector.matches(&of_namespace),
            };
            there && subject.pods.matches(labels)
        };
        let own = self.network.get(namespace).into_iter().flat_map(BTreeMap::values);
        let mut all: Vec<_> = own.chain(self.cluster.values()).filter(|p| selects(&p.subject)).cloned().collect();
        all.sort_by(|a, b| a.rank.cmp(&b.rank));
        all
    }

    /// How many policies are asked whether they select a pod of a namespace.
    pub(super) fn asked_about(&self, namespace: &str) -> usize {
        self.network.get(namespace).map_or(0, BTreeMap::len) + self.cluster.len()
    }

    /// Whether a pod of a namespace, whatever its labels, might be restricted in a direction.
    pub(super) fn may_restrict(&self, namespace: &Arc<str>, direction: Direction) -> bool {
        let own = self.network.get(namespace).into_iter().flat_map(BTreeMap::values);
        own.chain(self.cluster.values()).any(|policy| policy.concerns(direction))
    }

    /// All policies in force.
    pub(super) fn policy_objects(&self) -> impl Iterator<Item = &Policy> {
        let all = self.network.values().flat_map(BTreeMap::values).chain(self.cluster.values());
        all.map(|policy| &**policy)
    }

    /// What the number of a verdict means. Numbers of what is no longer in force are known until [`Compiler::run_deferred`].
    #[must_use]
    pub fn rule(&self, id: RuleId) -> Option<&MatchedRule> {
        self.reasons.get(id)
    }

    /// What has changed about the numbers of reasons, those that are fixed apart. To be asked after each step, before its operations run, and
    /// after [`Compiler::run_deferred`].
    pub fn take_rule_id_changes(&mut self) -> RuleIdChanges {
        std::mem::take(&mut self.reasons.changes)
    }

    /// Whether there is such a policy.
    #[must_use]
    pub fn has_policy(&self, key: &ObjectKey) -> bool {
        match key.kind {
            Kind::ClusterNetworkPolicy => self.cluster.contains_key(&key.name.name),
            _ => self.network.get(&key.name.namespace).is_some_and(|all| all.contains_key(&key.name.name)),
        }
    }

    /// The policies in force, and the local endpoints that each selects.
    #[must_use]
    pub fn policies(&self) -> Vec<(ObjectKey, Vec<u32>)> {
        let mut users: HashMap<&ObjectKey, Vec<u32>> = HashMap::new();
        for (slot, endpoint) in &self.endpoints {
            for policy in &endpoint.policies {
                users.entry(policy).or_default().push(*slot);
            }
        }
        let all = self.network.values().flat_map(BTreeMap::values).chain(self.cluster.values());
        let mut list: Vec<_> =
            all.map(|policy| (policy.key.clone(), users.get(&policy.key).cloned().unwrap_or_default())).collect();
        list.sort();
        list
    }

    /// What it has taken so far.
    #[must_use]
    pub fn effort(&self) -> Effort {
        Effort { selector_evaluations: self.effort.selector_evaluations + self.peers.asked, ..self.effort }
    }

    /// How much there is.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (classes, identities) = self.classes.counts();
        Stats {
            policies: self.network.values().map(BTreeMap::len).sum::<usize>() + self.cluster.len(),
            pods: self.pods.len(),
            classes,
            identities,
            cidrs: self.blocks().count(),
            sets: self.sets.len(),
            entries: self.sets.values().map(|set| set.entries().len()).sum(),
            port_tables: self.port_tables.len(),
            endpoints: self.endpoints.len(),
        }
    }
}
