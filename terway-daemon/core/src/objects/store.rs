//! All objects by kind and name; what goes in are changes, what comes out is what really changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::meta::Interner;
use super::{
    ClusterNetworkPolicy, EndpointSlice, Kind, Namespace, NetworkPolicy, Node, Object, ObjectKey, ObjectName, Pod,
    Service,
};

/// The objects of one kind.
pub type Table<T> = BTreeMap<ObjectName, Arc<T>>;

/// News about one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is there, and looks like this.
    Upsert(Box<Object>),
    /// It is gone.
    Delete(ObjectKey),
}

/// How one object changed; at least one side is there, and the two differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta<T> {
    /// Its name.
    pub name: ObjectName,
    /// Before; none if it is new.
    pub old: Option<Arc<T>>,
    /// After; none if it is gone.
    pub new: Option<Arc<T>>,
}

/// A change that took effect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the type of its name")]
pub enum Applied {
    Node(Delta<Node>),
    Namespace(Delta<Namespace>),
    Pod(Delta<Pod>),
    Service(Delta<Service>),
    EndpointSlice(Delta<EndpointSlice>),
    NetworkPolicy(Delta<NetworkPolicy>),
    ClusterNetworkPolicy(Delta<ClusterNetworkPolicy>),
}

/// Everything that an object source has told.
#[derive(Debug, Default)]
pub struct Objects {
    interner: Interner,
    nodes: Table<Node>,
    namespaces: Table<Namespace>,
    pods: Table<Pod>,
    services: Table<Service>,
    slices: Table<EndpointSlice>,
    policies: Table<NetworkPolicy>,
    cluster_policies: Table<ClusterNetworkPolicy>,
}

fn put<T: PartialEq>(table: &mut Table<T>, name: ObjectName, new: Option<T>) -> Option<Delta<T>> {
    match new {
        Some(new) if table.get(&name).is_some_and(|old| **old == new) => None,
        Some(new) => {
            let new = Arc::new(new);
            let old = table.insert(name.clone(), Arc::clone(&new));
            Some(Delta { name, old, new: Some(new) })
        }
        None => table.remove(&name).map(|old| Delta { name, old: Some(old), new: None }),
    }
}

macro_rules! tables {
    ($($field:ident: $variant:ident),* $(,)?) => {
        impl Objects {
            /// Takes one change in. Nothing comes out when it changes nothing that is looked at.
            pub fn apply(&mut self, change: Change) -> Option<Applied> {
                match change {
                    Change::Upsert(object) => match *object {
                        $(Object::$variant(mut new) => {
                            new.intern(&mut self.interner);
                            put(&mut self.$field, new.meta.object.clone(), Some(new)).map(Applied::$variant)
                        })*
                    },
                    Change::Delete(key) => match key.kind {
                        $(Kind::$variant => put(&mut self.$field, key.name, None).map(Applied::$variant),)*
                    },
                }
            }

            /// The names of all objects of a kind, in order.
            #[must_use]
            pub fn names(&self, kind: Kind) -> Vec<ObjectName> {
                match kind {
                    $(Kind::$variant => self.$field.keys().cloned().collect(),)*
                }
            }
        }
    };
}

tables! {
    nodes: Node,
    namespaces: Namespace,
    pods: Pod,
    services: Service,
    slices: EndpointSlice,
    policies: NetworkPolicy,
    cluster_policies: ClusterNetworkPolicy,
}

impl Objects {
    /// Makes `all` the objects of a kind; those of it that are not among them are gone. Objects of other kinds in `all` are left out.
    pub fn replace(&mut self, kind: Kind, all: Vec<Object>) -> Vec<Applied> {
        let mut gone: std::collections::BTreeSet<ObjectName> = self.names(kind).into_iter().collect();
        let mut applied = Vec::new();
        for object in all.into_iter().filter(|object| object.kind() == kind) {
            gone.remove(&object.meta().object);
            applied.extend(self.apply(Change::Upsert(Box::new(object))));
        }
        applied.extend(gone.into_iter().filter_map(|name| self.apply(Change::Delete(ObjectKey { kind, name }))));
        applied
    }

    /// The nodes.
    #[must_use]
    pub const fn nodes(&self) -> &Table<Node> {
        &self.nodes
    }

    /// The namespaces.
    #[must_use]
    pub const fn namespaces(&self) -> &Table<Namespace> {
        &self.namespaces
    }

    /// The pods.
    #[must_use]
    pub const fn pods(&self) -> &Table<Pod> {
        &self.pods
    }

    /// The Services.
    #[must_use]
    pub const fn services(&self) -> &Table<Service> {
        &self.services
    }

    /// The endpoint slices.
    #[must_use]
    pub const fn slices(&self) -> &Table<EndpointSlice> {
        &self.slices
    }

    /// The NetworkPolicies.
    #[must_use]
    pub const fn policies(&self) -> &Table<NetworkPolicy> {
        &self.policies
    }

    /// The ClusterNetworkPolicies.
    #[must_use]
    pub const fn cluster_policies(&self) -> &Table<ClusterNetworkPolicy> {
        &self.cluster_policies
    }
}
