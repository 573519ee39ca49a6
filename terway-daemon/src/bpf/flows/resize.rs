//! Resizing the flow tables: live entries are copied into tables of the new size.
//!
//! A BPF map cannot grow. So a table of the new size is created, and the pin of the old one is renamed ([`OLD_SIZE`]); live entries are
//! copied; programs are attached that use the new table; and when all are, what the old programs wrote meanwhile is copied too, and
//! the old table is unpinned. A daemon that dies in between finds both tables and continues.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use aya::Pod;
use terway_abi::{Flow, FlowKey, names};
use terway_core::conntrack::Validity;

use super::reverse_entry::{self, KeyOrder};
use super::validity::ValiditySnapshot;
use super::{FlowMap, FlowTables, has_nat};
use crate::bpf::elements::{Elements, NOEXIST};
use crate::bpf::error::BpfError;
use crate::bpf::pin::{OLD_SIZE, unlink};

/// The part of a smaller table that is filled: a full LRU table evicts an entry for each one that is inserted.
const FILLED: (usize, usize) = (9, 10);

fn old_pin(pins: &Path, name: &str) -> PathBuf {
    pins.join(format!("{name}{OLD_SIZE}"))
}

impl FlowTables {
    /// Copies the live entries of tables of another size that these tables do not have; the number of entries. To be called before
    /// programs are attached.
    pub(in crate::bpf) fn copy_old_tables(&self, pins: &Path) -> Result<u64, BpfError> {
        Ok(self.copy_old_table(&self.v4, pins, names::FLOWS_V4)?
            + self.copy_old_table(&self.v6, pins, names::FLOWS_V6)?)
    }

    /// Copies once more and unpins the old tables. To be called when no attached program uses them.
    pub(in crate::bpf) fn finish_resize(&self, pins: &Path) -> Result<u64, BpfError> {
        let copied = self.copy_old_tables(pins)?;
        for name in [names::FLOWS_V4, names::FLOWS_V6] {
            unlink(&old_pin(pins, name))?;
        }
        Ok(copied)
    }

    fn copy_old_table<A: KeyOrder + Eq + Hash>(
        &self,
        to: &FlowMap<A>,
        pins: &Path,
        name: &'static str,
    ) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let pin = old_pin(pins, name);
        if !pin.exists() {
            return Ok(0);
        }
        let from: FlowMap<A> = match Elements::at(&pin, name) {
            Ok(from) => from,
            // The map of another version.
            Err(BpfError::Layout { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        let snapshot = ValiditySnapshot::read(self)?;
        let mut live: Vec<(FlowKey<A>, Flow<A>)> = Vec::new();
        from.each(|key, flow| {
            // A rerouted entry still tells which end is the initiator.
            if snapshot.validity(flow).is_ok_and(|validity| validity != Validity::Dead) {
                live.push((*key, *flow));
            }
            ControlFlow::Continue(())
        })?;
        let room = to.capacity() as usize * FILLED.0 / FILLED.1;
        if live.len() > room {
            // Those that have been idle for longest are left out, in pairs.
            let now = super::now(self.hz);
            let age = |flow: &Flow<A>| {
                let [one, other] = &flow.directions;
                now.wrapping_sub(one.last_seen).min(now.wrapping_sub(other.last_seen))
            };
            let paired = live.iter().filter(|(_, flow)| has_nat(flow));
            let ages: HashMap<FlowKey<A>, u32> = paired.map(|(key, flow)| (*key, age(flow))).collect();
            live.sort_by_cached_key(|(key, flow)| {
                let reverse_keys = has_nat(flow).then(|| reverse_entry::keys(key, flow)).into_iter().flatten();
                reverse_keys.filter_map(|other| ages.get(&other).copied()).fold(age(flow), u32::min)
            });
            live.truncate(room);
        }
        // The entry that is inserted last is evicted last.
        live.iter().rev().try_fold(0, |copied, (key, flow)| Ok(copied + u64::from(to.put(key, flow, NOEXIST)?)))
    }
}
