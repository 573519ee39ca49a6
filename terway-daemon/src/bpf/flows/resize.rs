//! Flows on their way into tables of another size.
//!
//! A map cannot grow. So a table of another size is made beside the old one, whose pin is moved aside ([`ASIDE`]); live entries are
//! copied; programs are attached that use the new one; and once all are, what the old programs wrote meanwhile is copied too, and
//! the old table goes. A daemon that dies in between finds both and goes on where it was.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use aya::Pod;
use terway_abi::{Flow, FlowKey, names};
use terway_core::conntrack::Validity;

use super::reverse_entry::{self, Order};
use super::validity::Facts;
use super::{FlowMap, Tables, translates};
use crate::bpf::elements::{Elements, NOEXIST};
use crate::bpf::error::BpfError;
use crate::bpf::pin::{ASIDE, unlink};

/// The part of a smaller table that is filled: an LRU table that is brim-full throws away as much as it takes in.
const FILLED: (usize, usize) = (9, 10);

fn aside(pins: &Path, name: &str) -> PathBuf {
    pins.join(format!("{name}{ASIDE}"))
}

impl Tables {
    /// Copies what the tables before these hold and these do not; how many entries. To be called before programs are attached.
    pub(in crate::bpf) fn carry_over(&self, pins: &Path) -> Result<u64, BpfError> {
        Ok(self.carry(&self.v4, pins, names::FLOWS_V4)? + self.carry(&self.v6, pins, names::FLOWS_V6)?)
    }

    /// The same once more when no program uses the tables before these; then those go.
    pub(in crate::bpf) fn finish_carrying(&self, pins: &Path) -> Result<u64, BpfError> {
        let copied = self.carry_over(pins)?;
        for name in [names::FLOWS_V4, names::FLOWS_V6] {
            unlink(&aside(pins, name))?;
        }
        Ok(copied)
    }

    fn carry<A: Order + Eq + Hash>(&self, to: &FlowMap<A>, pins: &Path, name: &'static str) -> Result<u64, BpfError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let pin = aside(pins, name);
        if !pin.exists() {
            return Ok(0);
        }
        let from: FlowMap<A> = match Elements::at(&pin, name) {
            Ok(from) => from,
            // Another version's.
            Err(BpfError::Layout { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        let facts = Facts::read(self)?;
        let mut live: Vec<(FlowKey<A>, Flow<A>)> = Vec::new();
        from.each(|key, flow| {
            // One that has moved still says who began.
            if facts.standing(flow).is_ok_and(|standing| standing != Validity::Dead) {
                live.push((*key, *flow));
            }
            ControlFlow::Continue(())
        })?;
        let room = to.capacity() as usize * FILLED.0 / FILLED.1;
        if live.len() > room {
            // The longest silent stay behind, pair by pair.
            let now = super::now(self.hz);
            let age = |flow: &Flow<A>| {
                let [one, other] = &flow.sides;
                now.wrapping_sub(one.last_seen).min(now.wrapping_sub(other.last_seen))
            };
            let halves = live.iter().filter(|(_, flow)| translates(flow));
            let halves: HashMap<FlowKey<A>, u32> = halves.map(|(key, flow)| (*key, age(flow))).collect();
            live.sort_by_cached_key(|(key, flow)| {
                let others = translates(flow).then(|| reverse_entry::keys(key, flow)).into_iter().flatten();
                others.filter_map(|other| halves.get(&other).copied()).fold(age(flow), u32::min)
            });
            live.truncate(room);
        }
        // In the order of an LRU: the last one written is the last to be thrown away.
        live.iter().rev().try_fold(0, |copied, (key, flow)| Ok(copied + u64::from(to.put(key, flow, NOEXIST)?)))
    }
}
