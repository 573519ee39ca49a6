//! Open requests: tickets, the queue of ADDs without an address, and GCs under way.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::Moment;
use crate::ident::{AttachmentKey, IpStack, PodRef};
use crate::ipam::ids::Ticket;

/// An ADD that has no address yet.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) tickets: Vec<Ticket>,
    pub(crate) key: AttachmentKey,
    pub(crate) pod: PodRef,
    pub(crate) netns: String,
    pub(crate) options: String,
    pub(crate) ip_stack: IpStack,
    /// When it was queued.
    pub(crate) since: Moment,
}

/// What an open ticket waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TicketOwner {
    Attachment(AttachmentKey),
    Gc,
}

/// A request that waits for the release of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    Del(Ticket),
    Gc(Ticket),
}

/// A GC under way.
#[derive(Debug)]
struct GcState {
    left: usize,
    removed: BTreeSet<AttachmentKey>,
}

/// All open requests. Queued ADDs are served in the order of their arrival.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    tickets: BTreeMap<Ticket, TicketOwner>,
    gcs: BTreeMap<Ticket, GcState>,
    queue: Queue,
}

impl Requests {
    pub(crate) fn is_open(&self, ticket: Ticket) -> bool {
        self.tickets.contains_key(&ticket)
    }

    pub(crate) fn open(&mut self, ticket: Ticket, owner: TicketOwner) {
        self.tickets.insert(ticket, owner);
    }

    pub(crate) fn owner(&self, ticket: Ticket) -> Option<&TicketOwner> {
        self.tickets.get(&ticket)
    }

    /// Closes a ticket; whether it was open, so that each gets one reply.
    pub(crate) fn close(&mut self, ticket: Ticket) -> bool {
        self.tickets.remove(&ticket).is_some()
    }

    /// How many ADDs wait for an address.
    pub(crate) fn waiting(&self) -> u32 {
        u32::try_from(self.queue.requests.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn enqueue(&mut self, request: Request) {
        self.queue.push(request);
    }

    /// Adds a ticket to the queued ADD of the same attachment, if there is one.
    pub(crate) fn join_queued(&mut self, key: &AttachmentKey, ticket: Ticket) -> bool {
        let queued = self.queue.get_mut(key);
        queued.map(|request| request.tickets.push(ticket)).is_some()
    }

    /// Takes a ticket off the queued ADD of an attachment, and the ADD off the queue with its last ticket. Says whether there is one.
    pub(crate) fn cancel_queued(&mut self, key: &AttachmentKey, ticket: Ticket) -> bool {
        let Some(request) = self.queue.get_mut(key) else { return false };
        request.tickets.retain(|other| *other != ticket);
        if request.tickets.is_empty() {
            self.take_queued(key);
        }
        true
    }

    /// Takes the ADD of an attachment off the queue.
    pub(crate) fn take_queued(&mut self, key: &AttachmentKey) -> Option<Request> {
        let seq = self.queue.by_key.get(key).copied()?;
        self.queue.remove(seq)
    }

    /// Takes an ADD off the queue by its place.
    pub(crate) fn take(&mut self, seq: u64) -> Option<Request> {
        self.queue.remove(seq)
    }

    /// The oldest queued ADD of each IP stack, with its place.
    pub(crate) fn oldest_by_stack(&self) -> impl Iterator<Item = (u64, IpStack)> {
        let queues = self.queue.by_stack.iter().zip(IP_STACKS);
        queues.filter_map(|(queue, ip_stack)| queue.first().map(|seq| (*seq, ip_stack)))
    }

    /// When the oldest queued ADD was queued.
    pub(crate) fn oldest_since(&self) -> Option<Moment> {
        self.queue.requests.first_key_value().map(|(_, request)| request.since)
    }

    /// Takes the oldest ADD off the queue if it was queued at that moment or before.
    pub(crate) fn take_older_than(&mut self, is_expired: impl Fn(Moment) -> bool) -> Option<Request> {
        let seq = self.queue.requests.first_key_value().filter(|(_, request)| is_expired(request.since))?.0;
        self.take(*seq)
    }

    /// Takes the newest ADD off the queue.
    pub(crate) fn take_newest(&mut self) -> Option<Request> {
        let seq = *self.queue.requests.last_key_value()?.0;
        self.take(seq)
    }

    /// A GC waits for so many releases.
    pub(crate) fn begin_gc(&mut self, ticket: Ticket, left: usize) {
        self.gcs.insert(ticket, GcState { left, removed: BTreeSet::new() });
    }

    /// One release that a GC waited for is done. Returns everything that the GC removed when it was the last.
    pub(crate) fn gc_released(&mut self, ticket: Ticket, key: &AttachmentKey) -> Option<Vec<AttachmentKey>> {
        let gc = self.gcs.get_mut(&ticket)?;
        gc.removed.insert(key.clone());
        gc.left -= 1;
        if gc.left > 0 {
            return None;
        }
        self.gcs.remove(&ticket).map(|gc| gc.removed.into_iter().collect())
    }

    /// Nobody waits for a GC any longer.
    pub(crate) fn cancel_gc(&mut self, ticket: Ticket) {
        self.gcs.remove(&ticket);
    }
}

/// The ADDs without an address, by their place in the queue.
#[derive(Debug, Default)]
struct Queue {
    next: u64,
    requests: BTreeMap<u64, Request>,
    by_key: BTreeMap<AttachmentKey, u64>,
    /// One queue per IP stack, so that a stack that cannot be served now is passed over without looking at each.
    by_stack: [BTreeSet<u64>; 3],
}

const IP_STACKS: [IpStack; 3] = [IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual];

const fn stack_index(ip_stack: IpStack) -> usize {
    match ip_stack {
        IpStack::Ipv4 => 0,
        IpStack::Ipv6 => 1,
        IpStack::Dual => 2,
    }
}

impl Queue {
    fn get_mut(&mut self, key: &AttachmentKey) -> Option<&mut Request> {
        self.by_key.get(key).and_then(|seq| self.requests.get_mut(seq))
    }

    fn push(&mut self, request: Request) {
        let seq = self.next;
        self.next += 1;
        self.by_key.insert(request.key.clone(), seq);
        self.by_stack[stack_index(request.ip_stack)].insert(seq);
        self.requests.insert(seq, request);
    }

    fn remove(&mut self, seq: u64) -> Option<Request> {
        let request = self.requests.remove(&seq)?;
        self.by_key.remove(&request.key);
        self.by_stack[stack_index(request.ip_stack)].remove(&seq);
        Some(request)
    }
}
