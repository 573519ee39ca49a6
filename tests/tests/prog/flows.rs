//! Flow entries: creation, direction, invalidation.

use terway_abi::flow_flags;
use terway_core::conntrack::Timeouts;
use terway_core::ident::{Addresses, Mac};
use terway_daemon::bpf::{Endpoint, FamilyGcReport, GcOptions};
use terway_tests::packet::flags;
use terway_tests::prog_bench::Stage;
use terway_tests::sandbox_or_skip;

use super::{BOTH, REDIRECT, V4, delivered, dropped, from_pod, from_vpc, rows, untouched};

#[test]
fn portless_protocols_have_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        for (protocol, new) in [(47, 1), (132, 1)] {
            let there = stage.sent_by(&stage.a).ip(family.a, family.remote).protocol(protocol).payload(&[0x11; 16]);
            from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", new)]);
            from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1)]);
            let back = stage.by_gateway().ip(family.remote, family.a).protocol(protocol).payload(&[0x11; 16]);
            delivered(&from_vpc(&stage, &back, &[("vpc_to_pod", 1)]), &stage.a, &back);
        }
    }
    let ports: Vec<u16> = rows(&stage).iter().filter(|row| row.protocol == 132).map(|row| row.source.port).collect();
    assert_eq!(ports, [0x1111; 4]);
    assert!(rows(&stage).iter().filter(|row| row.protocol == 47).all(|row| row.source.port == 0));
}

#[test]
fn syn_after_fin_creates_new_flow() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let with = |flags: u8| stage.sent_by(&stage.a).ip(family.a, family.b).tcp(40000, 80, flags);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::FIN | flags::ACK), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::ACK), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.a, &with(flags::RST), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        let back = stage.sent_by(&stage.b).ip(family.b, family.a).tcp(80, 40000, flags::SYN | flags::ACK);
        from_pod(&stage, &stage.b, &back, &[("pod_to_pod", 1)]);
    }
    let began: Vec<bool> = rows(&stage).iter().map(|row| row.flags & flow_flags::REPLY == 0).collect();
    assert_eq!(began, [true, true, false, false]);
}

#[test]
fn flow_direction_survives_route_change() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let of_a = |stage: &Stage| rows(stage).into_iter().find(|row| row.ifindex == stage.a.host_ifindex).unwrap();
    for (number, family) in BOTH.iter().enumerate() {
        let there = stage.by_gateway().ip(family.remote, family.a).tcp(50000, 80, flags::SYN);
        from_vpc(&stage, &there, &[("vpc_to_pod", 1), ("flow_new", 1)]);
        // The endpoint changes: the route is decided anew, and the pod's next packet still goes in the reply direction.
        let changed = Endpoint { gateway_v4: Some("10.0.0.252".parse().unwrap()), ..stage.a };
        stage.datapath.endpoints().upsert(if number % 2 == 0 { &changed } else { &stage.a }).unwrap();
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::ACK);
        from_pod(&stage, &stage.a, &back, &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REPLY, flow_flags::REPLY);
        evict(&stage);
        // Without an entry the packet's own flags do not count: the sender is the initiator.
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN | flags::ACK);
        from_pod(&stage, &stage.a, &back, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REPLY, 0);
        // A new connection from the other end has its own direction.
        from_pod(
            &stage,
            &stage.a,
            &stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::RST),
            &[("pod_to_vpc", 1)],
        );
        let begin = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN);
        from_pod(&stage, &stage.a, &begin, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REPLY, 0);
        evict(&stage);
    }
}

/// Deletes all flow entries, as LRU eviction does.
fn evict(stage: &Stage) {
    use aya::maps::{HashMap, Map, MapData};
    let pinned = |name| Map::LruHashMap(MapData::from_pin(stage.datapath.pins().join(name)).unwrap());
    let mut v4: HashMap<_, terway_abi::FlowKeyV4, terway_abi::FlowV4> =
        pinned(terway_abi::names::FLOWS_V4).try_into().unwrap();
    let mut v6: HashMap<_, terway_abi::FlowKeyV6, terway_abi::FlowV6> =
        pinned(terway_abi::names::FLOWS_V6).try_into().unwrap();
    let keys: Vec<_> = v4.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| v4.remove(key).unwrap());
    let keys: Vec<_> = v6.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| v6.remove(key).unwrap());
}

#[test]
fn removed_endpoint_invalidates_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        stage.datapath.endpoints().upsert(&stage.b).unwrap();
        let to_b = stage.sent_by(&stage.a).ip(family.a, family.b).udp(1, 2);
        let of_b = stage.sent_by(&stage.b).ip(family.b, family.remote).udp(1, 2);
        from_pod(&stage, &stage.a, &to_b, &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.b, &of_b, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert!(stage.datapath.endpoints().remove(stage.b.host_ifindex).unwrap());
        assert!(!stage.datapath.endpoints().remove(stage.b.host_ifindex).unwrap());
        dropped(&from_pod(&stage, &stage.b, &of_b, &[("unknown_endpoint", 1), ("flow_stale", 1)]));
        // The address is remote now: packets go to the VPC.
        let counters = [("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)];
        assert_eq!(from_pod(&stage, &stage.a, &to_b, &counters).action, REDIRECT);
        from_pod(&stage, &stage.a, &to_b, &[("pod_to_vpc", 1)]);
        // A new pod gets the address: flows that went to the VPC go to it.
        let successor = Endpoint { pod_mac: Mac([2, 0, 0, 0, 0, 0x77]), ..stage.b };
        stage.datapath.endpoints().upsert(&successor).unwrap();
        let counters = [("pod_to_pod", 1), ("flow_new", 1), ("flow_stale", 1)];
        delivered(&from_pod(&stage, &stage.a, &to_b, &counters), &successor, &to_b);
    }
    assert_eq!(stage.datapath.endpoints().list().len(), 2);
    assert!(stage.datapath.endpoints().remove(stage.b.host_ifindex).unwrap());
    let options =
        GcOptions { timeouts: Timeouts::default(), delete: true, recount_connections: false, previous_began: None };
    let swept = stage.datapath.flows().collect_garbage(&options).unwrap();
    let sum = |of: fn(&FamilyGcReport) -> u64| swept.families.iter().map(of).sum::<u64>();
    assert!(sum(|f| f.deleted_invalid) > 0 && sum(|f| f.deleted_expired) == 0, "{swept:?}");
    assert!(rows(&stage).iter().all(|row| row.valid));
    assert_eq!(rows(&stage).len() as u64, 2 * sum(|f| f.used - f.deleted()));
    let again = stage.datapath.flows().collect_garbage(&options).unwrap();
    assert!(again.families.iter().all(|f| f.deleted() == 0 && f.invalid == 0), "{again:?}");
}

#[test]
fn host_prefix_and_endpoint_changes_invalidate_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let sent = stage.sent_by(&stage.a).ip(V4.a, "10.7.0.7").udp(1, 2);
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1), ("flow_new", 1)]);
    stage.datapath.host_prefixes().set(&["10.7.0.0/16".parse().unwrap()]).unwrap();
    untouched(&from_pod(&stage, &stage.a, &sent, &[("pod_to_host", 1), ("flow_new", 1), ("flow_stale", 1)]), &sent);
    stage.datapath.host_prefixes().set(&["10.7.0.0/16".parse().unwrap()]).unwrap();
    untouched(&from_pod(&stage, &stage.a, &sent, &[("pod_to_host", 1)]), &sent);
    stage.datapath.host_prefixes().set(&[]).unwrap();
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
    // The same endpoint again changes nothing; another gateway does.
    stage.datapath.endpoints().upsert(&stage.a).unwrap();
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1)]);
    let moved = Endpoint { gateway_v4: None, ..stage.a };
    stage.datapath.endpoints().upsert(&moved).unwrap();
    dropped(&from_pod(&stage, &stage.a, &sent, &[("no_gateway", 1), ("flow_stale", 1)]));
    // An address that goes over to another endpoint leaves the first one without any.
    let conflicting = Endpoint { addresses: Addresses { v4: stage.a.addresses.v4, v6: None }, ..stage.b };
    stage.datapath.endpoints().upsert(&conflicting).unwrap();
    assert_eq!(stage.datapath.endpoints().list(), [conflicting]);
    dropped(&from_pod(&stage, &stage.a, &sent, &[("unknown_endpoint", 1), ("flow_stale", 1)]));
}
