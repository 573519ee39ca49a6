//! Why a packet was dropped: one enum for counters, events, metrics and the command line.

use crate::{COUNTERS, DROP_BASE};

macro_rules! drops {
    ($($variant:ident = $number:literal, $name:literal, $text:literal;)*) => {
        /// Why a packet was dropped. Numbers are stable: they are never changed nor reused.
        #[repr(u16)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Drop { $(#[doc = $text] $variant = $number,)* }

        impl Drop {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name used in metrics and by the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The reason with this number.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }

            /// Its index in the counter map.
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
    Truncated = 7, "truncated", "The packet ends within its headers.";
    BadHeader = 8, "bad_header", "The IP header contradicts itself.";
    HeaderChain = 9, "header_chain", "The IP options or extension headers are too many.";
    SourceRoute = 10, "source_route", "The packet asks to be source-routed.";
    UnknownFragment = 11, "unknown_fragment", "A fragment came without, or before, the first one of its packet.";
    Multicast = 12, "multicast", "The destination is multicast or broadcast, which the VPC does not carry.";
    LinkLocal = 13, "link_local", "A link-local address was used for more than neighbour discovery.";
    BadDestination = 14, "bad_destination", "The destination address is unspecified, loopback or reserved.";
    SpoofedArp = 15, "spoofed_arp", "The ARP message names an address that is not the pod's own.";
    SpoofedNeighbour = 16, "spoofed_neighbour", "The neighbour discovery message names an address that is not the pod's own.";
    WrongEni = 17, "wrong_eni", "The packet crosses an ENI that does not own the pod's address.";
    NoGateway = 18, "no_gateway", "The pod's ENI has no gateway of the packet's address family.";
    NoBackend = 19, "no_backend", "The Service has no backend for this client, and the packet cannot be answered.";
    NoPort = 20, "no_port", "No source port is left by which the Service's backend could tell this connection from others.";
    Unserved = 21, "unserved", "The packet is for a Service, and of a shape or protocol that cannot be translated.";
    PolicyEgress = 24, "policy_egress", "A network policy forbids the sending pod this connection.";
    PolicyIngress = 25, "policy_ingress", "A network policy forbids the receiving pod this connection.";
    SourceRange = 28, "source_range", "The client is in none of the source ranges of the Service.";
    NoUplink = 29, "no_uplink", "The interface has no gateway, or no address of the node, of the packet's address family.";
    HopLimit = 30, "hop_limit", "The time to live of a packet for a Service ends at this node.";
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_names_and_texts_are_sound() {
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
