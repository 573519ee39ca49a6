//! The configuration of a running daemon: what was asked for last, what is in force, and what waits for a restart.

use std::sync::Arc;

use super::{Changed, Config};

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Live {
    in_force: Arc<Config>,
    wanted: Config,
    generation: u64,
}

impl Live {
    /// The configuration the daemon starts with; all of it is in force.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { in_force: Arc::new(config.clone()), wanted: config, generation: 1 }
    }

    /// Takes an edit and returns what it changes against the last one. The keys that need a restart stay in force as they were at the start.
    pub fn offer(&mut self, config: Config) -> Vec<Changed> {
        let changed = self.wanted.diff(&config);
        if !changed.is_empty() {
            self.generation += 1;
            let in_force = self.in_force.in_force(&config);
            if in_force != *self.in_force {
                self.in_force = Arc::new(in_force);
            }
            self.wanted = config;
        }
        changed
    }

    /// What the daemon goes by. The same allocation as long as nothing in it changes.
    #[must_use]
    pub fn in_force(&self) -> &Arc<Config> {
        &self.in_force
    }

    /// What a restart would change.
    #[must_use]
    pub fn pending(&self) -> Vec<Changed> {
        self.in_force.diff(&self.wanted)
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

    use super::super::{Effect, arbitrary, parse};
    use super::*;

    proptest! {
        /// However many edits came, the daemon runs what it would run had only the last one come, and going back leaves nothing pending.
        #[test]
        fn only_the_first_and_the_last_configuration_matter(edits in proptest::collection::vec(arbitrary::eni_conf(None), 1..5)) {
            let edits: Vec<Config> = edits.iter().map(|e| parse(&json!(e).to_string()).unwrap().0).collect();
            let first = edits[0].clone();
            let mut live = Live::new(first.clone());
            for edit in &edits {
                let before = live.generation();
                let changed = live.offer(edit.clone());
                prop_assert_eq!(live.generation() > before, !changed.is_empty());
                prop_assert_eq!(&**live.in_force(), &first.in_force(edit));
                prop_assert!(live.pending().iter().all(|c| c.effect == Effect::Restart));
            }
            live.offer(first.clone());
            prop_assert_eq!(&**live.in_force(), &first);
            prop_assert!(live.pending().is_empty());
        }
    }
}
