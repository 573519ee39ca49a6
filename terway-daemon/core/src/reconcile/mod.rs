//! Store, kernel, datapath, runtime and cloud compared with each other: where they part, by what evidence, and what that justifies.
//!
//! [`findings`] is pure and knows nothing of how its sources were read. The daemon uses it twice: once a minute for what it can set right by
//! itself, and for `terway-cli mapping`, which also asks the cloud.
//!
//! # What counts as evidence
//!
//! A source that could not be read is `None` and says nothing: neither that something is there nor that it is gone. An answer that cannot be
//! true (a node without interfaces, an instance without its primary ENI) counts as no answer. What takes something away ([`Action::removes`])
//! needs positive proof, and for orphans, two audits in a row that saw the very same thing ([`Confirmation`]).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::cloud::{Eni, EniKind, EniStatus};
use crate::ident::{Addresses, AttachmentKey, EniId, InstanceId, Mac, PodRef};
use crate::ipam::Phase;
use crate::route::{
    Difference, EniPlan, KernelState, KnownResources, NetOp, ObservedState, Orphan, PodPlan, Step, StepNetns, alias,
    diff, orphans,
};

/// Everything that is known at one moment; read the store last, so that what came up meanwhile is not taken for an orphan.
#[derive(Clone, Debug, Default)]
pub struct AuditSnapshot {
    /// What the store says: every attachment, those being set up and torn down included.
    pub attachments: Vec<StoredAttachment>,
    /// ENIs that carry or could carry pods, with what the kernel must hold for each.
    pub enis: Vec<StoredEni>,
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
pub struct StoredAttachment {
    /// Whose it is.
    pub pod: PodRef,
    /// How far it is. Only [`Phase::Ready`] ones are compared: the others are being changed.
    pub phase: Phase,
    /// The ENI its addresses are on.
    pub eni: EniId,
    /// What the kernel and the datapath must hold.
    pub plan: PodPlan,
    /// What became of its network namespace.
    pub netns: NetnsState,
}

/// What the path of a pod's network namespace leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetnsState {
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
pub struct StoredEni {
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
pub enum FindingKind {
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
    DuplicateAddress,
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

impl FindingKind {
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
        Self::DuplicateAddress,
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
            Self::DuplicateAddress => "duplicate-address",
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
            Self::EniVanished | Self::AddressVanished | Self::DuplicateAddress | Self::AddressUnknown => Layer::Cloud,
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
    RestoreEndpoint(u32),
    /// The addresses must not go to anybody else until the cloud lists them again; the pod has to be replaced.
    ReportAddressLoss,
    /// Remove what nobody owns.
    Remove(Orphan),
    /// Remove the datapath's entry of this interface.
    RemoveEndpoint(u32, BTreeSet<IpAddr>),
    /// Release the attachment; its addresses cool down before another pod gets them.
    Release,
}

impl Action {
    /// The name of the sort of action.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Repair(_) | Self::RestoreEndpoint(_) => "repair",
            Self::ReportAddressLoss => "report",
            Self::Remove(_) | Self::RemoveEndpoint(..) => "remove",
            Self::Release => "release",
        }
    }

    /// Whether it restores a planned state. Such an action may be repeated at any time; it needs no second audit.
    #[must_use]
    pub const fn is_repair(&self) -> bool {
        matches!(self, Self::Repair(_) | Self::RestoreEndpoint(_))
    }

    /// Whether it takes something away.
    #[must_use]
    pub const fn removes(&self) -> bool {
        matches!(self, Self::Remove(_) | Self::RemoveEndpoint(..) | Self::Release)
    }
}

/// One point where the sources part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
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
pub fn findings(snapshot: &AuditSnapshot) -> Vec<Finding> {
    let observed = snapshot.kernel.as_ref().filter(|kernel| !kernel.links.is_empty());
    let observed = observed.map(|kernel| ObservedState { host: kernel.clone(), pod: None });
    let cloud = snapshot.cloud.as_ref().filter(|cloud| cloud.enis.iter().any(|eni| eni.kind == EniKind::Primary));
    let mut found = Vec::new();
    for eni in &snapshot.enis {
        if let (Some(observed), Some(plan)) = (&observed, &eni.plan) {
            found.extend(eni_findings(&eni.id, plan, observed));
        }
    }
    let mut owners: BTreeMap<IpAddr, &StoredAttachment> = BTreeMap::new();
    for stored in &snapshot.attachments {
        for address in stored.plan.inputs.addresses.iter() {
            if let Some(other) = owners.insert(address, stored) {
                let evidence = format!("the store binds it to {} and to {}", other.pod, stored.pod);
                found.push(finding(FindingKind::DuplicateAddress, stored, address.to_string(), evidence, Action::None));
            }
        }
        if stored.phase == Phase::Ready {
            pod_findings(stored, snapshot, observed.as_ref(), cloud, &mut found);
        }
    }
    if let Some(observed) = &observed {
        found.extend(orphan_findings(&observed.host, &owners, snapshot));
    }
    for endpoint in snapshot.endpoints.iter().flatten() {
        if !endpoint.addresses.iter().any(|address| owners.contains_key(&address)) {
            let addresses: BTreeSet<IpAddr> = endpoint.addresses.iter().collect();
            found.push(Finding {
                kind: FindingKind::EndpointOrphan,
                key: None,
                subject: format!("interface {}", endpoint.ifindex),
                evidence: format!("the datapath has an entry for {addresses:?}, which the store binds to no pod"),
                action: Action::RemoveEndpoint(endpoint.ifindex, addresses),
            });
        }
    }
    if let Some(cloud) = cloud {
        found.extend(unknown_addresses(snapshot, cloud));
    }
    found
}

/// Whether a pod is gone without a DEL. It takes both: the path leads to no namespace, and the node's end of the veth is gone, as the kernel
/// removes it with the namespace.
#[must_use]
pub fn pod_is_gone(key: &AttachmentKey, netns: NetnsState, host: &KernelState) -> bool {
    let owner = alias(key);
    netns == NetnsState::Absent
        && !host.links.is_empty()
        && !host.links.values().any(|link| link.alias.as_ref() == Some(&owner))
}

/// The sysctls that [`findings`] looks for in [`AuditSnapshot::kernel`].
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
        let orphan = |action: &Action| matches!(action, Action::Remove(_) | Action::RemoveEndpoint(..));
        let now: BTreeSet<Action> = findings.iter().map(|f| f.action.clone()).filter(orphan).collect();
        let before = std::mem::replace(&mut self.seen, now);
        findings.into_iter().filter(|f| !orphan(&f.action) || before.contains(&f.action)).collect()
    }
}

fn finding(kind: FindingKind, stored: &StoredAttachment, subject: String, evidence: String, action: Action) -> Finding {
    Finding { kind, key: Some(stored.plan.inputs.key.clone()), subject, evidence, action }
}

fn pod_findings(
    stored: &StoredAttachment,
    snapshot: &AuditSnapshot,
    observed: Option<&ObservedState>,
    cloud: Option<&Inventory>,
    found: &mut Vec<Finding>,
) {
    let inputs = &stored.plan.inputs;
    if let Some(observed) = observed {
        let kernel = &observed.host;
        let name = inputs.host_ifname.clone();
        let owner = alias(&inputs.key);
        let link = kernel.links.get(&name).filter(|link| link.alias.as_ref() == Some(&owner));
        match link {
            Some(link) => {
                let steps = stored.plan.steps().filter(|step| step.netns == StepNetns::Host);
                let differences = diff(steps, observed);
                found.extend(differences.into_iter().map(|difference| kernel_finding(stored, difference)));
                if let Some(endpoints) = &snapshot.endpoints {
                    found.extend(endpoint_finding(stored, link.index, endpoints));
                }
            }
            None if pod_is_gone(&inputs.key, stored.netns, kernel) => {
                let evidence = "its network namespace and its interface are gone, and no DEL came".to_owned();
                found.push(finding(FindingKind::PodGone, stored, name, evidence, Action::Release));
                // What else it lacks follows from that.
                return;
            }
            None => {
                let evidence = match kernel.links.get(&name).map(|link| link.alias.as_deref().unwrap_or("nobody")) {
                    Some(other) => format!("the interface of this name belongs to {other}"),
                    None => "the node has no interface of this name".to_owned(),
                };
                found.push(finding(FindingKind::LinkMissing, stored, name, evidence, Action::None));
            }
        }
    } else if let Some(endpoints) = &snapshot.endpoints
        && !endpoints.iter().any(|endpoint| endpoint.addresses == inputs.addresses)
    {
        let evidence = "the datapath has no entry for its addresses".to_owned();
        found.push(finding(FindingKind::EndpointMissing, stored, inputs.host_ifname.clone(), evidence, Action::None));
    }
    let Some(cloud) = cloud else { return };
    let listed = cloud.enis.iter().find(|eni| {
        eni.id == stored.eni && eni.status == EniStatus::InUse && eni.instance.as_ref() == Some(&cloud.instance)
    });
    let Some(eni) = listed else {
        let evidence = "the cloud does not list it as attached to the instance".to_owned();
        found.push(finding(
            FindingKind::EniVanished,
            stored,
            stored.eni.to_string(),
            evidence,
            Action::ReportAddressLoss,
        ));
        return;
    };
    for address in inputs.addresses.iter().filter(|address| !has_address(eni, *address)) {
        let evidence = format!("the cloud does not list it on {}", eni.id);
        found.push(finding(
            FindingKind::AddressVanished,
            stored,
            address.to_string(),
            evidence,
            Action::ReportAddressLoss,
        ));
    }
}

/// A difference of the node's tables as a finding.
fn kernel_finding(stored: &StoredAttachment, difference: Difference) -> Finding {
    let kind = match difference.repair.as_ref().map(|step| &step.op) {
        None => FindingKind::LinkMissing,
        Some(NetOp::AddRule(_)) => FindingKind::RuleMissing,
        Some(NetOp::AddRoute(_)) => FindingKind::RouteMissing,
        Some(NetOp::AddNeighbour(_)) => FindingKind::NeighbourMissing,
        Some(_) => FindingKind::LinkDiffers,
    };
    let action = difference.repair.map_or(Action::None, Action::Repair);
    finding(kind, stored, stored.plan.inputs.host_ifname.clone(), difference.message, action)
}

fn endpoint_finding(stored: &StoredAttachment, ifindex: u32, endpoints: &[Endpoint]) -> Option<Finding> {
    let inputs = &stored.plan.inputs;
    let wanted = |endpoint: &Endpoint| {
        (endpoint.addresses, endpoint.host_mac, endpoint.pod_mac, endpoint.eni_ifindex)
            == (inputs.addresses, inputs.host_mac, inputs.pod_mac, inputs.eni_ifindex)
    };
    let (kind, evidence) = match endpoints.iter().find(|endpoint| endpoint.ifindex == ifindex) {
        None => (FindingKind::EndpointMissing, "the datapath has no entry for the interface".to_owned()),
        Some(endpoint) if !wanted(endpoint) => {
            let addresses: Vec<IpAddr> = endpoint.addresses.iter().collect();
            let evidence = format!(
                "the datapath's entry says {addresses:?}, {} behind {}, ENI interface {}",
                endpoint.pod_mac, endpoint.host_mac, endpoint.eni_ifindex
            );
            (FindingKind::EndpointDiffers, evidence)
        }
        Some(Endpoint { attached: Some(false), .. }) => {
            (FindingKind::ProgramsMissing, "the datapath's programs are not attached to the interface".to_owned())
        }
        Some(_) => return None,
    };
    Some(finding(kind, stored, inputs.host_ifname.clone(), evidence, Action::RestoreEndpoint(ifindex)))
}

fn eni_findings(id: &EniId, plan: &EniPlan, observed: &ObservedState) -> Vec<Finding> {
    let name = &plan.inputs.ifname;
    let of = |kind, evidence, action| Finding { kind, key: None, subject: id.to_string(), evidence, action };
    if observed.host.links.get(name).is_none_or(|link| link.index != plan.inputs.ifindex) {
        let evidence = format!("the node has no interface {name} with index {}", plan.inputs.ifindex);
        return vec![of(FindingKind::NicMissing, evidence, Action::None)];
    }
    let differences = diff(&plan.steps, observed);
    let differences = differences.into_iter();
    differences.map(|d| of(FindingKind::EniDiffers, d.message, d.repair.map_or(Action::None, Action::Repair))).collect()
}

fn orphan_findings(
    kernel: &KernelState,
    owners: &BTreeMap<IpAddr, &StoredAttachment>,
    snapshot: &AuditSnapshot,
) -> Vec<Finding> {
    let known = KnownResources {
        aliases: snapshot.attachments.iter().map(|stored| alias(&stored.plan.inputs.key)).collect(),
        addresses: owners.keys().copied().collect(),
        enis: snapshot.nics.clone(),
    };
    let stale = orphans(kernel, &known).into_iter();
    stale
        .map(|orphan| {
            let (kind, subject, evidence) = match &orphan {
                Orphan::Link { name, alias, .. } => {
                    let of = alias.as_deref().unwrap_or("nobody named");
                    (
                        FindingKind::LinkOrphan,
                        name.clone(),
                        format!("the interface is ours, of {of}, and the store knows no such"),
                    )
                }
                Orphan::Route(route) => (
                    FindingKind::RouteOrphan,
                    route.dst.to_string(),
                    format!("the {route} leads to no pod of the store"),
                ),
                Orphan::Rule(rule) => (
                    FindingKind::RuleOrphan,
                    rule.selector.net().to_string(),
                    format!("the {rule} is for no pod of the store"),
                ),
            };
            Finding { kind, key: None, subject, evidence, action: Action::Remove(orphan) }
        })
        .collect()
}

/// Addresses that the cloud lists on ENIs of the pool and the pool does not know: those of a call whose reply is under way, or leaked ones,
/// which the pool takes in with its next inventory.
fn unknown_addresses(snapshot: &AuditSnapshot, cloud: &Inventory) -> Vec<Finding> {
    let mut found = Vec::new();
    for stored in &snapshot.enis {
        let Some(eni) = cloud.enis.iter().find(|eni| eni.id == stored.id) else { continue };
        let listed = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
        for address in listed.filter(|address| *address != eni.primary_v4 && !stored.addresses.contains(address)) {
            found.push(Finding {
                kind: FindingKind::AddressUnknown,
                key: None,
                subject: address.to_string(),
                evidence: format!("the cloud lists it on {}, and the pool does not know it yet", eni.id),
                action: Action::None,
            });
        }
    }
    found
}

fn has_address(eni: &Eni, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => eni.v4.contains(&v4),
        IpAddr::V6(v6) => eni.v6.contains(&v6),
    }
}
