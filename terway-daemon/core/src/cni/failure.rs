//! The error object that a plugin prints on stdout (specification 1.1.0, "Error").

use serde_json::{Value, json};

use super::version::Version;
use crate::errors::Error;

/// An error on its way to a runtime. containerd shows it as `MSG; DETAILS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Code of the specification below 100, the plugin's own from 100 on.
    pub code: u32,
    /// What happened, one sentence.
    pub msg: String,
    /// The catalogue's code, the particulars and the remedy.
    pub details: String,
}

impl Failure {
    /// Puts together what a daemon's reply carries in parts; `id` may be empty.
    #[must_use]
    pub fn from_parts(cni_code: u32, id: &str, cause: &str, particulars: &str, remedy: &str) -> Self {
        // Codes 2 and 4 must name the key or the variables in the message itself (specification 1.1.0, "Error").
        let (msg, particulars) = match cni_code {
            2 | 4 => (sentence(&[cause, particulars]), ""),
            _ => (cause.to_owned(), particulars),
        };
        Self { code: cni_code, msg, details: sentence(&[id, particulars, remedy]) }
    }

    /// The same failure under another CNI code, where a verb has its own (STATUS: 50, 51).
    #[must_use]
    pub fn with_code(self, code: u32) -> Self {
        Self { code, ..self }
    }

    /// The document for stdout. `version` is that of the configuration, or `None` when it could not be read.
    #[must_use]
    pub fn document(&self, version: Option<Version>) -> Value {
        json!({
            "cniVersion": version.unwrap_or(Version::NEWEST).as_str(),
            "code": self.code,
            "msg": self.msg,
            "details": self.details,
        })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_parts(error.code.cni, error.code.id, error.code.cause, &error.detail, error.code.remedy)
    }
}

fn sentence(parts: &[&str]) -> String {
    parts.iter().copied().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::{CNI_ENV, NO_ADDRESS};

    #[test]
    fn cni_error_msg_and_details() {
        let failure = Failure::from(Error::new(NO_ADDRESS, "eni-1 holds 10 of 10."));
        assert_eq!((failure.code, failure.msg.as_str()), (11, NO_ADDRESS.cause));
        assert!(failure.details.starts_with("TW0201 eni-1 holds 10 of 10. Move pods"), "{}", failure.details);
        assert_eq!(failure.document(Some(Version::V0_4_0))["cniVersion"], "0.4.0");
        assert_eq!(failure.document(None)["cniVersion"], "1.1.0");
    }

    #[test]
    fn cni_error_4_names_the_variables() {
        let failure = Failure::from(Error::new(CNI_ENV, "CNI_IFNAME is not set."));
        assert!(failure.msg.ends_with("CNI_IFNAME is not set."), "{}", failure.msg);
        assert!(!failure.details.contains("CNI_IFNAME"));
    }
}
