//! Random histories: after every single operation each packet meets the world before the event or the world after it, and nothing else;
//! at the end the maps hold what they would if everything had come at once, and nothing besides.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use terway_core::objects::{ObjectName, Phase};
use terway_core::policy::{Compiler, Event, FlowScope, Maps, Op, Packet};
use terway_oracle::cluster_state::{ClusterState, LocalEndpoint};
use terway_oracle::policy::expected_verdicts;

use crate::counted::Counted;
use crate::dice::Dice;
use crate::making::{
    ClusterInputs as _, HOMES, NAMESPACES, attach, cluster_policy, elsewhere, home, labels, namespace, pod, pod_name,
    policy, random,
};
use crate::random::{compile, finder, said};
use crate::setting;

/// Changes the world, and tells how the compiler hears of it; none when the dice chose something that cannot happen.
pub(crate) fn change(world: &mut ClusterState, dice: &mut Dice, uid: &mut usize) -> Option<Event> {
    let some_pod = |world: &ClusterState, dice: &mut Dice| {
        let names: Vec<&ObjectName> = world.pods.keys().collect();
        (!names.is_empty()).then(|| (*dice.pick(&names)).clone())
    };
    let tell = |world: &ClusterState, name: ObjectName| {
        let pod = world.pods.get(&name).cloned().map(Arc::new);
        Event::Pod(name, pod)
    };
    Some(match dice.below(100) {
        0..=17 => {
            let name = some_pod(world, dice)?;
            world.pods.get_mut(&name)?.meta.labels = labels(dice);
            tell(world, name)
        }
        18..=22 => {
            let name = some_pod(world, dice)?;
            let pod = world.pods.get_mut(&name)?;
            pod.phase = *dice.pick(&[Phase::Running, Phase::Succeeded, Phase::Failed]);
            if pod.phase == Phase::Running && !lonely(world, &name) {
                world.pods.get_mut(&name)?.phase = Phase::Failed;
            }
            tell(world, name)
        }
        23..=27 => {
            let name = some_pod(world, dice)?;
            world.pods.remove(&name);
            tell(world, name)
        }
        28..=39 => {
            let name = pod_name(dice);
            *uid += 1;
            let at = dice.below(HOMES);
            let new = pod(dice, &name, *uid, &[at]);
            world.pods.insert(name.clone(), new);
            if !lonely(world, &name) {
                world.pods.get_mut(&name)?.phase = Phase::Succeeded;
            }
            tell(world, name)
        }
        40..=46 => {
            let name: Arc<str> = Arc::from(dice.word(&NAMESPACES));
            if dice.chance(15) {
                world.namespaces.remove(&name);
            } else {
                world.namespaces.insert(Arc::clone(&name), namespace(dice, &name));
            }
            let object = world.namespaces.get(&name).cloned().map(Arc::new);
            Event::Namespace(name, object)
        }
        47..=63 => {
            let namespace = dice.word(&NAMESPACES);
            let name = ObjectName::new(namespace, dice.word(&["p0", "p1", "p2"]));
            if dice.chance(35) {
                world.policies.remove(&name)?;
            } else {
                world.policies.insert(name.clone(), policy(dice, &name));
            }
            let object = world.policies.get(&name).cloned().map(Arc::new);
            Event::NetworkPolicy(name, object)
        }
        64..=73 => {
            let name = ObjectName::new("", dice.word(&["c0", "c1", "c2"]));
            if dice.chance(50) {
                world.cluster.remove(&name)?;
            } else {
                world.cluster.insert(name.clone(), cluster_policy(dice, &name));
            }
            let object = world.cluster.get(&name).cloned().map(Arc::new);
            Event::ClusterNetworkPolicy(name, object)
        }
        74..=86 => {
            // The address may still be that of a pod that ended, or of one whose object is out of date.
            let at = dice.below(HOMES);
            let slot = 1 + dice.below(5) as u32;
            if world.locals.contains_key(&slot) || world.locals.values().any(|l| l.addresses.contains(&home(at)[0])) {
                return None;
            }
            let known = some_pod(world, dice).filter(|_| dice.chance(85));
            let (pod, of) = match known {
                Some(name) => (name.clone(), world.pods.get(&name)?.meta.uid.to_string()),
                None => (pod_name(dice), (*uid + 1).to_string()),
            };
            if world.pods.get(&pod).is_some_and(|pod| pod.host_network) || world.locals.values().any(|l| l.pod == pod) {
                return None;
            }
            let local = LocalEndpoint { pod, uid: of, addresses: home(at).to_vec() };
            let event = attach(slot, &local);
            world.locals.insert(slot, local);
            event
        }
        87..=92 => {
            let slots: Vec<u32> = world.locals.keys().copied().collect();
            if slots.is_empty() {
                return None;
            }
            let slot = *dice.pick(&slots);
            let gone = world.locals.remove(&slot)?;
            // Its address may be somebody's who had to stand back.
            if world.pods.iter().filter(|(_, p)| alive(p) && gone.addresses.iter().any(|a| p.ips.contains(a))).count()
                > 1
            {
                world.locals.insert(slot, gone);
                return None;
            }
            Event::Detach { slot }
        }
        93..=95 => {
            world.enforce = !world.enforce;
            Event::Enforce(world.enforce)
        }
        _ => {
            let all: Vec<IpAddr> = elsewhere().into_iter().take(2).filter(|_| dice.chance(70)).collect();
            world.node = all.iter().copied().collect();
            Event::NodeAddresses(all)
        }
    })
}

fn alive(pod: &terway_core::objects::Pod) -> bool {
    !pod.host_network && !matches!(pod.phase, Phase::Succeeded | Phase::Failed)
}

/// Whether no other living pod has one of its addresses: of two that say so, the API server knows no better than we do.
fn lonely(world: &ClusterState, name: &ObjectName) -> bool {
    let Some(pod) = world.pods.get(name) else { return true };
    let mut others = world.pods.iter().filter(|(other, p)| *other != name && alive(p));
    !alive(pod) || others.all(|(_, p)| pod.ips.iter().all(|address| !p.ips.contains(address)))
}

struct Checked {
    packet: Packet,
    old: [Option<bool>; 2],
    new: [Option<bool>; 2],
}

/// One side of a packet, or both, is what it was or what it will be.
fn fits(found: [Option<bool>; 2], checked: &Checked, apart: bool) -> bool {
    if apart {
        // The local pods change as well: a side that only one of the worlds knows is decided by nobody meanwhile.
        return (0..2).all(|n| found[n].is_none() || found[n] == checked.old[n] || found[n] == checked.new[n]);
    }
    found == checked.old || found == checked.new
}

fn run(seed: u64, steps: usize) {
    let mut dice = Dice::new(seed);
    let mut world = random(&mut dice);
    let (mut compiler, mut maps) = compile(&world);
    let mut uid = 100;
    let mut counted = Counted::default();
    counted.follow(&mut compiler, "at first");
    for step in 0..steps {
        let before = world.clone();
        let Some(event) = change(&mut world, &mut dice, &mut uid) else {
            world = before;
            continue;
        };
        // Policies that come together come into force together.
        let mut events = vec![event];
        while events.iter().all(Event::is_policy_change) && dice.chance(40) {
            let so_far = world.clone();
            match change(&mut world, &mut dice, &mut uid) {
                Some(event) if event.is_policy_change() => events.push(event),
                _ => {
                    world = so_far;
                    break;
                }
            }
        }
        let label = format!("seed {seed}, step {step}: {events:?}");
        let apart = events.iter().any(|event| matches!(event, Event::Attach { .. } | Event::Detach { .. }));
        // An interface is found by nobody until its operations have run, and no more when those of its end begin.
        let mut meanwhile = before.clone();
        meanwhile.locals.retain(|slot, _| world.locals.contains_key(slot));
        let (packets, found_now) = (world.packets(), finder(&meanwhile));
        let packets: Vec<Checked> = packets
            .into_iter()
            .map(|packet| Checked {
                old: expected_verdicts(&before, &packet),
                new: expected_verdicts(&world, &packet),
                packet,
            })
            .filter(|checked| checked.old != checked.new || dice.chance(6))
            .collect();
        let ops = compiler.steps(events);
        counted.follow(&mut compiler, &label);
        let mut gates: Vec<(usize, bool)> = vec![(maps.version, maps.enforce)];
        for op in &ops {
            maps.apply(op);
            if *op == Op::RcuBarrier {
                gates.clear();
            }
            let now = (maps.version, maps.enforce);
            if !gates.contains(&now) {
                gates.push(now);
            }
            // Programs that read the gate before this operation may read everything else after it.
            for gate in &gates {
                (maps.version, maps.enforce) = *gate;
                for checked in &packets {
                    let found = said(maps.verdict(&checked.packet, &found_now, maps.version));
                    assert!(
                        fits(found, checked, apart),
                        "{label}\nafter {op:?} of {ops:#?}\n{:?}: maps say {found:?}, before {:?}, then {:?}\n{before:#?}",
                        checked.packet,
                        checked.old,
                        checked.new
                    );
                }
            }
            (maps.version, maps.enforce) = now;
        }
        counted.covers(&maps, &world, &label);
        check_stale(&ops, &before, &world, &packets, &label);
        agree(&maps, &world, &packets, &label);
        if dice.chance(30) {
            for op in compiler.run_deferred() {
                maps.apply(&op);
                agree(&maps, &world, &packets, &format!("{label}, settling by {op:?}"));
            }
            counted.follow(&mut compiler, &label);
            counted.covers(&maps, &world, &format!("{label}, settled"));
        }
        if dice.chance(2) {
            // The daemon starts anew, over maps that may not be settled.
            let mut events = world.events();
            for n in (1..events.len()).rev() {
                events.swap(n, dice.below(n + 1));
            }
            let (next, ops) = Compiler::take_over(&maps, events);
            compiler = next;
            counted.taken_over(&mut compiler, &maps, &label);
            for op in ops {
                maps.apply(&op);
                agree(&maps, &world, &packets, &format!("{label}, taking over by {op:?}"));
            }
            clean(&compiler, &maps, &world, &label);
            counted.covers(&maps, &world, &label);
        }
    }
    let label = format!("seed {seed}, at the end");
    for _ in 0..2 {
        compiler.run_deferred().iter().for_each(|op| maps.apply(op));
    }
    assert!(!compiler.has_deferred(), "{label}");
    let packets = world.packets();
    let (_, fresh) = compile(&world);
    let local = finder(&world);
    for packet in &packets {
        let expected = expected_verdicts(&world, packet);
        assert_eq!(
            said(maps.verdict(packet, &local, maps.version)),
            expected,
            "{label}, incremental: {packet:?}\n{world:#?}"
        );
        assert_eq!(
            said(fresh.verdict(packet, &local, fresh.version)),
            expected,
            "{label}, at once: {packet:?}\n{world:#?}"
        );
    }
    clean(&compiler, &maps, &world, &label);
}

fn agree(maps: &Maps, world: &ClusterState, packets: &[Checked], label: &str) {
    let local = finder(world);
    for checked in packets {
        let found = said(maps.verdict(&checked.packet, &local, maps.version));
        assert_eq!(found, checked.new, "{label}\n{:?}\n{world:#?}", checked.packet);
    }
}

/// Flows whose verdict changes are told to be stale.
fn check_stale(ops: &[Op], before: &ClusterState, world: &ClusterState, packets: &[Checked], label: &str) {
    let stale: BTreeSet<FlowScope> =
        ops.iter().filter_map(|op| if let Op::Revalidate(stale) = op { Some(*stale) } else { None }).collect();
    let (old, new) = (finder(before), finder(world));
    for checked in packets.iter().filter(|c| c.old != c.new) {
        let ends = [checked.packet.source, checked.packet.destination];
        // The flows of an interface that comes or goes are ended by the endpoint's own epoch.
        let moved = ends.iter().any(|a| old(*a) != new(*a));
        let hit = |s: &FlowScope| match s {
            FlowScope::All => true,
            FlowScope::Address(address) => ends.contains(address),
            FlowScope::Endpoint(slot) => ends.iter().any(|a| new(*a) == Some(*slot)),
        };
        assert!(moved || stale.iter().any(hit), "{label}\n{:?} changed, stale are only {stale:?}", checked.packet);
    }
}

/// The maps hold what the compiler wants, the same in both phases, and nothing else.
pub(crate) fn clean(compiler: &Compiler, maps: &Maps, world: &ClusterState, label: &str) {
    let mut found = maps.clone();
    found.endpoints.retain(|slot, _| world.locals.contains_key(slot));
    let wanted = compiler.maps();
    assert_eq!(found.addresses, wanted.addresses, "{label}");
    assert_eq!(found.cidrs, wanted.cidrs, "{label}");
    assert_eq!(found.peers, wanted.peers, "{label}");
    assert_eq!(found.port_tables, wanted.port_tables, "{label}");
    assert_eq!(found.endpoints, wanted.endpoints, "{label}");
    assert_eq!((found.version, found.enforce), (wanted.version, wanted.enforce), "{label}");
    assert_eq!(found, wanted, "{label}");
}

#[test]
fn policy_updates_have_no_intermediate_verdict() {
    let histories = setting("POLICY_HISTORIES", 15);
    let seed = setting("POLICY_SEED", 1);
    for n in 0..histories {
        run(seed.wrapping_add(n).wrapping_mul(0x9e37_79b9), 25);
    }
}
