//! The Service planner: from Kubernetes objects to the contents of the Service maps.
//!
//! A **frontend** is an address and port that clients connect to. It names, for clients on the node and for external clients, the backend **table** that a
//! backend is selected from. A table is a list of slots, each with a **backend**: a pod's address and port. The [`Planner`] turns changes of
//! objects into operations on these three, in an order in which every frontend leads to its old backends or to its new ones at each moment: backends
//! first, then tables under new ids, then frontends; what is no longer needed is removed in the reverse order, after a grace period.
//!
//! Operations may fail one by one: [`Planner::execute`] runs a plan, [`Planner::retry`] plans the rest again (`actual.rs`).
//!
//! The rules are those of kube-proxy (pkg/proxy/topology.go, pkg/proxy/serviceport.go), with the differences that docs/services.md lists.
//!
//! Modules, each using only those before it:
//!
//! 1. `annotations`, `model`, `ids`: names of annotations and labels; entries of the maps and operations on them; ids
//! 2. `settings`, `maglev`, `table`, `range_allocator`, `snat_ports`, `sockets`: the node; table slots; places for tables; stale sockets
//! 3. `endpoints`, `desired`: which endpoints a client may get; what one Service needs
//! 4. `actual`: map entries that are not as planned
//! 5. `planner`, with `entries` and `object_errors` below it, and `write` and `execute` as further `impl Planner`

mod actual;
mod annotations;
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
pub use annotations::{ALGORITHM, BACKEND_TYPE, HEADLESS, PROXY_NAME, WEIGHT};
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
