//! The merger: turns the events of all streams into batches for the feed, in an order that no subscriber can misread.
//!
//! * Pods come by two streams, those of this node and those of others. Objects of one stream are never deleted by a list of the other; a pod that is
//!   scheduled to this node moves from one to the other without a gap.
//! * Pods of the cluster are complete ([`Update::ListEnd`]) once both streams have listed, or the first one has and nothing needs the other.
//! * Policies wait until the pods that they need are listed: delivered before, they would deny what they allow.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use terway_core::objects::{Change, EndpointSlice, Kind, Object, ObjectKey, ObjectName, PodDemand};

use super::super::{Batch, Problem, Scope, Update};
use super::Stream;
use super::decode::Item;
use super::list_watch::{Event, Failure};
use super::servers::Servers;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Merger {
    servers: Arc<Servers>,
    streams: BTreeMap<Stream, State>,
    /// Whether the stream of other nodes' pods runs.
    is_wide: bool,
    demand: PodDemand,
    /// Updates of policies that wait for the pods of other nodes.
    held: Vec<Update>,
    /// Objects that cannot be decoded, and why.
    invalid: BTreeMap<ObjectKey, String>,
    /// Whether the first complete list of pods was delivered.
    pods_are_complete: bool,
    problems: Vec<Problem>,
}

/// What is known of one stream.
#[derive(Debug, Default)]
struct State {
    is_listed: bool,
    failure: Option<Failure>,
    /// The pods that the stream has sent; not kept for other kinds, which have one stream.
    names: BTreeSet<ObjectName>,
    /// During a list: what it has not named yet (pods), or what it has named (other kinds).
    listing: Option<BTreeSet<ObjectName>>,
}

impl Merger {
    pub(super) fn new(servers: Arc<Servers>) -> Self {
        Self {
            servers,
            streams: Stream::ALL.into_iter().map(|stream| (stream, State::default())).collect(),
            is_wide: false,
            demand: PodDemand::default(),
            held: Vec::new(),
            invalid: BTreeMap::new(),
            pods_are_complete: false,
            problems: Vec::new(),
        }
    }

    /// The first batch of a run.
    pub(super) fn begin(&self) -> Batch {
        Batch { updates: vec![Update::ListBegin(Kind::Pod)], problems: Some(Vec::new()) }
    }

    /// Whether the pods of other nodes are to be watched: something needs them, or policies that might need them may not be read.
    pub(super) fn needs_other_pods(&self) -> bool {
        let hidden = |stream: &Stream| {
            let state = &self.streams[stream];
            !state.is_listed && state.failure.as_ref().is_some_and(|failure| failure.is_forbidden)
        };
        self.demand.needs_all() || [Stream::NetworkPolicies, Stream::ClusterNetworkPolicies].iter().any(hidden)
    }

    /// Notes that the stream of other nodes' pods was started.
    pub(super) fn widen(&mut self) {
        self.is_wide = true;
    }

    /// Forgets the pods of other nodes, whose stream has ended.
    pub(super) fn narrow(&mut self) -> Batch {
        self.is_wide = false;
        let state = self.streams.insert(Stream::OtherPods, State::default()).unwrap_or_default();
        let gone = state.names.into_iter().map(|name| delete(Kind::Pod, name)).collect();
        self.finish(gone)
    }

    /// Merges the events of one stream.
    pub(super) fn merge(&mut self, stream: Stream, events: Vec<Event>) -> Batch {
        let mut updates = Vec::new();
        if stream == Stream::OtherPods && !self.is_wide {
            // Events that were under way when the stream was ended.
            return Batch::default();
        }
        let pods = stream.kind() == Kind::Pod;
        let is_policy = matches!(stream, Stream::NetworkPolicies | Stream::ClusterNetworkPolicies);
        for event in events {
            let mut update = |update| if is_policy { self.held.push(update) } else { updates.push(update) };
            let state = self.streams.entry(stream).or_default();
            match event {
                Event::Confirmed => {}
                Event::Readable(readable) => state.failure = readable.err(),
                event if pods => self.pod_event(stream, event, &mut updates),
                Event::ListBegin => {
                    state.listing = Some(BTreeSet::new());
                    update(Update::ListBegin(stream.kind()));
                }
                Event::Item(Item::Object(object)) => {
                    let key = object.key();
                    if let Some(listing) = &mut state.listing {
                        listing.insert(key.name.clone());
                    }
                    self.invalid.remove(&key);
                    if let Object::EndpointSlice(slice) = &*object {
                        learn(&self.servers, slice);
                    }
                    let change = Change::Upsert(object);
                    self.demand.apply(&change);
                    update(Update::Change(change));
                }
                Event::Item(Item::Invalid(key, reason)) => {
                    if let Some(listing) = &mut state.listing {
                        listing.insert(key.name.clone());
                    }
                    update(Update::Keep(key.clone()));
                    self.invalid.insert(key, reason);
                }
                Event::Delete(name) => {
                    let key = ObjectKey { kind: stream.kind(), name };
                    self.invalid.remove(&key);
                    let change = Change::Delete(key);
                    self.demand.apply(&change);
                    update(Update::Change(change));
                }
                Event::ListEnd => {
                    state.is_listed = true;
                    let named = state.listing.take().unwrap_or_default();
                    let remains = |key: &ObjectKey| key.kind != stream.kind() || named.contains(&key.name);
                    self.demand.retain(remains);
                    self.invalid.retain(|key, _| remains(key));
                    update(Update::ListEnd(stream.kind()));
                }
            }
        }
        self.finish(updates)
    }

    fn pod_event(&mut self, stream: Stream, event: Event, updates: &mut Vec<Update>) {
        let other = if stream == Stream::OwnPods { Stream::OtherPods } else { Stream::OwnPods };
        let is_own = |this: &Self, name| stream == Stream::OtherPods && this.streams[&other].names.contains(name);
        match event {
            Event::ListBegin => {
                let state = self.streams.entry(stream).or_default();
                state.listing = Some(state.names.clone());
            }
            Event::Item(item) => {
                let (key, update) = match item {
                    Item::Object(object) => (object.key(), Ok(Update::Change(Change::Upsert(object)))),
                    Item::Invalid(key, reason) => (key, Err(reason)),
                };
                // What the own stream has is newer: the pod has been scheduled to this node.
                if is_own(self, &key.name) {
                    return;
                }
                if stream == Stream::OwnPods {
                    self.streams.entry(other).or_default().names.remove(&key.name);
                }
                let state = self.streams.entry(stream).or_default();
                if let Some(listing) = &mut state.listing {
                    listing.remove(&key.name);
                }
                match update {
                    Ok(update) => {
                        state.names.insert(key.name.clone());
                        self.invalid.remove(&key);
                        updates.push(update);
                    }
                    Err(reason) => {
                        updates.push(Update::Keep(key.clone()));
                        self.invalid.insert(key, reason);
                    }
                }
            }
            Event::Delete(name) => {
                let key = ObjectKey { kind: Kind::Pod, name };
                if self.streams.entry(stream).or_default().names.remove(&key.name) {
                    updates.push(delete(Kind::Pod, key.name.clone()));
                }
                if !is_own(self, &key.name) {
                    self.invalid.remove(&key);
                }
            }
            Event::ListEnd => {
                let state = self.streams.entry(stream).or_default();
                state.is_listed = true;
                for name in state.listing.take().unwrap_or_default() {
                    state.names.remove(&name);
                    updates.push(delete(Kind::Pod, name));
                }
            }
            Event::Confirmed | Event::Readable(_) => {}
        }
    }

    /// Completes a batch: pods that have become complete, then the policies that waited for them, and problems that have changed.
    fn finish(&mut self, mut updates: Vec<Update>) -> Batch {
        let is_listed = |stream: Stream| self.streams[&stream].is_listed;
        let policies_are_known = is_listed(Stream::NetworkPolicies) && is_listed(Stream::ClusterNetworkPolicies);
        let others_suffice = is_listed(Stream::OtherPods) || (policies_are_known && !self.needs_other_pods());
        if !self.pods_are_complete && is_listed(Stream::OwnPods) && others_suffice {
            self.pods_are_complete = true;
            updates.push(Update::ListEnd(Kind::Pod));
        }
        if others_suffice || !self.needs_other_pods() {
            updates.append(&mut self.held);
        }
        let problems = self.current_problems();
        let changed = problems != self.problems;
        self.problems.clone_from(&problems);
        Batch { updates, problems: changed.then_some(problems) }
    }

    fn current_problems(&self) -> Vec<Problem> {
        let running = self.streams.iter().filter(|(stream, _)| **stream != Stream::OtherPods || self.is_wide);
        let failures: Vec<_> =
            running.clone().filter_map(|(stream, state)| Some((*stream, state.failure.as_ref()?))).collect();
        let mut problems = Vec::new();
        // One server that is away is one problem, not one for each kind.
        match failures.first() {
            Some((_, failure)) if failures.len() == running.count() && !failure.is_forbidden => {
                let reason =
                    format!("the API server cannot be read: {}; the last known state stays in force", failure.reason);
                problems.push(Problem { scope: Scope::Source, reason });
            }
            _ => {
                let problem = |(stream, failure): &(Stream, &Failure)| Problem {
                    scope: Scope::Kind(stream.kind()),
                    reason: failure.reason.clone(),
                };
                problems.extend(failures.iter().map(problem));
            }
        }
        let invalid = |(key, reason): (&ObjectKey, &String)| Problem {
            scope: Scope::Object(key.clone()),
            reason: reason.clone(),
        };
        problems.extend(self.invalid.iter().map(invalid));
        problems
    }
}

fn delete(kind: Kind, name: ObjectName) -> Update {
    Update::Change(Change::Delete(ObjectKey { kind, name }))
}

/// The API server's own endpoints.
fn learn(servers: &Servers, slice: &EndpointSlice) {
    let is_kubernetes =
        &*slice.meta.object.namespace == "default" && slice.service().is_some_and(|name| &**name == "kubernetes");
    if !is_kubernetes {
        return;
    }
    let ports = || slice.ports.iter().filter(|port| &*port.name == "https").filter_map(|port| port.port);
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready).filter_map(|endpoint| endpoint.address);
    servers.learn(ready.flat_map(|address| ports().map(move |port| SocketAddr::new(address, port))).collect());
}

#[cfg(test)]
mod tests;
