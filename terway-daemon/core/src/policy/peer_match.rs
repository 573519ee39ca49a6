//! Who rules mean: pods by namespace and labels, or a CIDR with exceptions.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::cidr::Cidr as _;
use crate::objects::{IpBlock, LabelSelector};

/// Namespaces of a peer or subject.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Namespaces {
    Own(Arc<str>),
    Selected(LabelSelector),
}

/// Pods by namespace and labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pods {
    pub(super) namespaces: Namespaces,
    pub(super) pods: LabelSelector,
}

/// Whom a rule means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Match {
    Pods(Pods),
    Block(IpBlock),
}

/// An IPv4-mapped IPv6 block stays what it is; bits behind the prefix are cut off, or equal blocks would differ.
pub(super) fn canonical(net: IpNetwork) -> IpNetwork {
    net.truncated()
}

/// Whether one block lies in another, both of one family.
pub(super) fn within(inner: IpNetwork, outer: IpNetwork) -> bool {
    outer.covers(&inner)
}

/// The block of one address.
pub(super) fn host(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}

/// Whether a block holds every address of `net`, given that `net` is the longest block in use that they are in.
pub(super) fn holds(block: &IpBlock, net: IpNetwork) -> bool {
    within(net, block.cidr) && !block.except.iter().any(|hole| within(net, *hole))
}
