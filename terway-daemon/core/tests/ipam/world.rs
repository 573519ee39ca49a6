//! The world around a pool: its requests, its store, its clock, and its death.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use terway_core::clock::Moment;
use terway_core::cloud::{ErrorClass, InstanceLimits};
use terway_core::errors::Error;
use terway_core::ident::{AttachmentKey, IpStack, PodRef};
use terway_core::ipam::{
    Add, Backoff, Change, Effect, Event, Lease, NodeFacts, OpId, Pool, PoolConfig, Record, RecordKey, Reply, Snapshot,
    Ticket,
};

use crate::cloud::{Cloud, INSTANCE};
use crate::engine::{is_cloud_call, op_of};

pub(crate) const LAG: Duration = Duration::from_secs(5);

pub(crate) fn config(stack: IpStack, adapters: u32, per_eni: u32) -> PoolConfig {
    let limits = InstanceLimits { adapters, v4_per_adapter: per_eni, v6_per_adapter: per_eni };
    let mut config = PoolConfig::new(INSTANCE.into(), limits, "seed");
    config.stack = stack;
    config.vswitches = vec!["vsw-a".into(), "vsw-b".into()];
    config.max_idle = 3;
    config.batch_window = Duration::ZERO;
    config.cooling = Duration::from_secs(5);
    config.consistency_window = Duration::from_secs(10);
    config.shrink_after = Duration::from_secs(20);
    config.retry = Backoff { initial: Duration::from_millis(200), max: Duration::from_secs(10) };
    config
}

pub(crate) fn key(n: usize) -> AttachmentKey {
    AttachmentKey { network: "net".into(), container_id: format!("c{n:04}"), ifname: "eth0".into() }
}

/// What an execution of an effect comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Fine,
    /// Done, but the reply is lost: the report says `Unknown`. For the kernel: failed half-way.
    Lost,
    /// Not done.
    Fails(ErrorClass),
}

#[derive(Clone, Debug)]
pub(crate) struct Wired {
    pub(crate) lease: Lease,
    pub(crate) datapath: bool,
    pub(crate) links: bool,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a test can afford it")]
pub(crate) enum Task {
    Run(Effect),
    /// The second half of a Disconnect.
    Links {
        op: OpId,
        key: AttachmentKey,
    },
}

#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) seq: u64,
    pub(crate) task: Task,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Add,
    Del,
    Gc,
}

pub(crate) struct World {
    pub(crate) pool: Pool,
    pub(crate) config: PoolConfig,
    pub(crate) cloud: Cloud,
    pub(crate) now: Moment,
    pub(crate) kernel: BTreeMap<AttachmentKey, Wired>,
    pub(crate) store: BTreeMap<RecordKey, Record>,
    /// The bindings by what the pool wrote, durable or not, and whose each address is.
    pub(crate) bound: BTreeMap<AttachmentKey, Lease>,
    pub(crate) owners: BTreeMap<IpAddr, AttachmentKey>,
    /// Compare all there is after every step, and take what is stored through its bytes; else only what a step changed is checked.
    pub(crate) thorough: bool,
    /// Pods that the pool said are cut off.
    pub(crate) reported_loss: BTreeMap<AttachmentKey, Vec<IpAddr>>,
    pub(crate) writes: Vec<(u64, bool, Vec<Change>)>,
    pub(crate) pending: Vec<Pending>,
    seq: u64,
    pub(crate) wake: Option<Moment>,
    /// Open requests.
    pub(crate) open: BTreeMap<Ticket, (Asked, Option<AttachmentKey>)>,
    pub(crate) answers: BTreeMap<Ticket, Result<Reply, Error>>,
    next_ticket: u64,
    /// The last Add and the last successful Del of each key.
    pub(crate) last_add: BTreeMap<AttachmentKey, Ticket>,
    pub(crate) dead: BTreeMap<AttachmentKey, Ticket>,
    /// Reports of this run, to be repeated.
    pub(crate) reports: Vec<Event>,
    /// Attachments whose netns is gone.
    pub(crate) vanished: BTreeSet<AttachmentKey>,
    ops: BTreeSet<OpId>,
    /// Cloud calls of dead processes that are still on their way.
    pub(crate) strays: Vec<Effect>,
    /// What happened; only kept if somebody wants to read it.
    pub(crate) trace: Option<Vec<String>>,
}

#[allow(clippy::disallowed_methods, reason = "whoever debugs a failure says where its trace goes")]
pub(crate) fn trace_file() -> Option<String> {
    std::env::var("TERWAY_TRACE").ok()
}

impl World {
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    pub(crate) fn new(config: PoolConfig, vswitches: &[u16]) -> Self {
        let mut cloud = Cloud::new(&config, vswitches);
        cloud.note(Moment::ZERO);
        let mut world = Self {
            pool: Pool::new(config.clone()),
            config,
            cloud,
            now: Moment::from_nanos(1),
            kernel: BTreeMap::new(),
            store: BTreeMap::new(),
            bound: BTreeMap::new(),
            owners: BTreeMap::new(),
            thorough: true,
            reported_loss: BTreeMap::new(),
            writes: Vec::new(),
            pending: Vec::new(),
            seq: 0,
            wake: None,
            open: BTreeMap::new(),
            answers: BTreeMap::new(),
            next_ticket: 0,
            last_add: BTreeMap::new(),
            dead: BTreeMap::new(),
            reports: Vec::new(),
            vanished: BTreeSet::new(),
            ops: BTreeSet::new(),
            strays: Vec::new(),
            trace: trace_file().map(|_| Vec::new()),
        };
        world.step(Event::Tick);
        world
    }

    pub(crate) fn ticket(&mut self, asked: Asked, key: Option<AttachmentKey>) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.open.insert(ticket, (asked, key));
        ticket
    }

    pub(crate) fn add(&mut self, key: &AttachmentKey) -> Ticket {
        let ticket = self.ticket(Asked::Add, Some(key.clone()));
        self.last_add.insert(key.clone(), ticket);
        self.vanished.remove(key);
        self.step(Event::Add(Add {
            ticket,
            key: key.clone(),
            pod: PodRef::default(),
            netns: format!("/run/netns/{}", key.container_id),
            ip_stack: self.config.stack,
            options: "mtu=1500".into(),
        }));
        ticket
    }

    pub(crate) fn del(&mut self, key: &AttachmentKey) -> Ticket {
        let ticket = self.ticket(Asked::Del, Some(key.clone()));
        self.step(Event::Del { ticket, key: key.clone() });
        ticket
    }

    pub(crate) fn gc(&mut self, valid: BTreeSet<AttachmentKey>) -> Ticket {
        let ticket = self.ticket(Asked::Gc, None);
        self.step(Event::Gc { ticket, network: "net".into(), valid });
        ticket
    }

    pub(crate) fn configure(&mut self, config: PoolConfig) {
        self.config = config.clone();
        self.step(Event::Configure(Box::new(config)));
    }

    pub(crate) fn step(&mut self, event: Event) {
        let now = Duration::from_nanos(self.now.as_nanos());
        self.note(|| format!("{now:?} {event:?}"));
        let effects = self.pool.step(event, self.now);
        self.take(effects);
        if self.thorough {
            self.check();
        }
    }

    pub(crate) fn take(&mut self, effects: Vec<Effect>) {
        for (i, effect) in effects.into_iter().enumerate() {
            self.note(|| format!("    {effect:?}"));
            self.seq += 1;
            let seq = self.seq;
            match effect {
                Effect::Persist(changes) | Effect::PersistLazily(changes) if i > 0 => {
                    panic!("a write that is not the first of its batch: {changes:?}")
                }
                Effect::Persist(changes) => {
                    self.track(&changes);
                    self.writes.push((seq, true, changes));
                }
                Effect::PersistLazily(changes) => {
                    self.track(&changes);
                    self.writes.push((seq, false, changes));
                }
                Effect::WakeAt(at) => self.wake = Some(at),
                Effect::ReportAddressLoss { key, addresses, .. } => {
                    self.reported_loss.insert(key, addresses);
                }
                Effect::ReportAddressRecovery { key, .. } => {
                    assert!(self.reported_loss.remove(&key).is_some(), "{key} was not reported_loss");
                }
                Effect::Reply { ticket, result: Ok(Reply::Attached(lease)) } => {
                    let key = self.open.get(&ticket).and_then(|(_, key)| key.clone()).expect("an Add");
                    let wired = self.kernel.get(&key).unwrap_or_else(|| panic!("{key} is said to be attached"));
                    assert!(wired.datapath && wired.lease.addresses == lease.addresses, "{key}: {lease:?}, {wired:?}");
                    let task = Task::Run(Effect::Reply { ticket, result: Ok(Reply::Attached(lease)) });
                    self.pending.push(Pending { seq, task });
                }
                effect => {
                    self.check_order(&effect);
                    if let Some(op) = op_of(&effect) {
                        assert!(self.ops.insert(op), "{op:?} was used before");
                    }
                    self.pending.push(Pending { seq, task: Task::Run(effect) });
                }
            }
        }
    }

    /// Makes the first `count` writes durable.
    pub(crate) fn flush(&mut self, count: usize) {
        for (_, _, changes) in self.writes.drain(..count.min(self.writes.len())) {
            for change in changes {
                match change {
                    Change::Put(record) => {
                        self.store.insert(record.key(), record);
                    }
                    Change::Delete(key) => {
                        self.store.remove(&key);
                    }
                }
            }
        }
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        if !self.thorough {
            return self.store.values().cloned().collect();
        }
        let bytes: BTreeMap<_, _> =
            self.store.iter().map(|(key, record)| (key.encode().unwrap(), record.encode().unwrap())).collect();
        bytes.values().map(|bytes| Record::decode(bytes).unwrap()).collect()
    }

    /// The indices of the tasks that may run: every durable write before them is done.
    pub(crate) fn runnable(&self) -> Vec<usize> {
        let barrier = self.writes.iter().find(|(_, durable, _)| *durable).map_or(u64::MAX, |(seq, ..)| *seq);
        (0..self.pending.len()).filter(|i| self.pending[*i].seq < barrier).collect()
    }

    pub(crate) fn run(&mut self, index: usize, outcome: Outcome, choice: usize) {
        let Pending { seq, task } = self.pending.swap_remove(index);
        for event in self.execute(seq, task, outcome, choice) {
            if !matches!(event, Event::Tick) {
                self.reports.push(event.clone());
            }
            self.step(event);
        }
    }

    /// A call that a dead process had sent arrives.
    pub(crate) fn land(&mut self, index: usize) {
        if !self.strays.is_empty() {
            let stray = self.strays.swap_remove(index % self.strays.len());
            self.execute(0, Task::Run(stray), Outcome::Fine, 0);
        }
    }

    /// The process dies: some writes make it, some effects happen, some calls are still on their way, nothing is reported. Then it starts again.
    pub(crate) fn crash(&mut self, flushed: usize, ran: u64, outcome: Outcome, cloud_answers: bool, choice: usize) {
        self.note(|| format!("CRASH {flushed} {ran:b} cloud {cloud_answers}"));
        self.flush(flushed);
        let runnable = self.runnable();
        let mut tasks: Vec<_> = std::mem::take(&mut self.pending).into_iter().enumerate().collect();
        tasks.retain(|(i, _)| runnable.contains(i));
        for (i, Pending { seq, task }) in tasks {
            let (happens, arrives) = (ran >> (i % 32) & 1 == 1, ran >> (i % 32 + 32) & 1 == 1);
            if let Task::Run(effect) = &task
                && is_cloud_call(effect)
                && happens
                && !arrives
            {
                self.strays.push(effect.clone());
                continue;
            }
            if !happens {
                continue;
            }
            // Each happens, or half happens, and nobody hears of it.
            self.execute(seq, task, outcome, choice);
        }
        self.pending.clear();
        self.writes.clear();
        self.open.clear();
        self.reports.clear();
        self.ops.clear();
        self.reported_loss.clear();
        self.wake = None;
        let records = self.records();
        let enis = cloud_answers.then(|| self.cloud.stale_list(self.now, LAG, choice));
        let facts = NodeFacts { netns_gone: self.vanished.clone() };
        let snapshot = Snapshot { records, enis, facts };
        let (pool, effects) = Pool::restore(self.config.clone(), snapshot, self.now).expect("the store is consistent");
        self.pool = pool;
        self.bind_anew();
        self.take(effects);
        self.check();
    }

    pub(crate) fn advance(&mut self, by: Duration) {
        self.now = self.now.after(by);
        if by > LAG {
            // No call takes longer than the lists lag.
            while !self.strays.is_empty() {
                self.land(0);
            }
        }
        if self.wake.is_some_and(|at| at <= self.now) {
            self.wake = None;
            self.step(Event::Tick);
        }
    }
}
