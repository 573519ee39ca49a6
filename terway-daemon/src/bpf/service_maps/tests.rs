//! Conversions, and plans run on real maps of this kernel.

use terway_core::ident::Family;
use terway_core::objects::{Change, Kind, Object, Objects};
use terway_core::service::{NodeFacts, Planner, Settings};

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn keys_come_back_as_they_went() {
    for key in [
        FrontendKey::new(ip("10.96.0.1"), 443, Protocol::Tcp),
        FrontendKey::new(ip("fd00::1"), 53, Protocol::Udp),
        FrontendKey::rest(ip("10.96.0.1")),
        FrontendKey::node(Family::V4, 30_080, Protocol::Sctp),
        FrontendKey::node(Family::V6, 30_080, Protocol::Tcp),
    ] {
        assert_eq!(key_from(key.address, class(&place_of(&key)).1), Some(key));
    }
}

/// The key of a frontend as the writer of frontends makes it.
fn class(at: &FrontendAt) -> (IpAddr, u32) {
    use terway_abi::{SCOPE_ADDRESS, SCOPE_NODE, frontend_class};
    match *at {
        FrontendAt::Rest(address) => (address, 0),
        FrontendAt::Address { address, port, protocol } => {
            (address, frontend_class(port.to_be(), protocol, SCOPE_ADDRESS))
        }
        FrontendAt::Node { v6, port, protocol } => {
            let family = if v6 { Family::V6 } else { Family::V4 };
            (FrontendKey::node(family, 1, Protocol::Tcp).address, frontend_class(port.to_be(), protocol, SCOPE_NODE))
        }
    }
}

/// RangeAllocator operations, with frontends written straight into the maps.
fn run(tables: &mut Tables, ops: &[Op]) -> Result<(), BpfError> {
    let mut pending: Vec<(FrontendAt, Option<AbiFrontend>)> = Vec::new();
    for op in ops {
        tables.run(std::slice::from_ref(op), &mut |changes| {
            pending.extend_from_slice(changes);
            Ok(())
        })?;
        for (at, value) in pending.drain(..) {
            let (address, class) = class(&at);
            match (address, value) {
                (IpAddr::V4(v4), Some(value)) => {
                    tables.maps.frontends_v4.insert(FrontendKeyV4 { address: word(v4), class }, value, 0).unwrap();
                }
                (IpAddr::V6(v6), Some(value)) => {
                    tables.maps.frontends_v6.insert(FrontendKeyV6 { address: words(v6), class }, value, 0).unwrap();
                }
                (IpAddr::V4(v4), None) => {
                    absent_is_fine(tables.maps.frontends_v4.remove(&FrontendKeyV4 { address: word(v4), class }))
                        .unwrap();
                }
                (IpAddr::V6(v6), None) => {
                    absent_is_fine(tables.maps.frontends_v6.remove(&FrontendKeyV6 { address: words(v6), class }))
                        .unwrap();
                }
            }
        }
    }
    Ok(())
}

#[test]
fn backends_come_back_as_they_went() {
    for (address, state, local) in [("10.0.0.1", BackendState::Ready, true), ("fd00::2", BackendState::Draining, false)]
    {
        let key = BackendKey { address: ip(address), port: 8080, protocol: Protocol::Udp };
        let backend = Backend { key, state, local, generation: 7 };
        assert_eq!(backend_from(&backend_to(&backend)), Some(backend));
    }
    let grave = terway_abi::Backend { generation: 8, ..Default::default() };
    assert_eq!(backend_from(&grave), None);
}

#[test]
fn frontends_come_back_but_for_their_kind() {
    let place = |id: TableId| Some((Run { first: id.0 * 10, count: 4 }, Algorithm::Maglev));
    let table = Selection::Table(TableId(3));
    for (kind, inside, outside, masquerade) in [
        (FrontendKind::ClusterIp, table, Selection::Pass, false),
        (FrontendKind::LoadBalancer, table, Selection::Drop, false),
        (FrontendKind::LoadBalancer, Selection::Pass, table, true),
        (FrontendKind::LoadBalancer, Selection::Reject, Selection::Reject, true),
    ] {
        let frontend = Frontend {
            port: PortId(9),
            kind,
            inside,
            outside,
            masquerade,
            check_source: kind == FrontendKind::LoadBalancer,
            affinity_seconds: 600,
        };
        let abi = frontend_to(&frontend, place);
        let back = |run: Run, pass: u32, silent: u32| match run.count {
            _ if abi.flags & pass != 0 => Selection::Pass,
            0 if abi.flags & silent != 0 => Selection::Drop,
            0 => Selection::Reject,
            _ => Selection::Table(TableId(run.first / 10)),
        };
        let inside = back(abi.internal, frontend_flags::EXTERNAL, 0);
        let outside = back(abi.external, frontend_flags::INTERNAL, frontend_flags::SILENT);
        let key = FrontendKey::new(ip("47.0.0.1"), 80, Protocol::Tcp);
        assert_eq!(frontend_from(key, &abi, inside, outside), frontend);
    }
}

/// Maps of the shapes that `terway_ebpf::kernel::maps` gives them; none if this process may not make maps.
fn maps() -> Option<Tables> {
    /// `BPF_F_NO_PREALLOC` (include/uapi/linux/bpf.h): without it the kernel refuses a trie.
    const LAZY: u32 = 1;
    fn array<V: aya::Pod>(name: &'static str, entries: u32) -> Result<Elements<u32, V>, BpfError> {
        let array = aya::maps::Array::<MapData, V>::create(entries, 0).map_err(BpfError::map(name))?;
        Elements::of(aya::maps::IterableMap::map(&array), name)
    }
    fn named<T>(name: &'static str, made: Result<T, MapError>) -> Result<T, BpfError> {
        made.map_err(BpfError::map(name))
    }
    let made = || -> Result<Maps, BpfError> {
        Ok(Maps {
            frontends_v4: named(names::FRONTENDS_V4, HashMap::create(131_072, LAZY))?,
            frontends_v6: named(names::FRONTENDS_V6, HashMap::create(131_072, LAZY))?,
            members: array(names::MEMBERS, 1_048_576)?,
            backends: array(names::BACKENDS, 131_072)?,
            loads: array(names::LOADS, 131_072)?,
            ranges_v4: named(names::RANGES_V4, LpmTrie::create(65_536, LAZY))?,
            ranges_v6: named(names::RANGES_V6, LpmTrie::create(65_536, LAZY))?,
        })
    };
    match made() {
        Ok(maps) => Some(Tables::over(maps)),
        Err(error) => {
            println!("SKIP: this process may not make BPF maps: {error}");
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
fn clients(tables: &Tables) -> Clients {
    let side = |run: Run| -> Vec<BackendKey> {
        let members = (run.first..run.first + run.count).map(|i| tables.maps.members.get(&i).unwrap().unwrap());
        let backends = members.map(|m| (m.generation, tables.maps.backends.get(&m.backend).unwrap().unwrap()));
        let alive = backends
            .inspect(|(generation, b)| assert_eq!(*generation, b.generation, "a member of a life that is over"));
        alive.map(|(_, b)| backend_from(&b).unwrap().key).collect()
    };
    let v4 = tables.maps.frontends_v4.iter().map(Result::unwrap);
    let v4 = v4.map(|(k, f)| (key_from(IpAddr::V4(address_v4(k.address)), k.class).unwrap(), f));
    let v6 = tables.maps.frontends_v6.iter().map(Result::unwrap);
    let v6 = v6.map(|(k, f)| (key_from(IpAddr::V6(address_v6(k.address)), k.class).unwrap(), f));
    v4.chain(v6).map(|(key, f)| (key, (f.flags, f.affinity, side(f.internal), side(f.external)))).collect()
}

#[test]
fn plans_on_real_maps_survive_restarts_and_write_only_what_differs() {
    const SERVICES: usize = 300;
    let Some(mut tables) = maps() else { return };
    let mut objects = Objects::default();
    for i in 0..SERVICES {
        objects.apply(service(i));
        objects.apply(slice(i, &[1, 2, 3], if i % 4 == 0 { "me" } else { "other" }));
    }
    let mut first = planner(tables.recover().unwrap());
    let plan = first.sync(&objects);
    run(&mut tables, &plan.ops).unwrap();
    run(&mut tables, &plan.retire).unwrap();
    first.retired(&plan.retire);
    let seen = clients(&tables);
    // Two ports at two cluster addresses, the rest of each, at one balancer's address, and a node port for one of them in two families.
    assert_eq!(seen.len(), SERVICES * (4 + 2 + 2 + 2));
    let web = &seen[&FrontendKey::new("10.96.0.1".parse().unwrap(), 80, Protocol::Tcp)];
    assert_eq!(web.2.len(), 3, "{web:?}");
    assert!(web.3.is_empty() && web.0 & frontend_flags::INTERNAL != 0);

    // A restart over unchanged objects.
    let writes = tables.writes;
    let kernel = tables.recover().unwrap();
    let mut second = planner(kernel);
    let plan = second.sync(&objects);
    run(&mut tables, &plan.ops).unwrap();
    run(&mut tables, &plan.retire).unwrap();
    second.retired(&plan.retire);
    assert_eq!((tables.writes - writes, plan.retire.len()), (0, 0), "nothing differs, nothing is written");
    assert_eq!(clients(&tables), seen);

    // One endpoint changes while nobody looks; the next daemon writes that.
    objects.apply(slice(6, &[1, 2, 4], "other"));
    let mut third = planner(tables.recover().unwrap());
    let plan = third.sync(&objects);
    let writes = tables.writes;
    run(&mut tables, &plan.ops).unwrap();
    run(&mut tables, &plan.retire).unwrap();
    third.retired(&plan.retire);
    assert!(tables.writes - writes <= 30, "{} writes for one endpoint", tables.writes - writes);
    let now = clients(&tables);
    let changed: Vec<_> = now.iter().filter(|(key, value)| seen.get(key) != Some(value)).map(|(key, _)| *key).collect();
    assert!(!changed.is_empty() && changed.len() <= 10, "{changed:?}");

    // All Services go: so does everything in the maps, but for the generations of the dead.
    let names: Vec<_> = objects.services().keys().cloned().collect();
    let gone =
        names.into_iter().map(|name| Change::Delete(terway_core::objects::ObjectKey { kind: Kind::Service, name }));
    let applied: Vec<_> = gone.filter_map(|change| objects.apply(change)).collect();
    let plan = third.update(&objects, &applied);
    run(&mut tables, &plan.ops).unwrap();
    run(&mut tables, &plan.retire).unwrap();
    assert_eq!(tables.runs.left(), tables.maps.members.capacity(), "all places are free again");
    let left = tables.recover().unwrap();
    assert_eq!((left.frontends.len(), left.tables.len(), left.backends.len(), left.ranges.len()), (0, 0, 0, 0));
    assert!(left.generation > 0);
}

#[test]
fn a_full_map_is_told_by_name() {
    let Some(mut tables) = maps() else { return };
    let key = BackendKey { address: ip("10.0.0.1"), port: 80, protocol: Protocol::Tcp };
    let backend = Backend { key, state: BackendState::Ready, local: false, generation: 1 };
    let error = run(&mut tables, &[Op::PutBackend(BackendId(131_072), backend)]).unwrap_err();
    assert_eq!(error.to_string(), "the datapath holds at most 131071 backends");
    let slots = vec![BackendRef { backend: BackendId(1), generation: 1 }; 1_048_577];
    let table = Arc::new(Table { algorithm: Algorithm::Random, slots });
    let error = run(&mut tables, &[Op::PutTable(TableId(1), table)]).unwrap_err();
    assert_eq!(error.to_string(), "the datapath holds at most 1048576 slots of backend tables");
}

/// Figures: `cargo test --release -p terway-daemon --lib -- --ignored --nocapture bpf::services`.
#[test]
#[ignore = "a measurement, for release builds"]
fn scale() {
    const SERVICES: usize = 30_000;
    let Some(mut tables) = maps() else { return };
    let mut objects = Objects::default();
    let plain = |i: usize| {
        let json = format!(
            r#"{{"metadata":{{"name":"s{i}","namespace":"ns"}},"spec":{{"clusterIP":"10.96.{}.{}","ports":[{{"name":"web","port":80}}]}}}}"#,
            i / 250,
            i % 250 + 1
        );
        object(Kind::Service, &json)
    };
    for i in 0..SERVICES {
        objects.apply(plain(i));
        objects.apply(slice(i, &[1, 2, 3, 4], "me"));
    }
    let start = std::time::Instant::now();
    let mut planner_ = planner(tables.recover().unwrap());
    let plan = planner_.sync(&objects);
    let planned = start.elapsed();
    run(&mut tables, &plan.ops).unwrap();
    println!(
        "{SERVICES} Services x 4 endpoints: planned in {planned:.2?}, in the maps after {:.2?} and {} writes",
        start.elapsed(),
        tables.writes
    );
    let start = std::time::Instant::now();
    let mut again = planner(tables.recover().unwrap());
    let read = start.elapsed();
    let plan = again.sync(&objects);
    run(&mut tables, &plan.ops).unwrap();
    println!("restart without changes: read in {read:.2?}, done after {:.2?}", start.elapsed());
    let mut times: Vec<_> = (0..1000)
        .map(|n| {
            let change = slice(n * 29 % SERVICES, &[1, 2, 3, 5], "me");
            let start = std::time::Instant::now();
            let applied: Vec<_> = objects.apply(change).into_iter().collect();
            let plan = again.update(&objects, &applied);
            run(&mut tables, &plan.ops).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("one endpoint, from object to maps: median {:.1?}, p99 {:.1?}", times[500], times[990]);
}
