//! The flow tables, read out and tidied up.
//!
//! Programs write them; user space reads and deletes. Nothing here holds a lock while it reads: the tables may hold a million entries,
//! and a pod must not wait for somebody who looks at them.

mod gc;
mod resize;
mod reverse_entry;
mod validity;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Pod;
use terway_abi::{Backend, Endpoint, Flow, FlowKey, flow_flags, jiffies_at, names};

use terway_core::conntrack::Validity;

use super::elements::Elements;
use super::endpoints::{address_v4, address_v6};
use super::error::BpfError;

pub use gc::{FamilyFound, Found, PassOptions};
use validity::Facts;

/// A flow table.
type FlowMap<A> = Elements<FlowKey<A>, Flow<A>>;

/// Bytes that the kernel takes for an entry of each family: key and value, `struct htab_elem` (kernel/bpf/hashtab.c), and a bucket.
pub const FLOW_BYTES: [u32; 2] = [
    (size_of::<terway_abi::FlowKeyV4>() + size_of::<terway_abi::FlowV4>()) as u32 + 48 + 16,
    (size_of::<terway_abi::FlowKeyV6>() + size_of::<terway_abi::FlowV6>()) as u32 + 48 + 16,
];

/// Both tables, and what their entries depend on.
#[derive(Debug)]
pub(super) struct Tables {
    v4: FlowMap<u32>,
    v6: FlowMap<[u32; 4]>,
    epochs: Elements<u32, u32>,
    endpoints: Elements<u32, Endpoint>,
    backends: Elements<u32, Backend>,
    loads: Elements<u32, u64>,
    hz: u32,
    /// Entries that were deleted on request.
    flushed: AtomicU64,
}

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
    /// Entries that each may have.
    pub capacity: [u32; 2],
    /// Entries that are void.
    pub void: u64,
    /// Entries that translate.
    pub translated: u64,
    /// Entries by IP protocol number.
    pub protocols: BTreeMap<u8, u64>,
}

/// Jiffies now.
fn now(hz: u32) -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value, which the call fills; the clock exists on every kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    jiffies_at(now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned(), hz)
}

/// Time from `last_seen` to `now`.
fn idle(last_seen: u32, now: u32, hz: u32) -> Duration {
    // A packet may have come after `now` was read: that difference is negative, and means zero.
    let ticks = now.wrapping_sub(last_seen).cast_signed().max(0);
    Duration::from_millis(u64::from(ticks.cast_unsigned()) * 1000 / u64::from(hz.max(1)))
}

impl Tables {
    /// Opens the maps under their pins.
    pub(super) fn open(pins: &Path, hz: u32) -> Result<Self, BpfError> {
        Ok(Self {
            v4: Elements::open(pins, names::FLOWS_V4)?,
            v6: Elements::open(pins, names::FLOWS_V6)?,
            epochs: Elements::open(pins, names::EPOCHS)?,
            endpoints: Elements::open(pins, names::ENDPOINTS)?,
            backends: Elements::open(pins, names::BACKENDS)?,
            loads: Elements::open(pins, names::LOADS)?,
            hz,
            flushed: AtomicU64::new(0),
        })
    }

    pub(super) fn count(&self) -> Result<(usize, usize), BpfError> {
        fn count<K: Pod, V: Pod>(map: &Elements<K, V>) -> Result<usize, BpfError> {
            let mut n = 0;
            map.each(|_, _| {
                n += 1;
                ControlFlow::Continue(())
            })?;
            Ok(n)
        }
        Ok((count(&self.v4)?, count(&self.v6)?))
    }

    /// Entries that were deleted on request, ever.
    pub(super) fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Relaxed)
    }

    pub(super) fn dump(&self, limit: usize) -> Result<Vec<FlowRow>, BpfError> {
        let facts = Facts::read(self)?;
        let mut rows = Vec::new();
        self.dump_family(&self.v4, limit, &facts, |a| address_v4(a).into(), &mut |row| rows.push(row))?;
        self.dump_family(&self.v6, limit, &facts, |a| address_v6(a).into(), &mut |row| rows.push(row))?;
        Ok(rows)
    }

    /// Directions that saw a packet and that the filter means, `most` of them, and whether there are more. The others are read and
    /// forgotten: a table may hold a million.
    pub(super) fn find(&self, filter: &FlowFilter, most: usize) -> Result<(Vec<FlowRow>, bool), BpfError> {
        let facts = Facts::read(self)?;
        let (mut rows, mut more) = (Vec::new(), false);
        let mut take = |row: FlowRow| {
            // What never saw a packet is the shadow of the other direction.
            if row.packets > 0 && filter.matches(row.source, row.destination, row.protocol) {
                if rows.len() < most { rows.push(row) } else { more = true }
            }
        };
        self.dump_family(&self.v4, usize::MAX, &facts, |a| address_v4(a).into(), &mut take)?;
        self.dump_family(&self.v6, usize::MAX, &facts, |a| address_v6(a).into(), &mut take)?;
        Ok((rows, more))
    }

    fn dump_family<A: Copy>(
        &self,
        map: &FlowMap<A>,
        limit: usize,
        facts: &Facts<'_>,
        address: impl Fn(A) -> IpAddr,
        take: &mut dyn FnMut(FlowRow),
    ) -> Result<(), BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let now = now(self.hz);
        let mut left = limit;
        let mut failed = Ok(());
        map.each(|key, flow| {
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            let valid = match facts.standing(flow) {
                Ok(standing) => standing == Validity::Current,
                Err(error) => {
                    failed = Err(error);
                    return ControlFlow::Break(());
                }
            };
            let (low, high) = ends(key, &address);
            let (maker, other) = if flow.maker == 0 { (low, high) } else { (high, low) };
            for (side, source, destination) in [(&flow.sides[0], maker, other), (&flow.sides[1], other, maker)] {
                take(FlowRow {
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
                    idle: idle(side.last_seen, now, self.hz),
                    valid,
                });
            }
            ControlFlow::Continue(())
        })?;
        failed
    }

    /// Deletes what the filter means.
    pub(super) fn flush(&self, filter: &FlowFilter) -> Result<u64, BpfError> {
        let deleted =
            flush(&self.v4, filter, |a| address_v4(a).into())? + flush(&self.v6, filter, |a| address_v6(a).into())?;
        self.flushed.fetch_add(deleted, Ordering::Relaxed);
        Ok(deleted)
    }

    pub(super) fn stats(&self) -> Result<FlowStats, BpfError> {
        let facts = Facts::read(self)?;
        let mut stats = FlowStats { capacity: [self.v4.capacity(), self.v6.capacity()], ..FlowStats::default() };
        stats.used[0] = tally(&self.v4, &facts, &mut stats)?;
        stats.used[1] = tally(&self.v6, &facts, &mut stats)?;
        Ok(stats)
    }
}

/// The low and the high end of a key.
fn ends<A: Copy>(key: &FlowKey<A>, address: impl Fn(A) -> IpAddr) -> (FlowSide, FlowSide) {
    let (low, high) = key.port_numbers();
    (FlowSide { address: address(key.low), port: low }, FlowSide { address: address(key.high), port: high })
}

fn translates<A>(flow: &Flow<A>) -> bool {
    let [one, other] = &flow.sides;
    (one.flags | other.flags) & flow_flags::TRANSLATE != 0
}

fn flush<A: Copy>(map: &FlowMap<A>, filter: &FlowFilter, address: impl Fn(A) -> IpAddr) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut meant = Vec::new();
    map.each(|key, _| {
        let (low, high) = ends(key, &address);
        if filter.matches(low, high, key.protocol()) {
            meant.push(*key);
        }
        ControlFlow::Continue(())
    })?;
    meant.iter().try_fold(0, |deleted, key| Ok(deleted + u64::from(map.delete(key)?)))
}

fn tally<A>(map: &FlowMap<A>, facts: &Facts<'_>, stats: &mut FlowStats) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut used = 0;
    let mut failed = Ok(());
    map.each(|key, flow| {
        used += 1;
        *stats.protocols.entry(key.protocol()).or_default() += 1;
        stats.translated += u64::from(translates(flow));
        match facts.standing(flow) {
            Ok(standing) => stats.void += u64::from(standing != Validity::Current),
            Err(error) => {
                failed = Err(error);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    failed.map(|()| used)
}
