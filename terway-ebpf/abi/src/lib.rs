//! The ABI between the eBPF programs and user space: types, map names and numbers, without logic.
//!
//! Conventions, everywhere in this crate:
//! * All structs are `repr(C)`, hold no implicit padding, and have their sizes and offsets asserted at compile time.
//! * Addresses and ports are in network byte order ("as in the packet"). An IPv4 address is the `u32` that a native load of its four
//!   bytes gives, an IPv6 address is four such words; a port pair is one word, source port first.
//! * Interface indices, slots, epochs and counters are native integers.
//! * Times are the low 32 bits of the kernel's jiffies; see [`jiffies_at`].
//!
//! A change of a layout, of a map's type or name, or of the meaning of a number raises [`ABI_VERSION`].

#![no_std]

mod counter;
mod drop;
mod endpoint;
mod event;
mod flow;
mod policy;
mod service;
mod uplink;

pub use counter::{COUNTERS, Counter, DROP_BASE, PathCounter};
pub use drop::Drop;
pub use endpoint::{
    EPOCH_SLOTS, Endpoint, MAX_ENDPOINTS, MacPair, NO_SLOT, POLICY_EPOCH_MASK, is_epoch_between, next_policy_epoch,
    next_route_epoch, remote_slot_v4, remote_slot_v6, same_route_epoch,
};
pub use event::{EventBudget, FlowEvent, Program};
pub use flow::{
    Action, Flow, FlowDirection, FlowKey, FlowKeyV4, FlowKeyV6, FlowV4, FlowV6, FragmentKey, FragmentKeyV4,
    FragmentKeyV6, FragmentValue, HOOK_INGRESS, HOOK_TO_POD, HOOK_TO_VPC, Nexthop, PORT_REMAPPED, flow_flags,
};
pub use policy::{
    CONTROL_ENFORCE, CONTROL_SAMPLE_SHIFT, CONTROL_VERSION, IDENTITY_KIND, IDENTITY_NODE, IDENTITY_POD, IDENTITY_V6,
    PEER_VERDICT, PeerKey, PolicyCounter, PolicyDirection, PolicyEndpoint, PortKey, VERDICT_ALLOW, Versioned,
    default_index, policy_index, rule_id,
};
pub use service::{
    Affinity, AffinityKey, Backend, BackendRange, BackendRef, FRONTEND_FILTER_BUCKETS, Frontend, FrontendKey,
    FrontendKeyV4, FrontendKeyV6, NO_BACKEND, SCOPE_ADDRESS, SCOPE_NODE, SOCKET_DATAGRAM_BACKEND, SOCKET_REVERSE_NAT,
    SocketKey, SocketValue, SourceRangeV4, SourceRangeV6, backend_flags, frontend_class, frontend_filter_v4,
    frontend_filter_v6, frontend_flags,
};
pub use uplink::{MAX_UPLINKS, Uplink};

/// The version of this ABI. Each version pins its objects in a folder of its own.
pub const ABI_VERSION: u32 = 3;

/// The folder under the pin root for the maps and links of this ABI version.
pub const PIN_DIR: &str = "v3";

/// The packet mark (`skb->mark`) that `from_pod` sets for `to_vpc`: source address and ENI have been checked.
///
/// A pod cannot forge it: crossing a veth into another network namespace clears the mark (`skb_scrub_packet`, net/core/skbuff.c).
/// The value is "TW" and a serial number; it keeps clear of the bits that kube-proxy (0x4000, 0x8000) and symmetric routing (0x10) use.
pub const MARK_CHECKED: u32 = 0x5457_0001;

/// Names of maps, programs and globals. A map's pin has the map's name.
pub mod names {
    /// `HASH`: host interface index → [`crate::Endpoint`]. Written by the daemon.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// `HASH`: pod's IPv4 address → [`crate::Endpoint`]. Written by the daemon.
    pub const ENDPOINTS_V4: &str = "ENDPOINTS_V4";
    /// `HASH`: pod's IPv6 address → [`crate::Endpoint`]. Written by the daemon.
    pub const ENDPOINTS_V6: &str = "ENDPOINTS_V6";
    /// `ARRAY`: slot → epoch (`u32`). Written by the daemon.
    pub const EPOCHS: &str = "EPOCHS";
    /// `LPM_TRIE`: IPv4 prefixes (`struct bpf_lpm_trie_key`: length in bits, address) that the host stack serves → `u32`, which is 1. Written by the daemon.
    pub const HOST_V4: &str = "HOST_V4";
    /// `LPM_TRIE`: IPv6 prefixes that the host stack serves → `u32`, which is 1. Written by the daemon.
    pub const HOST_V6: &str = "HOST_V6";
    /// `LRU_HASH`: [`crate::FlowKeyV4`] → [`crate::FlowV4`]. Written by the programs.
    pub const FLOWS_V4: &str = "FLOWS_V4";
    /// `LRU_HASH`: [`crate::FlowKeyV6`] → [`crate::FlowV6`]. Written by the programs.
    pub const FLOWS_V6: &str = "FLOWS_V6";
    /// `LRU_HASH`: [`crate::FragmentKeyV4`] → [`crate::FragmentValue`]. Written by the programs.
    pub const FRAGMENTS_V4: &str = "FRAGMENTS_V4";
    /// `LRU_HASH`: [`crate::FragmentKeyV6`] → [`crate::FragmentValue`]. Written by the programs.
    pub const FRAGMENTS_V6: &str = "FRAGMENTS_V6";
    /// `HASH`: [`crate::FrontendKeyV4`] → [`crate::Frontend`]. Written by the daemon.
    pub const FRONTENDS_V4: &str = "FRONTENDS_V4";
    /// `HASH`: [`crate::FrontendKeyV6`] → [`crate::Frontend`]. Written by the daemon.
    pub const FRONTENDS_V6: &str = "FRONTENDS_V6";
    /// `ARRAY` of [`crate::FRONTEND_FILTER_BUCKETS`]: hash bucket → number of frontends with an address in it (`u32`). Written by the daemon.
    pub const FRONTEND_FILTER: &str = "FRONTEND_FILTER";
    /// `ARRAY`: index → [`crate::Member`]. Written by the daemon.
    pub const BACKEND_REFS: &str = "BACKEND_REFS";
    /// `ARRAY`: index → [`crate::Backend`]. Written by the daemon.
    pub const BACKENDS: &str = "BACKENDS";
    /// `ARRAY`: backend index → number of active connections (`u64`). Counted by the programs, corrected by the daemon.
    pub const ACTIVE_CONNS: &str = "ACTIVE_CONNS";
    /// `LRU_HASH`: [`crate::AffinityKey`] → [`crate::Affinity`]. Written by the programs.
    pub const AFFINITY: &str = "AFFINITY";
    /// `LPM_TRIE`: [`crate::SourceRangeV4`] → `u32`, which is 1. Written by the daemon.
    pub const SRC_RANGES_V4: &str = "SRC_RANGES_V4";
    /// `LPM_TRIE`: [`crate::SourceRangeV6`] → `u32`, which is 1. Written by the daemon.
    pub const SRC_RANGES_V6: &str = "SRC_RANGES_V6";
    /// `LRU_HASH`: [`crate::SocketKey`] → [`crate::SocketValue`]. Written by the programs.
    pub const SOCKET_NAT: &str = "SOCKET_NAT";
    /// `ARRAY` of one `u32`, the control word: [`crate::CONTROL_VERSION`], [`crate::CONTROL_ENFORCE`], and the sampling rate from
    /// [`crate::CONTROL_SAMPLE_SHIFT`] on. Written by the daemon.
    pub const POLICY_CONTROL: &str = "POLICY_CONTROL";
    /// `ARRAY`: [`crate::policy_index`] → [`crate::PolicyEndpoint`]. Written by the daemon.
    pub const POLICY_ENDPOINTS: &str = "POLICY_ENDPOINTS";
    /// `HASH`: [`crate::PeerKey`] → verdict or port table ([`crate::Versioned`]). Written by the daemon.
    pub const POLICY_PEERS: &str = "POLICY_PEERS";
    /// `LPM_TRIE`: [`crate::PortKey`] → verdict (`u32`). Written by the daemon.
    pub const POLICY_PORTS: &str = "POLICY_PORTS";
    /// `PERCPU_HASH`: rule id → [`crate::PolicyCounter`]. Created by the daemon, counted by the programs.
    pub const POLICY_COUNTERS: &str = "POLICY_COUNTERS";
    /// `HASH`: IPv4 address → identity ([`crate::Versioned`]). Written by the daemon.
    pub const IPCACHE_V4: &str = "IPCACHE_V4";
    /// `HASH`: IPv6 address → identity ([`crate::Versioned`]). Written by the daemon.
    pub const IPCACHE_V6: &str = "IPCACHE_V6";
    /// `LPM_TRIE`: IPv4 CIDR → identity ([`crate::Versioned`]). Written by the daemon.
    pub const IPCACHE_NET_V4: &str = "IPCACHE_NET_V4";
    /// `LPM_TRIE`: IPv6 CIDR → identity ([`crate::Versioned`]). Written by the daemon.
    pub const IPCACHE_NET_V6: &str = "IPCACHE_NET_V6";
    /// `HASH`: interface index of an ENI → [`crate::Uplink`]. Written by the daemon.
    pub const UPLINKS: &str = "UPLINKS";
    /// `PERCPU_ARRAY`: [`crate::Kind`] and [`crate::Drop`] → [`crate::Counter`]. Written by the programs.
    pub const COUNTERS: &str = "COUNTERS";
    /// `PERCPU_ARRAY` of one [`crate::EventBudget`]: rate limit of events. Written by the programs.
    pub const EVENT_BUDGET: &str = "EVENT_BUDGET";
    /// `RINGBUF` of [`crate::FlowEvent`]. Written by the programs.
    pub const EVENTS: &str = "EVENTS";

    /// Every map, in the order above.
    pub const MAPS: [&str; 33] = [
        ENDPOINTS,
        ENDPOINTS_V4,
        ENDPOINTS_V6,
        EPOCHS,
        HOST_V4,
        HOST_V6,
        FLOWS_V4,
        FLOWS_V6,
        FRAGMENTS_V4,
        FRAGMENTS_V6,
        FRONTENDS_V4,
        FRONTENDS_V6,
        FRONTEND_FILTER,
        BACKEND_REFS,
        BACKENDS,
        ACTIVE_CONNS,
        AFFINITY,
        SRC_RANGES_V4,
        SRC_RANGES_V6,
        SOCKET_NAT,
        POLICY_CONTROL,
        POLICY_ENDPOINTS,
        POLICY_PEERS,
        POLICY_PORTS,
        POLICY_COUNTERS,
        IPCACHE_V4,
        IPCACHE_V6,
        IPCACHE_NET_V4,
        IPCACHE_NET_V6,
        UPLINKS,
        COUNTERS,
        EVENT_BUDGET,
        EVENTS,
    ];

    /// The program on the ingress of the host end of a pod's veth: what the pod sends.
    pub const FROM_POD: &str = "from_pod";
    /// The program on the egress of the host end of a pod's veth: what the host stack sends to the pod.
    pub const TO_POD: &str = "to_pod";
    /// The program on the ingress of an ENI.
    pub const FROM_VPC: &str = "from_vpc";
    /// The program on the egress of an ENI.
    pub const TO_VPC: &str = "to_vpc";

    /// Every program, in the order above.
    pub const PROGRAMS: [&str; 4] = [FROM_POD, TO_POD, FROM_VPC, TO_VPC];

    /// The cgroup programs that translate socket addresses, named by attach type. In the order in which they are attached: reverse
    /// translation before translation.
    pub const SOCKET_PROGRAMS: [&str; 8] =
        ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "connect4", "connect6", "sendmsg4", "sendmsg6"];

    /// The cgroup programs that reserve NodePorts against `bind`, named by attach type.
    pub const BIND_PROGRAMS: [&str; 2] = ["bind4", "bind6"];

    /// Global `u32`: jiffies per second of the running kernel.
    pub const HZ: &str = "HZ";
    /// Global `u32`: events that one CPU may report per second.
    pub const EVENTS_PER_SECOND: &str = "EVENTS_PER_SECOND";
    /// Global `u32`: 1 writes the debug log of the slow path (aya-log); 0 folds the code away.
    pub const DEBUG: &str = "DEBUG";
    /// Global `u64`: the cookie of the host's network namespace; 0 for the initial namespace.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// Global `u32`: 1 if `bpf_set_retval` exists (Linux 6.1): a rejected system call gets its own errno. 0 folds the code away.
    pub const SETS_ERRNO: &str = "SETS_ERRNO";

    /// Every global, in the order above.
    pub const GLOBALS: [&str; 5] = [HZ, EVENTS_PER_SECOND, DEBUG, HOST_NETNS, SETS_ERRNO];
}

/// The low 32 bits of jiffies at `monotonic_ns` on `CLOCK_MONOTONIC`, for a kernel of `hz` jiffies per second.
///
/// Jiffies start five minutes before their 32-bit wrap (`INITIAL_JIFFIES`, include/linux/jiffies.h) and advance with
/// `CLOCK_MONOTONIC` (`tick_do_update_jiffies64`, kernel/time/tick-sched.c), so the daemon knows them without asking the kernel.
#[must_use]
pub const fn jiffies_at(monotonic_ns: u64, hz: u32) -> u32 {
    let ticks = (monotonic_ns as u128 * hz as u128 / 1_000_000_000) as u32;
    ticks.wrapping_sub(300_u32.wrapping_mul(hz))
}

/// Makes types `aya::Pod` and asserts what that promises: a fixed size and no hole between fields.
macro_rules! pod {
    ($($type:ty: $size:literal),* $(,)?) => { $(
        const _: () = assert!(size_of::<$type>() == $size);
        // SAFETY: the type is `repr(C)`, made of integers only, and the sizes of its fields add up to its size (asserted above and
        // by `no_holes` in the tests), so every byte of it is initialised and every bit pattern is a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )* };
}
pub(crate) use pod;
