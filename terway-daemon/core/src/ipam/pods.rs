//! Requests of the runtime and reports on attachments: from an ADD to the last link gone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::effect::{Effect, Reply};
use super::event::Add;
use super::ids::{OpId, Ticket};
use super::lease::Lease;
use super::pool::Pool;
use super::problem;
use super::record::{AddressRecord, Quarantine, Record, RecordKey};
use super::state::{AddOutcome, Attachment, ReleaseOutcome, Request, SlotState, TicketOwner, Timer, Waiter};
use crate::errors::{self, Error};
use crate::ident::{AttachmentKey, EniId, Family};

impl Pool {
    pub(super) fn add(&mut self, add: Add) {
        let Add { ticket, key, pod, netns, ip_stack, options } = add;
        if self.requests.is_open(ticket) {
            return;
        }
        self.requests.open(ticket, TicketOwner::Attachment(key.clone()));
        if (ip_stack.v4() && !self.config.stack.v4()) || (ip_stack.v6() && !self.config.stack.v6()) {
            let detail = format!("The pod wants {ip_stack:?}, the node's ip_stack is {:?}.", self.config.stack);
            return self.reply(ticket, Err(Error::new(errors::CONFIG_INVALID, detail)));
        }
        if self.requests.join_queued(&key, ticket) {
            return;
        }
        let request =
            Request { tickets: vec![ticket], key: key.clone(), pod, netns, options, ip_stack, since: self.now };
        let Some(attachment) = self.attachments.get_mut(&key) else { return self.enqueue(request) };
        if let AddOutcome::Attached(lease) = attachment.add(request) {
            self.reply(ticket, Ok(Reply::Attached(lease)));
        }
    }

    fn enqueue(&mut self, mut request: Request) {
        request.since = self.now;
        self.demand.add_queued(self.now);
        let ends = self.now.after(self.config.max_wait);
        self.requests.enqueue(request);
        self.wake(ends, Timer::Plan);
    }

    /// Binds the addresses to the request and orders the wiring.
    pub(super) fn set_up(&mut self, request: Request, lease: Lease) {
        let op = self.op();
        self.idle.used(self.now);
        if let Some(eni) = self.enis.get_mut(&lease.eni) {
            for address in lease.addresses.iter() {
                eni.slots_mut(Family::of(address)).set(address, SlotState::Bound, None);
            }
        }
        let key = request.key.clone();
        let attachment = Attachment::setting_up(request, lease, op);
        self.out.put(attachment.record(&key));
        self.connect(op, &key, &attachment);
        self.attachments.insert(key, attachment);
    }

    fn connect(&mut self, op: OpId, key: &AttachmentKey, attachment: &Attachment) {
        self.out.effect(Effect::Connect {
            op,
            key: key.clone(),
            pod: attachment.pod().clone(),
            netns: attachment.netns().to_owned(),
            options: attachment.options().to_owned(),
            lease: attachment.lease().clone(),
        });
    }

    /// Orders the wiring of what a restart found half wired, now that the NIC is known.
    pub(super) fn reconnect(&mut self, key: &AttachmentKey) {
        let fresh = self.op();
        let Some(mut attachment) = self.attachments.remove(key) else { return };
        let nic = self.enis.get(&attachment.lease().eni).and_then(|eni| eni.nic.clone());
        if attachment.begin_connect(fresh, nic) {
            self.out.put_lazily(attachment.record(key));
            self.connect(fresh, key, &attachment);
        }
        self.attachments.insert(key.clone(), attachment);
    }

    pub(super) fn del(&mut self, ticket: Ticket, key: AttachmentKey) {
        if !self.requests.is_open(ticket) {
            self.release(&key, Some(Waiter::Del(ticket)), TicketOwner::Attachment(key.clone()));
        }
    }

    pub(super) fn netns_gone(&mut self, key: &AttachmentKey) {
        if self.attachments.contains_key(key) {
            self.release(key, None, TicketOwner::Gc);
        }
    }

    pub(super) fn gc(&mut self, ticket: Ticket, network: &str, valid: &BTreeSet<AttachmentKey>) {
        if self.requests.is_open(ticket) {
            return;
        }
        self.requests.open(ticket, TicketOwner::Gc);
        let is_garbage = |key: &AttachmentKey, attachment: &Attachment| {
            key.network == network && !valid.contains(key) && !attachment.is_exempt_from_gc()
        };
        let garbage = self.attachments.iter().filter(|(key, attachment)| is_garbage(key, attachment));
        let garbage: Vec<_> = garbage.map(|(key, _)| key.clone()).collect();
        if garbage.is_empty() {
            return self.reply(ticket, Ok(Reply::GarbageCollected(Vec::new())));
        }
        self.requests.begin_gc(ticket, garbage.len());
        for key in garbage {
            self.release(&key, Some(Waiter::Gc(ticket)), TicketOwner::Gc);
        }
    }

    fn release(&mut self, key: &AttachmentKey, waiter: Option<Waiter>, owner: TicketOwner) {
        if let Some(Waiter::Del(ticket)) = waiter {
            self.requests.open(ticket, owner);
        }
        // Only a DEL speaks of the ADDs before it; evidence and lists speak of the attachment that was.
        if matches!(waiter, Some(Waiter::Del(_))) {
            let next = self.attachments.get_mut(key).and_then(Attachment::take_next);
            for request in self.requests.take_queued(key).into_iter().chain(next) {
                self.refuse(request, problem::deleted_meanwhile());
            }
        }
        let Some(attachment) = self.attachments.get_mut(key) else { return self.released(key, waiter) };
        match attachment.release(waiter) {
            ReleaseOutcome::Waits => {}
            ReleaseOutcome::Done => self.released(key, waiter),
            ReleaseOutcome::Start { adds, waiters } => {
                self.reply_all(adds, &Err(problem::deleted_meanwhile()));
                self.start_release(key, waiters);
            }
        }
    }

    /// From here on the attachment can only go: the release is written before anything is taken apart.
    pub(super) fn start_release(&mut self, key: &AttachmentKey, waiters: Vec<Waiter>) {
        if let Some(attachment) = self.attachments.get_mut(key) {
            attachment.start_release(waiters);
            self.out.put(attachment.record(key));
        }
        self.retry_disconnect(key);
    }

    pub(super) fn retry_disconnect(&mut self, key: &AttachmentKey) {
        let fresh = self.op();
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        if !attachment.begin_disconnect(fresh) {
            return;
        }
        self.out.effect(Effect::Disconnect {
            op: fresh,
            key: key.clone(),
            pod: attachment.pod().clone(),
            netns: attachment.netns().to_owned(),
            lease: attachment.lease().clone(),
        });
    }

    fn released(&mut self, key: &AttachmentKey, waiter: Option<Waiter>) {
        match waiter {
            Some(Waiter::Del(ticket)) => self.reply(ticket, Ok(Reply::Detached)),
            Some(Waiter::Gc(ticket)) => {
                if let Some(removed) = self.requests.gc_released(ticket, key) {
                    self.reply(ticket, Ok(Reply::GarbageCollected(removed)));
                }
            }
            None => {}
        }
    }

    pub(super) fn connected(&mut self, report: OpId, key: &AttachmentKey) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let Some((adds, release)) = attachment.connected(report) else { return };
        if let Some(waiters) = release {
            self.reply_all(adds, &Err(problem::deleted_meanwhile()));
            return self.start_release(key, waiters);
        }
        let reply = Ok(Reply::Attached(attachment.lease().clone()));
        // Lost in a crash, it is wired once more, which changes nothing.
        self.out.put_lazily(attachment.record(key));
        self.reply_all(adds, &reply);
    }

    pub(super) fn connect_failed(&mut self, report: OpId, key: &AttachmentKey, error: &Error, undone: bool) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let Some((adds, waiters)) = attachment.connect_failed(report) else { return };
        self.reply_all(adds, &Err(error.clone()));
        if !undone {
            return self.start_release(key, waiters);
        }
        let Some(attachment) = self.attachments.remove(key) else { return };
        // Durable: if a restart wired it again, a DEL that is answered from now on would have left something behind.
        self.out.delete(RecordKey::Attachment(key.clone()));
        let (lease, _, next) = attachment.into_parts();
        let used = self.idle.use_ended();
        if let Some(eni) = self.enis.get_mut(&lease.eni) {
            for address in lease.addresses.iter() {
                let slots = eni.slots_mut(Family::of(address));
                if slots.get(address).is_some_and(|slot| slot.missing) {
                    slots.remove(address);
                } else {
                    // The pod never ran, so nobody knows its address: no rest needed, it only goes to the end of the line.
                    slots.set(address, SlotState::Idle, Some(used));
                }
            }
        }
        for waiter in waiters {
            self.released(key, Some(waiter));
        }
        self.advance_drain(&lease.eni);
        if let Some(next) = next {
            self.enqueue(next);
        }
    }

    pub(super) fn datapath_removed(&mut self, report: OpId, key: &AttachmentKey) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        for waiter in attachment.datapath_removed(report).unwrap_or_default() {
            self.released(key, Some(waiter));
        }
    }

    pub(super) fn disconnected(&mut self, report: OpId, key: &AttachmentKey) {
        if !self.attachments.get(key).is_some_and(|attachment| attachment.is_disconnected_by(report)) {
            return;
        }
        let Some(attachment) = self.attachments.remove(key) else { return };
        let (lease, waiters, next) = attachment.into_parts();
        // Lost in a crash, it is taken apart once more, which changes nothing.
        self.out.delete_lazily(RecordKey::Attachment(key.clone()));
        for waiter in waiters {
            self.released(key, Some(waiter));
        }
        for address in lease.addresses.iter() {
            self.cool(&lease.eni, address);
        }
        self.advance_drain(&lease.eni);
        if let Some(next) = next {
            self.enqueue(next);
        }
    }

    pub(super) fn disconnect_failed(&mut self, report: OpId, key: &AttachmentKey, error: Error) {
        let Some(attachment) = self.attachments.get_mut(key) else { return };
        let Some(failures) = attachment.disconnect_failed(report, error) else { return };
        let at = self.retry_at(failures);
        self.wake(at, Timer::Disconnect(key.clone()));
    }

    /// Starts the rest of an address that nobody has any more.
    pub(super) fn cool(&mut self, eni: &EniId, address: IpAddr) {
        let until = self.now.after(self.config.cooling);
        let used = self.idle.use_ended();
        self.idle.used(self.now);
        let Some(state) = self.enis.get_mut(eni) else { return };
        let slots = state.slots_mut(Family::of(address));
        match slots.get(address) {
            None => return,
            // It was taken from the ENI behind our back; there is nothing to rest.
            Some(slot) if slot.missing => return slots.remove(address),
            Some(_) => slots.set(address, SlotState::Cooling { until }, Some(used)),
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
        let Some(owner) = self.requests.owner(ticket).cloned() else { return };
        let mut detail = "The deadline of the request has passed.".to_owned();
        let mut code = errors::DEADLINE;
        if let TicketOwner::Attachment(key) = owner {
            if self.requests.cancel_queued(&key, ticket) {
                "It was waiting for an address.".clone_into(&mut detail);
                if let Some(error) = self.growth_error() {
                    (code, detail) = (error.code, error.detail);
                }
            }
            if let Some(waited_for) = self.attachments.get_mut(&key).and_then(|attachment| attachment.cancel(ticket)) {
                waited_for.clone_into(&mut detail);
            }
        } else {
            self.requests.cancel_gc(ticket);
        }
        self.reply(ticket, Err(Error::new(code, detail)));
    }
}
