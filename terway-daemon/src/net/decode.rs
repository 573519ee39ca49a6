//! From rtnetlink messages to the types of `terway_core::route`.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use terway_core::ident::Mac;
use terway_core::route::{Link, RULE_FROM_POD, RULE_TO_POD, Rule, Scope, Selector, TABLE_BASE, TABLE_MAIN};

use super::encode::PROTOCOL;

/// A link with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamedLink {
    pub(super) name: String,
    pub(super) link: Link,
    pub(super) loopback: bool,
}

pub(super) fn link(message: &LinkMessage) -> NamedLink {
    let mut name = String::new();
    let mut link = Link {
        index: message.header.index,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        group: 0,
        alias: None,
        kind: None,
        peer: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    NamedLink { name, link, loopback: message.header.flags.contains(LinkFlags::Loopback) }
}

/// The link that an answer speaks of.
pub(super) fn link_of(answer: Option<Message>) -> Option<NamedLink> {
    match answer {
        Some(Message::NewLink(message)) => Some(link(&message)),
        _ => None,
    }
}

/// An address with the index of its interface. The local end, where the two ends of a point-to-point link differ.
pub(super) fn address(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(other)?, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// A route as plans have it, with `dev` still empty and the interface's index beside it. `None` for everything that a plan cannot say, and for
/// routes of others in the tables from 1000 on.
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
        dst: IpNet::new(dst, header.destination_prefix_length).ok()?,
        via,
        dev: String::new(),
        table,
        onlink: header.flags.contains(RouteFlags::Onlink),
        scope: if header.scope == RouteScope::Link { Scope::Link } else { Scope::Global },
        prefsrc,
    };
    Some((oif?, route))
}

/// A rule of exactly the shape that plans make. Anything else at the same priorities belongs to somebody else.
pub(super) fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    if header.action != RuleAction::ToTable || header.tos != 0 || header.flags.contains(RuleFlags::Invert) {
        return None;
    }
    let (mut source, mut destination, mut priority, mut table, mut protocol) =
        (None, None, 0, u32::from(header.table), None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = Some(IpNet::new(*address, header.src_len).ok()?),
            RuleAttribute::Destination(address) => destination = Some(IpNet::new(*address, header.dst_len).ok()?),
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Protocol(number) => protocol = Some(*number),
            // The kernel always says this one; all ones is "no".
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

/// A permanent neighbour entry, with the index of its interface; its `dev` is still empty.
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
