//! From operations to rtnetlink requests.

use std::net::IpAddr;
use std::os::fd::RawFd;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use terway_core::ident::{Family, Mac};
use terway_core::route::{LINK_GROUP, LINK_GROUP_DELETE, Neighbour, Route, Rule, Scope, Selector, VethEnd};

use super::socket::Request;

/// The protocol number of our routes and rules. systemd-networkd removes those of everybody but the kernel from links and tables it thinks
/// are its own (networkd.conf(5), ManageForeignRoutes and ManageForeignRoutingPolicyRules), so ours go by the kernel's.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Kernel;

pub(super) const fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Asks for one link by name, without its statistics.
pub(super) fn get_link(name: &str) -> Request {
    let mut link = LinkMessage::default();
    link.attributes =
        vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    (Message::GetLink(link), 0)
}

/// Asks for one link by index, without its statistics.
pub(super) fn get_link_at(index: u32) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    (Message::GetLink(link), 0)
}

/// Creates a veth pair, with the other end born in the network namespace `pod_ns`: moving it there later would cost a grace period.
/// By default a veth gets a queue for each possible CPU (drivers/net/veth.c, `veth_get_num_queues`), each with a folder in sysfs: a
/// quarter of the time that making a pair takes with two CPUs, and most of it with many. Without XDP and without a queueing discipline
/// no packet waits in one or locks one.
const VETH_QUEUES: u32 = 1;

pub(super) fn add_veth(host: &VethEnd, pod: &VethEnd, mtu: u32, pod_ns: RawFd) -> Request {
    let end = |end: &VethEnd| {
        vec![
            LinkAttribute::IfName(end.name.clone()),
            LinkAttribute::Address(end.mac.0.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Group(LINK_GROUP),
            LinkAttribute::NumTxQueues(VETH_QUEUES),
            LinkAttribute::NumRxQueues(VETH_QUEUES),
        ]
    };
    let mut peer = LinkMessage::default();
    peer.attributes = end(pod);
    peer.attributes.push(LinkAttribute::NetNsFd(pod_ns));
    let mut link = LinkMessage::default();
    link.attributes = end(host);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    (Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn delete_link(index: u32) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    (Message::DelLink(link), 0)
}

/// Marks a link for [`delete_marked_group`].
pub(super) fn mark_for_group_delete(index: u32) -> Request {
    change_link(index, LinkAttribute::Group(LINK_GROUP_DELETE))
}

/// Deletes all marked links at once.
pub(super) fn delete_marked_group() -> Request {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::Group(LINK_GROUP_DELETE)];
    (Message::DelLink(link), 0)
}

fn change_link(index: u32, attribute: LinkAttribute) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![attribute];
    (Message::SetLink(link), 0)
}

pub(super) fn set_alias(index: u32, alias: &str) -> Request {
    change_link(index, LinkAttribute::IfAlias(alias.to_owned()))
}

pub(super) fn set_mac(index: u32, mac: Mac) -> Request {
    change_link(index, LinkAttribute::Address(mac.0.to_vec()))
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Request {
    change_link(index, LinkAttribute::Mtu(mtu))
}

pub(super) fn no_addr_gen(index: u32) -> Request {
    let mode = vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)];
    change_link(index, LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(mode)]))
}

pub(super) fn set_up(index: u32, up: bool) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up;
    if up {
        link.header.flags = LinkFlags::Up;
    }
    (Message::SetLink(link), 0)
}

fn address(index: u32, net: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.ip());
    message.header.prefix_len = net.prefix();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(net.ip()), AddressAttribute::Address(net.ip())];
    message
}

pub(super) fn add_address(index: u32, net: IpNetwork) -> Request {
    let mut message = address(index, net);
    // Duplicate detection would hold the address back for a second; the cloud has made sure of it.
    message.header.flags = AddressHeaderFlags::Nodad;
    (Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(super) fn delete_address(index: u32, net: IpNetwork) -> Request {
    (Message::DelAddress(address(index, net)), 0)
}

fn route(route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.ip());
    message.header.destination_prefix_length = route.dst.prefix();
    // Numbers above 255 stand in the attribute alone.
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes = vec![RouteAttribute::Table(route.table), RouteAttribute::Oif(index)];
    if route.dst.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(route.dst.network())));
    }
    if let Some(via) = route.via {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(via)));
    }
    message
}

pub(super) fn add_route(planned: &Route, index: u32) -> Request {
    let mut message = route(planned, index);
    message.header.protocol = PROTOCOL;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match planned.scope {
        Scope::Global => RouteScope::Universe,
        Scope::Link => RouteScope::Link,
    };
    if planned.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    if let Some(source) = planned.prefsrc {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    (Message::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(super) fn delete_route(planned: &Route, index: u32) -> Request {
    let mut message = route(planned, index);
    // "Whatever its scope" (include/uapi/linux/rtnetlink.h: RT_SCOPE_NOWHERE).
    message.header.scope = RouteScope::NoWhere;
    (Message::DelRoute(message), 0)
}

/// Asks how a packet to this address would go.
pub(super) fn get_route(address: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = IpNetwork::from(address).prefix();
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(address))];
    (Message::GetRoute(message), 0)
}

fn rule(rule: &Rule) -> RuleMessage {
    let net = rule.selector.net();
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family());
    message.attributes = vec![RuleAttribute::Priority(rule.priority)];
    match rule.selector {
        Selector::To(_) => {
            message.header.dst_len = net.prefix();
            message.attributes.push(RuleAttribute::Destination(net.ip()));
        }
        Selector::From(_) => {
            message.header.src_len = net.prefix();
            message.attributes.push(RuleAttribute::Source(net.ip()));
        }
    }
    message
}

pub(super) fn add_rule(planned: &Rule) -> Request {
    let mut message = rule(planned);
    message.header.action = RuleAction::ToTable;
    message.attributes.extend([RuleAttribute::Table(planned.table), RuleAttribute::Protocol(PROTOCOL)]);
    (Message::NewRule(message), NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn delete_rule(planned: &Rule) -> Request {
    let mut message = rule(planned);
    message.attributes.push(RuleAttribute::Table(planned.table));
    (Message::DelRule(message), 0)
}

/// Deletes a rule with this priority and selector, whatever its table.
pub(super) fn delete_conflicting_rule(planned: &Rule) -> Request {
    (Message::DelRule(rule(planned)), 0)
}

fn neighbour(planned: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(planned.address);
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(match planned.address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    })];
    message
}

pub(super) fn add_neighbour(planned: &Neighbour, index: u32) -> Request {
    let mut message = neighbour(planned, index);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(planned.mac.0.to_vec()));
    (Message::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(super) fn delete_neighbour(planned: &Neighbour, index: u32) -> Request {
    (Message::DelNeighbour(neighbour(planned, index)), 0)
}
