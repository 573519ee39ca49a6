//! The desired state of one Service, or one pod with host ports: what it needs in the maps, before ids are allocated.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::annotations::{ALGORITHM, BACKEND_TYPE, WEIGHT};
use super::endpoints::{Candidate, Choice, candidates, choose, ignored};
use super::model::{Algorithm, BackendKey, BackendState, FrontendKey, FrontendKind};
use super::settings::{LocalNode, Settings};
use super::table;
use crate::ident::Family;
use crate::objects::{
    EndpointSlice, IpMode, ObjectName, Pod, Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};

/// The state of a backend according to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BackendFacts {
    pub(super) state: BackendState,
    pub(super) local: bool,
}

/// A desired table, by the keys of its backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DesiredTable {
    pub(super) algorithm: Algorithm,
    pub(super) slots: Vec<BackendKey>,
}

/// A desired backend selection, with a table as its index in the port's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DesiredSelection {
    Table(usize),
    Reject,
    Drop,
    Pass,
}

#[derive(Clone, Debug)]
pub(super) struct DesiredFrontend {
    pub(super) key: FrontendKey,
    pub(super) kind: FrontendKind,
    pub(super) internal: DesiredSelection,
    pub(super) external: DesiredSelection,
    pub(super) masquerade: bool,
    pub(super) check_source: bool,
}

/// A desired port with its frontends.
#[derive(Clone, Debug)]
pub(super) struct DesiredPort {
    pub(super) name: Arc<str>,
    pub(super) protocol: Protocol,
    pub(super) affinity_seconds: u32,
    pub(super) ranges: Vec<IpNetwork>,
    pub(super) tables: Vec<DesiredTable>,
    pub(super) frontends: Vec<DesiredFrontend>,
}

impl DesiredPort {
    /// Removes tables that no frontend leads to.
    fn prune(&mut self) {
        let mut place = vec![None; self.tables.len()];
        let mut kept = Vec::new();
        for selection in self.frontends.iter_mut().flat_map(|f| [&mut f.internal, &mut f.external]) {
            if let DesiredSelection::Table(at) = selection {
                let new = *place[*at].get_or_insert_with(|| {
                    kept.push(self.tables[*at].clone());
                    kept.len() - 1
                });
                *at = new;
            }
        }
        self.tables = kept;
    }
}

/// The desired state of one owner.
#[derive(Clone, Debug, Default)]
pub(super) struct DesiredState {
    pub(super) ports: Vec<DesiredPort>,
    pub(super) backends: BTreeMap<BackendKey, BackendFacts>,
    /// A health-check port with the number of ready endpoints on this node.
    pub(super) health: Option<(u16, u32)>,
    pub(super) problems: Vec<String>,
}

/// Weights of pods that have one.
pub(super) type Weights = BTreeMap<ObjectName, u16>;

/// Largest weight of a pod.
const MAX_WEIGHT: u16 = 100;

/// The weight that a pod's annotation gives, if it has one that can be read.
pub(super) fn weight(pod: &Pod) -> Option<u16> {
    pod.meta.annotations.get(WEIGHT)?.parse().ok().filter(|weight| *weight <= MAX_WEIGHT)
}

/// Whether a Service is served by nodes at all.
fn served(service: &Service) -> bool {
    let published = service.kind != ServiceType::ExternalName && !service.headless && !service.cluster_ips.is_empty();
    published && !ignored(&service.meta)
}

/// The desired state of a Service; `slices` are its own, in the order of their names.
pub(super) fn service(
    service: &Service,
    slices: &[Arc<EndpointSlice>],
    weights: &Weights,
    node: &LocalNode,
    settings: &Settings,
) -> DesiredState {
    let mut desired = DesiredState::default();
    if !served(service) {
        return desired;
    }
    let algorithm = match service.meta.annotations.get(ALGORITHM).map(str::parse) {
        None => settings.algorithm,
        Some(Ok(algorithm)) => algorithm,
        Some(Err(error)) => {
            desired.problems.push(format!("annotation {ALGORITHM}: {error}; {} is used", settings.algorithm.name()));
            settings.algorithm
        }
    };
    for port in &service.ports {
        let mut out = DesiredPort {
            name: Arc::clone(&port.name),
            protocol: port.protocol,
            affinity_seconds: service.affinity_seconds.unwrap_or(0),
            ranges: Vec::new(),
            tables: Vec::new(),
            frontends: Vec::new(),
        };
        for family in [Family::V4, Family::V6] {
            let found = candidates(slices, port, family, service.publish_not_ready, node);
            let choice = choose(&found, node);
            note_backends(&mut desired.backends, &found, port.protocol);
            let locally = [service.internal_policy, service.external_policy].contains(&TrafficPolicy::Local);
            let exits = Exits::new(&mut out.tables, &choice, locally, |indices| {
                let picked: Vec<(BackendKey, u16)> =
                    indices.iter().map(|i| (key(&found[*i], port.protocol), weight_of(&found[*i], weights))).collect();
                let slots = table::slots(algorithm, settings.maglev_size, &picked);
                DesiredTable { algorithm, slots: slots.iter().map(|i| picked[*i as usize].0).collect() }
            });
            frontends(&mut out.frontends, service, port, family, &exits, settings);
        }
        out.prune();
        if out.frontends.iter().any(|f| f.check_source) {
            out.ranges.clone_from(&service.source_ranges);
        }
        desired.ports.push(out);
    }
    if service.kind == ServiceType::LoadBalancer
        && service.external_policy == TrafficPolicy::Local
        && service.health_check_port != 0
    {
        desired.health = Some((service.health_check_port, local_ready(service, slices, node)));
    }
    desired
}

/// The backend selection under each traffic policy.
struct Exits {
    cluster: DesiredSelection,
    local_internal: DesiredSelection,
    local_external: DesiredSelection,
}

impl Exits {
    fn new(
        tables: &mut Vec<DesiredTable>,
        choice: &Choice,
        locally: bool,
        make: impl Fn(&[usize]) -> DesiredTable,
    ) -> Self {
        use DesiredSelection::{Drop, Reject, Table};
        let mut add = |indices: &[usize]| {
            let table = make(indices);
            let known = tables.iter().position(|t| *t == table);
            Table(known.unwrap_or_else(|| {
                tables.push(table);
                tables.len() - 1
            }))
        };
        let cluster = if choice.cluster.is_empty() { Reject } else { add(&choice.cluster) };
        let local = if choice.local.is_empty() || !locally { None } else { Some(add(&choice.local)) };
        Self {
            cluster,
            local_internal: local.unwrap_or(Reject),
            local_external: local.unwrap_or(if choice.any { Drop } else { Reject }),
        }
    }
}

fn frontends(
    out: &mut Vec<DesiredFrontend>,
    service: &Service,
    port: &ServicePort,
    family: Family,
    exits: &Exits,
    settings: &Settings,
) {
    use DesiredSelection::{Pass, Reject};
    let ours = |address: &&IpAddr| Family::of(**address) == family;
    let at = |address: IpAddr, number: u16| FrontendKey::new(address, number, port.protocol);
    let internal = match service.internal_policy {
        TrafficPolicy::Cluster => exits.cluster,
        TrafficPolicy::Local => exits.local_internal,
    };
    let external = match service.external_policy {
        TrafficPolicy::Cluster => exits.cluster,
        TrafficPolicy::Local => exits.local_external,
    };
    let masquerade = service.external_policy == TrafficPolicy::Cluster;
    let cluster = |key, internal| DesiredFrontend {
        key,
        kind: FrontendKind::ClusterIp,
        internal,
        external: Pass,
        masquerade: false,
        check_source: false,
    };
    for address in service.cluster_ips.iter().filter(ours) {
        out.push(cluster(at(*address, port.port), internal));
        if !out.iter().any(|f| f.key == FrontendKey::rest(*address)) {
            out.push(cluster(FrontendKey::rest(*address), Reject));
        }
    }
    let external_frontend = |key, kind, internal, external| DesiredFrontend {
        key,
        kind,
        internal,
        external,
        masquerade,
        check_source: kind == FrontendKind::LoadBalancer && !service.source_ranges.is_empty(),
    };
    let of_family = service.cluster_ips.iter().any(|address| Family::of(*address) == family);
    if of_family && port.node_port != 0 && matches!(service.kind, ServiceType::NodePort | ServiceType::LoadBalancer) {
        let key = FrontendKey::node(family, port.node_port, port.protocol);
        out.push(external_frontend(key, FrontendKind::NodePort, exits.cluster, external));
    }
    // Clients inside the cluster get any endpoint also under the external policy `Local`: their source address is preserved anyway.
    let short_cut = if settings.in_cluster_loadbalance { exits.cluster } else { Pass };
    let straight_to_pods = service.meta.annotations.get(BACKEND_TYPE) == Some("eni");
    if service.kind == ServiceType::LoadBalancer {
        let served = service.ingress.iter().filter(|i| i.ip_mode == IpMode::VIP);
        for address in served.filter_map(|i| i.ip.as_ref()).filter(ours) {
            let external = if straight_to_pods { Pass } else { external };
            out.push(external_frontend(at(*address, port.port), FrontendKind::LoadBalancer, short_cut, external));
        }
    }
    for address in service.external_ips.iter().filter(ours) {
        out.push(external_frontend(at(*address, port.port), FrontendKind::ExternalIp, short_cut, external));
    }
}

fn key(candidate: &Candidate<'_>, protocol: Protocol) -> BackendKey {
    BackendKey { address: candidate.address, port: candidate.port, protocol }
}

fn weight_of(candidate: &Candidate<'_>, weights: &Weights) -> u16 {
    if weights.is_empty() {
        return 1;
    }
    let pod = candidate.target.filter(|target| &*target.kind == "Pod");
    let name = pod.map(|t| ObjectName { namespace: Arc::clone(&t.namespace), name: Arc::clone(&t.name) });
    name.and_then(|name| weights.get(&name).copied()).unwrap_or(1)
}

fn note_backends(backends: &mut BTreeMap<BackendKey, BackendFacts>, found: &[Candidate<'_>], protocol: Protocol) {
    for candidate in found {
        let facts = BackendFacts { state: candidate.state, local: candidate.local };
        let merge = |known: &mut BackendFacts| *known = merged(*known, facts);
        backends.entry(key(candidate, protocol)).and_modify(merge).or_insert(facts);
    }
}

/// The state of a backend with two owners: the better of each.
pub(super) fn merged(a: BackendFacts, b: BackendFacts) -> BackendFacts {
    BackendFacts { state: a.state.max(b.state), local: a.local || b.local }
}

/// Addresses on this node with a ready endpoint: what a load balancer's health check asks for.
fn local_ready(service: &Service, slices: &[Arc<EndpointSlice>], node: &LocalNode) -> u32 {
    let addresses: std::collections::BTreeSet<IpAddr> = service
        .ports
        .iter()
        .flat_map(|port| [(port, Family::V4), (port, Family::V6)])
        .flat_map(|(port, family)| candidates(slices, port, family, service.publish_not_ready, node))
        .filter(|c| c.local && c.state == BackendState::Ready)
        .map(|c| c.address)
        .collect();
    addresses.len() as u32
}

/// Whether a pod has host ports on this node.
pub(super) fn has_host_ports(pod: &Pod, node: &LocalNode) -> bool {
    !pod.host_network
        && pod.node.as_ref().is_some_and(|own| *own == node.name)
        && pod.holds_addresses()
        && pod.ports.iter().any(|port| port.host_port != 0)
}

/// The desired state of a pod of this node with host ports.
pub(super) fn pod(pod: &Pod, node: &LocalNode) -> DesiredState {
    let mut desired = DesiredState::default();
    if !has_host_ports(pod, node) {
        return desired;
    }
    for port in pod.ports.iter().filter(|port| port.host_port != 0) {
        let mut out = DesiredPort {
            name: Arc::from(format!("host-{}", port.host_port)),
            protocol: port.protocol,
            affinity_seconds: 0,
            ranges: Vec::new(),
            tables: Vec::new(),
            frontends: Vec::new(),
        };
        for address in &pod.ips {
            let backend = BackendKey { address: *address, port: port.port, protocol: port.protocol };
            desired.backends.insert(backend, BackendFacts { state: BackendState::Ready, local: true });
            out.tables.push(DesiredTable { algorithm: Algorithm::Random, slots: vec![backend] });
            let table = DesiredSelection::Table(out.tables.len() - 1);
            let family = Family::of(*address);
            let key = match port.host_ip {
                None => FrontendKey::node(family, port.host_port, port.protocol),
                Some(host) if Family::of(host) == family => FrontendKey::new(host, port.host_port, port.protocol),
                Some(_) => continue,
            };
            out.frontends.push(DesiredFrontend {
                key,
                kind: FrontendKind::HostPort,
                internal: table,
                external: table,
                masquerade: false,
                check_source: false,
            });
        }
        out.prune();
        desired.ports.push(out);
    }
    desired
}
