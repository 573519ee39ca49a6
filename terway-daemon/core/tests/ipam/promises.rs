//! What the pool promises, checked on what each step changes.

use ipnetwork::IpNetwork;
use terway_core::errors::Error;
use terway_core::ident::{AttachmentKey, EniId, Family};
use terway_core::ipam::{Change, Effect, Lease, Phase, Record, RecordKey, Reply, Ticket};

use crate::world::{Asked, Task, World};

impl World {
    /// Nothing on the node holds these addresses of this ENI: no pod in the kernel, no binding in the pool or on disk. (An address that a
    /// call took from the ENI without our hearing of it may be on another one by now.)
    pub(crate) fn check_unheld(&self, eni: &EniId, nets: &[IpNetwork]) {
        self.check_unbound(eni, nets);
        for record in self.store.values() {
            if let Record::Attachment(a) = record {
                assert!(!within(&a.lease, eni, nets), "an address of {} is given back, and bound on disk", a.key);
            }
        }
    }

    /// The same, but the end of a binding may still be on its way to the disk.
    fn check_unbound(&self, eni: &EniId, nets: &[IpNetwork]) {
        for (key, wired) in &self.kernel {
            assert!(!within(&wired.lease, eni, nets), "an address of {key} is given back");
        }
        for (key, lease) in &self.bound {
            assert!(!within(lease, eni, nets), "an address of {key} is given back");
        }
    }

    pub(crate) fn answered(&mut self, ticket: Ticket, result: Result<Reply, Error>) {
        let (asked, key) =
            self.open.remove(&ticket).unwrap_or_else(|| panic!("{ticket:?} is answered twice, or never asked"));
        match (&result, asked, key) {
            // Checked when it was decided: it may have been deleted since.
            (Ok(Reply::Attached(_)), Asked::Add, Some(_)) => {}
            (Ok(Reply::Detached), Asked::Del, Some(key)) => {
                if self.last_add.get(&key).is_none_or(|add| *add < ticket) {
                    let wired = self.kernel.get(&key).is_some_and(|wired| wired.datapath);
                    assert!(!wired, "DEL of {key} is answered while the datapath knows it");
                    if let Some(Record::Attachment(record)) = self.store.get(&RecordKey::Attachment(key.clone())) {
                        assert_eq!(record.phase, Phase::Releasing, "DEL of {key} is answered and not on disk");
                    }
                }
                self.dead.insert(key, ticket);
            }
            (Ok(Reply::GarbageCollected(_)), Asked::Gc, None) | (Err(_), ..) => {}
            (result, asked, key) => panic!("{asked:?} of {key:?} is answered with {result:?}"),
        }
        self.answers.insert(ticket, result);
    }

    /// Follows the bindings through what the pool writes: no two pods have one address, none changes, none ends before its pod left the kernel.
    pub(crate) fn track(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Put(Record::Attachment(a)) => {
                    assert!(!a.lease.addresses.is_empty());
                    if let Some(wired) = self.kernel.get(&a.key) {
                        assert_eq!(a.lease.addresses, wired.lease.addresses, "{}", a.key);
                    }
                    self.unbind(&a.key);
                    self.bind(&a.key, &a.lease);
                }
                Change::Delete(RecordKey::Attachment(key)) => {
                    assert!(!self.kernel.contains_key(key), "{key} is in the kernel and forgotten");
                    self.unbind(key);
                }
                _ => {}
            }
        }
    }

    fn bind(&mut self, key: &AttachmentKey, lease: &Lease) {
        for address in lease.addresses.iter() {
            if let Some(other) = self.owners.insert(address, key.clone()) {
                panic!("{address} is bound to {other} and {key}");
            }
        }
        self.bound.insert(key.clone(), lease.clone());
    }

    fn unbind(&mut self, key: &AttachmentKey) {
        if let Some(lease) = self.bound.remove(key) {
            for address in lease.addresses.iter() {
                self.owners.remove(&address);
            }
        }
    }

    /// Believes a restored pool.
    pub(crate) fn bind_anew(&mut self) {
        self.bound.clear();
        self.owners.clear();
        for view in self.pool.list() {
            self.bind(&view.key, &view.lease);
        }
    }

    /// What must hold the moment the pool orders something: no two calls at once about one family of one ENI, nothing bound goes, and
    /// an answer is for somebody who waits.
    pub(crate) fn check_order(&self, effect: &Effect) {
        if let Effect::Unassign { eni, addresses, .. } = effect {
            self.check_unbound(eni, &addresses.iter().map(|a| IpNetwork::from(*a)).collect::<Vec<_>>());
        }
        if let Effect::UnassignPrefixes { eni, prefixes, .. } = effect {
            self.check_unbound(eni, prefixes);
        }
        if let Effect::Reply { ticket, .. } = effect {
            assert!(self.open.contains_key(ticket), "{ticket:?} is answered twice, or never asked");
        }
        if let Some(call) = subject(effect) {
            for pending in &self.pending {
                if let Task::Run(other) = &pending.task {
                    assert_ne!(subject(other), Some(call), "two calls at once");
                }
            }
        }
    }

    /// What holds after every step, from the ground up.
    pub(crate) fn check(&self) {
        let views = self.pool.list();
        assert_eq!(self.pool.stats().bound as usize, views.len());
        assert!(
            views
                .iter()
                .map(|view| (&view.key, view.lease.addresses))
                .eq(self.bound.iter().map(|(k, g)| (k, g.addresses))),
            "the pool knows {views:?} and wrote {:?}",
            self.bound
        );
        for (key, wired) in &self.kernel {
            let bound = self.bound.get(key).unwrap_or_else(|| panic!("{key} is in the kernel and unknown to the pool"));
            assert_eq!(bound.addresses, wired.lease.addresses, "{key}");
            let on_disk = self.store.contains_key(&RecordKey::Attachment(key.clone()));
            assert!(on_disk, "{key} is in the kernel and not on disk");
        }
    }
}

/// Whether one of these addresses of this ENI is in the lease.
fn within(lease: &Lease, eni: &EniId, nets: &[IpNetwork]) -> bool {
    lease.eni == *eni && lease.addresses.iter().any(|address| nets.iter().any(|net| net.contains(address)))
}

/// The table that a call is about.
const fn subject(effect: &Effect) -> Option<(&EniId, Family)> {
    match effect {
        Effect::Assign { eni, family, .. }
        | Effect::Unassign { eni, family, .. }
        | Effect::AssignPrefixes { eni, family, .. }
        | Effect::UnassignPrefixes { eni, family, .. } => Some((eni, *family)),
        _ => None,
    }
}
