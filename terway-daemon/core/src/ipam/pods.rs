//! Attachments: from the runtime's request to the last link gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::effect::{Effect, Lease, Reply};
use super::event::{Add, OpId, Ticket};
use super::pool::{Place, Pool, Timer};
use super::record::{AddressRecord, AttachmentRecord, Phase, Quarantine, Record, RecordKey};
use super::slot::SlotState;
use crate::clock::Moment;
use crate::errors::{self, Error};
use crate::ident::{AttachmentKey, EniId, Family, IpStack, PodRef};

/// An Add that has no address yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) tickets: Vec<Ticket>,
    pub(super) key: AttachmentKey,
    pub(super) pod: PodRef,
    pub(super) netns: String,
    pub(super) options: String,
    pub(super) ip_stack: IpStack,
    pub(super) since: Moment,
}

/// The requests without an address, first come first served.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    next: u64,
    requests: BTreeMap<u64, Request>,
    by_key: BTreeMap<AttachmentKey, u64>,
    /// One queue per IP stack, so that a kind that cannot be served now is passed over without looking at each.
    queues: [BTreeSet<u64>; 3],
}

const IP_STACKS: [IpStack; 3] = [IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual];

const fn queue_of(ip_stack: IpStack) -> usize {
    match ip_stack {
        IpStack::Ipv4 => 0,
        IpStack::Ipv6 => 1,
        IpStack::Dual => 2,
    }
}

impl Waiting {
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.requests.len()).unwrap_or(u32::MAX)
    }

    fn get_mut(&mut self, key: &AttachmentKey) -> Option<&mut Request> {
        self.by_key.get(key).and_then(|seq| self.requests.get_mut(seq))
    }

    pub(super) fn first(&self) -> Option<(u64, &Request)> {
        self.requests.first_key_value().map(|(seq, request)| (*seq, request))
    }

    fn push(&mut self, request: Request) {
        let seq = self.next;
        self.next += 1;
        self.by_key.insert(request.key.clone(), seq);
        self.queues[queue_of(request.ip_stack)].insert(seq);
        self.requests.insert(seq, request);
    }

    pub(super) fn remove(&mut self, seq: u64) -> Option<Request> {
        let request = self.requests.remove(&seq)?;
        self.by_key.remove(&request.key);
        self.queues[queue_of(request.ip_stack)].remove(&seq);
        Some(request)
    }

    fn remove_key(&mut self, key: &AttachmentKey) -> Option<Request> {
        let seq = self.by_key.get(key).copied()?;
        self.remove(seq)
    }

    /// The first request of each IP stack.
    pub(super) fn heads(&self) -> impl Iterator<Item = (u64, IpStack)> {
        self.queues.iter().zip(IP_STACKS).filter_map(|(queue, ip_stack)| queue.first().map(|seq| (*seq, ip_stack)))
    }

    /// The last request.
    pub(super) fn last(&self) -> Option<u64> {
        self.requests.last_key_value().map(|(seq, _)| *seq)
    }
}

/// An attachment that holds addresses.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) pod: PodRef,
    pub(super) netns: String,
    pub(super) options: String,
    pub(super) lease: Lease,
    pub(super) state: AttachmentState,
    /// An Add that came after the release was asked for; served when nothing is left of the old.
    next: Option<Request>,
    /// Why its removal fails.
    pub(super) error: Option<Error>,
}

#[derive(Debug)]
pub(super) enum AttachmentState {
    SettingUp {
        /// `None` after a restart, until the ENI's NIC is there.
        op: Option<OpId>,
        adds: Vec<Ticket>,
        /// Release as soon as the set-up ends, whichever way.
        release: bool,
        waiters: Vec<Waiter>,
    },
    Ready,
    Releasing {
        /// `None` while it waits to be tried again.
        op: Option<OpId>,
        datapath_removed: bool,
        waiters: Vec<Waiter>,
        failures: u32,
    },
}

/// Who waits for a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Del(Ticket),
    Gc(Ticket),
}

/// A GC under way.
#[derive(Debug, Default)]
pub(super) struct GcState {
    left: usize,
    removed: BTreeSet<AttachmentKey>,
}

impl Attachment {
    pub(super) fn restored(record: AttachmentRecord) -> Self {
        let state = match record.phase {
            Phase::SettingUp => {
                AttachmentState::SettingUp { op: None, adds: Vec::new(), release: false, waiters: Vec::new() }
            }
            Phase::Ready => AttachmentState::Ready,
            Phase::Releasing => {
                AttachmentState::Releasing { op: None, datapath_removed: false, waiters: Vec::new(), failures: 0 }
            }
        };
        let AttachmentRecord { pod, netns, options, lease, .. } = record;
        Self { pod, netns, options, lease, state, next: None, error: None }
    }

    pub(super) const fn phase(&self) -> Phase {
        match self.state {
            AttachmentState::SettingUp { .. } => Phase::SettingUp,
            AttachmentState::Ready => Phase::Ready,
            AttachmentState::Releasing { .. } => Phase::Releasing,
        }
    }

    fn record(&self, key: &AttachmentKey) -> Record {
        Record::Attachment(AttachmentRecord {
            key: key.clone(),
            pod: self.pod.clone(),
            netns: self.netns.clone(),
            options: self.options.clone(),
            lease: self.lease.clone(),
            phase: self.phase(),
        })
    }
}

fn deleted_meanwhile() -> Error {
    Error::new(errors::BUSY, "A DEL of this attachment arrived before its ADD was finished.")
}

impl Pool {
    pub(super) fn add(&mut self, add: Add) {
        let Add { ticket, key, pod, netns, ip_stack, options } = add;
        if self.tickets.contains_key(&ticket) {
            return;
        }
        self.tickets.insert(ticket, Place::Attachment(key.clone()));
        if (ip_stack.v4() && !self.config.stack.v4()) || (ip_stack.v6() && !self.config.stack.v6()) {
            let detail = format!("The pod wants {ip_stack:?}, the node's ip_stack is {:?}.", self.config.stack);
            return self.answer(ticket, Err(Error::new(errors::CONFIG_INVALID, detail)));
        }
        if let Some(request) = self.waiting.get_mut(&key) {
            request.tickets.push(ticket);
            return;
        }
        let request =
            Request { tickets: vec![ticket], key: key.clone(), pod, netns, options, ip_stack, since: self.now };
        let Some(attachment) = self.attachments.get_mut(&key) else { return self.enqueue(request) };
        match &mut attachment.state {
            AttachmentState::Ready => {
                let lease = attachment.lease.clone();
                self.answer(ticket, Ok(Reply::Attached(lease)));
            }
            AttachmentState::SettingUp { adds, release: false, .. } => adds.push(ticket),
            AttachmentState::SettingUp { .. } | AttachmentState::Releasing { .. } => match &mut attachment.next {
                Some(next) => next.tickets.push(ticket),
                None => attachment.next = Some(request),
            },
        }
    }

    fn enqueue(&mut self, mut request: Request) {
        request.since = self.now;
        self.last_add = self.now;
        let ends = self.now.after(self.config.max_wait);
        self.waiting.push(request);
        self.wake(ends, Timer::Plan);
    }

    /// Binds the addresses to the request and orders the wiring.
    pub(super) fn set_up(&mut self, request: Request, lease: Lease) {
        let Request { tickets, key, pod, netns, options, .. } = request;
        let op = self.op();
        (self.last_use, self.reclaim_at) = (self.now, None);
        if let Some(eni) = self.enis.get_mut(&lease.eni) {
            for address in lease.addresses.iter() {
                eni.slots_mut(Family::of(address)).set(address, SlotState::Bound, None);
            }
        }
        let state = AttachmentState::SettingUp { op: Some(op), adds: tickets, release: false, waiters: Vec::new() };
        let attachment = Attachment { pod, netns, options, lease, state, next: None, error: None };
        self.out.put(attachment.record(&key));
        self.connect(op, &key, &attachment);
        self.attachments.insert(key, attachment);
    }

    fn connect(&mut self, op: OpId, key: &AttachmentKey, attachment: &Attachment) {
        self.out.effect(Effect::Connect {
            op,
            key: key.clone(),
            pod: attachment.pod.clone(),
            netns: attachment.netns.clone(),
            options: attachment.options.clone(),
            lease: attachment.lease.clone(),
        });
    }

    /// Orders the wiring of what a restart found half wired, now that the NIC is known.
    pub(super) fn reconnect(&mut self, key: &AttachmentKey) {
        let fresh = self.op();
        let Some(mut attachment) = self.attachments.remove(key) else { return };
        if let AttachmentState::SettingUp { op: op @ None, .. } = &mut attachment.state {
            *op = Some(fresh);
            if let Some(nic) = self.enis.get(&attachment.lease.eni).and_then(|eni| eni.nic.clone()) {
                attachment.lease.nic = nic;
            }
            self.out.put_lazily(attachment.record(key));
            self.connect(fresh, key, &attachment);
        }
        self.attachments.insert(key.clone(), attachment);
    }

    pub(super) fn del(&mut self, ticket: Ticket, key: AttachmentKey) {
        if !self.tickets.contains_key(&ticket) {
            self.release(&key, Some(Waiter::Del(ticket)), Place::Attachment(key.clone()));
        }
    }

    pub(super) fn netns_gone(&mut self, key: &AttachmentKey) {
        if self.attachments.contains_key(key) {
            self.release(key, None, Place::Gc);
        }
    }

    pub(super) fn gc(&mut self, ticket: Ticket, network: &str, valid: &BTreeSet<AttachmentKey>) {
        if self.tickets.contains_key(&ticket) {
            return;
        }
        self.tickets.insert(ticket, Place::Gc);
        // The specification forbids an ADD during a GC. A runtime that does it anyway must not lose the new pod, which its list cannot have.
        let garbage: Vec<_> = self
            .attachments
            .iter()
            .filter(|(key, attachment)| {
                let wanted = match &attachment.state {
                    AttachmentState::SettingUp { adds, .. } => !adds.is_empty(),
                    AttachmentState::Releasing { datapath_removed, .. } => *datapath_removed,
                    AttachmentState::Ready => false,
                };
                key.network == network && !valid.contains(key) && !wanted
            })
            .map(|(key, _)| key.clone())
            .collect();
        if garbage.is_empty() {
            return self.answer(ticket, Ok(Reply::GarbageCollected(Vec::new())));
        }
        self.gcs.insert(ticket, GcState { left: garbage.len(), removed: BTreeSet::new() });
        for key in garbage {
            self.release(&key, Some(Waiter::Gc(ticket)), Place::Gc);
        }
    }

    fn release(&mut self, key: &AttachmentKey, waiter: Option<Waiter>, place: Place) {
        if let Some(Waiter::Del(ticket)) = waiter {
            self.tickets.insert(ticket, place);
        }
        // Only a DEL speaks of the Adds before it; evidence and lists speak of the attachment that was.
        if matches!(waiter, Some(Waiter::Del(_))) {
            let next = self.attachments.get_mut(key).and_then(|attachment| attachment.next.take());
            for request in self.waiting.remove_key(key).into_iter().chain(next) {
                self.refuse(request, deleted_meanwhile());
            }
        }
        if !self.attachments.contains_key(key) {
            return self.released(key, waiter);
        }
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        match &mut attachment.state {
            AttachmentState::SettingUp { op: Some(_), release, waiters, .. } => {
                *release = true;
                waiters.extend(waiter);
            }
            AttachmentState::SettingUp { op: None, adds, .. } => {
                let adds = std::mem::take(adds);
                self.answer_all(adds, &Err(deleted_meanwhile()));
                self.start_release(key, waiter.into_iter().collect());
            }
            AttachmentState::Ready => self.start_release(key, waiter.into_iter().collect()),
            AttachmentState::Releasing { datapath_removed: true, .. } => self.released(key, waiter),
            AttachmentState::Releasing { waiters, .. } => waiters.extend(waiter),
        }
    }

    /// From here on the attachment can only go: the release is written before anything is taken apart.
    pub(super) fn start_release(&mut self, key: &AttachmentKey, waiters: Vec<Waiter>) {
        if let Some(attachment) = self.attachments.get_mut(key) {
            attachment.state = AttachmentState::Releasing { op: None, datapath_removed: false, waiters, failures: 0 };
            self.out.put(attachment.record(key));
        }
        self.retry_disconnect(key);
    }

    pub(super) fn retry_disconnect(&mut self, key: &AttachmentKey) {
        let fresh = self.op();
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let AttachmentState::Releasing { op: op @ None, .. } = &mut attachment.state else { return };
        *op = Some(fresh);
        self.out.effect(Effect::Disconnect {
            op: fresh,
            key: key.clone(),
            pod: attachment.pod.clone(),
            netns: attachment.netns.clone(),
            lease: attachment.lease.clone(),
        });
    }

    fn released(&mut self, key: &AttachmentKey, waiter: Option<Waiter>) {
        match waiter {
            Some(Waiter::Del(ticket)) => self.answer(ticket, Ok(Reply::Detached)),
            Some(Waiter::Gc(ticket)) => {
                let Some(gc) = self.gcs.get_mut(&ticket) else { return };
                gc.removed.insert(key.clone());
                gc.left -= 1;
                if gc.left == 0 {
                    let removed = self.gcs.remove(&ticket).map(|gc| gc.removed).unwrap_or_default();
                    self.answer(ticket, Ok(Reply::GarbageCollected(removed.into_iter().collect())));
                }
            }
            None => {}
        }
    }

    pub(super) fn connected(&mut self, report: OpId, key: &AttachmentKey) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let AttachmentState::SettingUp { op, adds, release, waiters } = &mut attachment.state else { return };
        if *op != Some(report) {
            return;
        }
        let (adds, waiters) = (std::mem::take(adds), std::mem::take(waiters));
        if *release {
            self.answer_all(adds, &Err(deleted_meanwhile()));
            return self.start_release(key, waiters);
        }
        attachment.state = AttachmentState::Ready;
        let answer = Ok(Reply::Attached(attachment.lease.clone()));
        // Lost in a crash, it is wired once more, which changes nothing.
        self.out.put_lazily(attachment.record(key));
        self.answer_all(adds, &answer);
    }

    pub(super) fn connect_failed(&mut self, report: OpId, key: &AttachmentKey, error: &Error, undone: bool) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let AttachmentState::SettingUp { op, adds, waiters, .. } = &mut attachment.state else { return };
        if *op != Some(report) {
            return;
        }
        let (adds, waiters) = (std::mem::take(adds), std::mem::take(waiters));
        self.answer_all(adds, &Err(error.clone()));
        if !undone {
            return self.start_release(key, waiters);
        }
        let Some(attachment) = self.attachments.remove(key) else { return };
        // Durable: if a restart wired it again, a DEL that is answered from now on would have left something behind.
        self.out.delete(RecordKey::Attachment(key.clone()));
        let lease = attachment.lease;
        self.uses += 1;
        if let Some(eni) = self.enis.get_mut(&lease.eni) {
            for address in lease.addresses.iter() {
                let slots = eni.slots_mut(Family::of(address));
                if slots.get(address).is_some_and(|slot| slot.missing) {
                    slots.remove(address);
                } else {
                    // The pod never ran, so nobody knows its address: no rest needed, it only goes to the end of the line.
                    slots.set(address, SlotState::Idle, Some(self.uses));
                }
            }
        }
        for waiter in waiters {
            self.released(key, Some(waiter));
        }
        self.advance_drain(&lease.eni);
        if let Some(next) = attachment.next {
            self.enqueue(next);
        }
    }

    pub(super) fn datapath_removed(&mut self, report: OpId, key: &AttachmentKey) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let AttachmentState::Releasing { op, datapath_removed, waiters, .. } = &mut attachment.state else { return };
        if *op != Some(report) {
            return;
        }
        *datapath_removed = true;
        for waiter in std::mem::take(waiters) {
            self.released(key, Some(waiter));
        }
    }

    pub(super) fn disconnected(&mut self, report: OpId, key: &AttachmentKey) {
        if !matches!(self.attachments.get(key).map(|a| &a.state), Some(AttachmentState::Releasing { op, .. }) if *op == Some(report))
        {
            return;
        }
        let Some(attachment) = self.attachments.remove(key) else { return };
        // Lost in a crash, it is taken apart once more, which changes nothing.
        self.out.delete_lazily(RecordKey::Attachment(key.clone()));
        if let AttachmentState::Releasing { waiters, .. } = attachment.state {
            for waiter in waiters {
                self.released(key, Some(waiter));
            }
        }
        let eni = attachment.lease.eni;
        for address in attachment.lease.addresses.iter() {
            self.cool(&eni, address);
        }
        self.advance_drain(&eni);
        if let Some(next) = attachment.next {
            self.enqueue(next);
        }
    }

    pub(super) fn disconnect_failed(&mut self, report: OpId, key: &AttachmentKey, error: Error) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let AttachmentState::Releasing { op, failures, .. } = &mut attachment.state else { return };
        if *op != Some(report) {
            return;
        }
        *op = None;
        *failures += 1;
        let failures = *failures;
        attachment.error = Some(error);
        let at = self.retry_at(failures);
        self.wake(at, Timer::Disconnect(key.clone()));
    }

    /// Starts the rest of an address that nobody has any more.
    pub(super) fn cool(&mut self, eni: &EniId, address: IpAddr) {
        let until = self.now.after(self.config.cooling);
        self.uses += 1;
        (self.last_use, self.reclaim_at) = (self.now, None);
        let Some(state) = self.enis.get_mut(eni) else { return };
        let slots = state.slots_mut(Family::of(address));
        match slots.get(address) {
            None => return,
            // It was taken from the ENI behind our back; there is nothing to rest.
            Some(slot) if slot.missing => return slots.remove(address),
            Some(_) => slots.set(address, SlotState::Cooling { until }, Some(self.uses)),
        }
        let record = AddressRecord { eni: eni.clone(), address, quarantine: Quarantine::Cooling };
        self.out.put_lazily(Record::Address(record));
        self.wake(until, Timer::Cooled(eni.clone(), address));
    }

    pub(super) fn cooled(&mut self, eni: &EniId, address: IpAddr) {
        let Some(state) = self.enis.get_mut(eni) else { return };
        let slots = state.slots_mut(Family::of(address));
        let due =
            slots.get(address).is_some_and(|s| matches!(s.state, SlotState::Cooling { until } if until <= self.now));
        if due {
            slots.set(address, SlotState::Idle, None);
            self.out.delete_lazily(RecordKey::Address(eni.clone(), address));
            self.advance_drain(eni);
        }
    }

    pub(super) fn cancel(&mut self, ticket: Ticket) {
        let Some(place) = self.tickets.get(&ticket).cloned() else { return };
        let mut detail = "The deadline of the request has passed.".to_owned();
        let mut code = errors::DEADLINE;
        if let Place::Attachment(key) = place {
            if let Some(request) = self.waiting.get_mut(&key) {
                request.tickets.retain(|t| *t != ticket);
                if request.tickets.is_empty() {
                    self.waiting.remove_key(&key);
                }
                "It was waiting for an address.".clone_into(&mut detail);
                if let Some(trouble) = self.trouble() {
                    (code, detail) = (trouble.code, trouble.detail);
                }
            }
            if let Some(attachment) = self.attachments.get_mut(&key) {
                attachment.forget_ticket(ticket, &mut detail);
            }
        } else {
            self.gcs.remove(&ticket);
        }
        self.answer(ticket, Err(Error::new(code, detail)));
    }
}

impl Attachment {
    fn forget_ticket(&mut self, ticket: Ticket, detail: &mut String) {
        let waited_for = match &mut self.state {
            AttachmentState::SettingUp { adds, waiters, .. } => {
                adds.retain(|t| *t != ticket);
                waiters.retain(|w| *w != Waiter::Del(ticket));
                "It was waiting for the pod's network to be set up; that goes on."
            }
            AttachmentState::Releasing { waiters, .. } => {
                waiters.retain(|w| *w != Waiter::Del(ticket));
                "It was waiting for the pod's network to be removed; that goes on."
            }
            AttachmentState::Ready => return,
        };
        waited_for.clone_into(detail);
        if let Some(next) = &mut self.next {
            next.tickets.retain(|t| *t != ticket);
            if next.tickets.is_empty() {
                self.next = None;
            }
        }
    }
}
