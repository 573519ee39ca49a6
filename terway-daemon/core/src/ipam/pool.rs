//! The pool as the composition of its sub-machines: the dispatch of events, timers, and the end of each step.
//!
//! The handlers of events are methods of [`Pool`] in the modules beside this one. They read and change the sub-machines of
//! [`state`](super::state) through their methods, and see each other only as methods of the pool.

use std::collections::BTreeMap;

use super::config::{Degradation, PoolConfig};
use super::effect::{Effect, Reply};
use super::event::Event;
use super::ids::{ClientToken, OpId, Ticket};
use super::record::Record;
use super::state::{
    Assigned, Attachment, CallBlock, Creations, DemandClock, EffectBatch, EniState, IdleClock, InventoryState, Request,
    Requests, Sequence, Timer, Timers, VSwitches,
};
use crate::clock::Moment;
use crate::errors::Error;
use crate::ident::{AttachmentKey, EniId};

/// The address pool of one node. See the [module](super) for the contract.
#[derive(Debug)]
pub struct Pool {
    pub(super) config: PoolConfig,
    pub(super) now: Moment,
    pub(super) requests: Requests,
    pub(super) attachments: BTreeMap<AttachmentKey, Attachment>,
    pub(super) enis: BTreeMap<EniId, EniState>,
    pub(super) creations: Creations,
    /// The back-off of assign calls on any ENI.
    pub(super) assign_block: CallBlock,
    pub(super) vswitches: VSwitches,
    pub(super) demand: DemandClock,
    pub(super) idle: IdleClock,
    pub(super) inventory: InventoryState,
    pub(super) sequence: Sequence,
    pub(super) timers: Timers,
    pub(super) out: EffectBatch,
}

impl Pool {
    /// The pool of a node that has nothing yet, neither on disk nor in the cloud.
    #[must_use]
    pub fn new(config: PoolConfig) -> Self {
        let mut vswitches = VSwitches::default();
        vswitches.configure(&config.vswitches);
        let mut pool = Self {
            now: Moment::ZERO,
            requests: Requests::default(),
            attachments: BTreeMap::new(),
            enis: BTreeMap::new(),
            creations: Creations::default(),
            assign_block: CallBlock::default(),
            vswitches,
            demand: DemandClock::new(config.warm_up > 0),
            idle: IdleClock::default(),
            inventory: InventoryState::default(),
            sequence: Sequence::new(&config.token_seed),
            timers: Timers::default(),
            out: EffectBatch::default(),
            config,
        };
        pool.schedule_inventory(Moment::ZERO);
        pool
    }

    /// Takes in one event and says what to do about it.
    ///
    /// `now` never goes backwards; if it does, the pool stays at the latest moment it knows.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Effect> {
        self.now = self.now.max(now);
        self.fire();
        self.dispatch(event);
        self.finish()
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Add(add) => self.add(add),
            Event::Del { ticket, key } => self.del(ticket, key),
            Event::Gc { ticket, network, valid } => self.gc(ticket, &network, &valid),
            Event::Cancel { ticket } => self.cancel(ticket),
            Event::NetnsGone { key } => self.netns_gone(&key),
            Event::Connected { op, key } => self.connected(op, &key),
            Event::ConnectFailed { op, key, error, undone } => self.connect_failed(op, &key, &error, undone),
            Event::DatapathRemoved { op, key } => self.datapath_removed(op, &key),
            Event::Disconnected { op, key } => self.disconnected(op, &key),
            Event::DisconnectFailed { op, key, error } => self.disconnect_failed(op, &key, error),
            Event::EniCreated { op, result } => self.eni_created(op, result),
            Event::EniAttached { op, eni, result } => self.eni_attached(op, &eni, result),
            Event::NicReady { op, eni, ifindex, subnet } => self.nic_ready(op, &eni, ifindex, subnet),
            Event::NicFailed { op, eni, error } => self.nic_failed(op, &eni, error),
            Event::Assigned { op, eni, family, result } => {
                self.assigned(op, &eni, family, result.map(Assigned::Addresses));
            }
            Event::PrefixesAssigned { op, eni, family, result } => {
                self.assigned(op, &eni, family, result.map(Assigned::Prefixes));
            }
            Event::Unassigned { op, eni, family, result } | Event::PrefixesUnassigned { op, eni, family, result } => {
                self.unassigned(op, &eni, family, result);
            }
            Event::VSwitches { op, result } => self.vswitches_counted(op, result),
            Event::Configure(config) => self.configure(*config),
            Event::Detached { op, eni, result } => self.detached(op, &eni, result),
            Event::Deleted { op, eni, result } => self.deleted(op, &eni, result),
            Event::Inventory { op, result } => self.inventory(op, result),
            Event::Tick => {}
        }
    }

    fn fire(&mut self) {
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Cooled(eni, address) => self.cooled(&eni, address),
                Timer::StaleListing(eni, what) => self.stale_listing_expired(&eni, what),
                Timer::Creation(token) => self.retry_creation(&token),
                Timer::Call(eni, family) => self.retry_call(&eni, family),
                Timer::Eni(eni) => self.retry_eni(&eni),
                Timer::Disconnect(key) => self.retry_disconnect(&key),
                Timer::Inventory => self.inventory_due(),
                Timer::Plan => {}
            }
        }
    }

    /// Plans, and ends the step.
    pub(super) fn finish(&mut self) -> Vec<Effect> {
        self.plan();
        let mut effects = self.out.take();
        effects.extend(self.timers.next_wakeup(self.now).map(Effect::WakeAt));
        effects
    }

    pub(super) fn wake(&mut self, at: Moment, timer: Timer) {
        self.timers.set(at, timer);
    }

    /// The moment of the next attempt after so many failures.
    pub(super) fn retry_at(&self, failures: u32) -> Moment {
        self.now.after(self.config.retry.delay(failures, self.sequence.retry_jitter()))
    }

    /// Whether the cloud may be asked for anything at all.
    pub(super) fn may_ask(&self) -> bool {
        self.config.degradation != Degradation::L0
    }

    /// Whether anything may be given back to the cloud.
    pub(super) fn may_release(&self) -> bool {
        self.config.degradation == Degradation::None
    }

    pub(super) const fn op(&mut self) -> OpId {
        self.sequence.op()
    }

    /// A token never used before; that it is used up is written with whatever it is used for.
    pub(super) fn token(&mut self) -> ClientToken {
        let token = self.sequence.token();
        self.out.put(Record::Counter { next: self.sequence.next_token() });
        token
    }

    pub(super) fn reply(&mut self, ticket: Ticket, result: Result<Reply, Error>) {
        if self.requests.close(ticket) {
            self.out.effect(Effect::Reply { ticket, result });
        }
    }

    pub(super) fn reply_all(&mut self, tickets: Vec<Ticket>, result: &Result<Reply, Error>) {
        for ticket in tickets {
            self.reply(ticket, result.clone());
        }
    }

    pub(super) fn refuse(&mut self, request: Request, error: Error) {
        self.reply_all(request.tickets, &Err(error));
    }
}
