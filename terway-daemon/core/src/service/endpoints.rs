//! Which endpoints a Service port has, and which of them a client may be sent to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::annotations::{HEADLESS, PROXY_NAME};
use super::model::BackendState;
use super::settings::LocalNode;
use crate::ident::Family;
use crate::objects::{Endpoint, EndpointSlice, Hints, ObjectMeta, ServicePort, TargetRef};

/// Whether an object is for another service proxy, or for none.
pub(super) fn ignored(meta: &ObjectMeta) -> bool {
    meta.labels.get(PROXY_NAME).is_some() || meta.labels.get(HEADLESS).is_some()
}

/// One endpoint of one port.
#[derive(Clone, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) state: BackendState,
    pub(super) local: bool,
    hints: Option<&'a Hints>,
    pub(super) target: Option<&'a TargetRef>,
}

fn state(endpoint: &Endpoint, publish_not_ready: bool) -> BackendState {
    if endpoint.ready || publish_not_ready {
        BackendState::Ready
    } else if endpoint.serving && endpoint.terminating {
        BackendState::Draining
    } else {
        BackendState::Unready
    }
}

/// The endpoints of a port in one family, by address and port. While an endpoint moves between slices it may stand in two: the better one counts.
pub(super) fn candidates<'a>(
    slices: &'a [Arc<EndpointSlice>],
    port: &ServicePort,
    family: Family,
    publish_not_ready: bool,
    node: &LocalNode,
) -> Vec<Candidate<'a>> {
    let mut found: BTreeMap<(IpAddr, u16), Candidate<'a>> = BTreeMap::new();
    for slice in slices {
        let served = |p: &&crate::objects::EndpointPort| p.name == port.name && p.protocol == port.protocol;
        for number in slice.ports.iter().filter(served).filter_map(|p| p.port) {
            for endpoint in &slice.endpoints {
                let Some(address) = endpoint.address.filter(|a| Family::of(*a) == family) else {
                    continue;
                };
                let candidate = Candidate {
                    address,
                    port: number,
                    state: state(endpoint, publish_not_ready),
                    local: endpoint.node.as_ref().is_some_and(|own| *own == node.name),
                    hints: endpoint.hints.as_deref(),
                    target: endpoint.target.as_deref(),
                };
                found
                    .entry((address, number))
                    .and_modify(|known| {
                        let local = known.local || candidate.local;
                        if candidate.state > known.state {
                            *known = candidate.clone();
                        }
                        known.local = local;
                    })
                    .or_insert(candidate);
            }
        }
    }
    found.into_values().collect()
}

/// Which of the candidates, as indices, a client may be sent to.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Under the traffic policy `Cluster`, with the hints followed.
    pub(super) cluster: Vec<usize>,
    /// Under the traffic policy `Local`.
    pub(super) local: Vec<usize>,
    /// Whether there is one anywhere in the cluster.
    pub(super) any: bool,
}

/// Ready endpoints; where there is none, those that still answer on their way out (KEP-1669), for each policy on its own.
pub(super) fn choose(candidates: &[Candidate<'_>], node: &LocalNode) -> Choice {
    let indices = |desired: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<usize> {
        (0..candidates.len()).filter(|i| desired(&candidates[*i])).collect()
    };
    let ready = |c: &Candidate<'_>| c.state == BackendState::Ready;
    let draining = |c: &Candidate<'_>| c.state == BackendState::Draining;
    let topology = topology(candidates, node);
    let mut cluster = indices(&|c| ready(c) && topology.allows(c, node));
    if cluster.is_empty() {
        cluster = indices(&draining);
    }
    let mut local = indices(&|c| ready(c) && c.local);
    if local.is_empty() {
        local = indices(&|c| draining(c) && c.local);
    }
    Choice { cluster, local, any: candidates.iter().any(|c| ready(c) || draining(c)) }
}

/// Which hints are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Ignored,
    Node,
    Zone,
}

impl Topology {
    fn allows(self, candidate: &Candidate<'_>, node: &LocalNode) -> bool {
        match self {
            Self::Ignored => true,
            Self::Node => for_node(candidate, node),
            Self::Zone => for_zone(candidate, node),
        }
    }
}

fn for_node(candidate: &Candidate<'_>, node: &LocalNode) -> bool {
    candidate.hints.is_some_and(|hints| hints.nodes.contains(&node.name))
}

fn for_zone(candidate: &Candidate<'_>, node: &LocalNode) -> bool {
    node.zone.as_ref().is_some_and(|zone| candidate.hints.is_some_and(|hints| hints.zones.contains(zone)))
}

/// Hints are followed only if every ready endpoint has one and at least one means us: a half-written set must not lose endpoints.
fn topology(candidates: &[Candidate<'_>], node: &LocalNode) -> Topology {
    let mut ready = candidates.iter().filter(|c| c.state == BackendState::Ready).peekable();
    if ready.peek().is_none() {
        return Topology::Ignored;
    }
    let (mut all_nodes, mut all_zones, mut our_node, mut our_zone) = (true, true, false, false);
    for candidate in ready {
        all_nodes &= candidate.hints.is_some_and(|hints| !hints.nodes.is_empty());
        all_zones &= candidate.hints.is_some_and(|hints| !hints.zones.is_empty());
        our_node |= for_node(candidate, node);
        our_zone |= for_zone(candidate, node);
    }
    match (all_nodes && our_node, all_zones && our_zone) {
        (true, _) => Topology::Node,
        (false, true) => Topology::Zone,
        (false, false) => Topology::Ignored,
    }
}
