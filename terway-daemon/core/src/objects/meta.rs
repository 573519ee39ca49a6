//! Metadata, labels, and the table that lets equal strings share one allocation.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::{Arc, LazyLock};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::ObjectName;
use super::decode::null_is_default;

/// Annotations under these prefixes are kept; the rest (`kubectl.kubernetes.io/last-applied-configuration` first of all) is not.
const ANNOTATIONS: [&str; 7] = [
    "k8s.aliyun.com/",
    "kubernetes.io/egress-bandwidth",
    "kubernetes.io/ingress-bandwidth",
    "network.alibabacloud.com/",
    "service.beta.kubernetes.io/",
    "service.kubernetes.io/",
    "terway.alibabacloud.com/",
];

/// Labels or annotations: sorted by key, shared between objects that have the same ones (the pods of a Deployment).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.shared(key).map(|value| &**value)
    }

    /// The value of a key, for whoever wants to keep it.
    #[must_use]
    pub fn shared(&self, key: &str) -> Option<&Arc<str>> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// Key and value of each, by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Arc<str>, &Arc<str>)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// Those of some keys.
    #[must_use]
    pub fn filtered(&self, wanted: impl Fn(&str) -> bool) -> Self {
        let all: Vec<_> = self.0.iter().filter(|(key, _)| wanted(key)).cloned().collect();
        if all.is_empty() { Self::default() } else { Self(all.into()) }
    }

    /// Whether they are the very same, not only equal: told without a look at them.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Default for Labels {
    fn default() -> Self {
        static NONE: LazyLock<Labels> = LazyLock::new(|| Labels(Arc::from([])));
        NONE.clone()
    }
}

impl<K: Into<Arc<str>>, V: Into<Arc<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let sorted: BTreeMap<Arc<str>, Arc<str>> = pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        if sorted.is_empty() { Self::default() } else { Self(sorted.into_iter().collect()) }
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let map: BTreeMap<Arc<str>, Arc<str>> = null_is_default(from)?;
        Ok(map.into_iter().collect())
    }
}

/// Reads annotations, and never allocates those that nobody asks for.
fn annotations<'de, D: Deserializer<'de>>(from: D) -> Result<Labels, D::Error> {
    struct Used;
    impl<'de> Visitor<'de> for Used {
        type Value = Labels;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of strings")
        }

        fn visit_unit<E>(self) -> Result<Labels, E> {
            Ok(Labels::default())
        }

        fn visit_none<E>(self) -> Result<Labels, E> {
            Ok(Labels::default())
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Labels, D::Error> {
            from.deserialize_map(self)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
            let mut kept: Vec<(Arc<str>, Arc<str>)> = Vec::new();
            while let Some(key) = map.next_key::<String>()? {
                if ANNOTATIONS.iter().any(|prefix| key.starts_with(prefix)) {
                    kept.push((key.into(), map.next_value()?));
                } else {
                    map.next_value::<serde::de::IgnoredAny>()?;
                }
            }
            Ok(kept.into_iter().collect())
        }
    }
    from.deserialize_option(Used)
}

/// The metadata that all kinds have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ObjectMeta {
    /// Namespace and name.
    pub object: ObjectName,
    /// The object's unique id; empty in a file that has none.
    pub uid: Box<str>,
    /// The version by which the API server tells states apart; empty in a file.
    pub resource_version: Box<str>,
    /// Labels.
    pub labels: Labels,
    /// Annotations that somebody here asks for.
    pub annotations: Labels,
    /// Whether a deletion timestamp is set: the object is on its way out.
    pub deleting: bool,
}

impl ObjectMeta {
    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.object.namespace = interner.string(&self.object.namespace);
        self.labels = interner.labels(&self.labels);
        self.annotations = interner.labels(&self.annotations);
    }
}

impl<'de> Deserialize<'de> for ObjectMeta {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "camelCase", default)]
        struct Raw {
            #[serde(deserialize_with = "null_is_default")]
            namespace: String,
            #[serde(deserialize_with = "null_is_default")]
            name: String,
            #[serde(deserialize_with = "null_is_default")]
            uid: Box<str>,
            #[serde(deserialize_with = "null_is_default")]
            resource_version: Box<str>,
            labels: Labels,
            #[serde(deserialize_with = "annotations")]
            annotations: Labels,
            deletion_timestamp: Option<serde::de::IgnoredAny>,
        }
        let raw = Raw::deserialize(from)?;
        Ok(Self {
            object: ObjectName::new(&raw.namespace, &raw.name),
            uid: raw.uid,
            resource_version: raw.resource_version,
            labels: raw.labels,
            annotations: raw.annotations,
            deleting: raw.deletion_timestamp.is_some(),
        })
    }
}

/// Shares the allocations of equal strings and equal sets of labels.
#[derive(Debug, Default)]
pub struct Interner {
    strings: HashSet<Arc<str>>,
    labels: HashSet<Labels>,
    /// At this many entries the next insertion first drops those that only the table still holds.
    sweep_at: usize,
}

/// Below this many entries a sweep is not worth its walk.
const SWEEP_FLOOR: usize = 1024;

impl Interner {
    /// The shared copy of a string.
    pub fn string(&mut self, text: &Arc<str>) -> Arc<str> {
        if let Some(shared) = self.strings.get(text) {
            return Arc::clone(shared);
        }
        self.sweep();
        self.strings.insert(Arc::clone(text));
        Arc::clone(text)
    }

    /// The shared copy of a set of labels, whose strings are shared likewise.
    pub fn labels(&mut self, labels: &Labels) -> Labels {
        if labels.is_empty() {
            return Labels::default();
        }
        if let Some(shared) = self.labels.get(labels) {
            return shared.clone();
        }
        let shared = Labels(labels.0.iter().map(|(k, v)| (self.string(k), self.string(v))).collect());
        self.labels.insert(shared.clone());
        shared
    }

    /// How many strings and sets are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.strings.len() + self.labels.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops what nobody uses any more, whenever the table has doubled since the last time: amortised, an insertion costs O(1).
    fn sweep(&mut self) {
        if self.len() < self.sweep_at.max(SWEEP_FLOOR) {
            return;
        }
        self.labels.retain(|labels| Arc::strong_count(&labels.0) > 1);
        self.strings.retain(|text| Arc::strong_count(text) > 1);
        self.sweep_at = self.len() * 2;
    }
}
