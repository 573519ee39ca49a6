//! The outcome of a change of the configuration, as it is told to the cluster: accepted or refused, and from which ConfigMaps.

use std::fmt;

use super::Warning;
use crate::errors::Error;
use crate::objects::ObjectName;

/// The label of a Node that names the ConfigMap with the node's own configuration.
pub const NODE_LABEL: &str = "terway-config";

/// Where a configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigOrigin {
    /// Files that are mounted into the container.
    Files,
    /// ConfigMaps that are read from the API server.
    ConfigMaps {
        /// The cluster's.
        cluster: ObjectName,
        /// The node's own, which its label [`NODE_LABEL`] names.
        node: Option<ObjectName>,
    },
}

impl fmt::Display for ConfigOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files => f.write_str("mounted files"),
            Self::ConfigMaps { cluster, node: None } => write!(f, "ConfigMap {cluster}"),
            Self::ConfigMaps { cluster, node: Some(node) } => write!(f, "ConfigMap {cluster} with {node}"),
        }
    }
}

/// The outcome of the latest change. A new one is published only when something in it differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Where the latest reading came from.
    pub origin: ConfigOrigin,
    /// The generation in force: 1 at the start, one more with every edit that changes something.
    pub generation: u64,
    /// Why the latest reading is not in force, with every refused key and without secrets; `None` if it is in force.
    pub refusal: Option<Error>,
    /// What the configuration in force is warned of.
    pub warnings: Vec<Warning>,
}

impl Outcome {
    /// The reason of an event and of a condition: `ConfigAccepted` or `ConfigRefused`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        if self.refusal.is_none() { "ConfigAccepted" } else { "ConfigRefused" }
    }

    /// The message of an event and of a condition, in one or two sentences.
    #[must_use]
    pub fn message(&self) -> String {
        let Self { origin, generation, refusal, warnings } = self;
        match refusal {
            Some(error) => {
                let detail = error.detail.trim_end_matches('.');
                format!("{}: {origin}: {detail}. Generation {generation} stays in force.", error.code.id)
            }
            None if warnings.is_empty() => format!("{origin}: generation {generation} is in force."),
            None => {
                let all: Vec<String> = warnings.iter().map(ToString::to_string).collect();
                format!("{origin}: generation {generation} is in force. Warnings: {}.", all.join("; "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors;

    #[test]
    fn outcome_names_the_config_maps_the_code_and_what_stays_in_force() {
        let name = |name| ObjectName::new("kube-system", name);
        let origin = ConfigOrigin::ConfigMaps { cluster: name("eni-config"), node: Some(name("gpu")) };
        let accepted = Outcome { origin, generation: 3, refusal: None, warnings: Vec::new() };
        assert_eq!(accepted.reason(), "ConfigAccepted");
        assert_eq!(
            accepted.message(),
            "ConfigMap kube-system/eni-config with kube-system/gpu: generation 3 is in force."
        );
        let refusal = Some(Error::new(errors::CONFIG_REFUSED, "max_eni = -1: is too small"));
        let refused = Outcome { refusal, origin: ConfigOrigin::Files, ..accepted };
        assert_eq!(refused.reason(), "ConfigRefused");
        assert_eq!(
            refused.message(),
            "TW0402: mounted files: max_eni = -1: is too small. Generation 3 stays in force."
        );
    }
}
