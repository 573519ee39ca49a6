//! Failed map operations: endpoints whose sets are incomplete are in lockdown, all others are as their policies say, and after retries the maps are as
//! compiled.

use std::collections::BTreeSet;

use serde_json::json;
use terway_core::objects::{Kind, ObjectKey, ObjectName};
use terway_core::policy::{Compiler, Entry, Event, Maps, MatchedRule, NOT_PROGRAMMED, Op};
use terway_oracle::cluster_state::ClusterState;
use terway_oracle::policy::expected_verdicts;

use crate::dice::Dice;
use crate::fixture::Node;
use crate::history::{change, clean};
use crate::making::{ClusterInputs as _, random};
use crate::random::{compile, finder, said};
use crate::setting;

/// Which operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Faults {
    /// Those on sets and port tables.
    Sets,
    /// Those on identities of addresses and CIDRs as well.
    All,
}

/// Applies an operation, or fails so many times in a hundred; a port table may then be there in part.
fn apply(maps: &mut Maps, op: &Op, faults: Faults, percent: usize, dice: &mut Dice) -> Result<(), String> {
    let may_fail = match Entry::of(op) {
        Some(Entry::Peer(..) | Entry::PortTable(_)) => true,
        Some(Entry::Cidr(_) | Entry::Address(_)) => faults == Faults::All,
        None => false,
    };
    if !may_fail || !dice.chance(percent) {
        maps.apply(op);
        return Ok(());
    }
    if let Op::PutPortTable { table, entries } = op
        && dice.chance(50)
    {
        maps.port_tables.insert(*table, entries.iter().take(entries.len() / 2).copied().collect());
    }
    Err("no room".to_owned())
}

/// Endpoints in lockdown never pass what policies deny; all others are decided as the documentation says.
fn check(compiler: &Compiler, maps: &Maps, world: &ClusterState, label: &str) {
    let locked: BTreeSet<ObjectName> = compiler.locked_pods().into_iter().collect();
    let local = finder(world);
    let is_locked = |slot: Option<u32>| {
        slot.and_then(|slot| world.locals.get(&slot)).is_some_and(|local| locked.contains(&local.pod))
    };
    for packet in world.packets() {
        let found = said(maps.verdict(&packet, &local, maps.version));
        let expected = expected_verdicts(world, &packet);
        for (side, end) in [packet.source, packet.destination].into_iter().enumerate() {
            let closed = is_locked(local(end)) && found[side] == Some(false);
            assert!(
                closed || found[side] == expected[side],
                "{label}\n{packet:?}, side {side}: maps say {found:?}, oracle says {expected:?}, locked {locked:?}"
            );
        }
    }
}

fn run(seed: u64, steps: usize, faults: Faults) -> usize {
    let mut dice = Dice::new(seed);
    let mut world = random(&mut dice);
    let (mut compiler, mut maps) = compile(&world);
    let (mut uid, mut lockdowns) = (100, 0);
    for step in 0..steps {
        let before = world.clone();
        let Some(event) = change(&mut world, &mut dice, &mut uid) else {
            world = before;
            continue;
        };
        let label = format!("seed {seed}, step {step}: {event:?}");
        let percent = *dice.pick(&[0, 5, 30, 100]);
        let ops = compiler.step(event);
        compiler.execute(ops, &mut |op| apply(&mut maps, op, faults, percent, &mut dice)).unwrap();
        lockdowns += usize::from(!compiler.locked_pods().is_empty());
        if faults == Faults::Sets {
            check(&compiler, &maps, &world, &label);
        }
        if dice.chance(30) {
            let ops = compiler.run_deferred();
            compiler.execute(ops, &mut |op| apply(&mut maps, op, faults, percent, &mut dice)).unwrap();
            if faults == Faults::Sets {
                check(&compiler, &maps, &world, &format!("{label}, deferred operations"));
            }
        }
        if dice.chance(30) {
            compiler.retry(&mut |op| apply(&mut maps, op, faults, percent, &mut dice)).unwrap();
            if faults == Faults::Sets {
                check(&compiler, &maps, &world, &format!("{label}, retry"));
            }
        }
    }
    let label = format!("seed {seed}, {faults:?}, at the end");
    for _ in 0..2 {
        compiler.retry(&mut |op| apply(&mut maps, op, faults, 0, &mut dice)).unwrap();
        let ops = compiler.run_deferred();
        compiler.execute(ops, &mut |op| apply(&mut maps, op, faults, 0, &mut dice)).unwrap();
    }
    assert!(compiler.is_applied() && compiler.locked_pods().is_empty(), "{label}: {:?}", compiler.unapplied_objects());
    assert!(compiler.unapplied_objects().is_empty(), "{label}");
    check(&compiler, &maps, &world, &label);
    clean(&compiler, &maps, &world, &label);
    lockdowns
}

#[test]
fn failed_policy_operations_quarantine_their_endpoints() {
    let histories = setting("POLICY_HISTORIES", 15);
    let seed = setting("POLICY_SEED", 1);
    let mut lockdowns = 0;
    for n in 0..histories {
        let seed = seed.wrapping_add(n).wrapping_mul(0x9e37_79b9);
        lockdowns += run(seed, 25, Faults::Sets);
        run(seed ^ 0x5555, 25, Faults::All);
    }
    assert!(lockdowns > 0, "no history had a lockdown: this proves nothing");
}

/// Two pods with a policy each, and one without; the first policy then does not fit into the maps.
fn node_with_a_policy_that_does_not_fit() -> Node {
    let mut node = Node::new();
    for pod in ["x/a1", "x/b2", "x/c3"] {
        node.local(pod, json!({"app": pod[2..3]}));
    }
    let from_c = json!([{"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]}]);
    node.policy("x/of-b", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": from_c}));
    node.fails = |op| matches!(op, Op::PutPeer { .. });
    node.policy("x/of-a", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": from_c}));
    node
}

#[test]
fn policy_beyond_map_capacity_quarantines_its_pods() {
    let mut node = node_with_a_policy_that_does_not_fit();
    assert!(!node.tcp("x/b2", "x/a1", 80), "denied by the policy");
    assert!(!node.tcp("x/c3", "x/a1", 80), "allowed by the policy, but its entry is missing");
    assert!(node.tcp("x/a1", "x/c3", 80), "no policy restricts its egress");
    assert!(node.tcp("x/c3", "x/b2", 80) && !node.tcp("x/a1", "x/b2", 80), "another policy is in force");
    assert_eq!(node.compiler.locked_pods(), [ObjectName::new("x", "a1")]);
    let key = ObjectKey { kind: Kind::NetworkPolicy, name: ObjectName::new("x", "of-a") };
    let unapplied = node.compiler.unapplied_objects();
    assert_eq!(unapplied.keys().collect::<Vec<_>>(), [&key]);
    assert_eq!(node.compiler.rule(NOT_PROGRAMMED), Some(&MatchedRule::NotProgrammed));

    node.retry();
    assert!(!node.tcp("x/c3", "x/a1", 80), "there still is no room");
    node.fails = |_| false;
    node.retry();
    assert!(node.compiler.is_applied() && node.compiler.locked_pods().is_empty());
    assert!(node.tcp("x/c3", "x/a1", 80) && !node.tcp("x/b2", "x/a1", 80));
}

#[test]
fn removed_policy_ends_quarantine() {
    let mut node = node_with_a_policy_that_does_not_fit();
    node.delete(Kind::NetworkPolicy, "x/of-a");
    assert!(node.compiler.locked_pods().is_empty() && node.tcp("x/b2", "x/a1", 80));
    node.retry();
    assert!(node.compiler.is_applied(), "{:?}", node.compiler.unapplied_objects());
}

#[test]
fn operations_behind_a_failed_control_word_wait_and_keep_their_order() {
    let mut node = Node::new();
    node.local("x/a1", json!({"app": "a"}));
    node.local("x/b2", json!({"app": "b"}));
    let (compiler, mut maps) = (&mut node.compiler, node.maps.clone());
    let off = compiler.step(Event::Enforce(false));
    let no_control_word =
        |op: &Op| if matches!(op, Op::SetControlWord { .. }) { Err("gone".to_owned()) } else { Ok(()) };
    let halted = compiler.execute(off, &mut |op| no_control_word(op).map(|()| maps.apply(op))).unwrap_err();
    assert_eq!((halted.error.as_str(), compiler.is_applied(), maps.enforce), ("gone", false, true));
    let on = compiler.step(Event::Enforce(true));
    let mut written = Vec::new();
    let mut note = |op: &Op| {
        maps.apply(op);
        if let Op::SetControlWord { enforce, .. } = op {
            written.push(*enforce);
        }
        Ok(())
    };
    compiler.execute(on, &mut note).unwrap();
    assert_eq!(written, [false, true]);
    assert!(compiler.is_applied() && maps.enforce);
}
