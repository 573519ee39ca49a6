//! Errors of objects, updated with each change.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::objects::ObjectKey;
use crate::service::model::{FrontendKey, Owner};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct ObjectErrors {
    /// Errors in an owner's own fields.
    owners: HashMap<Owner, Vec<String>>,
    /// Of each frontend with several owners: the one whose value is planned, and the others.
    frontends: HashMap<FrontendKey, (Owner, BTreeSet<Owner>)>,
    /// The map above by owner: frontends that another owner has.
    lost: HashMap<Owner, BTreeSet<FrontendKey>>,
    changed: BTreeSet<Owner>,
}

impl ObjectErrors {
    /// Replaces the errors in an owner's own fields.
    pub(super) fn of_owner(&mut self, owner: &Owner, messages: &[String]) {
        let before = self.owners.get(owner).map_or(&[][..], Vec::as_slice);
        if before == messages {
            return;
        }
        self.changed.insert(owner.clone());
        if messages.is_empty() {
            self.owners.remove(owner);
        } else {
            self.owners.insert(owner.clone(), messages.to_vec());
        }
    }

    /// Replaces the owners of a frontend, the winner first.
    pub(super) fn of_frontend<'a>(&mut self, key: FrontendKey, mut references: impl Iterator<Item = &'a Owner>) {
        // The entry for all other ports of an address is shared by all ports of its Service, and no conflict.
        if key.protocol.is_none() {
            return;
        }
        let now = references.next().and_then(|holder| {
            let losers: BTreeSet<Owner> = references.filter(|loser| *loser != holder).cloned().collect();
            (!losers.is_empty()).then(|| (holder.clone(), losers))
        });
        let before = match &now {
            Some(now) if self.frontends.get(&key) == Some(now) => return,
            Some(now) => self.frontends.insert(key, now.clone()),
            None => self.frontends.remove(&key),
        };
        for loser in before.into_iter().flat_map(|(_, losers)| losers) {
            if let Some(lost) = self.lost.get_mut(&loser) {
                lost.remove(&key);
                if lost.is_empty() {
                    self.lost.remove(&loser);
                }
            }
            self.changed.insert(loser);
        }
        for loser in now.into_iter().flat_map(|(_, losers)| losers) {
            self.lost.entry(loser.clone()).or_default().insert(key);
            self.changed.insert(loser);
        }
    }

    /// The errors of every object for which they may have changed since the last call.
    pub(super) fn news(&mut self) -> BTreeMap<ObjectKey, BTreeSet<String>> {
        std::mem::take(&mut self.changed).into_iter().map(|owner| (owner.object(), self.about(&owner))).collect()
    }

    /// The errors of all objects.
    pub(super) fn all(&self) -> BTreeMap<ObjectKey, BTreeSet<String>> {
        self.owners.keys().chain(self.lost.keys()).map(|owner| (owner.object(), self.about(owner))).collect()
    }

    fn about(&self, owner: &Owner) -> BTreeSet<String> {
        let own = self.owners.get(owner).into_iter().flatten().cloned();
        let lost = self.lost.get(owner).into_iter().flatten().filter_map(|key| {
            let (holder, _) = self.frontends.get(key)?;
            Some(format!("{key} belongs to {} already", holder.object()))
        });
        own.chain(lost).collect()
    }
}
