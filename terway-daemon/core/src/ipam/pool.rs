//! The state machine's frame: its state, the dispatch of events, timers, and the batch of effects of one step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use sha1::{Digest, Sha1};

use super::addresses::Assigned;
use super::config::{Degradation, PoolConfig};
use super::effect::{Effect, Reply};
use super::eni::EniState;
use super::event::{ClientToken, Event, OpId, Ticket};
use super::lifecycle::Creation;
use super::pods::{Attachment, GcState, Request, Waiting};
use super::reconcile::InventoryState;
use super::record::{Change, Record, RecordKey};
use super::vswitch::VSwitches;
use crate::clock::Moment;
use crate::cloud::Eni;
use crate::errors::Error;
use crate::ident::{AttachmentKey, EniId, Family};

/// The address pool of one node. See the [module](super) for the contract.
#[derive(Debug)]
pub struct Pool {
    pub(super) config: PoolConfig,
    pub(super) now: Moment,
    pub(super) attachments: BTreeMap<AttachmentKey, Attachment>,
    pub(super) waiting: Waiting,
    /// Where the requester of each open ticket stands.
    pub(super) tickets: BTreeMap<Ticket, Place>,
    pub(super) gcs: BTreeMap<Ticket, GcState>,
    pub(super) enis: BTreeMap<EniId, EniState>,
    /// ENIs of this instance that the pool does not use.
    pub(super) foreign: Vec<Eni>,
    pub(super) creations: BTreeMap<ClientToken, Creation>,
    pub(super) vswitches: VSwitches,
    /// No ENI is created until then, and why.
    pub(super) creation_blocked: Option<(Moment, Error)>,
    /// Nothing is assigned to any ENI until then, and why.
    pub(super) assign_blocked: Option<(Moment, Error)>,
    /// ENIs in a row that were given back because their NICs never showed up.
    pub(super) lost_nics: u32,
    /// Since when more is wanted than is there or on its way.
    pub(super) demand_since: Option<Moment>,
    /// When an Add last came in.
    pub(super) last_add: Moment,
    /// When an address was last bound or freed: idle ones are reclaimed some time after.
    pub(super) last_use: Moment,
    /// When the next batch may be reclaimed.
    pub(super) reclaim_at: Option<Moment>,
    /// The warm-up is still to be done.
    pub(super) warming: bool,
    pub(super) inventory: InventoryState,
    /// Since when there are too many idle units.
    pub(super) excess_since: Option<Moment>,
    /// Uses of addresses ended so far: the clock of least-recently-used.
    pub(super) uses: u64,
    pub(super) next_token: u64,
    next_op: u64,
    timers: BTreeSet<(Moment, Timer)>,
    /// What the last `WakeAt` said, while it lies ahead.
    announced: Option<Moment>,
    pub(super) out: Batch,
}

/// See [`Pool::tickets`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Attachment(AttachmentKey),
    Gc,
}

/// What is to be looked at when its moment has come. Looking too often, or at what is gone, does nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Cooled(EniId, IpAddr),
    StaleListing(EniId, IpNetwork),
    Creation(ClientToken),
    Call(EniId, Family),
    Eni(EniId),
    Disconnect(AttachmentKey),
    Inventory,
    /// Some block has ended, or an excess is old enough: planning, which every step ends with, will see.
    Plan,
}

/// The effects of one step: at most one write, then everything else.
///
/// Writing first all that the step decided is stricter than needed for each effect, and makes every step one transaction.
#[derive(Debug, Default)]
pub(super) struct Batch {
    changes: Vec<Change>,
    durable: bool,
    effects: Vec<Effect>,
}

impl Batch {
    /// Write before any effect of this step.
    pub(super) fn put(&mut self, record: Record) {
        self.changes.push(Change::Put(record));
        self.durable = true;
    }

    /// Write before any effect of this step.
    pub(super) fn delete(&mut self, key: RecordKey) {
        self.changes.push(Change::Delete(key));
        self.durable = true;
    }

    /// Write some time.
    pub(super) fn put_lazily(&mut self, record: Record) {
        self.changes.push(Change::Put(record));
    }

    /// Write some time.
    pub(super) fn delete_lazily(&mut self, key: RecordKey) {
        self.changes.push(Change::Delete(key));
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }
}

impl Pool {
    /// The pool of a node that has nothing yet, neither on disk nor in the cloud.
    #[must_use]
    pub fn new(config: PoolConfig) -> Self {
        let mut vswitches = VSwitches::default();
        vswitches.configure(&config.vswitches);
        let warming = config.warm_up > 0;
        let mut pool = Self {
            config,
            now: Moment::ZERO,
            attachments: BTreeMap::new(),
            waiting: Waiting::default(),
            tickets: BTreeMap::new(),
            gcs: BTreeMap::new(),
            enis: BTreeMap::new(),
            foreign: Vec::new(),
            creations: BTreeMap::new(),
            vswitches,
            creation_blocked: None,
            assign_blocked: None,
            lost_nics: 0,
            demand_since: None,
            last_add: Moment::ZERO,
            last_use: Moment::ZERO,
            reclaim_at: None,
            warming,
            inventory: InventoryState::default(),
            excess_since: None,
            uses: 0,
            next_token: 0,
            next_op: 0,
            timers: BTreeSet::new(),
            announced: None,
            out: Batch::default(),
        };
        pool.inventory_at(Moment::ZERO);
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
        while let Some((at, _)) = self.timers.first()
            && *at <= self.now
        {
            let Some((_, timer)) = self.timers.pop_first() else { return };
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

    /// Plans, and closes the step.
    pub(super) fn finish(&mut self) -> Vec<Effect> {
        self.plan();
        let Batch { changes, durable, effects } = std::mem::take(&mut self.out);
        let mut all = Vec::with_capacity(effects.len() + 2);
        if !changes.is_empty() {
            all.push(if durable { Effect::Persist(changes) } else { Effect::PersistLazily(changes) });
        }
        all.extend(effects);
        if self.announced.is_some_and(|at| at <= self.now) {
            self.announced = None;
        }
        // A wake-up that comes too early because its timer went away costs one empty step, less than cancelling would.
        if let Some((next, _)) = self.timers.first()
            && self.announced.is_none_or(|at| *next < at)
        {
            self.announced = Some(*next);
            all.push(Effect::WakeAt(*next));
        }
        all
    }

    pub(super) fn wake(&mut self, at: Moment, timer: Timer) {
        self.timers.insert((at, timer));
    }

    /// The moment of the next attempt after so many failures.
    pub(super) fn retry_at(&mut self, failures: u32) -> Moment {
        self.now.after(self.config.retry.delay(failures, self.salt(self.next_op)))
    }

    /// A number that looks random and is the same for the same `number` on this node.
    pub(super) fn salt(&self, number: u64) -> u64 {
        u64::from_be_bytes(self.digest(number)[..8].try_into().unwrap_or_default())
    }

    /// Whether the cloud may be asked for anything at all.
    pub(super) fn may_ask(&self) -> bool {
        self.config.degradation != Degradation::L0
    }

    /// Whether anything may be given back to the cloud.
    pub(super) fn may_release(&self) -> bool {
        self.config.degradation == Degradation::None
    }

    pub(super) fn op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    /// A token never used before; that it is used up is written with whatever it is used for.
    pub(super) fn token(&mut self) -> ClientToken {
        let token = ClientToken(self.digest(self.next_token).iter().map(|byte| format!("{byte:02x}")).collect());
        self.next_token += 1;
        self.out.put(Record::Counter { next: self.next_token });
        token
    }

    fn digest(&self, number: u64) -> [u8; 20] {
        Sha1::new().chain_update(number.to_be_bytes()).chain_update(self.config.token_seed.as_bytes()).finalize().into()
    }

    pub(super) fn answer(&mut self, ticket: Ticket, result: Result<Reply, Error>) {
        if self.tickets.remove(&ticket).is_some() {
            self.out.effect(Effect::Reply { ticket, result });
        }
    }

    pub(super) fn answer_all(&mut self, tickets: Vec<Ticket>, result: &Result<Reply, Error>) {
        for ticket in tickets {
            self.answer(ticket, result.clone());
        }
    }

    pub(super) fn refuse(&mut self, request: Request, error: Error) {
        self.answer_all(request.tickets, &Err(error));
    }
}
