//! Every type and name that crosses the border between the eBPF programs and user space, and no logic.
//!
//! Conventions, everywhere in this crate:
//! * All structs are `repr(C)`, hold no implicit padding, and have their sizes and offsets asserted at compile time.
//! * Addresses and ports stand in memory as they stand in the packet (network byte order). An IPv4 address is the `u32` that a
//!   native load of its four bytes gives, an IPv6 address is four such words; a port pair is one word, source port first.
//! * Interface indices, slots, epochs and counters are native integers.
//! * Times are the low 32 bits of the kernel's jiffies; see [`jiffies_at`].
//!
//! Any change of a layout, of a map's kind or name, or of the meaning of a number raises [`ABI_VERSION`].

#![no_std]

mod counter;
mod drop;
mod endpoint;
mod event;
mod flow;
mod policy;
mod service;
mod uplink;

pub use counter::{COUNTERS, Counter, DROP_BASE, Kind};
pub use drop::Drop;
pub use endpoint::{
    Endpoint, MAX_ENDPOINTS, MacPair, NO_SLOT, POLICY_EPOCH, SLOTS, bucket_v4, bucket_v6, is_between, next_epoch,
    next_policy_epoch, same_way,
};
pub use event::{Budget, FlowEvent, Program};
pub use flow::{
    Action, Flow, FlowKey, FlowKeyV4, FlowKeyV6, FlowV4, FlowV6, FragmentKey, FragmentKeyV4, FragmentKeyV6,
    FragmentValue, HOOK_IN, HOOK_TO_POD, HOOK_TO_VPC, MOVED, Nexthop, Side, flow_flags,
};
pub use policy::{
    DECISION_ALLOW, GATE_ENFORCE, GATE_PHASE, GATE_SAMPLE, IDENTITY_NATURE, IDENTITY_NODE, IDENTITY_POD, IDENTITY_V6,
    PeerKey, Phases, PolicyCounter, PolicyEndpoint, PolicySide, PortKey, TARGET_DECISION, default_index, policy_index,
    policy_reason,
};
pub use service::{
    Affinity, AffinityKey, Backend, FILTER, Frontend, FrontendKey, FrontendKeyV4, FrontendKeyV6, Member, NO_BACKEND,
    Run, SCOPE_ADDRESS, SCOPE_NODE, SocketKey, SocketValue, SourceRangeV4, SourceRangeV6, TO_BACKEND, TO_FRONTEND,
    backend_flags, filter_v4, filter_v6, frontend_class, frontend_flags,
};
pub use uplink::{MAX_UPLINKS, Uplink};

/// The version of everything in this crate. Pins of different versions never meet: they live in different folders.
pub const ABI_VERSION: u32 = 2;

/// The folder under the pin root that holds this version's maps and links.
pub const PIN_DIR: &str = "v2";

/// The packet mark (`skb->mark`) by which `from_pod` tells `to_vpc` that source and ENI have been checked.
///
/// A pod cannot forge it: crossing a veth into another network namespace clears the mark (`skb_scrub_packet`, net/core/skbuff.c).
/// The value is "TW" and a serial number; it keeps clear of the bits that kube-proxy (0x4000, 0x8000) and symmetric routing (0x10) use.
pub const MARK_CHECKED: u32 = 0x5457_0001;

/// Names of maps, programs and globals. A map's pin has the map's name.
pub mod names {
    /// `HASH`: host interface index → [`crate::Endpoint`]. Written by the daemon.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// `HASH`: IPv4 address → [`crate::Endpoint`]. Written by the daemon.
    pub const OWNERS_V4: &str = "OWNERS_V4";
    /// `HASH`: IPv6 address → [`crate::Endpoint`]. Written by the daemon.
    pub const OWNERS_V6: &str = "OWNERS_V6";
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
    /// `ARRAY` of [`crate::FILTER`]: bucket → how many frontend entries have an address in it (`u32`). Written by the daemon.
    pub const FILTERS: &str = "FILTERS";
    /// `ARRAY`: index → [`crate::Member`]. Written by the daemon.
    pub const MEMBERS: &str = "MEMBERS";
    /// `ARRAY`: index → [`crate::Backend`]. Written by the daemon.
    pub const BACKENDS: &str = "BACKENDS";
    /// `ARRAY`: index of a backend → its open connections (`u64`). Written by the programs, and set right by the daemon.
    pub const LOADS: &str = "LOADS";
    /// `LRU_HASH`: [`crate::AffinityKey`] → [`crate::Affinity`]. Written by the programs.
    pub const AFFINITY: &str = "AFFINITY";
    /// `LPM_TRIE`: [`crate::SourceRangeV4`] → `u32`, which is 1. Written by the daemon.
    pub const RANGES_V4: &str = "RANGES_V4";
    /// `LPM_TRIE`: [`crate::SourceRangeV6`] → `u32`, which is 1. Written by the daemon.
    pub const RANGES_V6: &str = "RANGES_V6";
    /// `LRU_HASH`: [`crate::SocketKey`] → [`crate::SocketValue`]. Written by the programs.
    pub const SOCKETS: &str = "SOCKETS";
    /// `ARRAY` of one `u32`: bits [`crate::GATE_PHASE`] and [`crate::GATE_ENFORCE`], and from [`crate::GATE_SAMPLE`] on. Written by the daemon.
    pub const POLICY_GATE: &str = "POLICY_GATE";
    /// `ARRAY`: [`crate::policy_index`] → [`crate::PolicyEndpoint`]. Written by the daemon.
    pub const POLICY_ENDPOINTS: &str = "POLICY_ENDPOINTS";
    /// `HASH`: [`crate::PeerKey`] → target ([`crate::Phases`]). Written by the daemon.
    pub const POLICY_PEERS: &str = "POLICY_PEERS";
    /// `LPM_TRIE`: [`crate::PortKey`] → decision (`u32`). Written by the daemon.
    pub const POLICY_PORTS: &str = "POLICY_PORTS";
    /// `PERCPU_HASH`: number of a reason → [`crate::PolicyCounter`]. Made by the daemon, counted up by the programs.
    pub const POLICY_COUNTERS: &str = "POLICY_COUNTERS";
    /// `HASH`: IPv4 address → identity ([`crate::Phases`]). Written by the daemon.
    pub const IPCACHE_V4: &str = "IPCACHE_V4";
    /// `HASH`: IPv6 address → identity ([`crate::Phases`]). Written by the daemon.
    pub const IPCACHE_V6: &str = "IPCACHE_V6";
    /// `LPM_TRIE`: IPv4 block → identity ([`crate::Phases`]). Written by the daemon.
    pub const IPCACHE_NET_V4: &str = "IPCACHE_NET_V4";
    /// `LPM_TRIE`: IPv6 block → identity ([`crate::Phases`]). Written by the daemon.
    pub const IPCACHE_NET_V6: &str = "IPCACHE_NET_V6";
    /// `HASH`: interface index of an ENI → [`crate::Uplink`]. Written by the daemon.
    pub const UPLINKS: &str = "UPLINKS";
    /// `PERCPU_ARRAY`: [`crate::Kind`] and [`crate::Drop`] → [`crate::Counter`]. Written by the programs.
    pub const COUNTERS: &str = "COUNTERS";
    /// `PERCPU_ARRAY` of one [`crate::Budget`]: how many events this CPU may still report. Written by the programs.
    pub const BUDGET: &str = "BUDGET";
    /// `RINGBUF` of [`crate::FlowEvent`]. Written by the programs.
    pub const EVENTS: &str = "EVENTS";

    /// Every map, in the order above.
    pub const MAPS: [&str; 33] = [
        ENDPOINTS,
        OWNERS_V4,
        OWNERS_V6,
        EPOCHS,
        HOST_V4,
        HOST_V6,
        FLOWS_V4,
        FLOWS_V6,
        FRAGMENTS_V4,
        FRAGMENTS_V6,
        FRONTENDS_V4,
        FRONTENDS_V6,
        FILTERS,
        MEMBERS,
        BACKENDS,
        LOADS,
        AFFINITY,
        RANGES_V4,
        RANGES_V6,
        SOCKETS,
        POLICY_GATE,
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
        BUDGET,
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

    /// The programs on the sockets of a cgroup; each has the name of its attach type. In the order in which they are attached: what
    /// translates back comes before what translates.
    pub const SOCKET_PROGRAMS: [&str; 8] =
        ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "connect4", "connect6", "sendmsg4", "sendmsg6"];

    /// The programs that keep the node's own processes off the ports of Services, named likewise.
    pub const BIND_PROGRAMS: [&str; 2] = ["bind4", "bind6"];

    /// Global `u32`: jiffies per second of the running kernel.
    pub const HZ: &str = "HZ";
    /// Global `u32`: events that one CPU may report per second.
    pub const EVENTS_PER_SECOND: &str = "EVENTS_PER_SECOND";
    /// Global `u32`: 1 reports every first packet through `bpf_trace_printk`; 0 folds the code away.
    pub const DEBUG: &str = "DEBUG";
    /// Global `u64`: the cookie of the network namespace that is the node's own; 0 for the first one of the machine.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// Global `u32`: 1 if programs on sockets can say with which error a system call fails (Linux 6.1), 0 folds the code away.
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
