//! The state of the node as it is written to the Kubernetes API.

use std::sync::Arc;

use terway_core::errors::Error;
use terway_core::ident::{Addresses, PodRef};
use terway_core::ipam::Stats;
use tokio::sync::watch;

use super::actors::Actors;
use crate::engine::Engine;
use crate::kube_writes::NodeState;
use crate::services::Services;

/// The engine and the Services, seen together.
struct EngineAndServices {
    engine: Arc<Engine>,
    services: Arc<Services>,
}

impl NodeState for EngineAndServices {
    fn pool(&self) -> (Stats, Vec<Error>) {
        self.engine.pool_state_view()
    }

    fn attached(&self) -> Vec<(PodRef, Addresses)> {
        self.engine.attached()
    }

    fn is_ready(&self) -> bool {
        self.engine.ready().is_ok() && self.services.is_in_force()
    }

    fn changed(&self) -> watch::Receiver<()> {
        self.engine.pool_changes()
    }
}

impl Actors {
    pub(super) fn node_state(&self) -> impl NodeState + 'static {
        EngineAndServices { engine: Arc::clone(&self.engine), services: Arc::clone(&self.services) }
    }
}
