//! Handle of the flow tables (connection tracking): listing, garbage collection, deletion on request and resizing.
//!
//! Programs write the tables; user space reads and deletes. There is no lock: a table may have a million entries, and an ADD must not
//! wait for a listing. The kernel's maps lock for themselves.

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

use super::address::{address_v4, address_v6};
use super::elements::Elements;
use super::error::BpfError;

pub use gc::{FamilyGcReport, GcOptions, GcReport};
use validity::ValiditySnapshot;

/// The flow table of one family.
type FlowMap<A> = Elements<FlowKey<A>, Flow<A>>;

/// Bytes that the kernel takes for an entry of each family: key and value, `struct htab_elem` (kernel/bpf/hashtab.c), and a bucket.
pub const FLOW_BYTES: [u32; 2] = [
    (size_of::<terway_abi::FlowKeyV4>() + size_of::<terway_abi::FlowV4>()) as u32 + 48 + 16,
    (size_of::<terway_abi::FlowKeyV6>() + size_of::<terway_abi::FlowV6>()) as u32 + 48 + 16,
];

/// Handle of both flow tables and of the maps that the validity of their entries depends on.
#[derive(Debug)]
pub struct FlowTables {
    v4: FlowMap<u32>,
    v6: FlowMap<[u32; 4]>,
    epochs: Elements<u32, u32>,
    endpoints: Elements<u32, Endpoint>,
    backends: Elements<u32, Backend>,
    /// Active connection counts of backends.
    connection_counts: Elements<u32, u64>,
    hz: u32,
    /// Entries that were deleted on request.
    flushed: AtomicU64,
}

/// An end of a flow: address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSide {
    /// Address.
    pub address: IpAddr,
    /// Port, or 0.
    pub port: u16,
}

/// A direction of a flow entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRow {
    /// Source of its packets.
    pub source: FlowSide,
    /// Destination of its packets.
    pub destination: FlowSide,
    /// IP protocol number.
    pub protocol: u8,
    /// The interface of its hook.
    pub ifindex: u32,
    /// The hook of its key (`terway_abi::HOOK_INGRESS` …).
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
    /// Whether the epochs and the backend generation that it was decided by are current.
    pub valid: bool,
}

/// A filter of flows: those match to which all that is set applies.
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
    /// Whether a flow between these two ends matches.
    #[must_use]
    pub fn matches(&self, one: FlowSide, other: FlowSide, protocol: u8) -> bool {
        let ends = [one, other];
        self.addresses.as_ref().is_none_or(|all| ends.iter().any(|end| all.contains(&end.address)))
            && self.port.is_none_or(|port| ends.iter().any(|end| end.port == port))
            && self.protocol.is_none_or(|wanted| wanted == protocol)
    }
}

/// Statistics of the flow tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowStats {
    /// Entries of IPv4 and IPv6.
    pub used: [u64; 2],
    /// Entries that each may have.
    pub capacity: [u32; 2],
    /// Invalid entries.
    pub invalid: u64,
    /// Entries with NAT.
    pub translated: u64,
    /// Entries by IP protocol number.
    pub protocols: BTreeMap<u8, u64>,
}

/// The current time in jiffies.
fn now(hz: u32) -> u32 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value, which the call fills; the clock exists on every kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    jiffies_at(now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned(), hz)
}

/// The time since `last_seen`; both are jiffies.
fn idle(last_seen: u32, now: u32, hz: u32) -> Duration {
    // A packet may have arrived after `now` was read: the difference is negative then.
    let ticks = now.wrapping_sub(last_seen).cast_signed().max(0);
    Duration::from_millis(u64::from(ticks.cast_unsigned()) * 1000 / u64::from(hz.max(1)))
}

impl FlowTables {
    /// Opens the maps under their pins.
    pub(super) fn open(pins: &Path, hz: u32) -> Result<Self, BpfError> {
        Ok(Self {
            v4: Elements::open(pins, names::FLOWS_V4)?,
            v6: Elements::open(pins, names::FLOWS_V6)?,
            epochs: Elements::open(pins, names::EPOCHS)?,
            endpoints: Elements::open(pins, names::ENDPOINTS)?,
            backends: Elements::open(pins, names::BACKENDS)?,
            connection_counts: Elements::open(pins, names::ACTIVE_CONNS)?,
            hz,
            flushed: AtomicU64::new(0),
        })
    }

    /// Entries of the flow tables, IPv4 and IPv6, invalid ones included.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    #[cfg(feature = "test-api")]
    pub fn count(&self) -> Result<(usize, usize), BpfError> {
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

    /// Entries that [`Self::flush`] has deleted so far.
    #[must_use]
    pub fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Relaxed)
    }

    /// Both directions of up to `limit` entries of each family.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    #[cfg(feature = "test-api")]
    pub fn list(&self, limit: usize) -> Result<Vec<FlowRow>, BpfError> {
        let snapshot = ValiditySnapshot::read(self)?;
        let mut rows = Vec::new();
        self.read_family(&self.v4, limit, &snapshot, |a| address_v4(a).into(), &mut |row| rows.push(row))?;
        self.read_family(&self.v6, limit, &snapshot, |a| address_v6(a).into(), &mut |row| rows.push(row))?;
        Ok(rows)
    }

    /// Directions of flows that saw a packet and match a filter, up to `limit`, and whether there are more.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn find(&self, filter: &FlowFilter, limit: usize) -> Result<(Vec<FlowRow>, bool), BpfError> {
        let snapshot = ValiditySnapshot::read(self)?;
        let (mut rows, mut more) = (Vec::new(), false);
        let mut take = |row: FlowRow| {
            // A direction without a packet is only the reverse of the other one.
            if row.packets > 0 && filter.matches(row.source, row.destination, row.protocol) {
                if rows.len() < limit { rows.push(row) } else { more = true }
            }
        };
        self.read_family(&self.v4, usize::MAX, &snapshot, |a| address_v4(a).into(), &mut take)?;
        self.read_family(&self.v6, usize::MAX, &snapshot, |a| address_v6(a).into(), &mut take)?;
        Ok((rows, more))
    }

    fn read_family<A: Copy>(
        &self,
        map: &FlowMap<A>,
        limit: usize,
        snapshot: &ValiditySnapshot<'_>,
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
            let valid = match snapshot.validity(flow) {
                Ok(validity) => validity == Validity::Current,
                Err(error) => {
                    failed = Err(error);
                    return ControlFlow::Break(());
                }
            };
            let (low, high) = ends(key, &address);
            let (maker, other) = if flow.initiator == 0 { (low, high) } else { (high, low) };
            for (side, source, destination) in
                [(&flow.directions[0], maker, other), (&flow.directions[1], other, maker)]
            {
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

    /// Deletes the flows that match a filter; the number of entries. Of a flow with NAT each entry has to match by itself.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn flush(&self, filter: &FlowFilter) -> Result<u64, BpfError> {
        let deleted =
            flush(&self.v4, filter, |a| address_v4(a).into())? + flush(&self.v6, filter, |a| address_v6(a).into())?;
        self.flushed.fetch_add(deleted, Ordering::Relaxed);
        Ok(deleted)
    }

    /// Statistics of the flow tables.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn stats(&self) -> Result<FlowStats, BpfError> {
        let snapshot = ValiditySnapshot::read(self)?;
        let mut stats = FlowStats { capacity: [self.v4.capacity(), self.v6.capacity()], ..FlowStats::default() };
        stats.used[0] = count_family(&self.v4, &snapshot, &mut stats)?;
        stats.used[1] = count_family(&self.v6, &snapshot, &mut stats)?;
        Ok(stats)
    }
}

/// The low and the high end of a key.
fn ends<A: Copy>(key: &FlowKey<A>, address: impl Fn(A) -> IpAddr) -> (FlowSide, FlowSide) {
    let (low, high) = key.port_numbers();
    (FlowSide { address: address(key.low), port: low }, FlowSide { address: address(key.high), port: high })
}

/// Whether an entry has NAT.
fn has_nat<A>(flow: &Flow<A>) -> bool {
    let [one, other] = &flow.directions;
    (one.flags | other.flags) & flow_flags::NAT != 0
}

fn flush<A: Copy>(map: &FlowMap<A>, filter: &FlowFilter, address: impl Fn(A) -> IpAddr) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut matching = Vec::new();
    map.each(|key, _| {
        let (low, high) = ends(key, &address);
        if filter.matches(low, high, key.protocol()) {
            matching.push(*key);
        }
        ControlFlow::Continue(())
    })?;
    matching.iter().try_fold(0, |deleted, key| Ok(deleted + u64::from(map.delete(key)?)))
}

fn count_family<A>(map: &FlowMap<A>, snapshot: &ValiditySnapshot<'_>, stats: &mut FlowStats) -> Result<u64, BpfError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut used = 0;
    let mut failed = Ok(());
    map.each(|key, flow| {
        used += 1;
        *stats.protocols.entry(key.protocol()).or_default() += 1;
        stats.translated += u64::from(has_nat(flow));
        match snapshot.validity(flow) {
            Ok(validity) => stats.invalid += u64::from(validity != Validity::Current),
            Err(error) => {
                failed = Err(error);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    failed.map(|()| used)
}
