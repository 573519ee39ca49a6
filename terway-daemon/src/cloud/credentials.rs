//! The keys that sign, fetched and renewed ahead of their expiry.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use terway_core::cloud::CloudError;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::Result;
use super::Secret;
use super::config::CredentialSource;
use super::metadata::Metadata;

/// Temporary keys are replaced this long before they expire. The metadata service has the successors half an hour ahead
/// ("Instance RAM roles", ECS user guide).
const AHEAD: Duration = Duration::from_secs(15 * 60);
/// After a failed renewal, keys that are still good are used this long before the next attempt.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);

/// A key pair, with a token if it is a temporary one.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) id: Secret,
    pub(super) secret: Secret,
    pub(super) token: Option<Secret>,
    pub(super) expires: Option<SystemTime>,
}

pub(super) struct Keyring {
    source: CredentialSource,
    metadata: Arc<Metadata>,
    held: Mutex<State>,
}

#[derive(Default)]
struct State {
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
        Self { source, metadata, held: Mutex::default() }
    }

    /// The keys to sign with now. The lock is held while fetching, so that many callers fetch once.
    pub(super) async fn current(&self) -> Result<Arc<Credentials>> {
        let asked = Instant::now();
        let mut state = self.held.lock().await;
        let State { held, failed } = &mut *state;
        // Who waited for a fetch that failed has its answer: a queue of callers must not try one after the other.
        if let Some((_, error)) = failed.as_ref().filter(|(ended, _)| *ended >= asked) {
            return Err(error.clone());
        }
        let now = SystemTime::now();
        let good = held.as_ref().filter(|held| held.credentials.expires.is_none_or(|expires| now < expires));
        if let Some(held) = good
            && held.renew_from.is_none_or(|from| now < from)
        {
            return Ok(Arc::clone(&held.credentials));
        }
        match self.fetch().await {
            Ok(fresh) => {
                let credentials = Arc::new(fresh);
                // Keys that live shorter than `AHEAD` are renewed at half of their life, not at every call.
                let renew_from = credentials.expires.map(|expires| {
                    let life = expires.duration_since(now).unwrap_or_default();
                    expires - AHEAD.min(life / 2)
                });
                *held = Some(Held { credentials: Arc::clone(&credentials), renew_from });
                Ok(credentials)
            }
            Err(error) => match held.as_mut() {
                Some(old) if old.credentials.expires.is_none_or(|expires| now < expires) => {
                    warn!(%error, "cannot renew the cloud credentials; the present ones are still good");
                    old.renew_from = Some(now + RENEWAL_PAUSE);
                    Ok(Arc::clone(&old.credentials))
                }
                _ => {
                    *failed = Some((Instant::now(), error.clone()));
                    Err(error)
                }
            },
        }
    }

    /// Drops keys that the cloud refused, unless they were replaced meanwhile. False if there cannot be others.
    pub(super) async fn refused(&self, used: &Arc<Credentials>) -> bool {
        if matches!(self.source, CredentialSource::AccessKey { .. }) {
            return false;
        }
        let mut state = self.held.lock().await;
        if state.held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.credentials, used)) {
            state.held = None;
        }
        true
    }

    async fn fetch(&self) -> Result<Credentials> {
        match &self.source {
            CredentialSource::AccessKey { id, secret } => {
                Ok(Credentials { id: id.clone(), secret: secret.clone(), token: None, expires: None })
            }
            CredentialSource::RamRole { role } => {
                let role = match role {
                    Some(role) => role.clone(),
                    None => self.metadata.role().await?,
                };
                let credentials = self.metadata.role_credentials(&role).await?;
                let expires = credentials.expires.map(|at| humantime::format_rfc3339_seconds(at).to_string());
                info!(role, expires, "cloud credentials of the RAM role fetched");
                Ok(credentials)
            }
        }
    }
}
