//! A kind of cloud call that is not made for a while.

use crate::clock::Moment;
use crate::errors::Error;

/// The back-off of one kind of call after a refusal.
#[derive(Debug, Default)]
pub(crate) struct CallBlock(Option<(Moment, Error)>);

impl CallBlock {
    pub(crate) fn set(&mut self, until: Moment, error: Error) {
        self.0 = Some((until, error));
    }

    pub(crate) fn clear(&mut self) {
        self.0 = None;
    }

    /// The end of the back-off and its cause, while it lasts.
    pub(crate) fn get(&self, now: Moment) -> Option<(Moment, &Error)> {
        self.0.as_ref().filter(|(until, _)| *until > now).map(|(until, error)| (*until, error))
    }
}
