//! The source of the configuration: a mounted ConfigMap or a file, or ConfigMaps of the API server, watched. A valid edit is published; an invalid one is reported, and the
//! previous configuration stays in force.

mod files;
mod input;
mod status;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use terway_core::config::{Config, ConfigDocuments, ConfigOrigin, LiveConfig, Outcome, Warning};
use terway_core::errors::{self, Error};
use tokio::sync::watch::{Receiver, Sender};
use tracing::{error, info, warn};

pub use self::files::Paths;
pub(crate) use self::files::read_data;
use self::input::Read;
pub use self::input::{ConfigLocation, Input};
pub use self::status::{ConfigMetrics, ConfigStatus, Edit, Failure};

/// How often the files are read although nothing was seen: not every file system tells.
const READ_EVERY: Duration = Duration::from_secs(60);

/// What reading gave: the documents, or why not.
type Reading = Result<ConfigDocuments, String>;

/// The configuration of this node, now and as it changes.
#[derive(Debug)]
pub struct ConfigSource {
    input: Input,
    metrics: ConfigMetrics,
    published: Sender<Arc<Config>>,
    outcome: Sender<Outcome>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    live: LiveConfig,
    /// What was read last, good or bad: the same again is no news.
    read: Reading,
    /// Where it came from.
    origin: ConfigOrigin,
    /// Why it may be out of date.
    stale: Option<String>,
    status: ConfigStatus,
}

impl ConfigSource {
    /// Reads the configuration for the first time. When it is bad, the last good one of an earlier run is taken, so that a bad edit does not
    /// keep a node from starting.
    ///
    /// # Errors
    /// [`errors::CONFIG_REFUSED`] with every refused value, or [`errors::CONFIG_UNREADABLE`], when there is no earlier one either.
    pub fn open(input: impl Into<Input>, metrics: ConfigMetrics) -> Result<Self, Error> {
        let input = input.into();
        let Read { documents: read, origin, stale } = input.read();
        let (config, warnings, failure) = match validate(&read, &input) {
            Ok((config, warnings)) => {
                input.last_good().save(&read);
                (config, warnings, None)
            }
            Err(failure) => {
                let Some((config, warnings)) = input.last_good().load().and_then(|kept| kept.check().ok()) else {
                    return Err(failure.error);
                };
                error!(
                    code = failure.error.code.id,
                    detail = failure.error.detail,
                    "eni-config is invalid; starting with the last good one"
                );
                (config, warnings, Some(*failure))
            }
        };
        for warning in &warnings {
            warn!(key = warning.key, "eni-config: {}", warning.message);
        }
        metrics.reloaded(failure.as_ref().map_or("applied", |failure| failure.result));
        let live = LiveConfig::new(config);
        let status = ConfigStatus::start(&live, warnings, failure);
        let published = Sender::new(Arc::clone(live.effective()));
        let outcome = Sender::new(status.outcome(origin.clone()));
        Ok(Self { input, metrics, published, outcome, state: Mutex::new(State { live, read, origin, stale, status }) })
    }

    /// What is in force now.
    #[must_use]
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.published.borrow())
    }

    /// What is in force, now and later. Keys that need a restart never change in it.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<Arc<Config>> {
        self.published.subscribe()
    }

    /// The outcome of the latest reading, now and later.
    #[must_use]
    pub fn outcomes(&self) -> Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// What the last edits did.
    #[must_use]
    pub fn status(&self) -> ConfigStatus {
        self.state().status.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Why the configuration in force may be out of date: a ConfigMap that cannot be read at the moment.
    #[must_use]
    pub fn problem(&self) -> Option<Error> {
        let stale = self.state().stale.clone()?;
        Some(Error::new(errors::CONFIG_UNREADABLE, format!("{stale}; what was read last stays in force.")))
    }

    /// Follows files or ConfigMaps as long as the daemon runs.
    pub async fn run(self: Arc<Self>) {
        self.input.follow(|| self.reload()).await;
    }

    /// Reads them once and takes what is new in them.
    pub fn reload(&self) {
        let Read { documents: read, origin, stale } = self.input.read();
        let mut state = self.state();
        state.stale = stale;
        if state.read == read && state.origin == origin {
            return;
        }
        state.origin = origin;
        match validate(&read, &self.input) {
            Ok((config, warnings)) => {
                let changed = state.live.update(config);
                self.input.last_good().save(&read);
                for warning in warnings.iter().filter(|w| !state.status.warnings.contains(w)) {
                    warn!(key = warning.key, "eni-config: {}", warning.message);
                }
                for change in &changed {
                    info!(key = change.key, old = %change.old, new = %change.new, effect = %change.effect, "eni-config changed");
                }
                info!(generation = state.live.generation(), changes = changed.len(), "eni-config applied");
                self.metrics.reloaded("applied");
                let State { live, status, .. } = &mut *state;
                status.record_change(live, changed, warnings, SystemTime::now());
            }
            Err(failure) => {
                error!(
                    code = failure.error.code.id,
                    detail = failure.error.detail,
                    remedy = failure.error.code.remedy,
                    generation = state.live.generation(),
                    "eni-config is invalid; the previous one stays in force"
                );
                self.metrics.reloaded(failure.result);
                state.status.failure = Some(*failure);
            }
        }
        state.read = read;
        // Under the lock, so that two reloads publish in the order they were taken.
        let effective = Arc::clone(state.live.effective());
        self.published.send_if_modified(|held| {
            let new = !Arc::ptr_eq(held, &effective);
            *held = effective;
            new
        });
        let outcome = state.status.outcome(state.origin.clone());
        self.outcome.send_if_modified(|held| {
            let new = *held != outcome;
            *held = outcome;
            new
        });
    }
}

fn validate(read: &Reading, input: &Input) -> Result<(Config, Vec<Warning>), Box<Failure>> {
    let failure =
        |code, result, detail| Box::new(Failure { at: SystemTime::now(), result, error: Error::new(code, detail) });
    let documents = read.as_ref().map_err(|reason| failure(errors::CONFIG_UNREADABLE, "unreadable", reason.clone()))?;
    let (config, mut warnings) = documents.check().map_err(|bad| {
        let all: Vec<String> = bad.iter().map(ToString::to_string).collect();
        failure(errors::CONFIG_REFUSED, "refused", all.join("; "))
    })?;
    // kubelet never renews a subPath mount (kubernetes#50345).
    warnings.extend(input.mounted_files().into_iter().map(|path| {
        Warning {
            key: path.display().to_string(),
            message:
                "is mounted by itself (subPath): edits of the ConfigMap do not reach it; mount the whole ConfigMap"
                    .to_owned(),
        }
    }));
    Ok((config, warnings))
}

#[cfg(test)]
mod tests;
