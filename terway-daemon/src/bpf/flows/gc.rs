//! A pass over the flow tables: counts them, takes away what is dead, and sets the loads of backends right.
//!
//! Reading and deleting are apart: the whole table is read in batches and what looks dead is noted; then each of those is read again,
//! with all it depends on, and deleted if it still is dead by what is true then. Between that second reading and the deletion lie
//! microseconds, or more if the thread has to wait for its CPU, in which a packet may use the entry or a new connection take its place:
//! deleting tells what was there, and that is put back ([`Elements::delete_if`](crate::bpf::elements::Elements::delete_if)).

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use aya::Pod;
use terway_abi::{Flow, FlowKey, NO_BACKEND, Side, backend_flags, flow_flags};
use terway_core::conntrack::{Connection, DirectionState, Timeouts, Validity};

use super::reverse_entry::{self, Order};
use super::validity::Facts;
use super::{FlowMap, Tables, idle, now, translates};
use crate::bpf::error::BpfError;

/// What a pass is to do.
#[derive(Clone, Copy, Debug)]
pub struct PassOptions {
    /// When entries are dead.
    pub timeouts: Timeouts,
    /// Delete them, and do not only count.
    pub delete: bool,
    /// Set right how many connections each backend has ([`terway_abi::names::LOADS`]).
    pub loads: bool,
    /// [`Found::began`] of the pass before: entries that were made later are young.
    pub before: Option<u32>,
}

/// From here on a table may have been full since the last pass.
const CROWDED: f64 = 0.7;

/// What a pass found in one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilyFound {
    /// Entries that it can have.
    pub capacity: u64,
    /// Entries that it had.
    pub used: u64,
    /// Entries that were void: what they were decided by has changed.
    pub void: u64,
    /// Other entries that nobody had used for longer than their timeout, as far as one direction alone tells.
    pub expired: u64,
    /// Void entries that were deleted.
    pub deleted_void: u64,
    /// Expired entries that were deleted.
    pub deleted_expired: u64,
    /// Entries that were made before the pass before this one began, and those made between the two.
    pub old: u64,
    /// See `old`.
    pub young: u64,
}

impl FamilyFound {
    /// Entries that were deleted.
    #[must_use]
    pub const fn deleted(&self) -> u64 {
        self.deleted_void + self.deleted_expired
    }
}

/// What a pass found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Jiffies when it began.
    pub began: u32,
    /// How long it took.
    pub took: Duration,
    /// IPv4 and IPv6.
    pub families: [FamilyFound; 2],
    /// Backends whose load was set right.
    pub loads_corrected: u64,
}

/// Live connections by backend.
struct Loads {
    counts: BTreeMap<u32, u64>,
    /// What the map said before the tables were read.
    before: HashMap<u32, u64>,
    /// Backends by where they are, for connections that were translated at the socket and look direct here.
    places: HashMap<([u32; 4], u16, u8), u32>,
}

/// After so many backends without a generation no other follows; see `service_maps::NEVER_USED`.
const NEVER_USED: u32 = 4096;

impl Tables {
    /// Goes through both tables.
    pub(in crate::bpf) fn pass(&self, options: &PassOptions) -> Result<Found, BpfError> {
        let (start, began) = (Instant::now(), now(self.hz));
        let mut found = Found { began, ..Found::default() };
        let mut loads = if options.loads { Some(self.loads_before()?) } else { None };
        // Read after the loads: a connection of a backend that is void by now is nobody's.
        let facts = Facts::read(self)?;
        let widen_v4 = |a: u32| ([a, 0, 0, 0], 0);
        let widen_v6 = |a: [u32; 4]| (a, backend_flags::V6);
        found.families[0] = self.pass_family(&self.v4, options, began, &facts, loads.as_mut(), widen_v4)?;
        found.families[1] = self.pass_family(&self.v6, options, began, &facts, loads.as_mut(), widen_v6)?;
        if let Some(loads) = loads {
            found.loads_corrected = self.correct(&loads)?;
        }
        found.took = start.elapsed();
        Ok(found)
    }

    fn loads_before(&self) -> Result<Loads, BpfError> {
        let mut loads = Loads { counts: BTreeMap::new(), before: HashMap::new(), places: HashMap::new() };
        let mut unused = 0;
        self.backends.each(|number, backend| {
            unused = if backend.generation == 0 && *number != NO_BACKEND { unused + 1 } else { 0 };
            if backend.protocol != 0 {
                let family = u8::from(backend.flags & backend_flags::V6 != 0);
                loads.places.insert((backend.address, backend.port, backend.protocol | family << 7), *number);
                loads.counts.insert(*number, 0);
            }
            if unused > NEVER_USED { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let last = loads.counts.last_key_value().map_or(0, |(last, _)| *last);
        self.loads.each(|number, load| {
            if *load != 0 {
                loads.before.insert(*number, *load);
            }
            if *number >= last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        Ok(loads)
    }

    /// Writes what was counted, plus what programs have added since.
    fn correct(&self, loads: &Loads) -> Result<u64, BpfError> {
        let mut wrong = Vec::new();
        let last = loads.counts.last_key_value().map_or(0, |(last, _)| *last);
        self.loads.each(|number, present| {
            if let Some(counted) = loads.counts.get(number) {
                let before = loads.before.get(number).copied().unwrap_or(0);
                let right = counted + present.saturating_sub(before);
                if *present != right {
                    wrong.push((*number, right));
                }
            }
            if *number >= last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        // What a program adds between reading and writing is lost until the next pass, which is as good as this counts.
        wrong.iter().try_for_each(|(number, right)| self.loads.put(number, right, 0).map(drop))?;
        Ok(wrong.len() as u64)
    }

    fn pass_family<A: Order>(
        &self,
        map: &FlowMap<A>,
        options: &PassOptions,
        began: u32,
        facts: &Facts<'_>,
        mut loads: Option<&mut Loads>,
        widen: impl Fn(A) -> ([u32; 4], u8),
    ) -> Result<FamilyFound, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let mut found = FamilyFound { capacity: map.capacity().into(), ..FamilyFound::default() };
        // Those whose ends are gone go first: nothing can come back to them.
        let (mut gone, mut suspects, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        let mut failed = Ok(());
        map.each(|key, flow| {
            found.used += 1;
            let age = began.wrapping_sub(flow.created).cast_signed();
            let old = options.before.is_none_or(|before| before.wrapping_sub(flow.created).cast_signed() > 0);
            // What was made while this pass reads belongs to the next.
            found.old += u64::from(age > 0 && old);
            found.young += u64::from(age > 0 && !old);
            let standing = match facts.standing(flow) {
                Ok(standing) => standing,
                Err(error) => {
                    failed = Err(error);
                    return ControlFlow::Break(());
                }
            };
            found.void += u64::from(standing != Validity::Current);
            match standing {
                Validity::Dead => {
                    gone.push(*key);
                    return ControlFlow::Continue(());
                }
                Validity::Rerouted => moved.push(*key),
                Validity::Current => {}
            }
            // Of a translated connection half is seen here. It is dead at the soonest if the other half is silent and reset it.
            let own = connection(key, flow, None, now(self.hz), self.hz);
            if standing == Validity::Current && options.timeouts.expired(&own) {
                found.expired += 1;
            }
            if could_be_expired(&options.timeouts, &own, translates(flow)) {
                suspects.push(*key);
            }
            if let Some(loads) = &mut loads
                && age > 0
                && !is_ending(flow)
                && !options.timeouts.expired(&own)
            {
                count_load(loads, key, flow, &widen);
            }
            ControlFlow::Continue(())
        })?;
        failed?;
        let crowded = found.used as f64 > CROWDED * found.capacity as f64;
        if crowded {
            found.deleted_void += self.delete_widowed(map, began)?;
        }
        if !options.delete {
            return Ok(found);
        }
        for key in gone {
            if let Some(flow) = map.get(&key)?
                && facts.standing_now(&flow)? == Validity::Dead
                && map.delete_if(&key, |now| is_as_it_was(&flow, now))?
            {
                found.deleted_void += 1;
            }
        }
        for key in suspects {
            found.deleted_expired += self.delete_if_over(map, &key, &options.timeouts, Validity::Current)?;
        }
        for key in if crowded { moved } else { Vec::new() } {
            let moved = map.get(&key)?.map(|flow| facts.standing_now(&flow)).transpose()?;
            let standing = moved.unwrap_or(Validity::Current);
            found.deleted_void += self.delete_if_over(map, &key, &options.timeouts, standing)?;
        }
        Ok(found)
    }

    /// Deletes entries that translate requests and whose answers have no entry any more; how many.
    ///
    /// A full table takes entries away one by one, so it may take one of a pair. Answers then reach the client as they are, with an
    /// address that it does not expect, for as long as requests keep the other entry alive. Without that one the next request is
    /// decided anew: a datagram gets its answer, a connection its reset.
    fn delete_widowed<A: Order>(&self, map: &FlowMap<A>, began: u32) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let mut pairs = Vec::new();
        map.each(|key, flow| {
            let asks = flow.sides[0].flags & flow_flags::REVERSE == 0;
            // The two entries of a connection are made one after the other.
            let settled = began.wrapping_sub(flow.created).cast_signed() > 0;
            if translates(flow) && asks && settled {
                pairs.extend(reverse_entry::keys(key, flow).map(|other| (*key, other)));
            }
            ControlFlow::Continue(())
        })?;
        let mut deleted = 0;
        for (key, other) in pairs {
            let answers = map.get(&other)?;
            let paired =
                answers.is_some_and(|flow| translates(&flow) && reverse_entry::keys(&other, &flow).any(|k| k == key));
            if !paired {
                deleted += u64::from(map.delete(&key)?);
            }
        }
        Ok(deleted)
    }

    /// Deletes an entry, and its partner, if the connection is over by what they say now; how many entries. `standing` is that of an
    /// entry of a crowded table.
    fn delete_if_over<A: Order>(
        &self,
        map: &FlowMap<A>,
        key: &FlowKey<A>,
        timeouts: &Timeouts,
        standing: Validity,
    ) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let Some(flow) = map.get(key)? else { return Ok(0) };
        let mut partner = None;
        if translates(&flow) {
            for other in reverse_entry::keys(key, &flow) {
                // It may have become another connection's.
                let theirs = map.get(&other)?.filter(|theirs| reverse_entry::joined((key, &flow), (&other, theirs)));
                partner = partner.or(theirs.map(|theirs| (other, theirs)));
            }
        }
        let whole = connection(key, &flow, partner.as_ref().map(|(_, theirs)| &theirs.sides[0]), now(self.hz), self.hz);
        if !timeouts.should_delete(&whole, standing, standing == Validity::Rerouted) {
            return Ok(0);
        }
        let deleted = map.delete_if(key, |now| is_as_it_was(&flow, now))?;
        match partner {
            Some((other, theirs)) if deleted => {
                Ok(1 + u64::from(map.delete_if(&other, |now| is_as_it_was(&theirs, now))?))
            }
            _ => Ok(deleted.into()),
        }
    }
}

/// Whether no packet has used an entry since it was read, and no other connection has taken its place.
fn is_as_it_was<A>(then: &Flow<A>, now: &Flow<A>) -> bool {
    let uses = |flow: &Flow<A>| (flow.created, flow.sides.map(|side| (side.packets, side.last_seen)));
    uses(then) == uses(now)
}

/// The connection that an entry stands for; `partner` is the other direction's side if that has an entry of its own.
fn connection<A>(key: &FlowKey<A>, flow: &Flow<A>, partner: Option<&Side>, now: u32, hz: u32) -> Connection {
    let seen = |side: &Side| DirectionState {
        any: side.packets > 0,
        idle: idle(side.last_seen, now, hz),
        fin: side.flags & flow_flags::FIN != 0,
        rst: side.flags & flow_flags::RST != 0,
    };
    let [own, other] = &flow.sides;
    let sides = if translates(flow) {
        let own = seen(own);
        // Without a partner there is nothing to wait for but this direction.
        [own, partner.map_or(DirectionState { any: false, idle: own.idle, fin: false, rst: false }, seen)]
    } else {
        [seen(own), seen(other)]
    };
    Connection { protocol: key.protocol(), sides }
}

/// Whether the connection may turn out to be expired once its other direction is known.
fn could_be_expired(timeouts: &Timeouts, own: &Connection, half: bool) -> bool {
    if !half {
        return timeouts.expired(own);
    }
    let [seen, _] = own.sides;
    let with = |other: DirectionState| timeouts.expired(&Connection { sides: [seen, other], ..*own });
    let silent = DirectionState { any: false, idle: seen.idle, fin: false, rst: false };
    let answered = DirectionState { any: true, ..silent };
    with(silent) || with(answered) || with(DirectionState { fin: true, rst: true, ..answered })
}

/// Whether the connection is being closed or was reset, as far as this entry knows: no load any more. Of a translated one the client's
/// half is enough: it closes when it has what it wanted.
fn is_ending<A>(flow: &Flow<A>) -> bool {
    let [one, other] = &flow.sides;
    (one.flags | other.flags) & (flow_flags::FIN | flow_flags::RST) != 0
}

/// Counts a live connection for the backend that it goes to. The answers' entry of a translated one is not counted again.
fn count_load<A: Order>(loads: &mut Loads, key: &FlowKey<A>, flow: &Flow<A>, widen: &impl Fn(A) -> ([u32; 4], u8)) {
    let [side, _] = &flow.sides;
    if side.flags & flow_flags::REVERSE != 0 {
        return;
    }
    let backend = if flow.backend != NO_BACKEND {
        Some(flow.backend)
    } else {
        let (low, high) = (key.ports & 0xffff, key.ports >> 16);
        let (to, port) = if flow.maker == 0 { (key.high, high) } else { (key.low, low) };
        let (address, family) = widen(to);
        let family = u8::from(family & backend_flags::V6 != 0);
        loads.places.get(&(address, port as u16, key.protocol() | family << 7)).copied()
    };
    if let Some(count) = backend.and_then(|backend| loads.counts.get_mut(&backend)) {
        *count += 1;
    }
}
