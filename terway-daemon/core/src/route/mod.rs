//! What the kernel's tables must hold for a node, its ENIs and its pods, as data.
//!
//! A plan is a list of [`Step`]s: an operation and the network namespace it happens in. Plans are computed here and executed by
//! `terway_daemon::net`; what the kernel holds comes back as [`KernelState`], and [`diff`] tells in sentences where the two part.
//! The numbers (rule priorities, table base, link gateways, the host end's name) are those of the Go implementation, so that the
//! tools and habits of its users keep working.

mod diff;
mod eni;
mod op;
mod pod;
mod state;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sha1::{Digest, Sha1};

use crate::ident::{AttachmentKey, Family, PodRef};

pub use diff::{Difference, KnownResources, ObservedState, Orphan, diff, orphans};
pub use eni::{EniInputs, EniPlan, NodeInputs, NodePlan};
pub use op::{Neighbour, NetOp, Route, Rule, Scope, Selector, Step, StepNetns, VethEnd};
pub use pod::{PodInputs, PodPlan, Teardown};
pub use state::{KernelState, Link};

/// Priority of the rules `to <pod> lookup main`.
pub const RULE_TO_POD: u32 = 512;
/// Priority of the rules `from <pod> lookup <table of its ENI>`.
pub const RULE_FROM_POD: u32 = 2048;
/// Table of an ENI = this + its interface index.
pub const TABLE_BASE: u32 = 1000;
/// The kernel's main table (`RT_TABLE_MAIN`).
pub const TABLE_MAIN: u32 = 254;
/// The pod's IPv4 gateway. No interface has it: the pod holds a permanent neighbour entry with the host end's MAC.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The pod's IPv6 gateway, likewise.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Interface group (`IFLA_GROUP`, shown by `ip link`) of every link that we make: "trwy" in ASCII.
///
/// The group is set by the very request that creates the link, so that not even a SIGKILL leaves a link whose maker is unknown.
/// The alias, which names the attachment, can only follow in a second request.
pub const LINK_GROUP: u32 = 0x7472_7779;
/// Interface group of our links that are about to be deleted: the kernel deletes a group in one go, and waits once instead of for each.
pub const LINK_GROUP_DELETE: u32 = LINK_GROUP + 1;
/// How the alias of a host end begins; the attachment's key follows.
pub const ALIAS_PREFIX: &str = "terway:";
/// Longest `IFLA_IFALIAS` in bytes (`IFALIASZ` is 256 with its terminating zero, include/uapi/linux/if.h).
const ALIAS_MAX: usize = 255;

/// The gateway of the pod's link in this family.
#[must_use]
pub const fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(GATEWAY_V4),
        Family::V6 => IpAddr::V6(GATEWAY_V6),
    }
}

/// The routing table of the ENI with this interface index.
#[must_use]
pub const fn eni_table(ifindex: u32) -> u32 {
    TABLE_BASE + ifindex
}

/// Name of the host end of a pod's veth: `cali` and the first eleven hexadecimal digits of SHA-1 over `namespace.name`, followed by the
/// interface's name unless that is `eth0`.
///
/// Calico computes the same name, so its tools find the interface. A runtime without Kubernetes names its container instead.
#[must_use]
pub fn host_ifname(pod: &PodRef, key: &AttachmentKey) -> String {
    let mut hash = Sha1::new();
    if pod.namespace.is_empty() && pod.name.is_empty() {
        hash.update(&key.container_id);
    } else {
        hash.update(format!("{}.{}", pod.namespace, pod.name));
    }
    if key.ifname != "eth0" {
        hash.update(&key.ifname);
    }
    format!("cali{}", hex(&hash.finalize(), 11))
}

/// The alias that tells whose a host end is. Keys too long for an alias are replaced by their hash.
#[must_use]
pub fn alias(key: &AttachmentKey) -> String {
    let whole = format!("{ALIAS_PREFIX}{key}");
    if whole.len() <= ALIAS_MAX && !whole.contains('\0') {
        return whole;
    }
    format!("{ALIAS_PREFIX}sha1:{}", hex(&Sha1::digest(key.to_string()), 40))
}

/// The first `digits` hexadecimal digits of `bytes`.
fn hex(bytes: &[u8], digits: usize) -> String {
    let nibbles = bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    nibbles.take(digits).filter_map(|nibble| char::from_digit(u32::from(nibble), 16)).collect()
}
