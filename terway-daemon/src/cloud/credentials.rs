//! The keys that sign: where they come from, fetched once for all callers and renewed ahead of their expiry.

mod files;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use terway_core::cloud::{CloudError, ErrorClass};
use tokio::sync::OwnedMutexGuard;
use tracing::{info, warn};

use super::config::CredentialSource;
use super::metadata::Metadata;
use super::rpc::failure;
use super::{Result, Secret};
use crate::supervise;

/// Temporary keys are replaced this long before they expire. The metadata service has the successors half an hour ahead
/// ("Instance RAM roles", ECS user guide).
const AHEAD: Duration = Duration::from_secs(15 * 60);
/// After a failed renewal, keys that are still good are used this long before the next attempt.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);
/// How often files are read again: somebody may have replaced them.
const REREAD: Duration = Duration::from_secs(60);

/// A key pair, with a token if it is a temporary one.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) id: Secret,
    pub(super) secret: Secret,
    pub(super) token: Option<Secret>,
    pub(super) expires: Option<SystemTime>,
    /// They are read again from this time on, whether they expire or not.
    pub(super) reread: Option<Duration>,
}

impl Credentials {
    fn good(&self, now: SystemTime) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }

    fn renew_from(&self, now: SystemTime) -> Option<SystemTime> {
        // Keys that live shorter than `AHEAD` are renewed at half of their life, not at every call.
        let ahead = self.expires.map(|expires| {
            let life = expires.duration_since(now).unwrap_or_default();
            expires - AHEAD.min(life / 2)
        });
        [ahead, self.reread.map(|after| now + after)].into_iter().flatten().min()
    }
}

#[derive(Clone)]
pub(super) struct Keyring(Arc<Inner>);

struct Inner {
    metadata: Arc<Metadata>,
    state: Mutex<State>,
    /// Held by the one caller that fetches.
    fetching: Arc<tokio::sync::Mutex<()>>,
}

struct State {
    source: CredentialSource,
    /// Counts replacements of `source`: keys of an earlier one must not come back.
    generation: u64,
    held: Option<Held>,
    /// The last fetch, if it failed, and when it ended.
    failed: Option<(Instant, CloudError)>,
}

struct Held {
    credentials: Arc<Credentials>,
    renew_from: Option<SystemTime>,
}

impl Keyring {
    pub(super) fn new(source: CredentialSource, metadata: Arc<Metadata>) -> Self {
        let state = State { source, generation: 0, held: None, failed: None };
        Self(Arc::new(Inner { metadata, state: Mutex::new(state), fetching: Arc::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    /// Takes keys from elsewhere from now on; calls under way end with those they have.
    pub(super) fn replace(&self, source: CredentialSource) {
        let mut state = self.state();
        *state = State { source, generation: state.generation + 1, held: None, failed: None };
    }

    /// The keys to sign with now.
    ///
    /// Keys that are due but good are returned at once and renewed meanwhile: an outage of their source delays no call.
    pub(super) async fn current(&self) -> Result<Arc<Credentials>> {
        let asked = Instant::now();
        if let Some((credentials, due)) = self.held() {
            if due && let Ok(turn) = Arc::clone(&self.0.fetching).try_lock_owned() {
                let keyring = self.clone();
                // Its failure is kept and logged there.
                supervise::spawn_contained("credentials", async move { keyring.fetch(turn).await });
            }
            return Ok(credentials);
        }
        let turn = Arc::clone(&self.0.fetching).lock_owned().await;
        // Another caller may have fetched while this one waited; who waited for a fetch that failed has its answer as well: a queue
        // of callers must not try one after the other.
        if let Some((credentials, _)) = self.held() {
            return Ok(credentials);
        }
        let failed = self.state().failed.clone().filter(|(ended, _)| *ended >= asked);
        match failed {
            Some((_, error)) => Err(error),
            None => self.fetch(turn).await,
        }
    }

    /// Good keys, and whether they are due for renewal.
    fn held(&self) -> Option<(Arc<Credentials>, bool)> {
        let now = SystemTime::now();
        let state = self.state();
        let held = state.held.as_ref().filter(|held| held.credentials.good(now))?;
        Some((Arc::clone(&held.credentials), held.renew_from.is_some_and(|from| now >= from)))
    }

    /// Drops keys that the cloud refused, unless they were replaced meanwhile. False if there cannot be others.
    pub(super) fn refused(&self, used: &Arc<Credentials>) -> bool {
        let mut state = self.state();
        match &state.held {
            Some(held) if Arc::ptr_eq(&held.credentials, used) => {}
            _ => return true,
        }
        if matches!(state.source, CredentialSource::AccessKey { .. }) {
            return false;
        }
        state.held = None;
        true
    }

    async fn fetch(&self, _turn: OwnedMutexGuard<()>) -> Result<Arc<Credentials>> {
        let (source, generation) = {
            let state = self.state();
            (state.source.clone(), state.generation)
        };
        let result = self.read(&source).await;
        let now = SystemTime::now();
        let mut state = self.state();
        if state.generation != generation {
            // The caller asked before the source was replaced; whoever asks next asks the new one.
            return result.map(Arc::new);
        }
        match result {
            Ok(fresh) => {
                let same = state.held.as_ref().is_some_and(|held| held.credentials.id == fresh.id);
                if !same {
                    let expires = fresh.expires.map(|at| humantime::format_rfc3339_seconds(at).to_string());
                    info!(source = source.name(), expires, "cloud credentials loaded");
                }
                let credentials = Arc::new(fresh);
                let renew_from = credentials.renew_from(now);
                state.held = Some(Held { credentials: Arc::clone(&credentials), renew_from });
                state.failed = None;
                Ok(credentials)
            }
            Err(error) => match &mut state.held {
                Some(old) if old.credentials.good(now) => {
                    warn!(%error, "cannot renew the cloud credentials; the present ones are still good");
                    old.renew_from = Some(now + RENEWAL_PAUSE);
                    Ok(Arc::clone(&old.credentials))
                }
                _ => {
                    state.failed = Some((Instant::now(), error.clone()));
                    Err(error)
                }
            },
        }
    }

    async fn read(&self, source: &CredentialSource) -> Result<Credentials> {
        let found = match source {
            CredentialSource::Chain(links) => {
                for link in links {
                    if let Some(found) = self.read_link(link).await? {
                        return Ok(found);
                    }
                }
                None
            }
            link => self.read_link(link).await?,
        };
        found.ok_or_else(|| {
            let message = format!("no keys: {}", source.name());
            failure(CloudError::CREDENTIALS, ErrorClass::NotFound, message)
        })
    }

    /// `None` when the source is not there at all; one that is there and not usable is an error, not a reason to try another.
    async fn read_link(&self, source: &CredentialSource) -> Result<Option<Credentials>> {
        match source {
            CredentialSource::AccessKey { id, secret } => {
                let (id, secret) = (id.clone(), secret.clone());
                Ok(Some(Credentials { id, secret, token: None, expires: None, reread: None }))
            }
            CredentialSource::KeyFiles { folder } => files::key_pair(folder).await,
            CredentialSource::TokenFile { path } => files::token(path, SystemTime::now()).await,
            CredentialSource::RamRole { role } => {
                let role = match role {
                    Some(role) => role.clone(),
                    None => match self.0.metadata.role().await {
                        Err(error) if error.class == ErrorClass::NotFound => return Ok(None),
                        role => role?,
                    },
                };
                self.0.metadata.role_credentials(&role).await.map(Some)
            }
            // The constructor of chains makes flat ones.
            CredentialSource::Chain(_) => Ok(None),
        }
    }
}
