//! What the planner remembers: of each owner, backend, table and frontend, in as few bytes as will do.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use smallvec::SmallVec;

use crate::objects::Protocol;
use crate::service::desired::BackendFacts;
use crate::service::model::{
    Backend, BackendId, BackendKey, BackendState, Frontend, FrontendKey, FrontendKind, Owner, PortId, Table, TableId,
};

/// What an owner holds at the moment.
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

/// One of a hundred thousand: no byte twice, and no allocation for the one owner that most have.
#[derive(Debug)]
pub(super) struct BackendEntry {
    pub(super) id: BackendId,
    pub(super) written: Option<BackendValue>,
    pub(super) references: SmallVec<[(Arc<Owner>, BackendFacts); 1]>,
}

/// A [`Backend`] without its key.
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

/// Somebody's wish for a frontend.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) owner: Arc<Owner>,
    /// The port's place in the owner.
    pub(super) place: u32,
    pub(super) frontend: Frontend,
}

impl Reference {
    /// What orders references of one frontend.
    pub(super) fn rank(&self) -> (FrontendKind, &Owner, u32) {
        (self.frontend.kind, &self.owner, self.place)
    }
}

#[derive(Debug, Default)]
pub(super) struct FrontendEntry {
    pub(super) written: Option<Frontend>,
    /// In the order of their ranks; the first one holds.
    pub(super) references: SmallVec<[Reference; 1]>,
}
