//! Services as the contract writes them.

use std::collections::BTreeMap;

use terway_core::objects::ObjectName;
use terway_core::service::{BackendId, BackendState, FrontendKind, MapContents, Owner, PortView, Selection};
use terway_proto::v1;

/// The owner's name, whatever its kind.
pub(super) const fn name(owner: &Owner) -> &ObjectName {
    match owner {
        Owner::Service(name) | Owner::Pod(name) => name,
    }
}

pub(super) fn port(view: &PortView, kernel: &MapContents) -> v1::ServicePort {
    let owner = name(&view.owner);
    // A frontend that another owner has won is not this one's.
    let held = view.frontends.iter().filter_map(|key| Some((key, kernel.frontends.get(key)?)));
    let frontends = held.filter(|(_, frontend)| frontend.port == view.id).map(|(key, frontend)| v1::ServiceFrontend {
        address: key.address.to_string(),
        port: key.port.into(),
        kind: kind(frontend.kind).to_owned(),
        inside: Some(choice(frontend.inside, kernel)),
        outside: Some(choice(frontend.outside, kernel)),
        affinity_seconds: frontend.affinity_seconds,
    });
    v1::ServicePort {
        kind: match view.owner {
            Owner::Service(_) => "Service",
            Owner::Pod(_) => "Pod",
        }
        .to_owned(),
        namespace: owner.namespace.to_string(),
        name: owner.name.to_string(),
        port_name: view.name.to_string(),
        protocol: view.protocol.to_string(),
        id: view.id.0,
        frontends: frontends.collect(),
    }
}

const fn kind(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::HostPort => "HostPort",
    }
}

fn choice(selection: Selection, kernel: &MapContents) -> v1::ServiceChoice {
    let verdict = match selection {
        Selection::Table(id) => {
            let Some(table) = kernel.tables.get(&id) else { return v1::ServiceChoice::default() };
            let mut slots: BTreeMap<BackendId, u32> = BTreeMap::new();
            for slot in &table.slots {
                *slots.entry(slot.backend).or_default() += 1;
            }
            let known = slots.into_iter().filter_map(|(id, slots)| Some((kernel.backends.get(&id)?, slots)));
            let mut backends: Vec<v1::ServiceBackend> = known
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
