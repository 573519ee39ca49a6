//! Policy explanation: which rule lets a packet pass or drops it (`policy explain`).

use std::net::IpAddr;

use super::compiler::Compiler;
use super::ids::{Identity, IdentityKind, PodId, PortTableId, Verdict};
use super::matched_rule::{
    DISABLED, LOCAL_NODE, LOOPBACK, MatchedRule, NO_POLICY, NOT_PROGRAMMED, RuleIds, UNKNOWN_POD, decided,
};
use super::peers::Who;
use super::pods::keys_of;
use super::port_table::PortTableEntry;
use super::set::{NewPortTables, Set};
use crate::ident::Family;
use crate::objects::{Direction, ObjectKey, ObjectName};

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowEnd {
    /// A pod by name: its addresses are asked about.
    Pod(ObjectName),
    /// An address, whoever has it.
    Address(IpAddr),
}

/// Error: there is nothing to explain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// No object of that name has been seen.
    #[error("no pod {0} is known")]
    NoPod(ObjectName),
    /// A pod that has none, or has ended.
    #[error("the pod {0} has no address")]
    NoAddress(ObjectName),
    /// One end has only IPv4, the other only IPv6.
    #[error("the two ends have no address family in common")]
    NoFamily,
}

/// The verdict of one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectionVerdict {
    /// Whether the packet passes.
    pub allowed: bool,
    /// The rule that decided.
    pub rule: MatchedRule,
    /// The policies that select the pod whose side this is, in the order in which they are asked.
    pub policies: Vec<ObjectKey>,
    /// Whether it is read from this node's compiled state; else the pod is on another node, which decides by the same rules.
    pub is_local: bool,
}

/// The verdicts on the first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The source's side, if the source is a pod.
    pub egress: Option<DirectionVerdict>,
    /// The destination's side, if the destination is a pod.
    pub ingress: Option<DirectionVerdict>,
}

impl Explanation {
    /// Whether the packet passes on both sides.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.egress.iter().chain(&self.ingress).all(|side| side.allowed)
    }
}

impl Compiler {
    /// Explains the first packet of a connection, once for each address family that both ends have.
    ///
    /// # Errors
    /// When a named pod is not known or has no address.
    pub fn explain(
        &self,
        from: &FlowEnd,
        to: &FlowEnd,
        protocol: u8,
        port: u16,
    ) -> Result<Vec<Explanation>, ExplainError> {
        let (sources, destinations) = (self.party(from)?, self.party(to)?);
        let mut found = Vec::new();
        for family in [Family::V4, Family::V6] {
            let of = |all: &[IpAddr]| all.iter().copied().find(|address| Family::of(*address) == family);
            let (Some(source), Some(destination)) = (of(&sources), of(&destinations)) else { continue };
            let (sender, receiver) = (self.subject(source), self.subject(destination));
            let same = sender.is_some() && sender == receiver;
            let side = |who: Option<Subject>, peer: IpAddr, direction| {
                who.map(|who| self.judge(who, same, peer, direction, protocol, port))
            };
            found.push(Explanation {
                source,
                destination,
                egress: side(sender, destination, Direction::Egress),
                ingress: side(receiver, source, Direction::Ingress),
            });
        }
        if found.is_empty() { Err(ExplainError::NoFamily) } else { Ok(found) }
    }

    fn party(&self, party: &FlowEnd) -> Result<Vec<IpAddr>, ExplainError> {
        match party {
            FlowEnd::Address(address) => Ok(vec![*address]),
            FlowEnd::Pod(name) => {
                let id = self.names.get(name).ok_or_else(|| ExplainError::NoPod(name.clone()))?;
                let slots = self.slots.get(name).into_iter().flatten().filter_map(|slot| self.endpoints.get(slot));
                let mut all: Vec<IpAddr> = slots.flat_map(|endpoint| endpoint.addresses.iter()).collect();
                all.extend(self.pods.get(id).into_iter().flat_map(|state| state.ips.iter().copied()));
                if all.is_empty() { Err(ExplainError::NoAddress(name.clone())) } else { Ok(all) }
            }
        }
    }

    fn subject(&self, address: IpAddr) -> Option<Subject> {
        if let Some(slot) = self.addresses.get(&address) {
            return Some(Subject::Endpoint(*slot));
        }
        self.claims
            .get(&address)
            .filter(|c| c.identity.kind() == IdentityKind::Pod)?
            .pods
            .last()
            .copied()
            .map(Subject::Pod)
    }

    fn judge(
        &self,
        who: Subject,
        same: bool,
        peer: IpAddr,
        direction: Direction,
        protocol: u8,
        port: u16,
    ) -> DirectionVerdict {
        let identity = self.seen(peer);
        let (policies, is_local, answer) = match who {
            Subject::Endpoint(slot) => {
                let endpoint = self.endpoints.get(&slot);
                let sets = endpoint.map(|e| e.sets[usize::from(direction == Direction::Egress)]).unwrap_or_default();
                let said = sets.iter().filter_map(|id| Some((id, self.sets.get(id)?))).map(|(id, set)| {
                    if self.failures.is_locked(*id) {
                        Verdict::deny(NOT_PROGRAMMED)
                    } else {
                        read(set, identity, protocol, port)
                    }
                });
                let answer = decided(said).map(|verdict| (verdict, self.reasons.get(verdict.rule_id()).cloned()));
                (endpoint.map(|e| e.policies.clone()).unwrap_or_default(), true, answer)
            }
            Subject::Pod(pod) => {
                let (policies, answer) = self.elsewhere(pod, identity, direction, protocol, port);
                (policies, false, answer)
            }
        };
        let fixed = |verdict: Verdict| (verdict, self.reasons.get(verdict.rule_id()).cloned());
        let (verdict, rule) = if !self.enforce {
            fixed(Verdict::allow(DISABLED))
        } else if same {
            fixed(Verdict::allow(LOOPBACK))
        } else if is_local && direction == Direction::Ingress && identity.kind() == IdentityKind::LocalNode {
            fixed(Verdict::allow(LOCAL_NODE))
        } else {
            answer.unwrap_or_else(|| fixed(Verdict::allow(NO_POLICY)))
        };
        let rule = rule.unwrap_or(if verdict.is_allowed() { MatchedRule::NoPolicy } else { MatchedRule::UnknownPod });
        debug_assert!(verdict.rule_id() != UNKNOWN_POD || rule == MatchedRule::UnknownPod);
        DirectionVerdict { allowed: verdict.is_allowed(), rule, policies, is_local }
    }

    /// What the node of another pod says, by compiling for that pod.
    fn elsewhere(
        &self,
        pod: PodId,
        peer: Identity,
        direction: Direction,
        protocol: u8,
        port: u16,
    ) -> (Vec<ObjectKey>, Option<(Verdict, Option<MatchedRule>)>) {
        let profile = self.pods.get(&pod).and_then(|state| self.classes.profile(state.profile));
        let Some(profile) = profile else { return (Vec::new(), None) };
        let policies = self.selecting(&profile.namespace, &profile.labels);
        let names = policies.iter().map(|policy| policy.key.clone()).collect();
        let mut reasons = RuleIds::new(0);
        let keys = keys_of(direction, &policies, &profile.ports).into_iter().flatten();
        let said = keys.filter_map(|key| {
            let concerned = key.of(&policies);
            let mut set = Set::new(key, super::SetId(1), &concerned, &self.peers, &mut reasons);
            self.about(&mut set, peer).then(|| read(&set, peer, protocol, port))
        });
        let verdict = decided(said.collect::<Vec<_>>().into_iter());
        (names, verdict.map(|verdict| (verdict, reasons.get(verdict.rule_id()).cloned())))
    }

    /// Has a set say what it says about an identity; whether there is such an identity.
    fn about(&self, set: &mut Set, peer: Identity) -> bool {
        let Some(meaning) = self.classes.meaning(peer) else { return false };
        let class = meaning.class.and_then(|class| self.classes.get(class));
        let deviating = class.map_or_else(Vec::new, |class| {
            let (namespace, space) = (&class.like.namespace, self.namespace_labels(&class.like.namespace));
            let who = Who { namespace, space: &space, labels: &class.like.labels };
            set.peers().into_iter().filter(|id| self.peers.deviates(*id, who)).collect()
        });
        let deviations = set.deviations(&deviating, &self.peers);
        let base = set.base(peer.kind(), self.cells.get(meaning.cell).net, &self.peers);
        let ports = class.map_or(&[][..], |class| &class.like.ports);
        let mut last = 0;
        let mut number = || {
            last += 1;
            PortTableId(last)
        };
        let tables = &mut NewPortTables { number: &mut number, made: &mut Vec::new() };
        let result = set.evaluate(&base, &deviations, ports, tables);
        set.put(peer, result);
        true
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Endpoint(u32),
    Pod(PodId),
}

/// What the maps hold of a set, read as the datapath reads it.
fn read(set: &Set, peer: Identity, protocol: u8, port: u16) -> Verdict {
    match set.says(peer).resolve() {
        Ok(verdict) => verdict,
        Err(table) => {
            let entries = set.tables().get(&table).into_iter().flatten();
            let longest = entries.filter(|e| e.covers(protocol, port)).max_by_key(|e| e.prefix_len());
            longest.map_or(Verdict::deny(super::RuleId(0)), |entry: &PortTableEntry| entry.verdict)
        }
    }
}
