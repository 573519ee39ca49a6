//! The planner's entries: owners, backends, tables and frontends as planned. There are a hundred thousand of them, so they are small.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use smallvec::SmallVec;

use crate::objects::Protocol;
use crate::service::desired::BackendFacts;
use crate::service::model::{
    Backend, BackendId, BackendKey, BackendState, Frontend, FrontendKey, FrontendKind, Owner, PortId, Table, TableId,
};

/// The planned state of an owner: its ports, backends and health-check port.
#[derive(Debug, Default)]
pub(super) struct OwnerState {
    pub(super) ports: Vec<PortState>,
    pub(super) backends: Vec<BackendKey>,
    pub(super) health: Option<u16>,
}

#[derive(Debug)]
pub(super) struct PortState {
    pub(super) name: Arc<str>,
    pub(super) protocol: Protocol,
    pub(super) id: PortId,
    pub(super) ranges: BTreeSet<IpNetwork>,
    pub(super) tables: Vec<Arc<Table>>,
    pub(super) frontends: Vec<FrontendKey>,
}

/// A planned backend with the owners that use it; most have one, which takes no allocation.
#[derive(Debug)]
pub(super) struct BackendEntry {
    pub(super) id: BackendId,
    pub(super) written: Option<BackendValue>,
    pub(super) references: SmallVec<[(Arc<Owner>, BackendFacts); 1]>,
}

/// The value of a [`Backend`], without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BackendValue {
    pub(super) state: BackendState,
    pub(super) local: bool,
    pub(super) generation: u32,
}

impl BackendValue {
    pub(super) const fn of(backend: &Backend) -> Self {
        Self { state: backend.state, local: backend.local, generation: backend.generation }
    }

    pub(super) const fn at(self, key: BackendKey) -> Backend {
        Backend { key, state: self.state, local: self.local, generation: self.generation }
    }
}

#[derive(Debug)]
pub(super) struct TableEntry {
    pub(super) id: TableId,
    pub(super) written: bool,
    pub(super) users: u32,
}

/// A reference of an owner to a frontend, with the value that the owner wants.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) owner: Arc<Owner>,
    /// The port's place in the owner.
    pub(super) place: u32,
    pub(super) frontend: Frontend,
}

impl Reference {
    /// The rank among the references to one frontend.
    pub(super) fn rank(&self) -> (FrontendKind, &Owner, u32) {
        (self.frontend.kind, &self.owner, self.place)
    }
}

#[derive(Debug, Default)]
pub(super) struct FrontendEntry {
    pub(super) written: Option<Frontend>,
    /// In the order of their ranks; the value of the first one is planned.
    pub(super) references: SmallVec<[Reference; 1]>,
}
