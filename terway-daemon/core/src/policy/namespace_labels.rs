//! Labels of namespaces, as selectors see them.

use std::collections::HashMap;
use std::sync::Arc;

use crate::objects::Labels;

/// The label that each namespace has by its name (well-known labels, `kubernetes.io/metadata.name`).
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A namespace's labels with its name among them, whoever made the object.
pub(super) fn with_name(namespace: &Arc<str>, labels: &Labels) -> Labels {
    if labels.get(NAMESPACE_NAME) == Some(namespace) {
        return labels.clone();
    }
    let own = labels.iter().filter(|(key, _)| &***key != NAMESPACE_NAME).map(|(k, v)| (Arc::clone(k), Arc::clone(v)));
    own.chain([(Arc::from(NAMESPACE_NAME), Arc::clone(namespace))]).collect()
}

/// The labels of a namespace; one that is not known has its name.
pub(super) fn labels_of(known: &HashMap<Arc<str>, Labels>, namespace: &Arc<str>) -> Labels {
    known.get(namespace).cloned().unwrap_or_else(|| with_name(namespace, &Labels::default()))
}
