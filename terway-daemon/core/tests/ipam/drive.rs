//! Ways to let a story go on.

use std::collections::BTreeMap;
use std::time::Duration;

use terway_core::clock::Moment;
use terway_core::errors::Error;
use terway_core::ipam::{Effect, Event, Lease, Reply, Ticket};

use crate::world::{Outcome, Pending, Task, World, key};

impl World {
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
    pub(crate) fn answer(&mut self, ticket: Ticket) -> Option<Result<Reply, Error>> {
        self.flush(usize::MAX);
        while let Some(i) =
            self.runnable().into_iter().find(|i| matches!(self.pending[*i].task, Task::Run(Effect::Reply { .. })))
        {
            self.run(i, Outcome::Fine, 0);
        }
        self.answers.get(&ticket).cloned()
    }

    /// A pod that is there, and what it got.
    pub(crate) fn leased(&mut self, n: usize) -> Lease {
        let ticket = self.add(&key(n));
        self.drive();
        match self.answer(ticket) {
            Some(Ok(Reply::Attached(lease))) => lease,
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

    /// Every deadline passes: each request that is open is answered in that very step, and once.
    pub(crate) fn give_up(&mut self) {
        let answered = |world: &Self, ticket: Ticket| {
            let hit = |p: &&Pending| matches!(&p.task, Task::Run(Effect::Reply { ticket: t, .. }) if *t == ticket);
            world.pending.iter().filter(hit).count()
        };
        let open: Vec<_> = self.open.keys().copied().collect();
        for ticket in open {
            if answered(self, ticket) == 0 {
                self.step(Event::Cancel { ticket });
            }
            assert_eq!(answered(self, ticket), 1, "{ticket:?}");
        }
    }

    /// Runs effects as they come, without letting time pass.
    pub(crate) fn drive(&mut self) {
        self.settle(Duration::ZERO);
    }
}
