//! Pods of this node whose labels are not known yet: their traffic is denied where a policy may select them.

use std::sync::Arc;

use super::compiler::Compiler;
use crate::ident::PodRef;
use crate::objects::{Direction, ObjectName};

impl Compiler {
    /// Whether a pod's traffic would be denied if it got its interface now: its object is not known, and a policy may restrict it.
    #[must_use]
    pub fn lacks_labels(&self, pod: &PodRef) -> bool {
        if pod.namespace.is_empty() {
            return false;
        }
        let name = ObjectName::new(&pod.namespace, &pod.name);
        let known = self.names.get(&name).and_then(|id| self.pods.get(id));
        let namesake = known.is_some_and(|state| !state.is(&pod.uid) || state.host_network);
        let restrict = |direction| self.may_restrict(&Arc::clone(&name.namespace), direction);
        (known.is_none() || namesake) && (restrict(Direction::Ingress) || restrict(Direction::Egress))
    }

    /// The pods whose traffic is denied for that reason.
    #[must_use]
    pub fn pods_without_labels(&self) -> Vec<ObjectName> {
        let unknown = |set| self.sets.get(set).is_some_and(|set| set.key.unknown);
        let held = self.endpoints.values().filter(|endpoint| endpoint.sets.iter().flatten().any(unknown));
        held.map(|endpoint| endpoint.pod.clone()).collect()
    }
}
