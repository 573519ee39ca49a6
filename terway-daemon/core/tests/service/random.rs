//! Random clusters under random changes: incremental planning and planning from scratch agree with the oracle.

use proptest::prelude::*;
use terway_core::objects::{
    AddressKind, Change, Endpoint, Hints, IpMode, Kind, LoadBalancerIngress, Node, Object, ObjectKey, ObjectName, Pod,
    PodPort, Protocol, Service, ServiceType, TargetRef, TrafficPolicy,
};
use terway_core::service::{ALGORITHM, BACKEND_TYPE, HEADLESS, MapContents, Op, PROXY_NAME, Planner, Settings, WEIGHT};

use crate::oracle;
use crate::world::{ME, World, endpoint, facts, ip, meta, names, pod, service, slice};

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;

fn any_policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn rarely<T: std::fmt::Debug + Clone + Default>(
    weight: u32,
    what: impl Strategy<Value = T>,
) -> impl Strategy<Value = T> {
    prop_oneof![9 => Just(T::default()), weight => what]
}

fn any_service() -> impl Strategy<Value = Service> {
    let shape = (0..3usize, 0..5usize, 0..3usize, any::<bool>());
    let external = (
        prop_oneof![Just(ServiceType::ClusterIP), Just(ServiceType::NodePort), Just(ServiceType::LoadBalancer)],
        any_policy(),
        any_policy(),
        0..3u16,
        prop::sample::subsequence(vec!["47.0.0.1", "47.0.0.2", "2001:db8:f::1"], 0..3),
        prop::sample::subsequence(vec!["198.51.100.1", "10.96.0.2", "192.168.0.1"], 0..2),
        prop::sample::subsequence(vec!["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"], 0..3),
    );
    let notes = (
        rarely(3, prop_oneof![Just("maglev"), Just("least-connections"), Just("nonsense")]),
        rarely(1, Just("eni")),
        rarely(1, prop_oneof![Just(PROXY_NAME), Just(HEADLESS)]),
        any::<bool>(),
        rarely(2, Just(600u32)),
        any::<bool>(),
        rarely(2, Just(true)),
    );
    (shape, external, notes).prop_map(|(shape, external, notes)| {
        let (name, vip, ports, dual) = shape;
        let ports: &[(&str, u16, Protocol)] =
            [&[("", 80, TCP)][..], &[("http", 80, TCP), ("dns", 53, UDP)], &[("http", 81, TCP)]][ports];
        let mut s = service(&format!("s{name}"), &format!("10.96.0.{}", if vip == 4 { 1 } else { name + 1 }), ports);
        if dual {
            s.cluster_ips.push(ip(&format!("fd96::{}", name + 1)));
        }
        let (kind, internal, extern_policy, node_port, ingress, external_ips, ranges) = external;
        (s.kind, s.internal_policy, s.external_policy) = (kind, internal, extern_policy);
        for (i, port) in s.ports.iter_mut().enumerate() {
            port.node_port = if node_port == 0 { 0 } else { 30_000 + node_port + 10 * i as u16 };
        }
        s.health_check_port = if extern_policy == TrafficPolicy::Local { 31_000 + name as u16 } else { 0 };
        let mode = if notes.5 { IpMode::VIP } else { IpMode::Proxy };
        s.ingress = ingress.iter().map(|i| LoadBalancerIngress { ip: Some(ip(i)), ip_mode: mode }).collect();
        s.external_ips = external_ips.iter().map(|i| ip(i)).collect();
        s.source_ranges = ranges.iter().map(|r| r.parse().unwrap()).collect();
        let annotations = [(ALGORITHM, notes.0), (BACKEND_TYPE, notes.1)];
        s.meta.annotations = annotations.into_iter().filter(|(_, v)| !v.is_empty()).collect();
        s.meta.labels = [(notes.2, "x")].into_iter().filter(|(k, _)| !k.is_empty()).collect();
        s.affinity_seconds = notes.3.then_some(notes.4).filter(|s| *s != 0);
        s.headless = notes.6;
        s
    })
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let conditions = prop_oneof![
        4 => Just((true, true, false)),
        1 => Just((false, false, false)),
        2 => Just((false, true, true)),
        1 => Just((false, false, true)),
        1 => Just((true, true, true))
    ];
    let zones = prop::sample::subsequence(vec!["z1", "z2"], 0..=2);
    let nodes = prop::sample::subsequence(vec![ME, "other"], 0..=2);
    (1..5u8, conditions, any::<bool>(), prop::option::weighted(0.6, (zones, nodes)), 0..6u8).prop_map(
        |(host, (ready, serving, terminating), local, hints, target)| {
            let mut e = endpoint(&format!("10.0.0.{host}"), if local { ME } else { "other" });
            (e.ready, e.serving, e.terminating) = (ready, serving, terminating);
            e.hints = hints.map(|(zones, nodes)| Box::new(Hints { nodes: names(&nodes), zones: names(&zones) }));
            e.target = (target < 3).then(|| {
                let kind = if target == 2 { "Other" } else { "Pod" }.into();
                Box::new(TargetRef { kind, namespace: "ns".into(), name: format!("p{}", target % 2).into() })
            });
            e
        },
    )
}

fn any_slice() -> impl Strategy<Value = terway_core::objects::EndpointSlice> {
    let endpoints = prop::collection::vec(any_endpoint(), 0..4);
    (0..5u8, 0..3u8, 0..3usize, endpoints, any::<bool>(), 0..12u8).prop_map(
        |(name, owner, ports, mut endpoints, v6, mark)| {
            let ports: &[(&str, u16, Protocol)] =
                [&[("", 8080, TCP)][..], &[("http", 8080, TCP), ("dns", 5353, UDP)], &[("http", 8081, TCP)]][ports];
            if v6 {
                for e in &mut endpoints {
                    let last = e.address.unwrap().to_string().rsplit('.').next().unwrap().to_owned();
                    e.address = Some(ip(&format!("fd00::{last}")));
                }
            }
            let mut s = slice(&format!("e{name}"), &format!("s{owner}"), ports, endpoints);
            if mark == 0 {
                let labels = s.meta.labels.iter().map(|(k, v)| (k.to_string(), v.to_string()));
                s.meta.labels = labels.chain([(HEADLESS.to_owned(), String::new())]).collect();
            }
            s
        },
    )
}

fn any_pod() -> impl Strategy<Value = Pod> {
    let port = (0..3u16, prop::option::of(prop_oneof![Just("0.0.0.0"), Just("192.168.0.1")]));
    (0..3u8, prop::option::of(prop_oneof![Just("0"), Just("5"), Just("10"), Just("x")]), any::<bool>(), port).prop_map(
        |(name, weight, here, (host_port, host_ip))| {
            let mut p = pod(&format!("p{name}"), &format!("10.0.0.{}", name + 1));
            p.meta.annotations = weight.map(|w| (WEIGHT, w)).into_iter().collect();
            p.node = Some(if here { ME } else { "other" }.into());
            p.ports = Box::new([PodPort {
                name: "".into(),
                protocol: TCP,
                port: 8080,
                host_port: if host_port == 0 { 0 } else { 30_000 + host_port },
                host_ip: host_ip.map(ip),
            }]);
            p
        },
    )
}

fn any_node() -> impl Strategy<Value = Node> {
    (any::<bool>(), prop::option::of(prop_oneof![Just("z1"), Just("z2")]), 1..3u8).prop_map(|(mine, zone, address)| {
        let mut node = Node { meta: meta(if mine { ME } else { "other" }), addresses: Vec::new(), ..Node::default() };
        node.meta.object.namespace = "".into();
        node.meta.labels = zone.map(|z| ("topology.kubernetes.io/zone", z)).into_iter().collect();
        node.addresses.push((AddressKind::Internal, ip(&format!("192.168.0.{address}"))));
        node
    })
}

pub(crate) fn any_change() -> impl Strategy<Value = Change> {
    let up = |object| Change::Upsert(Box::new(object));
    let gone = |kind, name: String| Change::Delete(ObjectKey { kind, name: ObjectName::new("ns", &name) });
    prop_oneof![
        5 => any_service().prop_map(move |s| up(Object::Service(s))),
        8 => any_slice().prop_map(move |s| up(Object::EndpointSlice(s))),
        2 => any_pod().prop_map(move |p| up(Object::Pod(p))),
        1 => any_node().prop_map(move |n| up(Object::Node(n))),
        1 => (0..3u8).prop_map(move |i| gone(Kind::Service, format!("s{i}"))),
        2 => (0..5u8).prop_map(move |i| gone(Kind::EndpointSlice, format!("e{i}"))),
        1 => (0..3u8).prop_map(move |i| gone(Kind::Pod, format!("p{i}"))),
        1 => Just(Change::Delete(ObjectKey { kind: Kind::Node, name: ObjectName::new("", ME) })),
    ]
}

pub(crate) fn any_settings() -> impl Strategy<Value = Settings> {
    any::<bool>().prop_map(|in_cluster_loadbalance| Settings {
        in_cluster_loadbalance,
        maglev_size: 251,
        ..Settings::default()
    })
}

proptest! {
    #[test]
    fn service_maps_match_oracle_after_each_batch(
        settings in any_settings(),
        batches in prop::collection::vec((prop::collection::vec(any_change(), 1..4), any::<bool>()), 1..14),
    ) {
        let mut world = World::with(settings);
        for (batch, later) in batches {
            world.begin(batch);
            world.check_frontends();
            if !later {
                world.settle();
                world.check();
            }
        }
        world.settle();
        world.check();
        // A restart over unchanged objects writes nothing.
        let mut again = Planner::restore(facts(), world.settings.clone(), world.kernel.clone());
        let plan = again.sync(&world.objects);
        if world.has_conflicts() {
            world.planner = again;
            world.run(&plan);
            world.settle();
            world.check();
        } else {
            prop_assert!(plan.is_empty(), "{:?}", plan);
            prop_assert_eq!(again.map_contents(), world.kernel);
        }
    }

    #[test]
    fn restart_during_service_plan(
        before in prop::collection::vec(any_change(), 1..14),
        missed in prop::collection::vec(any_change(), 1..8),
        later in prop::collection::vec(any_change(), 1..8),
        cut in 0..40usize,
    ) {
        let mut world = World::new();
        world.change(before);
        // Some operations of the next plan are run, then the daemon dies; the cluster goes on.
        let applied: Vec<_> = missed.into_iter().filter_map(|c| world.objects.apply(c)).collect();
        let plan = world.planner.update(&world.objects, &applied);
        for op in plan.ops.iter().chain(&plan.retire).take(cut) {
            world.kernel.apply(op);
        }
        for change in later {
            world.objects.apply(change);
        }
        let found: MapContents = world.kernel.clone();
        world.planner = Planner::restore(facts(), world.settings.clone(), found.clone());
        let plan = world.planner.sync(&world.objects);
        world.health.clear();
        world.problems.clear();
        world.run(&plan);
        world.settle();
        world.check();
        for op in &plan.ops {
            if let Op::PutBackend(id, backend) = op {
                let same = found.backends.get(id).filter(|old| old.key == backend.key);
                let silent = backend.key.protocol == UDP;
                prop_assert!(same.is_none_or(|old| old.generation == backend.generation || silent), "a running flow would die");
            }
        }
    }
}

#[test]
fn oracle_distinguishes_states() {
    let mut world = World::new();
    world.put(service("s0", "10.96.0.1", &[("", 80, TCP)]));
    let empty = world.expected();
    world.put(slice("e0", "s0", &[("", 8080, TCP)], vec![endpoint("10.0.0.1", ME)]));
    assert_ne!(world.expected(), empty);
    let key = terway_core::service::FrontendKey::new(ip("10.96.0.1"), 80, oracle::TCP);
    assert!(matches!(world.expected().frontends[&key].internal, oracle::Answer::Backends(..)));
}
