//! Long random histories, checked from the ground up after every step.

use proptest::prelude::*;
use proptest::test_runner::RngAlgorithm;
use terway_core::cloud::ErrorClass;
use terway_core::ident::IpStack;

use crate::history::{Action, Edit, End, KEYS, Node, live};
use crate::world::Outcome;

fn edit() -> impl Strategy<Value = Edit> {
    // Few bits at a time.
    (any::<u16>(), any::<u16>(), 0..3u32).prop_map(|(a, b, idle)| Edit { what: a & b, idle })
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        12 => Just(Outcome::Fine),
        2 => Just(Outcome::Lost),
        1 => Just(Outcome::Fails(ErrorClass::Throttled)),
        1 => Just(Outcome::Fails(ErrorClass::Unknown)),
        1 => Just(Outcome::Fails(ErrorClass::Forbidden)),
        1 => Just(Outcome::Fails(ErrorClass::InvalidState)),
        1 => Just(Outcome::Fails(ErrorClass::Quota)),
        1 => Just(Outcome::Fails(ErrorClass::VSwitchExhausted)),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let any_index = 0..1000usize;
    prop_oneof![
        12 => (0..KEYS).prop_map(Action::Add),
        9 => (0..KEYS).prop_map(Action::Del),
        1 => any::<u16>().prop_map(Action::Gc),
        1 => any_index.clone().prop_map(Action::Cancel),
        1 => (0..KEYS, any::<bool>()).prop_map(|(k, told)| Action::Vanish(k, told)),
        20 => (1..4usize).prop_map(Action::Flush),
        45 => (any_index.clone(), outcome()).prop_map(|(i, o)| Action::Run(i, o)),
        3 => any_index.clone().prop_map(Action::Repeat),
        8 => prop_oneof![0..50u64, 50..3_000u64, 3_000..40_000u64].prop_map(Action::Advance),
        1 => any_index.clone().prop_map(Action::Meddle),
        1 => (any_index.clone(), any::<bool>()).prop_map(|(n, whole)| Action::Tamper(n, whole)),
        1 => any_index.clone().prop_map(Action::Mark),
        3 => edit().prop_map(Action::Configure),
        3 => any_index.clone().prop_map(Action::Land),
        3 => (0..4usize, any::<u64>(), outcome(), prop::bool::weighted(0.8), any_index)
            .prop_map(|(flushed, ran, outcome, cloud, choice)| Action::Crash { flushed, ran, outcome, cloud, choice }),
    ]
}

fn node() -> impl Strategy<Value = Node> {
    let stack = prop_oneof![Just(IpStack::Ipv4), Just(IpStack::Ipv6), Just(IpStack::Dual)];
    let kind = prop_oneof![3 => Just((false, false)), 2 => Just((true, false)), 1 => Just((false, true))];
    (stack, 0..3u32, any::<bool>(), kind).prop_map(|(stack, min_idle, scarce, (prefixes, exclusive))| Node {
        stack,
        adapters: 3,
        per_eni: 4,
        min_idle,
        scarce,
        prefixes,
        exclusive,
        quick: false,
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 20_000,
        failure_persistence: None,
        // Drawing the histories with the default one, unoptimised, takes as long as living them.
        rng_algorithm: RngAlgorithm::XorShift,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_histories_keep_invariants(node in node(), actions in prop::collection::vec(action(), 1..150)) {
        live(node, &actions, End::Rest);
    }
}
