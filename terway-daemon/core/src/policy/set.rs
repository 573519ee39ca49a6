//! Sets: what a list of policies says, in one direction, about every identity. Endpoints that the same policies select share one.
//!
//! A set is made once and keeps its rules; only its entries follow the identities that come and go and the labels of namespaces. Of each
//! identity it says one result, which is its whole answer: rules are not merged at the time of a packet. It asks no selector: it is told whose
//! answers are not those about nobody ([`super::peers`]).

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::id_map::Mix;
use super::ids::{Identity, IdentityKind, PeerId, PolicyVersion, PortTableId, SetId, Verdict, VerdictOrTable};
use super::matched_rule::{MatchedRule, RuleIds, UNDECIDED, UNKNOWN_POD};
use super::op::SetRef;
use super::peer_match::{Match, holds};
use super::peers::Peers;
use super::pod_class::NamedPort;
use super::port_table::{MatchedPorts, PortTableEntry, flatten};
use super::rule::{Policy, Ports, Stage};
use crate::objects::{Action, Direction};

/// What makes a set what it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SetKey {
    pub(super) direction: Direction,
    /// In the order of their ranks.
    pub(super) policies: Vec<PolicyVersion>,
    /// The endpoint's own ports, as far as its ingress rules name them.
    pub(super) ports: Vec<NamedPort>,
    /// The endpoint's labels are not known: nothing passes.
    pub(super) unknown: bool,
}

impl SetKey {
    /// Its policies, among those that select an endpoint. Both are in the order of their ranks.
    pub(super) fn of(&self, policies: &[Arc<Policy>]) -> Vec<Arc<Policy>> {
        let mut own = self.policies.iter().peekable();
        policies.iter().filter(|policy| own.next_if_eq(&&policy.version).is_some()).cloned().collect()
    }
}

type Range = (u8, u16, u16);

#[derive(Debug)]
struct SetRule {
    stage: Stage,
    action: Action,
    verdict: Verdict,
    policy: Arc<Policy>,
    index: usize,
    /// None = all traffic.
    ports: Option<Vec<Range>>,
    /// Has names that are looked up in the peer.
    names: bool,
    /// Means every address.
    always: bool,
    /// How many of its peers select nobody.
    inverted: u32,
}

/// A rule that matches a peer: its place in the set, and the ports that names of it stand for in that peer.
type Hit = (usize, Vec<Range>);

/// Rules that hit where no selector deviates, in their order, and whether they do whatever selectors say.
pub(super) type Base = Vec<(u32, bool)>;

/// A rule, one of whose selectors says about some identity what it does not say about nobody: that it selects it, or not.
pub(super) type Deviation = (u32, bool);

#[derive(Debug)]
pub(super) struct Set {
    pub(super) key: SetKey,
    pub(super) id: SetId,
    pub(super) endpoints: usize,
    rules: Vec<SetRule>,
    /// Selectors, and the rules that have them; by selector.
    selectors: Vec<(PeerId, u32)>,
    /// Blocks, and the rules that have them; by block.
    blocks: Vec<(PeerId, u32)>,
    otherwise: Verdict,
    defaults: [VerdictOrTable; 4],
    /// Sorted: sets are made in order, and have few changes afterwards.
    entries: Vec<(Identity, VerdictOrTable)>,
    results: HashMap<Vec<Hit>, VerdictOrTable, BuildHasherDefault<Mix>>,
    /// Room for the question that is being asked.
    scratch: Vec<Hit>,
    tables: BTreeMap<PortTableId, Vec<PortTableEntry>>,
    reasons: Vec<super::RuleId>,
    /// Has names that are looked up in the peer.
    pub(super) by_port_name: bool,
}

/// Port tables that have come to be, and how the next one is numbered.
pub(super) struct NewPortTables<'a> {
    pub(super) number: &'a mut dyn FnMut() -> PortTableId,
    pub(super) made: &'a mut Vec<(PortTableId, Vec<PortTableEntry>)>,
}

/// The number of a port in a pod, for one protocol or any.
fn resolve<'a>(spec: &'a Ports, ports: &'a [NamedPort]) -> impl Iterator<Item = Range> {
    let (fixed, named) = match spec {
        Ports::Range(protocol, first, last) => (Some((*protocol, *first, *last)), None),
        Ports::Named(protocol, name) => (None, Some((protocol, name))),
    };
    let found = named.into_iter().flat_map(move |(protocol, name)| {
        ports
            .iter()
            .filter(move |(own, of, _)| own == name && protocol.is_none_or(|p| p == *of))
            .map(|(_, of, port)| (of.number(), *port, *port))
    });
    fixed.into_iter().chain(found)
}

impl Set {
    /// A set of a key; `policies` are those of the key, in its order.
    pub(super) fn new(key: SetKey, id: SetId, policies: &[Arc<Policy>], peers: &Peers, reasons: &mut RuleIds) -> Self {
        let direction = key.direction;
        let (mut selectors, mut blocks) = (Vec::new(), Vec::new());
        let mut used = Vec::new();
        let isolating: Vec<_> = policies.iter().filter(|p| p.isolates(direction)).map(|p| p.key.clone()).collect();
        let isolated = !isolating.is_empty();
        let otherwise = if key.unknown {
            Verdict::deny(UNKNOWN_POD)
        } else if isolated {
            let reason = reasons.enlist(MatchedRule::Isolated { direction, policies: isolating });
            used.push(reason);
            Verdict::deny(reason)
        } else {
            UNDECIDED
        };
        let mut rules: Vec<SetRule> = Vec::new();
        for policy in policies {
            // A pod that a NetworkPolicy isolates never gets to the baseline.
            if policy.rank.stage == Stage::Baseline && isolated {
                continue;
            }
            for (index, rule) in policy.rules(direction).iter().enumerate() {
                let reason = reasons.enlist(MatchedRule::Rule {
                    policy: policy.key.clone(),
                    direction,
                    index: u32::try_from(index).unwrap_or(u32::MAX),
                    name: Arc::clone(&rule.name),
                    action: rule.action,
                });
                used.push(reason);
                let names = direction == Direction::Egress
                    && rule.ports.iter().flatten().any(|spec| matches!(spec, Ports::Named(..)));
                let own = if direction == Direction::Ingress { &key.ports[..] } else { &[] };
                let ports: Option<Vec<Range>> =
                    rule.ports.as_ref().map(|all| all.iter().flat_map(|spec| resolve(spec, own)).collect());
                if ports.as_ref().is_some_and(Vec::is_empty) && !names {
                    continue;
                }
                let place = u32::try_from(rules.len()).unwrap_or(u32::MAX);
                for peer in rule.peers.iter().flatten() {
                    match peers.get(*peer) {
                        Match::Pods(_) => selectors.push((*peer, place)),
                        Match::Block(_) => blocks.push((*peer, place)),
                    }
                }
                rules.push(SetRule {
                    stage: policy.rank.stage,
                    action: rule.action,
                    verdict: if rule.action == Action::Accept { Verdict::allow(reason) } else { Verdict::deny(reason) },
                    policy: Arc::clone(policy),
                    index,
                    ports,
                    names,
                    always: rule.peers.is_none(),
                    inverted: 0,
                });
            }
        }
        let by_port_name = rules.iter().any(|rule| rule.names);
        for list in [&mut selectors, &mut blocks] {
            list.sort_unstable();
            list.dedup();
        }
        for (_, place) in selectors.iter().filter(|(peer, _)| peers.inverted(*peer)) {
            if let Some(rule) = rules.get_mut(*place as usize) {
                rule.inverted += 1;
            }
        }
        Self {
            key,
            id,
            endpoints: 0,
            rules,
            selectors,
            blocks,
            otherwise,
            defaults: [VerdictOrTable::verdict(otherwise); 4],
            entries: Vec::new(),
            results: HashMap::default(),
            scratch: Vec::new(),
            tables: BTreeMap::new(),
            reasons: used,
            by_port_name,
        }
    }

    pub(super) fn side(&self) -> SetRef {
        SetRef { set: self.id, defaults: self.defaults }
    }

    pub(super) fn reasons(&self) -> &[super::RuleId] {
        &self.reasons
    }

    pub(super) fn tables(&self) -> &BTreeMap<PortTableId, Vec<PortTableEntry>> {
        &self.tables
    }

    /// What differs from the defaults, by identity.
    pub(super) fn entries(&self) -> &[(Identity, VerdictOrTable)] {
        &self.entries
    }

    /// What it says about an identity.
    pub(super) fn says(&self, identity: Identity) -> VerdictOrTable {
        match self.place(identity) {
            Ok(at) => self.entries.get(at).map_or(VerdictOrTable::NONE, |(_, result)| *result),
            Err(_) => self.defaults[identity.default_index()],
        }
    }

    /// Whether it has an entry for an identity.
    pub(super) fn has(&self, identity: Identity) -> bool {
        self.place(identity).is_ok()
    }

    /// Whether one of its blocks holds a cell, given its block.
    pub(super) fn held(&self, net: IpNetwork, peers: &Peers) -> bool {
        self.blocks.iter().any(|(peer, _)| matches!(peers.get(*peer), Match::Block(block) if holds(block, net)))
    }

    /// Its selectors with their rules, by selector.
    pub(super) fn selectors(&self) -> &[(PeerId, u32)] {
        &self.selectors
    }

    /// Its blocks with their rules, by block.
    pub(super) fn blocks(&self) -> &[(PeerId, u32)] {
        &self.blocks
    }

    /// All its peers, each once.
    pub(super) fn peers(&self) -> Vec<PeerId> {
        let mut all: Vec<PeerId> = self.selectors.iter().chain(&self.blocks).map(|(peer, _)| *peer).collect();
        all.dedup();
        all
    }

    /// Whether a name may stand for something in a pod about which no selector deviates.
    pub(super) fn names_for_all(&self) -> bool {
        let open = |rule: &SetRule, place: u32| {
            rule.always || rule.inverted > 0 || self.blocks.iter().any(|(_, of)| *of == place)
        };
        self.by_port_name && self.rules.iter().zip(0..).any(|(rule, place)| rule.names && open(rule, place))
    }

    /// Says what holds for most: fixed before the first entry, because entries are what differs from it.
    pub(super) fn set_default(&mut self, index: usize, result: VerdictOrTable) {
        self.defaults[index] = result;
    }

    /// What it says about identities without an entry, by [`Identity::default_index`].
    pub(super) const fn default(&self, index: usize) -> VerdictOrTable {
        self.defaults[index]
    }

    fn place(&self, identity: Identity) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&identity, |(of, _)| *of)
    }

    /// What it said about an identity and what it now says, both none where that is what the default says.
    pub(super) fn put(&mut self, identity: Identity, result: VerdictOrTable) -> (VerdictOrTable, VerdictOrTable) {
        let special = result != self.defaults[identity.default_index()];
        match (self.place(identity), special) {
            (Ok(at), true) => (std::mem::replace(&mut self.entries[at].1, result), result),
            (Ok(at), false) => (self.entries.remove(at).1, VerdictOrTable::NONE),
            (Err(at), true) => {
                self.entries.insert(at, (identity, result));
                (VerdictOrTable::NONE, result)
            }
            (Err(_), false) => (VerdictOrTable::NONE, VerdictOrTable::NONE),
        }
    }

    /// Says the first words about identities, in any order.
    pub(super) fn begin(&mut self, mut all: Vec<(Identity, VerdictOrTable)>) {
        all.retain(|(identity, result)| *result != self.defaults[identity.default_index()]);
        all.sort_by_key(|(identity, _)| *identity);
        all.shrink_to_fit();
        self.entries = all;
    }

    /// Its entries, when nobody uses it any more.
    pub(super) fn end(&mut self) -> Vec<(Identity, VerdictOrTable)> {
        std::mem::take(&mut self.entries)
    }

    /// Forgets an identity; whether there was an entry.
    pub(super) fn forget(&mut self, identity: Identity) -> bool {
        self.place(identity).is_ok_and(|at| {
            self.entries.remove(at);
            true
        })
    }

    /// What holds for addresses of a kind in a cell, given its block, as far as no selector deviates.
    pub(super) fn base(&self, kind: IdentityKind, net: IpNetwork, peers: &Peers) -> Base {
        let held = |(peer, _): &&(PeerId, u32)| matches!(peers.get(*peer), Match::Block(block) if holds(block, net));
        let mut firm: Vec<u32> = self.blocks.iter().filter(held).map(|(_, rule)| *rule).collect();
        firm.sort_unstable();
        let pod = kind == IdentityKind::Pod;
        let rules = self.rules.iter().zip(0..).filter_map(|(rule, place)| {
            let firm = rule.always || firm.binary_search(&place).is_ok();
            (firm || pod && rule.inverted > 0).then_some((place, firm))
        });
        rules.collect()
    }

    /// The deviations of its rules, given the selectors that deviate.
    pub(super) fn deviations(&self, deviating: &[PeerId], peers: &Peers) -> Vec<Deviation> {
        let mut found = Vec::new();
        for peer in deviating {
            let first = self.selectors.partition_point(|(own, _)| own < peer);
            let rules = self.selectors.iter().skip(first).take_while(|(own, _)| own == peer);
            let selected = !peers.inverted(*peer);
            found.extend(rules.map(|(_, rule)| (*rule, selected)));
        }
        found.sort_unstable();
        found
    }

    /// Where the lookup of a peer leads. `deviations` are sorted; `ports` are those that it names.
    pub(super) fn evaluate(
        &mut self,
        base: &Base,
        deviations: &[Deviation],
        ports: &[NamedPort],
        tables: &mut NewPortTables<'_>,
    ) -> VerdictOrTable {
        let mut hits = std::mem::take(&mut self.scratch);
        hits.clear();
        self.hits(base, deviations, ports, &mut hits);
        if let Some(result) = self.results.get(&hits[..]) {
            self.scratch = hits;
            return *result;
        }
        let entries = self.flatten(&hits);
        let result = match &entries[..] {
            [only] => VerdictOrTable::verdict(only.verdict),
            _ => {
                let table = (tables.number)();
                tables.made.push((table, entries.clone()));
                self.tables.insert(table, entries);
                VerdictOrTable::table(table)
            }
        };
        self.results.insert(hits, result);
        result
    }

    fn hits(&self, base: &Base, deviations: &[Deviation], ports: &[NamedPort], hits: &mut Vec<Hit>) {
        let mut base = base.iter().copied().peekable();
        for deviating in deviations.chunk_by(|a, b| a.0 == b.0) {
            let place = deviating[0].0;
            while let Some((before, _)) = base.next_if(|(rule, _)| *rule < place) {
                self.hit(before, ports, hits);
            }
            let firm = base.next_if(|(rule, _)| *rule == place).is_some_and(|(_, firm)| firm);
            let lost = deviating.iter().filter(|(_, selected)| !selected).count();
            let selected = deviating.len() > lost
                || self.rules.get(place as usize).is_some_and(|rule| rule.inverted as usize > lost);
            if firm || selected {
                self.hit(place, ports, hits);
            }
        }
        for (rest, _) in base {
            self.hit(rest, ports, hits);
        }
    }

    fn hit(&self, place: u32, ports: &[NamedPort], hits: &mut Vec<Hit>) {
        let Some(rule) = self.rules.get(place as usize) else { return };
        let mut named = Vec::new();
        if rule.names && !ports.is_empty() {
            let specs = rule.policy.rules(self.key.direction).get(rule.index).and_then(|r| r.ports.as_ref());
            let names = specs.into_iter().flatten().filter(|spec| matches!(spec, Ports::Named(..)));
            named.extend(names.flat_map(|spec| resolve(spec, ports)));
        }
        // Names that stand for nothing in this peer leave the rule without ports: it matches no packet.
        if !named.is_empty() || rule.ports.as_ref().is_none_or(|fixed| !fixed.is_empty()) {
            hits.push((place as usize, named));
        }
    }

    fn flatten(&self, hits: &[Hit]) -> Vec<PortTableEntry> {
        let ports: Vec<Option<Vec<Range>>> = hits
            .iter()
            .map(|(n, named)| {
                let fixed = self.rules.get(*n)?.ports.as_ref()?;
                Some(fixed.iter().chain(named).copied().collect())
            })
            .collect();
        let matched: Vec<MatchedPorts<'_>> = hits
            .iter()
            .zip(&ports)
            .filter_map(|((n, _), ports)| {
                let rule = self.rules.get(*n)?;
                Some(MatchedPorts {
                    stage: rule.stage,
                    action: rule.action,
                    ports: ports.as_deref(),
                    verdict: rule.verdict,
                })
            })
            .collect();
        flatten(&matched, self.otherwise)
    }
}
