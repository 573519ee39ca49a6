//! The flow tables, read out and tidied up.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use aya::maps::{HashMap, MapData, MapError};
use aya::{Ebpf, Pod};
use terway_abi::{Flow, FlowKey, flow_flags, jiffies_at, names, same_way};

use super::endpoints::{Table, absent_is_fine, address_v4, address_v6};
use super::error::{BpfError, lock};
use super::object::take;

/// Both tables. Programs write them; user space reads and deletes. The locks are aya's wish: it deletes through `&mut`.
#[derive(Debug)]
pub(super) struct Tables {
    v4: Mutex<FlowMap<u32>>,
    v6: Mutex<FlowMap<[u32; 4]>>,
}

type FlowMap<A> = HashMap<MapData, FlowKey<A>, Flow<A>>;

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSide {
    /// Address.
    pub address: IpAddr,
    /// Port, or 0.
    pub port: u16,
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRow {
    /// Where its packets come from.
    pub source: FlowSide,
    /// Where they go.
    pub destination: FlowSide,
    /// IP protocol number.
    pub protocol: u8,
    /// The interface of its hook.
    pub ifindex: u32,
    /// The hook of its key (`terway_abi::HOOK_IN` …).
    pub hook: u8,
    /// An `terway_abi::Action` by number.
    pub action: u32,
    /// The interface it is sent to.
    pub oif: u32,
    /// Bits of `terway_abi::flow_flags`.
    pub flags: u32,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Time since the last packet.
    pub idle: Duration,
    /// Whether what it was decided by still holds.
    pub valid: bool,
}

/// Which flows are meant: those to which all that is set applies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// One of the ends has one of these addresses.
    pub addresses: Option<Vec<IpAddr>>,
    /// One of the ends has this port.
    pub port: Option<u16>,
    /// The IP protocol number.
    pub protocol: Option<u8>,
}

impl FlowFilter {
    /// Whether a flow between these two is meant.
    #[must_use]
    pub fn matches(&self, one: FlowSide, other: FlowSide, protocol: u8) -> bool {
        let ends = [one, other];
        self.addresses.as_ref().is_none_or(|all| ends.iter().any(|end| all.contains(&end.address)))
            && self.port.is_none_or(|port| ends.iter().any(|end| end.port == port))
            && self.protocol.is_none_or(|wanted| wanted == protocol)
    }
}

/// The tables in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowStats {
    /// Entries of IPv4 and IPv6.
    pub used: [u64; 2],
    /// Entries that each family may have.
    pub capacity: u32,
    /// Entries that are void.
    pub void: u64,
    /// Entries that translate.
    pub translated: u64,
    /// Entries by IP protocol number.
    pub protocols: BTreeMap<u8, u64>,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that stay.
    pub kept: usize,
    /// Entries deleted.
    pub deleted: usize,
}

/// TCP connections that have been closed are kept this long for what is still on the way (2 MSL of Linux is a minute, but a late
/// segment finds its way through the slow path too).
const CLOSED: Duration = Duration::from_secs(10);

fn now(hz: u32) -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value, which the call fills; the clock exists on every kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    jiffies_at(now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned(), hz)
}

fn idle(last_seen: u32, now: u32, hz: u32) -> Duration {
    // A packet may have come after `now` was read: that difference is negative, and means zero.
    let ticks = now.wrapping_sub(last_seen).cast_signed().max(0);
    Duration::from_millis(u64::from(ticks.cast_unsigned()) * 1000 / u64::from(hz.max(1)))
}

fn valid<A>(flow: &Flow<A>, endpoints: &Table) -> Result<bool, BpfError> {
    let ([source, destination], [at_source, at_destination]) = (flow.slots, flow.epochs);
    // One whose policies have changed is judged again by its next packet, and may go on.
    Ok(same_way(endpoints.epoch(source)?, at_source) && same_way(endpoints.epoch(destination)?, at_destination))
}

impl Tables {
    pub(super) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self { v4: Mutex::new(take(loaded, names::FLOWS_V4)?), v6: Mutex::new(take(loaded, names::FLOWS_V6)?) })
    }

    pub(super) fn count(&self) -> Result<(usize, usize), BpfError> {
        Ok((count(&lock(&self.v4), names::FLOWS_V4)?, count(&lock(&self.v6), names::FLOWS_V6)?))
    }

    pub(super) fn dump(&self, limit: usize, hz: u32, endpoints: &Table) -> Result<Vec<FlowRow>, BpfError> {
        let mut rows = dump(&lock(&self.v4), names::FLOWS_V4, limit, hz, endpoints, |a| address_v4(a).into())?;
        rows.extend(dump(&lock(&self.v6), names::FLOWS_V6, limit, hz, endpoints, |a| address_v6(a).into())?);
        Ok(rows)
    }

    pub(super) fn sweep(&self, after: Duration, hz: u32, endpoints: &Mutex<Table>) -> Result<Swept, BpfError> {
        let v4 = sweep(&mut lock(&self.v4), names::FLOWS_V4, after, hz, endpoints)?;
        let v6 = sweep(&mut lock(&self.v6), names::FLOWS_V6, after, hz, endpoints)?;
        Ok(Swept { kept: v4.kept + v6.kept, deleted: v4.deleted + v6.deleted })
    }
}

impl Tables {
    /// Deletes what the filter means.
    pub(super) fn flush(&self, filter: &FlowFilter) -> Result<u64, BpfError> {
        let v4 = flush(&mut lock(&self.v4), names::FLOWS_V4, filter, |a| address_v4(a).into())?;
        Ok(v4 + flush(&mut lock(&self.v6), names::FLOWS_V6, filter, |a| address_v6(a).into())?)
    }

    pub(super) fn stats(&self, endpoints: &Mutex<Table>) -> Result<FlowStats, BpfError> {
        let mut stats = FlowStats::default();
        stats.used[0] = tally(&lock(&self.v4), names::FLOWS_V4, endpoints, &mut stats)?;
        stats.used[1] = tally(&lock(&self.v6), names::FLOWS_V6, endpoints, &mut stats)?;
        Ok(stats)
    }
}

fn flush<A: Copy>(
    map: &mut FlowMap<A>,
    name: &'static str,
    filter: &FlowFilter,
    address: impl Fn(A) -> IpAddr,
) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let keys: Vec<FlowKey<A>> = map.keys().collect::<Result<_, _>>().map_err(BpfError::map(name))?;
    let mut deleted = 0;
    for key in keys {
        let (low, high) = key.port_numbers();
        let low = FlowSide { address: address(key.low), port: low };
        let high = FlowSide { address: address(key.high), port: high };
        if filter.matches(low, high, key.protocol()) {
            absent_is_fine(map.remove(&key)).map_err(BpfError::map(name))?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

fn tally<A>(
    map: &FlowMap<A>,
    name: &'static str,
    endpoints: &Mutex<Table>,
    stats: &mut FlowStats,
) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut used = 0;
    for entry in map.iter() {
        let (key, flow) = entry.map_err(BpfError::map(name))?;
        used += 1;
        *stats.protocols.entry(key.protocol()).or_default() += 1;
        let [one, other] = flow.sides;
        stats.translated += u64::from((one.flags | other.flags) & flow_flags::TRANSLATE != 0);
        // Locked for each entry: a pod may be added meanwhile.
        stats.void += u64::from(!valid(&flow, &lock(endpoints))?);
    }
    Ok(used)
}

fn count<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>, name: &'static str) -> Result<usize, BpfError> {
    map.keys().try_fold(0, |n, key| key.map(|_| n + 1)).map_err(BpfError::map(name))
}

fn dump<A: Copy>(
    map: &FlowMap<A>,
    name: &'static str,
    limit: usize,
    hz: u32,
    endpoints: &Table,
    address: impl Fn(A) -> IpAddr,
) -> Result<Vec<FlowRow>, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let now = now(hz);
    let mut rows = Vec::new();
    for entry in map.iter().take(limit) {
        let (key, flow) = entry.map_err(BpfError::map(name))?;
        let valid = valid(&flow, endpoints)?;
        let (low, high) = key.port_numbers();
        let low = FlowSide { address: address(key.low), port: low };
        let high = FlowSide { address: address(key.high), port: high };
        let (maker, other) = if flow.maker == 0 { (low, high) } else { (high, low) };
        for (side, source, destination) in [(&flow.sides[0], maker, other), (&flow.sides[1], other, maker)] {
            rows.push(FlowRow {
                source,
                destination,
                protocol: key.protocol(),
                ifindex: side.ifindex,
                hook: side.hook as u8,
                action: side.action,
                oif: side.oif,
                flags: side.flags,
                packets: side.packets,
                bytes: side.bytes,
                idle: idle(side.last_seen, now, hz),
                valid,
            });
        }
    }
    Ok(rows)
}

fn sweep<A>(
    map: &mut FlowMap<A>,
    name: &'static str,
    after: Duration,
    hz: u32,
    endpoints: &Mutex<Table>,
) -> Result<Swept, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let keys: Vec<FlowKey<A>> = map.keys().collect::<Result<_, _>>().map_err(BpfError::map(name))?;
    let mut swept = Swept::default();
    let now = now(hz);
    for key in keys {
        let flow = match map.get(&key, 0) {
            Ok(flow) => flow,
            Err(MapError::KeyNotFound) => continue,
            Err(source) => return Err(BpfError::Map { name, source }),
        };
        let [low, high] = flow.sides;
        // The two directions of a translated connection have an entry each, of which one side is used.
        let translated = (low.flags | high.flags) & flow_flags::TRANSLATE != 0;
        let closed = translated && (low.flags | high.flags) & flow_flags::FIN != 0
            || (low.flags | high.flags) & flow_flags::RST != 0
            || low.flags & high.flags & flow_flags::FIN != 0;
        let idle = idle(low.last_seen, now, hz).min(idle(high.last_seen, now, hz));
        let limit = if closed { CLOSED.min(after) } else { after };
        // Locked for each entry, not for the sweep: a pod may be added meanwhile.
        if idle > limit || !valid(&flow, &lock(endpoints))? {
            absent_is_fine(map.remove(&key)).map_err(BpfError::map(name))?;
            swept.deleted += 1;
        } else {
            swept.kept += 1;
        }
    }
    Ok(swept)
}
