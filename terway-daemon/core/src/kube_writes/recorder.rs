//! The event recorder: equal events are one object with a count, similar ones are combined, and what is too much is dropped.
//!
//! The rules and numbers are those of client-go's event correlator (`tools/record/events_cache.go`). Unlike there, events wait in no queue: a
//! record that has changed is written when the API server takes it, with the count that it has by then.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use indexmap::IndexMap;

use super::event::{Event, EventTarget, Reason, shortened};
use super::token_bucket::TokenBucket;
use crate::clock::Moment;

/// Records, similar groups and buckets that are remembered (`maxLruCacheEntries`).
const REMEMBERED: usize = 4096;
/// Different messages of one object and reason within [`AGGREGATE_FOR`] before they are combined (`defaultAggregateMaxEvents`).
const AGGREGATE_AT: usize = 10;
/// The time after which a group of similar events begins anew (`defaultAggregateIntervalInSeconds`).
const AGGREGATE_FOR: Duration = Duration::from_secs(600);
/// Events of one object and reason: this many at once (`defaultSpamBurst`) …
const BURST: u32 = 25;
/// … and one more after each of these intervals (`defaultSpamQPS`, 1/300).
const REFILL: Duration = Duration::from_secs(300);
/// Writes to the API server by one node: this many at once …
const WRITE_BURST: u32 = 50;
/// … and five a second.
const WRITE_INTERVAL: Duration = Duration::from_millis(200);
/// Records that may wait for being written; further ones are dropped.
const WAITING: usize = 1000;

/// Refused writes of an object in a row after which it is given up.
const REFUSALS: u32 = 5;

/// A moment on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// For limits.
    pub moment: Moment,
    /// For people.
    pub wall: SystemTime,
}

/// What has become of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// It will be written, as an object of its own or in the count of another.
    Waiting,
    /// Too many events of this object and reason.
    RateLimited,
    /// Too many objects wait for being written.
    Overflow,
}

/// An event object to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventWrite {
    /// The record, for [`EventRecorder::written`].
    pub record: u64,
    /// Whether the object is to be created; else it is to be updated.
    pub is_new: bool,
    /// The object's name. Its namespace is that of the target, `default` for a node.
    pub name: String,
    /// The target.
    pub target: EventTarget,
    /// The reason.
    pub reason: Reason,
    /// The message.
    pub message: String,
    /// How many there were.
    pub count: u32,
    /// The time of the first one.
    pub first: SystemTime,
    /// The time of the last one.
    pub last: SystemTime,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing waits.
    Idle,
    /// Something waits, but nothing may be written before.
    NotBefore(Moment),
    /// Write this.
    Write(Box<EventWrite>),
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The API server has it.
    Written,
    /// The object of an update is not there any more (events live for an hour), or its name is taken.
    Recreate,
    /// The API server refuses it. A server that is just starting forbids what it allows a moment later, so it is tried again some times.
    Refused,
    /// Nobody needs it any more: its namespace is gone.
    Obsolete,
    /// It may be tried again.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Similar {
    target: EventTarget,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    similar: Similar,
    /// Empty for combined ones.
    message: String,
}

#[derive(Debug)]
struct Record {
    id: u64,
    name: String,
    message: String,
    count: u32,
    /// The count that the API server has; none before the object was created.
    written: Option<u32>,
    first: SystemTime,
    last: SystemTime,
    /// Refused writes in a row.
    refusals: u32,
}

impl Record {
    fn is_dirty(&self) -> bool {
        self.written != Some(self.count)
    }
}

#[derive(Debug)]
struct Group {
    messages: VecDeque<String>,
    last: Moment,
}

/// See the [module](self).
#[derive(Debug)]
pub struct EventRecorder {
    /// By last use, the least recent first.
    records: IndexMap<Key, Record>,
    groups: IndexMap<Similar, Group>,
    buckets: IndexMap<Similar, TokenBucket>,
    writes: TokenBucket,
    next_record: u64,
    waiting: usize,
    /// Makes names unlike those of an earlier run.
    seed: u64,
}

impl EventRecorder {
    /// A recorder without events. `seed` is different in each run of the daemon: it becomes a part of objects' names.
    #[must_use]
    pub fn new(seed: u64, now: Moment) -> Self {
        Self {
            records: IndexMap::new(),
            groups: IndexMap::new(),
            buckets: IndexMap::new(),
            writes: TokenBucket::new(WRITE_BURST, WRITE_INTERVAL, now),
            next_record: 0,
            waiting: 0,
            seed,
        }
    }

    /// Takes an event.
    pub fn record(&mut self, event: Event, at: Stamp) -> Recorded {
        let Event { target, reason, message } = event;
        let similar = Similar { target, reason };
        if bucket(&mut self.buckets, &similar, at.moment).take(at.moment).is_err() {
            return Recorded::RateLimited;
        }
        let is_combined = self.is_one_of_many(&similar, &message, at.moment);
        let (key, message) = if is_combined {
            let message = shortened(format!("(combined from similar events): {message}"));
            (Key { similar, message: String::new() }, message)
        } else {
            (Key { similar, message: message.clone() }, message)
        };
        if let Some((key, mut record)) = self.records.shift_remove_entry(&key) {
            if !record.is_dirty() {
                self.waiting += 1;
            }
            record.count = record.count.saturating_add(1);
            (record.last, record.message) = (at.wall, message);
            self.records.insert(key, record);
            return Recorded::Waiting;
        }
        if self.waiting >= WAITING {
            return Recorded::Overflow;
        }
        if self.records.len() >= REMEMBERED
            && let Some(index) = self.records.values().position(|record| !record.is_dirty())
        {
            self.records.shift_remove_index(index);
        }
        let id = self.next_record;
        self.next_record += 1;
        self.waiting += 1;
        let name = self.name(&key.similar.target, id);
        let record = Record { id, name, message, count: 1, written: None, first: at.wall, last: at.wall, refusals: 0 };
        self.records.insert(key, record);
        Recorded::Waiting
    }

    /// The next write. The same one until [`Self::written`] is told.
    pub fn next(&mut self, now: Moment) -> Next {
        let Some((key, record)) = self.records.iter().find(|(_, record)| record.is_dirty()) else { return Next::Idle };
        if let Err(until) = self.writes.take(now) {
            return Next::NotBefore(until);
        }
        Next::Write(Box::new(EventWrite {
            record: record.id,
            is_new: record.written.is_none(),
            name: record.name.clone(),
            target: key.similar.target.clone(),
            reason: key.similar.reason,
            message: record.message.clone(),
            count: record.count,
            first: record.first,
            last: record.last,
        }))
    }

    /// Takes the result of a write.
    pub fn written(&mut self, write: &EventWrite, outcome: WriteOutcome) {
        let id = self.next_record;
        let Some(index) = self.records.values().position(|record| record.id == write.record) else { return };
        match outcome {
            WriteOutcome::Written => {
                let Some((_, record)) = self.records.get_index_mut(index) else { return };
                (record.written, record.refusals) = (Some(write.count), 0);
                if !record.is_dirty() {
                    self.waiting -= 1;
                }
            }
            WriteOutcome::Recreate => {
                self.next_record += 1;
                let name = self.name(&write.target, id);
                let Some((_, record)) = self.records.get_index_mut(index) else { return };
                (record.name, record.written) = (name, None);
            }
            WriteOutcome::Refused => {
                let Some((key, mut record)) = self.records.shift_remove_index(index) else { return };
                record.refusals += 1;
                if record.refusals < REFUSALS {
                    // Behind the others, which may not be refused.
                    self.records.insert(key, record);
                } else {
                    self.waiting -= 1;
                }
            }
            WriteOutcome::Obsolete => {
                self.records.shift_remove_index(index);
                self.waiting -= 1;
            }
            WriteOutcome::Failed => {}
        }
    }

    /// Objects that wait for being written.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether there have been so many different messages that this one is combined with them.
    fn is_one_of_many(&mut self, similar: &Similar, message: &str, now: Moment) -> bool {
        let mut group = match self.groups.shift_remove(similar) {
            Some(group) if now.since(group.last) <= AGGREGATE_FOR => group,
            _ => Group { messages: VecDeque::new(), last: now },
        };
        group.last = now;
        if !group.messages.iter().any(|known| known == message) {
            group.messages.push_back(message.to_owned());
            if group.messages.len() > AGGREGATE_AT {
                group.messages.pop_front();
                return self.keep(similar, group, true);
            }
        }
        self.keep(similar, group, false)
    }

    fn keep(&mut self, similar: &Similar, group: Group, is_one_of_many: bool) -> bool {
        if self.groups.len() >= REMEMBERED {
            self.groups.shift_remove_index(0);
        }
        self.groups.insert(similar.clone(), group);
        is_one_of_many
    }

    /// A name: at most 253 bytes (RFC 1123 subdomain), unique by its last part.
    fn name(&self, target: &EventTarget, id: u64) -> String {
        let suffix = format!("{:x}{id:x}", self.seed);
        let mut object = target.name();
        // Names of objects are ASCII.
        object = object.get(..252 - suffix.len()).unwrap_or(object);
        format!("{}.{suffix}", object.trim_end_matches(['-', '.']))
    }
}

/// The bucket of an object and reason. The least recently used ones are forgotten: they are full again, or there are too many.
fn bucket<'a>(buckets: &'a mut IndexMap<Similar, TokenBucket>, similar: &Similar, now: Moment) -> &'a mut TokenBucket {
    let known = buckets.shift_remove(similar);
    if buckets.len() >= REMEMBERED {
        buckets.shift_remove_index(0);
    }
    let bucket = known.unwrap_or(TokenBucket::new(BURST, REFILL, now));
    buckets.entry(similar.clone()).or_insert(bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Stamp {
        let since = Duration::from_secs(seconds);
        Stamp { moment: Moment::ZERO.after(since), wall: SystemTime::UNIX_EPOCH + since }
    }

    fn of_pod(name: &str, message: &str) -> Event {
        let target = EventTarget::Pod { namespace: "shop".into(), name: name.into(), uid: "u".into() };
        Event::new(target, Reason::AllocIpFailed, message)
    }

    fn recorder() -> EventRecorder {
        EventRecorder::new(7, Moment::ZERO)
    }

    fn write(recorder: &mut EventRecorder, seconds: u64, outcome: WriteOutcome) -> EventWrite {
        let Next::Write(write) = recorder.next(at(seconds).moment) else { panic!("nothing to write") };
        recorder.written(&write, outcome);
        *write
    }

    #[test]
    fn equal_events_are_one_object_with_a_count_also_while_the_api_is_away() {
        let mut recorder = recorder();
        for second in 0..5 {
            assert_eq!(recorder.record(of_pod("web", "no address"), at(second)), Recorded::Waiting);
            write(&mut recorder, second, WriteOutcome::Failed);
        }
        assert_eq!(recorder.waiting(), 1);
        let first = write(&mut recorder, 5, WriteOutcome::Written);
        assert!(first.is_new);
        assert_eq!((first.count, first.first, first.last), (5, at(0).wall, at(4).wall));
        assert_eq!((recorder.next(at(6).moment), recorder.waiting()), (Next::Idle, 0));
        recorder.record(of_pod("web", "no address"), at(7));
        let second = write(&mut recorder, 7, WriteOutcome::Written);
        assert_eq!((second.is_new, second.count, &second.name), (false, 6, &first.name));
    }

    #[test]
    fn event_that_comes_while_another_is_written_is_not_lost() {
        let mut recorder = recorder();
        recorder.record(of_pod("web", "no address"), at(0));
        let Next::Write(first) = recorder.next(at(0).moment) else { panic!("nothing to write") };
        recorder.record(of_pod("web", "no address"), at(1));
        recorder.written(&first, WriteOutcome::Written);
        let second = write(&mut recorder, 1, WriteOutcome::Written);
        assert_eq!((second.is_new, second.count), (false, 2));
        assert_eq!(recorder.waiting(), 0);
    }

    #[test]
    fn expired_object_is_created_again_under_another_name() {
        let mut recorder = recorder();
        recorder.record(of_pod("web", "no address"), at(0));
        let first = write(&mut recorder, 0, WriteOutcome::Written);
        recorder.record(of_pod("web", "no address"), at(4000));
        assert!(!write(&mut recorder, 4000, WriteOutcome::Recreate).is_new);
        let again = write(&mut recorder, 4000, WriteOutcome::Written);
        assert!(again.is_new && again.name != first.name, "{again:?}");
    }

    #[test]
    fn more_than_ten_similar_events_are_combined() {
        let mut recorder = recorder();
        for number in 0..15 {
            recorder.record(of_pod("web", &format!("failure {number}")), at(number));
        }
        let messages: Vec<_> = std::iter::from_fn(|| match recorder.next(at(20).moment) {
            Next::Write(write) => {
                recorder.written(&write, WriteOutcome::Written);
                Some((write.message, write.count))
            }
            _ => None,
        })
        .collect();
        assert_eq!(messages.len(), 11, "{messages:?}");
        assert_eq!(messages[10], ("(combined from similar events): failure 14".to_owned(), 5));
        // After ten quiet minutes they are told apart again.
        recorder.record(of_pod("web", "failure 99"), at(700));
        assert_eq!(write(&mut recorder, 700, WriteOutcome::Written).message, "failure 99");
    }

    #[test]
    fn one_object_cannot_flood_and_does_not_stop_others() {
        let mut recorder = recorder();
        let taken = (0..100).filter(|_| recorder.record(of_pod("web", "x"), at(0)) == Recorded::Waiting).count();
        assert_eq!(taken, 25);
        assert_eq!(recorder.record(of_pod("other", "x"), at(0)), Recorded::Waiting);
        assert_eq!(recorder.record(of_pod("web", "x"), at(300)), Recorded::Waiting, "one more after five minutes");
        assert_eq!(recorder.record(of_pod("web", "x"), at(301)), Recorded::RateLimited);
    }

    #[test]
    fn writes_are_paced_and_waiting_objects_are_bounded() {
        let mut recorder = recorder();
        let outcomes: Vec<_> = (0..1200).map(|n| recorder.record(of_pod(&format!("p{n}"), "x"), at(0))).collect();
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Recorded::Overflow).count(), 200);
        assert_eq!(recorder.waiting(), 1000);
        let mut written = 0;
        while let Next::Write(write) = recorder.next(at(0).moment) {
            recorder.written(&write, WriteOutcome::Written);
            written += 1;
        }
        assert_eq!(written, 50);
        assert_eq!(recorder.next(at(0).moment), Next::NotBefore(Moment::ZERO.after(Duration::from_millis(200))));
        // What is remembered is bounded, too, and the records that wait stay.
        for round in 0..20u64 {
            for n in 0..500 {
                recorder.record(of_pod(&format!("r{round}-{n}"), "x"), at(1000 * round));
            }
            while let Next::Write(write) =
                recorder.next(Moment::ZERO.after(Duration::from_secs(1_000_000 * (round + 1))))
            {
                recorder.written(&write, WriteOutcome::Written);
            }
        }
        assert!(recorder.records.len() <= REMEMBERED + 1 && recorder.groups.len() <= REMEMBERED);
        assert!(recorder.buckets.len() <= REMEMBERED);
    }

    #[test]
    fn refused_event_lets_others_go_first_and_is_given_up_in_the_end() {
        let mut recorder = recorder();
        recorder.record(of_pod("web", "x"), at(0));
        recorder.record(of_pod("gone", "x"), at(0));
        write(&mut recorder, 0, WriteOutcome::Refused);
        assert_eq!(write(&mut recorder, 0, WriteOutcome::Obsolete).target.name(), "gone");
        for _ in 0..4 {
            assert_eq!(write(&mut recorder, 0, WriteOutcome::Refused).target.name(), "web");
        }
        assert_eq!((recorder.next(at(0).moment), recorder.waiting(), recorder.records.len()), (Next::Idle, 0, 0));
    }

    #[test]
    fn names_are_subdomains_of_at_most_253_bytes() {
        let recorder = recorder();
        let target = |name: &str| EventTarget::Node(name.into());
        let long = format!("{}-{}", "a".repeat(249), "b".repeat(3));
        for name in ["web", long.as_str(), &format!("{}.{}", "a".repeat(248), "b".repeat(4))] {
            let full = recorder.name(&target(name), 1);
            assert!(full.len() <= 253 && !full.contains("-.") && !full.contains(".."), "{full}");
            assert_ne!(full, recorder.name(&target(name), 2));
        }
    }
}
