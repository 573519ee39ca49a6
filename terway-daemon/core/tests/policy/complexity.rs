//! What a change takes, counted: it follows from what it changes, not from how big the cluster is. Times rot unnoticed with the machine they
//! are taken on; these counts fail.

use std::collections::BTreeMap;

use serde_json::json;
use terway_core::policy::{Compiler, Op};
use terway_oracle::large_cluster::{Cluster, network_policy};

/// Per change of a kind: operations on the maps, questions to selectors, questions to sets; the most of any.
type Most = [u64; 3];

fn most(spaces: usize) -> BTreeMap<&'static str, Most> {
    let cluster = Cluster { spaces };
    let (mut compiler, _) = Compiler::new();
    let pods = (0..spaces).flat_map(|space| cluster.pods(space));
    for event in cluster.rules().into_iter().chain(pods).chain(cluster.interfaces()) {
        compiler.step(event);
    }
    compiler.run_deferred();
    let mut all = BTreeMap::new();
    for changes in cluster.changes() {
        let most: &mut Most = all.entry(changes.kind).or_default();
        for event in changes.events {
            let before = compiler.effort();
            let ops = compiler.step(event);
            let after = compiler.effort();
            let operations = ops.iter().filter(|op| !matches!(op, Op::Revalidate(_) | Op::RcuBarrier)).count() as u64;
            let now = [
                operations,
                after.selector_evaluations - before.selector_evaluations,
                after.set_evaluations - before.set_evaluations,
            ];
            most.iter_mut().zip(now).for_each(|(most, now)| *most = now.max(*most));
            compiler.run_deferred();
        }
    }
    all
}

#[test]
fn change_visits_only_what_it_affects() {
    let (small, large) = (most(120), most(240));
    for (kind, [operations, selectors, answers]) in &large {
        println!("{kind:<28} {operations:>6} operations {selectors:>6} selectors {answers:>6} answers");
        // A set may be asked about what it then does not speak of, but not often; only a block that lets everybody in leaves nothing to say.
        let idle = *kind == "block_of_all_pods";
        assert!(idle || *answers <= 2 * operations + 400, "{kind}: {answers} answers for {operations} operations");
    }
    // Asked are the policies that may select a pod here (10 of its namespace for each of its four pods), the selectors of new peers (each
    // namespace and class once), and for a new identity every selector in use.
    for kind in ["policy_of_pods_here", "block_outside", "pod_label_nobody_looks_at", "interface_gone"] {
        let [_, small, _] = small[kind];
        let [_, large, _] = large[kind];
        assert!(
            large <= small + 8,
            "{kind}: {small} questions to selectors in a cluster of half the size, now {large}"
        );
    }
    let [_, few, _] = large["policy_of_pods_here"];
    assert!(few <= 100, "{few}");
    // One look at every namespace and class of the cluster, and one set for all pods of this node that it selects, whatever 67 other sets of theirs
    // say: an entry for each of their identities.
    let [operations, selectors, _] = large["cluster_policy_of_a_third"];
    assert!(selectors <= 240 * 10 + 200 * 11, "{selectors}");
    assert!((500..2_000).contains(&operations), "{operations}");
}

#[test]
fn batched_policies_are_compiled_once() {
    let cluster = Cluster { spaces: 50 };
    let (mut compiler, _) = Compiler::new();
    let pods = (0..cluster.spaces).flat_map(|space| cluster.pods(space));
    compiler.steps(pods.chain(cluster.interfaces()));
    let peers = json!([{"podSelector": {}}]);
    let policy = |n: u16| {
        let ingress = json!([{"from": peers, "ports": [{"port": 20_000 + n}]}]);
        network_policy(0, &format!("p{n}"), &json!({"podSelector": {}, "ingress": ingress}))
    };
    let ops = compiler.steps((0..1_000).map(policy));
    let tables: Vec<usize> = ops
        .iter()
        .filter_map(|op| if let Op::PutPortTable { entries, .. } = op { Some(entries.len()) } else { None })
        .collect();
    // All four pods of the namespace share one set, which has one table.
    assert_eq!(tables, [1_001]);
    assert_eq!(compiler.policies().len(), 1_000);
}
