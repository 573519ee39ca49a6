//! Converts rtnetlink messages to the types of `terway_core::route`.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use terway_core::ident::Mac;
use terway_core::route::{Link, RULE_FROM_POD, RULE_TO_POD, Rule, Scope, Selector, TABLE_BASE, TABLE_MAIN};

use super::messages::PROTOCOL;
use super::socket::{attributes, route_message, text};

/// Length of `struct nlmsghdr`.
const NLMSGHDR: usize = 16;
/// Length of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;

/// `IF_OPER_UP` (include/uapi/linux/if.h).
const IF_OPER_UP: u8 = 6;

/// A link with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamedLink {
    pub(super) name: String,
    pub(super) link: Link,
    /// Whether it is the loopback interface.
    pub(super) is_loopback: bool,
    /// Whether `IFLA_OPERSTATE` is up: the kernel has processed the carrier event.
    pub(super) is_operational: bool,
}

/// Parses `RTM_NEWLINK`. By hand: a link has a kilobyte of attributes of which few matter here, and one attribute that a newer kernel encodes
/// differently must never hide a link.
pub(super) fn link(message: &[u8]) -> Option<NamedLink> {
    if u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?) != libc::RTM_NEWLINK {
        return None;
    }
    // struct ifinfomsg: family, pad, type (2 bytes), index (4), flags (4), change (4).
    let info = message.get(NLMSGHDR..NLMSGHDR + IFINFOMSG)?;
    let number = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(u32::from_ne_bytes);
    let flags = number(&info[8..12])?;
    let (mut name, mut is_operational) = (String::new(), false);
    let mut link = Link {
        index: number(&info[4..8])?,
        mac: None,
        mtu: 0,
        up: flags & libc::IFF_UP as u32 != 0,
        group: 0,
        alias: None,
        kind: None,
        peer: None,
    };
    for (kind, value) in attributes(message.get(NLMSGHDR + IFINFOMSG..)?) {
        match kind {
            libc::IFLA_IFNAME => name = text(value),
            libc::IFLA_ADDRESS => link.mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            libc::IFLA_MTU => link.mtu = number(value)?,
            libc::IFLA_GROUP => link.group = number(value)?,
            libc::IFLA_IFALIAS => link.alias = Some(text(value)),
            libc::IFLA_LINK => link.peer = number(value),
            libc::IFLA_OPERSTATE => is_operational = value == [IF_OPER_UP],
            libc::IFLA_LINKINFO => {
                link.kind =
                    attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND).map(|(_, kind)| text(kind));
            }
            _ => {}
        }
    }
    Some(NamedLink { name, link, is_loopback: flags & libc::IFF_LOOPBACK as u32 != 0, is_operational })
}

/// The index in an `RTM_DELLINK`.
pub(super) fn deleted_link(message: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let index = message.get(NLMSGHDR + 4..NLMSGHDR + 8)?;
    (kind == libc::RTM_DELLINK).then_some(u32::from_ne_bytes(index.try_into().ok()?))
}

/// The link in a reply.
pub(super) fn link_of(reply: Option<Vec<u8>>) -> Option<NamedLink> {
    link(reply.as_deref()?)
}

/// An address with its interface index; the local one where the two ends of a point-to-point link differ.
pub(super) fn address(message: &AddressMessage) -> Option<(u32, IpNetwork)> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    let net = IpNetwork::new(local.or(other)?, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// A route in the form of plans, with its interface index; `dev` is still empty. `None` for routes that a plan cannot express, and for foreign
/// routes in the tables from 1000 on.
pub(super) fn route(message: &RouteMessage) -> Option<(u32, terway_core::route::Route)> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut dst, mut via, mut oif, mut table, mut prefsrc) = (unspecified, None, None, u32::from(header.table), None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip(address)?,
            RouteAttribute::Gateway(address) => via = Some(ip(address)?),
            RouteAttribute::PrefSource(address) => prefsrc = ip(address),
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) => return None,
            _ => {}
        }
    }
    if table != TABLE_MAIN && (table < TABLE_BASE || header.protocol != PROTOCOL) {
        return None;
    }
    let route = terway_core::route::Route {
        dst: IpNetwork::new(dst, header.destination_prefix_length).ok()?,
        via,
        dev: String::new(),
        table,
        onlink: header.flags.contains(RouteFlags::Onlink),
        scope: if header.scope == RouteScope::Link { Scope::Link } else { Scope::Global },
        prefsrc,
    };
    Some((oif?, route))
}

/// Whether the reply to [`super::messages::get_route`] says that the address is local.
pub(super) fn is_local(reply: &[u8]) -> bool {
    match route_message(reply) {
        Some(Message::NewRoute(message)) => message.header.kind == RouteType::Local,
        _ => false,
    }
}

/// A rule of exactly the form that plans create. Anything else with the same priority is foreign.
pub(super) fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    if header.action != RuleAction::ToTable || header.tos != 0 || header.flags.contains(RuleFlags::Invert) {
        return None;
    }
    let (mut source, mut destination, mut priority, mut table, mut protocol) =
        (None, None, 0, u32::from(header.table), None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = Some(IpNetwork::new(*address, header.src_len).ok()?),
            RuleAttribute::Destination(address) => destination = Some(IpNetwork::new(*address, header.dst_len).ok()?),
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Protocol(number) => protocol = Some(*number),
            // The kernel always reports this attribute; all ones means unset.
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => return None,
        }
    }
    let selector = match (source, destination) {
        (Some(net), None) if priority == RULE_FROM_POD => Selector::From(net),
        (None, Some(net)) if priority == RULE_TO_POD => Selector::To(net),
        _ => return None,
    };
    (protocol == Some(PROTOCOL)).then_some(Rule { priority, selector, table })
}

/// A permanent neighbour entry with its interface index; `dev` is still empty.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(u32, terway_core::route::Neighbour)> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => address = Some(IpAddr::V4(*found)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => address = Some(IpAddr::V6(*found)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            _ => {}
        }
    }
    let neighbour = terway_core::route::Neighbour { address: address?, mac: mac?, dev: String::new() };
    Some((message.header.ifindex, neighbour))
}
