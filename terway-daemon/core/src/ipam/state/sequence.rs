//! Numbers of effects, client tokens, and the jitter derived from them.

use sha1::{Digest, Sha1};

use crate::ipam::ids::{ClientToken, OpId};

/// The counters of a node. All that looks random derives from them, so that a replay gives the same.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// `PoolConfig::token_seed`, which is fixed.
    seed: String,
    next_op: u64,
    next_token: u64,
}

impl Sequence {
    pub(crate) fn new(seed: &str) -> Self {
        Self { seed: seed.to_owned(), next_op: 0, next_token: 0 }
    }

    pub(crate) const fn op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    /// A token never used before. [`Self::next_token`] must be stored before the token is.
    pub(crate) fn token(&mut self) -> ClientToken {
        let token = ClientToken(self.digest(self.next_token).iter().map(|byte| format!("{byte:02x}")).collect());
        self.next_token += 1;
        token
    }

    /// The number of the next token, as it is stored.
    pub(crate) const fn next_token(&self) -> u64 {
        self.next_token
    }

    pub(crate) const fn restore_next_token(&mut self, next: u64) {
        self.next_token = next;
    }

    /// The jitter of a retry: it differs from attempt to attempt.
    pub(crate) fn retry_jitter(&self) -> u64 {
        self.jitter(self.next_op)
    }

    /// The jitter of a choice for the next creation: it differs from token to token.
    pub(crate) fn creation_jitter(&self) -> u64 {
        self.jitter(self.next_token)
    }

    /// A number that looks random and is the same for the same `number` on this node.
    pub(crate) fn jitter(&self, number: u64) -> u64 {
        u64::from_be_bytes(self.digest(number)[..8].try_into().unwrap_or_default())
    }

    fn digest(&self, number: u64) -> [u8; 20] {
        Sha1::new().chain_update(number.to_be_bytes()).chain_update(self.seed.as_bytes()).finalize().into()
    }
}
