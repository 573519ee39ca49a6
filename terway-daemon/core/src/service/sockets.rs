//! Stale sockets: sockets connected to a backend that was removed, which are to be destroyed (SOCK_DESTROY).
//!
//! A datagram to a removed backend gets no reply, so a connected UDP socket would send to it for ever. TCP times out by itself. Only sockets
//! that the datapath has translated are destroyed, and only while they are connected to the removed backend.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use super::model::{BackendState, Op};
use crate::objects::Protocol;

/// The protocols whose stale sockets are destroyed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketTermination {
    /// None.
    None,
    /// UDP.
    #[default]
    Udp,
    /// UDP and TCP.
    All,
}

impl SocketTermination {
    const NAMES: [(Self, &'static str); 3] = [(Self::None, "none"), (Self::Udp, "udp"), (Self::All, "all")];

    /// The protocols, by IP protocol number.
    #[must_use]
    pub const fn protocols(self) -> &'static [u8] {
        const ALL: [u8; 2] = [Protocol::Udp.number(), Protocol::Tcp.number()];
        match self {
            Self::None => &[],
            Self::Udp => ALL.split_at(1).0,
            Self::All => &ALL,
        }
    }
}

impl fmt::Display for SocketTermination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(value, _)| value == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

/// Error: not the name of a [`SocketTermination`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is none of none, udp and all")]
pub struct Unknown;

impl FromStr for SocketTermination {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        Self::NAMES.iter().find(|(_, name)| *name == text).map(|(value, _)| *value).ok_or(Unknown)
    }
}

/// A socket whose destination the datapath has translated to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslatedSocket {
    /// The socket's cookie, which is never used twice.
    pub cookie: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// The backend.
    pub backend: SocketAddr,
    /// Whether the backend still has the generation of the translation.
    pub backend_alive: bool,
}

/// The sockets that are to be destroyed if they are still connected to the removed backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StaleSockets {
    /// By cookie: protocol and removed backend.
    sockets: BTreeMap<u64, BTreeSet<(u8, SocketAddr)>>,
    netns: BTreeSet<u64>,
    protocols: BTreeSet<u8>,
}

impl StaleSockets {
    /// The stale ones of all translated sockets.
    #[must_use]
    pub fn of(all: impl IntoIterator<Item = TranslatedSocket>, whose: SocketTermination) -> Self {
        let mut stale = Self::default();
        for socket in all {
            if !socket.backend_alive && whose.protocols().contains(&socket.protocol) {
                stale.sockets.entry(socket.cookie).or_default().insert((socket.protocol, socket.backend));
                stale.netns.insert(socket.netns);
                stale.protocols.insert(socket.protocol);
            }
        }
        stale
    }

    /// Whether a socket that the kernel lists is one of them: same cookie and protocol, connected to the removed backend.
    #[must_use]
    pub fn contains(&self, cookie: u64, protocol: u8, peer: SocketAddr) -> bool {
        self.sockets.get(&cookie).is_some_and(|peers| peers.contains(&(protocol, peer)))
    }

    /// The cookies of the network namespaces to look in.
    #[must_use]
    pub const fn netns(&self) -> &BTreeSet<u64> {
        &self.netns
    }

    /// The protocols to list sockets of.
    #[must_use]
    pub const fn protocols(&self) -> &BTreeSet<u8> {
        &self.protocols
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }
}

/// Whether an operation removes a backend or invalidates its generation, so that sockets may be stale.
#[must_use]
pub fn invalidates_backend(op: &Op) -> bool {
    match op {
        Op::InvalidateBackend(..) | Op::RemoveBackend(..) => true,
        // Its generation was raised with this (see `Backend::generation`).
        Op::PutBackend(_, backend) => backend.state == BackendState::Unready && backend.key.protocol == Protocol::Udp,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn enum_names_round_trip() {
        for (value, name) in SocketTermination::NAMES {
            assert_eq!((name.parse(), value.to_string().as_str()), (Ok(value), name));
        }
        assert_eq!("tcp".parse::<SocketTermination>(), Err(Unknown));
    }

    fn translated() -> impl Strategy<Value = TranslatedSocket> {
        // Few of each, so that cookies, peers and namespaces coincide.
        (0..4_u64, 0..3_u64, prop_oneof![Just(6_u8), Just(17), Just(132)], peer(), any::<bool>()).prop_map(
            |(cookie, netns, protocol, backend, backend_alive)| TranslatedSocket {
                cookie,
                netns,
                protocol,
                backend,
                backend_alive,
            },
        )
    }

    fn peer() -> impl Strategy<Value = SocketAddr> {
        (0..2_u8, 1..3_u16, any::<bool>()).prop_map(|(host, port, v6)| {
            let ip: std::net::IpAddr =
                if v6 { [0xfd00, 0, 0, 0, 0, 0, 0, host.into()].into() } else { [10, 0, 0, host].into() };
            SocketAddr::new(ip, port)
        })
    }

    proptest! {
        /// Against the definition, for every socket that the kernel might list.
        #[test]
        fn sockets_to_destroy_are_those_still_connected_to_a_removed_backend(
            all in prop::collection::vec(translated(), 0..24),
            whose in prop_oneof![Just(SocketTermination::None), Just(SocketTermination::Udp), Just(SocketTermination::All)],
            listed in prop::collection::vec((0..4_u64, prop_oneof![Just(6_u8), Just(17), Just(132)], peer()), 0..24),
        ) {
            let stale = StaleSockets::of(all.clone(), whose);
            let named = match whose {
                SocketTermination::None => vec![],
                SocketTermination::Udp => vec![17],
                SocketTermination::All => vec![6, 17],
            };
            let dead = |t: &&TranslatedSocket| !t.backend_alive && named.contains(&t.protocol);
            for (cookie, protocol, peer) in listed {
                let desired =
                    all.iter().filter(dead).any(|t| (t.cookie, t.protocol, t.backend) == (cookie, protocol, peer));
                prop_assert_eq!(stale.contains(cookie, protocol, peer), desired);
            }
            // Wherever one is, and whatever it speaks, it is looked for; and nowhere else.
            let (netns, protocols): (BTreeSet<u64>, BTreeSet<u8>) =
                all.iter().filter(dead).map(|t| (t.netns, t.protocol)).unzip();
            prop_assert_eq!((stale.netns(), stale.protocols()), (&netns, &protocols));
            prop_assert_eq!(stale.is_empty(), netns.is_empty());
        }
    }
}
