//! Every map and global, with the reason for its size. Names, keys and values are `terway-abi`'s; the daemon may change sizes.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use aya_ebpf::{bindings::BPF_F_NO_PREALLOC, maps::lpm_trie};
use terway_abi::{
    Affinity, AffinityKey, Backend, BackendRef, COUNTERS as COUNTER_COUNT, Counter, EPOCH_SLOTS, Endpoint, EventBudget,
    FRONTEND_FILTER_BUCKETS, Flow, FlowKeyV4, FlowKeyV6, FlowV4, FlowV6, FragmentKeyV4, FragmentKeyV6, FragmentValue,
    Frontend, FrontendKey, FrontendKeyV4, FrontendKeyV6, MAX_ENDPOINTS, MAX_UPLINKS, NO_BACKEND, PeerKey,
    PolicyCounter, PolicyEndpoint, PortKey, SocketKey, SocketValue, SourceRangeV4, SourceRangeV6, Uplink, Versioned,
    frontend_filter_v4, frontend_filter_v6, policy_index,
};

use crate::route::Tables;
use crate::family::{Family, V4, V6};
use crate::parse::Packet;
use crate::policy::{Case, Decision, Policies};
use crate::service::Services;

/// Pods by host interface. Not preallocated: most nodes have tens of pods.
#[map]
pub static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Pods by IPv4 address.
#[map]
pub static ENDPOINTS_V4: HashMap<u32, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Pods by IPv6 address.
#[map]
pub static ENDPOINTS_V6: HashMap<[u32; 4], Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

/// Epochs of endpoints and of buckets of other addresses.
#[map]
pub static EPOCHS: Array<u32> = Array::with_max_entries(EPOCH_SLOTS, 0);

/// Prefixes that the host stack serves: its own addresses and `host_stack_cidrs`, tens of them.
#[map]
pub static HOST_V4: lpm_trie::LpmTrie<u32, u32> = lpm_trie::LpmTrie::with_max_entries(4096, 0);

/// As [`HOST_V4`].
#[map]
pub static HOST_V6: lpm_trie::LpmTrie<[u32; 4], u32> = lpm_trie::LpmTrie::with_max_entries(4096, 0);

/// Flows. The daemon sets the size; two entries make a connection, and an entry takes about 200 bytes.
#[map]
pub static FLOWS_V4: LruHashMap<FlowKeyV4, FlowV4> = LruHashMap::with_max_entries(65_536, 0);

/// As [`FLOWS_V4`], about 250 bytes an entry.
#[map]
pub static FLOWS_V6: LruHashMap<FlowKeyV6, FlowV6> = LruHashMap::with_max_entries(65_536, 0);

/// What the slow path works on. Not pinned and nobody else's: one CPU's memory for one packet.
///
/// Not on the stack: that is too small, and the verifier remembers what stands there and follows each way with each different
/// memory, while of a map's value it knows nothing.
#[repr(C)]
pub struct Desk<F: Family> {
    /// The packet.
    pub packet: Packet<F>,
    /// The packet that an ICMP error quotes.
    pub quoted: Packet<F>,
    /// The flow that is about to be inserted.
    pub flow: Flow<F::Addr>,
    /// That of the answers, if they have one of their own; or, where an answer is decided anew, the one that it had.
    pub reply: Flow<F::Addr>,
    /// What the entry was that it replaces.
    pub replaced: Replaced,
    /// Where the packet goes.
    pub choice: Choice<F::Addr>,
    /// What policies are asked about.
    pub case: Case<F::Addr>,
    /// Not 0 if the packet's flow is known, and policies have changed since it was judged; see [`super::policy_check`].
    pub stale: u32,
    /// What policies decided about the case, egress first.
    pub verdicts: [Decision; 2],
}

impl<F: Family> Desk<F> {
    /// The Service whose backend was chosen for the packet; 0 if there is none.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        if self.choice.member.backend == NO_BACKEND { 0 } else { self.choice.service }
    }
}

/// What the flow table held under the packet's key; zeros if there was nothing.
#[repr(C, align(8))]
pub struct Replaced {
    /// Not 0 if the answers of a Service's backend are there, which look the same.
    pub taken: u32,
    /// Not 0 if the packet's sender is the one who answered.
    pub answers: u32,
    /// Not 0 if the answers were translated.
    pub translated: u32,
    /// Zero.
    pub spare: u32,
    /// What decided about the packet's sender and the other end.
    pub slots: [u32; 2],
    /// And when.
    pub epochs: [u32; 2],
}

/// Where a packet goes: its destination, or the backend that a Service chose for it.
#[repr(C, align(8))]
pub struct Choice<A> {
    /// The address.
    pub address: A,
    /// The port as in the packet, in the first two bytes.
    pub port: u32,
    /// The backend; nobody if it is not for a Service.
    pub member: BackendRef,
    /// The Service.
    pub service: u32,
    /// Not 0 if the Service refuses the packet.
    pub refused: u32,
    /// Not 0 if the backend is the sender itself.
    pub itself: u32,
    /// Not 0 if a backend on another node will not do.
    pub local: u32,
    /// The source port that the backend knows the connection by, as in the packet; 0 if that is still to be found.
    pub source: u32,
    /// The ENI in whose name the packet goes on to another node; 0 if it does not.
    pub uplink: u32,
    /// A seat of [`super::slow_path`].
    pub seat: u32,
    /// Not 0 if the packet is a translated answer whose entry is void: it is on the desk, as `reply`.
    pub kept: u32,
    /// Zero.
    pub spare: u32,
}

/// The desk of IPv4.
#[map]
pub static DESK_V4: PerCpuArray<Desk<V4>> = PerCpuArray::with_max_entries(1, 0);

/// The desk of IPv6.
#[map]
pub static DESK_V6: PerCpuArray<Desk<V6>> = PerCpuArray::with_max_entries(1, 0);

/// Fragmented packets on their way: they live for milliseconds.
#[map]
pub static FRAGMENTS_V4: LruHashMap<FragmentKeyV4, FragmentValue> = LruHashMap::with_max_entries(4096, 0);

/// As [`FRAGMENTS_V4`].
#[map]
pub static FRAGMENTS_V6: LruHashMap<FragmentKeyV6, FragmentValue> = LruHashMap::with_max_entries(4096, 0);

/// Ports of Services, 30 000 of which are in order. Not preallocated: most clusters have hundreds.
#[map]
pub static FRONTENDS_V4: HashMap<FrontendKeyV4, Frontend> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// As [`FRONTENDS_V4`].
#[map]
pub static FRONTENDS_V6: HashMap<FrontendKeyV6, Frontend> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// Whether an address may be a Service's.
#[map]
pub static FRONTEND_FILTER: Array<u32> = Array::with_max_entries(FRONTEND_FILTER_BUCKETS, 0);

/// Runs of backends: 8 MiB, which is 30 000 Services of four backends and fifty Maglev tables of 16 381. The daemon sets the size.
#[map]
pub static BACKEND_REFS: Array<BackendRef> = Array::with_max_entries(1_048_576, 0);

/// Backends: 4 MiB. The daemon sets the size.
#[map]
pub static BACKENDS: Array<Backend> = Array::with_max_entries(131_072, 0);

/// Their open connections, for the choice of the least loaded.
#[map]
pub static ACTIVE_CONNS: Array<u64> = Array::with_max_entries(131_072, 0);

/// Clients that are held to a backend.
#[map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(65_536, 0);

/// Source ranges of Services.
#[map]
pub static SRC_RANGES_V4: lpm_trie::LpmTrie<SourceRangeV4, u32> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// As [`SRC_RANGES_V4`].
#[map]
pub static SRC_RANGES_V6: lpm_trie::LpmTrie<SourceRangeV6, u32> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// Sockets whose peer was translated.
#[map]
pub static SOCKET_NAT: LruHashMap<SocketKey, SocketValue> = LruHashMap::with_max_entries(65_536, 0);

/// Which phase of the policies counts.
#[map]
pub static POLICY_CONTROL: Array<u32> = Array::with_max_entries(1, 0);

/// What policies say about pods, for each phase: 704 KiB.
#[map]
pub static POLICY_ENDPOINTS: Array<PolicyEndpoint> = Array::with_max_entries(2 * MAX_ENDPOINTS, 0);

/// What sets say about identities. Two hundred pods of a node with fifty different policies, in a cluster with a thousand classes of
/// pods, take some ten thousand; a daemon that takes over needs twice that for a moment. Not preallocated, here and below: a value
/// that is replaced or removed is not used again before all readers are gone.
#[map]
pub static POLICY_PEERS: HashMap<PeerKey, Versioned> = HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);

/// Port tables: some ten prefixes for each combination of rules.
#[map]
pub static POLICY_PORTS: lpm_trie::LpmTrie<PortKey, u32> = lpm_trie::LpmTrie::with_max_entries(262_144, 0);

/// What reasons decided: of the policies that select pods of this node, some rules each. An entry takes 24 bytes for each CPU.
#[map]
pub static POLICY_COUNTERS: PerCpuHashMap<u32, PolicyCounter> =
    PerCpuHashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Identities of pods and of this node: a cluster of 100 000 pods.
#[map]
pub static IPCACHE_V4: HashMap<u32, Versioned> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// As [`IPCACHE_V4`].
#[map]
pub static IPCACHE_V6: HashMap<[u32; 4], Versioned> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// Identities of blocks: those that policies name.
#[map]
pub static IPCACHE_NET_V4: lpm_trie::LpmTrie<u32, Versioned> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);

/// As [`IPCACHE_NET_V4`].
#[map]
pub static IPCACHE_NET_V6: lpm_trie::LpmTrie<[u32; 4], Versioned> = lpm_trie::LpmTrie::with_max_entries(65_536, 0);
/// ENIs by which clients outside are served. Not preallocated: most nodes have a handful.
#[map]
pub static UPLINKS: HashMap<u32, Uplink> = HashMap::with_max_entries(MAX_UPLINKS, BPF_F_NO_PREALLOC);

/// Packets and bytes by way and by drop reason.
#[map]
pub static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

/// How many events this CPU may still report.
#[map]
pub static EVENT_BUDGET: PerCpuArray<EventBudget> = PerCpuArray::with_max_entries(1, 0);

/// Dropped packets and new connections: some 2 300 events, which is seconds of the budget of many CPUs.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Jiffies per second.
#[unsafe(no_mangle)]
pub static HZ: Global<u32> = Global::new(250);

/// Events that one CPU may report per second.
#[unsafe(no_mangle)]
pub static EVENTS_PER_SECOND: Global<u32> = Global::new(100);

/// Whether first packets are reported through `bpf_trace_printk`.
#[unsafe(no_mangle)]
pub static DEBUG: Global<u32> = Global::new(0);

/// The cookie of the node's own network namespace; 0 for the first one of the machine.
#[unsafe(no_mangle)]
pub static HOST_NETNS: Global<u64> = Global::new(0);

/// Whether programs on sockets can say with which error a system call fails.
#[unsafe(no_mangle)]
pub static SETS_ERRNO: Global<u32> = Global::new(0);

/// The kernel's maps as what decisions ask.
pub struct Maps;

/// The maps of a family.
pub trait Kernel: Family {
    /// Its flow table.
    fn flows() -> &'static LruHashMap<terway_abi::FlowKey<Self::Addr>, Flow<Self::Addr>>;
    /// This CPU's desk.
    fn desk() -> &'static PerCpuArray<Desk<Self>>;
    /// Its fragments.
    fn fragments() -> &'static LruHashMap<terway_abi::FragmentKey<Self::Addr>, FragmentValue>;
}

impl Kernel for V4 {
    #[inline(always)]
    fn flows() -> &'static LruHashMap<FlowKeyV4, FlowV4> {
        &FLOWS_V4
    }

    #[inline(always)]
    fn desk() -> &'static PerCpuArray<Desk<V4>> {
        &DESK_V4
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKeyV4, FragmentValue> {
        &FRAGMENTS_V4
    }
}

impl Kernel for V6 {
    #[inline(always)]
    fn flows() -> &'static LruHashMap<FlowKeyV6, FlowV6> {
        &FLOWS_V6
    }

    #[inline(always)]
    fn desk() -> &'static PerCpuArray<Desk<V6>> {
        &DESK_V6
    }

    #[inline(always)]
    fn fragments() -> &'static LruHashMap<FragmentKeyV6, FragmentValue> {
        &FRAGMENTS_V6
    }
}

#[inline(always)]
fn endpoint<K>(map: &'static HashMap<K, Endpoint>, key: &K) -> Option<&'static Endpoint> {
    // SAFETY: an entry that is deleted while it is read may be reused for another pod. The reader then sees that pod's slot and
    // epoch with it, or a mixture that fails the epoch check of the next packet (the deletion bumps the epoch).
    unsafe { map.get(key) }
}

#[inline(always)]
fn uplink(ifindex: u32) -> Option<&'static Uplink> {
    // SAFETY: the daemon replaces values whole, and an ENI's never changes but once the ENI is gone.
    unsafe { UPLINKS.get(&ifindex) }
}

#[inline(always)]
fn epoch(slot: u32) -> u32 {
    // Slots come from the daemon and from hashing; one beyond the map has an epoch that no entry carries twice in a row.
    EPOCHS.get(slot).map_or(u32::MAX, |epoch| {
        // SAFETY: the map's value outlives the program run. Volatile: the daemon writes it meanwhile, and every read counts.
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
    ($family:ty, $frontends:ident, $filter:path, $in_ranges:expr) => {
        impl Services<$family> for Maps {
            #[inline(always)]
            fn may_serve(&self, address: &<$family as Family>::Addr) -> bool {
                FRONTEND_FILTER.get($filter(*address)).is_some_and(|count| *count != 0)
            }

            #[inline(always)]
            fn frontend(&self, key: &FrontendKey<<$family as Family>::Addr>) -> Option<&Frontend> {
                // SAFETY: the daemon replaces values whole. One that is deleted while it is read may be reused for another Service:
                // it was valid when the packet came, and what it names stays for a second.
                unsafe { $frontends.get(key) }
            }

            #[inline(always)]
            fn in_ranges(&self, service: u32, client: &<$family as Family>::Addr) -> bool {
                $in_ranges(service, client)
            }

            #[inline(always)]
            fn member(&self, index: u32) -> BackendRef {
                BACKEND_REFS.get(index).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn backend(&self, number: u32) -> Option<&Backend> {
                BACKENDS.get(number)
            }

            #[inline(always)]
            fn load(&self, number: u32) -> u64 {
                ACTIVE_CONNS.get(number).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn held(&self, key: &AffinityKey) -> Option<Affinity> {
                // SAFETY: copied at once; of a value that is reused meanwhile, the backend's life decides whether it counts.
                unsafe { AFFINITY.get(key) }.copied()
            }

            #[inline(always)]
            fn hold(&self, key: &AffinityKey, value: &Affinity) {
                // If the table does not take it, the next connection may go elsewhere.
                let _full = AFFINITY.insert(key, value, 0);
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
    ($family:ty, $exact:ident, $net:ident, $bits:literal) => {
        impl Policies<$family> for Maps {
            #[inline(always)]
            fn gate(&self) -> u32 {
                // SAFETY: the map's value outlives the program run. Volatile: read once, after the epochs.
                POLICY_CONTROL.get(0).map_or(0, |gate| unsafe { core::ptr::read_volatile(gate) })
            }

            #[inline(always)]
            fn endpoint(&self, slot: u32, phase: u32) -> Option<&PolicyEndpoint> {
                POLICY_ENDPOINTS.get(policy_index(slot, phase))
            }

            #[inline(always)]
            fn exact(&self, address: &<$family as Family>::Addr) -> Option<&Versioned> {
                // SAFETY: values are replaced whole, and the old ones stay for a grace period.
                unsafe { $exact.get(address) }
            }

            #[inline(always)]
            fn block(&self, address: &<$family as Family>::Addr) -> Option<&Versioned> {
                $net.get(lpm_trie::Key::new($bits, *address))
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

/// Counts a connection of a backend. Without a lock: the daemon sets the counts right when it sweeps.
#[inline(always)]
pub fn burden(backend: u32) {
    if let Some(load) = ACTIVE_CONNS.get_ptr_mut(backend) {
        // SAFETY: the value stays mapped; a lost addition is allowed for.
        unsafe { *load = (*load).wrapping_add(1) };
    }
}
