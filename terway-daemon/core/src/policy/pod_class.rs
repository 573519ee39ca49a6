//! Classes of pods, and the identities made of a class and a cell.
//!
//! Pods of one namespace are of one class if they agree in every label key that some peer selector names, and in the numbers of every port
//! name that some egress rule names. Keys and names once looked at stay so: to forget one would only merge classes, for which
//! thousands of addresses would be written anew. One that comes into use splits classes at once; how the others are found is brought up to
//! date when a namespace has its next new profile.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::cidr_region::family;
use super::id_map::{NumberMap, NumberSet};
use super::ids::{ClassId, Counter, Identity, IdentityKind, PodId, ProfileId, RegionId};
use crate::ident::Family;
use crate::objects::{Labels, Pod, Protocol};
use ipnetwork::IpNetwork;

/// A port that a container names.
pub(super) type NamedPort = (Arc<str>, Protocol, u16);

/// All that rules can see of a pod. Pods of one ReplicaSet share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Profile {
    pub(super) namespace: Arc<str>,
    pub(super) labels: Labels,
    pub(super) ports: Arc<[NamedPort]>,
}

impl Profile {
    pub(super) fn of(pod: &Pod) -> Self {
        let mut ports: Vec<NamedPort> = pod
            .ports
            .iter()
            .filter(|port| !port.name.is_empty())
            .map(|port| (Arc::clone(&port.name), port.protocol, port.port))
            .collect();
        ports.sort();
        ports.dedup();
        Self { namespace: Arc::clone(&pod.meta.object.namespace), labels: pod.meta.labels.clone(), ports: ports.into() }
    }
}

/// What of the profiles of one namespace is looked at.
type ClassKey = (Labels, Box<[NamedPort]>);

/// A class that falls apart, by what its profiles then look like: how many pods, and which profiles.
type Parts = HashMap<ClassKey, (usize, Vec<ProfileId>)>;

#[derive(Debug)]
struct ProfileState {
    profile: Profile,
    class: ClassId,
    /// How many times it has been enlisted.
    users: usize,
    pods: NumberSet<PodId>,
}

#[derive(Debug)]
pub(super) struct Class {
    /// One of its profiles: no rule tells the others from it.
    pub(super) like: Profile,
    profiles: NumberSet<ProfileId>,
    /// Those of its addresses, one for each cell they are in.
    pub(super) identities: Vec<(Identity, RegionId)>,
}

/// What an identity stands for.
#[derive(Clone, Debug)]
pub(super) struct Meaning {
    pub(super) class: Option<ClassId>,
    pub(super) cell: RegionId,
    /// Addresses that have it; a cell's world counts as one.
    addresses: usize,
}

/// The classes of a namespace.
#[derive(Debug, Default)]
struct Space {
    classes: NumberSet<ClassId>,
    by_key: HashMap<ClassKey, ClassId>,
    /// [`Classes::looks`] when the keys were made.
    looks: u64,
}

#[derive(Debug)]
pub(super) struct Classes {
    keys: HashSet<Arc<str>>,
    names: HashSet<Arc<str>>,
    profiles: NumberMap<ProfileId, ProfileState>,
    by_profile: HashMap<Profile, ProfileId>,
    classes: NumberMap<ClassId, Class>,
    /// Classes of more than one profile: no other can fall apart.
    mixed: NumberSet<ClassId>,
    namespaces: HashMap<Arc<str>, Space>,
    /// How many times it has come to look at more.
    looks: u64,
    meanings: NumberMap<Identity, Meaning>,
    identities: NumberMap<(IdentityKind, Option<ClassId>, RegionId), Identity>,
    profile_counter: Counter,
    class_counter: Counter,
    identity_counter: Counter,
}

impl Classes {
    pub(super) fn new(identity: u32) -> Self {
        Self {
            keys: HashSet::new(),
            names: HashSet::new(),
            profiles: NumberMap::default(),
            by_profile: HashMap::new(),
            classes: NumberMap::default(),
            mixed: NumberSet::default(),
            namespaces: HashMap::new(),
            looks: 0,
            meanings: NumberMap::default(),
            identities: NumberMap::default(),
            profile_counter: Counter::new(0, u32::MAX),
            class_counter: Counter::new(0, u32::MAX),
            identity_counter: Counter::new(identity, Identity::NUMBERS),
        }
    }

    fn key_of(&self, profile: &Profile) -> ClassKey {
        let labels = profile.labels.filtered(|key| self.keys.contains(key));
        (labels, profile.ports.iter().filter(|(name, ..)| self.names.contains(&**name)).cloned().collect())
    }

    /// The profile's number, counted once more.
    pub(super) fn enlist(&mut self, profile: Profile) -> ProfileId {
        if let Some(id) = self.by_profile.get(&profile)
            && let Some(state) = self.profiles.get_mut(id)
        {
            state.users += 1;
            return *id;
        }
        let id = ProfileId(self.profile_counter.next(|n| self.profiles.contains_key(&ProfileId(n))));
        let class = self.class(&profile);
        self.by_profile.insert(profile.clone(), id);
        self.profiles.insert(id, ProfileState { profile, class, users: 1, pods: NumberSet::default() });
        self.enter(class, id);
        id
    }

    fn enter(&mut self, id: ClassId, profile: ProfileId) {
        if let Some(class) = self.classes.get_mut(&id) {
            class.profiles.insert(profile);
            self.mix(id);
        }
    }

    fn exit(&mut self, id: ClassId, profile: ProfileId) {
        if let Some(class) = self.classes.get_mut(&id) {
            class.profiles.remove(&profile);
            self.mix(id);
        }
    }

    /// Settles whether a class may fall apart. One of a single profile is like that, and not like one that it had.
    fn mix(&mut self, id: ClassId) {
        let Some(class) = self.classes.get_mut(&id) else { return };
        if class.profiles.len() > 1 {
            self.mixed.insert(id);
            return;
        }
        self.mixed.remove(&id);
        if let Some(only) = class.profiles.iter().next().and_then(|only| self.profiles.get(only)) {
            class.like = only.profile.clone();
        }
    }

    fn class(&mut self, profile: &Profile) -> ClassId {
        let key = self.key_of(profile);
        let mut space = self.namespaces.remove(&profile.namespace).unwrap_or_default();
        if space.looks != self.looks {
            space.looks = self.looks;
            let all = space.classes.iter().filter_map(|id| Some((self.key_of(&self.classes.get(id)?.like), *id)));
            space.by_key = all.collect();
        }
        let id = match space.by_key.get(&key) {
            Some(id) => *id,
            None => {
                let id = ClassId(self.class_counter.next(|n| self.classes.contains_key(&ClassId(n))));
                space.by_key.insert(key, id);
                space.classes.insert(id);
                let class = Class { like: profile.clone(), profiles: NumberSet::default(), identities: Vec::new() };
                self.classes.insert(id, class);
                id
            }
        };
        self.namespaces.insert(Arc::clone(&profile.namespace), space);
        id
    }

    /// The profile is counted once less, and goes with its last pod.
    pub(super) fn release(&mut self, id: ProfileId) {
        let Some(state) = self.profiles.get_mut(&id) else { return };
        state.users -= 1;
        if state.users == 0
            && let Some(state) = self.profiles.remove(&id)
        {
            self.by_profile.remove(&state.profile);
            self.exit(state.class, id);
            self.prune(state.class);
        }
    }

    /// A pod has the profile.
    pub(super) fn join(&mut self, id: ProfileId, pod: PodId) {
        if let Some(state) = self.profiles.get_mut(&id) {
            state.pods.insert(pod);
        }
    }

    /// A pod has the profile no more.
    pub(super) fn leave(&mut self, id: ProfileId, pod: PodId) {
        if let Some(state) = self.profiles.get_mut(&id) {
            state.pods.remove(&pod);
        }
    }

    /// The pods that have a profile.
    pub(super) fn pods_of(&self, id: ProfileId) -> impl Iterator<Item = PodId> {
        self.profiles.get(&id).into_iter().flat_map(|state| state.pods.iter().copied())
    }

    /// A class goes with the last of its profiles and identities.
    fn prune(&mut self, id: ClassId) {
        let Some(class) = self.classes.get(&id) else { return };
        if class.profiles.is_empty()
            && class.identities.is_empty()
            && let Some(class) = self.classes.remove(&id)
        {
            let key = self.key_of(&class.like);
            if let Some(space) = self.namespaces.get_mut(&class.like.namespace) {
                space.classes.remove(&id);
                space.by_key.remove(&key);
                if space.classes.is_empty() {
                    self.namespaces.remove(&class.like.namespace);
                }
            }
        }
    }

    pub(super) fn profile(&self, id: ProfileId) -> Option<&Profile> {
        self.profiles.get(&id).map(|state| &state.profile)
    }

    pub(super) fn class_of(&self, id: ProfileId) -> Option<ClassId> {
        self.profiles.get(&id).map(|state| state.class)
    }

    pub(super) fn get(&self, id: ClassId) -> Option<&Class> {
        self.classes.get(&id)
    }

    /// Namespaces that have pods.
    pub(super) fn namespaces(&self) -> impl ExactSizeIterator<Item = &Arc<str>> {
        self.namespaces.keys()
    }

    /// The classes of the pods of a namespace.
    pub(super) fn members_of(&self, namespace: &str) -> impl Iterator<Item = &Class> {
        let all = self.namespaces.get(namespace).into_iter().flat_map(|space| &space.classes);
        all.filter_map(|id| self.classes.get(id))
    }

    /// Looks at more keys and names from now on. Returns the profiles that are of another class than before: of a class that falls apart, the
    /// largest part stays what it was.
    pub(super) fn look_at<'a>(
        &mut self,
        keys: impl Iterator<Item = &'a Arc<str>>,
        names: impl Iterator<Item = &'a Arc<str>>,
    ) -> NumberSet<ProfileId> {
        let mut moved = NumberSet::default();
        let new_keys: HashSet<Arc<str>> = keys.filter(|key| !self.keys.contains(*key)).cloned().collect();
        let new_names: HashSet<Arc<str>> = names.filter(|name| !self.names.contains(*name)).cloned().collect();
        if new_keys.is_empty() && new_names.is_empty() {
            return moved;
        }
        // What now is seen of a profile and was not before.
        let named = |profile: &Profile| -> Vec<NamedPort> {
            profile.ports.iter().filter(|(name, ..)| new_names.contains(name)).cloned().collect()
        };
        let seen = |profile: &Profile| -> ClassKey {
            (profile.labels.filtered(|key| new_keys.contains(key)), named(profile).into())
        };
        let mut splits: Vec<(ClassId, Parts)> = Vec::new();
        let mut values: Vec<Option<&str>> = Vec::new();
        for id in &self.mixed {
            let Some(class) = self.classes.get(id) else { continue };
            let like = &class.like;
            values.clear();
            values.extend(new_keys.iter().map(|key| like.labels.get(key)));
            let alike = |other: &Profile| {
                let labels = other.labels.is(&like.labels)
                    || new_keys.iter().zip(&values).all(|(key, value)| other.labels.get(key) == *value);
                labels && (new_names.is_empty() || named(other) == named(like))
            };
            let mut members = class.profiles.iter().filter_map(|member| self.profiles.get(member));
            if members.all(|state| alike(&state.profile)) {
                continue;
            }
            let mut parts = Parts::new();
            for member in &class.profiles {
                if let Some(state) = self.profiles.get(member) {
                    let part = parts.entry(seen(&state.profile)).or_default();
                    part.0 += state.users;
                    part.1.push(*member);
                }
            }
            splits.push((*id, parts));
        }
        self.keys.extend(new_keys);
        self.names.extend(new_names);
        self.looks += 1;
        let mut leaving: Vec<(ClassId, Vec<ProfileId>)> = Vec::new();
        for (id, parts) in splits {
            let mut parts: Vec<(usize, Vec<ProfileId>)> = parts.into_values().collect();
            parts.sort_by_key(|(pods, _)| *pods);
            let stays = parts.pop().and_then(|(_, members)| self.profiles.get(members.first()?));
            if let (Some(stays), Some(class)) = (stays, self.classes.get_mut(&id)) {
                class.like = stays.profile.clone();
            }
            leaving.extend(parts.into_iter().map(|(_, members)| (id, members)));
        }
        for (id, members) in leaving {
            let profile = members.first().and_then(|member| self.profiles.get(member)).map(|s| s.profile.clone());
            let Some(profile) = profile else { continue };
            let new = self.class(&profile);
            for member in members {
                if let Some(state) = self.profiles.get_mut(&member) {
                    state.class = new;
                }
                self.exit(id, member);
                self.enter(new, member);
                moved.insert(member);
            }
        }
        moved
    }

    pub(super) fn meaning(&self, identity: Identity) -> Option<&Meaning> {
        self.meanings.get(&identity)
    }

    /// The identity of a class in a cell, counted once more, and whether it is new.
    pub(super) fn identity(
        &mut self,
        kind: IdentityKind,
        class: Option<ClassId>,
        cell: RegionId,
        net: &IpNetwork,
    ) -> (Identity, bool) {
        let of: Family = family(net);
        if let Some(id) = self.identities.get(&(kind, class, cell))
            && let Some(meaning) = self.meanings.get_mut(id)
        {
            meaning.addresses += 1;
            return (*id, false);
        }
        let taken = |n: u32| self.meanings.contains_key(&Identity::new(kind, of, n));
        let id = Identity::new(kind, of, self.identity_counter.next(taken));
        self.identities.insert((kind, class, cell), id);
        self.meanings.insert(id, Meaning { class, cell, addresses: 1 });
        if let Some(class) = class.and_then(|class| self.classes.get_mut(&class)) {
            class.identities.push((id, cell));
        }
        (id, true)
    }

    /// One address less; whether that was the last, and the identity is gone.
    pub(super) fn forget(&mut self, id: Identity) -> bool {
        let Some(meaning) = self.meanings.get_mut(&id) else { return false };
        meaning.addresses -= 1;
        if meaning.addresses > 0 {
            return false;
        }
        if let Some(meaning) = self.meanings.remove(&id) {
            self.identities.remove(&(id.kind(), meaning.class, meaning.cell));
            if let Some(class) = meaning.class {
                if let Some(state) = self.classes.get_mut(&class) {
                    state.identities.retain(|(other, _)| *other != id);
                }
                self.prune(class);
            }
        }
        true
    }

    /// Pod classes, identities.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.classes.len(), self.meanings.len())
    }
}
