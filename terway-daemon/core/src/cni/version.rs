//! The versions of the specification that the plugin speaks, and which verbs each has.

use std::fmt;

use serde_json::{Value, json};

use super::env::Verb;
use crate::errors::{CNI_VERSION, Error};

/// A version of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 0.3.0: interfaces and chaining.
    V0_3_0,
    /// 0.3.1: as 0.3.0, a typing error less.
    V0_3_1,
    /// 0.4.0: CHECK, prevResult on DEL.
    V0_4_0,
    /// 1.0.0: `ips[].version` is gone.
    V1_0_0,
    /// 1.1.0: GC, STATUS, `cniVersions`, interface and route attributes.
    V1_1_0,
}

impl Version {
    /// Every version spoken, oldest first.
    pub const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest version spoken.
    pub const NEWEST: Self = Self::V1_1_0;

    /// As it stands in `cniVersion`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version that `text` names exactly.
    ///
    /// # Errors
    /// `TW0001` (CNI code 1) for every other text, as specification 1.1.0, "Error", asks for.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
            .ok_or_else(|| Error::new(CNI_VERSION, format!("cniVersion is {text:?}.")))
    }

    /// Whether this version of the specification has the verb.
    #[must_use]
    pub fn has(self, verb: Verb) -> bool {
        match verb {
            Verb::Add | Verb::Del | Verb::Version => true,
            Verb::Check => self >= Self::V0_4_0,
            Verb::Gc | Verb::Status => self >= Self::V1_1_0,
        }
    }

    /// `has`, as an error for the runtime.
    ///
    /// # Errors
    /// `TW0001` (CNI code 1) when this version does not have the verb.
    pub fn require(self, verb: Verb) -> Result<(), Error> {
        if self.has(verb) { Ok(()) } else { Err(Error::new(CNI_VERSION, format!("cniVersion {self} has no {verb}."))) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The answer to VERSION. It repeats the `cniVersion` of the question even where that is unknown here (specification 1.1.0,
/// "VERSION success"): asking is how a runtime finds out.
#[must_use]
pub fn supported(asked: Option<&str>) -> Value {
    json!({
        "cniVersion": asked.unwrap_or(Version::NEWEST.as_str()),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cni_version_spelling() {
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Ok(version));
        }
        for bad in ["", "0.2.0", "1.0", "1.1.0 ", "v1.1.0", "1.2.0", "2.0.0"] {
            assert_eq!(Version::parse(bad).unwrap_err().code.cni, 1, "{bad}");
        }
    }

    #[test]
    fn verbs_by_cni_version() {
        let having = |verb| Version::ALL.into_iter().filter(|v| v.has(verb)).map(Version::as_str).collect::<Vec<_>>();
        assert_eq!(having(Verb::Add).len(), 5);
        assert_eq!(having(Verb::Check), ["0.4.0", "1.0.0", "1.1.0"]);
        assert_eq!(having(Verb::Gc), ["1.1.0"]);
        assert_eq!(having(Verb::Status), ["1.1.0"]);
        assert_eq!(Version::V1_0_0.require(Verb::Status).unwrap_err().code.cni, 1);
    }

    #[test]
    fn version_verb_output() {
        assert_eq!(
            supported(Some("9.9.9")).to_string(),
            r#"{"cniVersion":"9.9.9","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#
        );
        assert_eq!(supported(None)["cniVersion"], "1.1.0");
    }
}
