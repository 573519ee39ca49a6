//! One attachment that holds addresses: set up, ready, being released.

use super::requests::{Request, Waiter};
use crate::errors::Error;
use crate::ident::{AttachmentKey, PodRef};
use crate::ipam::ids::{OpId, Ticket};
use crate::ipam::lease::{Lease, Nic};
use crate::ipam::record::{AttachmentRecord, Phase, Record};

/// An attachment that holds addresses.
#[derive(Debug)]
pub(crate) struct Attachment {
    pod: PodRef,
    netns: String,
    options: String,
    lease: Lease,
    state: State,
    /// An ADD that came after the release was asked for; served when nothing is left of the old attachment.
    next: Option<Request>,
    /// Why its removal fails.
    error: Option<Error>,
}

#[derive(Debug)]
enum State {
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

/// What becomes of an ADD for an attachment that exists.
#[derive(Debug)]
pub(crate) enum AddOutcome {
    /// The pod is attached already.
    Attached(Lease),
    /// It waits for the set-up under way, or for the end of the release.
    Waits,
}

/// What becomes of a request to release an attachment.
#[derive(Debug)]
pub(crate) enum ReleaseOutcome {
    /// The release has to be started with these waiters; these ADDs are refused.
    Start { adds: Vec<Ticket>, waiters: Vec<Waiter> },
    /// The waiter waits with the others.
    Waits,
    /// The datapath has forgotten the pod already.
    Done,
}

impl Attachment {
    /// An attachment whose set-up is under way.
    pub(crate) fn setting_up(request: Request, lease: Lease, op: OpId) -> Self {
        let Request { tickets, pod, netns, options, .. } = request;
        let state = State::SettingUp { op: Some(op), adds: tickets, release: false, waiters: Vec::new() };
        Self { pod, netns, options, lease, state, next: None, error: None }
    }

    pub(crate) fn restored(record: AttachmentRecord) -> Self {
        let state = match record.phase {
            Phase::SettingUp => State::SettingUp { op: None, adds: Vec::new(), release: false, waiters: Vec::new() },
            Phase::Ready => State::Ready,
            Phase::Releasing => {
                State::Releasing { op: None, datapath_removed: false, waiters: Vec::new(), failures: 0 }
            }
        };
        let AttachmentRecord { pod, netns, options, lease, .. } = record;
        Self { pod, netns, options, lease, state, next: None, error: None }
    }

    pub(crate) const fn pod(&self) -> &PodRef {
        &self.pod
    }

    pub(crate) fn netns(&self) -> &str {
        &self.netns
    }

    pub(crate) fn options(&self) -> &str {
        &self.options
    }

    pub(crate) const fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Why its removal fails, if it does.
    pub(crate) const fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    pub(crate) const fn phase(&self) -> Phase {
        match self.state {
            State::SettingUp { .. } => Phase::SettingUp,
            State::Ready => Phase::Ready,
            State::Releasing { .. } => Phase::Releasing,
        }
    }

    /// It is being removed, without a failure so far.
    pub(crate) const fn leaves(&self) -> bool {
        matches!(self.state, State::Releasing { failures: 0, .. })
    }

    pub(crate) fn record(&self, key: &AttachmentKey) -> Record {
        Record::Attachment(AttachmentRecord {
            key: key.clone(),
            pod: self.pod.clone(),
            netns: self.netns.clone(),
            options: self.options.clone(),
            lease: self.lease.clone(),
            phase: self.phase(),
        })
    }

    /// Whether a GC must leave it alone although its list does not have it: an ADD waits for it, or it is released already.
    ///
    /// The specification forbids an ADD during a GC. A runtime that does it anyway must not lose the new pod, which its list cannot have.
    pub(crate) fn is_exempt_from_gc(&self) -> bool {
        match &self.state {
            State::SettingUp { adds, .. } => !adds.is_empty(),
            State::Releasing { datapath_removed, .. } => *datapath_removed,
            State::Ready => false,
        }
    }

    /// Takes in another ADD of the same attachment.
    pub(crate) fn add(&mut self, request: Request) -> AddOutcome {
        match &mut self.state {
            State::Ready => return AddOutcome::Attached(self.lease.clone()),
            State::SettingUp { adds, release: false, .. } => adds.extend(request.tickets),
            State::SettingUp { .. } | State::Releasing { .. } => match &mut self.next {
                Some(next) => next.tickets.extend(request.tickets),
                None => self.next = Some(request),
            },
        }
        AddOutcome::Waits
    }

    /// Takes the ADD that waits for the end of the release.
    pub(crate) const fn take_next(&mut self) -> Option<Request> {
        self.next.take()
    }

    /// Notes that the set-up of a restored attachment is ordered, with the NIC as it is now. `false` if it is under way or over.
    pub(crate) fn begin_connect(&mut self, fresh: OpId, nic: Option<Nic>) -> bool {
        let State::SettingUp { op: op @ None, .. } = &mut self.state else { return false };
        *op = Some(fresh);
        if let Some(nic) = nic {
            self.lease.nic = nic;
        }
        true
    }

    /// The set-up is done: whom to tell, and the waiters of a release that was asked for meanwhile. `None` for a report of another attempt.
    pub(crate) fn connected(&mut self, report: OpId) -> Option<(Vec<Ticket>, Option<Vec<Waiter>>)> {
        let State::SettingUp { op, adds, release, waiters } = &mut self.state else { return None };
        if *op != Some(report) {
            return None;
        }
        let adds = std::mem::take(adds);
        if *release {
            return Some((adds, Some(std::mem::take(waiters))));
        }
        self.state = State::Ready;
        Some((adds, None))
    }

    /// The set-up has failed: whom to tell. `None` for a report of another attempt.
    pub(crate) fn connect_failed(&mut self, report: OpId) -> Option<(Vec<Ticket>, Vec<Waiter>)> {
        let State::SettingUp { op, adds, waiters, .. } = &mut self.state else { return None };
        (*op == Some(report)).then(|| (std::mem::take(adds), std::mem::take(waiters)))
    }

    /// Asks for the release.
    pub(crate) fn release(&mut self, waiter: Option<Waiter>) -> ReleaseOutcome {
        match &mut self.state {
            State::SettingUp { op: Some(_), release, waiters, .. } => {
                *release = true;
                waiters.extend(waiter);
                ReleaseOutcome::Waits
            }
            State::SettingUp { op: None, adds, .. } => {
                ReleaseOutcome::Start { adds: std::mem::take(adds), waiters: waiter.into_iter().collect() }
            }
            State::Ready => ReleaseOutcome::Start { adds: Vec::new(), waiters: waiter.into_iter().collect() },
            State::Releasing { datapath_removed: true, .. } => ReleaseOutcome::Done,
            State::Releasing { waiters, .. } => {
                waiters.extend(waiter);
                ReleaseOutcome::Waits
            }
        }
    }

    /// From here on it can only go.
    pub(crate) fn start_release(&mut self, waiters: Vec<Waiter>) {
        self.state = State::Releasing { op: None, datapath_removed: false, waiters, failures: 0 };
    }

    /// Notes that the removal is ordered. `false` if it is under way, or if nobody asked for it.
    pub(crate) const fn begin_disconnect(&mut self, fresh: OpId) -> bool {
        let State::Releasing { op: op @ None, .. } = &mut self.state else { return false };
        *op = Some(fresh);
        true
    }

    /// The datapath has forgotten the pod: whom to tell. `None` for a report of another attempt.
    pub(crate) fn datapath_removed(&mut self, report: OpId) -> Option<Vec<Waiter>> {
        let State::Releasing { op, datapath_removed, waiters, .. } = &mut self.state else { return None };
        if *op != Some(report) {
            return None;
        }
        *datapath_removed = true;
        Some(std::mem::take(waiters))
    }

    /// Whether this report ends the removal under way.
    pub(crate) fn is_disconnected_by(&self, report: OpId) -> bool {
        matches!(&self.state, State::Releasing { op, .. } if *op == Some(report))
    }

    /// The removal has failed: how often in a row. `None` for a report of another attempt.
    pub(crate) fn disconnect_failed(&mut self, report: OpId, error: Error) -> Option<u32> {
        let State::Releasing { op, failures, .. } = &mut self.state else { return None };
        if *op != Some(report) {
            return None;
        }
        *op = None;
        *failures += 1;
        self.error = Some(error);
        Some(*failures)
    }

    /// The end: its lease, who still waits for the release, and the ADD that comes next.
    pub(crate) fn into_parts(self) -> (Lease, Vec<Waiter>, Option<Request>) {
        let waiters = match self.state {
            State::SettingUp { waiters, .. } | State::Releasing { waiters, .. } => waiters,
            State::Ready => Vec::new(),
        };
        (self.lease, waiters, self.next)
    }

    /// Takes a ticket whose deadline has passed off everything that waits here. Returns what it waited for, if that goes on.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Option<&'static str> {
        let waited_for = match &mut self.state {
            State::SettingUp { adds, waiters, .. } => {
                adds.retain(|t| *t != ticket);
                waiters.retain(|w| *w != Waiter::Del(ticket));
                "It was waiting for the pod's network to be set up; that goes on."
            }
            State::Releasing { waiters, .. } => {
                waiters.retain(|w| *w != Waiter::Del(ticket));
                "It was waiting for the pod's network to be removed; that goes on."
            }
            State::Ready => return None,
        };
        if let Some(next) = &mut self.next {
            next.tickets.retain(|t| *t != ticket);
            if next.tickets.is_empty() {
                self.next = None;
            }
        }
        Some(waited_for)
    }
}
