//! Store, kernel, datapath, runtime and cloud held against each other: where they part, by what evidence, and what that justifies.
//!
//! [`findings`] is pure and knows nothing of how its sources were read. The daemon uses it twice: once a minute for what it can set right by
//! itself, and for `terway-cli mapping`, which also asks the cloud.
//!
//! # What counts as evidence
//!
//! A source that could not be read is `None` and says nothing: neither that something is there nor that it is gone. An answer that cannot be
//! true (a node without interfaces, an instance without its primary ENI) counts as no answer. What takes something away ([`Action::frees`])
//! needs positive proof, and for leftovers, two audits in a row that saw the very same thing ([`Confirmation`]).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::cloud::{Eni, EniKind, EniStatus};
use crate::ident::{Addresses, AttachmentKey, EniId, InstanceId, Mac, PodRef};
use crate::ipam::Phase;
use crate::route::{
    Difference, EniPlan, KernelState, Known, Leftover, NetOp, Observed, Place, PodPlan, Step, alias, diff, leftovers,
};

/// Everything that is known at one moment; read the store last, so that what came up meanwhile is not taken for a leftover.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// What the store says: every attachment, those being set up and torn down included.
    pub attachments: Vec<Held>,
    /// ENIs that carry or could carry pods, with what the kernel must hold for each.
    pub enis: Vec<HeldEni>,
    /// Interface indices of all NICs of the node.
    pub nics: BTreeSet<u32>,
    /// The node's network namespace.
    pub kernel: Option<KernelState>,
    /// The datapath's map of pods.
    pub endpoints: Option<Vec<Endpoint>>,
    /// `DescribeNetworkInterfaces` of the instance.
    pub cloud: Option<Inventory>,
}

/// One attachment of the store.
#[derive(Clone, Debug)]
pub struct Held {
    /// Whose it is.
    pub pod: PodRef,
    /// How far it is. Only [`Phase::Ready`] ones are compared: the others are being changed.
    pub phase: Phase,
    /// The ENI its addresses are on.
    pub eni: EniId,
    /// What the kernel and the datapath must hold.
    pub plan: PodPlan,
    /// What became of its network namespace.
    pub netns: Netns,
}

/// What the path of a pod's network namespace leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Netns {
    /// To a network namespace.
    Present,
    /// To nothing, or to something else. Proves little by itself: the path may only be invisible from here.
    Absent,
    /// It could not be looked at.
    #[default]
    Unknown,
}

/// One ENI of the pool.
#[derive(Clone, Debug)]
pub struct HeldEni {
    /// Its id.
    pub id: EniId,
    /// Its set-up on the node; none before it was set up.
    pub plan: Option<EniPlan>,
    /// Its addresses, as the pool knows them.
    pub addresses: BTreeSet<IpAddr>,
}

/// A pod in the datapath's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Interface index of the host end.
    pub ifindex: u32,
    /// MAC of the host end.
    pub host_mac: Mac,
    /// MAC of the pod's end.
    pub pod_mac: Mac,
    /// The pod's addresses.
    pub addresses: Addresses,
    /// Interface index of the ENI.
    pub eni_ifindex: u32,
    /// Whether the programs are attached to the host end, if that was looked at.
    pub attached: Option<bool>,
}

/// What the cloud lists for the instance.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// The instance that was asked for.
    pub instance: InstanceId,
    /// Its ENIs, the primary one included.
    pub enis: Vec<Eni>,
}

/// What is wrong. The names are metric labels and part of the JSON of `terway-cli mapping`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Neither the pod's namespace nor its interface is there any more.
    PodGone,
    /// The host end of a running pod is missing, or belongs to another.
    LinkMissing,
    /// The host end is down, or has another MAC or MTU.
    LinkDiffers,
    /// A route to a pod is missing.
    RouteMissing,
    /// A rule of a pod is missing, or leads elsewhere.
    RuleMissing,
    /// The host end's neighbour entry of a pod is missing.
    NeighbourMissing,
    /// The datapath does not know a pod.
    EndpointMissing,
    /// The datapath knows a pod otherwise than it is.
    EndpointDiffers,
    /// The datapath's programs are not attached to a pod's interface.
    ProgramsMissing,
    /// The cloud does not list an ENI that carries a pod.
    EniVanished,
    /// The cloud does not list an address of a pod.
    AddressVanished,
    /// Two attachments hold one address.
    AddressTwice,
    /// The NIC of an ENI is missing.
    NicMissing,
    /// An ENI's own set-up (table, addresses, sysctls) differs.
    EniDiffers,
    /// A host end that belongs to no attachment.
    LinkOrphan,
    /// A route that belongs to no attachment or ENI.
    RouteOrphan,
    /// A rule that belongs to no attachment.
    RuleOrphan,
    /// An entry of the datapath that belongs to no attachment.
    EndpointOrphan,
    /// The cloud lists an address on an ENI of the pool that the pool does not know (yet).
    AddressUnknown,
}

/// Which column of `terway-cli mapping` a finding belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layer {
    /// The pod's namespace.
    Pod,
    /// Links.
    Link,
    /// Routes and neighbours.
    Route,
    /// Rules.
    Rule,
    /// The datapath's maps and programs.
    Datapath,
    /// ENIs on the node.
    Eni,
    /// The cloud.
    Cloud,
}

impl Kind {
    /// Every kind, in the order of their declaration.
    pub const ALL: [Self; 19] = [
        Self::PodGone,
        Self::LinkMissing,
        Self::LinkDiffers,
        Self::RouteMissing,
        Self::RuleMissing,
        Self::NeighbourMissing,
        Self::EndpointMissing,
        Self::EndpointDiffers,
        Self::ProgramsMissing,
        Self::EniVanished,
        Self::AddressVanished,
        Self::AddressTwice,
        Self::NicMissing,
        Self::EniDiffers,
        Self::LinkOrphan,
        Self::RouteOrphan,
        Self::RuleOrphan,
        Self::EndpointOrphan,
        Self::AddressUnknown,
    ];

    /// The name in kebab-case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodGone => "pod-gone",
            Self::LinkMissing => "link-missing",
            Self::LinkDiffers => "link-differs",
            Self::RouteMissing => "route-missing",
            Self::RuleMissing => "rule-missing",
            Self::NeighbourMissing => "neighbour-missing",
            Self::EndpointMissing => "endpoint-missing",
            Self::EndpointDiffers => "endpoint-differs",
            Self::ProgramsMissing => "programs-missing",
            Self::EniVanished => "eni-vanished",
            Self::AddressVanished => "address-vanished",
            Self::AddressTwice => "address-twice",
            Self::NicMissing => "nic-missing",
            Self::EniDiffers => "eni-differs",
            Self::LinkOrphan => "link-orphan",
            Self::RouteOrphan => "route-orphan",
            Self::RuleOrphan => "rule-orphan",
            Self::EndpointOrphan => "endpoint-orphan",
            Self::AddressUnknown => "address-unknown",
        }
    }

    /// The layer it shows in.
    #[must_use]
    pub const fn layer(self) -> Layer {
        match self {
            Self::PodGone => Layer::Pod,
            Self::LinkMissing | Self::LinkDiffers | Self::LinkOrphan => Layer::Link,
            Self::RouteMissing | Self::NeighbourMissing | Self::RouteOrphan => Layer::Route,
            Self::RuleMissing | Self::RuleOrphan => Layer::Rule,
            Self::EndpointMissing | Self::EndpointDiffers | Self::ProgramsMissing | Self::EndpointOrphan => {
                Layer::Datapath
            }
            Self::NicMissing | Self::EniDiffers => Layer::Eni,
            Self::EniVanished | Self::AddressVanished | Self::AddressTwice | Self::AddressUnknown => Layer::Cloud,
        }
    }

    /// Whether it is a mismatch, and not only something that the next inventory takes in by itself.
    #[must_use]
    pub const fn is_mismatch(self) -> bool {
        !matches!(self, Self::AddressUnknown)
    }
}

/// What a finding justifies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Nothing that the daemon may or can do.
    None,
    /// Do this step of the plan again.
    Repair(Step),
    /// Write the pod's entry again and attach the programs to this interface.
    Replug(u32),
    /// The addresses must not go to anybody else until the cloud lists them again; the pod has to be replaced.
    Fence,
    /// Remove what nobody owns.
    Remove(Leftover),
    /// Remove the datapath's entry of this interface.
    Unplug(u32, BTreeSet<IpAddr>),
    /// Release the attachment; its addresses cool down before another pod gets them.
    Free,
}

impl Action {
    /// The name of the sort of action.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Repair(_) | Self::Replug(_) => "repair",
            Self::Fence => "fence",
            Self::Remove(_) | Self::Unplug(..) => "remove",
            Self::Free => "free",
        }
    }

    /// Whether it takes something away.
    #[must_use]
    pub const fn frees(&self) -> bool {
        matches!(self, Self::Remove(_) | Self::Unplug(..) | Self::Free)
    }
}

/// One point where the sources part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub kind: Kind,
    /// The attachment it concerns, if it is one's.
    pub key: Option<AttachmentKey>,
    /// What it is about: an interface, an address, an ENI.
    pub subject: String,
    /// Who says what, one sentence without its full stop.
    pub evidence: String,
    /// What that justifies.
    pub action: Action,
}

/// Compares. The order is that in which repairs work: what a later one needs comes first.
#[must_use]
pub fn findings(world: &World) -> Vec<Finding> {
    let observed = world.kernel.as_ref().filter(|kernel| !kernel.links.is_empty());
    let observed = observed.map(|kernel| Observed { host: kernel.clone(), pod: None });
    let cloud = world.cloud.as_ref().filter(|cloud| cloud.enis.iter().any(|eni| eni.kind == EniKind::Primary));
    let mut found = Vec::new();
    for eni in &world.enis {
        if let (Some(observed), Some(plan)) = (&observed, &eni.plan) {
            found.extend(eni_findings(&eni.id, plan, observed));
        }
    }
    let mut owners: BTreeMap<IpAddr, &Held> = BTreeMap::new();
    for held in &world.attachments {
        for address in held.plan.inputs.addresses.iter() {
            if let Some(other) = owners.insert(address, held) {
                let evidence = format!("the store binds it to {} and to {}", other.pod, held.pod);
                found.push(finding(Kind::AddressTwice, held, address.to_string(), evidence, Action::None));
            }
        }
        if held.phase == Phase::Ready {
            pod_findings(held, world, observed.as_ref(), cloud, &mut found);
        }
    }
    if let Some(observed) = &observed {
        found.extend(orphans(&observed.host, &owners, world));
    }
    for endpoint in world.endpoints.iter().flatten() {
        if !endpoint.addresses.iter().any(|address| owners.contains_key(&address)) {
            let addresses: BTreeSet<IpAddr> = endpoint.addresses.iter().collect();
            found.push(Finding {
                kind: Kind::EndpointOrphan,
                key: None,
                subject: format!("interface {}", endpoint.ifindex),
                evidence: format!("the datapath has an entry for {addresses:?}, which the store binds to no pod"),
                action: Action::Unplug(endpoint.ifindex, addresses),
            });
        }
    }
    if let Some(cloud) = cloud {
        found.extend(surplus(world, cloud));
    }
    found
}

/// Whether a pod is gone without a DEL. It takes both: the path leads to no namespace, and the node's end of the veth is gone, as the kernel
/// removes it with the namespace.
#[must_use]
pub fn pod_is_gone(key: &AttachmentKey, netns: Netns, host: &KernelState) -> bool {
    let owner = alias(key);
    netns == Netns::Absent
        && !host.links.is_empty()
        && !host.links.values().any(|link| link.alias.as_ref() == Some(&owner))
}

/// The sysctls that [`findings`] looks for in [`World::kernel`].
#[must_use]
pub fn sysctls<'a>(plans: impl IntoIterator<Item = &'a EniPlan>) -> BTreeSet<String> {
    let paths = plans.into_iter().flat_map(|plan| &plan.steps).filter_map(|step| match &step.op {
        NetOp::Sysctl { path, .. } => Some(path.clone()),
        _ => None,
    });
    paths.collect()
}

/// Remembers what an audit saw, so that the next one can tell what has been there for a while.
#[derive(Debug, Default)]
pub struct Confirmation {
    seen: BTreeSet<Action>,
}

impl Confirmation {
    /// Those findings that may be acted upon: repairs and evident ends at once, removals of leftovers if the audit before saw the very same.
    pub fn due(&mut self, findings: Vec<Finding>) -> Vec<Finding> {
        let leftover = |action: &Action| matches!(action, Action::Remove(_) | Action::Unplug(..));
        let now: BTreeSet<Action> = findings.iter().map(|f| f.action.clone()).filter(leftover).collect();
        let before = std::mem::replace(&mut self.seen, now);
        findings.into_iter().filter(|f| !leftover(&f.action) || before.contains(&f.action)).collect()
    }
}

fn finding(kind: Kind, held: &Held, subject: String, evidence: String, action: Action) -> Finding {
    Finding { kind, key: Some(held.plan.inputs.key.clone()), subject, evidence, action }
}

fn pod_findings(
    held: &Held,
    world: &World,
    observed: Option<&Observed>,
    cloud: Option<&Inventory>,
    found: &mut Vec<Finding>,
) {
    let inputs = &held.plan.inputs;
    if let Some(observed) = observed {
        let kernel = &observed.host;
        let name = inputs.host_ifname.clone();
        let owner = alias(&inputs.key);
        let link = kernel.links.get(&name).filter(|link| link.alias.as_ref() == Some(&owner));
        match link {
            Some(link) => {
                let steps = held.plan.steps().filter(|step| step.place == Place::Host);
                let differences = diff(steps, observed);
                found.extend(differences.into_iter().map(|difference| drift(held, difference)));
                if let Some(endpoints) = &world.endpoints {
                    found.extend(plug(held, link.index, endpoints));
                }
            }
            None if pod_is_gone(&inputs.key, held.netns, kernel) => {
                let evidence = "its network namespace and its interface are gone, and no DEL came".to_owned();
                found.push(finding(Kind::PodGone, held, name, evidence, Action::Free));
                // What else it lacks follows from that.
                return;
            }
            None => {
                let evidence = match kernel.links.get(&name).map(|link| link.alias.as_deref().unwrap_or("nobody")) {
                    Some(other) => format!("the interface of this name belongs to {other}"),
                    None => "the node has no interface of this name".to_owned(),
                };
                found.push(finding(Kind::LinkMissing, held, name, evidence, Action::None));
            }
        }
    } else if let Some(endpoints) = &world.endpoints
        && !endpoints.iter().any(|endpoint| endpoint.addresses == inputs.addresses)
    {
        let evidence = "the datapath has no entry for its addresses".to_owned();
        found.push(finding(Kind::EndpointMissing, held, inputs.host_ifname.clone(), evidence, Action::None));
    }
    let Some(cloud) = cloud else { return };
    let listed = cloud.enis.iter().find(|eni| {
        eni.id == held.eni && eni.status == EniStatus::InUse && eni.instance.as_ref() == Some(&cloud.instance)
    });
    let Some(eni) = listed else {
        let evidence = "the cloud does not list it as attached to the instance".to_owned();
        found.push(finding(Kind::EniVanished, held, held.eni.to_string(), evidence, Action::Fence));
        return;
    };
    for address in inputs.addresses.iter().filter(|address| !carries(eni, *address)) {
        let evidence = format!("the cloud does not list it on {}", eni.id);
        found.push(finding(Kind::AddressVanished, held, address.to_string(), evidence, Action::Fence));
    }
}

/// A difference of the node's tables as a finding.
fn drift(held: &Held, difference: Difference) -> Finding {
    let kind = match difference.repair.as_ref().map(|step| &step.op) {
        None => Kind::LinkMissing,
        Some(NetOp::AddRule(_)) => Kind::RuleMissing,
        Some(NetOp::AddRoute(_)) => Kind::RouteMissing,
        Some(NetOp::AddNeighbour(_)) => Kind::NeighbourMissing,
        Some(_) => Kind::LinkDiffers,
    };
    let action = difference.repair.map_or(Action::None, Action::Repair);
    finding(kind, held, held.plan.inputs.host_ifname.clone(), difference.sentence, action)
}

fn plug(held: &Held, ifindex: u32, endpoints: &[Endpoint]) -> Option<Finding> {
    let inputs = &held.plan.inputs;
    let wanted = |endpoint: &Endpoint| {
        (endpoint.addresses, endpoint.host_mac, endpoint.pod_mac, endpoint.eni_ifindex)
            == (inputs.addresses, inputs.host_mac, inputs.pod_mac, inputs.eni_ifindex)
    };
    let (kind, evidence) = match endpoints.iter().find(|endpoint| endpoint.ifindex == ifindex) {
        None => (Kind::EndpointMissing, "the datapath has no entry for the interface".to_owned()),
        Some(endpoint) if !wanted(endpoint) => {
            let addresses: Vec<IpAddr> = endpoint.addresses.iter().collect();
            let evidence = format!(
                "the datapath's entry says {addresses:?}, {} behind {}, ENI interface {}",
                endpoint.pod_mac, endpoint.host_mac, endpoint.eni_ifindex
            );
            (Kind::EndpointDiffers, evidence)
        }
        Some(Endpoint { attached: Some(false), .. }) => {
            (Kind::ProgramsMissing, "the datapath's programs are not attached to the interface".to_owned())
        }
        Some(_) => return None,
    };
    Some(finding(kind, held, inputs.host_ifname.clone(), evidence, Action::Replug(ifindex)))
}

fn eni_findings(id: &EniId, plan: &EniPlan, observed: &Observed) -> Vec<Finding> {
    let name = &plan.inputs.ifname;
    let of = |kind, evidence, action| Finding { kind, key: None, subject: id.to_string(), evidence, action };
    if observed.host.links.get(name).is_none_or(|link| link.index != plan.inputs.ifindex) {
        let evidence = format!("the node has no interface {name} with index {}", plan.inputs.ifindex);
        return vec![of(Kind::NicMissing, evidence, Action::None)];
    }
    let differences = diff(&plan.steps, observed);
    let differences = differences.into_iter();
    differences.map(|d| of(Kind::EniDiffers, d.sentence, d.repair.map_or(Action::None, Action::Repair))).collect()
}

fn orphans(kernel: &KernelState, owners: &BTreeMap<IpAddr, &Held>, world: &World) -> Vec<Finding> {
    let known = Known {
        aliases: world.attachments.iter().map(|held| alias(&held.plan.inputs.key)).collect(),
        addresses: owners.keys().copied().collect(),
        enis: world.nics.clone(),
    };
    let stale = leftovers(kernel, &known).into_iter();
    stale
        .map(|leftover| {
            let (kind, subject, evidence) = match &leftover {
                Leftover::Link { name, alias, .. } => {
                    let of = alias.as_deref().unwrap_or("nobody named");
                    (
                        Kind::LinkOrphan,
                        name.clone(),
                        format!("the interface is ours, of {of}, and the store knows no such"),
                    )
                }
                Leftover::Route(route) => {
                    (Kind::RouteOrphan, route.dst.to_string(), format!("the {route} leads to no pod of the store"))
                }
                Leftover::Rule(rule) => (
                    Kind::RuleOrphan,
                    rule.selector.net().to_string(),
                    format!("the {rule} is for no pod of the store"),
                ),
            };
            Finding { kind, key: None, subject, evidence, action: Action::Remove(leftover) }
        })
        .collect()
}

/// Addresses that the cloud lists on ENIs of the pool and the pool does not know: those of a call whose reply is under way, or leaked ones,
/// which the pool takes in with its next inventory.
fn surplus(world: &World, cloud: &Inventory) -> Vec<Finding> {
    let mut found = Vec::new();
    for held in &world.enis {
        let Some(eni) = cloud.enis.iter().find(|eni| eni.id == held.id) else { continue };
        let listed = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
        for address in listed.filter(|address| *address != eni.primary_v4 && !held.addresses.contains(address)) {
            found.push(Finding {
                kind: Kind::AddressUnknown,
                key: None,
                subject: address.to_string(),
                evidence: format!("the cloud lists it on {}, and the pool does not know it yet", eni.id),
                action: Action::None,
            });
        }
    }
    found
}

fn carries(eni: &Eni, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => eni.v4.contains(&v4),
        IpAddr::V6(v6) => eni.v6.contains(&v6),
    }
}
