//! Services: from Kubernetes' objects to what the datapath's maps must hold.
//!
//! A **frontend** is an address and port that clients talk to; it says for clients inside the node and for those from outside which **table** a
//! backend is drawn from. A table is a list of slots, each state a **backend**, a pod's address and port. The [`Planner`] turns changes of
//! objects into operations on these three, in an order in which every frontend leads, at each moment, to its old backends or to its new ones:
//! backends first, then tables under ids that nobody uses yet, then the frontends; what is no longer needed goes in the reverse order.
//!
//! The rules are those of kube-proxy (pkg/proxy/topology.go, pkg/proxy/serviceport.go), with the differences that docs/services.md lists.

mod actual;
mod desired;
mod endpoints;
mod ids;
mod maglev;
mod model;
mod planner;
mod range_allocator;
mod settings;
mod snat_ports;
mod sockets;
mod table;

pub use actual::{ApplyBatch, Entry, OpError};
pub use maglev::{MAGLEV_SIZES, maglev};
pub use model::{
    Algorithm, Backend, BackendId, BackendKey, BackendRef, BackendState, Frontend, FrontendKey, FrontendKind,
    MapContents, Op, Owner, Plan, PortId, Selection, Table, TableId, UnknownAlgorithm,
};
pub use planner::{Executed, Planner, PortView};
pub use range_allocator::RangeAllocator;
pub use settings::{NodeFacts, Settings};
pub use snat_ports::snat_port_range;
pub use sockets::{
    SocketTermination, StaleSockets, TranslatedSocket, Unknown as UnknownSocketTermination, invalidates_backend,
};

/// Annotation of a Service: how a backend is chosen. One of `random`, `least-connections`, `maglev`.
pub const ALGORITHM: &str = "terway.alibabacloud.com/load-balancing";
/// Annotation of a pod: its share of new connections, 0 to 100, by default 1. 0 takes it out of new choices.
pub const WEIGHT: &str = "terway.alibabacloud.com/weight";
/// Annotation of a Service whose load balancer sends to the pods' own addresses, if its value is `eni`.
pub const BACKEND_TYPE: &str = "service.beta.kubernetes.io/backend-type";
/// Label that gives a Service, or a slice, to another service proxy.
pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a Service, or a slice, that a service proxy must leave alone.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
