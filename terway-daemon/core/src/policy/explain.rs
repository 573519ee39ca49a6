//! Why a packet passes or not: `policy explain`.

use std::net::IpAddr;

use super::compiler::Compiler;
use super::number::{Decision, Identity, Nature, RowId};
use super::peers::Who;
use super::pods::{PodId, keys_of};
use super::reason::{DISABLED, LOOPBACK, NO_POLICY, RESIDENT_NODE, Reason, Reasons, UNKNOWN_POD, decided};
use super::row::RowEntry;
use super::set::{NewRows, Set};
use crate::ident::Family;
use crate::objects::{Direction, ObjectKey, ObjectName};

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Party {
    /// A pod by name: its addresses are asked about.
    Pod(ObjectName),
    /// An address, whoever has it.
    Address(IpAddr),
}

/// Why there is nothing to explain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unexplained {
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

/// What one direction says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// Whether it lets the packet pass.
    pub allowed: bool,
    /// Why.
    pub reason: Reason,
    /// The policies that select the pod whose side this is, in the order in which they are asked.
    pub policies: Vec<ObjectKey>,
    /// Whether it is read from this node's compiled state; else the pod is on another node, which decides by the same rules.
    pub live: bool,
}

/// What is decided about the first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The source's side, if the source is a pod.
    pub egress: Option<Judgement>,
    /// The destination's side, if the destination is a pod.
    pub ingress: Option<Judgement>,
}

impl Explanation {
    /// Whether the packet passes on both sides.
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.egress.iter().chain(&self.ingress).all(|side| side.allowed)
    }
}

impl Compiler {
    /// Explains the first packet of a connection, once for each address family that both ends have.
    ///
    /// # Errors
    /// When a named pod is not known or has no address.
    pub fn explain(&self, from: &Party, to: &Party, protocol: u8, port: u16) -> Result<Vec<Explanation>, Unexplained> {
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
        if found.is_empty() { Err(Unexplained::NoFamily) } else { Ok(found) }
    }

    fn party(&self, party: &Party) -> Result<Vec<IpAddr>, Unexplained> {
        match party {
            Party::Address(address) => Ok(vec![*address]),
            Party::Pod(name) => {
                let id = self.names.get(name).ok_or_else(|| Unexplained::NoPod(name.clone()))?;
                let slots = self.slots.get(name).into_iter().flatten().filter_map(|slot| self.endpoints.get(slot));
                let mut all: Vec<IpAddr> = slots.flat_map(|endpoint| endpoint.addresses.iter()).collect();
                all.extend(self.pods.get(id).into_iter().flat_map(|state| state.ips.iter().copied()));
                if all.is_empty() { Err(Unexplained::NoAddress(name.clone())) } else { Ok(all) }
            }
        }
    }

    fn subject(&self, address: IpAddr) -> Option<Subject> {
        if let Some(slot) = self.addresses.get(&address) {
            return Some(Subject::Endpoint(*slot));
        }
        self.claims.get(&address).filter(|c| c.identity.nature() == Nature::Pod)?.pods.last().copied().map(Subject::Pod)
    }

    fn judge(
        &self,
        who: Subject,
        same: bool,
        peer: IpAddr,
        direction: Direction,
        protocol: u8,
        port: u16,
    ) -> Judgement {
        let identity = self.seen(peer);
        let (policies, live, answer) = match who {
            Subject::Endpoint(slot) => {
                let endpoint = self.endpoints.get(&slot);
                let sets = endpoint.map(|e| e.sets[usize::from(direction == Direction::Egress)]).unwrap_or_default();
                let said =
                    sets.iter().filter_map(|set| self.sets.get(set)).map(|set| read(set, identity, protocol, port));
                let answer = decided(said).map(|decision| (decision, self.reasons.get(decision.reason()).cloned()));
                (endpoint.map(|e| e.policies.clone()).unwrap_or_default(), true, answer)
            }
            Subject::Pod(pod) => {
                let (policies, answer) = self.elsewhere(pod, identity, direction, protocol, port);
                (policies, false, answer)
            }
        };
        let fixed = |decision: Decision| (decision, self.reasons.get(decision.reason()).cloned());
        let (decision, reason) = if !self.enforce {
            fixed(Decision::allow(DISABLED))
        } else if same {
            fixed(Decision::allow(LOOPBACK))
        } else if live && direction == Direction::Ingress && identity.nature() == Nature::Node {
            fixed(Decision::allow(RESIDENT_NODE))
        } else {
            answer.unwrap_or_else(|| fixed(Decision::allow(NO_POLICY)))
        };
        let reason = reason.unwrap_or(if decision.allowed() { Reason::NoPolicy } else { Reason::UnknownPod });
        debug_assert!(decision.reason() != UNKNOWN_POD || reason == Reason::UnknownPod);
        Judgement { allowed: decision.allowed(), reason, policies, live }
    }

    /// What the node of another pod says, by compiling for that pod.
    fn elsewhere(
        &self,
        pod: PodId,
        peer: Identity,
        direction: Direction,
        protocol: u8,
        port: u16,
    ) -> (Vec<ObjectKey>, Option<(Decision, Option<Reason>)>) {
        let profile = self.pods.get(&pod).and_then(|state| self.classes.profile(state.profile));
        let Some(profile) = profile else { return (Vec::new(), None) };
        let policies = self.selecting(&profile.namespace, &profile.labels);
        let names = policies.iter().map(|policy| policy.key.clone()).collect();
        let mut reasons = Reasons::new(0);
        let keys = keys_of(direction, &policies, &profile.ports).into_iter().flatten();
        let said = keys.filter_map(|key| {
            let concerned = key.of(&policies);
            let mut set = Set::new(key, super::SetId(1), &concerned, &self.peers, &mut reasons);
            self.about(&mut set, peer).then(|| read(&set, peer, protocol, port))
        });
        let decision = decided(said.collect::<Vec<_>>().into_iter());
        (names, decision.map(|decision| (decision, reasons.get(decision.reason()).cloned())))
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
        let base = set.base(peer.nature(), self.cells.get(meaning.cell).net, &self.peers);
        let ports = class.map_or(&[][..], |class| &class.like.ports);
        let mut last = 0;
        let mut number = || {
            last += 1;
            RowId(last)
        };
        let rows = &mut NewRows { number: &mut number, made: &mut Vec::new() };
        let target = set.target(&base, &deviations, ports, rows);
        set.put(peer, target);
        true
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Endpoint(u32),
    Pod(PodId),
}

/// What the maps hold of a set, read as the datapath reads it.
fn read(set: &Set, peer: Identity, protocol: u8, port: u16) -> Decision {
    match set.says(peer).resolve() {
        Ok(decision) => decision,
        Err(row) => {
            let entries = set.tables().get(&row).into_iter().flatten();
            let longest = entries.filter(|e| e.covers(protocol, port)).max_by_key(|e| e.prefix_len());
            longest.map_or(Decision::deny(super::ReasonId(0)), |entry: &RowEntry| entry.decision)
        }
    }
}
