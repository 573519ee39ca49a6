//! Sets: what a list of policies says, in one direction, about every identity. Endpoints that the same policies select share one.
//!
//! A set is made once and keeps its rules; only its entries follow the identities that come and go and the labels of namespaces. Of each
//! identity it says one target, which is the whole answer: nothing is merged at the time of a packet.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use ipnet::IpNet;

use super::class::NamedPort;
use super::hash::{Mix, NumberMap};
use super::number::{Decision, Identity, Nature, PolicyVersion, RowId, SetId, Target};
use super::op::Side;
use super::reason::{NO_POLICY, Reason, Reasons, UNKNOWN_POD};
use super::row::{Matched, RowEntry, flatten};
use super::rule::{Match, Namespaces, Policy, Ports, Stage};
use crate::objects::{Action, Direction, Labels};

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

type Range = (u8, u16, u16);

#[derive(Debug)]
struct SetRule {
    stage: Stage,
    action: Action,
    decision: Decision,
    policy: Arc<Policy>,
    index: usize,
    /// None = all traffic.
    ports: Option<Vec<Range>>,
    /// Has names that are looked up in the peer.
    names: bool,
}

/// A rule that matches a peer: its place in the set, and the ports that names of it stand for in that peer.
type Hit = (usize, Vec<Range>);

/// What rules see of a peer.
pub(super) struct PeerView<'a> {
    pub(super) nature: Nature,
    pub(super) labels: &'a Labels,
    pub(super) ports: &'a [NamedPort],
    /// The block its cell belongs to.
    pub(super) net: IpNet,
}

#[derive(Debug)]
pub(super) struct Set {
    pub(super) key: SetKey,
    pub(super) id: SetId,
    pub(super) endpoints: usize,
    rules: Vec<SetRule>,
    otherwise: Decision,
    defaults: [Target; 4],
    entries: NumberMap<Identity, Target>,
    rows: HashMap<Vec<Hit>, Target, BuildHasherDefault<Mix>>,
    /// Room for the question that is being asked.
    scratch: Vec<Hit>,
    /// Which peers are blocks that hold the cell last asked about: questions come by the cell.
    block_answers: (Option<IpNet>, Vec<bool>),
    tables: BTreeMap<RowId, Vec<RowEntry>>,
    reasons: Vec<super::ReasonId>,
    /// Has peers selected by the labels of their namespaces.
    pub(super) by_namespace: bool,
    /// Has names that are looked up in the peer.
    pub(super) by_port_name: bool,
}

/// Port tables that have come to be, and how the next one is numbered.
pub(super) struct NewRows<'a> {
    pub(super) number: &'a mut dyn FnMut() -> RowId,
    pub(super) made: &'a mut Vec<(RowId, Vec<RowEntry>)>,
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
    pub(super) fn new(key: SetKey, id: SetId, policies: &[Arc<Policy>], reasons: &mut Reasons) -> Self {
        let direction = key.direction;
        let mut used = Vec::new();
        let isolating: Vec<_> = policies.iter().filter(|p| p.isolates(direction)).map(|p| p.key.clone()).collect();
        let isolated = !isolating.is_empty();
        let otherwise = if key.unknown {
            Decision::deny(UNKNOWN_POD)
        } else if isolated {
            let reason = reasons.enlist(Reason::Isolated { direction, policies: isolating });
            used.push(reason);
            Decision::deny(reason)
        } else {
            Decision::allow(NO_POLICY)
        };
        let mut rules = Vec::new();
        for policy in policies {
            // A pod that a NetworkPolicy isolates never gets to the baseline.
            if policy.rank.stage == Stage::Baseline && isolated {
                continue;
            }
            for (index, rule) in policy.rules(direction).iter().enumerate() {
                let reason = reasons.enlist(Reason::Rule {
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
                rules.push(SetRule {
                    stage: policy.rank.stage,
                    action: rule.action,
                    decision: if rule.action == Action::Accept {
                        Decision::allow(reason)
                    } else {
                        Decision::deny(reason)
                    },
                    policy: Arc::clone(policy),
                    index,
                    ports,
                    names,
                });
            }
        }
        let by_port_name = rules.iter().any(|rule| rule.names);
        let all = || rules.iter().filter_map(|rule| rule.peers(direction)).flatten();
        let by_namespace =
            all().any(|peer| matches!(peer, Match::Pods(p) if matches!(p.namespaces, Namespaces::Selected(_))));
        Self {
            key,
            id,
            endpoints: 0,
            rules,
            otherwise,
            defaults: [Target::decision(otherwise); 4],
            entries: NumberMap::default(),
            rows: HashMap::default(),
            scratch: Vec::new(),
            block_answers: (None, Vec::new()),
            tables: BTreeMap::new(),
            reasons: used,
            by_namespace,
            by_port_name,
        }
    }

    pub(super) fn side(&self) -> Side {
        Side { set: self.id, defaults: self.defaults }
    }

    pub(super) fn reasons(&self) -> &[super::ReasonId] {
        &self.reasons
    }

    pub(super) fn tables(&self) -> &BTreeMap<RowId, Vec<RowEntry>> {
        &self.tables
    }

    pub(super) fn entries(&self) -> &NumberMap<Identity, Target> {
        &self.entries
    }

    /// Says what holds for most: fixed before the first entry, because entries are what differs from it.
    pub(super) fn set_default(&mut self, index: usize, target: Target) {
        self.defaults[index] = target;
    }

    /// What it now says about an identity, and what it said before, where it says nothing that the default does not.
    pub(super) fn put(&mut self, identity: Identity, target: Target) -> (Target, Target) {
        let special = target != self.defaults[identity.default_index()];
        let old = if special { self.entries.insert(identity, target) } else { self.entries.remove(&identity) };
        (old.unwrap_or_default(), if special { target } else { Target::NONE })
    }

    /// What it says about identities without an entry, by [`Identity::default_index`].
    pub(super) const fn default(&self, index: usize) -> Target {
        self.defaults[index]
    }

    /// Forgets an identity; whether there was an entry.
    pub(super) fn forget(&mut self, identity: Identity) -> bool {
        self.entries.remove(&identity).is_some()
    }

    /// Which peers select by namespace, and whether they select one with these labels; in the order of [`Set::target`]'s question.
    pub(super) fn namespace_answers(&self, namespace: &str, labels: &Labels) -> Vec<bool> {
        let peers = self.rules.iter().flat_map(|rule| rule.peers(self.key.direction).into_iter().flatten());
        peers
            .map(|peer| match peer {
                Match::Pods(pods) => match &pods.namespaces {
                    Namespaces::Own(own) => **own == *namespace,
                    Namespaces::Selected(selector) => selector.matches(labels),
                },
                Match::Block(_) => false,
            })
            .collect()
    }

    /// Where the lookup of a peer leads. `in_namespace` are [`Set::namespace_answers`].
    pub(super) fn target(&mut self, peer: &PeerView<'_>, in_namespace: &[bool], rows: &mut NewRows<'_>) -> Target {
        if self.block_answers.0 != Some(peer.net) {
            self.ask_blocks(peer.net);
        }
        let mut hits = std::mem::take(&mut self.scratch);
        hits.clear();
        self.hits(peer, in_namespace, &mut hits);
        if let Some(target) = self.rows.get(&hits[..]) {
            self.scratch = hits;
            return *target;
        }
        let entries = self.flatten(&hits);
        let target = match &entries[..] {
            [only] => Target::decision(only.decision),
            _ => {
                let row = (rows.number)();
                rows.made.push((row, entries.clone()));
                self.tables.insert(row, entries);
                Target::row(row)
            }
        };
        self.rows.insert(hits, target);
        target
    }

    fn hits(&self, peer: &PeerView<'_>, in_namespace: &[bool], hits: &mut Vec<Hit>) {
        let mut asked = 0;
        for (n, rule) in self.rules.iter().enumerate() {
            let peers = rule.peers(self.key.direction);
            let first = asked;
            asked += peers.map_or(0, <[Match]>::len);
            let matches = peers.is_none_or(|peers| {
                peers.iter().zip(first..).any(|(one, at)| match one {
                    Match::Pods(pods) => {
                        peer.nature == Nature::Pod
                            && in_namespace.get(at).copied().unwrap_or(false)
                            && pods.pods.matches(peer.labels)
                    }
                    Match::Block(_) => self.block_answers.1.get(at).copied().unwrap_or(false),
                })
            });
            if !matches {
                continue;
            }
            let mut named = Vec::new();
            if rule.names && peer.nature == Nature::Pod {
                let specs = rule.policy.rules(self.key.direction).get(rule.index).and_then(|r| r.ports.as_ref());
                let names = specs.into_iter().flatten().filter(|spec| matches!(spec, Ports::Named(..)));
                named.extend(names.flat_map(|spec| resolve(spec, peer.ports)));
            }
            // Names that stand for nothing in this peer leave the rule without ports: it matches no packet.
            if named.is_empty() && rule.ports.as_ref().is_some_and(Vec::is_empty) {
                continue;
            }
            hits.push((n, named));
        }
    }

    fn ask_blocks(&mut self, net: IpNet) {
        let mut answers = std::mem::take(&mut self.block_answers.1);
        answers.clear();
        let peers = self.rules.iter().flat_map(|rule| rule.peers(self.key.direction).into_iter().flatten());
        answers.extend(peers.map(|peer| match peer {
            Match::Block(block) => Match::holds(block, net),
            Match::Pods(_) => false,
        }));
        self.block_answers = (Some(net), answers);
    }

    fn flatten(&self, hits: &[Hit]) -> Vec<RowEntry> {
        let ports: Vec<Option<Vec<Range>>> = hits
            .iter()
            .map(|(n, named)| {
                let fixed = self.rules.get(*n)?.ports.as_ref()?;
                Some(fixed.iter().chain(named).copied().collect())
            })
            .collect();
        let matched: Vec<Matched<'_>> = hits
            .iter()
            .zip(&ports)
            .filter_map(|((n, _), ports)| {
                let rule = self.rules.get(*n)?;
                Some(Matched {
                    stage: rule.stage,
                    action: rule.action,
                    ports: ports.as_deref(),
                    decision: rule.decision,
                })
            })
            .collect();
        flatten(&matched, self.otherwise)
    }
}

impl SetRule {
    fn peers(&self, direction: Direction) -> Option<&[Match]> {
        self.policy.rules(direction).get(self.index)?.peers.as_deref()
    }
}
