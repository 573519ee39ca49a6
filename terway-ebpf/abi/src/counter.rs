//! Per-CPU packet counters: one per path through the programs and one per drop reason.

use crate::pod;

/// One per-CPU counter of packets and bytes. A packet is one `skb`: with segmentation offload it may be many segments on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes, Ethernet header included (`skb->len` at the hook).
    pub bytes: u64,
}

pod!(Counter: 16);

macro_rules! path_counters {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Counters of forwarding paths and of flow-table events. The number is the index in the counter map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum PathCounter { $($(#[$doc])* $variant = $number,)* }

        impl PathCounter {
            /// Every counter, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in metrics and on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        $(const _: () = assert!($number < DROP_BASE);)*
    };
}

path_counters! {
    /// Packets from a pod to another pod of this node.
    PodToPod = 0, "pod_to_pod";
    /// Packets from a pod to the VPC through the pod's ENI.
    PodToVpc = 1, "pod_to_vpc";
    /// Packets from a pod to the host stack.
    PodToHost = 2, "pod_to_host";
    /// Packets from the VPC to a pod.
    VpcToPod = 3, "vpc_to_pod";
    /// Packets from the VPC to the host stack: the destination is no pod of this node.
    VpcToHost = 4, "vpc_to_host";
    /// Packets from the host stack to a pod.
    HostToPod = 5, "host_to_pod";
    /// Packets from the host stack to the VPC. Packets that `from_pod` has redirected are counted there, not here.
    HostToVpc = 6, "host_to_vpc";
    /// ARP and neighbour discovery between a pod and the host stack, which answers for the pod's gateway.
    Neighbour = 7, "neighbour";
    /// Packets whose TTL or hop limit expires here; the host stack sends the ICMP error.
    TtlExpired = 8, "ttl_expired";
    /// Packets rejected with a TCP reset or an ICMP error: the address is a Service's, and the port has no backend.
    Rejected = 9, "rejected";
    /// Packets from the VPC back to the VPC: between an external client and a backend on another node.
    VpcToVpc = 10, "vpc_to_vpc";
    /// Flow entries created (an event, not a path).
    FlowNew = 16, "flow_new";
    /// Flow entries found with an outdated epoch, and decided or checked anew.
    FlowStale = 17, "flow_stale";
    /// Flow entries that the kernel did not insert; the packet was forwarded all the same.
    FlowInsertFailed = 18, "flow_insert_failed";
    /// Drop events that were not reported: the budget was spent, or the ring buffer was full.
    EventLost = 19, "event_lost";
    /// Connections whose source port was remapped because the reply tuple collided with another connection's.
    PortRemapped = 20, "port_remapped";
}

/// Index of the first drop counter: the counter of a [`crate::Drop`] is at `DROP_BASE` plus its number.
pub const DROP_BASE: u32 = 32;

/// Entries of the counter map.
pub const COUNTERS: u32 = 96;
