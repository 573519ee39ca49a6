//! Service ports, frontends and the socket programs as messages of the contract.

use std::collections::BTreeMap;

use terway_core::objects::{Kind, ObjectKey};
use terway_core::service::{BackendId, BackendState, FrontendKind, MapContents, Owner, PortView, Selection};
use terway_proto::v1;

use crate::services::{ServiceList, SocketPathStatus, owner_name};

/// The reply of `ListServices`.
pub(crate) fn list(list: &ServiceList) -> v1::ListServicesResponse {
    let ports = list.ports.iter().map(|view| port(view, list)).collect();
    v1::ListServicesResponse { ports, synced: list.is_synced }
}

/// The programs that resolve Services at the socket.
pub(crate) fn socket_path(status: &SocketPathStatus) -> v1::SocketPath {
    v1::SocketPath {
        cgroup: status.cgroup.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        programs: u32::try_from(status.programs).unwrap_or(u32::MAX),
        reason: status.reason.clone(),
        ended: status.destroyed,
    }
}

fn port(view: &PortView, list: &ServiceList) -> v1::ServicePort {
    let maps = &list.maps;
    let owner = owner_name(&view.owner);
    // A frontend that several owners ask for belongs to one of them.
    let entries = view.frontends.iter().filter_map(|key| Some((key, maps.frontends.get(key)?)));
    let frontends =
        entries.filter(|(_, frontend)| frontend.port == view.id).map(|(key, frontend)| v1::ServiceFrontend {
            address: key.address.to_string(),
            port: key.port.into(),
            kind: frontend_kind(frontend.kind).to_owned(),
            internal: Some(selection(frontend.internal, maps)),
            external: Some(selection(frontend.external, maps)),
            affinity_seconds: frontend.affinity_seconds,
            problem: list.frontend_problems.get(key).cloned().unwrap_or_default(),
        });
    let (kind, object) = match view.owner {
        Owner::Service(_) => ("Service", Kind::Service),
        Owner::Pod(_) => ("Pod", Kind::Pod),
    };
    let object = ObjectKey { kind: object, name: owner.clone() };
    v1::ServicePort {
        kind: kind.to_owned(),
        namespace: owner.namespace.to_string(),
        name: owner.name.to_string(),
        port_name: view.name.to_string(),
        protocol: view.protocol.to_string(),
        id: view.id.0,
        frontends: frontends.collect(),
        problems: list.unapplied.get(&object).into_iter().flatten().cloned().collect(),
    }
}

const fn frontend_kind(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::HostPort => "HostPort",
    }
}

fn selection(selection: Selection, maps: &MapContents) -> v1::ServiceChoice {
    let verdict = match selection {
        Selection::Table(id) => {
            let Some(table) = maps.tables.get(&id) else { return v1::ServiceChoice::default() };
            let mut slots: BTreeMap<BackendId, u32> = BTreeMap::new();
            for slot in &table.slots {
                *slots.entry(slot.backend).or_default() += 1;
            }
            let backends = slots.into_iter().filter_map(|(id, slots)| Some((maps.backends.get(&id)?, slots)));
            let mut backends: Vec<v1::ServiceBackend> = backends
                .map(|(backend, slots)| v1::ServiceBackend {
                    address: backend.key.address.to_string(),
                    port: backend.key.port.into(),
                    state: match backend.state {
                        BackendState::Ready => "ready",
                        BackendState::Draining => "draining",
                        BackendState::Unready => "unready",
                    }
                    .to_owned(),
                    local: backend.local,
                    slots,
                })
                .collect();
            backends.sort_by(|a, b| (&a.address, a.port).cmp(&(&b.address, b.port)));
            let algorithm = table.algorithm.name().to_owned();
            return v1::ServiceChoice { verdict: "backends".to_owned(), algorithm, backends };
        }
        Selection::Reject => "reject",
        Selection::Drop => "drop",
        Selection::Pass => "pass",
    };
    v1::ServiceChoice { verdict: verdict.to_owned(), ..v1::ServiceChoice::default() }
}
