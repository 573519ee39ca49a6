//! The engine, the kernel and the store around a pool, and the checks that hold after every step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use terway_core::clock::Moment;
use terway_core::cloud::{CloudError, EniStatus, ErrorClass, InstanceLimits};
use terway_core::errors::{self, Error};
use terway_core::ident::{AttachmentKey, EniId, IpStack, PodRef};
use terway_core::ipam::{
    Add, Answer, Backoff, Change, Effect, Event, Grant, NodeFacts, OpId, Phase, Pool, PoolConfig, Record, RecordKey,
    Snapshot, Ticket,
};

use crate::cloud::{Cloud, INSTANCE, error, prefixes_of, subnet};

pub(crate) const LAG: Duration = Duration::from_secs(5);

pub(crate) fn config(stack: IpStack, adapters: u32, per_eni: u32) -> PoolConfig {
    let limits = InstanceLimits { adapters, v4_per_adapter: per_eni, v6_per_adapter: per_eni };
    let mut config = PoolConfig::new(INSTANCE.into(), limits, "seed");
    config.stack = stack;
    config.vswitches = vec!["vsw-a".into(), "vsw-b".into()];
    config.max_idle = 3;
    config.gather = Duration::ZERO;
    config.cooling = Duration::from_secs(5);
    config.settle = Duration::from_secs(10);
    config.shrink_after = Duration::from_secs(20);
    config.retry = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(10) };
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
    pub(crate) grant: Grant,
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
    pub(crate) store: BTreeMap<String, Vec<u8>>,
    /// Whose attachment records are in the store.
    on_disk: BTreeSet<AttachmentKey>,
    /// Pods that the pool said are cut off.
    pub(crate) fenced: BTreeMap<AttachmentKey, Vec<IpAddr>>,
    writes: Vec<(u64, bool, Vec<Change>)>,
    pub(crate) pending: Vec<Pending>,
    seq: u64,
    wake: Option<Moment>,
    /// Open requests.
    pub(crate) open: BTreeMap<Ticket, (Asked, Option<AttachmentKey>)>,
    pub(crate) answers: BTreeMap<Ticket, Result<Answer, Error>>,
    next_ticket: u64,
    /// The last Add and the last successful Del of each key.
    last_add: BTreeMap<AttachmentKey, Ticket>,
    dead: BTreeMap<AttachmentKey, Ticket>,
    /// Reports of this run, to be repeated.
    pub(crate) reports: Vec<Event>,
    /// Attachments whose netns is gone.
    pub(crate) vanished: BTreeSet<AttachmentKey>,
    ops: BTreeSet<OpId>,
    /// Cloud calls of dead processes that are still on their way.
    strays: Vec<Effect>,
    /// What happened; only kept if somebody wants to read it.
    pub(crate) trace: Option<Vec<String>>,
}

#[allow(clippy::disallowed_methods, reason = "whoever debugs a failure says where its trace goes")]
pub(crate) fn trace_file() -> Option<String> {
    std::env::var("TERWAY_TRACE").ok()
}

impl World {
    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    pub(crate) fn new(config: PoolConfig, vswitches: &[u16]) -> Self {
        let cloud = Cloud::new(&config, vswitches);
        let mut world = Self {
            pool: Pool::new(config.clone()),
            config,
            cloud,
            now: Moment::from_nanos(1),
            kernel: BTreeMap::new(),
            store: BTreeMap::new(),
            on_disk: BTreeSet::new(),
            fenced: BTreeMap::new(),
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
            want: self.config.stack,
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
        self.check();
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for (i, effect) in effects.into_iter().enumerate() {
            self.note(|| format!("    {effect:?}"));
            self.seq += 1;
            let seq = self.seq;
            match effect {
                Effect::Persist(changes) | Effect::PersistLazily(changes) if i > 0 => {
                    panic!("a write that is not the first of its batch: {changes:?}")
                }
                Effect::Persist(changes) => self.writes.push((seq, true, changes)),
                Effect::PersistLazily(changes) => self.writes.push((seq, false, changes)),
                Effect::WakeAt(at) => self.wake = Some(at),
                Effect::Fence { key, addresses, .. } => {
                    self.fenced.insert(key, addresses);
                }
                Effect::Unfence { key, .. } => {
                    assert!(self.fenced.remove(&key).is_some(), "{key} was not fenced");
                }
                Effect::Answer { ticket, result: Ok(Answer::Attached(grant)) } => {
                    let key = self.open.get(&ticket).and_then(|(_, key)| key.clone()).expect("an Add");
                    let wired = self.kernel.get(&key).unwrap_or_else(|| panic!("{key} is said to be attached"));
                    assert!(wired.datapath && wired.grant.addresses == grant.addresses, "{key}: {grant:?}, {wired:?}");
                    let task = Task::Run(Effect::Answer { ticket, result: Ok(Answer::Attached(grant)) });
                    self.pending.push(Pending { seq, task });
                }
                effect => {
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
                        if let Record::Attachment(a) = &record {
                            self.on_disk.insert(a.key.clone());
                        }
                        self.store.insert(record.key().encode().unwrap(), record.encode().unwrap());
                    }
                    Change::Delete(key) => {
                        if let RecordKey::Attachment(key) = &key {
                            self.on_disk.remove(key);
                        }
                        self.store.remove(&key.encode().unwrap());
                    }
                }
            }
        }
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        self.store.values().map(|bytes| Record::decode(bytes).unwrap()).collect()
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

    /// Runs a task and returns what is to be reported.
    fn execute(&mut self, seq: u64, task: Task, outcome: Outcome, choice: usize) -> Vec<Event> {
        self.note(|| format!("  run {task:?} {outcome:?}"));
        let effect = match task {
            Task::Links { op, key } => {
                if outcome != Outcome::Fine {
                    return vec![Event::DisconnectFailed { op, key, error: Error::new(errors::NET_FAILED, "") }];
                }
                self.kernel.remove(&key);
                return vec![Event::Disconnected { op, key }];
            }
            Task::Run(effect) => effect,
        };
        // A request that was served is not refused when it comes again: its token is known.
        let outcome = match outcome {
            Outcome::Fails(ErrorClass::Quota | ErrorClass::VSwitchExhausted) if self.cloud.knows(&effect) => {
                Outcome::Fine
            }
            outcome => outcome,
        };
        let events = match &effect {
            Effect::Connect { op, key, grant, .. } => vec![self.connect(*op, key, grant, outcome)],
            Effect::Disconnect { op, key, .. } => {
                if let Outcome::Fails(_) = outcome {
                    let error = Error::new(errors::BPF_FAILED, "");
                    return vec![Event::DisconnectFailed { op: *op, key: key.clone(), error }];
                }
                if let Some(wired) = self.kernel.get_mut(key) {
                    wired.datapath = false;
                }
                self.pending.push(Pending { seq, task: Task::Links { op: *op, key: key.clone() } });
                vec![Event::Unplugged { op: *op, key: key.clone() }]
            }
            Effect::Answer { ticket, result } => {
                self.answered(*ticket, result.clone());
                vec![]
            }
            Effect::CreateEni { op, .. } => {
                vec![Event::EniCreated { op: *op, result: self.call(outcome, |cloud| cloud.create(&effect)) }]
            }
            Effect::AttachEni { op, eni } => {
                let result = self.call(outcome, |cloud| cloud.attach(eni));
                vec![Event::EniAttached { op: *op, eni: eni.clone(), result }]
            }
            Effect::ConfigureNic { op, eni, .. } => {
                let there = self.cloud.enis.get(eni).is_some_and(|eni| eni.status == EniStatus::InUse);
                let (op, eni) = (*op, eni.clone());
                vec![if there && outcome == Outcome::Fine {
                    Event::NicReady { op, eni, ifindex: 7, subnet: subnet() }
                } else {
                    Event::NicFailed { op, eni, error: Error::new(errors::NIC_MISSING, "") }
                }]
            }
            Effect::Assign { op, token, eni, family, count } => {
                assert!(*count > 0 && *count <= self.config.batch);
                let result = self.call(outcome, |cloud| cloud.assign(token, eni, *family, *count));
                vec![Event::Assigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::Unassign { op, eni, family, addresses } => {
                let nets: Vec<_> = addresses.iter().map(|a| IpNet::from(*a)).collect();
                self.check_unheld(eni, &nets);
                let result = self.call(outcome, |cloud| cloud.unassign(eni, addresses));
                vec![Event::Unassigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::AssignPrefixes { op, token, eni, family, count } => {
                assert!(*count > 0 && *count <= self.config.batch);
                let result = self.call(outcome, |cloud| cloud.assign_prefixes(token, eni, *family, *count));
                vec![Event::PrefixesAssigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::UnassignPrefixes { op, eni, family, prefixes } => {
                self.check_unheld(eni, prefixes);
                let result = self.call(outcome, |cloud| cloud.unassign_prefixes(eni, prefixes));
                vec![Event::PrefixesUnassigned { op: *op, eni: eni.clone(), family: *family, result }]
            }
            Effect::DescribeVSwitches { op, ids } => {
                let result = self.call(outcome, |cloud| Ok(cloud.count(ids)));
                vec![Event::VSwitches { op: *op, result }]
            }
            Effect::Detach { op, eni } => {
                let held: Vec<_> = self
                    .cloud
                    .enis
                    .get(eni)
                    .into_iter()
                    .flat_map(|e| {
                        let v4 = e.v4.iter().map(|a| IpNet::from(IpAddr::V4(*a)));
                        v4.chain(e.v6.iter().map(|a| IpNet::from(IpAddr::V6(*a)))).chain(prefixes_of(e))
                    })
                    .collect();
                self.check_unheld(eni, &held);
                let result = self.call(outcome, |cloud| cloud.detach(eni));
                vec![Event::Detached { op: *op, eni: eni.clone(), result }]
            }
            Effect::Delete { op, eni } => {
                let result = self.call(outcome, |cloud| cloud.delete(eni));
                vec![Event::Deleted { op: *op, eni: eni.clone(), result }]
            }
            Effect::TakeInventory { op } => {
                let lists = self.cloud.stale_list(self.now, LAG, choice);
                let result = match outcome {
                    Outcome::Fine => Ok(lists),
                    _ => Err(error(ErrorClass::Unknown, "")),
                };
                vec![Event::Inventory { op: *op, result }]
            }
            Effect::Persist(_)
            | Effect::PersistLazily(_)
            | Effect::WakeAt(_)
            | Effect::Fence { .. }
            | Effect::Unfence { .. } => unreachable!(),
        };
        self.cloud.note(self.now);
        events
    }

    fn call<T>(
        &mut self,
        outcome: Outcome,
        call: impl FnOnce(&mut Cloud) -> Result<T, CloudError>,
    ) -> Result<T, CloudError> {
        match outcome {
            Outcome::Fine => call(&mut self.cloud),
            Outcome::Lost => {
                let _lost = call(&mut self.cloud);
                Err(error(ErrorClass::Unknown, ""))
            }
            Outcome::Fails(class) => Err(error(class, "Injected")),
        }
    }

    /// Nothing on the node holds these addresses of this ENI: no pod in the kernel, no binding in the pool or on disk. (An address that a
    /// call took from the ENI without our hearing of it may be on another one by now.)
    fn check_unheld(&self, eni: &EniId, nets: &[IpNet]) {
        let within = |a: IpAddr| nets.iter().any(|net| net.contains(&a));
        let holds = |grant: &Grant| grant.eni == *eni && grant.addresses.iter().any(within);
        for (key, wired) in &self.kernel {
            assert!(!holds(&wired.grant), "an address of {key} is given back");
        }
        for view in self.pool.list() {
            assert!(!holds(&view.grant), "an address of {} is given back", view.key);
        }
        for record in self.records() {
            if let Record::Attachment(a) = record {
                assert!(!holds(&a.grant), "an address of {} is given back, and bound on disk", a.key);
            }
        }
    }

    fn connect(&mut self, op: OpId, key: &AttachmentKey, grant: &Grant, outcome: Outcome) -> Event {
        let key = key.clone();
        if let Some(del) = self.dead.get(&key) {
            assert!(self.last_add.get(&key) > Some(del), "{key} is wired after its DEL was answered");
        }
        for (other, wired) in &self.kernel {
            let shared = wired.grant.addresses.iter().any(|a| grant.addresses.iter().any(|b| a == b));
            assert!(*other == key || !shared, "{key} and {other} share an address: {grant:?}");
        }
        for address in grant.addresses.iter() {
            let taken = |what| self.cloud.taken.contains(&(grant.eni.clone(), what));
            let excused = taken(None) || taken(Some(address));
            assert!(excused || self.cloud.has(&grant.eni, address), "{address} is not on {}", grant.eni);
        }
        let error = Error::new(errors::NET_FAILED, "injected");
        match outcome {
            Outcome::Fine => {
                self.kernel.insert(key.clone(), Wired { grant: grant.clone(), datapath: true, links: true });
                Event::Connected { op, key }
            }
            Outcome::Lost => {
                self.kernel.insert(key.clone(), Wired { grant: grant.clone(), datapath: false, links: true });
                Event::ConnectFailed { op, key, error, undone: false }
            }
            Outcome::Fails(_) => {
                self.kernel.remove(&key);
                Event::ConnectFailed { op, key, error, undone: true }
            }
        }
    }

    fn answered(&mut self, ticket: Ticket, result: Result<Answer, Error>) {
        let (asked, key) =
            self.open.remove(&ticket).unwrap_or_else(|| panic!("{ticket:?} is answered twice, or never asked"));
        match (&result, asked, key) {
            // Checked when it was decided: it may have been deleted since.
            (Ok(Answer::Attached(_)), Asked::Add, Some(_)) => {}
            (Ok(Answer::Detached), Asked::Del, Some(key)) => {
                if self.last_add.get(&key).is_none_or(|add| *add < ticket) {
                    let wired = self.kernel.get(&key).is_some_and(|wired| wired.datapath);
                    assert!(!wired, "DEL of {key} is answered while the datapath knows it");
                    let on_disk = self.store.get(&RecordKey::Attachment(key.clone()).encode().unwrap());
                    if let Some(Record::Attachment(record)) = on_disk.map(|bytes| Record::decode(bytes).unwrap()) {
                        assert_eq!(record.phase, Phase::Releasing, "DEL of {key} is answered and not on disk");
                    }
                }
                self.dead.insert(key, ticket);
            }
            (Ok(Answer::Collected(_)), Asked::Gc, None) | (Err(_), ..) => {}
            (result, asked, key) => panic!("{asked:?} of {key:?} is answered with {result:?}"),
        }
        self.answers.insert(ticket, result);
    }

    /// What holds after every step.
    pub(crate) fn check(&self) {
        let mut owners: BTreeMap<IpAddr, AttachmentKey> = BTreeMap::new();
        let views = self.pool.list();
        for view in &views {
            assert!(!view.grant.addresses.is_empty());
            for address in view.grant.addresses.iter() {
                if let Some(other) = owners.insert(address, view.key.clone()) {
                    panic!("{address} is bound to {other} and {}", view.key);
                }
            }
        }
        for (key, wired) in &self.kernel {
            let bound = views.binary_search_by(|view| view.key.cmp(key)).map(|i| &views[i]);
            let bound = bound.unwrap_or_else(|_| panic!("{key} is in the kernel and unknown to the pool"));
            assert_eq!(bound.grant.addresses, wired.grant.addresses, "{key}");
            assert!(self.on_disk.contains(key), "{key} is in the kernel and not on disk");
        }
        let stats = self.pool.stats();
        assert_eq!(stats.bound as usize, views.len());
        let mut calls = BTreeSet::new();
        for pending in &self.pending {
            if let Task::Run(
                Effect::Assign { eni, family, .. }
                | Effect::Unassign { eni, family, .. }
                | Effect::AssignPrefixes { eni, family, .. }
                | Effect::UnassignPrefixes { eni, family, .. },
            ) = &pending.task
            {
                assert!(calls.insert((eni.clone(), *family)), "two calls at once about {family} of {eni}");
            }
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
        self.fenced.clear();
        self.wake = None;
        let records = self.records();
        let enis = cloud_answers.then(|| self.cloud.stale_list(self.now, LAG, choice));
        let facts = NodeFacts { netns_gone: self.vanished.clone() };
        let snapshot = Snapshot { records, enis, facts };
        let (pool, effects) = Pool::restore(self.config.clone(), snapshot, self.now).expect("the store is consistent");
        self.pool = pool;
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

    /// The tasks of one kind that may run, with their effects.
    pub(crate) fn find(&self, wanted: impl Fn(&Effect) -> bool) -> Vec<Effect> {
        let tasks = self.runnable().into_iter().map(|i| &self.pending[i].task);
        tasks
            .filter_map(|task| if let Task::Run(effect) = task { Some(effect.clone()) } else { None })
            .filter(wanted)
            .collect()
    }

    /// Runs the first task of one kind; everything before it is on disk.
    pub(crate) fn run_one(&mut self, outcome: Outcome, wanted: impl Fn(&Effect) -> bool) {
        self.flush(usize::MAX);
        let index = self.runnable().into_iter().find(|i| matches!(&self.pending[*i].task, Task::Run(e) if wanted(e)));
        self.run(index.expect("no such effect is pending"), outcome, usize::MAX);
    }

    /// Runs answers only, and says what one ticket got.
    pub(crate) fn answer(&mut self, ticket: Ticket) -> Option<Result<Answer, Error>> {
        self.flush(usize::MAX);
        while let Some(i) =
            self.runnable().into_iter().find(|i| matches!(self.pending[*i].task, Task::Run(Effect::Answer { .. })))
        {
            self.run(i, Outcome::Fine, 0);
        }
        self.answers.get(&ticket).cloned()
    }

    /// A pod that is there, and what it got.
    pub(crate) fn granted(&mut self, n: usize) -> Grant {
        let ticket = self.add(&key(n));
        self.drive();
        match self.answer(ticket) {
            Some(Ok(Answer::Attached(grant))) => grant,
            other => panic!("pod {n}: {other:?}"),
        }
    }

    /// Everything works from now on: runs all there is to run, and lets `time` pass.
    pub(crate) fn settle(&mut self, time: Duration) {
        let end = self.now.after(time);
        while !self.strays.is_empty() {
            self.land(0);
        }
        for _ in 0..5_000 {
            self.flush(usize::MAX);
            if let Some(index) = self.runnable().first() {
                self.run(*index, Outcome::Fine, usize::MAX);
                continue;
            }
            let Some(next) = self.wake.filter(|next| *next <= end) else {
                self.advance(end.since(self.now));
                return;
            };
            self.advance(next.since(self.now));
        }
        panic!("the pool never comes to rest");
    }

    /// As [`World::settle`], but effects take time. Returns how long it took until nothing but the clock was left.
    pub(crate) fn settle_timed(&mut self, time: Duration, takes: impl Fn(&Effect) -> Duration) -> Duration {
        let (begun, end) = (self.now, self.now.after(time));
        let (mut due, mut last): (BTreeMap<u64, Moment>, _) = (BTreeMap::new(), self.now);
        loop {
            self.flush(usize::MAX);
            for pending in &self.pending {
                let long = if let Task::Run(effect) = &pending.task { takes(effect) } else { Duration::ZERO };
                due.entry(pending.seq).or_insert(self.now.after(long));
            }
            let next = self.pending.iter().map(|pending| (due[&pending.seq], pending.seq)).min();
            let wake = self.wake.filter(|at| next.is_none_or(|(when, _)| *at < when) && *at <= end);
            if let Some(at) = wake {
                self.advance(at.since(self.now));
            } else if let Some((when, seq)) = next {
                self.now = self.now.max(when);
                last = self.now;
                let index = self.pending.iter().position(|pending| pending.seq == seq).expect("it is pending");
                self.run(index, Outcome::Fine, usize::MAX);
            } else {
                return last.since(begun);
            }
        }
    }

    /// Runs effects as they come, without letting time pass.
    pub(crate) fn drive(&mut self) {
        self.settle(Duration::ZERO);
    }
}

const fn is_cloud_call(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::CreateEni { .. }
            | Effect::AttachEni { .. }
            | Effect::Assign { .. }
            | Effect::Unassign { .. }
            | Effect::AssignPrefixes { .. }
            | Effect::UnassignPrefixes { .. }
            | Effect::Detach { .. }
            | Effect::Delete { .. }
    )
}

pub(crate) fn op_of(effect: &Effect) -> Option<OpId> {
    match effect {
        Effect::Connect { op, .. }
        | Effect::Disconnect { op, .. }
        | Effect::CreateEni { op, .. }
        | Effect::AttachEni { op, .. }
        | Effect::ConfigureNic { op, .. }
        | Effect::Assign { op, .. }
        | Effect::Unassign { op, .. }
        | Effect::AssignPrefixes { op, .. }
        | Effect::UnassignPrefixes { op, .. }
        | Effect::DescribeVSwitches { op, .. }
        | Effect::Detach { op, .. }
        | Effect::Delete { op, .. }
        | Effect::TakeInventory { op } => Some(*op),
        Effect::Persist(_)
        | Effect::PersistLazily(_)
        | Effect::Answer { .. }
        | Effect::Fence { .. }
        | Effect::Unfence { .. }
        | Effect::WakeAt(_) => None,
    }
}
