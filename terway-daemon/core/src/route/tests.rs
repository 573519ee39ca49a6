//! Golden plans, and the properties every plan has: it fits the kernel's rules, and its teardown leaves nothing, from any half state.

use std::net::IpAddr;

use proptest::prelude::*;

use super::state::model::World;
use super::*;
use crate::ident::{Addresses, Mac};

fn key(container_id: &str, ifname: &str) -> AttachmentKey {
    AttachmentKey { network: "terway".into(), container_id: container_id.into(), ifname: ifname.into() }
}

fn addresses(v4: bool, v6: bool) -> Addresses {
    Addresses { v4: v4.then(|| "10.0.1.7".parse().unwrap()), v6: v6.then(|| "fd00:1::7".parse().unwrap()) }
}

fn pod(addresses: Addresses) -> PodInputs {
    let pod = PodRef { namespace: "default".into(), name: "nginx-0".into(), uid: String::new() };
    let key = key("abc", "eth0");
    PodInputs {
        host_ifname: host_ifname(&pod, &key),
        pod_ifname: "eth0".into(),
        host_mac: Mac([2, 0, 0, 0, 0, 1]),
        pod_mac: Mac([2, 0, 0, 0, 0, 2]),
        addresses,
        eni_ifindex: 3,
        mtu: 1500,
        default_route: true,
        extra_routes: Vec::new(),
        key,
    }
}

fn eni(v4: bool, v6: bool) -> EniInputs {
    EniInputs {
        ifindex: 3,
        ifname: "eth1".into(),
        mtu: 1500,
        node: Addresses { v4: v4.then(|| "10.0.0.9".parse().unwrap()), v6: v6.then(|| "fd00:1::9".parse().unwrap()) },
        gateway_v4: v4.then(|| "10.0.1.253".parse().unwrap()),
        gateway_v6: v6.then(|| "fd00:1::fffd".parse().unwrap()),
    }
}

fn text<'a>(steps: impl IntoIterator<Item = &'a Step>) -> String {
    steps.into_iter().map(|step| format!("{step}\n")).collect()
}

/// A node whose ENI `eth1` is plugged in and not yet set up.
fn node() -> World {
    let mut world = World::default();
    let link = Link { index: 3, mac: None, mtu: 1500, up: false, group: 0, alias: None, kind: None, peer: None };
    world.host.links.insert("eth1".into(), link);
    world
}

fn run<'a>(world: &mut World, steps: impl IntoIterator<Item = &'a Step>) {
    for step in steps {
        world.apply(step);
    }
}

fn observed(world: &World) -> ObservedState {
    ObservedState { host: world.host.clone(), pod: Some(world.pod.clone()) }
}

#[test]
fn host_interface_names_as_calico() {
    let pod = PodRef { namespace: "default".into(), name: "nginx-0".into(), uid: String::new() };
    // printf default.nginx-0 | sha1sum; printf default.nginx-0eth1 | sha1sum
    assert_eq!(host_ifname(&pod, &key("c", "eth0")), "calic048fd9a750");
    assert_eq!(host_ifname(&pod, &key("c", "eth1")), "cali898d765620e");
    // printf abc | sha1sum
    assert_eq!(host_ifname(&PodRef::default(), &key("abc", "eth0")), "calia9993e36470");
}

#[test]
fn interface_aliases() {
    assert_eq!(alias(&key("abc", "eth0")), "terway:terway/abc/eth0");
    let (long, other) = (alias(&key(&"a".repeat(300), "eth0")), alias(&key(&"a".repeat(301), "eth0")));
    assert!(long.len() <= ALIAS_MAX && other.len() <= ALIAS_MAX);
    assert_ne!(long, other);
}

#[test]
fn golden_pod_dual() {
    let plan = PodPlan::veth(pod(addresses(true, true)));
    let down = plan.teardown();
    insta::assert_snapshot!(
        "pod_dual",
        format!(
            "create\n{}enable\n{}detach\n{}delete\n{}",
            text(&plan.create),
            text(&plan.enable),
            text(&down.detach),
            text(&down.delete)
        )
    );
}

#[test]
fn golden_pod_v4_second_interface() {
    let mut inputs = pod(addresses(true, false));
    inputs.default_route = false;
    inputs.extra_routes = vec!["192.168.7.1/24".parse().unwrap(), "fd00:2::/64".parse().unwrap()];
    insta::assert_snapshot!("pod_v4_second_interface", text(PodPlan::veth(inputs).steps()));
}

#[test]
fn golden_pod_v6() {
    insta::assert_snapshot!("pod_v6", text(PodPlan::veth(pod(addresses(false, true))).steps()));
}

#[test]
fn golden_eni_and_node() {
    let (dual, v4) = (EniPlan::shared(eni(true, true)), EniPlan::shared(eni(true, false)));
    insta::assert_snapshot!("eni_dual", format!("{}\nback\n{}", text(&dual.steps), text(&dual.teardown())));
    insta::assert_snapshot!("eni_v4", text(&v4.steps));
    let inputs = NodeInputs { v4: true, v6: true, ra_links: vec!["eth0".into()] };
    insta::assert_snapshot!("node", text(&NodePlan::forwarding(&inputs).steps));
}

#[test]
fn plans_survive_json() {
    let plan = PodPlan::veth(pod(addresses(true, true)));
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<PodPlan>(&json).unwrap(), plan);
}

#[test]
fn diff_is_empty_after_the_plan_and_names_each_missing_piece() {
    let plan = PodPlan::veth(pod(addresses(true, true)));
    let mut world = node();
    run(&mut world, plan.steps());
    assert_eq!(diff(plan.steps(), &observed(&world)), []);

    // Each thing that is gone is one difference, and repairing it brings the world back.
    let whole = world.clone();
    for step in plan.steps() {
        let Some(inverse) = step.op.inverse() else { continue };
        let mut broken = whole.clone();
        broken.apply(&Step { netns: step.netns, op: inverse.clone() });
        let found = diff(plan.steps(), &observed(&broken));
        assert!(!found.is_empty(), "{inverse} goes unnoticed");
        if matches!(inverse, NetOp::DelLink { .. }) {
            continue;
        }
        run(&mut broken, found.iter().filter_map(|difference| difference.repair.as_ref()));
        assert_eq!(broken, whole, "after {inverse}: {found:#?}");
    }
}

#[test]
fn diff_reports_changed_addresses_and_foreign_owners() {
    let plan = PodPlan::veth(pod(addresses(true, false)));
    let mut world = node();
    run(&mut world, plan.steps());
    let name = plan.inputs.host_ifname.clone();

    let mut udev = world.clone();
    udev.host.links.get_mut(&name).unwrap().mac = Some(Mac([6; 6]));
    let found = diff(plan.steps(), &observed(&udev));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        found[0].message,
        format!("on the node, {name} has the MAC address 06:06:06:06:06:06 instead of 02:00:00:00:00:01")
    );
    run(&mut udev, found[0].repair.as_ref());
    assert_eq!(udev, world);

    let mut other = world.clone();
    other.host.links.get_mut(&name).unwrap().alias = Some("terway:x".into());
    let found = diff(plan.steps(), &observed(&other));
    assert_eq!((found.len(), found[0].repair.as_ref()), (1, None), "{found:?}");

    let gone = ObservedState { host: world.host.clone(), pod: None };
    let found = diff(plan.steps(), &gone);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].message, "the pod's network namespace is gone");
}

#[test]
fn leftover_state_is_recognised() {
    let plan = PodPlan::veth(pod(addresses(true, true)));
    let mut world = node();
    run(&mut world, EniPlan::shared(eni(true, true)).steps.iter().chain(plan.steps()));
    // Not ours: another's veth with a similar name, another's rule of our priorities but of a whole subnet, another's table.
    let foreign = Link { group: 0, alias: Some("calico".into()), ..world.host.links[&plan.inputs.host_ifname].clone() };
    world.host.links.insert("cali00000000000".into(), foreign);
    world.host.routes.insert(Route::link("10.9.9.9/32".parse().unwrap(), "cali00000000000"));
    let subnet: ipnetwork::IpNetwork = "10.9.0.0/16".parse().unwrap();
    world.host.rules.insert(Rule { priority: 512, selector: Selector::To(subnet), table: TABLE_MAIN });
    world.host.routes.insert(Route::via("0.0.0.0/0".parse().unwrap(), "10.0.0.1".parse().unwrap(), "eth1", 1700));

    let all_known = KnownResources {
        aliases: [alias(&plan.inputs.key)].into(),
        addresses: plan.inputs.addresses.iter().collect(),
        enis: [3].into(),
    };
    assert_eq!(orphans(&world.host, &all_known), []);
    let found = orphans(&world.host, &KnownResources::default());
    let (mut links, mut routes, mut rules) = (0, 0, 0);
    for orphan in &found {
        match orphan {
            Orphan::Link { name, .. } => {
                assert_eq!(*name, plan.inputs.host_ifname);
                links += 1;
            }
            Orphan::Route(_) => routes += 1,
            Orphan::Rule(_) => rules += 1,
        }
    }
    assert_eq!((links, routes, rules), (1, 4, 4), "{found:#?}");
}

proptest! {
    #[test]
    fn teardown_reverts_any_prefix_of_the_plan(
        v4: bool, v6: bool, default_route: bool, extra: bool, node_addresses: bool, cut in 0usize..40, twice: bool,
    ) {
        prop_assume!(v4 || v6);
        let mut inputs = pod(addresses(v4, v6));
        inputs.default_route = default_route;
        if extra {
            inputs.extra_routes = vec!["192.168.0.0/16".parse().unwrap(), "fd00:9::/48".parse().unwrap()];
        }
        let mut eni_inputs = eni(v4, v6);
        if !node_addresses {
            eni_inputs.node = Addresses::default();
        }
        let (eni, plan) = (EniPlan::shared(eni_inputs), PodPlan::veth(inputs));

        let mut bare = node();
        let start = bare.clone();
        run(&mut bare, &eni.steps);
        let before = bare.clone();
        let mut world = bare;
        run(&mut world, plan.steps().take(cut));
        let down = plan.teardown();
        for _ in 0..=usize::from(twice) {
            run(&mut world, down.detach.iter());
            // Unreachable already: no route, rule or neighbour speaks of the pod.
            let pod: Vec<IpAddr> = plan.inputs.addresses.iter().collect();
            prop_assert!(!world.host.routes.iter().any(|route| pod.contains(&route.dst.ip())));
            prop_assert!(!world.host.rules.iter().any(|rule| pod.contains(&rule.selector.net().ip())));
        }
        run(&mut world, down.delete.iter());
        run(&mut world, down.delete.iter());
        prop_assert_eq!(&world.host, &before.host);
        prop_assert!(world.pod.links.is_empty() && world.pod.routes.is_empty() && world.pod.neighbours.is_empty());

        run(&mut world, &eni.teardown());
        world.host.sysctls.clear();
        prop_assert_eq!(&world.host, &start.host);
    }
}
