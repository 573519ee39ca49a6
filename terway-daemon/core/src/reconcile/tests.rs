//! Worlds that agree say nothing; each thing broken is found under its name; a source that is silent takes nothing away.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::ident::VSwitchId;
use crate::route::{EniInputs, Link, PodInputs, Route, Rule, host_ifname};

const HOST_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const ENI_INDEX: u32 = 3;
const POD_INDEX: u32 = 100;

fn eni_id() -> EniId {
    EniId::new("eni-1")
}

fn stored(number: u8) -> StoredAttachment {
    let pod = PodRef { namespace: "default".into(), name: format!("p{number}"), uid: String::new() };
    let key = AttachmentKey { network: "terway".into(), container_id: format!("c{number}"), ifname: "eth0".into() };
    let plan = PodPlan::veth(PodInputs {
        host_ifname: host_ifname(&pod, &key),
        pod_ifname: "eth0".into(),
        host_mac: HOST_MAC,
        pod_mac: Mac([2, 0, 0, 0, 1, number]),
        addresses: Addresses {
            v4: Some(Ipv4Addr::new(10, 0, 1, number)),
            v6: Some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number))),
        },
        eni_ifindex: ENI_INDEX,
        mtu: 1500,
        default_route: true,
        extra_routes: Vec::new(),
        key,
    });
    StoredAttachment { pod, phase: Phase::Ready, eni: eni_id(), plan, netns: NetnsState::Present }
}

fn eni_plan() -> EniPlan {
    EniPlan::shared(EniInputs {
        ifindex: ENI_INDEX,
        ifname: "eth1".into(),
        mtu: 1500,
        node: Addresses::default(),
        gateway_v4: Some(Ipv4Addr::new(10, 0, 1, 253)),
        gateway_v6: None,
    })
}

fn link(index: u32, mac: Option<Mac>, alias: Option<String>, kind: Option<&str>) -> Link {
    let (kind, group) = (kind.map(str::to_owned), if alias.is_some() { crate::route::LINK_GROUP } else { 0 });
    Link { index, mac, mtu: 1500, up: true, group, alias, kind, peer: None }
}

/// What the kernel holds after these steps on the node.
fn apply(state: &mut KernelState, steps: &[Step], index: u32) {
    for step in steps.iter().filter(|step| step.netns == StepNetns::Host) {
        match step.op.clone() {
            NetOp::AddVeth { host, owner, .. } => {
                state.links.insert(host.name, link(index, Some(host.mac), Some(owner), Some("veth")));
            }
            NetOp::SetUp { dev } => state.links.get_mut(&dev).unwrap().up = true,
            NetOp::SetMtu { dev, mtu } => state.links.get_mut(&dev).unwrap().mtu = mtu,
            NetOp::Sysctl { path, value } => drop(state.sysctls.insert(path, value)),
            NetOp::AddAddress { dev, address } => drop(state.addresses.insert((dev, address))),
            NetOp::AddRoute(route) => drop(state.routes.insert(route)),
            NetOp::AddNeighbour(neighbour) => drop(state.neighbours.insert(neighbour)),
            NetOp::AddRule(rule) => {
                state.rules.retain(|old| (old.priority, old.selector) != (rule.priority, rule.selector));
                state.rules.insert(rule);
            }
            NetOp::NoAddrGen { .. } => {}
            other => panic!("{other}"),
        }
    }
}

fn eni(kind: EniKind, id: &str, v4: Vec<Ipv4Addr>, v6: Vec<Ipv6Addr>) -> Eni {
    Eni {
        id: EniId::new(id),
        mac: Mac([0; 6]),
        vswitch: VSwitchId::new("vsw-1"),
        status: EniStatus::InUse,
        kind,
        instance: Some(InstanceId::new("i-1")),
        primary_v4: Ipv4Addr::new(10, 0, 1, 250),
        v4,
        v6,
        v4_prefixes: Vec::new(),
        v6_prefixes: Vec::new(),
        security_groups: Vec::new(),
        tags: BTreeMap::new(),
    }
}

/// A node with this many pods on one ENI, all as it should be.
fn agreeing(pods: u8) -> AuditSnapshot {
    let mut kernel = KernelState::default();
    kernel.links.insert("lo".into(), link(1, None, None, None));
    kernel.links.insert("eth1".into(), link(ENI_INDEX, None, None, None));
    apply(&mut kernel, &eni_plan().steps, 0);
    let attachments: Vec<StoredAttachment> = (1..=pods).map(stored).collect();
    let mut endpoints = Vec::new();
    for (stored, index) in attachments.iter().zip(POD_INDEX..) {
        apply(&mut kernel, &[stored.plan.create.clone(), stored.plan.enable.clone()].concat(), index);
        let inputs = &stored.plan.inputs;
        endpoints.push(Endpoint {
            ifindex: index,
            host_mac: inputs.host_mac,
            pod_mac: inputs.pod_mac,
            addresses: inputs.addresses,
            eni_ifindex: inputs.eni_ifindex,
            attached: Some(true),
        });
    }
    let addresses = || attachments.iter().map(|stored| stored.plan.inputs.addresses);
    let pool = StoredEni {
        id: eni_id(),
        plan: Some(eni_plan()),
        addresses: addresses().flat_map(|a| a.iter().collect::<Vec<_>>()).collect(),
    };
    let enis = vec![
        eni(EniKind::Primary, "eni-0", Vec::new(), Vec::new()),
        eni(
            EniKind::Secondary,
            "eni-1",
            addresses().filter_map(|a| a.v4).collect(),
            addresses().filter_map(|a| a.v6).collect(),
        ),
    ];
    AuditSnapshot {
        enis: vec![pool],
        nics: [ENI_INDEX].into(),
        kernel: Some(kernel),
        endpoints: Some(endpoints),
        cloud: Some(Inventory { instance: InstanceId::new("i-1"), enis }),
        attachments,
    }
}

/// Something that goes wrong with one pod or the node.
#[derive(Clone, Copy, Debug)]
struct Break(FindingKind, u8);

impl Break {
    fn apply(self, snapshot: &mut AuditSnapshot) {
        let Self(kind, number) = self;
        let stored = &mut snapshot.attachments[usize::from(number)];
        let inputs = stored.plan.inputs.clone();
        let (v4, name) = (inputs.addresses.v4.unwrap(), inputs.host_ifname);
        let stranger = IpAddr::V4(Ipv4Addr::new(10, 9, 9, number));
        let kernel = snapshot.kernel.as_mut().unwrap();
        let endpoints = snapshot.endpoints.as_mut().unwrap();
        let cloud = &mut snapshot.cloud.as_mut().unwrap().enis;
        let index = POD_INDEX + u32::from(number);
        let unlink = |kernel: &mut KernelState| {
            kernel.links.remove(&name);
            kernel.routes.retain(|route| route.dev != name);
            kernel.neighbours.retain(|neighbour| neighbour.dev != name);
        };
        match kind {
            FindingKind::PodGone => {
                stored.netns = NetnsState::Absent;
                unlink(kernel);
            }
            FindingKind::LinkMissing => unlink(kernel),
            FindingKind::LinkDiffers => {
                if let Some(link) = kernel.links.get_mut(&name) {
                    link.up = false;
                }
            }
            FindingKind::RouteMissing => kernel.routes.retain(|route| route.dst.ip() != IpAddr::V4(v4)),
            FindingKind::RuleMissing => kernel.rules.retain(|rule| rule.selector.net().ip() != IpAddr::V4(v4)),
            FindingKind::NeighbourMissing => kernel.neighbours.retain(|neighbour| neighbour.dev != name),
            FindingKind::EndpointMissing => endpoints.retain(|endpoint| endpoint.ifindex != index),
            FindingKind::EndpointDiffers => {
                endpoints.iter_mut().filter(|e| e.ifindex == index).for_each(|e| e.eni_ifindex += 1);
            }
            FindingKind::ProgramsMissing => {
                endpoints.iter_mut().filter(|e| e.ifindex == index).for_each(|e| e.attached = Some(false));
            }
            FindingKind::EniVanished => cloud.retain(|eni| eni.kind == EniKind::Primary),
            FindingKind::AddressVanished => cloud.iter_mut().for_each(|eni| eni.v4.retain(|address| *address != v4)),
            FindingKind::DuplicateAddress => {
                let mut twin = stored.clone();
                twin.plan.inputs.key.container_id = "twin".into();
                twin.phase = Phase::SettingUp;
                snapshot.attachments.push(twin);
            }
            FindingKind::NicMissing => drop(kernel.links.remove("eth1")),
            FindingKind::EniDiffers => kernel.routes.retain(|route| route.dev != "eth1"),
            FindingKind::LinkOrphan => {
                let orphan = link(900, None, Some("terway:terway/other/eth0".into()), Some("veth"));
                kernel.links.insert(format!("cali{number}"), orphan);
            }
            FindingKind::RouteOrphan => drop(kernel.routes.insert(Route::link(stranger.into(), &name))),
            FindingKind::RuleOrphan => drop(kernel.rules.insert(Rule::from_pod(stranger, 1003))),
            FindingKind::EndpointOrphan => endpoints.push(Endpoint {
                ifindex: 901,
                host_mac: HOST_MAC,
                pod_mac: HOST_MAC,
                addresses: Addresses { v4: Some(Ipv4Addr::new(10, 9, 9, number)), v6: None },
                eni_ifindex: 3,
                attached: None,
            }),
            FindingKind::AddressUnknown => {
                if let Some(eni) = cloud.iter_mut().find(|eni| eni.kind == EniKind::Secondary) {
                    eni.v4.push(Ipv4Addr::new(10, 9, 9, number));
                }
            }
        }
    }
}

#[test]
fn audit_of_consistent_state() {
    for pods in [0, 1, 7] {
        assert_eq!(findings(&agreeing(pods)), []);
    }
}

#[test]
fn audit_finds_each_kind() {
    for kind in FindingKind::ALL {
        let mut snapshot = agreeing(3);
        Break(kind, 1).apply(&mut snapshot);
        let found = findings(&snapshot);
        assert!(found.iter().any(|finding| finding.kind == kind), "{kind:?}: {found:?}");
        let others = found.iter().filter(|finding| finding.kind != kind);
        // What hangs on a link goes with it, and a missing ENI takes its pods' addresses along.
        let follow = [
            FindingKind::RouteMissing,
            FindingKind::NeighbourMissing,
            FindingKind::EndpointMissing,
            FindingKind::EniDiffers,
        ];
        for other in others {
            assert!(follow.contains(&other.kind), "{kind:?} is also taken for {other:?}");
        }
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
    }
    assert_eq!(FindingKind::ALL.iter().collect::<BTreeSet<_>>().len(), FindingKind::ALL.len());
}

#[test]
fn audit_skips_pods_in_transition() {
    for phase in [Phase::SettingUp, Phase::Releasing] {
        let mut snapshot = agreeing(2);
        Break(FindingKind::PodGone, 0).apply(&mut snapshot);
        Break(FindingKind::EndpointMissing, 0).apply(&mut snapshot);
        Break(FindingKind::RuleMissing, 0).apply(&mut snapshot);
        snapshot.attachments[0].phase = phase;
        assert_eq!(findings(&snapshot), []);
    }
}

#[test]
fn audit_ignores_implausible_observations() {
    let mut snapshot = agreeing(2);
    snapshot.attachments.iter_mut().for_each(|stored| stored.netns = NetnsState::Absent);
    snapshot.kernel = Some(KernelState::default());
    snapshot.cloud.as_mut().unwrap().enis.clear();
    assert_eq!(findings(&snapshot), []);
}

#[test]
fn audit_needs_more_than_a_missing_netns() {
    let mut snapshot = agreeing(1);
    snapshot.attachments[0].netns = NetnsState::Absent;
    assert_eq!(findings(&snapshot), []);
}

#[test]
fn audit_confirms_leftovers_twice() {
    let mut snapshot = agreeing(1);
    Break(FindingKind::LinkOrphan, 0).apply(&mut snapshot);
    Break(FindingKind::RuleMissing, 0).apply(&mut snapshot);
    let mut confirmation = Confirmation::default();
    let mut due = |snapshot: &AuditSnapshot| {
        confirmation.due(findings(snapshot)).into_iter().map(|f| f.kind).collect::<BTreeSet<_>>()
    };
    assert_eq!(due(&snapshot), [FindingKind::RuleMissing].into(), "a repair waits for nothing");
    assert_eq!(due(&snapshot), [FindingKind::RuleMissing, FindingKind::LinkOrphan].into());
    let mut blind = snapshot.clone();
    blind.kernel = None;
    assert_eq!(due(&blind), BTreeSet::new());
    assert_eq!(due(&snapshot), [FindingKind::RuleMissing].into(), "the row is broken");
    snapshot.kernel.as_mut().unwrap().links.get_mut("cali0").unwrap().index += 1;
    assert_eq!(due(&snapshot), [FindingKind::RuleMissing].into(), "another link of the same name");
}

fn breaks() -> impl Strategy<Value = Vec<Break>> {
    prop::collection::vec(
        (prop::sample::select(&FindingKind::ALL[..]), 0..4u8).prop_map(|(kind, pod)| Break(kind, pod)),
        0..6,
    )
}

fn freeing(snapshot: &AuditSnapshot) -> BTreeSet<Action> {
    findings(snapshot).into_iter().map(|finding| finding.action).filter(Action::removes).collect()
}

proptest! {
    /// Taking sources away takes actions away, and never adds one that removes.
    #[test]
    fn audit_without_observation_frees_nothing(breaks in breaks(), kernel: bool, endpoints: bool, cloud: bool, netns: bool) {
        let mut snapshot = agreeing(4);
        breaks.iter().for_each(|one| one.apply(&mut snapshot));
        let whole = freeing(&snapshot);
        if kernel { snapshot.kernel = None; }
        if endpoints { snapshot.endpoints = None; }
        if cloud { snapshot.cloud = None; }
        if netns { snapshot.attachments.iter_mut().for_each(|stored| stored.netns = NetnsState::Unknown); }
        let blind = freeing(&snapshot);
        prop_assert!(blind.is_subset(&whole), "{:?}", blind.difference(&whole).collect::<Vec<_>>());
        prop_assert!(!(kernel || netns) || !blind.contains(&Action::Release));
        prop_assert!(!kernel || blind.iter().all(|action| matches!(action, Action::RemoveEndpoint(..))));
        prop_assert!(!endpoints || !blind.iter().any(|action| matches!(action, Action::RemoveEndpoint(..))));
    }

    /// Nothing that an attachment of the store accounts for is ever removed.
    #[test]
    fn audit_keeps_quarantined_addresses(breaks in breaks()) {
        let mut snapshot = agreeing(4);
        breaks.iter().for_each(|one| one.apply(&mut snapshot));
        let addresses: BTreeSet<IpAddr> =
            snapshot.attachments.iter().flat_map(|stored| stored.plan.inputs.addresses.iter().collect::<Vec<_>>()).collect();
        let aliases: BTreeSet<String> = snapshot.attachments.iter().map(|stored| alias(&stored.plan.inputs.key)).collect();
        for action in freeing(&snapshot) {
            let stored = match &action {
                Action::Remove(Orphan::Link { alias, .. }) => alias.as_ref().is_some_and(|a| aliases.contains(a)),
                Action::Remove(Orphan::Route(route)) => addresses.contains(&route.dst.ip()),
                Action::Remove(Orphan::Rule(rule)) => addresses.contains(&rule.selector.net().ip()),
                Action::RemoveEndpoint(_, of) => !of.is_disjoint(&addresses),
                _ => false,
            };
            prop_assert!(!stored, "{action:?}");
        }
    }

    /// Doing every repair once leaves nothing to repair.
    #[test]
    fn audit_repairs_converge(breaks in breaks()) {
        let mut snapshot = agreeing(4);
        breaks.iter().for_each(|one| one.apply(&mut snapshot));
        for finding in findings(&snapshot) {
            let stored = snapshot.attachments.iter().find(|stored| Some(&stored.plan.inputs.key) == finding.key.as_ref());
            match finding.action {
                Action::Repair(step) => apply(snapshot.kernel.as_mut().unwrap(), &[step], 0),
                Action::RestoreEndpoint(ifindex) => {
                    let inputs = stored.unwrap().plan.inputs.clone();
                    let endpoints = snapshot.endpoints.as_mut().unwrap();
                    endpoints.retain(|endpoint| endpoint.ifindex != ifindex);
                    endpoints.push(Endpoint {
                        ifindex,
                        host_mac: inputs.host_mac,
                        pod_mac: inputs.pod_mac,
                        addresses: inputs.addresses,
                        eni_ifindex: inputs.eni_ifindex,
                        attached: Some(true),
                    });
                }
                _ => {}
            }
        }
        let left: Vec<_> = findings(&snapshot).into_iter().filter(|finding| finding.action.name() == "repair").collect();
        prop_assert!(left.is_empty(), "{left:?}");
    }
}
