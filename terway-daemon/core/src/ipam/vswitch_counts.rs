//! The counts of free addresses in the vSwitches, which [`VSwitchSelection::Most`] chooses by.

use super::config::VSwitchSelection;
use super::effect::Effect;
use super::ids::OpId;
use super::pool::Pool;
use crate::clock::Moment;
use crate::cloud::{CloudError, VSwitch};
use crate::ident::VSwitchId;

impl Pool {
    /// The vSwitch for a new ENI, if there is one now.
    pub(super) fn choose_vswitch(&self, now: Moment) -> Option<&VSwitchId> {
        // It differs from creation to creation, and is the same after a replay.
        self.vswitches.choose(self.config.vswitch_selection, now, self.sequence.creation_jitter())
    }

    /// Asks for counts if the choice needs them and they are too old. Says whether it is better to wait for them: only for the first ones.
    pub(super) fn count_vswitches(&mut self) -> bool {
        let is_fresh = self.vswitches.has_fresh_counts(self.now);
        if self.config.vswitch_selection != VSwitchSelection::Most || is_fresh || !self.may_ask() {
            return false;
        }
        if !self.vswitches.is_counting() {
            let ids: Vec<_> = self.vswitches.iter().filter(|v| v.configured).map(|v| v.id.clone()).collect();
            if ids.len() < 2 {
                return false;
            }
            let op = self.op();
            self.vswitches.begin_count(op);
            self.out.effect(Effect::DescribeVSwitches { op, ids });
        }
        self.vswitches.has_no_counts()
    }

    pub(super) fn vswitches_counted(&mut self, op: OpId, result: Result<Vec<VSwitch>, CloudError>) {
        if !self.vswitches.reported(op) {
            return;
        }
        match result {
            Ok(counts) => self.vswitches.counted(&counts, self.now.after(self.config.vswitch_ttl)),
            Err(error) => {
                let failures = self.vswitches.count_failed(error);
                let due = self.retry_at(failures);
                self.vswitches.count_again_at(due);
            }
        }
    }
}
