//! Conversions between the planner's types and those of the Service maps.

use std::net::IpAddr;

use terway_abi::{
    Backend as AbiBackend, BackendRange, Frontend as AbiFrontend, FrontendKey as Key, FrontendKeyV4, FrontendKeyV6,
    SCOPE_ADDRESS, SCOPE_NODE, backend_flags, frontend_class, frontend_flags,
};
use terway_core::objects::Protocol;
use terway_core::service::{
    Algorithm, Backend, BackendKey, BackendState, Frontend, FrontendKey, FrontendKind, PortId, Selection, TableId,
};

use crate::bpf::address::{address_v4, address_v6, word, words};

/// A frontend's key in the map of its family.
pub(super) enum AbiKey {
    V4(FrontendKeyV4),
    V6(FrontendKeyV6),
}

pub(super) fn key_to_abi(key: &FrontendKey) -> AbiKey {
    let scope = if key.is_node() { SCOPE_NODE } else { SCOPE_ADDRESS };
    // The entry of all other ports has neither port, protocol nor scope.
    let class = key.protocol.map_or(0, |protocol| frontend_class(key.port.to_be(), protocol.number(), scope));
    match key.address {
        IpAddr::V4(v4) => AbiKey::V4(Key { address: word(v4), class }),
        IpAddr::V6(v6) => AbiKey::V6(Key { address: words(v6), class }),
    }
}

/// None for a protocol that Services do not have.
pub(super) fn key_from_abi(address: IpAddr, class: u32) -> Option<FrontendKey> {
    let [high, low, protocol, _] = class.to_ne_bytes();
    let port = u16::from_be_bytes([high, low]);
    match protocol {
        0 => Some(FrontendKey::rest(address)),
        number => Some(FrontendKey::new(address, port, protocol_from_number(number)?)),
    }
}

fn protocol_from_number(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| protocol.number() == number)
}

pub(super) const fn algorithm(flags: u32) -> Algorithm {
    match flags {
        _ if flags & frontend_flags::MAGLEV != 0 => Algorithm::Maglev,
        _ if flags & frontend_flags::LEAST_CONNECTIONS != 0 => Algorithm::LeastConnections,
        _ => Algorithm::Random,
    }
}

/// A frontend as the map has it. `table` tells where a table is.
pub(super) fn frontend_to_abi(
    frontend: &Frontend,
    table: impl Fn(TableId) -> Option<(BackendRange, Algorithm)>,
) -> AbiFrontend {
    let mut flags = 0;
    let mut range = |selection: Selection, pass: u32, drop: u32| match selection {
        Selection::Table(id) => table(id).map_or(BackendRange::default(), |(range, algorithm)| {
            flags |= match algorithm {
                Algorithm::Random => 0,
                Algorithm::LeastConnections => frontend_flags::LEAST_CONNECTIONS,
                Algorithm::Maglev => frontend_flags::MAGLEV,
            };
            range
        }),
        Selection::Reject => BackendRange::default(),
        Selection::Drop => {
            flags |= drop;
            BackendRange::default()
        }
        Selection::Pass => {
            flags |= pass;
            BackendRange::default()
        }
    };
    let internal = range(frontend.internal, frontend_flags::EXTERNAL_ONLY, 0);
    let external = range(frontend.external, frontend_flags::IN_CLUSTER_ONLY, frontend_flags::DROP_WITHOUT_REPLY);
    if frontend.check_source {
        flags |= frontend_flags::SOURCE_RANGES;
    }
    if frontend.kind != FrontendKind::ClusterIp && !frontend.masquerade {
        flags |= frontend_flags::EXTERNAL_LOCAL;
    }
    AbiFrontend { service: frontend.port.0, flags, internal, external, affinity: frontend.affinity_seconds, spare: 0 }
}

/// A frontend from the map, which does not hold its kind: only whether it is a cluster address changes what is written.
pub(super) fn frontend_from_abi(
    key: FrontendKey,
    entry: &AbiFrontend,
    internal: Selection,
    external: Selection,
) -> Frontend {
    let is_local = entry.flags & frontend_flags::EXTERNAL_LOCAL != 0;
    let kind = match external {
        _ if key.is_node() => FrontendKind::NodePort,
        Selection::Pass if !is_local => FrontendKind::ClusterIp,
        _ => FrontendKind::LoadBalancer,
    };
    Frontend {
        port: PortId(entry.service),
        kind,
        internal,
        external,
        masquerade: kind != FrontendKind::ClusterIp && !is_local,
        check_source: entry.flags & frontend_flags::SOURCE_RANGES != 0,
        affinity_seconds: entry.affinity,
    }
}

pub(super) fn backend_to_abi(backend: &Backend) -> AbiBackend {
    let (address, family) = match backend.key.address {
        IpAddr::V4(address) => ([word(address), 0, 0, 0], 0),
        IpAddr::V6(address) => (words(address), backend_flags::V6),
    };
    let local = if backend.local { backend_flags::LOCAL } else { 0 };
    let terminating = if backend.state == BackendState::Ready { 0 } else { backend_flags::TERMINATING };
    AbiBackend {
        address,
        port: backend.key.port.to_be(),
        protocol: backend.key.protocol.number(),
        flags: family | local | terminating,
        generation: backend.generation,
        spare: [0; 2],
    }
}

/// None for a tombstone or an unused number. The map does not distinguish an unready backend from a terminating one; the objects do.
pub(super) fn backend_from_abi(entry: &AbiBackend) -> Option<Backend> {
    let protocol = protocol_from_number(entry.protocol)?;
    let address = if entry.flags & backend_flags::V6 != 0 {
        IpAddr::V6(address_v6(entry.address))
    } else {
        IpAddr::V4(address_v4(entry.address[0]))
    };
    let is_terminating = entry.flags & backend_flags::TERMINATING != 0;
    Some(Backend {
        key: BackendKey { address, port: u16::from_be(entry.port), protocol },
        state: if is_terminating { BackendState::Draining } else { BackendState::Ready },
        local: entry.flags & backend_flags::LOCAL != 0,
        generation: entry.generation,
    })
}
