//! Reading loosely typed JSON with errors that name the key.
//!
//! By hand and not by derive: the documents come from Go programs, whose decoder takes keys in any case, and a reader of
//! an error wants the key, not a byte offset.

use serde_json::{Map, Value};

use crate::errors::{CNI_CONFIG, Error};

/// A JSON object and where it stands in the document.
#[derive(Clone, Debug)]
pub(super) struct Object<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// The document itself.
    pub(super) const fn root(map: &'a Map<String, Value>) -> Self {
        Self { path: String::new(), map }
    }

    /// The value of `key`, spelled exactly or, failing that, in another case; null counts as absent, as in Go.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        let exact = self.map.get(key);
        let any_case = || self.map.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value);
        exact.or_else(any_case).filter(|value| !value.is_null())
    }

    /// An error of the configuration about `key`, in the words "`key` should be …".
    pub(super) fn wrong(&self, key: &str, should: &str) -> Error {
        let value = self.value(key).map_or_else(|| "absent".to_owned(), abridged);
        Error::new(CNI_CONFIG, format!("{}{key} should be {should}, and is {value}.", self.path))
    }

    fn typed<T>(&self, key: &str, what: &str, take: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, Error> {
        self.value(key).map(|value| take(value).ok_or_else(|| self.wrong(key, what))).transpose()
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a number without sign", Value::as_u64)
    }

    pub(super) fn unsigned32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.typed(key, "a number below 2^32", |value| value.as_u64().and_then(|number| u32::try_from(number).ok()))
    }

    /// A string in the form of `T`; the empty string counts as absent, as Go programs write it.
    pub(super) fn parsed<T: std::str::FromStr>(&self, key: &str, what: &str) -> Result<Option<T>, Error> {
        match self.string(key)? {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_not_of_the_form| self.wrong(key, what)),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Self>, Error> {
        let path = format!("{}{key}.", self.path);
        Ok(self.typed(key, "an object", Value::as_object)?.map(|map| Self { path, map }))
    }

    /// A list of objects; absent is empty.
    pub(super) fn objects(&self, key: &str) -> Result<Vec<Self>, Error> {
        let list = self.typed(key, "a list", Value::as_array)?.map_or(&[][..], Vec::as_slice);
        let entry = |(index, value): (usize, &'a Value)| match value.as_object() {
            Some(map) => Ok(Self { path: format!("{}{key}[{index}].", self.path), map }),
            None => Err(self.wrong(key, "a list of objects")),
        };
        list.iter().enumerate().map(entry).collect()
    }

    /// A list of strings; absent is empty.
    pub(super) fn strings(&self, key: &str) -> Result<Vec<String>, Error> {
        let list = self.typed(key, "a list", Value::as_array)?.map_or(&[][..], Vec::as_slice);
        let entry =
            |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| self.wrong(key, "a list of strings"));
        list.iter().map(entry).collect()
    }

    /// The keys and values that are strings.
    pub(super) fn string_pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.map.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
    }
}

/// A value short enough for one line of an error.
fn abridged(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
