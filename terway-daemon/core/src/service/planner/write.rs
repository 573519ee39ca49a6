//! The second half of planning: from what was touched to operations in their order.

use std::sync::Arc;

use super::entries::BackendValue;
use super::{Planner, Touched};
use crate::objects::Protocol;
use crate::service::desired::{self, BackendFacts};
use crate::service::model::{BackendKey, BackendState, Op, Plan};

impl Planner {
    /// Turns what was touched into operations, in their order.
    pub(super) fn write(&mut self, touched: &mut Touched, plan: &mut Plan, mut worse: Vec<Op>) {
        touched.frontends.sort_unstable();
        touched.frontends.dedup();
        let mut gone = Vec::new();
        for table in touched.tables.drain(..) {
            let Some(entry) = self.tables.get_mut(&table) else { continue };
            if entry.users > 0 && !entry.written {
                entry.written = true;
                plan.ops.push(Op::PutTable(entry.id, table));
            } else if entry.users == 0 {
                if entry.written {
                    gone.push(entry.id);
                    plan.replaced.tables.insert(entry.id, Arc::clone(&table));
                } else {
                    self.table_ids.give_back(entry.id.0);
                }
                self.tables.remove(&table);
            }
        }
        plan.ops.extend(touched.ranges_added.drain(..).map(|(port, net)| Op::PutRange(port, net)));
        let mut removed = Vec::new();
        for key in &touched.frontends {
            let Some(entry) = self.frontends.get_mut(key) else { continue };
            let desired = entry.references.first().map(|claim| claim.frontend);
            match desired {
                Some(frontend) if entry.written != Some(frontend) => plan.ops.push(Op::PutFrontend(*key, frontend)),
                None if entry.written.is_some() => removed.push(Op::RemoveFrontend(*key)),
                _ => {}
            }
            if entry.written != desired {
                plan.replaced.frontends.extend(entry.written.map(|old| (*key, old)));
            }
            self.errors.of_frontend(*key, entry.references.iter().map(|claim| &*claim.owner));
            entry.written = desired;
            if desired.is_none() {
                self.frontends.swap_remove(key);
            }
        }
        plan.ops.append(&mut removed);
        // UDP has no end: a client that keeps its source port would ask a backend that is gone until its flow is void. Not before every
        // packet meets the new frontends, else one finds nobody.
        let ended = touched.backends.iter().filter(|key| key.protocol == Protocol::Udp).filter_map(|key| {
            let entry = self.backends.get(key).filter(|entry| entry.references.is_empty())?;
            entry.written.map(|written| Op::InvalidateBackend(entry.id, written.at(*key)))
        });
        let mut ended: Vec<Op> = ended.collect();
        let silent = |op: &Op| matches!(op, Op::PutBackend(_, b) if b.key.protocol == Protocol::Udp && b.state == BackendState::Unready);
        if !ended.is_empty() || worse.iter().any(silent) {
            plan.ops.push(Op::RcuBarrier);
        }
        plan.ops.append(&mut worse);
        plan.ops.append(&mut ended);
        plan.ops.extend(touched.ranges_gone.drain(..).map(|(port, net)| Op::RemoveRange(port, net)));
        plan.retire.extend(gone.into_iter().map(Op::RemoveTable));
        for key in &touched.backends {
            self.retire_backend(*key, plan);
        }
        plan.retire.extend(touched.ports_gone.drain(..).map(Op::ReleasePort));
    }

    pub(super) fn write_backend(&mut self, key: BackendKey, plan: &mut Plan, worse: &mut Vec<Op>) {
        let Some(entry) = self.backends.get_mut(&key) else { return };
        let facts = entry.references.iter().map(|(_, facts)| *facts).reduce(desired::merged);
        let Some(BackendFacts { state, local }) = facts else { return };
        let fell_silent = |old: &BackendValue| {
            key.protocol == Protocol::Udp && state == BackendState::Unready && old.state != BackendState::Unready
        };
        let generation = match &entry.written {
            Some(old) if !fell_silent(old) => old.generation,
            _ => {
                self.generation = self.generation.wrapping_add(1);
                self.generation
            }
        };
        let life = BackendValue { state, local, generation };
        if entry.written == Some(life) {
            return;
        }
        // A backend that gets worse is written once no frontend leads new clients to it any more.
        let degraded = entry.written.is_some_and(|old| state < old.state);
        plan.replaced.backends.extend(entry.written.map(|old| (entry.id, old.at(key))));
        let op = Op::PutBackend(entry.id, life.at(key));
        if degraded {
            worse.push(op);
        } else {
            plan.ops.push(op);
        }
        entry.written = Some(life);
    }

    fn retire_backend(&mut self, key: BackendKey, plan: &mut Plan) {
        let Some(entry) = self.backends.get(&key).filter(|entry| entry.references.is_empty()) else { return };
        match entry.written {
            Some(written) => plan.retire.push(Op::RemoveBackend(entry.id, written.at(key))),
            None => self.backend_ids.give_back(entry.id.0),
        }
        self.backends.swap_remove(&key);
    }
}
