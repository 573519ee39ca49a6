//! Garbage collection of the flow tables: counts entries, deletes dead ones, and corrects the backends' active connection counts.
//!
//! Reading and deleting are apart: the whole table is read in batches and keys of candidates are collected; then each of them is read
//! again, with all that its validity depends on, and deleted if it is still dead. Between that second lookup and the deletion lie
//! microseconds, or more if the thread is preempted, in which a packet may use the entry or a new connection may take its place: the
//! deletion returns the value that was deleted, and if it is another one it is inserted again
//! ([`Elements::delete_if`](crate::bpf::elements::Elements::delete_if)).

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use aya::Pod;
use terway_abi::{Flow, FlowDirection, FlowKey, NO_BACKEND, backend_flags, flow_flags};
use terway_core::conntrack::{Connection, DirectionState, Timeouts, Validity};

use super::reverse_entry::{self, KeyOrder};
use super::validity::ValiditySnapshot;
use super::{FlowMap, FlowTables, has_nat, idle, now};
use crate::bpf::error::BpfError;
use crate::bpf::service_maps::MAX_UNUSED_BACKENDS;

/// Options of a garbage collection.
#[derive(Clone, Copy, Debug)]
pub struct GcOptions {
    /// Timeouts by which entries expire.
    pub timeouts: Timeouts,
    /// Delete dead entries; otherwise they are only counted.
    pub delete: bool,
    /// Correct the active connection counts of backends ([`terway_abi::names::ACTIVE_CONNS`]).
    pub recount_connections: bool,
    /// [`GcReport::began`] of the previous run: entries that were created later count as new.
    pub previous_began: Option<u32>,
}

/// Above this usage a table may have been full since the last run.
const CROWDED: f64 = 0.7;

/// What a garbage collection found in the table of one family, in entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilyGcReport {
    /// The capacity of the table.
    pub capacity: u64,
    /// Entries before the deletion.
    pub used: u64,
    /// Invalid entries: an epoch or the backend generation that they were decided by has changed.
    pub invalid: u64,
    /// Valid entries that were idle for longer than their timeout, as far as one direction alone tells.
    pub expired: u64,
    /// Invalid entries that were deleted.
    pub deleted_invalid: u64,
    /// Expired entries that were deleted.
    pub deleted_expired: u64,
    /// Entries that were created before the previous run began.
    pub old: u64,
    /// Entries that were created between the previous run and this one.
    pub new: u64,
}

impl FamilyGcReport {
    /// Entries that were deleted.
    #[must_use]
    pub const fn deleted(&self) -> u64 {
        self.deleted_invalid + self.deleted_expired
    }
}

/// Report of a garbage collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Jiffies when it began.
    pub began: u32,
    /// How long it took.
    pub took: Duration,
    /// IPv4 and IPv6.
    pub families: [FamilyGcReport; 2],
    /// Backends whose active connection count was corrected.
    pub counts_corrected: u64,
}

/// Active connections by backend, counted anew.
struct ConnectionCounts {
    counts: BTreeMap<u32, u64>,
    /// The map's values before the tables were read.
    before: HashMap<u32, u64>,
    /// Backends by address, port and protocol, for connections that were translated at the socket: their tuple has no frontend.
    by_address: HashMap<([u32; 4], u16, u8), u32>,
}

impl FlowTables {
    /// Garbage collection of both tables: counts entries, and as the options say deletes dead ones and corrects the active connection
    /// counts of backends.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn collect_garbage(&self, options: &GcOptions) -> Result<GcReport, BpfError> {
        let (start, began) = (Instant::now(), now(self.hz));
        let mut report = GcReport { began, ..GcReport::default() };
        let mut counts = if options.recount_connections { Some(self.read_connection_counts()?) } else { None };
        // Read after the counts: a connection of a backend that is removed meanwhile is not counted.
        let snapshot = ValiditySnapshot::read(self)?;
        let widen_v4 = |a: u32| ([a, 0, 0, 0], 0);
        let widen_v6 = |a: [u32; 4]| (a, backend_flags::V6);
        report.families[0] = self.collect_family(&self.v4, options, began, &snapshot, counts.as_mut(), widen_v4)?;
        report.families[1] = self.collect_family(&self.v6, options, began, &snapshot, counts.as_mut(), widen_v6)?;
        if let Some(counts) = counts {
            report.counts_corrected = self.correct_connection_counts(&counts)?;
        }
        report.took = start.elapsed();
        Ok(report)
    }

    fn read_connection_counts(&self) -> Result<ConnectionCounts, BpfError> {
        let mut counts =
            ConnectionCounts { counts: BTreeMap::new(), before: HashMap::new(), by_address: HashMap::new() };
        let mut unused = 0;
        self.backends.each(|number, backend| {
            unused = if backend.generation == 0 && *number != NO_BACKEND { unused + 1 } else { 0 };
            if backend.protocol != 0 {
                let family = u8::from(backend.flags & backend_flags::V6 != 0);
                counts.by_address.insert((backend.address, backend.port, backend.protocol | family << 7), *number);
                counts.counts.insert(*number, 0);
            }
            if unused > MAX_UNUSED_BACKENDS { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let last = counts.counts.last_key_value().map_or(0, |(last, _)| *last);
        self.connection_counts.each(|number, count| {
            if *count != 0 {
                counts.before.insert(*number, *count);
            }
            if *number >= last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(counts)
    }

    /// Writes the counted connections, plus those that programs have added since; the number of backends whose count was wrong.
    fn correct_connection_counts(&self, counts: &ConnectionCounts) -> Result<u64, BpfError> {
        let mut wrong = Vec::new();
        let last = counts.counts.last_key_value().map_or(0, |(last, _)| *last);
        self.connection_counts.each(|number, present| {
            if let Some(counted) = counts.counts.get(number) {
                let before = counts.before.get(number).copied().unwrap_or(0);
                let right = counted + present.saturating_sub(before);
                if *present != right {
                    wrong.push((*number, right));
                }
            }
            if *number >= last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        // An increment by a program between reading and writing is lost until the next run.
        wrong.iter().try_for_each(|(number, right)| self.connection_counts.put(number, right, 0).map(drop))?;
        Ok(wrong.len() as u64)
    }

    fn collect_family<A: KeyOrder>(
        &self,
        map: &FlowMap<A>,
        options: &GcOptions,
        began: u32,
        snapshot: &ValiditySnapshot<'_>,
        mut counts: Option<&mut ConnectionCounts>,
        widen: impl Fn(A) -> ([u32; 4], u8),
    ) -> Result<FamilyGcReport, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let mut report = FamilyGcReport { capacity: map.capacity().into(), ..FamilyGcReport::default() };
        // Dead entries are deleted first: no packet can make them valid again.
        let (mut dead, mut idle_candidates, mut rerouted) = (Vec::new(), Vec::new(), Vec::new());
        let mut failed = Ok(());
        map.each(|key, flow| {
            report.used += 1;
            let age = began.wrapping_sub(flow.created).cast_signed();
            let old =
                options.previous_began.is_none_or(|previous| previous.wrapping_sub(flow.created).cast_signed() > 0);
            // Entries that are created while this run reads count in the next one.
            report.old += u64::from(age > 0 && old);
            report.new += u64::from(age > 0 && !old);
            let validity = match snapshot.validity(flow) {
                Ok(validity) => validity,
                Err(error) => {
                    failed = Err(error);
                    return ControlFlow::Break(());
                }
            };
            report.invalid += u64::from(validity != Validity::Current);
            match validity {
                Validity::Dead => {
                    dead.push(*key);
                    return ControlFlow::Continue(());
                }
                Validity::Rerouted => rerouted.push(*key),
                Validity::Current => {}
            }
            // With NAT this entry is one direction only. The connection has expired at the earliest if the other one is idle and was reset.
            let own = connection(key, flow, None, now(self.hz), self.hz);
            if validity == Validity::Current && options.timeouts.expired(&own) {
                report.expired += 1;
            }
            if could_be_expired(&options.timeouts, &own, has_nat(flow)) {
                idle_candidates.push(*key);
            }
            if let Some(counts) = &mut counts
                && age > 0
                && !is_closing(flow)
                && !options.timeouts.expired(&own)
            {
                count_connection(counts, key, flow, &widen);
            }
            ControlFlow::Continue(())
        })?;
        failed?;
        let crowded = report.used as f64 > CROWDED * report.capacity as f64;
        if crowded {
            report.deleted_invalid += self.delete_unpaired_nat(map, began)?;
        }
        if !options.delete {
            return Ok(report);
        }
        for key in dead {
            if let Some(flow) = map.get(&key)?
                && snapshot.validity_now(&flow)? == Validity::Dead
                && map.delete_if(&key, |current| is_unchanged(&flow, current))?
            {
                report.deleted_invalid += 1;
            }
        }
        for key in idle_candidates {
            report.deleted_expired += self.delete_if_over(map, &key, &options.timeouts, Validity::Current)?;
        }
        for key in if crowded { rerouted } else { Vec::new() } {
            let validity = map.get(&key)?.map(|flow| snapshot.validity_now(&flow)).transpose()?;
            let validity = validity.unwrap_or(Validity::Current);
            report.deleted_invalid += self.delete_if_over(map, &key, &options.timeouts, validity)?;
        }
        Ok(report)
    }

    /// Deletes NAT entries of the original direction whose reply entry was evicted; the number of entries.
    ///
    /// A full LRU table evicts single entries, so it may evict one of a pair. Replies then reach the client without reverse NAT, with
    /// the backend's address, for as long as packets of the original direction refresh the other entry. Without that entry the next
    /// packet is decided anew: a datagram gets its reply, a TCP connection is reset.
    fn delete_unpaired_nat<A: KeyOrder>(&self, map: &FlowMap<A>, began: u32) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let mut pairs = Vec::new();
        map.each(|key, flow| {
            let is_original = flow.directions[0].flags & flow_flags::REPLY == 0;
            // The two entries of a connection are created one after the other.
            let is_complete = began.wrapping_sub(flow.created).cast_signed() > 0;
            if has_nat(flow) && is_original && is_complete {
                pairs.extend(reverse_entry::keys(key, flow).map(|reverse| (*key, reverse)));
            }
            ControlFlow::Continue(())
        })?;
        let mut deleted = 0;
        for (key, reverse) in pairs {
            let reply = map.get(&reverse)?;
            let is_paired =
                reply.is_some_and(|flow| has_nat(&flow) && reverse_entry::keys(&reverse, &flow).any(|k| k == key));
            if !is_paired {
                deleted += u64::from(map.delete(&key)?);
            }
        }
        Ok(deleted)
    }

    /// Deletes an entry and its reverse entry if the connection is over by what both say now; the number of entries. Rerouted entries are
    /// passed only of a crowded table.
    fn delete_if_over<A: KeyOrder>(
        &self,
        map: &FlowMap<A>,
        key: &FlowKey<A>,
        timeouts: &Timeouts,
        validity: Validity,
    ) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let Some(flow) = map.get(key)? else { return Ok(0) };
        let mut reverse = None;
        if has_nat(&flow) {
            for other_key in reverse_entry::keys(key, &flow) {
                // The key may be another connection's by now.
                let other =
                    map.get(&other_key)?.filter(|other| reverse_entry::are_paired((key, &flow), (&other_key, other)));
                reverse = reverse.or(other.map(|other| (other_key, other)));
            }
        }
        let whole =
            connection(key, &flow, reverse.as_ref().map(|(_, other)| &other.directions[0]), now(self.hz), self.hz);
        if !timeouts.should_delete(&whole, validity, validity == Validity::Rerouted) {
            return Ok(0);
        }
        let deleted = map.delete_if(key, |current| is_unchanged(&flow, current))?;
        match reverse {
            Some((other_key, other)) if deleted => {
                Ok(1 + u64::from(map.delete_if(&other_key, |current| is_unchanged(&other, current))?))
            }
            _ => Ok(deleted.into()),
        }
    }
}

/// Whether no packet has used an entry since it was read, and no other connection has taken its place.
fn is_unchanged<A>(read: &Flow<A>, current: &Flow<A>) -> bool {
    let uses = |flow: &Flow<A>| (flow.created, flow.directions.map(|side| (side.packets, side.last_seen)));
    uses(read) == uses(current)
}

/// The connection of an entry; `reverse` is the other direction if that has an entry of its own.
fn connection<A>(key: &FlowKey<A>, flow: &Flow<A>, reverse: Option<&FlowDirection>, now: u32, hz: u32) -> Connection {
    let seen = |side: &FlowDirection| DirectionState {
        any: side.packets > 0,
        idle: idle(side.last_seen, now, hz),
        fin: side.flags & flow_flags::FIN != 0,
        rst: side.flags & flow_flags::RST != 0,
    };
    let [own, other] = &flow.directions;
    let sides = if has_nat(flow) {
        let own = seen(own);
        // Without a reverse entry only this direction counts.
        [own, reverse.map_or(DirectionState { any: false, idle: own.idle, fin: false, rst: false }, seen)]
    } else {
        [seen(own), seen(other)]
    };
    Connection { protocol: key.protocol(), sides }
}

/// Whether the connection may have expired, depending on its other direction, which is unknown if `one_sided`.
fn could_be_expired(timeouts: &Timeouts, own: &Connection, one_sided: bool) -> bool {
    if !one_sided {
        return timeouts.expired(own);
    }
    let [seen, _] = own.sides;
    let with = |other: DirectionState| timeouts.expired(&Connection { sides: [seen, other], ..*own });
    let silent = DirectionState { any: false, idle: seen.idle, fin: false, rst: false };
    let replied = DirectionState { any: true, ..silent };
    with(silent) || with(replied) || with(DirectionState { fin: true, rst: true, ..replied })
}

/// Whether the connection is being closed or was reset, as far as this entry tells; then it is not counted as active. With NAT the
/// original direction is enough: the client closes when it is done.
fn is_closing<A>(flow: &Flow<A>) -> bool {
    let [one, other] = &flow.directions;
    (one.flags | other.flags) & (flow_flags::FIN | flow_flags::RST) != 0
}

/// Counts an active connection for its backend. Entries of replies are not counted.
fn count_connection<A: KeyOrder>(
    counts: &mut ConnectionCounts,
    key: &FlowKey<A>,
    flow: &Flow<A>,
    widen: &impl Fn(A) -> ([u32; 4], u8),
) {
    let [side, _] = &flow.directions;
    if side.flags & flow_flags::REPLY != 0 {
        return;
    }
    let backend = if flow.backend != NO_BACKEND {
        Some(flow.backend)
    } else {
        let (low, high) = (key.ports & 0xffff, key.ports >> 16);
        let (to, port) = if flow.initiator == 0 { (key.high, high) } else { (key.low, low) };
        let (address, family) = widen(to);
        let family = u8::from(family & backend_flags::V6 != 0);
        counts.by_address.get(&(address, port as u16, key.protocol() | family << 7)).copied()
    };
    if let Some(count) = backend.and_then(|backend| counts.counts.get_mut(&backend)) {
        *count += 1;
    }
}
