//! The configuration of a running daemon: what was asked for last, what is in force, and what waits for a restart.

use std::sync::Arc;

use super::{Config, KeyChange};

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct LiveConfig {
    effective: Arc<Config>,
    requested: Config,
    generation: u64,
}

impl LiveConfig {
    /// The configuration the daemon starts with; all of it is in force.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { effective: Arc::new(config.clone()), requested: config, generation: 1 }
    }

    /// Takes an edit and returns what it changes against the last one. The keys that need a restart stay in force as they were at the start.
    pub fn update(&mut self, config: Config) -> Vec<KeyChange> {
        let changed = self.requested.diff(&config);
        if !changed.is_empty() {
            self.generation += 1;
            let effective = self.effective.effective(&config);
            if effective != *self.effective {
                self.effective = Arc::new(effective);
            }
            self.requested = config;
        }
        changed
    }

    /// What the daemon goes by. The same allocation as long as nothing in it changes.
    #[must_use]
    pub fn effective(&self) -> &Arc<Config> {
        &self.effective
    }

    /// What a restart would change.
    #[must_use]
    pub fn pending(&self) -> Vec<KeyChange> {
        self.effective.diff(&self.requested)
    }

    /// 1 at the start, one more with every edit that changes something.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{TakesEffect, arbitrary, parse};
    use super::*;

    proptest! {
        /// However many edits came, the daemon runs what it would run had only the last one come, and going back leaves nothing pending.
        #[test]
        fn config_history_is_compared_end_to_end(edits in proptest::collection::vec(arbitrary::eni_conf(None), 1..5)) {
            let edits: Vec<Config> = edits.iter().map(|e| parse(&json!(e).to_string()).unwrap().0).collect();
            let first = edits[0].clone();
            let mut live = LiveConfig::new(first.clone());
            for edit in &edits {
                let before = live.generation();
                let changed = live.update(edit.clone());
                prop_assert_eq!(live.generation() > before, !changed.is_empty());
                prop_assert_eq!(&**live.effective(), &first.effective(edit));
                prop_assert!(live.pending().iter().all(|c| c.effect == TakesEffect::Restart));
            }
            live.update(first.clone());
            prop_assert_eq!(&**live.effective(), &first);
            prop_assert!(live.pending().is_empty());
        }
    }
}
