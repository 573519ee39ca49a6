//! Where a plan and the kernel part, and what a plan of ours left in the kernel that nobody needs any more.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{KernelState, NetOp, Route, Rule, Step, StepNetns, TABLE_BASE, TABLE_MAIN};
use crate::cidr::Cidr as _;

/// What the kernel holds on either side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedState {
    /// The node's namespace.
    pub host: KernelState,
    /// The pod's namespace; none if it is gone, or if the plan has no steps there.
    pub pod: Option<KernelState>,
}

/// One point where the kernel is not as planned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What is wrong, for a human.
    pub message: String,
    /// What sets it right, if one step can while the pod lives.
    pub repair: Option<Step>,
}

/// Compares what `steps` set up with what the kernel holds.
#[must_use]
pub fn diff<'a>(steps: impl IntoIterator<Item = &'a Step>, observed: &ObservedState) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut pod_gone = false;
    for step in steps {
        let state = match step.netns {
            StepNetns::Host => &observed.host,
            StepNetns::Pod => match &observed.pod {
                Some(pod) => pod,
                None => {
                    pod_gone = true;
                    continue;
                }
            },
        };
        for (problem, repair) in check(step, state, observed) {
            let place = match step.netns {
                StepNetns::Host => "on the node",
                StepNetns::Pod => "in the pod",
            };
            found.push(Difference { message: format!("{place}, {problem}"), repair });
        }
    }
    if pod_gone {
        found.push(Difference { message: "the pod's network namespace is gone".to_owned(), repair: None });
    }
    found
}

/// The problems with one step's result, and what repairs each; doing the step again, in most cases.
fn check(step: &Step, state: &KernelState, observed: &ObservedState) -> Vec<(String, Option<Step>)> {
    let one = |wrong: bool, problem: String| if wrong { vec![(problem, Some(step.clone()))] } else { Vec::new() };
    match &step.op {
        NetOp::AddVeth { host, pod, mtu, owner } => {
            let mut problems = Vec::new();
            let Some(link) = state.links.get(&host.name) else {
                return vec![(format!("the interface {} is missing", host.name), None)];
            };
            if link.alias.as_ref() != Some(owner) {
                let alias = link.alias.as_deref().unwrap_or("nobody");
                return vec![(format!("the interface {} belongs to {alias} instead of {owner}", host.name), None)];
            }
            let mut ends = vec![(Step::host as fn(NetOp) -> Step, host, link)];
            if let Some(inside) = &observed.pod {
                match inside.links.get(&pod.name) {
                    None => problems.push((format!("the pod's interface {} is missing", pod.name), None)),
                    Some(end) if end.peer != Some(link.index) || link.peer != Some(end.index) => {
                        problems.push((format!("{} and the pod's {} are not one pair", host.name, pod.name), None));
                    }
                    Some(end) => ends.push((Step::pod, pod, end)),
                }
            }
            for (place, end, link) in ends {
                let dev = end.name.clone();
                if link.mac != Some(end.mac) {
                    let has = link.mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string());
                    let problem = format!("{dev} has the MAC address {has} instead of {}", end.mac);
                    problems.push((problem, Some(place(NetOp::SetMac { dev: dev.clone(), mac: end.mac }))));
                }
                if link.mtu != *mtu {
                    let problem = format!("{dev} has the MTU {} instead of {mtu}", link.mtu);
                    problems.push((problem, Some(place(NetOp::SetMtu { dev, mtu: *mtu }))));
                }
            }
            problems
        }
        NetOp::SetMac { dev, mac } => match state.links.get(dev) {
            None => vec![(format!("the interface {dev} is missing"), None)],
            Some(link) => one(link.mac != Some(*mac), format!("{dev} has lost its MAC address {mac}")),
        },
        NetOp::SetMtu { dev, mtu } => match state.links.get(dev) {
            None => vec![(format!("the interface {dev} is missing"), None)],
            Some(link) => one(link.mtu != *mtu, format!("{dev} has the MTU {} instead of {mtu}", link.mtu)),
        },
        NetOp::SetUp { dev } => match state.links.get(dev) {
            None => Vec::new(), // said by the step that made it
            Some(link) => one(!link.up, format!("{dev} is down")),
        },
        NetOp::SetDown { dev } => one(state.links.get(dev).is_some_and(|link| link.up), format!("{dev} is up")),
        NetOp::Sysctl { path, value } => match state.sysctls.get(path) {
            Some(found) => one(found != value, format!("the sysctl {path} is {found} instead of {value}")),
            None => Vec::new(), // not asked for, or not there on this kernel
        },
        NetOp::AddAddress { dev, address } => {
            one(!state.addresses.contains(&(dev.clone(), *address)), format!("{dev} lacks the address {address}"))
        }
        NetOp::AddRoute(route) => {
            one(!state.routes.iter().any(|found| found.is_equivalent(route)), format!("the {route} is missing"))
        }
        NetOp::AddRule(rule) => {
            let conflicting = |found: &&Rule| {
                (found.priority, found.selector) == (rule.priority, rule.selector) && found.table != rule.table
            };
            if let Some(conflicting) = state.rules.iter().find(conflicting) {
                return vec![(format!("the {conflicting} stands beside {rule}"), Some(step.clone()))];
            }
            one(!state.rules.contains(rule), format!("the {rule} is missing"))
        }
        NetOp::AddNeighbour(neighbour) => {
            one(!state.neighbours.contains(neighbour), format!("the {neighbour} is missing"))
        }
        NetOp::DelLink { dev, owner } => {
            let there = state.links.get(dev).is_some_and(|link| link.alias.as_ref() == Some(owner));
            one(there, format!("the interface {dev} of {owner} is still there"))
        }
        NetOp::DelAddress { dev, address } => {
            one(state.addresses.contains(&(dev.clone(), *address)), format!("{dev} still has the address {address}"))
        }
        NetOp::DelRoute(route) => {
            one(state.routes.iter().any(|found| found.is_equivalent(route)), format!("the {route} is still there"))
        }
        NetOp::DelRule(rule) => one(state.rules.contains(rule), format!("the {rule} is still there")),
        NetOp::DelNeighbour(neighbour) => {
            one(state.neighbours.contains(neighbour), format!("the {neighbour} is still there"))
        }
        NetOp::NoAddrGen { .. } => Vec::new(), // matters only while the link comes up
    }
}

/// What the daemon knows to be in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownResources {
    /// Aliases ([`super::alias`]) of all attachments, those being set up or torn down included.
    pub aliases: BTreeSet<String>,
    /// Addresses of all attachments.
    pub addresses: BTreeSet<IpAddr>,
    /// Interface indices of the ENIs in use.
    pub enis: BTreeSet<u32>,
}

/// Something of ours in the node's namespace that nothing known accounts for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Orphan {
    /// A host end; its interface index makes sure that a later link of the same name is not meant.
    Link {
        /// Interface name.
        name: String,
        /// Interface index.
        index: u32,
        /// Its alias, if it lived long enough to get one.
        alias: Option<String>,
    },
    /// A route to a pod, or of an ENI's table.
    Route(Route),
    /// A rule of a pod.
    Rule(Rule),
}

/// Finds what is provably ours and not known: veths with our group or alias, routes to single addresses through such veths, default routes
/// in the table that belongs to their own interface, and rules of exactly our shape.
///
/// `host` must hold only rules and routes with the kernel's protocol number, as `terway_daemon::net` observes them.
#[must_use]
pub fn orphans(host: &KernelState, known: &KnownResources) -> Vec<Orphan> {
    let unknown = |net: IpNetwork| net.is_host() && !known.addresses.contains(&net.ip());
    let mut found = Vec::new();
    found.extend(host.rules.iter().filter(|rule| unknown(rule.selector.net())).cloned().map(Orphan::Rule));
    for route in &host.routes {
        let Some(link) = host.links.get(&route.dev) else { continue };
        let stale = if route.table == TABLE_MAIN {
            link.is_ours() && unknown(route.dst)
        } else {
            route.table.checked_sub(TABLE_BASE) == Some(link.index)
                && route.dst.prefix() == 0
                && !known.enis.contains(&link.index)
        };
        if stale {
            found.push(Orphan::Route(route.clone()));
        }
    }
    for (name, link) in &host.links {
        let claimed = link.alias.as_ref().is_some_and(|alias| known.aliases.contains(alias));
        if link.is_ours() && !claimed {
            found.push(Orphan::Link { name: name.clone(), index: link.index, alias: link.alias.clone() });
        }
    }
    found
}
