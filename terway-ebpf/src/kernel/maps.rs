//! Maps and globals, with the reason for each size, and the lookups of the library on them. Names, keys and values are `terway-abi`'s; the
//! daemon may change sizes.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use aya_ebpf::{bindings::BPF_F_NO_PREALLOC, maps::lpm_trie};
use terway_abi::{
    Affinity, AffinityKey, Backend, BackendRef, COUNTERS as COUNTER_COUNT, Counter, Drop, EPOCH_SLOTS, Endpoint,
    EventBudget, FRONTEND_FILTER_BUCKETS, Flow, FlowKeyV4, FlowKeyV6, FlowV4, FlowV6, FragmentKeyV4, FragmentKeyV6,
    FragmentValue, Frontend, FrontendKey, FrontendKeyV4, FrontendKeyV6, MAX_ENDPOINTS, MAX_UPLINKS, PeerKey,
    PolicyCounter, PolicyEndpoint, PortKey, SocketKey, SocketValue, SourceRangeV4, SourceRangeV6, Uplink, Versioned,
    frontend_filter_v4, frontend_filter_v6, policy_index,
};

use super::scratch::Scratch;
use super::skb::Skb;
use crate::family::{Family, V4, V6};
use crate::icmp::QuotedHeader;
use crate::policy::Policies;
use crate::reject::Reject;
use crate::route::Tables;
use crate::service::Services;

/// Endpoints by host interface. Not preallocated: most nodes have tens of pods.
#[map]
pub static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Endpoints by IPv4 address.
#[map]
pub static ENDPOINTS_V4: HashMap<u32, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Endpoints by IPv6 address.
#[map]
pub static ENDPOINTS_V6: HashMap<[u32; 4], Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Epochs of endpoints and of remote addresses.
#[map]
pub static EPOCHS: Array<u32> = Array::with_max_entries(EPOCH_SLOTS, 0);

/// Prefixes of the host stack: the node's addresses and `host_stack_cidrs`, tens of them.
#[map]
pub static HOST_V4: lpm_trie::LpmTrie<u32, u32> = lpm_trie::LpmTrie::with_max_entries(4096, 0);

/// As [`HOST_V4`].
#[map]
pub static HOST_V6: lpm_trie::LpmTrie<[u32; 4], u32> = lpm_trie::LpmTrie::with_max_entries(4096, 0);

/// The flow table. The daemon sets the size; a connection takes one entry, or two with NAT, of about 200 bytes each.
#[map]
pub static FLOWS_V4: LruHashMap<FlowKeyV4, FlowV4> = LruHashMap::with_max_entries(65_536, 0);

/// As [`FLOWS_V4`], about 250 bytes per entry.
#[map]
pub static FLOWS_V6: LruHashMap<FlowKeyV6, FlowV6> = LruHashMap::with_max_entries(65_536, 0);

/// Scratch memory of IPv4 packets.
#[map]
pub static SCRATCH_V4: PerCpuArray<Scratch<V4>> = PerCpuArray::with_max_entries(1, 0);

/// Scratch memory of IPv6 packets.
#[map]
pub static SCRATCH_V6: PerCpuArray<Scratch<V6>> = PerCpuArray::with_max_entries(1, 0);

/// Ports of fragmented packets, needed for milliseconds.
#[map]
pub static FRAGMENTS_V4: LruHashMap<FragmentKeyV4, FragmentValue> = LruHashMap::with_max_entries(4096, 0);

/// As [`FRAGMENTS_V4`].
#[map]
pub static FRAGMENTS_V6: LruHashMap<FragmentKeyV6, FragmentValue> = LruHashMap::with_max_entries(4096, 0);

/// Frontends: enough for 30 000 Services. Not preallocated: most clusters have hundreds.
#[map]
pub static FRONTENDS_V4: HashMap<FrontendKeyV4, Frontend> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// As [`FRONTENDS_V4`].
#[map]
pub static FRONTENDS_V6: HashMap<FrontendKeyV6, Frontend> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// The frontend filter: number of frontends by hash bucket of their address.
#[map]
pub static FRONTEND_FILTER: Array<u32> = Array::with_max_entries(FRONTEND_FILTER_BUCKETS, 0);

/// Backend ranges: 8 MiB, enough for 30 000 Services with four backends and fifty Maglev tables of 16 381 entries. The daemon sets the size.
#[map]
pub static BACKEND_REFS: Array<BackendRef> = Array::with_max_entries(1_048_576, 0);

/// Backends: 4 MiB. The daemon sets the size.
#[map]
pub static BACKENDS: Array<Backend> = Array::with_max_entries(131_072, 0);

/// Active connections of backends, for least-connections selection.
#[map]
pub static ACTIVE_CONNS: Array<u64> = Array::with_max_entries(131_072, 0);

/// Session affinity entries.
#[map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(65_536, 0);

/// The loadBalancerSourceRanges of Services.
#[map]
pub static SRC_RANGES_V4: lpm_trie::LpmTrie<SourceRangeV4, u32> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// As [`SRC_RANGES_V4`].
#[map]
pub static SRC_RANGES_V6: lpm_trie::LpmTrie<SourceRangeV6, u32> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// Socket translations.
#[map]
pub static SOCKET_NAT: LruHashMap<SocketKey, SocketValue> = LruHashMap::with_max_entries(65_536, 0);

/// The policy control word.
#[map]
pub static POLICY_CONTROL: Array<u32> = Array::with_max_entries(1, 0);

/// Policies of endpoints, in two versions: 704 KiB.
#[map]
pub static POLICY_ENDPOINTS: Array<PolicyEndpoint> = Array::with_max_entries(2 * MAX_ENDPOINTS, 0);

/// Peer entries of policy sets. Two hundred pods with fifty different policies, in a cluster with a thousand classes of pods, take some ten
/// thousand; during a take-over twice that. Not preallocated, here and below: a replaced or deleted value is not reused before an RCU grace
/// period has passed.
#[map]
pub static POLICY_PEERS: HashMap<PeerKey, Versioned> = HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);

/// Port tables: some ten prefixes per combination of rules.
#[map]
pub static POLICY_PORTS: lpm_trie::LpmTrie<PortKey, u32> = lpm_trie::LpmTrie::with_max_entries(262_144, 0);

/// Counters of policy rules: some rules per policy that selects a local pod. An entry takes 24 bytes per CPU.
#[map]
pub static POLICY_COUNTERS: PerCpuHashMap<u32, PolicyCounter> =
    PerCpuHashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Identities of pods and of the local node, by address: enough for 100 000 pods.
#[map]
pub static IPCACHE_V4: HashMap<u32, Versioned> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// As [`IPCACHE_V4`].
#[map]
pub static IPCACHE_V6: HashMap<[u32; 4], Versioned> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// Identities of the CIDRs in policies.
#[map]
pub static IPCACHE_NET_V4: lpm_trie::LpmTrie<u32, Versioned> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// As [`IPCACHE_NET_V4`].
#[map]
pub static IPCACHE_NET_V6: lpm_trie::LpmTrie<[u32; 4], Versioned> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// Uplinks. Not preallocated: most nodes have a handful.
#[map]
pub static UPLINKS: HashMap<u32, Uplink> = HashMap::with_max_entries(MAX_UPLINKS, BPF_F_NO_PREALLOC);

/// Packets and bytes by path and by drop reason.
#[map]
pub static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

/// Rate limit of events per CPU.
#[map]
pub static EVENT_BUDGET: PerCpuArray<EventBudget> = PerCpuArray::with_max_entries(1, 0);

/// Flow events: room for some 2 300, which is the budget of many CPUs for seconds.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Jiffies per second.
#[unsafe(no_mangle)]
pub static HZ: Global<u32> = Global::new(250);

/// Events that one CPU may report per second.
#[unsafe(no_mangle)]
pub static EVENTS_PER_SECOND: Global<u32> = Global::new(100);

/// Whether the slow path writes the debug log.
#[unsafe(no_mangle)]
pub static DEBUG: Global<u32> = Global::new(0);

/// The cookie of the host's network namespace; 0 for the initial namespace.
#[unsafe(no_mangle)]
pub static HOST_NETNS: Global<u64> = Global::new(0);

/// Whether `bpf_set_retval` exists: a rejected system call gets its own errno.
#[unsafe(no_mangle)]
pub static SETS_ERRNO: Global<u32> = Global::new(0);

/// The lookups of the library, on the kernel's maps.
pub struct Maps;

/// The maps of an address family.
pub trait FamilyMaps: Family {
    /// The flow table.
    fn flows() -> &'static LruHashMap<terway_abi::FlowKey<Self::Addr>, Flow<Self::Addr>>;
    /// The scratch memory.
    fn scratch() -> &'static PerCpuArray<Scratch<Self>>;
    /// The ports of fragmented packets.
    fn fragments() -> &'static LruHashMap<terway_abi::FragmentKey<Self::Addr>, FragmentValue>;
}

impl FamilyMaps for V4 {
    #[inline(always)]
    fn flows() -> &'static LruHashMap<FlowKeyV4, FlowV4> {
        &FLOWS_V4
    }

    #[inline(always)]
    fn scratch() -> &'static PerCpuArray<Scratch<V4>> {
        &SCRATCH_V4
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKeyV4, FragmentValue> {
        &FRAGMENTS_V4
    }
}

impl FamilyMaps for V6 {
    #[inline(always)]
    fn flows() -> &'static LruHashMap<FlowKeyV6, FlowV6> {
        &FLOWS_V6
    }

    #[inline(always)]
    fn scratch() -> &'static PerCpuArray<Scratch<V6>> {
        &SCRATCH_V6
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKeyV6, FragmentValue> {
        &FRAGMENTS_V6
    }
}

/// An address family with all that the packet path needs.
pub trait DatapathFamily: FamilyMaps + QuotedHeader + Reject {}
impl<F: FamilyMaps + QuotedHeader + Reject> DatapathFamily for F {}

/// The endpoint of the pod that sends the packet, by the interface of the hook.
#[inline(always)]
pub(super) fn sending_endpoint<F: Family>(skb: Skb) -> Result<&'static Endpoint, Drop>
where
    Maps: Tables<F>,
{
    const MAPS: &Maps = &Maps;
    MAPS.by_ifindex(skb.ifindex()).ok_or(Drop::UnknownEndpoint)
}

#[inline(always)]
fn endpoint<K>(map: &'static HashMap<K, Endpoint>, key: &K) -> Option<&'static Endpoint> {
    // SAFETY: an entry that is deleted while it is read may be reused for another endpoint. The reader then sees that endpoint's slot and
    // epoch, or a mixture that fails the epoch check of the next packet (deletion raises the epoch).
    unsafe { map.get(key) }
}

#[inline(always)]
fn uplink(ifindex: u32) -> Option<&'static Uplink> {
    // SAFETY: the daemon replaces values whole, and the value of an ENI changes only after the ENI is removed.
    unsafe { UPLINKS.get(&ifindex) }
}

#[inline(always)]
fn epoch(slot: u32) -> u32 {
    // Slots come from the daemon and from hashing. For one beyond the map the result matches no entry.
    EPOCHS.get(slot).map_or(u32::MAX, |epoch| {
        // SAFETY: the map's value outlives the program run. Volatile: the daemon writes it concurrently.
        unsafe { core::ptr::read_volatile(epoch) }
    })
}

impl Tables<V4> for Maps {
    #[inline(always)]
    fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        endpoint(&ENDPOINTS, &ifindex)
    }

    #[inline(always)]
    fn by_address(&self, address: &u32) -> Option<&Endpoint> {
        endpoint(&ENDPOINTS_V4, address)
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<&Uplink> {
        uplink(ifindex)
    }

    #[inline(always)]
    fn is_host(&self, address: &u32) -> bool {
        HOST_V4.get(lpm_trie::Key::new(32, *address)).is_some()
    }

    #[inline(always)]
    fn epoch(&self, slot: u32) -> u32 {
        epoch(slot)
    }
}

impl Tables<V6> for Maps {
    #[inline(always)]
    fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        endpoint(&ENDPOINTS, &ifindex)
    }

    #[inline(always)]
    fn by_address(&self, address: &[u32; 4]) -> Option<&Endpoint> {
        endpoint(&ENDPOINTS_V6, address)
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<&Uplink> {
        uplink(ifindex)
    }

    #[inline(always)]
    fn is_host(&self, address: &[u32; 4]) -> bool {
        HOST_V6.get(lpm_trie::Key::new(128, *address)).is_some()
    }

    #[inline(always)]
    fn epoch(&self, slot: u32) -> u32 {
        epoch(slot)
    }
}

macro_rules! services {
    ($family:ty, $frontends:ident, $filter:path, $source_ranges:expr) => {
        impl Services<$family> for Maps {
            #[inline(always)]
            fn may_be_frontend(&self, address: &<$family as Family>::Addr) -> bool {
                FRONTEND_FILTER.get($filter(*address)).is_some_and(|count| *count != 0)
            }

            #[inline(always)]
            fn frontend(&self, key: &FrontendKey<<$family as Family>::Addr>) -> Option<&Frontend> {
                // SAFETY: the daemon replaces values whole. One that is deleted while it is read may be reused for another Service;
                // the backend range that it refers to stays for a second.
                unsafe { $frontends.get(key) }
            }

            #[inline(always)]
            fn in_source_ranges(&self, service: u32, client: &<$family as Family>::Addr) -> bool {
                $source_ranges(service, client)
            }

            #[inline(always)]
            fn backend_ref(&self, index: u32) -> BackendRef {
                BACKEND_REFS.get(index).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn backend(&self, number: u32) -> Option<&Backend> {
                BACKENDS.get(number)
            }

            #[inline(always)]
            fn active_connections(&self, number: u32) -> u64 {
                ACTIVE_CONNS.get(number).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
                // SAFETY: copied at once; of a value that is reused meanwhile, the backend's generation decides whether it is valid.
                unsafe { AFFINITY.get(key) }.copied()
            }

            #[inline(always)]
            fn update_affinity(&self, key: &AffinityKey, value: &Affinity) {
                // If the insertion fails, the next connection may go to another backend.
                let _result = AFFINITY.insert(key, value, 0);
            }
        }
    };
}

services!(V4, FRONTENDS_V4, frontend_filter_v4, |service, client: &u32| {
    SRC_RANGES_V4.get(lpm_trie::Key::new(32 + 32, [service, *client])).is_some()
});
services!(V6, FRONTENDS_V6, frontend_filter_v6, |service, client: &[u32; 4]| {
    let [a, b, c, d] = *client;
    SRC_RANGES_V6.get(lpm_trie::Key::new(32 + 128, [service, a, b, c, d])).is_some()
});

macro_rules! policies {
    ($family:ty, $addresses:ident, $cidrs:ident, $bits:literal) => {
        impl Policies<$family> for Maps {
            #[inline(always)]
            fn control_word(&self) -> u32 {
                // SAFETY: the map's value outlives the program run. Volatile: read once, after the epochs.
                POLICY_CONTROL.get(0).map_or(0, |control| unsafe { core::ptr::read_volatile(control) })
            }

            #[inline(always)]
            fn endpoint(&self, slot: u32, version: u32) -> Option<&PolicyEndpoint> {
                POLICY_ENDPOINTS.get(policy_index(slot, version))
            }

            #[inline(always)]
            fn identity(&self, address: &<$family as Family>::Addr) -> Option<&Versioned> {
                // SAFETY: values are replaced whole, and the old ones stay for an RCU grace period.
                unsafe { $addresses.get(address) }
            }

            #[inline(always)]
            fn cidr_identity(&self, address: &<$family as Family>::Addr) -> Option<&Versioned> {
                $cidrs.get(lpm_trie::Key::new($bits, *address))
            }

            #[inline(always)]
            fn peer(&self, key: &PeerKey) -> Option<&Versioned> {
                // SAFETY: as above.
                unsafe { POLICY_PEERS.get(key) }
            }

            #[inline(always)]
            fn port(&self, key: &PortKey) -> Option<u32> {
                POLICY_PORTS.get(lpm_trie::Key::new(PortKey::BITS, *key)).copied()
            }
        }
    };
}

policies!(V4, IPCACHE_V4, IPCACHE_NET_V4, 32);
policies!(V6, IPCACHE_V6, IPCACHE_NET_V6, 128);

/// Counts an active connection of a backend. Not atomic: the daemon corrects the counts in each garbage collection.
#[inline(always)]
pub fn count_connection(backend: u32) {
    if let Some(count) = ACTIVE_CONNS.get_ptr_mut(backend) {
        // SAFETY: the value stays mapped; a lost addition is acceptable.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}
