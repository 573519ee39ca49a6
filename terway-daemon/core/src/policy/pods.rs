//! Pods of the cluster with their addresses, and the endpoints of this node with their sets.

use std::net::IpAddr;
use std::sync::Arc;

use super::change::Item;
use super::compiler::Compiler;
use super::failures::LOCKED;
use super::ids::{PodId, SetId};
use super::op::{EndpointPolicy, FlowScope, Op, SetRef};
use super::pod_class::{NamedPort, Profile};
use super::rule::{Policy, Ports, Stage};
use super::set::SetKey;
use super::state::{Endpoint, PodState};
use crate::ident::{Addresses, Family, PodRef};
use crate::objects::{Direction, ObjectName, Phase, Pod};

impl Compiler {
    /// The object of the very pod that an endpoint belongs to: a namesake from before or after is another pod.
    pub(super) fn known_pod(&self, endpoint: &Endpoint) -> Option<PodId> {
        let id = *self.names.get(&endpoint.pod)?;
        let state = self.pods.get(&id)?;
        (state.is(&endpoint.uid) && !state.host_network).then_some(id)
    }

    /// The pod that has an address.
    #[must_use]
    pub fn pod_at(&self, address: IpAddr) -> Option<&ObjectName> {
        if let Some(endpoint) = self.addresses.get(&address).and_then(|slot| self.endpoints.get(slot)) {
            return Some(&endpoint.pod);
        }
        let id = self.claims.get(&address)?.pods.last()?;
        Some(&self.pods.get(id)?.name)
    }

    pub(super) fn pod(&mut self, name: ObjectName, pod: Option<&Pod>) {
        let known = self.names.get(&name).copied();
        let Some(pod) = pod else {
            if let Some(id) = known {
                self.names.remove(&name);
                self.claim(id, &[]);
                if let Some(state) = self.pods.remove(&id) {
                    self.classes.leave(state.profile, id);
                    self.classes.release(state.profile);
                }
                self.select_pod(&name);
            }
            return;
        };
        let profile = self.classes.enlist(Profile::of(pod));
        let finished = matches!(pod.phase, Phase::Succeeded | Phase::Failed);
        let (id, before) = match known {
            Some(id) => (id, self.pods.get(&id).map(|state| state.profile)),
            None => (PodId(self.pod_counter.next(|n| self.pods.contains_key(&PodId(n)))), None),
        };
        let claims = self.pods.remove(&id).map(|state| state.claims).unwrap_or_default();
        let state = PodState {
            name: name.clone(),
            uid: pod.meta.uid.clone(),
            profile,
            host_network: pod.host_network,
            finished,
            ips: pod.ips.clone(),
            claims,
        };
        self.pods.insert(id, state);
        self.names.insert(name.clone(), id);
        if before != Some(profile) {
            before.into_iter().for_each(|before| self.classes.leave(before, id));
            self.classes.join(profile, id);
        }
        self.claim_again(id);
        if let Some(before) = before {
            self.classes.release(before);
        }
        self.select_pod(&name);
    }

    /// Works out which addresses a pod has, and what they are.
    fn claim_again(&mut self, id: PodId) {
        let Some(state) = self.pods.get(&id) else { return };
        let mut addresses: Vec<IpAddr> = Vec::new();
        if !state.host_network && !state.finished {
            addresses.extend(&state.ips);
            let slots = self.slots.get(&state.name).into_iter().flatten();
            let endpoints = slots.filter_map(|slot| self.endpoints.get(slot));
            let own = endpoints.filter(|endpoint| self.known_pod(endpoint) == Some(id));
            addresses.extend(own.flat_map(|endpoint| endpoint.addresses.iter()));
            addresses.sort_unstable();
            addresses.dedup();
        }
        self.claim(id, &addresses);
    }

    fn claim(&mut self, id: PodId, addresses: &[IpAddr]) {
        let Some(state) = self.pods.get_mut(&id) else { return };
        let old = std::mem::replace(&mut state.claims, addresses.into());
        for address in old.iter().filter(|address| !addresses.contains(address)) {
            if let Some(claim) = self.claims.get_mut(address) {
                claim.pods.retain(|pod| *pod != id);
            }
            self.resolve(*address, false);
        }
        for address in addresses {
            let claim = self.claims.entry(*address).or_default();
            if !claim.pods.contains(&id) {
                claim.pods.push(id);
            }
            self.resolve(*address, false);
        }
    }

    pub(super) fn attach(&mut self, slot: u32, pod: PodRef, addresses: Addresses) {
        if self.endpoints.contains_key(&slot) {
            self.detach(slot);
        }
        let name = ObjectName::new(&pod.namespace, &pod.name);
        let endpoint = Endpoint {
            pod: name.clone(),
            uid: pod.uid,
            addresses,
            sets: [[SetId(0); 2]; 2],
            value: EndpointPolicy::default(),
            policies: Vec::new(),
        };
        self.endpoints.insert(slot, endpoint);
        self.slots.entry(name.clone()).or_default().insert(slot);
        self.addresses.extend(addresses.iter().map(|address| (address, slot)));
        self.deferred.settled(Item::Endpoint(slot));
        self.endpoint_addresses(&name, addresses);
        self.select(slot);
        // Nothing finds the endpoint yet, so both of its entries may be written.
        self.change.endpoints.remove(&slot);
        if let Some(endpoint) = self.endpoints.get(&slot) {
            let value = endpoint.value;
            self.change.fresh.extend([0, 1].map(|version| Op::PutEndpoint { slot, version, value: Box::new(value) }));
        }
    }

    pub(super) fn detach(&mut self, slot: u32) {
        let Some(endpoint) = self.endpoints.remove(&slot) else { return };
        if let Some(slots) = self.slots.get_mut(&endpoint.pod) {
            slots.remove(&slot);
            if slots.is_empty() {
                self.slots.remove(&endpoint.pod);
            }
        }
        for address in endpoint.addresses.iter() {
            if self.addresses.get(&address) == Some(&slot) {
                self.addresses.remove(&address);
            }
        }
        self.deferred.settled(Item::Endpoint(slot));
        self.change.endpoints.remove(&slot);
        for set in endpoint.sets.into_iter().flatten() {
            self.leave(set);
        }
        self.endpoint_addresses(&endpoint.pod, endpoint.addresses);
    }

    /// Addresses of an endpoint that came or went: they may change hands.
    fn endpoint_addresses(&mut self, pod: &ObjectName, addresses: Addresses) {
        if let Some(id) = self.names.get(pod) {
            self.claim_again(*id);
        }
        for address in addresses.iter() {
            if self.claims.contains_key(&address) {
                self.resolve(address, false);
            }
        }
    }

    /// Selects the policies of a pod's endpoints again, and what others see of it.
    fn select_pod(&mut self, name: &ObjectName) {
        let slots: Vec<u32> = self.slots.get(name).into_iter().flatten().copied().collect();
        for slot in slots {
            self.select(slot);
        }
    }

    /// Works out which sets hold for an endpoint, and what its map entry says.
    pub(super) fn select(&mut self, slot: u32) {
        let Some(endpoint) = self.endpoints.get(&slot) else { return };
        let old = endpoint.sets;
        let namespace = Arc::clone(&endpoint.pod.namespace);
        let profile = self.known_pod(endpoint).and_then(|pod| self.pods.get(&pod)).map(|state| state.profile);
        let profile = profile.and_then(|id| self.classes.profile(id)).cloned();
        let policies = profile.as_ref().map_or_else(Vec::new, |p| self.selecting(&namespace, &p.labels));
        self.effort.selector_evaluations += self.asked_about(&namespace) as u64;
        let mut sets = [[SetId(0); 2]; 2];
        for (n, direction) in [Direction::Ingress, Direction::Egress].into_iter().enumerate() {
            let keys = match &profile {
                Some(profile) => keys_of(direction, &policies, &profile.ports),
                None => [None, self.key_of_unknown(&namespace, direction)],
            };
            sets[n] = keys.map(|key| key.map_or(SetId(0), |key| self.join(key, &policies)));
        }
        for set in old.into_iter().flatten() {
            self.leave(set);
        }
        if let Some(endpoint) = self.endpoints.get_mut(&slot) {
            endpoint.sets = sets;
            endpoint.policies = policies.iter().map(|policy| policy.key.clone()).collect();
        }
        self.write_endpoint(slot);
    }

    /// Brings an endpoint's map entry up to date with its sets and identities.
    pub(super) fn write_endpoint(&mut self, slot: u32) {
        let Some(endpoint) = self.endpoints.get(&slot) else { return };
        let mut value = EndpointPolicy::default();
        let side = |set: SetId| match self.sets.get(&set) {
            Some(_) if self.failures.is_locked(set) => LOCKED,
            Some(set) => set.side(),
            None => SetRef::default(),
        };
        [value.ingress, value.egress] = endpoint.sets.map(|both| both.map(side));
        for address in endpoint.addresses.iter() {
            value.identities[Family::of(address) as usize] = self.seen(address);
        }
        if value == endpoint.value {
            return;
        }
        if let Some(endpoint) = self.endpoints.get_mut(&slot) {
            endpoint.value = value;
        }
        self.change.endpoints.insert(slot, value);
        self.change.stale.insert(FlowScope::Endpoint(slot));
    }

    /// A pod whose labels are not known is held back where a policy might select it.
    fn key_of_unknown(&self, namespace: &Arc<str>, direction: Direction) -> Option<SetKey> {
        let held = !namespace.is_empty() && self.may_restrict(namespace, direction);
        held.then(|| SetKey { direction, policies: Vec::new(), ports: Vec::new(), unknown: true })
    }

    fn join(&mut self, key: SetKey, policies: &[Arc<Policy>]) -> SetId {
        let id = match self.set_keys.get(&key) {
            Some(id) => *id,
            None => {
                let concerned = key.of(policies);
                self.make_set(key, &concerned)
            }
        };
        if let Some(set) = self.sets.get_mut(&id) {
            set.endpoints += 1;
        }
        id
    }

    fn leave(&mut self, id: SetId) {
        let Some(set) = self.sets.get_mut(&id) else { return };
        set.endpoints -= 1;
        if set.endpoints == 0 {
            self.drop_set(id);
        }
    }
}

/// The sets that hold for a pod with these ports, as far as policies say anything about the direction: that of the admin tier, and that of the
/// others. They are two so that a cluster's admin policy is one set for all pods that it selects, whatever else selects them.
pub(super) fn keys_of(direction: Direction, policies: &[Arc<Policy>], ports: &[NamedPort]) -> [Option<SetKey>; 2] {
    [true, false].map(|admin| {
        let of_tier = |policy: &&Arc<Policy>| (policy.rank.stage == Stage::Admin) == admin;
        let concerned: Vec<_> = policies.iter().filter(of_tier).filter(|policy| policy.concerns(direction)).collect();
        if concerned.is_empty() {
            return None;
        }
        let named = |name: &Arc<str>| {
            let rules = concerned.iter().flat_map(|policy| policy.rules(direction));
            rules.flat_map(|rule| rule.ports.iter().flatten()).any(|p| matches!(p, Ports::Named(_, own) if own == name))
        };
        let ports = match direction {
            Direction::Ingress => ports.iter().filter(|(name, ..)| named(name)).cloned().collect(),
            Direction::Egress => Vec::new(),
        };
        let policies = concerned.iter().map(|policy| policy.version).collect();
        Some(SetKey { direction, policies, ports, unknown: false })
    })
}
