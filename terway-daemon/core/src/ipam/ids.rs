//! Numbers and tokens by which requests, effects and cloud calls are told apart.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The number of one open request (ADD, DEL or GC). The engine chooses it and never uses one twice in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The number of one execution of one effect. A report carries the number of the effect it reports on, so that a late or repeated report of an
/// earlier attempt is recognised and ignored. Numbers mean nothing across restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// The `ClientToken` of a call that creates something. The cloud carries out calls with the same token once, however often they are sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClientToken(pub String);

impl fmt::Display for ClientToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
