//! Counters: one per way a packet can take and one per drop reason.

use crate::pod;

/// One per-CPU counter. A packet is one `skb`: with segmentation offload that may be many segments on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes, Ethernet header included (`skb->len` at the hook).
    pub bytes: u64,
}

pod!(Counter: 16);

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Ways of a packet through the programs, and things that happen on the way. The number is the index in the counter map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind { $($(#[$doc])* $variant = $number,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name used in metrics and by the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        $(const _: () = assert!($number < DROP_BASE);)*
    };
}

kinds! {
    /// From a pod to another pod of this node.
    PodToPod = 0, "pod_to_pod";
    /// From a pod to the VPC by the pod's ENI.
    PodToVpc = 1, "pod_to_vpc";
    /// From a pod to the host stack.
    PodToHost = 2, "pod_to_host";
    /// From the VPC to a pod.
    VpcToPod = 3, "vpc_to_pod";
    /// From the VPC to the host stack: no pod of this node has the address.
    VpcToHost = 4, "vpc_to_host";
    /// From the host stack to a pod.
    HostToPod = 5, "host_to_pod";
    /// From the host stack to the VPC. Pods' packets that `from_pod` sent were counted there.
    HostToVpc = 6, "host_to_vpc";
    /// ARP and neighbour discovery between a pod and the host stack, which answers for the pod's gateway.
    Neighbour = 7, "neighbour";
    /// Handed to the host stack because its time to live ends here; the stack makes the ICMP error.
    TtlExpired = 8, "ttl_expired";
    /// Answered with a reset or an ICMP error: the address is a Service's, and nobody serves the port.
    Refused = 9, "refused";
    /// From the VPC back to the VPC: between a client outside and a backend of a Service on another node.
    VpcToVpc = 10, "vpc_to_vpc";
    /// Not counted as packets on their way: first packets that made a flow entry.
    FlowNew = 16, "flow_new";
    /// Flow entries that were met with an old epoch and decided anew.
    FlowStale = 17, "flow_stale";
    /// First packets whose flow entry the kernel would not take; the packet went its way.
    FlowFull = 18, "flow_full";
    /// Drops that were not reported: over the budget, or the ring buffer was full.
    EventLost = 19, "event_lost";
    /// Connections that got another source port, because the answers would have been taken for another's.
    PortChanged = 20, "port_changed";
}

/// The counter of a [`crate::Drop`] has the index `DROP_BASE` plus its number.
pub const DROP_BASE: u32 = 32;

/// Entries of the counter map.
pub const COUNTERS: u32 = 96;
