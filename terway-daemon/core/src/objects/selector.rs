//! Label selectors (apimachinery `meta/v1.LabelSelector`).

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

use super::decode::null_is_default;
use super::meta::Labels;

/// How a requirement compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Operator {
    /// The key is there and its value is one of the list.
    In,
    /// The key is absent, or its value is none of the list.
    NotIn,
    /// The key is there.
    Exists,
    /// The key is absent.
    DoesNotExist,
}

/// One element of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Requirement {
    /// The label's key.
    pub key: Arc<str>,
    /// How it compares.
    pub operator: Operator,
    /// What it is compared with.
    #[serde(default, deserialize_with = "null_is_default")]
    pub values: Vec<Arc<str>>,
}

impl Requirement {
    /// Whether labels meet it.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let found = labels.get(&self.key);
        let listed = |value: &str| self.values.iter().any(|v| **v == *value);
        match self.operator {
            Operator::In => found.is_some_and(listed),
            Operator::NotIn => !found.is_some_and(listed),
            Operator::Exists => found.is_some(),
            Operator::DoesNotExist => found.is_none(),
        }
    }
}

/// A selector over labels: all parts must hold. One without parts selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Keys with the value each must have.
    pub match_labels: Labels,
    /// Further requirements.
    #[serde(deserialize_with = "null_is_default")]
    pub match_expressions: Vec<Requirement>,
}

/// Why a selector means nothing. The API server refuses such a selector; a file can still hold one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSelector {
    /// `In` and `NotIn` without values.
    #[error("the requirement on `{0}` needs values")]
    ValuesMissing(Arc<str>),
    /// `Exists` and `DoesNotExist` with values.
    #[error("the requirement on `{0}` must not have values")]
    ValuesUnexpected(Arc<str>),
    /// A key that no label can have.
    #[error("`{0}` is not a label's key")]
    Key(Arc<str>),
    /// A value that no label can have.
    #[error("`{0}` is not a label's value")]
    Value(Arc<str>),
}

impl LabelSelector {
    /// Whether it selects everything.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }

    /// Whether labels meet all parts.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(&**value))
            && self.match_expressions.iter().all(|r| r.matches(labels))
    }

    /// Checks what the API server checks (`ValidateLabelSelector`).
    ///
    /// # Errors
    /// The first part that is wrong. Whoever uses the selector decides what failing closed means for it.
    pub fn check(&self) -> Result<(), BadSelector> {
        for (key, value) in self.match_labels.iter() {
            check_key(key)?;
            check_value(value)?;
        }
        for requirement in &self.match_expressions {
            check_key(&requirement.key)?;
            match (requirement.operator, requirement.values.is_empty()) {
                (Operator::In | Operator::NotIn, true) => {
                    return Err(BadSelector::ValuesMissing(Arc::clone(&requirement.key)));
                }
                (Operator::Exists | Operator::DoesNotExist, false) => {
                    return Err(BadSelector::ValuesUnexpected(Arc::clone(&requirement.key)));
                }
                _ => {}
            }
            requirement.values.iter().try_for_each(check_value)?;
        }
        Ok(())
    }
}

/// At most 63 characters of `[-A-Za-z0-9_.]` with alphanumeric ends.
fn is_name(text: &str) -> bool {
    let alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && alphanumeric(bytes.first())
        && alphanumeric(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

fn check_key(key: &Arc<str>) -> Result<(), BadSelector> {
    let (prefix, name) = key.split_once('/').map_or((None, &**key), |(prefix, name)| (Some(prefix), name));
    let dns = |p: &str| {
        p.len() <= 253
            && p.split('.').all(|label| {
                !label.starts_with('-')
                    && !label.ends_with('-')
                    && !label.is_empty()
                    && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            })
    };
    if is_name(name) && prefix.is_none_or(dns) { Ok(()) } else { Err(BadSelector::Key(Arc::clone(key))) }
}

fn check_value(value: &Arc<str>) -> Result<(), BadSelector> {
    if value.is_empty() || is_name(value) { Ok(()) } else { Err(BadSelector::Value(Arc::clone(value))) }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_everything() {
            return f.write_str("everything");
        }
        let mut comma = "";
        for (key, value) in self.match_labels.iter() {
            write!(f, "{comma}{key}={value}")?;
            comma = ",";
        }
        for r in &self.match_expressions {
            let values = r.values.join(",");
            match r.operator {
                Operator::In => write!(f, "{comma}{} in ({values})", r.key),
                Operator::NotIn => write!(f, "{comma}{} notin ({values})", r.key),
                Operator::Exists => write!(f, "{comma}{}", r.key),
                Operator::DoesNotExist => write!(f, "{comma}!{}", r.key),
            }?;
            comma = ",";
        }
        Ok(())
    }
}
