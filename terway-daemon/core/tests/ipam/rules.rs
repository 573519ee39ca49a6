//! One test per rule of the pool.

use std::collections::BTreeSet;
use std::time::Duration;

use terway_core::cloud::ErrorClass;
use terway_core::errors;
use terway_core::ident::{Family, IpStack};
use terway_core::ipam::{Change, Effect, Event, Phase, Pool, PoolConfig, Record, Reply};

use crate::world::{Outcome, World, config, key};

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn ample(adapters: u32, per_eni: u32) -> World {
    World::new(config(IpStack::Ipv4, adapters, per_eni), &[200, 200])
}

fn create(effect: &Effect) -> bool {
    matches!(effect, Effect::CreateEni { .. })
}

fn assign(effect: &Effect) -> bool {
    matches!(effect, Effect::Assign { .. })
}

fn connect(effect: &Effect) -> bool {
    matches!(effect, Effect::Connect { .. })
}

fn disconnect(effect: &Effect) -> bool {
    matches!(effect, Effect::Disconnect { .. })
}

#[test]
fn first_pod_creates_eni() {
    let mut world = ample(3, 10);
    let ticket = world.add(&key(1));
    assert_eq!(world.find(create), [], "not before its token is on disk");
    world.flush(usize::MAX);
    assert!(matches!(&world.find(create)[..], [Effect::CreateEni { v4: 1, v6: 0, .. }]));
    world.run_one(Outcome::Fine, create);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::AttachEni { .. }));
    assert_eq!(world.find(connect), []);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::ConfigureNic { .. }));
    assert_eq!(world.find(connect), [], "not before the binding is on disk");
    world.run_one(Outcome::Fine, connect);
    assert!(matches!(world.answer(ticket), Some(Ok(Reply::Attached(lease))) if lease.nic.ifindex == 7));
}

#[test]
fn waiting_pods_are_counted_once() {
    for pods in [1, 3, 7, 20] {
        let mut world = ample(4, 10);
        for n in 0..pods {
            world.add(&key(n));
        }
        world.drive();
        let had: usize = world.cloud.enis.values().map(|eni| eni.v4.len()).sum();
        assert_eq!((world.kernel.len(), had), (pods, pods));
    }
}

#[test]
fn parallel_eni_creation() {
    let mut world = ample(5, 10);
    for n in 0..25 {
        world.add(&key(n));
    }
    world.flush(usize::MAX);
    let asked: Vec<_> =
        world.find(create).iter().map(|e| if let Effect::CreateEni { v4, .. } = e { *v4 } else { 0 }).collect();
    // The first Add asked for one; the ENI of that call takes nine more later.
    assert_eq!(asked.len(), 3, "{asked:?}");
    world.drive();
    assert_eq!(world.kernel.len(), 25);
}

#[test]
fn one_assign_call_per_eni() {
    let mut world = ample(2, 30);
    world.leased(0);
    for n in 1..26 {
        world.add(&key(n));
    }
    world.flush(usize::MAX);
    assert!(matches!(&world.find(assign)[..], [Effect::Assign { count: 1, .. }]));
    world.run_one(Outcome::Fine, assign);
    world.flush(usize::MAX);
    assert!(matches!(&world.find(assign)[..], [Effect::Assign { count: 10, .. }]));
    world.drive();
    assert_eq!(world.kernel.len(), 26);
    assert_eq!(world.cloud.calls["assign"], 4, "1 + 10 + 10 + 4");
}

#[test]
fn min_idle_is_kept() {
    for stack in [IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual] {
        let mut config = config(stack, 3, 10);
        (config.min_idle, config.max_idle) = (4, 6);
        let mut world = World::new(config, &[200]);
        world.drive();
        assert_eq!(world.pool.stats().idle, 4, "{stack:?}");
        let lease = world.leased(1);
        assert_eq!((lease.addresses.v4.is_some(), lease.addresses.v6.is_some()), (stack.v4(), stack.v6()));
        assert_eq!(world.pool.stats().idle, 4, "{stack:?}");
    }
}

#[test]
fn warm_add_without_cloud_call() {
    let mut config = config(IpStack::Ipv4, 3, 10);
    config.min_idle = 2;
    config.max_idle = 20;
    let mut world = World::new(config, &[200]);
    world.drive();
    world.add(&key(1));
    world.run_one(Outcome::Fine, connect);
    assert_eq!(world.kernel.len(), 1);
}

#[test]
fn repeated_add_is_idempotent() {
    let mut world = ample(3, 10);
    let first = world.add(&key(1));
    let second = world.add(&key(1));
    while world.find(connect).is_empty() {
        world.flush(usize::MAX);
        let index = world.runnable()[0];
        world.run(index, Outcome::Fine, 0);
        world.flush(usize::MAX);
    }
    let third = world.add(&key(1));
    world.drive();
    let fourth = world.add(&key(1));
    let Some(Ok(answer)) = world.answer(fourth) else { panic!("a repeated Add must be answered at once") };
    for ticket in [first, second, third] {
        assert_eq!(world.answer(ticket), Some(Ok(answer.clone())));
    }
    assert_eq!(world.kernel.len(), 1);
}

#[test]
fn del_waits_for_store_and_datapath() {
    let mut world = ample(3, 10);
    world.leased(1);
    let ticket = world.del(&key(1));
    assert_eq!(world.find(disconnect), [], "not before the release is on disk");
    assert_eq!(world.answer(ticket), None);
    world.run_one(Outcome::Fine, disconnect);
    assert_eq!(world.answer(ticket), Some(Ok(Reply::Detached)));
    assert!(world.kernel[&key(1)].links, "the links go later");
    let again = world.del(&key(1));
    assert_eq!(world.answer(again), Some(Ok(Reply::Detached)));
    world.drive();
    assert!(world.kernel.is_empty());
}

#[test]
fn del_of_unknown_attachment() {
    let mut pool = Pool::new(config(IpStack::Ipv4, 3, 10));
    let now = terway_core::clock::Moment::ZERO;
    pool.step(Event::Tick, now);
    let ticket = terway_core::ipam::Ticket(1);
    let effects = pool.step(Event::Del { ticket, key: key(1) }, now);
    assert_eq!(effects, [Effect::Reply { ticket, result: Ok(Reply::Detached) }]);
}

#[test]
fn del_during_pod_setup() {
    for outcome in [Outcome::Fine, Outcome::Lost, Outcome::Fails(ErrorClass::Unknown)] {
        let mut world = ample(3, 10);
        world.leased(0);
        let add = world.add(&key(1));
        world.run_one(Outcome::Fine, assign);
        let del = world.del(&key(1));
        assert_eq!(world.answer(del), None);
        world.run_one(outcome, connect);
        world.drive();
        assert_eq!(world.answer(del), Some(Ok(Reply::Detached)), "{outcome:?}");
        assert!(matches!(world.answer(add), Some(Err(_))), "{outcome:?}");
        assert!(!world.kernel.contains_key(&key(1)), "{outcome:?}");
    }
}

#[test]
fn del_of_waiting_add() {
    let mut world = ample(3, 10);
    let add = world.add(&key(1));
    let del = world.del(&key(1));
    assert_eq!(world.answer(del), Some(Ok(Reply::Detached)));
    assert_eq!(world.answer(add).unwrap().unwrap_err().code, errors::BUSY);
}

#[test]
fn add_waits_for_links_of_previous_del() {
    let mut world = ample(3, 10);
    let old = world.leased(1);
    world.del(&key(1));
    let add = world.add(&key(1));
    world.run_one(Outcome::Fine, disconnect);
    assert_eq!((world.answer(add), world.find(connect)), (None, vec![]));
    world.drive();
    let Some(Ok(Reply::Attached(new))) = world.answer(add) else { panic!("no lease") };
    assert_ne!(old.addresses, new.addresses, "the old address is cooling");
}

#[test]
fn cooling_and_address_order() {
    let mut world = ample(2, 3);
    let leases: Vec<_> = (0..3).map(|n| world.leased(n)).collect();
    for n in [1, 0, 2] {
        world.del(&key(n));
        world.drive();
        world.settle(secs(1));
    }
    assert_eq!(world.pool.stats().cooling, 3);
    let add = world.add(&key(10));
    world.drive();
    assert_eq!(world.answer(add), None, "all addresses are cooling, which ends soon");
    world.settle(secs(5));
    assert!(matches!(world.answer(add), Some(Ok(_))));
    world.del(&key(10));
    world.settle(secs(10));
    let order: Vec<_> = (20..23).map(|n| world.leased(n).addresses).collect();
    assert_eq!(order, [0, 2, 1].map(|n: usize| leases[n].addresses), "1 was used once more");
}

#[test]
fn exhausted_vswitch_and_the_next_one() {
    let mut world = World::new(config(IpStack::Ipv4, 4, 10), &[7, 100]);
    for n in 0..12 {
        world.add(&key(n));
    }
    world.settle(secs(5));
    assert_eq!(world.kernel.len(), 12);
    let problems = world.pool.problems();
    assert!(problems.iter().all(|e| e.code == errors::VSWITCH_EXHAUSTED), "{problems:?}");
}

#[test]
fn all_vswitches_exhausted() {
    let mut world = World::new(config(IpStack::Ipv4, 4, 10), &[2, 1]);
    for n in 0..3 {
        world.leased(n);
    }
    let add = world.add(&key(3));
    world.settle(secs(20));
    let error = world.answer(add).unwrap().unwrap_err();
    assert_eq!(error.code, errors::VSWITCH_EXHAUSTED);
    assert!(error.detail.contains("InvalidVSwitchId.IpNotEnough"), "{error}");
    assert!(!world.pool.problems().is_empty());
    let calls = world.cloud.calls.values().sum::<u32>();
    let refused = world.add(&key(4));
    assert_eq!(world.answer(refused).unwrap().unwrap_err().code, errors::VSWITCH_EXHAUSTED);
    assert_eq!(world.cloud.calls.values().sum::<u32>(), calls, "a resting vSwitch is left alone");
    world.settle(world.config.vswitch_backoff);
    assert_eq!(world.pool.problems(), []);
}

#[test]
fn cloud_refusals_and_retries_with_token() {
    let cases = [
        (ErrorClass::Quota, errors::CLOUD_QUOTA, false),
        (ErrorClass::Forbidden, errors::CLOUD_FORBIDDEN, false),
        (ErrorClass::Invalid, errors::CLOUD_REFUSED, false),
        (ErrorClass::Throttled, errors::CLOUD_THROTTLED, true),
        (ErrorClass::Unknown, errors::CLOUD_INTERNAL, true),
    ];
    for (class, code, repeated) in cases {
        let mut world = ample(3, 10);
        let add = world.add(&key(1));
        let mut tokens = BTreeSet::new();
        for _ in 0..12 {
            world.flush(usize::MAX);
            if let [Effect::CreateEni { token, .. }] = &world.find(create)[..] {
                tokens.insert(token.clone());
                world.run_one(Outcome::Fails(class), create);
            }
            world.advance(secs(2));
        }
        let error = world.answer(add).unwrap().unwrap_err();
        assert_eq!((error.code, tokens.len()), (code, 1), "{class:?}");
        assert_eq!(world.pool.problems().first().map(|e| e.code), Some(code), "{class:?}");
        let pending = world.pool.stats().pending > 0;
        assert_eq!(pending, repeated, "{class:?}");
        world.settle(secs(120));
        assert_eq!(world.pool.problems(), [], "{class:?}");
        world.leased(2);
    }
}

#[test]
fn lost_reply_is_idempotent() {
    let mut world = ample(3, 10);
    let add = world.add(&key(1));
    world.run_one(Outcome::Lost, create);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::TakeInventory { .. }));
    world.settle(secs(5));
    assert!(matches!(world.answer(add), Some(Ok(_))));
    assert_eq!(world.cloud.enis.len(), 1);
    let add = world.add(&key(2));
    world.run_one(Outcome::Lost, assign);
    world.settle(secs(5));
    assert!(matches!(world.answer(add), Some(Ok(_))));
    assert_eq!(world.cloud.enis.values().map(|eni| eni.v4.len()).sum::<usize>(), 2);
}

#[test]
fn full_node_refuses_newest_add() {
    let mut world = ample(2, 3);
    for n in 0..3 {
        world.leased(n);
    }
    let add = world.add(&key(3));
    let error = world.answer(add).unwrap().unwrap_err();
    assert_eq!(error.code, errors::NO_ADDRESS);
    assert!(error.detail.contains("All 3 addresses are bound or cooling"), "{error}");
    assert_eq!(world.pool.problems()[0].code, errors::NO_ADDRESS);
    world.del(&key(0));
    world.drive();
    let waits = world.add(&key(4));
    let refused = world.add(&key(5));
    assert_eq!(world.answer(refused).unwrap().unwrap_err().code, errors::NO_ADDRESS);
    world.settle(secs(5));
    assert!(matches!(world.answer(waits), Some(Ok(_))), "the one address that cools is for who came first");
}

#[test]
fn add_on_full_node_waits_for_pod_that_is_being_removed() {
    let mut world = ample(2, 3);
    for n in 0..3 {
        world.leased(n);
    }
    // Its link is still there.
    world.del(&key(0));
    let waits = world.add(&key(3));
    let refused = world.add(&key(4));
    assert!(world.answer(waits).is_none(), "its address comes free soon");
    assert_eq!(world.answer(refused).unwrap().unwrap_err().code, errors::NO_ADDRESS);
    world.settle(secs(5));
    assert!(matches!(world.answer(waits), Some(Ok(_))));
    // Not if its address would cool for longer than an ADD may wait.
    let mut config = world.config.clone();
    config.cooling = config.max_wait + secs(1);
    world.configure(config);
    world.del(&key(1));
    let refused = world.add(&key(5));
    assert_eq!(world.answer(refused).unwrap().unwrap_err().code, errors::NO_ADDRESS);
}

#[test]
fn excess_addresses_are_released() {
    let mut world = ample(3, 10);
    let leases: Vec<_> = (0..10).map(|n| world.leased(n)).collect();
    for n in 1..10 {
        world.del(&key(n));
    }
    world.settle(secs(10));
    assert_eq!(world.pool.stats().idle, 9, "not yet");
    world.settle(secs(40));
    assert_eq!(world.pool.stats().idle, 3);
    let eni = &world.cloud.enis[&leases[0].eni];
    assert_eq!(eni.v4.len(), 4);
    assert!(eni.v4.contains(&eni.primary_v4) && eni.v4.contains(&leases[0].addresses.v4.unwrap()));
}

#[test]
fn idle_eni_is_deleted() {
    let mut config = config(IpStack::Dual, 4, 4);
    config.max_idle = 2;
    let mut world = World::new(config, &[100]);
    for n in 0..12 {
        world.leased(n);
    }
    assert_eq!(world.cloud.enis.len(), 3);
    for n in 0..11 {
        world.del(&key(n));
    }
    world.settle(secs(100));
    assert_eq!((world.cloud.enis.len(), world.pool.stats().idle), (1, 2));
    let eni = world.cloud.enis.values().next().unwrap();
    assert_eq!((eni.v4.len(), eni.v6.len()), (3, 3));
    world.del(&key(11));
    world.settle(secs(100));
    assert_eq!(world.pool.stats().idle, 2);
}

#[test]
fn failed_pod_setup_frees_address() {
    let mut world = ample(2, 1);
    let add = world.add(&key(1));
    while world.find(connect).is_empty() {
        world.flush(usize::MAX);
        if world.find(connect).is_empty() {
            let index = world.runnable()[0];
            world.run(index, Outcome::Fine, 0);
        }
    }
    world.run_one(Outcome::Fails(ErrorClass::Unknown), connect);
    assert_eq!(world.answer(add).unwrap().unwrap_err().code, errors::NET_FAILED);
    world.leased(2);
}

#[test]
fn gc_of_one_network() {
    let mut world = ample(3, 10);
    for n in 0..4 {
        world.leased(n);
    }
    let mut other = key(9);
    "other".clone_into(&mut other.network);
    world.add(&other);
    world.drive();
    let setting_up = world.add(&key(5));
    let ticket = world.gc([key(0), key(2)].into());
    world.drive();
    assert_eq!(world.answer(ticket), Some(Ok(Reply::GarbageCollected(vec![key(1), key(3)]))));
    assert!(matches!(world.answer(setting_up), Some(Ok(_))), "a pod being set up cannot be on the list yet");
    assert_eq!(world.kernel.keys().cloned().collect::<Vec<_>>(), [key(0), key(2), key(5), other]);
    let nothing = world.gc([key(0), key(2), key(5)].into());
    assert_eq!(world.answer(nothing), Some(Ok(Reply::GarbageCollected(vec![]))));
}

#[test]
fn cancelled_request() {
    let mut world = ample(3, 10);
    let waiting = world.add(&key(1));
    world.step(Event::Cancel { ticket: waiting });
    assert_eq!(world.answer(waiting).unwrap().unwrap_err().code, errors::DEADLINE);
    world.drive();
    assert!(world.kernel.is_empty(), "nobody wants it any more");
    let wired = world.add(&key(2));
    world.flush(usize::MAX);
    world.step(Event::Cancel { ticket: wired });
    assert_eq!(world.answer(wired).unwrap().unwrap_err().code, errors::DEADLINE);
    world.drive();
    let repeated = world.add(&key(2));
    assert!(matches!(world.answer(repeated), Some(Ok(_))));
    let del = world.del(&key(2));
    world.step(Event::Cancel { ticket: del });
    assert_eq!(world.answer(del).unwrap().unwrap_err().code, errors::DEADLINE);
    world.drive();
    assert!(world.kernel.is_empty());
}

#[test]
fn missing_nic_is_reported() {
    let mut world = ample(4, 2);
    let add = world.add(&key(1));
    world.run_one(Outcome::Fine, create);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::AttachEni { .. }));
    for _ in 0..2 {
        world.run_one(Outcome::Fails(ErrorClass::Unknown), |e| matches!(e, Effect::ConfigureNic { .. }));
        assert_eq!(world.pool.problems()[0].code, errors::NIC_MISSING);
        world.advance(secs(3));
    }
    world.run_one(Outcome::Fine, create);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::AttachEni { .. }));
    let second = world.pool.enis()[1].id.clone();
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::ConfigureNic { eni, .. } if Some(eni) == second.as_ref()));
    world.run_one(Outcome::Fine, connect);
    assert!(matches!(world.answer(add), Some(Ok(_))));
}

#[test]
fn client_tokens_are_stored_before_use() {
    let tokens = |config: PoolConfig| {
        let mut pool = Pool::new(config);
        let effects = pool.step(Event::Tick, terway_core::clock::Moment::ZERO);
        let Effect::Persist(changes) = &effects[0] else { panic!("{effects:?}") };
        assert!(changes.iter().any(|c| matches!(c, Change::Put(Record::Counter { next: 1 }))), "{changes:?}");
        effects
            .iter()
            .find_map(|e| if let Effect::CreateEni { token, .. } = e { Some(token.clone()) } else { None })
            .unwrap()
    };
    let mut config = config(IpStack::Ipv4, 3, 10);
    config.min_idle = 1;
    let one = tokens(config.clone());
    assert_eq!(one, tokens(config.clone()));
    // ClientToken: at most 64 ASCII characters (ECS API reference, "How to ensure idempotence").
    assert!(one.0.len() <= 64 && one.0.is_ascii());
    config.token_seed = "another".into();
    assert_ne!(one, tokens(config));
}

#[test]
fn address_unassigned_by_others() {
    let mut world = ample(3, 10);
    let lease = world.leased(1);
    world.leased(2);
    world.settle(secs(60));
    let lost = if lease.addresses.v4 == Some(world.cloud.enis[&lease.eni].primary_v4) {
        world.pool.get(&key(2)).unwrap()
    } else {
        world.pool.get(&key(1)).unwrap()
    };
    let address = lost.lease.addresses.v4.unwrap();
    world.cloud.enis.get_mut(&lease.eni).unwrap().v4.retain(|a| *a != address);
    world.settle(world.config.resync);
    assert_eq!(world.pool.get(&lost.key).unwrap().missing, [std::net::IpAddr::V4(address)]);
    assert!(world.pool.problems()[0].detail.contains(&address.to_string()));
    world.del(&lost.key);
    world.settle(secs(20));
    assert_eq!(world.pool.problems(), []);
    let known: Vec<_> = world.pool.enis().into_iter().flat_map(|eni| eni.addresses).collect();
    assert!(!known.contains(&address.into()), "it is not ours to hand out");
}

#[test]
fn vanished_eni_takes_no_new_pods() {
    let mut world = ample(3, 10);
    let lease = world.leased(1);
    world.settle(secs(60));
    let eni = world.cloud.enis.remove(&lease.eni).unwrap();
    world.settle(world.config.resync);
    assert_eq!(world.pool.list().len(), 1);
    assert!(world.pool.problems().iter().any(|e| e.detail.contains(eni.id.as_str())));
    assert_ne!(world.leased(2).eni, lease.eni);
    world.del(&key(1));
    world.settle(world.config.resync * 3);
    assert_eq!(world.pool.problems(), []);
    assert_eq!(world.pool.enis().len(), 1);
}

#[test]
fn add_with_unsupported_family() {
    let mut world = ample(3, 10);
    let ticket = world.ticket(crate::world::Asked::Add, Some(key(1)));
    let add = terway_core::ipam::Add {
        ticket,
        key: key(1),
        pod: Default::default(),
        netns: String::new(),
        ip_stack: IpStack::Dual,
        options: String::new(),
    };
    world.step(Event::Add(add));
    assert_eq!(world.answer(ticket).unwrap().unwrap_err().code, errors::CONFIG_INVALID);
}

#[test]
fn add_after_del_during_pod_setup() {
    let mut world = ample(2, 10);
    world.leased(0);
    let first = world.add(&key(1));
    world.run_one(Outcome::Fine, assign);
    world.flush(usize::MAX);
    let del = world.del(&key(1));
    let second = world.add(&key(1));
    world.drive();
    assert_eq!(world.answer(first).unwrap().unwrap_err().code, errors::BUSY);
    assert_eq!(world.answer(del), Some(Ok(Reply::Detached)));
    assert!(matches!(world.answer(second), Some(Ok(Reply::Attached(_)))));
}

#[test]
fn partly_failed_unassign_is_retried_singly() {
    let mut world = ample(2, 10);
    for n in 0..8 {
        world.leased(n);
    }
    for n in 1..8 {
        world.del(&key(n));
    }
    world.settle(secs(24));
    world.advance(secs(2));
    world.flush(usize::MAX);
    let Some(Effect::Unassign { eni, addresses, .. }) = world.find(|e| matches!(e, Effect::Unassign { .. })).pop()
    else {
        panic!("nothing is given back")
    };
    assert_eq!(addresses.len(), 4);
    world.cloud.unassign(&eni, &addresses[1..2]).unwrap();
    world.settle(secs(5));
    assert_eq!(world.cloud.calls["unassign"], 1 + 1 + 4);
    assert!(addresses.iter().all(|address| !world.cloud.has(&eni, *address)));
}

#[test]
fn stale_reports_are_ignored() {
    let mut world = ample(2, 10);
    world.leased(0);
    world.leased(1);
    world.del(&key(1));
    world.settle(secs(60));
    let add = world.add(&key(1));
    world.flush(usize::MAX);
    let repeat = |world: &mut World| {
        for report in world.reports.clone() {
            world.step(report);
        }
    };
    repeat(&mut world);
    assert_eq!(world.pool.get(&key(1)).unwrap().phase, Phase::SettingUp);
    assert_eq!(world.answer(add), None);
    world.drive();
    let del = world.del(&key(1));
    world.flush(usize::MAX);
    repeat(&mut world);
    assert_eq!(world.pool.get(&key(1)).unwrap().phase, Phase::Releasing);
    assert_eq!(world.answer(del), None);
    world.drive();
    let stats = world.pool.stats();
    repeat(&mut world);
    assert_eq!((world.pool.stats(), world.pending.len()), (stats, 0));
}

#[test]
fn dual_stack_completes_unbalanced_eni() {
    let mut world = World::new(config(IpStack::Dual, 3, 10), &[100]);
    world.leased(1);
    let eni = world.cloud.enis.keys().next().cloned().unwrap();
    world.cloud.add(&eni, Family::V4, 1).unwrap();
    world.settle(world.config.resync * 2);
    let add = world.add(&key(2));
    world.flush(usize::MAX);
    assert!(matches!(&world.find(assign)[..], [Effect::Assign { family: Family::V6, count: 1, .. }]));
    world.drive();
    assert!(matches!(world.answer(add), Some(Ok(_))));
}
