//! Decoding of API replies: lists item by item while they arrive, and the lines of a watch.
//!
//! A list of a large cluster has tens of megabytes. It is never in memory as a whole: the text of one item is, then the few fields of it
//! that the daemon uses ([`Object::read`]).

use std::fmt;
use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use terway_core::objects::{Kind, Object, ObjectKey, ObjectName};
use tokio::sync::mpsc;

/// An object of a reply: decoded, or the reason why it cannot be.
#[derive(Debug)]
pub(super) enum Item {
    /// A usable object.
    Object(Box<Object>),
    /// An object that cannot be decoded, by its name.
    Invalid(ObjectKey, String),
}

impl Item {
    /// Decodes the text of one object. The error is the reason why not even its name can be read.
    pub(super) fn read(kind: Kind, text: &RawValue) -> Result<Self, String> {
        match Object::read(kind, &mut serde_json::Deserializer::from_str(text.get())) {
            Ok(object) => Ok(Self::Object(Box::new(object))),
            Err(error) => {
                let name = name(text).ok_or_else(|| format!("an object without a name: {error}"))?;
                Ok(Self::Invalid(ObjectKey { kind, name }, reason(&error)))
            }
        }
    }
}

/// How the objects of a resource are decoded.
pub(super) trait Decode: Copy + fmt::Display + Send + Sync + 'static {
    /// A decoded object.
    type Item: fmt::Debug + Send + 'static;

    /// Decodes the text of one object. The error is the reason why not even its name can be read.
    fn item(self, text: &RawValue) -> Result<Self::Item, String>;
}

impl Decode for Kind {
    type Item = Item;

    fn item(self, text: &RawValue) -> Result<Item, String> {
        Item::read(self, text)
    }
}

/// The name of an object of which nothing else can be used.
pub(super) fn name(text: &RawValue) -> Option<ObjectName> {
    #[derive(Deserialize)]
    struct Named {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        name: String,
        #[serde(default)]
        namespace: String,
    }
    let Named { metadata } = serde_json::from_str(text.get()).ok()?;
    (!metadata.name.is_empty()).then(|| ObjectName::new(&metadata.namespace, &metadata.name))
}

/// The error without its position: an object has one line.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]).to_owned()
}

/// The metadata of a list (`ListMeta`).
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListMeta {
    /// The version at which a watch goes on.
    pub(super) resource_version: String,
    /// The token of the next page; empty on the last one.
    #[serde(rename = "continue")]
    pub(super) continue_token: String,
}

/// Reads a list from a stream and hands out the text of each item.
///
/// # Errors
/// The stream ends early, is not JSON or is no list, or `item` returns an error.
pub(super) fn list(
    from: impl Read,
    item: &mut dyn FnMut(&RawValue) -> Result<(), String>,
) -> serde_json::Result<ListMeta> {
    let mut json = serde_json::Deserializer::from_reader(io::BufReader::with_capacity(1 << 16, from));
    let meta = List { item }.deserialize(&mut json)?;
    json.end()?;
    Ok(meta)
}

struct List<'a> {
    item: &'a mut dyn FnMut(&RawValue) -> Result<(), String>,
}

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ListMeta;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<ListMeta, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ListMeta;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ListMeta, A::Error> {
        let (mut meta, mut has_items) = (None, false);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "metadata" => meta = Some(map.next_value()?),
                "items" => {
                    has_items = true;
                    map.next_value_seed(Items { item: &mut *self.item })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        // A proxy's `{}` with status 200 must not empty the node.
        match meta {
            Some(meta) if has_items => Ok(meta),
            _ => Err(A::Error::custom("the reply has no `metadata` or no `items`")),
        }
    }
}

struct Items<'a> {
    item: &'a mut dyn FnMut(&RawValue) -> Result<(), String>,
}

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    // Go writes `null` for an empty list.
    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(text) = seq.next_element::<Box<RawValue>>()? {
            (self.item)(&text).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

/// A synchronous reader of a reply's body, whose chunks come from the runtime.
#[derive(Debug)]
pub(super) struct BodyReader {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
}

impl BodyReader {
    pub(super) fn new(chunks: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self { chunks, chunk: Bytes::new() }
    }
}

impl Read for BodyReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(0),
            }
        }
        let n = self.chunk.len().min(into.len());
        self.chunk.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

/// An event of a watch.
#[derive(Debug)]
pub(super) enum WatchEvent<I = Item> {
    /// An object was created or updated; its resource version.
    Upsert(I, String),
    /// An object was deleted; its last resource version.
    Delete(ObjectName, String),
    /// Nothing has changed up to this resource version.
    Bookmark(String),
    /// The server ends the watch.
    Error {
        /// The HTTP status code; 410: the resource version is too old.
        code: u16,
        /// The server's text.
        message: String,
    },
}

impl<I> WatchEvent<I> {
    /// Decodes a line of a watch.
    ///
    /// # Errors
    /// What is wrong with the line as such; an object that cannot be decoded is an [`Item::Invalid`].
    pub(super) fn read(decoder: impl Decode<Item = I>, line: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Line<'a> {
            #[serde(rename = "type")]
            event: &'a str,
            #[serde(borrow)]
            object: &'a RawValue,
        }
        let Line { event, object } =
            serde_json::from_slice(line).map_err(|error| format!("a line of the watch: {error}"))?;
        match event {
            "ADDED" | "MODIFIED" => Ok(Self::Upsert(decoder.item(object)?, version(object))),
            "DELETED" => {
                let name = name(object).ok_or("a deleted object without a name")?;
                Ok(Self::Delete(name, version(object)))
            }
            "BOOKMARK" => Ok(Self::Bookmark(version(object))),
            "ERROR" => {
                let Status { code, message, reason } = serde_json::from_str(object.get()).unwrap_or_default();
                let message = if message.is_empty() { reason } else { message };
                Ok(Self::Error { code, message })
            }
            other => Err(format!("an event of type `{other}`")),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Versioned {
    metadata: VersionedMeta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VersionedMeta {
    resource_version: String,
}

/// The resource version of an object; empty if it has none.
fn version(object: &RawValue) -> String {
    let Versioned { metadata } = serde_json::from_str(object.get()).unwrap_or_default();
    metadata.resource_version
}

/// The `Status` that the API sends with an error (meta/v1).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    /// The HTTP status code.
    pub(super) code: u16,
    /// A sentence.
    pub(super) message: String,
    /// A word.
    pub(super) reason: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items(text: &str) -> serde_json::Result<(ListMeta, Vec<Item>)> {
        let mut items = Vec::new();
        let meta = list(text.as_bytes(), &mut |text| {
            items.push(Item::read(Kind::Pod, text)?);
            Ok(())
        })?;
        Ok((meta, items))
    }

    #[test]
    fn list_is_read_item_by_item_and_a_bad_object_is_named() {
        let text = json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": { "resourceVersion": "77", "continue": "more" },
            "items": [
                { "metadata": { "name": "a", "namespace": "x" }, "status": { "podIP": "10.0.0.1" } },
                { "metadata": { "name": "b", "namespace": "x" }, "status": { "podIP": "not an address" } },
                { "metadata": { "name": "c", "namespace": "y" } },
            ],
        });
        let (meta, items) = items(&text.to_string()).unwrap();
        assert_eq!((meta.resource_version.as_str(), meta.continue_token.as_str()), ("77", "more"));
        let shown: Vec<String> = items
            .iter()
            .map(|item| match item {
                Item::Object(object) => object.key().to_string(),
                Item::Invalid(key, reason) => format!("{key}: {reason}"),
            })
            .collect();
        assert_eq!(shown.len(), 3);
        assert_eq!((shown[0].as_str(), shown[2].as_str()), ("Pod x/a", "Pod y/c"));
        assert!(shown[1].starts_with("Pod x/b: `not an address` is not an IP address"), "{}", shown[1]);
    }

    #[test]
    fn list_accepts_null_items_and_metadata_behind_them() {
        let (meta, items) = items(r#"{"items":null,"metadata":{"resourceVersion":"5"}}"#).unwrap();
        assert_eq!((meta.resource_version.as_str(), items.len()), ("5", 0));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in
            ["", "{}", "[]", "null", "<html>", r#"{"items":[]}"#, r#"{"metadata":{}}"#, r#"{"metadata":{},"items":[{"#]
        {
            assert!(items(text).is_err(), "{text}");
        }
        // Cut behind the items: a list without its end is not a list.
        assert!(items(r#"{"metadata":{"resourceVersion":"1"},"items":[]"#).is_err());
        assert!(items(r#"{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{}}]}"#).is_err());
    }

    #[test]
    fn chunks_of_any_size_make_one_list() {
        let text =
            json!({ "metadata": { "resourceVersion": "9" }, "items": [{ "metadata": { "name": "ä" } }] }).to_string();
        for size in 1..text.len() {
            let (sender, chunks) = mpsc::channel(text.len());
            for chunk in text.as_bytes().chunks(size) {
                sender.try_send(Ok(Bytes::copy_from_slice(chunk))).unwrap();
            }
            drop(sender);
            let mut count = 0;
            let meta = list(BodyReader::new(chunks), &mut |_| {
                count += 1;
                Ok(())
            });
            assert_eq!((meta.unwrap().resource_version.as_str(), count), ("9", 1));
        }
    }

    #[test]
    fn watch_lines_are_decoded_by_type() {
        let line = |value: serde_json::Value| WatchEvent::read(Kind::Service, value.to_string().as_bytes());
        let service = json!({ "metadata": { "name": "s", "namespace": "n", "resourceVersion": "8" } });
        assert!(matches!(line(json!({ "type": "DELETED", "object": service })), Ok(WatchEvent::Delete(name, version))
            if name.to_string() == "n/s" && version == "8"));
        let bookmark = json!({ "type": "BOOKMARK", "object": { "metadata": { "resourceVersion": "9" } } });
        assert!(matches!(line(bookmark), Ok(WatchEvent::Bookmark(version)) if version == "9"));
        let gone = json!({ "type": "ERROR", "object": { "kind": "Status", "code": 410, "message": "too old resource version" } });
        assert!(matches!(line(gone), Ok(WatchEvent::Error { code: 410, .. })));
        let bad = json!({ "type": "MODIFIED", "object": { "metadata": { "name": "s", "namespace": "n", "resourceVersion": "8" },
            "spec": { "ports": "none" } } });
        assert!(matches!(line(bad), Ok(WatchEvent::Upsert(Item::Invalid(key, _), version))
            if key.to_string() == "Service n/s" && version == "8"));
        assert!(line(json!({ "type": "RENAMED", "object": {} })).is_err());
        assert!(WatchEvent::read(Kind::Pod, b"{\"type\":\"ADDED\",\"obj").is_err());
    }
}
