//! Where new addresses come from: the choice of a vSwitch, and the rest given to an exhausted one.

use std::time::Duration;

use super::config::VSwitchSelection;
use crate::clock::Moment;
use crate::cloud::CloudError;
use crate::ident::VSwitchId;

#[derive(Debug)]
struct VSwitchState {
    id: VSwitchId,
    /// New ENIs may be put there. An ENI of an earlier configuration may be in another one.
    configured: bool,
    /// Left alone until then, and why.
    blocked: Option<(Moment, CloudError)>,
    /// Ask for at most so many at once until then: more were refused, fewer may be there.
    tight: Option<(u32, Moment)>,
}

#[derive(Debug)]
pub(super) struct VSwitches {
    list: Vec<VSwitchState>,
    selection: VSwitchSelection,
    batch: u32,
    rest: Duration,
}

impl VSwitches {
    pub(super) fn new(ids: &[VSwitchId], selection: VSwitchSelection, batch: u32, rest: Duration) -> Self {
        let list = ids
            .iter()
            .map(|id| VSwitchState { id: id.clone(), configured: true, blocked: None, tight: None })
            .collect();
        Self { list, selection, batch: batch.max(1), rest }
    }

    pub(super) fn configured(&self, id: &VSwitchId) -> bool {
        self.list.iter().any(|v| v.configured && v.id == *id)
    }

    /// The vSwitch for a new ENI.
    pub(super) fn choose(&self, now: Moment) -> Option<&VSwitchId> {
        let mut open = self.list.iter().filter(|v| v.configured && self.cap(&v.id, now) > 0);
        match self.selection {
            VSwitchSelection::Ordered => open.next().map(|v| &v.id),
        }
    }

    /// How many addresses one call may ask of this vSwitch now.
    pub(super) fn cap(&self, id: &VSwitchId, now: Moment) -> u32 {
        let Some(v) = self.list.iter().find(|v| v.id == *id) else { return self.batch };
        if v.blocked.as_ref().is_some_and(|(until, _)| *until > now) {
            return 0;
        }
        v.tight.filter(|(_, until)| *until > now).map_or(self.batch, |(cap, _)| cap)
    }

    /// The cloud refused `count` addresses for want of free ones: ask for half as many next time, for none if one was too much.
    /// Returns when that ends.
    pub(super) fn exhausted(&mut self, id: &VSwitchId, count: u32, error: CloudError, now: Moment) -> Moment {
        let until = now.after(self.rest);
        if !self.list.iter().any(|v| v.id == *id) {
            self.list.push(VSwitchState { id: id.clone(), configured: false, blocked: None, tight: None });
        }
        if let Some(v) = self.list.iter_mut().find(|v| v.id == *id) {
            if count > 1 {
                v.tight = Some((count / 2, until));
            } else {
                v.blocked = Some((until, error));
                v.tight = None;
            }
        }
        until
    }

    /// The vSwitches that are left alone now, until when, and why.
    pub(super) fn blocked(&self, now: Moment) -> impl Iterator<Item = (&VSwitchId, Moment, &CloudError)> {
        self.list.iter().filter_map(move |v| {
            v.blocked.as_ref().filter(|(until, _)| *until > now).map(|(until, error)| (&v.id, *until, error))
        })
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn asks_for_less_then_rests_then_asks_for_all_again() {
        let rest = Duration::from_secs(600);
        let mut vswitches = VSwitches::new(&["a".into(), "b".into()], VSwitchSelection::Ordered, 10, rest);
        let a = VSwitchId::from("a");
        let mut asked = Vec::new();
        loop {
            let cap = vswitches.cap(&a, Moment::ZERO);
            if cap == 0 {
                break;
            }
            asked.push(cap);
            vswitches.exhausted(&a, cap, error(), Moment::ZERO);
        }
        assert_eq!(asked, [10, 5, 2, 1]);
        assert_eq!(vswitches.choose(Moment::ZERO).map(VSwitchId::as_str), Some("b"));
        assert_eq!(vswitches.blocked(Moment::ZERO).count(), 1);
        let later = Moment::ZERO.after(rest);
        assert_eq!((vswitches.cap(&a, later), vswitches.blocked(later).count()), (10, 0));
        assert_eq!(vswitches.choose(later), Some(&a));
    }

    #[test]
    fn a_vswitch_of_an_earlier_configuration_gets_no_new_eni() {
        let mut vswitches = VSwitches::new(&[], VSwitchSelection::Ordered, 10, Duration::from_secs(1));
        let old = VSwitchId::from("old");
        assert_eq!(vswitches.cap(&old, Moment::ZERO), 10);
        vswitches.exhausted(&old, 10, error(), Moment::ZERO);
        assert_eq!((vswitches.cap(&old, Moment::ZERO), vswitches.choose(Moment::ZERO)), (5, None));
    }
}
