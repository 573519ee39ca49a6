//! rtnetlink requests: the operations of plans as messages, made by the builders of the crate `rtnetlink`.
//!
//! Its builders of rules and neighbours need a connection, which is not used here (ADR 9); their messages are made directly.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::RawFd;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkExtentMask, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use terway_core::ident::{Family, Mac};
use terway_core::route::{LINK_GROUP, LINK_GROUP_DELETE, Neighbour, Route, Rule, Scope, Selector, VethEnd};

use super::socket::{ErrorReply, Request};

/// Protocol number of our routes and rules. systemd-networkd removes those of every protocol but the kernel's from links and tables that it
/// considers its own (networkd.conf(5), ManageForeignRoutes and ManageForeignRoutingPolicyRules), so ours use the kernel's.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Kernel;

/// Queues of each end of a veth pair. The default is one for each possible CPU (drivers/net/veth.c, `veth_get_num_queues`), each with a
/// folder in sysfs: a quarter of the time that creating a pair takes with two CPUs, and most of it with many. Without XDP and without a
/// queueing discipline, packets neither wait in a queue nor take its lock.
const VETH_QUEUES: u32 = 1;

/// Requests one link by name, without its statistics.
pub(super) fn get_link(name: &str) -> Request {
    (Message::GetLink(without_statistics(LinkUnspec::new_with_name(name))), 0)
}

/// Requests one link by index, without its statistics.
pub(super) fn get_link_at(index: u32) -> Request {
    (Message::GetLink(without_statistics(LinkUnspec::new_with_index(index))), 0)
}

/// Requests all links, without their statistics.
pub(super) fn dump_links() -> Message {
    Message::GetLink(without_statistics(LinkMessageBuilder::<LinkUnspec>::new()))
}

fn without_statistics(link: LinkMessageBuilder<LinkUnspec>) -> LinkMessage {
    link.append_extra_attribute(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])).build()
}

/// Creates a veth pair whose peer is in the network namespace `pod_ns` from the start: moving it later costs an RCU grace period.
pub(super) fn add_veth(host: &VethEnd, pod: &VethEnd, mtu: u32, pod_ns: RawFd) -> Request {
    let peer = veth_end(LinkUnspec::new_with_name(&pod.name), pod, mtu).setns_by_fd(pod_ns).build();
    let link = veth_end(LinkVeth::new(&host.name, &pod.name), host, mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    (Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

fn veth_end<T>(link: LinkMessageBuilder<T>, end: &VethEnd, mtu: u32) -> LinkMessageBuilder<T> {
    link.address(end.mac.0.to_vec())
        .mtu(mtu)
        .link_group(LINK_GROUP)
        .append_extra_attribute(LinkAttribute::NumTxQueues(VETH_QUEUES))
        .append_extra_attribute(LinkAttribute::NumRxQueues(VETH_QUEUES))
}

pub(super) fn delete_link(index: u32) -> Request {
    (Message::DelLink(LinkUnspec::new_with_index(index).build()), 0)
}

/// Moves a link to the group that [`delete_marked_group`] deletes.
pub(super) fn mark_for_group_delete(index: u32) -> Request {
    set_link(LinkUnspec::new_with_index(index).link_group(LINK_GROUP_DELETE))
}

/// Deletes all marked links in one operation.
pub(super) fn delete_marked_group() -> Request {
    (Message::DelLink(LinkMessageBuilder::<LinkUnspec>::new().link_group(LINK_GROUP_DELETE).build()), 0)
}

fn set_link(link: LinkMessageBuilder<LinkUnspec>) -> Request {
    (Message::SetLink(link.build()), 0)
}

pub(super) fn set_alias(index: u32, alias: &str) -> Request {
    set_link(LinkUnspec::new_with_index(index).alias(alias))
}

pub(super) fn set_mac(index: u32, mac: Mac) -> Request {
    set_link(LinkUnspec::new_with_index(index).address(mac.0.to_vec()))
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Request {
    set_link(LinkUnspec::new_with_index(index).mtu(mtu))
}

/// Turns off the automatic IPv6 link-local address.
pub(super) fn no_addr_gen(index: u32) -> Request {
    let mode = vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)])];
    set_link(LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(mode)))
}

pub(super) fn set_up(index: u32, up: bool) -> Request {
    let link = LinkUnspec::new_with_index(index);
    set_link(if up { link.up() } else { link.down() })
}

fn address(index: u32, network: IpNetwork) -> AddressMessage {
    match network {
        IpNetwork::V4(v4) => {
            AddressMessageBuilder::<std::net::Ipv4Addr>::new().index(index).address(v4.ip(), v4.prefix()).build()
        }
        IpNetwork::V6(v6) => {
            AddressMessageBuilder::<std::net::Ipv6Addr>::new().index(index).address(v6.ip(), v6.prefix()).build()
        }
    }
}

pub(super) fn add_address(index: u32, network: IpNetwork) -> Request {
    let mut message = address(index, network);
    // Duplicate address detection would delay the address by a second; the cloud guarantees that it is unique.
    message.header.flags = AddressHeaderFlags::Nodad;
    (Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(super) fn delete_address(index: u32, network: IpNetwork) -> Request {
    (Message::DelAddress(address(index, network)), 0)
}

/// Requests all addresses.
pub(super) fn dump_addresses() -> Message {
    Message::GetAddress(AddressMessage::default())
}

/// The destination, gateway, interface and table of a route.
fn route(planned: &Route, index: u32) -> Result<RouteMessageBuilder, ErrorReply> {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(planned.table)
        .output_interface(index)
        .destination_prefix(planned.dst.network(), planned.dst.prefix())
        .map_err(invalid)?;
    match planned.via {
        Some(via) => route.gateway(via).map_err(invalid),
        None => Ok(route),
    }
}

/// The error of a plan that mixes address families, as the kernel reports it.
fn invalid(error: impl fmt::Display) -> ErrorReply {
    ErrorReply { errno: libc::EINVAL, extack: Some(error.to_string()) }
}

pub(super) fn add_route(planned: &Route, index: u32) -> Result<Request, ErrorReply> {
    let mut route = route(planned, index)?.protocol(PROTOCOL).scope(match planned.scope {
        Scope::Global => RouteScope::Universe,
        Scope::Link => RouteScope::Link,
    });
    if planned.onlink {
        route = route.onlink();
    }
    if let Some(source) = planned.prefsrc {
        route = route.pref_source(source).map_err(invalid)?;
    }
    Ok((Message::NewRoute(route.build()), NLM_F_CREATE | NLM_F_REPLACE))
}

pub(super) fn delete_route(planned: &Route, index: u32) -> Result<Request, ErrorReply> {
    // Matches any protocol, type and scope (include/uapi/linux/rtnetlink.h: RT_SCOPE_NOWHERE).
    let route =
        route(planned, index)?.protocol(RouteProtocol::Unspec).kind(RouteType::Unspec).scope(RouteScope::NoWhere);
    Ok((Message::DelRoute(route.build()), 0))
}

/// Requests the route that a packet to this address takes.
pub(super) fn get_route(address: IpAddr) -> Result<Request, ErrorReply> {
    // With strict checking the kernel refuses other values in the header.
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(0)
        .protocol(RouteProtocol::Unspec)
        .kind(RouteType::Unspec)
        .destination_prefix(address, IpNetwork::from(address).prefix())
        .map_err(invalid)?;
    Ok((Message::GetRoute(route.build()), 0))
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The priority and selector of a rule.
fn rule(planned: &Rule) -> RuleMessage {
    let network = planned.selector.net();
    let mut message = RuleMessage::default();
    message.header.family = address_family(planned.family());
    message.attributes = vec![RuleAttribute::Priority(planned.priority)];
    match planned.selector {
        Selector::To(_) => {
            message.header.dst_len = network.prefix();
            message.attributes.push(RuleAttribute::Destination(network.ip()));
        }
        Selector::From(_) => {
            message.header.src_len = network.prefix();
            message.attributes.push(RuleAttribute::Source(network.ip()));
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
    message.header.family = address_family(Family::of(planned.address));
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
