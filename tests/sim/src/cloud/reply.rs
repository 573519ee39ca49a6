//! What the OpenAPI answers when it refuses, and how parameters are read.

use std::collections::BTreeMap;

/// A refusal: HTTP status, code, words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.to_owned(), message: message.into() }
    }

    pub(super) fn missing(name: &str) -> Self {
        let message =
            format!("The input parameter \"{name}\" that is mandatory for processing this request is not supplied.");
        Self::new(400, "MissingParameter", message)
    }

    pub(super) fn invalid(name: &str, why: &str) -> Self {
        Self::new(400, "InvalidParameter", format!("The specified parameter \"{name}\" is not valid: {why}."))
    }

    pub(super) fn eni_not_found(id: &str) -> Self {
        Self::new(404, "InvalidEniId.NotFound", format!("The specified NetworkInterfaceId {id} does not exist."))
    }

    pub(super) fn eni_state(id: &str, status: &str) -> Self {
        let message = format!("The operation is not allowed while the ENI {id} is {status}.");
        Self::new(403, "InvalidOperation.InvalidEniState", message)
    }
}

/// The parameters of a call, from query and form alike.
#[derive(Clone, Debug, Default)]
pub(super) struct Parameters(BTreeMap<String, String>);

impl Parameters {
    pub(super) fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn need(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name).ok_or_else(|| Refusal::missing(name))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, Refusal> {
        self.get(name).map(|text| text.parse().map_err(|_parse| Refusal::invalid(name, "not a number"))).transpose()
    }

    /// `Name.1`, `Name.2`, … in order.
    pub(super) fn list(&self, name: &str) -> Vec<&str> {
        (1..).map_while(|n| self.get(&format!("{name}.{n}"))).collect()
    }

    /// `Tag.1.Key`, `Tag.1.Value`, …
    pub(super) fn tags(&self) -> BTreeMap<String, String> {
        (1..)
            .map_while(|n| {
                let key = self.get(&format!("Tag.{n}.Key"))?;
                Some((key.to_owned(), self.get(&format!("Tag.{n}.Value")).unwrap_or_default().to_owned()))
            })
            .collect()
    }

    /// Everything but the `ClientToken`, for telling whether two calls with one token are the same call.
    pub(super) fn fingerprint(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.0.iter().filter(|(name, _)| *name != "ClientToken") {
            text.extend([name, "\0", value, "\0"]);
        }
        text
    }
}
