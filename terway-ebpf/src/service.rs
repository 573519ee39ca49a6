//! Services: frontend lookup and backend selection.

use terway_abi::{
    Affinity, AffinityKey, Backend, BackendRange, BackendRef, Frontend, FrontendKey, NO_BACKEND, SCOPE_ADDRESS,
    SCOPE_NODE, backend_flags, frontend_class, frontend_flags,
};

use crate::family::Family;
use crate::parse::{SCTP, TCP, UDP};

/// Lookups of frontends, backends, source ranges and session affinity.
pub trait Services<F: Family> {
    /// The frontend filter: whether the address may be a frontend's. `false` is certain.
    fn may_be_frontend(&self, address: &F::Addr) -> bool;
    /// The frontend of this key.
    fn frontend(&self, key: &FrontendKey<F::Addr>) -> Option<&Frontend>;
    /// Whether a client is in the loadBalancerSourceRanges of a Service.
    fn in_source_ranges(&self, service: u32, client: &F::Addr) -> bool;
    /// The backend reference at this index; [`NO_BACKEND`] beyond the map.
    fn backend_ref(&self, index: u32) -> BackendRef;
    /// The backend at this index.
    fn backend(&self, number: u32) -> Option<&Backend>;
    /// The number of active connections of a backend.
    fn active_connections(&self, number: u32) -> u64;
    /// The session affinity entry of a client.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Writes the session affinity entry of a client.
    fn update_affinity(&self, key: &AffinityKey, value: &Affinity);
}

/// The client of a backend selection, with the random number and clock to use.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Address or cookie, as in [`AffinityKey::client`].
    pub client: [u32; 4],
    /// As [`AffinityKey::kind`].
    pub kind: u32,
    /// A random number.
    pub random: u32,
    /// Jiffies.
    pub now: u32,
    /// Jiffies per second.
    pub hz: u32,
}

/// The result of a backend selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The frontend is not for this client.
    NotService,
    /// The client is in none of the Service's loadBalancerSourceRanges.
    SourceRangeDenied,
    /// The Service has no backend: reject the packet.
    NoBackend {
        /// Drop the packet instead, without a reply.
        drop: bool,
    },
    /// The selected backend.
    Backend(BackendRef),
}

/// Number of selections that are tried when the selected backend was just removed.
const MAX_ATTEMPTS: u32 = 3;

/// Whether Services support this protocol.
#[inline(always)]
#[must_use]
pub const fn is_supported_protocol(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

/// The frontend of a destination. For clients in the cluster (`in_cluster`) an address of a Service without this port gives the frontend
/// that rejects; for external clients such ports are left to the host.
///
/// `is_node_address` is called last, for NodePorts.
#[inline(always)]
pub fn find_frontend<'a, F: Family, S: Services<F>>(
    services: &'a S,
    address: &F::Addr,
    ports: u32,
    protocol: u8,
    in_cluster: bool,
    is_node_address: impl FnOnce() -> bool,
) -> Option<&'a Frontend> {
    let [_, _, high, low] = ports.to_ne_bytes();
    let port = u16::from_ne_bytes([high, low]);
    if !services.may_be_frontend(address) {
        return None;
    }
    let exact = FrontendKey { address: *address, class: frontend_class(port, protocol, SCOPE_ADDRESS) };
    if let Some(frontend) = services.frontend(&exact) {
        return Some(frontend);
    }
    let any = FrontendKey { address: *address, class: 0 };
    if in_cluster && let Some(frontend) = services.frontend(&any) {
        return Some(frontend);
    }
    find_nodeport::<F, S>(services, ports, protocol).filter(|_| is_node_address())
}

/// The frontend of a NodePort.
#[inline(always)]
pub fn find_nodeport<F: Family, S: Services<F>>(services: &S, ports: u32, protocol: u8) -> Option<&Frontend> {
    let [_, _, high, low] = ports.to_ne_bytes();
    let port = u16::from_ne_bytes([high, low]);
    services.frontend(&FrontendKey { address: F::UNSPECIFIED, class: frontend_class(port, protocol, SCOPE_NODE) })
}

/// The result for a client that the frontend does not serve; none if it does.
#[inline(always)]
fn check_client<F: Family, S: Services<F>>(
    services: &S,
    frontend: &Frontend,
    in_cluster: bool,
    client: &F::Addr,
) -> Option<Selection> {
    let not_here = if in_cluster { frontend_flags::EXTERNAL_ONLY } else { frontend_flags::IN_CLUSTER_ONLY };
    if frontend.flags & not_here != 0 {
        return Some(Selection::NotService);
    }
    let ranged = !in_cluster && frontend.flags & frontend_flags::SOURCE_RANGES != 0;
    (ranged && !services.in_source_ranges(frontend.service, client)).then_some(Selection::SourceRangeDenied)
}

/// Selects the backend for a new connection of a client in the cluster (`in_cluster`) or of an external client.
#[inline(always)]
pub fn select_backend<F: Family, S: Services<F>>(
    services: &S,
    frontend: &Frontend,
    in_cluster: bool,
    hash: u32,
    client: &Client,
) -> Selection {
    if let Some(outcome) = check_client::<F, S>(services, frontend, in_cluster, &F::from_words(&client.client)) {
        return outcome;
    }
    let range = if in_cluster { frontend.internal } else { frontend.external };
    if range.count == 0 {
        return Selection::NoBackend { drop: !in_cluster && frontend.flags & frontend_flags::DROP_WITHOUT_REPLY != 0 };
    }
    let key = AffinityKey { client: client.client, service: frontend.service, kind: client.kind };
    let mut by_hash = frontend.flags & frontend_flags::MAGLEV != 0;
    if frontend.affinity != 0
        && let Some(affinity) = services.affinity(&key)
        && client.now.wrapping_sub(affinity.last_used) / client.hz.max(1) < frontend.affinity
        && let Some(backend) = current_backend(services, affinity.backend_ref)
    {
        if backend.flags & backend_flags::TERMINATING == 0 {
            services.update_affinity(&key, &Affinity { last_used: client.now, ..affinity });
            return Selection::Backend(affinity.backend_ref);
        }
        // A terminating backend gets no new connections. If only terminating backends are left, selection by hash keeps the client on one
        // of them.
        by_hash = true;
    }
    let mut random = if by_hash { hash } else { client.random };
    for _ in 0..MAX_ATTEMPTS {
        let mut backend_ref = pick_backend(services, range, random);
        random = random.wrapping_mul(0x915f_77f5).wrapping_add(0x9e37_79b9);
        if frontend.flags & frontend_flags::LEAST_CONNECTIONS != 0 {
            let other = pick_backend(services, range, random);
            if services.active_connections(other.backend) < services.active_connections(backend_ref.backend) {
                backend_ref = other;
            }
        }
        if current_backend(services, backend_ref).is_some() {
            if frontend.affinity != 0 {
                services.update_affinity(&key, &Affinity { backend_ref, last_used: client.now, spare: 0 });
            }
            return Selection::Backend(backend_ref);
        }
    }
    Selection::NoBackend { drop: false }
}

#[inline(always)]
fn pick_backend<F: Family, S: Services<F>>(services: &S, range: BackendRange, random: u32) -> BackendRef {
    // The high word of the product is uniform over the range, without a division.
    let place = (u64::from(random) * u64::from(range.count)) >> 32;
    services.backend_ref(range.first.wrapping_add(place as u32))
}

/// The backend of a reference, if it exists in this generation and family.
#[inline(always)]
pub fn current_backend<F: Family, S: Services<F>>(services: &S, backend_ref: BackendRef) -> Option<&Backend> {
    if backend_ref.backend == NO_BACKEND {
        return None;
    }
    let backend = services.backend(backend_ref.backend)?;
    let is_current =
        backend.generation == backend_ref.generation && (backend.flags & backend_flags::V6 != 0) == (F::VERSION == 6);
    if is_current { Some(backend) } else { None }
}

/// The hash of a client and ports, the same on every node. With session affinity the source port is left out. The destination address is
/// always left out: a NodePort has another one on every node.
#[inline(always)]
pub fn client_hash<F: Family>(src: &F::Addr, ports: u32, affinity: bool) -> u32 {
    let [a, b, c, d] = F::to_words(src);
    // No loop: LLVM would make the body fall through to its head, a back-edge that 5.10 and 6.1 reject (`check_cfg`, kernel/bpf/verifier.c).
    let state = mix(mix(mix(mix(0x3c6e_f372, a), b), c), d);
    // The destination port stays: each port of a Service is a frontend of its own.
    mix(state, if affinity { ports & u32::from_ne_bytes([0, 0, 0xff, 0xff]) } else { ports })
}

/// One round of MurmurHash3 with its finalizer.
#[inline(always)]
const fn mix(state: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    let state = (state ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    (state ^ (state >> 16)).wrapping_mul(0x85eb_ca6b)
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;
    use std::collections::HashMap;

    use super::*;
    use crate::family::V4;

    #[derive(Default)]
    struct Cluster {
        frontends: HashMap<FrontendKey<u32>, Frontend>,
        backend_refs: Vec<BackendRef>,
        backends: Vec<Backend>,
        connections: Vec<u64>,
        affinity: RefCell<HashMap<AffinityKey, Affinity>>,
        ranges: Vec<(u32, u32)>,
    }

    impl Services<V4> for Cluster {
        fn may_be_frontend(&self, address: &u32) -> bool {
            *address == 5 || self.frontends.keys().any(|key| key.address == *address)
        }
        fn frontend(&self, key: &FrontendKey<u32>) -> Option<&Frontend> {
            self.frontends.get(key)
        }
        fn in_source_ranges(&self, service: u32, client: &u32) -> bool {
            self.ranges.contains(&(service, *client))
        }
        fn backend_ref(&self, index: u32) -> BackendRef {
            self.backend_refs.get(index as usize).copied().unwrap_or_default()
        }
        fn backend(&self, number: u32) -> Option<&Backend> {
            self.backends.get(number as usize)
        }
        fn active_connections(&self, number: u32) -> u64 {
            self.connections.get(number as usize).copied().unwrap_or_default()
        }
        fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
            self.affinity.borrow().get(key).copied()
        }
        fn update_affinity(&self, key: &AffinityKey, value: &Affinity) {
            self.affinity.borrow_mut().insert(*key, *value);
        }
    }

    const VIP: u32 = 0x0100_600a;
    const HZ: u32 = 100;

    fn ports(destination: u16) -> u32 {
        let [a, b] = destination.to_be_bytes();
        u32::from_ne_bytes([0x9c, 0x40, a, b])
    }

    /// Backends 1 to `n` of generation 1, and a frontend at port 80 with all of them.
    fn cluster(n: u32, frontend: Frontend) -> Cluster {
        let backend = |generation| Backend { generation, protocol: 6, ..Backend::default() };
        let range = BackendRange { first: 10, count: n };
        let mut backend_refs = vec![BackendRef::default(); 10];
        backend_refs.extend((1..=n).map(|backend| BackendRef { backend, generation: 1 }));
        let class = frontend_class(80_u16.to_be(), 6, SCOPE_ADDRESS);
        let frontend = Frontend { internal: range, external: range, service: 7, ..frontend };
        Cluster {
            frontends: [
                (FrontendKey { address: VIP, class }, frontend),
                (FrontendKey { address: VIP, class: 0 }, Frontend::default()),
            ]
            .into(),
            backend_refs,
            backends: (0..=n).map(|i| backend(u32::from(i > 0))).collect(),
            connections: vec![0; n as usize + 1],
            affinity: RefCell::default(),
            ranges: Vec::new(),
        }
    }

    fn ask(random: u32, now: u32) -> Client {
        Client { client: [9, 0, 0, 0], kind: 4, random, now, hz: HZ }
    }

    fn chosen(cluster: &Cluster, client: &Client) -> u32 {
        let frontend = find_frontend::<V4, _>(cluster, &VIP, ports(80), 6, true, || false).unwrap();
        match select_backend::<V4, _>(cluster, frontend, true, 0, client) {
            Selection::Backend(backend_ref) => backend_ref.backend,
            other => panic!("{other:?}"),
        }
    }

    /// A deterministic sequence of uniform numbers.
    fn randoms() -> impl Iterator<Item = u32> {
        (0..40_000_u32).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 0x5bd1)
    }

    #[test]
    fn random_selection_is_uniform() {
        let cluster = cluster(5, Frontend::default());
        let mut shares = [0; 6];
        randoms().for_each(|random| shares[chosen(&cluster, &ask(random, 0)) as usize] += 1);
        assert_eq!(shares[0], 0);
        assert!(shares[1..].iter().all(|share| (7_900..8_100).contains(share)), "{shares:?}");
    }

    #[test]
    fn find_frontend_by_address_nodeport_and_scope() {
        let mut cluster = cluster(1, Frontend::default());
        let find = |cluster: &Cluster, address, port, protocol, node| {
            find_frontend::<V4, _>(cluster, &address, ports(port), protocol, true, || node).copied()
        };
        assert_eq!(find(&cluster, VIP, 80, 6, false).unwrap().service, 7);
        // Another port or protocol at the Service's address is rejected.
        for (port, protocol) in [(81, 6), (80, 17)] {
            let refused = find(&cluster, VIP, port, protocol, false).unwrap();
            assert_eq!(
                select_backend::<V4, _>(&cluster, &refused, true, 0, &ask(0, 0)),
                Selection::NoBackend { drop: false }
            );
        }
        assert_eq!(find(&cluster, 5, 80, 6, true), None);
        let nodeport = FrontendKey { address: 0, class: frontend_class(30_080_u16.to_be(), 6, SCOPE_NODE) };
        cluster.frontends.insert(nodeport, Frontend { service: 8, ..Frontend::default() });
        assert_eq!(find(&cluster, 5, 30_080, 6, true).unwrap().service, 8);
        assert_eq!(find(&cluster, 5, 30_080, 6, false), None);
        // For external clients the other ports of the address are left to the host.
        assert!(find_frontend::<V4, _>(&cluster, &VIP, ports(81), 6, false, || false).is_none());
    }

    #[test]
    fn frontend_flags_and_source_ranges_by_client() {
        let mut cluster = cluster(1, Frontend::default());
        cluster.ranges = vec![(7, 9)];
        let outcome = |flags, in_cluster, client: u32| {
            check_client::<V4, _>(&cluster, &Frontend { service: 7, flags, ..Frontend::default() }, in_cluster, &client)
        };
        for (flags, in_cluster, outside) in [
            (0, None, None),
            (frontend_flags::IN_CLUSTER_ONLY, None, Some(Selection::NotService)),
            (frontend_flags::EXTERNAL_ONLY, Some(Selection::NotService), None),
        ] {
            assert_eq!((outcome(flags, true, 9), outcome(flags, false, 9)), (in_cluster, outside));
        }
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, false, 9), None);
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, false, 8), Some(Selection::SourceRangeDenied));
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, true, 8), None);
    }

    #[test]
    fn session_affinity_times_out() {
        let cluster = cluster(5, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        // Each connection renews the affinity; jiffies wrap.
        let mut now = u32::MAX - 5 * HZ;
        cluster.affinity.borrow_mut().values_mut().for_each(|affinity| affinity.last_used = now);
        for random in randoms().take(100) {
            now = now.wrapping_add(9 * HZ);
            assert_eq!(chosen(&cluster, &ask(random, now)), first);
        }
        let later = now.wrapping_add(10 * HZ);
        assert!(randoms().take(1).any(|_| chosen(&cluster, &ask(u32::MAX, later)) != first));
    }

    #[test]
    fn removed_backend_is_not_selected() {
        let mut cluster = cluster(2, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        cluster.backends[first as usize].generation = 2;
        for random in randoms().take(100) {
            cluster
                .affinity
                .borrow_mut()
                .values_mut()
                .for_each(|affinity| affinity.backend_ref = BackendRef { backend: first, generation: 1 });
            let frontend = find_frontend::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
            match select_backend::<V4, _>(&cluster, frontend, true, 0, &ask(random, 1)) {
                Selection::Backend(backend_ref) => assert_ne!(backend_ref.backend, first),
                // All attempts may select the removed backend.
                other => assert_eq!(other, Selection::NoBackend { drop: false }),
            }
        }
    }

    #[test]
    fn terminating_backend_loses_its_affinity() {
        let mut cluster = cluster(4, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        cluster.backends[first as usize].flags |= backend_flags::TERMINATING;
        // The planner removes it from the range.
        cluster.backend_refs[10..14]
            .iter_mut()
            .for_each(|m| m.backend = if m.backend == first { first % 4 + 1 } else { m.backend });
        let second = chosen(&cluster, &ask(7, 1));
        assert_ne!(second, first);
        assert!(randoms().take(100).all(|random| chosen(&cluster, &ask(random, 2)) == second), "and stays there");
        // Only terminating backends are left: clients stay with one of them.
        cluster.backends.iter_mut().for_each(|backend| backend.flags |= backend_flags::TERMINATING);
        let last = chosen(&cluster, &ask(0, 3));
        assert!(randoms().take(100).all(|random| chosen(&cluster, &ask(random, 4)) == last));
    }

    proptest::proptest! {
        /// Affinity rule: a client stays with its backend while that exists and is not terminating, else gets an existing backend of the range
        /// and a new affinity entry.
        #[test]
        fn affinity_matches_its_rule(
            backends in proptest::collection::vec((1..3_u32, proptest::bool::ANY), 1..6),
            affinity in (1..7_u32, 1..3_u32, 0..30_u32),
            random: u32,
            hash: u32,
        ) {
            let now = 100 * HZ;
            let mut cluster = cluster(backends.len() as u32, Frontend { affinity: 10, ..Frontend::default() });
            for (backend, (generation, is_terminating)) in cluster.backends[1..].iter_mut().zip(&backends) {
                backend.generation = *generation;
                backend.flags = if *is_terminating { backend_flags::TERMINATING } else { 0 };
            }
            let (number, generation, ago) = affinity;
            let backend_ref = BackendRef { backend: number, generation };
            let client = ask(random, now);
            let key = AffinityKey { client: client.client, service: 7, kind: 4 };
            let last_used = now - ago * HZ;
            cluster.affinity.borrow_mut().insert(key, Affinity { backend_ref, last_used, spare: 0 });
            let stays = ago < 10 && backends.get(number as usize - 1) == Some(&(generation, false));
            let living = |m: BackendRef| m.generation == 1 && backends.get(m.backend as usize - 1).is_some_and(|b| b.0 == 1);
            let frontend = find_frontend::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
            match select_backend::<V4, _>(&cluster, frontend, true, hash, &client) {
                Selection::Backend(chosen) => {
                    proptest::prop_assert!(if stays { chosen == backend_ref } else { living(chosen) }, "{chosen:?}");
                    let kept = cluster.affinity.borrow()[&key];
                    proptest::prop_assert_eq!((kept.backend_ref, kept.last_used), (chosen, now));
                }
                // All attempts may select removed backends.
                _ => proptest::prop_assert!(!stays && backends.iter().any(|b| b.0 != 1)),
            }
        }
    }

    #[test]
    fn least_connections_balances() {
        let mut cluster = cluster(4, Frontend { flags: frontend_flags::LEAST_CONNECTIONS, ..Frontend::default() });
        for random in randoms().take(4_000) {
            let backend = chosen(&cluster, &ask(random, 0));
            cluster.connections[backend as usize] += 1;
        }
        let (least, most) =
            (cluster.connections[1..].iter().min().unwrap(), cluster.connections[1..].iter().max().unwrap());
        assert!(most - least < 20, "{:?}", cluster.connections);
    }

    #[test]
    fn maglev_selects_by_hash() {
        let cluster = cluster(4, Frontend { flags: frontend_flags::MAGLEV, ..Frontend::default() });
        let frontend = find_frontend::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
        for hash in randoms().take(100) {
            let of = |random| select_backend::<V4, _>(&cluster, frontend, false, hash, &ask(random, 0));
            assert!(randoms().take(10).all(|random| of(random) == of(0)));
        }
    }
}
