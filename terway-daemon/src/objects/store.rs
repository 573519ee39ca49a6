//! The object store: the one copy of all Kubernetes objects in the daemon, and the writer that applies batches to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{RwLock, RwLockReadGuard};
use terway_core::objects::{Applied, Change, Kind, ObjectKey, ObjectName, Objects};

use super::{Batch, KindStatus, Update};

/// All objects, shared by the feed, which writes, and its subscribers, which read.
#[derive(Debug, Default)]
pub struct ObjectStore(RwLock<Stored>);

/// The contents of an [`ObjectStore`] at one moment.
#[derive(Debug, Default)]
pub struct Stored {
    objects: Objects,
    synced: BTreeSet<Kind>,
    revision: u64,
}

impl ObjectStore {
    /// The objects as they are now. The feed waits as long as the guard is held.
    pub fn read(&self) -> RwLockReadGuard<'_, Stored> {
        self.0.read()
    }
}

impl Stored {
    /// Whether all of these kinds were listed completely.
    #[must_use]
    pub fn has_synced(&self, kinds: &[Kind]) -> bool {
        kinds.iter().all(|kind| self.synced.contains(kind))
    }

    /// The revision: the last changes that the store holds are those with this [`ObjectChanges::revision`].
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }
}

impl Deref for Stored {
    type Target = Objects;

    fn deref(&self) -> &Objects {
        &self.objects
    }
}

/// What one or more batches have changed in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectChanges {
    /// The changes, in order; none for updates that changed nothing.
    pub changes: Vec<Applied>,
    /// The kinds that were listed completely at least once. A kind never leaves this set.
    pub synced: BTreeSet<Kind>,
    /// The revision of the store that these changes lead to, one more than before.
    pub revision: u64,
    /// When the feed received the first batch of these changes.
    pub received: Option<Instant>,
    /// Changes may be missing (the feed panicked): a subscriber rebuilds its state from the store.
    pub resync: bool,
}

impl ObjectChanges {
    /// Whether all of these kinds were listed completely.
    #[must_use]
    pub fn has_synced(&self, kinds: &[Kind]) -> bool {
        kinds.iter().all(|kind| self.synced.contains(kind))
    }
}

/// Applies batches to a store.
#[derive(Debug)]
pub(super) struct StoreWriter {
    store: Arc<ObjectStore>,
    /// For each kind whose list is under way: the stored objects that it has not named yet.
    unlisted: BTreeMap<Kind, BTreeSet<ObjectName>>,
}

impl StoreWriter {
    pub(super) fn new(store: Arc<ObjectStore>) -> Self {
        Self { store, unlisted: BTreeMap::new() }
    }

    pub(super) fn apply(&mut self, batches: Vec<Batch>) -> ObjectChanges {
        let store = Arc::clone(&self.store);
        let mut stored = store.0.write();
        let mut changes = Vec::new();
        for update in batches.into_iter().flat_map(|batch| batch.updates) {
            self.update(&mut stored, update, &mut changes);
        }
        stored.revision += 1;
        let synced = stored.synced.clone();
        ObjectChanges { changes, synced, revision: stored.revision, received: None, resync: false }
    }

    /// After a panic in [`Self::apply`]: changes that subscribers must not take for the whole difference.
    pub(super) fn resync(&mut self) -> ObjectChanges {
        self.unlisted.clear();
        let mut stored = self.store.0.write();
        stored.revision += 1;
        ObjectChanges { synced: stored.synced.clone(), revision: stored.revision, resync: true, ..Default::default() }
    }

    fn update(&mut self, stored: &mut Stored, update: Update, changes: &mut Vec<Applied>) {
        let Stored { objects, synced, .. } = stored;
        match update {
            Update::Replace(kind, all) => {
                self.unlisted.remove(&kind);
                changes.extend(objects.replace(kind, all));
                synced.insert(kind);
            }
            Update::ListBegin(kind) => drop(self.unlisted.insert(kind, objects.names(kind).into_iter().collect())),
            Update::ListEnd(kind) => {
                let Some(unlisted) = self.unlisted.remove(&kind) else { return };
                let delete = |name| Change::Delete(ObjectKey { kind, name });
                changes.extend(unlisted.into_iter().filter_map(|name| objects.apply(delete(name))));
                synced.insert(kind);
            }
            Update::Keep(key) => {
                if let Some(unlisted) = self.unlisted.get_mut(&key.kind) {
                    unlisted.remove(&key.name);
                }
            }
            Update::Change(change) => {
                let (kind, name) = match &change {
                    Change::Upsert(object) => (object.kind(), &object.meta().object),
                    Change::Delete(key) => (key.kind, &key.name),
                };
                if let Some(unlisted) = self.unlisted.get_mut(&kind) {
                    unlisted.remove(name);
                }
                changes.extend(objects.apply(change));
            }
        }
    }

    /// All kinds with the number of their objects.
    pub(super) fn kinds(&self) -> Vec<KindStatus> {
        let objects = self.store.read();
        let count = |kind| match kind {
            Kind::Node => objects.nodes().len(),
            Kind::Namespace => objects.namespaces().len(),
            Kind::Pod => objects.pods().len(),
            Kind::Service => objects.services().len(),
            Kind::EndpointSlice => objects.slices().len(),
            Kind::NetworkPolicy => objects.policies().len(),
            Kind::ClusterNetworkPolicy => objects.cluster_policies().len(),
        };
        let status = |kind| KindStatus { kind, count: count(kind), is_synced: objects.synced.contains(&kind) };
        Kind::ALL.into_iter().map(status).collect()
    }
}
