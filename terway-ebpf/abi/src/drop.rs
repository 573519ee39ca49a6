//! Drop reasons: one enum for counters, events, metrics and the command line.

use crate::{COUNTERS, DROP_BASE};

macro_rules! drops {
    ($($variant:ident = $number:literal, $name:literal, $text:literal;)*) => {
        /// The reason of a dropped packet. Numbers are stable: they are never changed nor reused.
        #[repr(u16)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Drop { $(#[doc = $text] $variant = $number,)* }

        impl Drop {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in metrics and on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The reason as one sentence, for operators.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The drop reason of this number.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }

            /// The index of its counter in the counter map.
            #[must_use]
            pub const fn counter(self) -> u32 {
                DROP_BASE + self as u32
            }
        }

        $(const _: () = assert!($number > 0 && DROP_BASE + $number < COUNTERS);)*
    };
}

drops! {
    SpoofedSource = 1, "spoofed_source", "The source address is not one that the interface may send from.";
    SpoofedMac = 2, "spoofed_mac", "The source MAC address is not the pod's own.";
    NotForGateway = 3, "not_for_gateway", "The destination MAC address is not the pod's gateway.";
    UnknownEndpoint = 4, "unknown_endpoint", "The interface belongs to no pod that the datapath knows.";
    UnknownEthertype = 5, "unknown_ethertype", "The frame is neither IPv4 nor IPv6 nor ARP.";
    VlanTagged = 6, "vlan_tagged", "The frame carries a VLAN tag, which pods may not set.";
    Truncated = 7, "truncated", "The packet ends inside its headers.";
    BadHeader = 8, "bad_header", "The IP header is malformed.";
    HeaderChain = 9, "header_chain", "There are too many IP options or extension headers.";
    SourceRoute = 10, "source_route", "The packet carries a source route.";
    UnknownFragment = 11, "unknown_fragment", "A fragment arrived without, or before, the first fragment of its packet.";
    Multicast = 12, "multicast", "The destination is multicast or broadcast, which the VPC does not carry.";
    LinkLocal = 13, "link_local", "A link-local address is used outside neighbour discovery.";
    BadDestination = 14, "bad_destination", "The destination address is unspecified, loopback or reserved.";
    SpoofedArp = 15, "spoofed_arp", "The sender of the ARP message is not the pod's own address.";
    SpoofedNeighbour = 16, "spoofed_neighbour", "The neighbour discovery message names an address that is not the pod's own.";
    WrongEni = 17, "wrong_eni", "The packet crosses an ENI that does not own the pod's address.";
    NoGateway = 18, "no_gateway", "The pod's ENI has no gateway of the packet's address family.";
    NoBackend = 19, "no_backend", "The Service has no backend for this client, and the packet cannot be rejected with a reply.";
    SnatPortsExhausted = 20, "snat_ports_exhausted", "Every source port that was tried is taken: the reply tuple would collide with another connection's.";
    NotTranslatable = 21, "not_translatable", "The packet belongs to a Service, and its protocol or shape cannot be translated (NAT).";
    PolicyEgress = 24, "policy_egress", "A network policy denies the sending pod this connection (egress).";
    PolicyIngress = 25, "policy_ingress", "A network policy denies the receiving pod this connection (ingress).";
    SourceRange = 28, "source_range", "The client is in none of the Service's loadBalancerSourceRanges.";
    NoUplink = 29, "no_uplink", "The interface has no gateway, or no address of the node, of the packet's address family.";
    HopLimit = 30, "hop_limit", "The TTL or hop limit of a packet for a Service expires at this node.";
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn drop_numbers_names_and_texts_are_unique_and_complete() {
        let names: BTreeSet<_> = Drop::ALL.iter().map(|d| d.name()).collect();
        let numbers: BTreeSet<_> = Drop::ALL.iter().map(|d| *d as u16).collect();
        assert_eq!((names.len(), numbers.len()), (Drop::ALL.len(), Drop::ALL.len()));
        for drop in Drop::ALL {
            assert_eq!(Drop::from_number(*drop as u16), Some(*drop));
            assert!(drop.text().ends_with('.'), "{}", drop.name());
        }
        assert_eq!(Drop::from_number(0), None);
    }
}
