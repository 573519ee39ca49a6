//! `eni_conf` as it is written: takes values out of the JSON document by the shape that the table of keys gives them, and notes every value
//! that has another shape.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::keys::{KEYS, Key, KeyDefault, KeyLocation, Kind, REMOVED, TakesEffect, nearest};
use super::units::{Ratio, parse_period};
use super::{InvalidValue, Warning};

/// A value is shown up to this many characters: it goes into log lines.
const SHOWN: usize = 120;

/// Reads a document that must be a JSON object. `name` is what the error calls it.
pub(super) fn object(name: &str, text: &str) -> Result<Map<String, Value>, InvalidValue> {
    let invalid = |reason: String| InvalidValue { key: name.into(), value: format!("{} bytes", text.len()), reason };
    match serde_json::from_str(text) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(_) => Err(invalid("is not a JSON object".into())),
        // The parser's message could quote a secret; its position cannot.
        Err(e) => Err(invalid(format!("is not JSON: error at line {}, column {}", e.line(), e.column()))),
    }
}

/// The document being read: what is taken leaves it, what is refused is noted.
pub(super) struct Reader {
    keys: Map<String, Value>,
    pub(super) bad: Vec<InvalidValue>,
    pub(super) warnings: Vec<Warning>,
}

impl Reader {
    pub(super) fn new(keys: Map<String, Value>) -> Self {
        Self { keys, bad: Vec::new(), warnings: Vec::new() }
    }

    pub(super) fn refuse(&mut self, key: &Key, value: &Value, reason: impl Into<String>) {
        let value = if key.kind == Kind::Secret { "<secret>".to_owned() } else { shown(value) };
        self.bad.push(InvalidValue { key: key.name.into(), value, reason: reason.into() });
    }

    pub(super) fn warn(&mut self, key: &str, message: impl Into<String>) {
        self.warnings.push(Warning { key: key.into(), message: message.into() });
    }

    /// Takes a value; `null` is none.
    pub(super) fn take(&mut self, key: &Key) -> Option<Value> {
        self.keys.remove(key.name).filter(|value| !value.is_null())
    }

    /// Takes a value or the table's default, and reads it; what cannot be read is refused, and the default read instead.
    fn read<T>(&mut self, key: &Key, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let default = || match key.default {
            KeyDefault::Literal(text) => read(&literal(text)),
            KeyDefault::Described(_) | KeyDefault::Required => None,
        };
        match self.take(key) {
            None => default(),
            Some(value) => read(&value).or_else(|| {
                self.refuse(key, &value, format!("must be {}", key.kind));
                default()
            }),
        }
    }

    /// A string; the empty one is none.
    pub(super) fn text(&mut self, key: &Key) -> Option<String> {
        self.read(key, |value| value.as_str().map(str::to_owned)).filter(|text| !text.is_empty())
    }

    pub(super) fn flag(&mut self, key: &Key) -> bool {
        self.read(key, Value::as_bool).unwrap_or_default()
    }

    pub(super) fn whole(&mut self, key: &Key) -> Option<i64> {
        let Kind::Whole { least, most } = key.kind else { return None };
        self.read(key, |value| value.as_i64().filter(|n| (least..=most).contains(n)))
    }

    /// A whole number of a key whose limits are inside those of `u32`.
    pub(super) fn count(&mut self, key: &Key) -> u32 {
        self.whole(key).and_then(|n| u32::try_from(n).ok()).unwrap_or_default()
    }

    pub(super) fn ratio(&mut self, key: &Key) -> Ratio {
        let Kind::Number { least, most } = key.kind else { return Ratio::ONE };
        self.drop_empty(key);
        let number = |value: &Value| match value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_f64(),
        };
        self.read(key, |value| number(value).filter(|n| (least..=most).contains(n)).and_then(Ratio::new))
            .unwrap_or(Ratio::ONE)
    }

    /// The empty string stands for a value that nobody wrote.
    fn drop_empty(&mut self, key: &Key) {
        if self.keys.get(key.name).and_then(Value::as_str) == Some("") {
            self.keys.remove(key.name);
        }
    }

    /// A length of time; none where the table has no default.
    pub(super) fn period(&mut self, key: &Key) -> Option<Duration> {
        let Kind::Period { least, most } = key.kind else { return None };
        self.drop_empty(key);
        let within = |period: &Duration| (least..=most).contains(period);
        self.read(key, |value| match value {
            Value::String(text) => parse_period(text.trim()).filter(within),
            value => value.as_f64().and_then(|s| Duration::try_from_secs_f64(s).ok()).filter(within),
        })
    }

    /// The value that stands at the place of the word, the table's default for the empty string.
    pub(super) fn choice<T: Copy, const N: usize>(&mut self, key: &Key, values: [T; N]) -> T {
        let Kind::OneOf(words) = key.kind else { return values[0] };
        let find = |word: &str| words.iter().position(|w| *w == word).and_then(|at| values.get(at)).copied();
        let default = match key.default {
            KeyDefault::Literal(word) => word,
            KeyDefault::Described(_) | KeyDefault::Required => "",
        };
        let chosen = self.read(key, |value| value.as_str().and_then(|w| find(if w.is_empty() { default } else { w })));
        chosen.unwrap_or(values[0])
    }

    /// A list or an object; none and refused are both the empty one.
    pub(super) fn many<T: DeserializeOwned + Default>(&mut self, key: &Key) -> T {
        self.read(key, |value| T::deserialize(value).ok()).unwrap_or_default()
    }

    /// Warns of everything that is still there: unknown, removed, misplaced and pending keys.
    pub(super) fn rest(&mut self) {
        for (name, value) in std::mem::take(&mut self.keys) {
            let known = KEYS.iter().find(|key| key.name == name);
            let message = match known {
                Some(key) if key.location == KeyLocation::ConfigMap => {
                    "belongs beside eni_conf in the ConfigMap, not into it; it is ignored here".to_owned()
                }
                Some(key) if key.effect == TakesEffect::Unsupported => {
                    // The value that describes what this version does anyway deserves no warning.
                    if value.is_null() || matches!(key.default, KeyDefault::Literal(text) if literal(text) == value) {
                        continue;
                    }
                    "has no effect in this version".to_owned()
                }
                Some(_) => continue,
                None => unknown(&name),
            };
            // A name is as long as its writer likes, and could be a misplaced value.
            self.warn(&shorten(&name), message);
        }
    }
}

/// What to say of a name that the table does not have.
pub(super) fn unknown(name: &str) -> String {
    if let Some((_, successor)) = REMOVED.iter().find(|(removed, _)| *removed == name) {
        return format!("was removed and is ignored: {successor}");
    }
    match nearest(name) {
        Some(known) => format!("is not a known key and is ignored; did you mean {known}?"),
        None => "is not a known key and is ignored".to_owned(),
    }
}

/// A default of the table as the value it stands for.
fn literal(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_not_json| Value::String(text.to_owned()))
}

pub(super) fn shown(value: &Value) -> String {
    shorten(&value.to_string())
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
