//! The rules one by one, as examples.

use terway_core::ident::Family;
use terway_core::objects::{Hints, IpMode, LoadBalancerIngress, Protocol, ServiceType, TrafficPolicy};
use terway_core::service::{ALGORITHM, BACKEND_TYPE, FrontendKey, Settings};

use crate::oracle::{Answer, TCP, resolve};
use crate::world::{ME, World, endpoint, ip, names, pod, service, slice};

const PORTS: &[(&str, u16, Protocol)] = &[("", 8080, TCP)];

fn at(address: &str, port: u16) -> FrontendKey {
    FrontendKey::new(ip(address), port, TCP)
}

impl World {
    fn internal(&self, key: FrontendKey) -> Answer {
        resolve(&self.kernel, self.kernel.frontends[&key].internal)
    }

    fn external(&self, key: FrontendKey) -> Answer {
        resolve(&self.kernel, self.kernel.frontends[&key].external)
    }
}

fn hosts(answer: &Answer) -> Vec<String> {
    match answer {
        Answer::Backends(_, shares) => shares.keys().map(|k| k.address.to_string()).collect(),
        other => vec![format!("{other:?}")],
    }
}

fn two_nodes() -> Vec<terway_core::objects::Endpoint> {
    vec![endpoint("10.0.0.1", ME), endpoint("10.0.0.2", "other")]
}

#[test]
fn cluster_ip_with_unknown_port_is_rejected() {
    let mut world = World::new();
    world.put(service("s", "10.96.0.1", &[("", 80, TCP)]));
    assert_eq!(world.internal(FrontendKey::rest(ip("10.96.0.1"))), Answer::Reject);
    assert_eq!(world.internal(at("10.96.0.1", 80)), Answer::Reject, "no endpoints");
    world.put(slice("e", "s", PORTS, two_nodes()));
    assert_eq!(hosts(&world.internal(at("10.96.0.1", 80))), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(world.external(at("10.96.0.1", 80)), Answer::Pass, "a cluster address means nothing to those external");
}

#[test]
fn internal_and_external_traffic_policies() {
    for (internal, external, vip, from_outside) in [
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster, 2, 2),
        (TrafficPolicy::Cluster, TrafficPolicy::Local, 2, 1),
        (TrafficPolicy::Local, TrafficPolicy::Cluster, 1, 2),
        (TrafficPolicy::Local, TrafficPolicy::Local, 1, 1),
    ] {
        let mut world = World::new();
        let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
        (s.kind, s.internal_policy, s.external_policy) = (ServiceType::NodePort, internal, external);
        s.ports[0].node_port = 30_080;
        world.put(s);
        world.put(slice("e", "s", PORTS, two_nodes()));
        let node_port = FrontendKey::node(Family::V4, 30_080, TCP);
        assert_eq!(hosts(&world.internal(at("10.96.0.1", 80))).len(), vip);
        assert_eq!(hosts(&world.external(node_port)).len(), from_outside);
        assert_eq!(hosts(&world.internal(node_port)).len(), 2, "internal the cluster, a node port leads to all");
        assert_eq!(world.kernel.frontends[&node_port].masquerade, external == TrafficPolicy::Cluster);
    }
}

#[test]
fn local_policy_without_local_endpoints() {
    let mut world = World::new();
    let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
    (s.kind, s.internal_policy, s.external_policy) =
        (ServiceType::LoadBalancer, TrafficPolicy::Local, TrafficPolicy::Local);
    s.ingress = vec![LoadBalancerIngress { ip: Some(ip("47.0.0.1")), ip_mode: IpMode::VIP }];
    s.health_check_port = 31_000;
    world.put(s);
    assert_eq!(world.health, [(31_000, 0)].into());
    world.put(slice("e", "s", PORTS, vec![endpoint("10.0.0.2", "other")]));
    assert_eq!(world.internal(at("10.96.0.1", 80)), Answer::Reject, "as if there were no endpoint");
    assert_eq!(world.external(at("47.0.0.1", 80)), Answer::Drop, "the balancer will notice");
    assert_eq!(hosts(&world.internal(at("47.0.0.1", 80))), ["10.0.0.2"]);
    world.put(slice("e", "s", PORTS, two_nodes()));
    assert_eq!(world.health, [(31_000, 1)].into());
}

#[test]
fn load_balancer_ip_mode() {
    let mut world = World::new();
    let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
    s.kind = ServiceType::LoadBalancer;
    s.ingress = vec![
        LoadBalancerIngress { ip: Some(ip("47.0.0.1")), ip_mode: IpMode::Proxy },
        LoadBalancerIngress { ip: Some(ip("47.0.0.2")), ip_mode: IpMode::VIP },
    ];
    s.meta.annotations = [(BACKEND_TYPE, "eni")].into_iter().collect();
    world.put(s);
    world.put(slice("e", "s", PORTS, two_nodes()));
    assert!(!world.kernel.frontends.contains_key(&at("47.0.0.1", 80)), "a proxy must see its traffic");
    assert_eq!(hosts(&world.internal(at("47.0.0.2", 80))).len(), 2, "short-circuited");
    assert_eq!(world.external(at("47.0.0.2", 80)), Answer::Pass, "not the node's business");
}

#[test]
fn in_cluster_loadbalance_off() {
    let mut world = World::with(Settings { in_cluster_loadbalance: false, ..Settings::default() });
    let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
    s.kind = ServiceType::LoadBalancer;
    s.ingress = vec![LoadBalancerIngress { ip: Some(ip("47.0.0.2")), ip_mode: IpMode::VIP }];
    world.put(s);
    world.put(slice("e", "s", PORTS, two_nodes()));
    assert_eq!(world.internal(at("47.0.0.2", 80)), Answer::Pass);
    assert_eq!(hosts(&world.external(at("47.0.0.2", 80))).len(), 2);
}

#[test]
fn terminating_endpoints_are_fallback() {
    let mut world = World::new();
    world.put(service("s", "10.96.0.1", &[("", 80, TCP)]));
    let mut leaving = endpoint("10.0.0.1", ME);
    (leaving.ready, leaving.terminating) = (false, true);
    world.put(slice("e", "s", PORTS, vec![leaving.clone(), endpoint("10.0.0.2", "other")]));
    assert_eq!(hosts(&world.internal(at("10.96.0.1", 80))), ["10.0.0.2"]);
    world.put(slice("e", "s", PORTS, vec![leaving.clone()]));
    assert_eq!(hosts(&world.internal(at("10.96.0.1", 80))), ["10.0.0.1"]);
    leaving.serving = false;
    world.put(slice("e", "s", PORTS, vec![leaving]));
    assert_eq!(world.internal(at("10.96.0.1", 80)), Answer::Reject);
}

#[test]
fn topology_hints() {
    let mut world = World::new();
    world.put(service("s", "10.96.0.1", &[("", 80, TCP)]));
    let hinted = |address: &str, zones: &[&str], nodes: &[&str]| {
        let mut e = endpoint(address, "other");
        e.hints = Some(Box::new(Hints { zones: names(zones), nodes: names(nodes) }));
        e
    };
    let mut serve = |endpoints| {
        world.put(slice("e", "s", PORTS, endpoints));
        hosts(&world.internal(at("10.96.0.1", 80)))
    };
    let (near, far) = (hinted("10.0.0.1", &["z1"], &[]), hinted("10.0.0.2", &["z2"], &[]));
    assert_eq!(serve(vec![near.clone(), far.clone()]), ["10.0.0.1"]);
    assert_eq!(serve(vec![far.clone()]), ["10.0.0.2"], "none for our zone");
    assert_eq!(serve(vec![near.clone(), far, endpoint("10.0.0.3", "other")]).len(), 3, "one has no hint");
    let (mine, other) = (hinted("10.0.0.4", &["z1"], &[ME]), hinted("10.0.0.5", &["z1"], &["other"]));
    assert_eq!(serve(vec![mine.clone(), other]), ["10.0.0.4"], "the node before the zone");
    assert_eq!(serve(vec![mine, near]).len(), 2, "not all have node hints, all have our zone");
}

#[test]
fn host_ports_and_node_ports() {
    let mut world = World::new();
    let mut p = pod("p", "10.0.0.9");
    let port = |port, host_port| terway_core::objects::PodPort {
        name: "".into(),
        protocol: TCP,
        port,
        host_port,
        host_ip: None,
    };
    p.ports = Box::new([port(80, 8080), port(81, 30_081)]);
    world.put(p);
    assert_eq!(hosts(&world.external(FrontendKey::node(Family::V4, 8080, TCP))), ["10.0.0.9"]);
    let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
    s.kind = ServiceType::NodePort;
    s.ports[0].node_port = 30_081;
    let plan = world.put(s);
    assert_eq!(
        world.external(FrontendKey::node(Family::V4, 30_081, TCP)),
        Answer::Reject,
        "the Service has no endpoints, and the port"
    );
    assert!(
        plan.object_errors.values().flatten().any(|p| p.contains("belongs to Service ns/s already")),
        "{:?}",
        plan.object_errors
    );
}

#[test]
fn unknown_load_balancing_algorithm() {
    let mut world = World::new();
    let mut s = service("s", "10.96.0.1", &[("", 80, TCP)]);
    s.meta.annotations = [(ALGORITHM, "fastest")].into_iter().collect();
    let plan = world.put(s);
    let told = |plan: &terway_core::service::Plan| plan.object_errors.values().flatten().cloned().collect::<Vec<_>>();
    assert!(told(&plan)[0].contains("`fastest` is none of random"), "{:?}", plan.object_errors);
    let plan = world.put(service("s", "10.96.0.1", &[("", 80, TCP)]));
    assert!(plan.object_errors.len() == 1 && told(&plan).is_empty(), "it is taken back: {:?}", plan.object_errors);
}
