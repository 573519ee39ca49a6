//! The datapath's own code on the compiler's maps: it answers what [`Maps::verdict`] answers, number for number.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use terway_abi::{
    CONTROL_ENFORCE, PeerKey, PolicyDirection, PolicyEndpoint, PortKey, VERDICT_ALLOW, Versioned, rule_id,
};
use terway_core::cidr::Cidr as _;
use terway_core::policy::{
    DISABLED, IdentityKind, LOCAL_NODE, LOOPBACK, Maps, NO_POLICY, Packet, PortTableId, RuleId, SetId, SetRef, Verdict,
};
use terway_ebpf::family::{Family, V4, V6};
use terway_ebpf::policy::{NOT_CHECKED, Policies, PolicyQuery, check};

use crate::dice::Dice;
use crate::making::{ClusterInputs as _, random};
use crate::random::{compile, finder};
use crate::setting;

/// The maps as the kernel holds them.
struct Kernel<'a> {
    maps: &'a Maps,
    control: u32,
    endpoints: HashMap<u32, [PolicyEndpoint; 2]>,
    exact: HashMap<IpAddr, Versioned>,
    blocks: HashMap<IpNetwork, Versioned>,
    peers: HashMap<PeerKey, Versioned>,
}

impl<'a> Kernel<'a> {
    fn of(maps: &'a Maps) -> Self {
        let side = |side: SetRef| PolicyDirection { set: side.set.0, defaults: side.defaults.map(|target| target.0) };
        let endpoint = |value: terway_core::policy::EndpointPolicy| PolicyEndpoint {
            identities: value.identities.map(|identity| identity.0),
            ingress: value.ingress.map(side),
            egress: value.egress.map(side),
        };
        Self {
            maps,
            control: maps.version as u32 | if maps.enforce { CONTROL_ENFORCE } else { 0 },
            endpoints: maps.endpoints.iter().map(|(slot, values)| (*slot, values.map(endpoint))).collect(),
            exact: maps.addresses.iter().map(|(a, pair)| (*a, pair.map(|identity| identity.0))).collect(),
            blocks: maps.cidrs.iter().map(|(net, pair)| (*net, pair.map(|identity| identity.0))).collect(),
            peers: maps
                .peers
                .iter()
                .map(|((set, id), pair)| (PeerKey { set: set.0, identity: id.0 }, pair.map(|target| target.0)))
                .collect(),
        }
    }
}

fn ip<F: Family>(address: &F::Addr) -> IpAddr {
    let words = F::to_words(address);
    if F::VERSION == 4 {
        return Ipv4Addr::from(words[0].to_ne_bytes()).into();
    }
    let mut bytes = [0; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(bytes).into()
}

impl<F: Family> Policies<F> for Kernel<'_> {
    fn control_word(&self) -> u32 {
        self.control
    }

    fn endpoint(&self, slot: u32, version: u32) -> Option<&PolicyEndpoint> {
        self.endpoints.get(&slot).map(|values| &values[version as usize])
    }

    fn identity(&self, address: &F::Addr) -> Option<&Versioned> {
        self.exact.get(&ip::<F>(address))
    }

    fn cidr_identity(&self, address: &F::Addr) -> Option<&Versioned> {
        let net = IpNetwork::from(ip::<F>(address));
        let lengths = (0..=net.prefix()).rev();
        lengths
            .filter_map(|length| IpNetwork::new(net.ip(), length).ok())
            .find_map(|net| self.blocks.get(&net.truncated()))
    }

    fn peer(&self, key: &PeerKey) -> Option<&Versioned> {
        self.peers.get(key)
    }

    fn port(&self, key: &PortKey) -> Option<u32> {
        let [protocol, high, low, zero] = key.class.to_ne_bytes();
        assert_eq!(zero, 0);
        let port = u16::from_be_bytes([high, low]);
        let entries = self.maps.port_tables.get(&PortTableId(key.table))?.iter();
        entries.filter(|e| e.covers(protocol, port)).max_by_key(|e| e.prefix_len()).map(|e| e.verdict.0)
    }
}

fn asked<F: Family>(kernel: &Kernel<'_>, packet: &Packet, slots: [u32; 2]) -> [u32; 2] {
    let address = |ip: IpAddr| {
        let bytes = match ip {
            IpAddr::V4(v4) => [v4.octets(), [0; 4], [0; 4], [0; 4]].concat(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let words = std::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()));
        F::from_words(&words)
    };
    let query = PolicyQuery {
        source: address(packet.source),
        destination: address(packet.destination),
        slots,
        port: u32::from(packet.port.to_be()),
        protocol: packet.protocol.into(),
    };
    check::<F, _>(kernel, &query)
}

/// A slot that is no pod's, as the datapath has one for every address.
const BUCKET: u32 = terway_abi::MAX_ENDPOINTS + 7;

fn compare(maps: &Maps, packets: &[Packet], local: &dyn Fn(IpAddr) -> Option<u32>) {
    let kernel = Kernel::of(maps);
    for packet in packets {
        let slots = [packet.source, packet.destination].map(|address| local(address).unwrap_or(BUCKET));
        let found = match packet.source {
            IpAddr::V4(_) => asked::<V4>(&kernel, packet, slots),
            IpAddr::V6(_) => asked::<V6>(&kernel, packet, slots),
        };
        let [egress, ingress] = maps.verdict(packet, local, maps.version);
        // What is forbidden to send need not be asked about any further.
        let ingress = ingress.filter(|_| egress.is_none_or(Verdict::is_allowed));
        let always = !maps.enforce || slots[0] == slots[1];
        for (side, (found, expected)) in found.into_iter().zip([egress, ingress]).enumerate() {
            let expected = match expected {
                // The node is not asked for where no policy applies.
                Some(it) if it.rule_id() == LOCAL_NODE => {
                    let none = maps.endpoints[&slots[1]][maps.version].ingress.iter().all(|side| side.set == SetId(0));
                    Verdict::allow(if none { NO_POLICY } else { LOCAL_NODE }).0
                }
                Some(it) => it.0,
                None if always => found,
                None => NOT_CHECKED,
            };
            assert_eq!(found, expected, "{packet:?}, side {side}");
            assert!(always || found & VERDICT_ALLOW == expected & VERDICT_ALLOW);
        }
    }
}

#[test]
fn policy_maps_are_read_as_compiled() {
    assert_eq!(
        [NO_POLICY, DISABLED, LOOPBACK, LOCAL_NODE].map(|RuleId(n)| n),
        [rule_id::NO_POLICY, rule_id::DISABLED, rule_id::LOOPBACK, rule_id::LOCAL_NODE]
    );
    assert_eq!(IdentityKind::LocalNode as u32, terway_abi::IDENTITY_NODE >> 30);
    let (worlds, seed) = (setting("POLICY_WORLDS", 500), setting("POLICY_SEED", 1));
    for n in 0..worlds {
        let mut dice = Dice::new(seed.wrapping_add(n).wrapping_mul(0x1000_0000_01b3));
        let world = random(&mut dice);
        let (_, mut maps) = compile(&world);
        let packets = world.packets();
        compare(&maps, &packets, &finder(&world));
        // Whatever is missing, both miss the same.
        for _ in 0..3 {
            maps.peers.retain(|_, _| dice.chance(90));
            maps.port_tables.retain(|_, _| dice.chance(90));
            maps.addresses.retain(|_, _| dice.chance(90));
            maps.version = 1 - maps.version;
        }
        compare(&maps, &packets, &finder(&world));
    }
}
