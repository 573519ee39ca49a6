//! Restarts, one situation per test; the random histories mix them.

use std::time::Duration;

use terway_core::clock::Moment;
use terway_core::cloud::{Eni, EniKind, ErrorClass};
use terway_core::errors;
use terway_core::ident::{IpStack, Mac};
use terway_core::ipam::{
    Effect, EniPhase, Event, Phase, Pool, Quarantine, Record, RecordError, RecordKey, Reply, RestoreError, Snapshot,
};

use crate::world::{Outcome, World, config, key};

fn warm(pods: usize) -> World {
    let mut world = World::new(config(IpStack::Ipv4, 3, 10), &[100, 100]);
    for n in 0..pods {
        world.leased(n);
    }
    world.settle(Duration::from_secs(1));
    world
}

/// Everything on disk, nothing under way.
fn restart(world: &mut World, cloud: bool) {
    world.crash(usize::MAX, 0, Outcome::Fine, cloud, usize::MAX);
}

#[test]
fn restart_with_and_without_cloud() {
    for cloud in [true, false] {
        let mut world = warm(3);
        let before = world.pool.list();
        restart(&mut world, cloud);
        assert_eq!(world.pool.list(), before);
        assert_eq!(world.find(|e| matches!(e, Effect::Connect { .. } | Effect::Disconnect { .. })), []);
        let add = world.add(&key(0));
        let Some(Ok(Reply::Attached(lease))) = world.answer(add) else { panic!("a repeated Add is answered at once") };
        assert_eq!(lease, before[0].lease);
    }
}

#[test]
fn restart_without_cloud_serves_idle_addresses() {
    let mut world = warm(3);
    world.del(&key(0));
    world.settle(Duration::from_secs(10));
    restart(&mut world, false);
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::ConfigureNic { .. }));
    let served = world.add(&key(7));
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::Connect { .. }));
    assert!(matches!(world.answer(served), Some(Ok(_))));
    let waits = world.add(&key(8));
    for _ in 0..20 {
        world.advance(Duration::from_secs(1));
        world.flush(usize::MAX);
        if !world.find(|e| matches!(e, Effect::TakeInventory { .. })).is_empty() {
            world.run_one(Outcome::Fails(ErrorClass::Unknown), |e| matches!(e, Effect::TakeInventory { .. }));
        }
        assert_eq!(world.find(|e| matches!(e, Effect::CreateEni { .. } | Effect::Assign { .. })), []);
    }
    assert_eq!(world.answer(waits).unwrap().unwrap_err().code, errors::CLOUD_INTERNAL);
    world.settle(Duration::from_secs(60));
    world.leased(9);
}

#[test]
fn restart_during_pod_setup() {
    for gone in [false, true] {
        let mut world = warm(1);
        world.add(&key(1));
        world.run_one(Outcome::Fine, |e| matches!(e, Effect::Assign { .. }));
        world.flush(usize::MAX);
        if gone {
            world.vanished.insert(key(1));
        }
        restart(&mut world, true);
        world.settle(Duration::from_secs(1));
        assert_eq!(world.kernel.contains_key(&key(1)), !gone);
        let phase = world.pool.get(&key(1)).map(|view| view.phase);
        assert_eq!(phase, (!gone).then_some(Phase::Ready));
    }
}

#[test]
fn restart_during_release() {
    let mut world = warm(2);
    world.del(&key(1));
    restart(&mut world, true);
    assert_eq!(world.pool.get(&key(1)).unwrap().phase, Phase::Releasing);
    let del = world.del(&key(1));
    assert_eq!(world.answer(del), None, "the datapath may still know it");
    world.settle(Duration::from_secs(1));
    assert_eq!(world.answer(del), Some(Ok(Reply::Detached)));
    assert!(!world.kernel.contains_key(&key(1)));
}

#[test]
fn restart_during_cooling() {
    let mut world = warm(2);
    let address = world.pool.get(&key(1)).unwrap().lease.addresses.v4.unwrap();
    world.del(&key(1));
    world.settle(Duration::from_secs(4));
    restart(&mut world, true);
    world.settle(Duration::from_secs(4));
    assert_eq!(world.pool.stats().cooling, 1);
    let held = |record: &Record| matches!(record, Record::Address(a) if a.address == address && a.quarantine == Quarantine::Cooling);
    assert!(world.records().iter().any(held));
    world.settle(Duration::from_secs(1));
    assert_eq!((world.pool.stats().cooling, world.pool.stats().idle), (0, 1));
    world.settle(Duration::from_secs(1));
    assert!(!world.records().iter().any(held));
}

#[test]
fn restart_during_unassign_quarantines_address() {
    let mut world = warm(6);
    for n in 1..6 {
        world.del(&key(n));
    }
    world.settle(Duration::from_secs(24));
    world.advance(Duration::from_secs(2));
    assert_eq!(world.find(|e| matches!(e, Effect::Unassign { .. })), [], "not before it is on disk");
    world.flush(usize::MAX);
    let Some(Effect::Unassign { addresses, .. }) = world.find(|e| matches!(e, Effect::Unassign { .. })).pop() else {
        panic!("nothing is given back")
    };
    restart(&mut world, true);
    // The request of the old process is still on its way; the new one must not use what it takes.
    let mut leased = Vec::new();
    for n in 10..14 {
        leased.push(world.leased(n).addresses.v4.unwrap());
    }
    for address in addresses {
        assert!(!leased.iter().any(|a| *a == address));
    }
}

#[test]
fn restart_finds_created_eni_by_token() {
    let mut world = World::new(config(IpStack::Ipv4, 3, 10), &[100, 100]);
    world.add(&key(1));
    world.run_one(Outcome::Lost, |e| matches!(e, Effect::CreateEni { .. }));
    restart(&mut world, true);
    assert_eq!(world.find(|e| matches!(e, Effect::CreateEni { .. })), []);
    world.settle(Duration::from_secs(1));
    assert_eq!((world.cloud.enis.len(), world.pool.enis()[0].phase), (1, EniPhase::InUse));
    world.leased(2);
    assert_eq!(world.cloud.calls["create"], 1);
}

#[test]
fn restart_repeats_call_with_its_token() {
    let mut world = warm(1);
    world.add(&key(1));
    world.flush(usize::MAX);
    let token = |effect: &Effect| if let Effect::Assign { token, .. } = effect { Some(token.clone()) } else { None };
    let asked: Vec<_> = world.find(|e| token(e).is_some()).iter().filter_map(token).collect();
    // Bit 0 only: the call is made and nobody hears of it.
    world.crash(0, u64::from(u32::MAX) << 32 | 1, Outcome::Fine, true, usize::MAX);
    world.flush(usize::MAX);
    let repeated: Vec<_> = world.find(|e| token(e).is_some()).iter().filter_map(token).collect();
    assert_eq!((repeated.len(), repeated), (1, asked));
    world.settle(Duration::from_secs(1));
    assert_eq!(world.cloud.enis.values().map(|eni| eni.v4.len()).sum::<usize>(), 2);
}

/// The id of an ENI, and how it differs from ours.
type Variant = (&'static str, fn(&mut Eni));

/// ENIs that the node has from somebody else.
fn strangers(eni: &Eni, variants: &[Variant]) -> Vec<Eni> {
    let make = |(n, (id, change)): (u8, &Variant)| {
        let mut other = eni.clone();
        other.id = (*id).into();
        (other.mac, other.primary_v4, other.v4) =
            (Mac([4, 0, 0, 0, 0, n]), [10, 9, 9, n].into(), vec![[10, 9, 9, n].into()]);
        other.tags.clear();
        change(&mut other);
        other
    };
    (0u8..).zip(variants).map(make).collect()
}

#[test]
fn restart_with_attached_enis() {
    let mut world = warm(1);
    let eni = world.cloud.enis.values().next().cloned().unwrap();
    let others = strangers(
        &eni,
        &[
            ("eni-ours", |_| {}),
            ("eni-other-vswitch", |eni| eni.vswitch = "vsw-x".into()),
            ("eni-trunk", |eni| eni.kind = EniKind::Trunk),
            ("eni-elsewhere", |eni| eni.instance = Some("i-2".into())),
            ("eni-primary", |eni| eni.kind = EniKind::Primary),
            ("eni-excluded", |eni| drop(eni.tags.insert("terway.alibabacloud.com/excluded".into(), "true".into()))),
            ("eni-rdma", |eni| drop(eni.tags.insert("creator".into(), "alibabacloud-erdma-controller".into()))),
        ],
    );
    world.config.limits.adapters = 9;
    world.cloud.limits = Some((20, 10, 10));
    for other in others {
        world.cloud.enis.insert(other.id.clone(), other);
    }
    restart(&mut world, true);
    world.settle(Duration::from_secs(1));
    let used: Vec<_> = world.pool.enis().into_iter().map(|eni| (eni.id.unwrap(), eni.phase)).collect();
    assert_eq!(
        used,
        [
            (eni.id, EniPhase::InUse),
            ("eni-other-vswitch".into(), EniPhase::Mismatched),
            ("eni-ours".into(), EniPhase::InUse)
        ]
    );
    let foreign: Vec<_> = world.pool.foreign().iter().map(|eni| eni.id.as_str()).collect();
    assert_eq!(foreign, ["eni-elsewhere", "eni-excluded", "eni-rdma", "eni-trunk"]);
    assert!(world.pool.foreign_enis().iter().all(|eni| eni.reason.is_some()));
    // Three of them take adapters of this instance: 8 in all for pods.
    assert_eq!(world.pool.stats().capacity, 5 * 10);
    for n in 0..20 {
        assert_ne!(world.leased(50 + n).eni, "eni-other-vswitch".into());
    }
    world.settle(Duration::from_secs(200));
    assert!(!world.cloud.enis.contains_key(&"eni-other-vswitch".into()), "given back after its grace");
    for kept in ["eni-trunk", "eni-elsewhere", "eni-primary", "eni-excluded", "eni-rdma"] {
        assert!(world.cloud.enis.contains_key(&kept.into()), "{kept}");
    }
}

#[test]
fn tag_filter() {
    let mut world = warm(0);
    world.config.tag_filter.insert("cluster".into(), "c1".into());
    world.step(Event::Configure(Box::new(world.config.clone())));
    world.leased(1);
    let eni = world.cloud.enis.values().next().cloned().unwrap();
    assert_eq!(eni.tags["cluster"], "c1");
    let others = strangers(
        &eni,
        &[("eni-mine", |eni| drop(eni.tags.insert("cluster".into(), "c1".into()))), ("eni-not-mine", |_| {})],
    );
    world.cloud.enis.extend(others.into_iter().map(|eni| (eni.id.clone(), eni)));
    restart(&mut world, true);
    world.settle(Duration::from_secs(1000));
    let known: Vec<_> = world.pool.enis().into_iter().filter_map(|eni| eni.id).collect();
    assert!(known.contains(&"eni-mine".into()) || !world.cloud.enis.contains_key(&"eni-mine".into()));
    assert!(!known.contains(&"eni-not-mine".into()));
    assert!(world.cloud.enis.contains_key(&"eni-not-mine".into()), "never touched");
}

#[test]
fn bound_address_missing_in_cloud() {
    let mut world = warm(2);
    let (id, eni) = world.cloud.enis.pop_first().unwrap();
    restart(&mut world, true);
    assert_eq!(world.pool.problems(), [], "one list may be late");
    world.settle(world.config.consistency_window * 2);
    assert_eq!(world.pool.list().len(), 2);
    assert!(world.pool.problems().iter().any(|e| e.detail.contains(id.as_str())));
    world.cloud.enis.insert(id, eni);
    world.settle(world.config.resync);
    assert_eq!(world.pool.problems(), []);
}

#[test]
fn inconsistent_store_is_refused() {
    let world = warm(2);
    let mut records = world.records();
    let lease = world.pool.get(&key(0)).unwrap().lease;
    for record in &mut records {
        if let Record::Attachment(a) = record {
            a.lease = lease.clone();
        }
    }
    let snapshot = Snapshot { records: records.clone(), ..Snapshot::default() };
    let result = Pool::restore(world.config.clone(), snapshot, Moment::ZERO);
    assert!(matches!(result, Err(RestoreError::BoundTwice { .. })), "{:?}", result.err());
    records.retain(|record| !matches!(record, Record::Eni(_)));
    let snapshot = Snapshot { records, ..Snapshot::default() };
    let result = Pool::restore(world.config, snapshot, Moment::ZERO);
    assert!(matches!(result, Err(RestoreError::UnknownEni { .. })), "{:?}", result.err());
}

#[test]
fn stale_listing_after_release() {
    let mut world = warm(6);
    for n in 1..6 {
        world.del(&key(n));
    }
    world.settle(Duration::from_secs(24));
    let before = world.cloud.list();
    world.settle(Duration::from_secs(3));
    let gone: Vec<_> = before[0].v4.iter().filter(|a| !world.cloud.has(&before[0].id, (**a).into())).copied().collect();
    assert!(!gone.is_empty(), "nothing was given back");
    let records = world.records();
    let snapshot = Snapshot { records, enis: Some(before), ..Snapshot::default() };
    let (pool, _) = Pool::restore(world.config.clone(), snapshot, world.now).unwrap();
    assert_eq!(
        pool.stats().releasing as usize,
        gone.len(),
        "held back until the cloud says once more that they are gone"
    );
}

#[test]
fn stale_listing_after_eni_deletion() {
    let mut config = config(IpStack::Ipv4, 3, 2);
    config.max_idle = 0;
    let mut world = World::new(config, &[100, 100]);
    for n in 0..4 {
        world.leased(n);
    }
    for n in 2..4 {
        world.del(&key(n));
    }
    let before = world.cloud.list();
    for _ in 0..60 {
        if world.cloud.enis.len() == 2 {
            world.settle(Duration::from_secs(1));
        }
    }
    world.add(&key(9));
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::CreateEni { .. }));
    // An outcome that nobody knows makes the pool look at once.
    world.run_one(Outcome::Lost, |e| matches!(e, Effect::AttachEni { .. }));
    let Some(Effect::TakeInventory { op }) = world.find(|e| matches!(e, Effect::TakeInventory { .. })).pop() else {
        panic!("no inventory")
    };
    let gone = before.last().unwrap().id.clone();
    assert!(!world.cloud.enis.contains_key(&gone));
    world.step(Event::Inventory { op, result: Ok(before) });
    assert!(world.pool.enis().iter().all(|eni| eni.id.as_ref() != Some(&gone)));
}

#[test]
fn stale_listing_after_restart() {
    let mut config = config(IpStack::Ipv4, 3, 2);
    config.max_idle = 0;
    let mut world = World::new(config, &[100, 100]);
    world.leased(0);
    world.del(&key(0));
    for _ in 0..60 {
        if !world.cloud.enis.is_empty() {
            world.settle(Duration::from_secs(1));
        }
    }
    // The choice of 0 is the oldest list that may still be told: the one with the ENI attached.
    world.crash(usize::MAX, 0, Outcome::Fine, true, 0);
    assert_eq!(world.pool.enis().len(), 1);
    world.settle(world.config.consistency_window * 4);
    assert_eq!((world.pool.enis(), world.pool.problems()), (vec![], vec![]));
}

#[test]
fn record_round_trip_and_versions() {
    let mut world = warm(2);
    world.del(&key(1));
    world.settle(Duration::from_secs(1));
    world.add(&key(3));
    world.flush(usize::MAX);
    let records = world.records();
    let kinds: std::collections::BTreeSet<_> = records
        .iter()
        .map(|record| serde_json::to_value(record).unwrap()["kind"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["address", "assignment", "attachment", "counter", "eni"]);
    let mut keys = std::collections::BTreeSet::new();
    for record in records {
        assert_eq!(Record::decode(&record.encode().unwrap()).unwrap(), record);
        assert!(keys.insert(record.key().encode().unwrap()));
    }
    assert!(matches!(Record::decode(br#"{"v":4,"kind":"?"}"#), Err(RecordError::Version { found: 4 })));
    for bad in ["", "{}", "nonsense", r#"{"v":1}"#, r#"{"v":1,"kind":"?"}"#] {
        assert!(matches!(Record::decode(bad.as_bytes()), Err(RecordError::Malformed(_))), "{bad}");
    }
    // As version 2 wrote them.
    for (old, member) in [
        (
            r#"{"v":2,"kind":"attachment","key":{"network":"n","container_id":"c","ifname":"eth0"},
                "pod":{"namespace":"a","name":"b","uid":""},"netns":"/run/netns/x","options":"",
                "grant":{"eni":"eni-1","mac":"00:16:3e:01:00:02","nic":NIC,"addresses":{"v4":"10.0.0.5","v6":null}},"phase":"ready"}"#,
            "lease",
        ),
        (r#"{"v":2,"kind":"address","eni":"eni-1","address":"10.0.0.6","hold":"cooling"}"#, "quarantine"),
        (r#"{"v":2,"kind":"prefix","eni":"eni-1","prefix":"10.0.0.16/28","hold":"releasing"}"#, "quarantine"),
    ] {
        let nic = serde_json::to_string(&world.leased(1).nic).unwrap();
        let record = Record::decode(old.replace("NIC", &nic).as_bytes()).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&record.encode().unwrap()).unwrap();
        assert!(written["v"] == 3 && written[member] != serde_json::Value::Null, "{written}");
        assert_eq!(Record::decode(&record.encode().unwrap()).unwrap(), record);
    }
    assert_ne!(
        RecordKey::Eni("a".into()).encode().unwrap(),
        RecordKey::Creation(terway_core::ipam::ClientToken("a".into())).encode().unwrap()
    );
}
