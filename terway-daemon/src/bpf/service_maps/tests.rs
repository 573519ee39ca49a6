//! Conversions, and plans applied to maps of the running kernel.

use std::ops::ControlFlow;
use std::os::fd::AsFd as _;

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Array, HashMap, IterableMap, MapData};
use terway_abi::{Frontend as AbiFrontend, names};
use terway_core::ident::Family;
use terway_core::objects::{Change, Kind, Object, Objects, Protocol};
use terway_core::service::{
    Backend, BackendId, BackendKey, BackendRef, BackendState, Entry, Frontend, FrontendKey, FrontendKind, NodeFacts,
    Plan, Planner, PortId, Settings, Table, TableId,
};

use super::convert::{
    AbiKey, backend_from_abi, backend_to_abi, frontend_from_abi, frontend_to_abi, key_from_abi, key_to_abi,
};
use super::*;
use crate::bpf::address::{address_v4, address_v6};
use crate::bpf::elements::Elements;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn frontend_keys_round_trip() {
    for key in [
        FrontendKey::new(ip("10.96.0.1"), 443, Protocol::Tcp),
        FrontendKey::new(ip("fd00::1"), 53, Protocol::Udp),
        FrontendKey::rest(ip("10.96.0.1")),
        FrontendKey::node(Family::V4, 30_080, Protocol::Sctp),
        FrontendKey::node(Family::V6, 30_080, Protocol::Tcp),
    ] {
        let back = match key_to_abi(&key) {
            AbiKey::V4(abi) => key_from_abi(address_v4(abi.address).into(), abi.class),
            AbiKey::V6(abi) => key_from_abi(address_v6(abi.address).into(), abi.class),
        };
        assert_eq!(back, Some(key));
    }
}

/// Runs operations; flows are not invalidated, since there are none.
fn run(state: &mut State, ops: &[Op]) -> Result<(), BpfError> {
    BpfError::of_all(apply(state, ops).into_iter().map(|(_, error)| error))
}

/// Runs operations; those that failed, by their place.
fn apply(state: &mut State, ops: &[Op]) -> Vec<OpError> {
    let failed = state.apply(ops, &mut |_| Ok(()));
    failed.into_iter().map(|(place, error)| (place, error.to_string())).collect()
}

#[test]
fn backends_round_trip() {
    for (address, state, local) in [("10.0.0.1", BackendState::Ready, true), ("fd00::2", BackendState::Draining, false)]
    {
        let key = BackendKey { address: ip(address), port: 8080, protocol: Protocol::Udp };
        let backend = Backend { key, state, local, generation: 7 };
        assert_eq!(backend_from_abi(&backend_to_abi(&backend)), Some(backend));
    }
    let tombstone = terway_abi::Backend { generation: 8, ..Default::default() };
    assert_eq!(backend_from_abi(&tombstone), None);
}

#[test]
fn frontends_round_trip_except_for_their_kind() {
    let place = |id: TableId| Some((BackendRange { first: id.0 * 10, count: 4 }, Algorithm::Maglev));
    let table = Selection::Table(TableId(3));
    for (kind, internal, external, masquerade) in [
        (FrontendKind::ClusterIp, table, Selection::Pass, false),
        (FrontendKind::LoadBalancer, table, Selection::Drop, false),
        (FrontendKind::LoadBalancer, Selection::Pass, table, true),
        (FrontendKind::LoadBalancer, Selection::Reject, Selection::Reject, true),
    ] {
        let frontend = Frontend {
            port: PortId(9),
            kind,
            internal,
            external,
            masquerade,
            check_source: kind == FrontendKind::LoadBalancer,
            affinity_seconds: 600,
        };
        let abi = frontend_to_abi(&frontend, place);
        let back = |run: BackendRange, pass: u32, silent: u32| match run.count {
            _ if abi.flags & pass != 0 => Selection::Pass,
            0 if abi.flags & silent != 0 => Selection::Drop,
            0 => Selection::Reject,
            _ => Selection::Table(TableId(run.first / 10)),
        };
        let internal = back(abi.internal, frontend_flags::EXTERNAL_ONLY, 0);
        let external = back(abi.external, frontend_flags::IN_CLUSTER_ONLY, frontend_flags::DROP_WITHOUT_REPLY);
        let key = FrontendKey::new(ip("47.0.0.1"), 80, Protocol::Tcp);
        assert_eq!(frontend_from_abi(key, &abi, internal, external), frontend);
    }
}

/// Maps of the sizes of `terway_ebpf::kernel::maps`; none if this process may not create maps.
fn maps() -> Option<State> {
    maps_of(131_072)
}

/// The same with so many frontends of each family.
fn maps_of(frontends: u32) -> Option<State> {
    /// `BPF_F_NO_PREALLOC` (include/uapi/linux/bpf.h): without it the kernel refuses a trie.
    const NO_PREALLOC: u32 = 1;
    fn array<V: aya::Pod>(name: &'static str, entries: u32) -> Result<Elements<u32, V>, BpfError> {
        let array = Array::<MapData, V>::create(entries, 0).map_err(BpfError::map(name))?;
        Elements::over(unpinned(&array), name)
    }
    fn hash<K: aya::Pod, V: aya::Pod>(name: &'static str, entries: u32) -> Result<Elements<K, V>, BpfError> {
        let map = HashMap::<MapData, K, V>::create(entries, NO_PREALLOC).map_err(BpfError::map(name))?;
        Elements::over(unpinned(&map), name)
    }
    /// A handle of its own on a map.
    fn unpinned<K: aya::Pod, V>(map: &impl IterableMap<K, V>) -> MapData {
        MapData::from_fd(map.map().fd().as_fd().try_clone_to_owned().unwrap()).unwrap()
    }
    let create = || -> Result<State, BpfError> {
        let frontends = FrontendMaps::new(
            hash(names::FRONTENDS_V4, frontends)?,
            hash(names::FRONTENDS_V6, frontends)?,
            array(names::FRONTEND_FILTER, terway_abi::FRONTEND_FILTER_BUCKETS)?,
        );
        let backends = BackendMaps::new(
            array(names::BACKEND_REFS, 1_048_576)?,
            array(names::BACKENDS, 131_072)?,
            array(names::ACTIVE_CONNS, 131_072)?,
        );
        let ranges = SourceRanges::new(
            LpmTrie::create(65_536, NO_PREALLOC).map_err(BpfError::map(names::SRC_RANGES_V4))?,
            LpmTrie::create(65_536, NO_PREALLOC).map_err(BpfError::map(names::SRC_RANGES_V6))?,
        );
        Ok(State::new(frontends, backends, ranges))
    };
    match create() {
        Ok(state) => Some(state),
        Err(error) => {
            println!("SKIP: this process may not create BPF maps: {error}");
            None
        }
    }
}

fn object(kind: Kind, json: &str) -> Change {
    Change::Upsert(Box::new(Object::read(kind, &mut serde_json::Deserializer::from_str(json)).unwrap()))
}

fn service(i: usize) -> Change {
    let (high, low) = (i / 250, i % 250 + 1);
    let json = format!(
        r#"{{"metadata":{{"name":"s{i}","namespace":"ns","annotations":{{"terway.alibabacloud.com/load-balancing":"{}"}}}},
          "spec":{{"type":"LoadBalancer","clusterIPs":["10.96.{high}.{low}","fd96::{high}:{low}"],"externalTrafficPolicy":"{}",
            "loadBalancerSourceRanges":["192.0.2.0/24","2001:db8::/32"],"sessionAffinity":"{}",
            "ports":[{{"name":"web","port":80,"nodePort":{}}},{{"name":"dns","port":53,"protocol":"UDP"}}]}},
          "status":{{"loadBalancer":{{"ingress":[{{"ip":"47.0.{high}.{low}"}}]}}}}}}"#,
        ["random", "maglev", "least-connections"][i % 3],
        ["Cluster", "Local"][i % 2],
        ["None", "ClientIP"][i / 2 % 2],
        30_000 + i % 2_700,
    );
    object(Kind::Service, &json)
}

fn slice(i: usize, endpoints: &[usize], node: &str) -> Change {
    let (high, low) = (i / 250, i % 250 + 1);
    let list: Vec<String> = endpoints
        .iter()
        .map(|e| {
            format!(r#"{{"addresses":["10.{e}.{high}.{low}"],"conditions":{{"ready":true}},"nodeName":"{node}"}}"#)
        })
        .collect();
    let json = format!(
        r#"{{"metadata":{{"name":"s{i}-x","namespace":"ns","labels":{{"kubernetes.io/service-name":"s{i}"}}}},"addressType":"IPv4",
          "endpoints":[{}],"ports":[{{"name":"web","port":8080}},{{"name":"dns","port":5353,"protocol":"UDP"}}]}}"#,
        list.join(",")
    );
    object(Kind::EndpointSlice, &json)
}

fn planner(kernel: MapContents) -> Planner {
    let facts = NodeFacts { name: "me".into(), zone: None };
    Planner::restore(facts, Settings { maglev_size: 251, ..Settings::default() }, kernel)
}

/// What clients get, without ids: frontend → flags, affinity, and the backends of either side.
type Clients = BTreeMap<FrontendKey, (u32, u32, Vec<BackendKey>, Vec<BackendKey>)>;

/// Reads the maps as the programs do.
fn clients(state: &State) -> Clients {
    let (members, backends) = (&state.backends.members, &state.backends.backends);
    let side = |run: BackendRange| -> Vec<BackendKey> {
        let members = (run.first..run.first + run.count).map(|i| members.get(&i).unwrap().unwrap());
        let backends = members.map(|m| (m.generation, backends.get(&m.backend).unwrap().unwrap()));
        let current = backends
            .inspect(|(generation, b)| assert_eq!(*generation, b.generation, "a reference to an old generation"));
        current.map(|(_, b)| backend_from_abi(&b).unwrap().key).collect()
    };
    let mut clients = Clients::new();
    let mut insert = |key: FrontendKey, f: &AbiFrontend| {
        clients.insert(key, (f.flags, f.affinity, side(f.internal), side(f.external)));
        ControlFlow::Continue(())
    };
    let v4 = &state.frontends.v4;
    v4.each(|k, f| insert(key_from_abi(address_v4(k.address).into(), k.class).unwrap(), f)).unwrap();
    let v6 = &state.frontends.v6;
    v6.each(|k, f| insert(key_from_abi(address_v6(k.address).into(), k.class).unwrap(), f)).unwrap();
    clients
}

#[test]
fn recovered_planner_writes_only_differences() {
    const SERVICES: usize = 300;
    let Some(mut state) = maps() else { return };
    let mut objects = Objects::default();
    for i in 0..SERVICES {
        objects.apply(service(i));
        objects.apply(slice(i, &[1, 2, 3], if i % 4 == 0 { "me" } else { "other" }));
    }
    let mut first = planner(state.recover().unwrap());
    let plan = first.sync(&objects);
    run(&mut state, &plan.ops).unwrap();
    run(&mut state, &plan.retire).unwrap();
    first.retired(&plan.retire);
    let seen = clients(&state);
    // Two ports at two cluster addresses, the rest of each, at one balancer's address, and a node port for one of them in two families.
    assert_eq!(seen.len(), SERVICES * (4 + 2 + 2 + 2));
    let web = &seen[&FrontendKey::new("10.96.0.1".parse().unwrap(), 80, Protocol::Tcp)];
    assert_eq!(web.2.len(), 3, "{web:?}");
    assert!(web.3.is_empty() && web.0 & frontend_flags::IN_CLUSTER_ONLY != 0);

    // A restart over unchanged objects.
    let writes = state.writes;
    let kernel = state.recover().unwrap();
    let mut second = planner(kernel);
    let plan = second.sync(&objects);
    run(&mut state, &plan.ops).unwrap();
    run(&mut state, &plan.retire).unwrap();
    second.retired(&plan.retire);
    assert_eq!((state.writes - writes, plan.retire.len()), (0, 0), "nothing differs, nothing is written");
    assert_eq!(clients(&state), seen);

    // One endpoint changes while nobody looks; the next daemon writes that.
    objects.apply(slice(6, &[1, 2, 4], "other"));
    let mut third = planner(state.recover().unwrap());
    let plan = third.sync(&objects);
    let writes = state.writes;
    run(&mut state, &plan.ops).unwrap();
    run(&mut state, &plan.retire).unwrap();
    third.retired(&plan.retire);
    assert!(state.writes - writes <= 30, "{} writes for one endpoint", state.writes - writes);
    let now = clients(&state);
    let changed: Vec<_> = now.iter().filter(|(key, value)| seen.get(key) != Some(value)).map(|(key, _)| *key).collect();
    assert!(!changed.is_empty() && changed.len() <= 10, "{changed:?}");

    // All Services go: so does everything in the maps, but for the generations of the dead.
    let names: Vec<_> = objects.services().keys().cloned().collect();
    let gone =
        names.into_iter().map(|name| Change::Delete(terway_core::objects::ObjectKey { kind: Kind::Service, name }));
    let applied: Vec<_> = gone.filter_map(|change| objects.apply(change)).collect();
    let plan = third.update(&objects, &applied);
    run(&mut state, &plan.ops).unwrap();
    run(&mut state, &plan.retire).unwrap();
    assert_eq!(state.backends.ranges.left(), state.backends.members.capacity(), "all places are free again");
    let left = state.recover().unwrap();
    assert_eq!((left.frontends.len(), left.tables.len(), left.backends.len(), left.ranges.len()), (0, 0, 0, 0));
    assert!(left.generation > 0);
}

#[test]
fn full_map_is_named_in_the_error() {
    let Some(mut state) = maps() else { return };
    let key = BackendKey { address: ip("10.0.0.1"), port: 80, protocol: Protocol::Tcp };
    let backend = Backend { key, state: BackendState::Ready, local: false, generation: 1 };
    let error = run(&mut state, &[Op::PutBackend(BackendId(131_072), backend)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 map operations were refused, the first: the datapath holds at most 131071 backends"
    );
    let slots = vec![BackendRef { backend: BackendId(1), generation: 1 }; 1_048_577];
    let table = Arc::new(Table { algorithm: Algorithm::Random, slots });
    let error = run(&mut state, &[Op::PutTable(TableId(1), table)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 map operations were refused, the first: the datapath holds at most 1048576 slots of backend tables"
    );
}

/// Runs a plan as the daemon does.
fn execute(planner: &mut Planner, state: &mut State, plan: &Plan) {
    planner.execute(plan, &mut |batch| apply(state, batch));
    planner.execute_retired(&plan.retire, &mut |batch| apply(state, batch));
}

/// A Service with one port at one address: one frontend, and one for the other ports of the address.
fn cluster_ip(i: usize) -> Change {
    let json = format!(
        r#"{{"metadata":{{"name":"s{i}","namespace":"ns"}},"spec":{{"clusterIP":"10.96.{}.{}","ports":[{{"name":"web","port":80}}]}}}}"#,
        i / 250,
        i % 250 + 1
    );
    object(Kind::Service, &json)
}

#[test]
fn full_frontend_map_refuses_one_frontend_and_serves_the_others() {
    const SERVICES: usize = 3;
    let Some(mut state) = maps_of(2 * SERVICES as u32 - 1) else { return };
    let mut objects = Objects::default();
    for i in 0..SERVICES {
        objects.apply(cluster_ip(i));
        objects.apply(slice(i, &[1], "me"));
    }
    let mut planner = planner(state.recover().unwrap());
    let plan = planner.sync(&objects);
    execute(&mut planner, &mut state, &plan);
    let refused: Vec<Entry> = planner.unapplied().map(|(entry, _)| entry).collect();
    let [Entry::Frontend(refused)] = refused[..] else { panic!("{refused:?}") };
    let served = clients(&state);
    assert_eq!((served.len(), served.contains_key(&refused)), (2 * SERVICES - 1, false), "{served:?}");

    // All others go on: each gets another backend.
    for i in 0..SERVICES {
        let applied: Vec<_> = objects.apply(slice(i, &[2], "me")).into_iter().collect();
        let plan = planner.update(&objects, &applied);
        execute(&mut planner, &mut state, &plan);
    }
    for (key, (_, _, internal, _)) in clients(&state).iter().filter(|(key, _)| key.protocol.is_some()) {
        assert_eq!(
            internal.iter().map(|backend| backend.address.to_string()[..5].to_owned()).collect::<Vec<_>>(),
            ["10.2."],
            "{key}"
        );
    }
    let plan = planner.retry();
    execute(&mut planner, &mut state, &plan);
    assert!(!planner.is_applied() && !clients(&state).contains_key(&refused), "there is no room yet");

    // Another Service goes, and makes room: the retry serves the frontend, and the flows of the time before go to it.
    let other = (0..SERVICES).find(|i| refused.address != IpAddr::from([10, 96, 0, *i as u8 + 1])).unwrap();
    let name = terway_core::objects::ObjectName::new("ns", &format!("s{other}"));
    let gone = Change::Delete(terway_core::objects::ObjectKey { kind: Kind::Service, name });
    let applied: Vec<_> = objects.apply(gone).into_iter().collect();
    let plan = planner.update(&objects, &applied);
    execute(&mut planner, &mut state, &plan);
    let plan = planner.retry();
    let mut invalidated = Vec::new();
    planner.execute(&plan, &mut |batch| {
        let failed = state.apply(batch, &mut |addresses| {
            invalidated.extend_from_slice(addresses);
            Ok(())
        });
        failed.into_iter().map(|(place, error)| (place, error.to_string())).collect()
    });
    assert!(planner.is_applied(), "{:?}", planner.unapplied().collect::<Vec<_>>());
    assert!(clients(&state).contains_key(&refused));
    assert_eq!(invalidated, [refused.address]);
}

#[test]
fn failed_operations_are_told_by_their_place() {
    let Some(mut state) = maps() else { return };
    let key = |n: u8| BackendKey { address: IpAddr::from([10, 0, 0, n]), port: 80, protocol: Protocol::Tcp };
    let backend = |n| Backend { key: key(n), state: BackendState::Ready, local: false, generation: 1 };
    let frontend = |n: u8, table| {
        let (internal, external) = (Selection::Table(TableId(table)), Selection::Pass);
        let kind = FrontendKind::ClusterIp;
        let key = FrontendKey::new(IpAddr::from([10, 96, 0, n]), 80, Protocol::Tcp);
        let port = PortId(n.into());
        let (masquerade, check_source, affinity_seconds) = (false, false, 0);
        Op::PutFrontend(key, Frontend { port, kind, internal, external, masquerade, check_source, affinity_seconds })
    };
    let table = |id, slots| {
        let slots = vec![BackendRef { backend: BackendId(1), generation: 1 }; slots];
        Op::PutTable(TableId(id), Arc::new(Table { algorithm: Algorithm::Random, slots }))
    };
    let ops = [
        Op::PutBackend(BackendId(131_072), backend(2)),
        Op::PutBackend(BackendId(1), backend(1)),
        table(1, 1_048_577),
        table(2, 1),
        frontend(1, 1),
        frontend(2, 2),
    ];
    let failed = apply(&mut state, &ops);
    assert_eq!(failed.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [0, 2, 4], "{failed:?}");
    assert_eq!(clients(&state).len(), 1);
    // Flows that could not be invalidated: the frontend is not in effect, and is written again.
    let refuse = |_: &[IpAddr]| Err(BpfError::Dependency("the epoch map"));
    let tables = [table(1, 1)];
    assert!(apply(&mut state, &tables).is_empty());
    assert_eq!(state.apply(&ops[4..5], &mut { refuse }).len(), 1);
    let mut invalidated = 0;
    let again = state.apply(&ops[4..5], &mut |addresses| {
        invalidated += addresses.len();
        Ok(())
    });
    assert!(again.is_empty() && invalidated == 1, "{again:?}");
}

/// Figures: `cargo test --release -p terway-daemon --lib -- --ignored --nocapture bpf::service_maps`.
#[test]
#[ignore = "a measurement, for release builds"]
fn scale() {
    const SERVICES: usize = 30_000;
    let Some(mut state) = maps() else { return };
    let mut objects = Objects::default();
    for i in 0..SERVICES {
        objects.apply(cluster_ip(i));
        objects.apply(slice(i, &[1, 2, 3, 4], "me"));
    }
    let start = std::time::Instant::now();
    let mut planner_ = planner(state.recover().unwrap());
    let plan = planner_.sync(&objects);
    let planned = start.elapsed();
    run(&mut state, &plan.ops).unwrap();
    println!(
        "{SERVICES} Services x 4 endpoints: planned in {planned:.2?}, in the maps after {:.2?} and {} writes",
        start.elapsed(),
        state.writes
    );
    let start = std::time::Instant::now();
    let mut again = planner(state.recover().unwrap());
    let read = start.elapsed();
    let plan = again.sync(&objects);
    run(&mut state, &plan.ops).unwrap();
    println!("restart without changes: read in {read:.2?}, done after {:.2?}", start.elapsed());
    let mut times: Vec<_> = (0..1000)
        .map(|n| {
            let change = slice(n * 29 % SERVICES, &[1, 2, 3, 5], "me");
            let start = std::time::Instant::now();
            let applied: Vec<_> = objects.apply(change).into_iter().collect();
            let plan = again.update(&objects, &applied);
            run(&mut state, &plan.ops).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("one endpoint, from object to maps: median {:.1?}, p99 {:.1?}", times[500], times[990]);
}
