//! Reads the state of one network namespace by netlink dumps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use terway_core::route::KernelState;

use super::decode::NamedLink;
use super::socket::{NetlinkSocket, route_message};
use super::{NetError, apply, decode, messages};

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// Reads links, addresses, routes, rules and neighbours, and the listed sysctls. The calling thread must be in the socket's namespace.
pub(super) fn read_state<'a>(
    netlink: &mut NetlinkSocket,
    sysctls: impl IntoIterator<Item = &'a str>,
) -> Result<KernelState, NetError> {
    let mut state = KernelState::default();
    let mut names: BTreeMap<u32, String> = BTreeMap::new();
    for NamedLink { name, link, .. } in links(netlink)? {
        names.insert(link.index, name.clone());
        state.links.insert(name, link);
    }
    // Entries of a link that appeared or vanished between two dumps are skipped.
    for (index, address) in addresses(netlink)? {
        if let Some(name) = names.get(&index) {
            state.addresses.insert((name.clone(), address));
        }
    }
    for family in FAMILIES {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        for reply in netlink.dump("list routes", Message::GetRoute(message))? {
            if let Some(Message::NewRoute(message)) = route_message(&reply)
                && let Some((index, mut route)) = decode::route(&message)
                && let Some(name) = names.get(&index)
            {
                route.dev.clone_from(name);
                state.routes.insert(route);
            }
        }
        let mut message = RuleMessage::default();
        message.header.family = family;
        for reply in netlink.dump("list rules", Message::GetRule(message))? {
            if let Some(Message::NewRule(message)) = route_message(&reply) {
                state.rules.extend(decode::rule(&message));
            }
        }
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        for reply in netlink.dump("list neighbours", Message::GetNeighbour(message))? {
            if let Some(Message::NewNeighbour(message)) = route_message(&reply)
                && let Some((index, mut neighbour)) = decode::neighbour(&message)
                && let Some(name) = names.get(&index)
            {
                neighbour.dev.clone_from(name);
                state.neighbours.insert(neighbour);
            }
        }
    }
    for path in sysctls {
        if let Ok(value) = apply::read_sysctl(path) {
            state.sysctls.insert(path.to_owned(), value);
        }
    }
    Ok(state)
}

pub(super) fn links(netlink: &mut NetlinkSocket) -> Result<Vec<NamedLink>, NetError> {
    let replies = netlink.dump("list links", messages::dump_links())?;
    Ok(replies.iter().filter_map(|reply| decode::link(reply)).collect())
}

pub(super) fn addresses(netlink: &mut NetlinkSocket) -> Result<Vec<(u32, IpNetwork)>, NetError> {
    let replies = netlink.dump("list addresses", messages::dump_addresses())?;
    Ok(replies
        .iter()
        .filter_map(|reply| match route_message(reply) {
            Some(Message::NewAddress(message)) => decode::address(&message),
            _ => None,
        })
        .collect())
}

/// Whether an interface has a link-local address for neighbour solicitations (`ndisc_send_ns` uses no tentative one).
pub(super) fn has_usable_link_local(netlink: &mut NetlinkSocket, index: u32) -> Result<bool, NetError> {
    let replies = netlink.dump("list addresses", messages::dump_addresses())?;
    Ok(replies.iter().any(|reply| match route_message(reply) {
        Some(Message::NewAddress(message)) if message.header.index == index => {
            let is_assigned = !message.header.flags.contains(AddressHeaderFlags::Tentative);
            let local = |net: IpNetwork| matches!(net.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local());
            is_assigned && decode::address(&message).is_some_and(|(_, net)| local(net))
        }
        _ => false,
    }))
}

/// The dummy link on which kube-proxy's IPVS mode puts every ClusterIP (pkg/proxy/ipvs/proxier.go, `defaultDummyDevice`). It outlives kube-proxy.
const IPVS_LINK: &str = "kube-ipvs0";

/// Whether the addresses of a link are virtual addresses of Services, not the node's own.
pub(super) fn holds_service_addresses(found: &NamedLink) -> bool {
    found.name == IPVS_LINK
}

/// The node's own addresses that can be reached from elsewhere, sorted. `service_links` are the links that
/// [`holds_service_addresses`].
pub(super) fn node_addresses<'a>(
    addresses: impl IntoIterator<Item = &'a (u32, IpNetwork)>,
    service_links: &BTreeSet<u32>,
) -> Vec<IpNetwork> {
    let own = addresses.into_iter().filter(|(index, net)| !service_links.contains(index) && reachable(net.ip()));
    let mut nets: Vec<_> = own.map(|(_, net)| *net).collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}

/// Whether an address can be reached from elsewhere: neither loopback nor IPv6 link-local. (IPv4 link-local addresses count: node-local DNS
/// caches use them.)
pub(super) fn reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_unspecified(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unspecified() && !address.is_unicast_link_local(),
    }
}
