//! The configuration as it is read from the API server: the cluster's ConfigMap, and the one that a label of the node names.

use super::{ConfigDocuments, ConfigMapData, NODE_LABEL};
use crate::objects::ObjectName;

/// What is known of one ConfigMap, or of the label of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched<T> {
    /// The content; inner `None`: there is none. Outer `None`: nothing was read yet.
    content: Option<Option<T>>,
    is_listed_empty: bool,
    failure: Option<String>,
}

impl<T> Default for Watched<T> {
    fn default() -> Self {
        Self { content: None, is_listed_empty: false, failure: None }
    }
}

impl<T> Watched<T> {
    /// A list begins.
    pub fn list_begin(&mut self) {
        self.is_listed_empty = true;
    }

    /// The object is in the list, or was created or updated.
    pub fn upsert(&mut self, content: Option<T>) {
        self.is_listed_empty = false;
        self.content = Some(content);
    }

    /// The object was deleted.
    pub fn delete(&mut self) {
        self.content = Some(None);
    }

    /// The list is complete: what it did not name does not exist.
    pub fn list_end(&mut self) {
        if std::mem::take(&mut self.is_listed_empty) {
            self.content = Some(None);
        }
    }

    /// The object can be read, or why not. What was read stays.
    pub fn readable(&mut self, readable: Result<(), String>) {
        self.failure = readable.err();
    }
}

/// The configuration as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigView {
    /// The documents, or why there are none: one sentence without a full stop.
    pub documents: Result<ConfigDocuments, String>,
    /// The node's own ConfigMap.
    pub node_config: Option<ObjectName>,
    /// Why the documents may be out of date.
    pub stale: Option<String>,
}

/// Follows the ConfigMaps of one node.
#[derive(Debug)]
pub struct ConfigMaps {
    cluster_name: ObjectName,
    /// The cluster's ConfigMap.
    pub cluster: Watched<ConfigMapData>,
    /// The ConfigMap that the label names. Reset when the label changes.
    pub own: Watched<ConfigMapData>,
    /// The value of the label [`NODE_LABEL`].
    pub label: Watched<String>,
}

impl ConfigMaps {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(cluster: ObjectName) -> Self {
        Self { cluster_name: cluster, cluster: Watched::default(), own: Watched::default(), label: Watched::default() }
    }

    /// The name of the node's own ConfigMap: the label's value in the namespace of the cluster's ConfigMap.
    #[must_use]
    pub fn own_name(&self) -> Option<ObjectName> {
        let label = self.label.content.as_ref()?.as_deref().filter(|label| !label.is_empty())?;
        Some(ObjectName::new(&self.cluster_name.namespace, label))
    }

    /// What the API server has now; `None` until all of it was read or could not be.
    #[must_use]
    pub fn view(&self) -> Option<ConfigView> {
        let own_name = self.own_name();
        let cluster = format!("ConfigMap {}", self.cluster_name);
        let own = own_name.as_ref().map(|name| format!("ConfigMap {name} (label {NODE_LABEL} of this node)"));
        let view = |documents, stale| Some(ConfigView { documents, node_config: own_name.clone(), stale });
        let unknown = |what: &str, failure: &Option<String>| {
            view(Err(format!("{what} cannot be read: {}", failure.as_ref()?)), None)
        };
        let Some(data) = &self.cluster.content else { return unknown(&cluster, &self.cluster.failure) };
        if self.label.content.is_none() {
            return unknown("the Node", &self.label.failure);
        }
        let Some(data) = data else { return view(Err(format!("{cluster} does not exist")), None) };
        let overlay = match (&own, &self.own.content) {
            (None, _) => None,
            (Some(own), None) => return unknown(own, &self.own.failure),
            (Some(own), Some(None)) => return view(Err(format!("{own} does not exist")), None),
            (Some(_), Some(Some(overlay))) => Some(overlay.clone()),
        };
        let own = own.as_deref().unwrap_or_default();
        let failures =
            [(cluster.as_str(), &self.cluster.failure), ("the Node", &self.label.failure), (own, &self.own.failure)];
        let stale = failures.into_iter().find_map(|(what, failure)| Some(format!("{what}: {}", failure.as_ref()?)));
        view(Ok(ConfigDocuments { data: data.clone(), overlay }), stale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(text: &str) -> Option<ConfigMapData> {
        Some(ConfigMapData::from([("eni_conf".to_owned(), text.to_owned())]))
    }

    fn error(maps: &ConfigMaps) -> String {
        maps.view().unwrap().documents.unwrap_err()
    }

    #[test]
    fn label_selects_the_config_map_that_is_merged() {
        let mut maps = ConfigMaps::new(ObjectName::new("kube-system", "eni-config"));
        assert_eq!(maps.view(), None);
        maps.cluster.list_begin();
        maps.cluster.upsert(data("{}"));
        maps.cluster.list_end();
        assert_eq!(maps.view(), None, "the label may name another one");
        maps.label.upsert(None);
        assert_eq!(maps.view().unwrap().documents.unwrap().overlay, None);
        maps.label.upsert(Some("gpu".to_owned()));
        assert_eq!(maps.view(), None);
        maps.own.list_begin();
        maps.own.list_end();
        assert_eq!(error(&maps), "ConfigMap kube-system/gpu (label terway-config of this node) does not exist");
        maps.own.upsert(data(r#"{"max_eni":1}"#));
        let view = maps.view().unwrap();
        assert_eq!(view.documents.unwrap().overlay, data(r#"{"max_eni":1}"#));
        assert_eq!(view.node_config.unwrap().to_string(), "kube-system/gpu");
        maps.cluster.delete();
        assert_eq!(error(&maps), "ConfigMap kube-system/eni-config does not exist");
    }

    #[test]
    fn failure_before_the_first_reading_is_an_error_and_later_a_note() {
        let mut maps = ConfigMaps::new(ObjectName::new("kube-system", "eni-config"));
        maps.label.upsert(None);
        maps.cluster.readable(Err("failed to list: forbidden".to_owned()));
        assert_eq!(error(&maps), "ConfigMap kube-system/eni-config cannot be read: failed to list: forbidden");
        maps.cluster.readable(Ok(()));
        maps.cluster.upsert(data("{}"));
        maps.cluster.readable(Err("connection refused".to_owned()));
        let view = maps.view().unwrap();
        assert!(view.documents.is_ok());
        assert_eq!(view.stale.unwrap(), "ConfigMap kube-system/eni-config: connection refused");
    }
}
