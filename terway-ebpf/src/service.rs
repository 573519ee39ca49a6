//! Services: whether a packet is for one, and which backend it gets.

use terway_abi::{
    Affinity, AffinityKey, Backend, BackendRange, BackendRef, Frontend, FrontendKey, NO_BACKEND, SCOPE_ADDRESS,
    SCOPE_NODE, backend_flags, frontend_class, frontend_flags,
};

use crate::family::Family;
use crate::parse::{SCTP, TCP, UDP};

/// What the daemon has told the kernel of Services, and what was chosen before.
pub trait Services<F: Family> {
    /// Whether the address may be a Service's or one of the node's with a NodePort; `false` is certain.
    fn may_serve(&self, address: &F::Addr) -> bool;
    /// The frontend of this key.
    fn frontend(&self, key: &FrontendKey<F::Addr>) -> Option<&Frontend>;
    /// Whether a client is in the source ranges of a Service.
    fn in_ranges(&self, service: u32, client: &F::Addr) -> bool;
    /// The member at this place; nobody if there is no such place.
    fn member(&self, index: u32) -> BackendRef;
    /// The backend of this number.
    fn backend(&self, number: u32) -> Option<&Backend>;
    /// Its open connections.
    fn load(&self, number: u32) -> u64;
    /// To whom a client is held.
    fn held(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Holds a client.
    fn hold(&self, key: &AffinityKey, value: &Affinity);
}

/// Who asks, and how chance falls.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
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

/// What a packet's destination comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is no Service's, or not for this client.
    Other,
    /// The client is in none of the Service's source ranges.
    Excluded,
    /// It is a Service's that nobody serves; to be answered, or with `silent` dropped.
    Refused {
        /// No answer.
        silent: bool,
    },
    /// It goes there.
    Chosen(BackendRef),
}

/// How often another member is tried when the one that was found has just gone.
const TRIES: u32 = 3;

/// Whether Services exist for this protocol.
#[inline(always)]
#[must_use]
pub const fn is_served(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

/// The frontend that a packet is for, or, for a client in the cluster (`inside`), that its address is a Service's without this port: for
/// clients outside such ports are left to the host.
///
/// `node` tells whether the address is the node's own; it is asked last.
#[inline(always)]
pub fn find<'a, F: Family, S: Services<F>>(
    services: &'a S,
    address: &F::Addr,
    ports: u32,
    protocol: u8,
    inside: bool,
    node: impl FnOnce() -> bool,
) -> Option<&'a Frontend> {
    let [_, _, high, low] = ports.to_ne_bytes();
    let port = u16::from_ne_bytes([high, low]);
    if !services.may_serve(address) {
        return None;
    }
    let exact = FrontendKey { address: *address, class: frontend_class(port, protocol, SCOPE_ADDRESS) };
    if let Some(frontend) = services.frontend(&exact) {
        return Some(frontend);
    }
    let any = FrontendKey { address: *address, class: 0 };
    if inside && let Some(frontend) = services.frontend(&any) {
        return Some(frontend);
    }
    at_node::<F, S>(services, ports, protocol).filter(|_| node())
}

/// The frontend of a port of the node, at whatever address.
#[inline(always)]
pub fn at_node<F: Family, S: Services<F>>(services: &S, ports: u32, protocol: u8) -> Option<&Frontend> {
    let [_, _, high, low] = ports.to_ne_bytes();
    let port = u16::from_ne_bytes([high, low]);
    services.frontend(&FrontendKey { address: F::NONE, class: frontend_class(port, protocol, SCOPE_NODE) })
}

/// What becomes of a packet whose client is not served, because it is in the cluster (`inside`), or outside of it.
#[inline(always)]
fn admit<F: Family, S: Services<F>>(
    services: &S,
    frontend: &Frontend,
    inside: bool,
    client: &F::Addr,
) -> Option<Outcome> {
    let not_here = if inside { frontend_flags::EXTERNAL_ONLY } else { frontend_flags::IN_CLUSTER_ONLY };
    if frontend.flags & not_here != 0 {
        return Some(Outcome::Other);
    }
    let ranged = !inside && frontend.flags & frontend_flags::SOURCE_RANGES != 0;
    (ranged && !services.in_ranges(frontend.service, client)).then_some(Outcome::Excluded)
}

/// The backend for a new connection of a client in the cluster (`inside`) or outside of it.
#[inline(always)]
pub fn choose<F: Family, S: Services<F>>(
    services: &S,
    frontend: &Frontend,
    inside: bool,
    hash: u32,
    asker: &Asker,
) -> Outcome {
    if let Some(outcome) = admit::<F, S>(services, frontend, inside, &F::narrow(&asker.client)) {
        return outcome;
    }
    let run = if inside { frontend.internal } else { frontend.external };
    if run.count == 0 {
        return Outcome::Refused { silent: !inside && frontend.flags & frontend_flags::DROP_WITHOUT_REPLY != 0 };
    }
    let key = AffinityKey { client: asker.client, service: frontend.service, kind: asker.kind };
    let mut by_hash = frontend.flags & frontend_flags::MAGLEV != 0;
    if frontend.affinity != 0
        && let Some(held) = services.held(&key)
        && asker.now.wrapping_sub(held.last_used) / asker.hz.max(1) < frontend.affinity
        && let Some(backend) = life(services, held.backend_ref)
    {
        if backend.flags & backend_flags::TERMINATING == 0 {
            services.hold(&key, &Affinity { last_used: asker.now, ..held });
            return Outcome::Chosen(held.backend_ref);
        }
        // It finishes what it has begun and gets nothing new. If the run has others that are ending and no one else, the client shall
        // at least stay with one of them.
        by_hash = true;
    }
    let mut chance = if by_hash { hash } else { asker.random };
    for _ in 0..TRIES {
        let mut member = pick(services, run, chance);
        chance = chance.wrapping_mul(0x915f_77f5).wrapping_add(0x9e37_79b9);
        if frontend.flags & frontend_flags::LEAST_CONNECTIONS != 0 {
            let other = pick(services, run, chance);
            if services.load(other.backend) < services.load(member.backend) {
                member = other;
            }
        }
        if life(services, member).is_some() {
            if frontend.affinity != 0 {
                services.hold(&key, &Affinity { backend_ref: member, last_used: asker.now, spare: 0 });
            }
            return Outcome::Chosen(member);
        }
    }
    Outcome::Refused { silent: false }
}

#[inline(always)]
fn pick<F: Family, S: Services<F>>(services: &S, run: BackendRange, chance: u32) -> BackendRef {
    // The top bits of a product fall evenly over the run, without the division that a remainder takes.
    let place = (u64::from(chance) * u64::from(run.count)) >> 32;
    services.member(run.first.wrapping_add(place as u32))
}

/// The backend of a member, if it still is the one that the member was put there for.
#[inline(always)]
pub fn life<F: Family, S: Services<F>>(services: &S, member: BackendRef) -> Option<&Backend> {
    if member.backend == NO_BACKEND {
        return None;
    }
    let backend = services.backend(member.backend)?;
    let lives =
        backend.generation == member.generation && (backend.flags & backend_flags::V6 != 0) == (F::VERSION == 6);
    if lives { Some(backend) } else { None }
}

/// A hash of a packet, the same on every node. Clients that are held to a backend are told apart by their address alone.
///
/// Without the destination address: a NodePort has a different one on every node.
#[inline(always)]
pub fn hash<F: Family>(src: &F::Addr, ports: u32, held: bool) -> u32 {
    let [a, b, c, d] = F::widen(src);
    // No loop: LLVM lays it out so that its body falls through to its head, and older kernels refuse such a back-edge (5.10 and 6.1 do: kernel/bpf/verifier.c, `check_cfg`).
    let state = mix(mix(mix(mix(0x3c6e_f372, a), b), c), d);
    // The destination port stays: two ports of one Service are two Services here.
    mix(state, if held { ports & u32::from_ne_bytes([0, 0, 0xff, 0xff]) } else { ports })
}

/// A round of MurmurHash3 with its last step, which spreads every bit.
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
        members: Vec<BackendRef>,
        backends: Vec<Backend>,
        loads: Vec<u64>,
        held: RefCell<HashMap<AffinityKey, Affinity>>,
        ranges: Vec<(u32, u32)>,
    }

    impl Services<V4> for Cluster {
        fn may_serve(&self, address: &u32) -> bool {
            *address == 5 || self.frontends.keys().any(|key| key.address == *address)
        }
        fn frontend(&self, key: &FrontendKey<u32>) -> Option<&Frontend> {
            self.frontends.get(key)
        }
        fn in_ranges(&self, service: u32, client: &u32) -> bool {
            self.ranges.contains(&(service, *client))
        }
        fn member(&self, index: u32) -> BackendRef {
            self.members.get(index as usize).copied().unwrap_or_default()
        }
        fn backend(&self, number: u32) -> Option<&Backend> {
            self.backends.get(number as usize)
        }
        fn load(&self, number: u32) -> u64 {
            self.loads.get(number as usize).copied().unwrap_or_default()
        }
        fn held(&self, key: &AffinityKey) -> Option<Affinity> {
            self.held.borrow().get(key).copied()
        }
        fn hold(&self, key: &AffinityKey, value: &Affinity) {
            self.held.borrow_mut().insert(*key, *value);
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
        let run = BackendRange { first: 10, count: n };
        let mut members = vec![BackendRef::default(); 10];
        members.extend((1..=n).map(|backend| BackendRef { backend, generation: 1 }));
        let class = frontend_class(80_u16.to_be(), 6, SCOPE_ADDRESS);
        let frontend = Frontend { internal: run, external: run, service: 7, ..frontend };
        Cluster {
            frontends: [
                (FrontendKey { address: VIP, class }, frontend),
                (FrontendKey { address: VIP, class: 0 }, Frontend::default()),
            ]
            .into(),
            members,
            backends: (0..=n).map(|i| backend(u32::from(i > 0))).collect(),
            loads: vec![0; n as usize + 1],
            held: RefCell::default(),
            ranges: Vec::new(),
        }
    }

    fn ask(random: u32, now: u32) -> Asker {
        Asker { client: [9, 0, 0, 0], kind: 4, random, now, hz: HZ }
    }

    fn chosen(cluster: &Cluster, asker: &Asker) -> u32 {
        let frontend = find::<V4, _>(cluster, &VIP, ports(80), 6, true, || false).unwrap();
        match choose::<V4, _>(cluster, frontend, true, 0, asker) {
            Outcome::Chosen(member) => member.backend,
            other => panic!("{other:?}"),
        }
    }

    /// A sequence that is as even as chance and always the same.
    fn randoms() -> impl Iterator<Item = u32> {
        (0..40_000_u32).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 0x5bd1)
    }

    #[test]
    fn every_member_gets_its_share() {
        let cluster = cluster(5, Frontend::default());
        let mut shares = [0; 6];
        randoms().for_each(|random| shares[chosen(&cluster, &ask(random, 0)) as usize] += 1);
        assert_eq!(shares[0], 0);
        assert!(shares[1..].iter().all(|share| (7_900..8_100).contains(share)), "{shares:?}");
    }

    #[test]
    fn what_is_a_services_and_what_is_not() {
        let mut cluster = cluster(1, Frontend::default());
        let find = |cluster: &Cluster, address, port, protocol, node| {
            find::<V4, _>(cluster, &address, ports(port), protocol, true, || node).copied()
        };
        assert_eq!(find(&cluster, VIP, 80, 6, false).unwrap().service, 7);
        // Another port, another protocol: the address is the Service's all the same, and refuses.
        for (port, protocol) in [(81, 6), (80, 17)] {
            let refused = find(&cluster, VIP, port, protocol, false).unwrap();
            assert_eq!(choose::<V4, _>(&cluster, &refused, true, 0, &ask(0, 0)), Outcome::Refused { silent: false });
        }
        assert_eq!(find(&cluster, 5, 80, 6, true), None);
        let nodeport = FrontendKey { address: 0, class: frontend_class(30_080_u16.to_be(), 6, SCOPE_NODE) };
        cluster.frontends.insert(nodeport, Frontend { service: 8, ..Frontend::default() });
        assert_eq!(find(&cluster, 5, 30_080, 6, true).unwrap().service, 8);
        assert_eq!(find(&cluster, 5, 30_080, 6, false), None);
        // From outside, the other ports of the address are left to whoever has them.
        assert!(super::find::<V4, _>(&cluster, &VIP, ports(81), 6, false, || false).is_none());
    }

    #[test]
    fn who_is_served() {
        let mut cluster = cluster(1, Frontend::default());
        cluster.ranges = vec![(7, 9)];
        let outcome = |flags, inside, client: u32| {
            admit::<V4, _>(&cluster, &Frontend { service: 7, flags, ..Frontend::default() }, inside, &client)
        };
        for (flags, inside, outside) in [
            (0, None, None),
            (frontend_flags::IN_CLUSTER_ONLY, None, Some(Outcome::Other)),
            (frontend_flags::EXTERNAL_ONLY, Some(Outcome::Other), None),
        ] {
            assert_eq!((outcome(flags, true, 9), outcome(flags, false, 9)), (inside, outside));
        }
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, false, 9), None);
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, false, 8), Some(Outcome::Excluded));
        assert_eq!(outcome(frontend_flags::SOURCE_RANGES, true, 8), None);
    }

    #[test]
    fn clients_stay_as_long_as_told() {
        let cluster = cluster(5, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        // Each connection holds it anew; the clock of jiffies wraps.
        let mut now = u32::MAX - 5 * HZ;
        cluster.held.borrow_mut().values_mut().for_each(|held| held.last_used = now);
        for random in randoms().take(100) {
            now = now.wrapping_add(9 * HZ);
            assert_eq!(chosen(&cluster, &ask(random, now)), first);
        }
        let later = now.wrapping_add(10 * HZ);
        assert!(randoms().take(1).any(|_| chosen(&cluster, &ask(u32::MAX, later)) != first));
    }

    #[test]
    fn who_is_gone_is_not_chosen() {
        let mut cluster = cluster(2, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        cluster.backends[first as usize].generation = 2;
        for random in randoms().take(100) {
            cluster
                .held
                .borrow_mut()
                .values_mut()
                .for_each(|held| held.backend_ref = BackendRef { backend: first, generation: 1 });
            let frontend = find::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
            match choose::<V4, _>(&cluster, frontend, true, 0, &ask(random, 1)) {
                Outcome::Chosen(member) => assert_ne!(member.backend, first),
                // Chance may fall on the same one each time.
                other => assert_eq!(other, Outcome::Refused { silent: false }),
            }
        }
    }

    #[test]
    fn who_is_ending_gets_no_new_connection_of_its_clients() {
        let mut cluster = cluster(4, Frontend { affinity: 10, ..Frontend::default() });
        let first = chosen(&cluster, &ask(0, 0));
        cluster.backends[first as usize].flags |= backend_flags::TERMINATING;
        // The planner takes it out of the run.
        cluster.members[10..14]
            .iter_mut()
            .for_each(|m| m.backend = if m.backend == first { first % 4 + 1 } else { m.backend });
        let second = chosen(&cluster, &ask(7, 1));
        assert_ne!(second, first);
        assert!(randoms().take(100).all(|random| chosen(&cluster, &ask(random, 2)) == second), "and stays there");
        // All that is left is ending: clients stay with one of them.
        cluster.backends.iter_mut().for_each(|backend| backend.flags |= backend_flags::TERMINATING);
        let last = chosen(&cluster, &ask(0, 3));
        assert!(randoms().take(100).all(|random| chosen(&cluster, &ask(random, 4)) == last));
    }

    proptest::proptest! {
        /// Against the rule in words: who is held goes where it is held, if that one lives and stays; else to anybody who lives and is
        /// in the run; and is then held there.
        #[test]
        fn affinity_follows_its_rule(
            backends in proptest::collection::vec((1..3_u32, proptest::bool::ANY), 1..6),
            held in (1..7_u32, 1..3_u32, 0..30_u32),
            random: u32,
            hash: u32,
        ) {
            let now = 100 * HZ;
            let mut cluster = cluster(backends.len() as u32, Frontend { affinity: 10, ..Frontend::default() });
            for (backend, (generation, ending)) in cluster.backends[1..].iter_mut().zip(&backends) {
                backend.generation = *generation;
                backend.flags = if *ending { backend_flags::TERMINATING } else { 0 };
            }
            let (number, generation, ago) = held;
            let member = BackendRef { backend: number, generation };
            let asker = ask(random, now);
            let key = AffinityKey { client: asker.client, service: 7, kind: 4 };
            let last_used = now - ago * HZ;
            cluster.held.borrow_mut().insert(key, Affinity { backend_ref: member, last_used, spare: 0 });
            let stays = ago < 10 && backends.get(number as usize - 1) == Some(&(generation, false));
            let living = |m: BackendRef| m.generation == 1 && backends.get(m.backend as usize - 1).is_some_and(|b| b.0 == 1);
            let frontend = find::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
            match choose::<V4, _>(&cluster, frontend, true, hash, &asker) {
                Outcome::Chosen(chosen) => {
                    proptest::prop_assert!(if stays { chosen == member } else { living(chosen) }, "{chosen:?}");
                    let kept = cluster.held.borrow()[&key];
                    proptest::prop_assert_eq!((kept.backend_ref, kept.last_used), (chosen, now));
                }
                // A few tries may all meet somebody who has just gone.
                _ => proptest::prop_assert!(!stays && backends.iter().any(|b| b.0 != 1)),
            }
        }
    }

    #[test]
    fn of_two_the_idler_is_taken() {
        let mut cluster = cluster(4, Frontend { flags: frontend_flags::LEAST_CONNECTIONS, ..Frontend::default() });
        for random in randoms().take(4_000) {
            let backend = chosen(&cluster, &ask(random, 0));
            cluster.loads[backend as usize] += 1;
        }
        let (least, most) = (cluster.loads[1..].iter().min().unwrap(), cluster.loads[1..].iter().max().unwrap());
        assert!(most - least < 20, "{:?}", cluster.loads);
    }

    #[test]
    fn the_hash_decides_where_told_to() {
        let cluster = cluster(4, Frontend { flags: frontend_flags::MAGLEV, ..Frontend::default() });
        let frontend = find::<V4, _>(&cluster, &VIP, ports(80), 6, true, || false).unwrap();
        for hash in randoms().take(100) {
            let of = |random| choose::<V4, _>(&cluster, frontend, false, hash, &ask(random, 0));
            assert!(randoms().take(10).all(|random| of(random) == of(0)));
        }
    }
}
