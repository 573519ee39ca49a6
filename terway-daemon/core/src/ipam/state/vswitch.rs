//! The vSwitches that new addresses come from: which one is chosen, and the back-off of an exhausted one.

use crate::clock::Moment;
use crate::cloud::{CloudError, VSwitch};
use crate::ident::VSwitchId;
use crate::ipam::config::VSwitchSelection;
use crate::ipam::ids::OpId;

#[derive(Debug)]
pub(crate) struct VSwitchState {
    pub(crate) id: VSwitchId,
    /// New ENIs may be put there. An ENI of an earlier configuration may be in another one.
    pub(crate) configured: bool,
    /// Back-off: no address is asked for until then, and why.
    pub(crate) blocked: Option<(Moment, CloudError)>,
    /// Ask for at most so many at once until then: more were refused, fewer may be there.
    tight: Option<(u32, Moment)>,
    /// The same for prefixes. None at all means that it is fragmented: single addresses may still be had.
    pub(crate) tight_prefixes: Option<(u32, Moment)>,
    /// Free addresses by the cloud's last count, less what was asked for since.
    pub(crate) available: Option<u32>,
}

impl VSwitchState {
    const fn new(id: VSwitchId, configured: bool) -> Self {
        Self { id, configured, blocked: None, tight: None, tight_prefixes: None, available: None }
    }
}

#[derive(Debug, Default)]
pub(crate) struct VSwitches {
    list: Vec<VSwitchState>,
    /// The count that is under way.
    op: Option<OpId>,
    /// When the counts are to be asked for again; `None` if they never were.
    due: Option<Moment>,
    failures: u32,
    error: Option<CloudError>,
}

impl VSwitches {
    /// Takes over a new list. Counts are kept; back-offs end, since the change may have removed their cause.
    pub(crate) fn configure(&mut self, ids: &[VSwitchId]) {
        let mut old = std::mem::take(&mut self.list);
        (self.failures, self.error) = (0, None);
        for id in ids {
            let known = old.iter().position(|v| v.id == *id).map(|i| old.swap_remove(i));
            let available = known.and_then(|v| v.available);
            self.list.push(VSwitchState { available, ..VSwitchState::new(id.clone(), true) });
        }
        if self.list.iter().any(|v| v.available.is_none()) {
            self.due = None;
        }
    }

    pub(crate) fn configured(&self, id: &VSwitchId) -> bool {
        self.list.iter().any(|v| v.configured && v.id == *id)
    }

    /// All that is known of any.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &VSwitchState> {
        self.list.iter()
    }

    /// The vSwitch for a new ENI.
    pub(crate) fn choose(&self, selection: VSwitchSelection, now: Moment, salt: u64) -> Option<&VSwitchId> {
        let mut open = self.list.iter().filter(|v| v.configured && self.cap(&v.id, now) > 0);
        let chosen = match selection {
            VSwitchSelection::Ordered => open.next(),
            // Of equals the first: `max_by_key` would take the last.
            VSwitchSelection::Most => open.min_by_key(|v| std::cmp::Reverse(v.available)),
            VSwitchSelection::Random => {
                let count = u64::try_from(open.clone().count()).unwrap_or(0).max(1);
                open.nth(usize::try_from(salt % count).unwrap_or(0))
            }
        };
        chosen.map(|v| &v.id)
    }

    /// How many addresses one call may ask of this vSwitch now, as far as the vSwitch goes.
    pub(crate) fn cap(&self, id: &VSwitchId, now: Moment) -> u32 {
        let Some(v) = self.list.iter().find(|v| v.id == *id) else { return u32::MAX };
        if v.blocked.as_ref().is_some_and(|(until, _)| *until > now) {
            return 0;
        }
        v.tight.filter(|(_, until)| *until > now).map_or(u32::MAX, |(cap, _)| cap)
    }

    /// How many prefixes one call may ask of this vSwitch now; 0 if it is too fragmented for any.
    pub(crate) fn prefix_cap(&self, id: &VSwitchId, now: Moment) -> u32 {
        let known = self.list.iter().find(|v| v.id == *id).and_then(|v| v.tight_prefixes);
        known.filter(|(_, until)| *until > now).map_or(u32::MAX, |(cap, _)| cap)
    }

    fn entry(&mut self, id: &VSwitchId) -> &mut VSwitchState {
        let at = self.list.iter().position(|v| v.id == *id).unwrap_or_else(|| {
            self.list.push(VSwitchState::new(id.clone(), false));
            self.list.len() - 1
        });
        &mut self.list[at]
    }

    /// The cloud refused `count` addresses for want of free ones: ask for half as many until then, for none if one was too much.
    pub(crate) fn exhausted(&mut self, id: &VSwitchId, count: u32, error: CloudError, until: Moment) {
        let v = self.entry(id);
        if count > 1 {
            v.tight = Some((count / 2, until));
        } else {
            v.available = v.available.map(|_| 0);
            v.blocked = Some((until, error));
            v.tight = None;
        }
    }

    /// The cloud refused `count` prefixes for want of whole ones.
    pub(crate) fn fragmented(&mut self, id: &VSwitchId, count: u32, until: Moment) {
        self.entry(id).tight_prefixes = Some((count / 2, until));
    }

    /// So many addresses were asked for, or went back.
    pub(crate) fn used(&mut self, id: &VSwitchId, count: u32) {
        if let Some(v) = self.list.iter_mut().find(|v| v.id == *id) {
            v.available = v.available.map(|n| n.saturating_sub(count));
        }
    }

    /// Why there are no counts. Holds until they may be asked for again: nobody asks before they are needed.
    pub(crate) fn trouble(&self, now: Moment) -> Option<&CloudError> {
        self.error.as_ref().filter(|_| self.due.is_some_and(|due| due > now))
    }

    pub(crate) fn blocked(&self, now: Moment) -> impl Iterator<Item = (&VSwitchId, Moment, &CloudError)> {
        self.list.iter().filter_map(move |v| {
            v.blocked.as_ref().filter(|(until, _)| *until > now).map(|(until, error)| (&v.id, *until, error))
        })
    }

    /// Whether the counts are recent enough.
    pub(crate) fn has_fresh_counts(&self, now: Moment) -> bool {
        self.due.is_some_and(|due| due > now)
    }

    /// Whether there have been no counts yet.
    pub(crate) const fn has_no_counts(&self) -> bool {
        self.due.is_none()
    }

    pub(crate) const fn is_counting(&self) -> bool {
        self.op.is_some()
    }

    pub(crate) const fn begin_count(&mut self, op: OpId) {
        self.op = Some(op);
    }

    /// Whether this is the report of the count under way, which ends with it.
    pub(crate) fn reported(&mut self, op: OpId) -> bool {
        self.op.take_if(|waiting| *waiting == op).is_some()
    }

    /// Takes in counts, which hold until then.
    pub(crate) fn counted(&mut self, counts: &[VSwitch], due: Moment) {
        for v in &mut self.list {
            v.available = counts.iter().find(|count| count.id == v.id).map(|count| count.available);
        }
        (self.failures, self.error) = (0, None);
        self.due = Some(due);
    }

    /// Counts a failure; returns how many there are in a row.
    pub(crate) fn count_failed(&mut self, error: CloudError) -> u32 {
        self.failures += 1;
        self.error = Some(error);
        self.failures
    }

    pub(crate) const fn count_again_at(&mut self, due: Moment) {
        self.due = Some(due);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cloud::ErrorClass;

    fn error() -> CloudError {
        CloudError {
            action: "AssignPrivateIpAddresses".into(),
            class: ErrorClass::VSwitchExhausted,
            code: "InvalidVSwitchId.IpNotEnough".into(),
            message: String::new(),
            request_id: String::new(),
        }
    }

    fn of(ids: &[&str]) -> VSwitches {
        let mut vswitches = VSwitches::default();
        vswitches.configure(&ids.iter().map(|id| VSwitchId::from(*id)).collect::<Vec<_>>());
        vswitches
    }

    fn ordered(vswitches: &VSwitches, now: Moment) -> Option<&str> {
        vswitches.choose(VSwitchSelection::Ordered, now, 0).map(VSwitchId::as_str)
    }

    #[test]
    fn refused_batch_is_halved_then_paused() {
        let until = Moment::ZERO.after(Duration::from_secs(600));
        let mut vswitches = of(&["a", "b"]);
        let a = VSwitchId::from("a");
        let mut asked = Vec::new();
        loop {
            let cap = vswitches.cap(&a, Moment::ZERO).min(10);
            if cap == 0 {
                break;
            }
            asked.push(cap);
            vswitches.exhausted(&a, cap, error(), until);
        }
        assert_eq!(asked, [10, 5, 2, 1]);
        assert_eq!(ordered(&vswitches, Moment::ZERO), Some("b"));
        assert_eq!(vswitches.blocked(Moment::ZERO).count(), 1);
        assert_eq!((vswitches.cap(&a, until), vswitches.blocked(until).count()), (u32::MAX, 0));
        assert_eq!(ordered(&vswitches, until), Some("a"));
    }

    #[test]
    fn removed_vswitch_gets_no_new_eni() {
        let mut vswitches = of(&[]);
        let old = VSwitchId::from("old");
        assert_eq!(vswitches.cap(&old, Moment::ZERO), u32::MAX);
        vswitches.exhausted(&old, 10, error(), Moment::from_nanos(1));
        assert_eq!((vswitches.cap(&old, Moment::ZERO), ordered(&vswitches, Moment::ZERO)), (5, None));
    }

    #[test]
    fn vswitch_selection_policies() {
        let mut vswitches = of(&["a", "b", "c"]);
        let most = |v: &VSwitches| v.choose(VSwitchSelection::Most, Moment::ZERO, 0).map(ToString::to_string);
        assert_eq!(most(&vswitches).as_deref(), Some("a"), "in the order of the list while nothing is known");
        for (v, n) in vswitches.list.iter_mut().zip([5, 9, 9]) {
            v.available = Some(n);
        }
        assert_eq!(most(&vswitches).as_deref(), Some("b"));
        vswitches.used(&"b".into(), 3);
        assert_eq!(most(&vswitches).as_deref(), Some("c"));
        let random: std::collections::BTreeSet<_> =
            (0..9).filter_map(|salt| vswitches.choose(VSwitchSelection::Random, Moment::ZERO, salt).cloned()).collect();
        assert_eq!(random.len(), 3);
    }

    #[test]
    fn fragmented_vswitch_falls_back_to_single_addresses() {
        let mut vswitches = of(&["a"]);
        let (a, until) = (VSwitchId::from("a"), Moment::from_nanos(9));
        for (asked, left) in [(8, 4), (4, 2), (2, 1), (1, 0)] {
            vswitches.fragmented(&a, asked, until);
            assert_eq!(vswitches.prefix_cap(&a, Moment::ZERO), left);
        }
        assert_eq!((vswitches.cap(&a, Moment::ZERO), vswitches.prefix_cap(&a, until)), (u32::MAX, u32::MAX));
    }
}
