//! What Kubernetes says a node must serve, computed from scratch and as plainly as can be.
//!
//! Written from the documentation: Services (concepts/services-networking/service), virtual IPs (reference/networking/virtual-ips),
//! EndpointSlices, KEP-1669 (terminating endpoints), KEP-2433 and KEP-3015 (hints), and the list of differences in docs/services.md.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use terway_core::objects::{
    IpMode, Kind, ObjectKey, ObjectName, Objects, Pod, Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use terway_core::service::{
    Algorithm, BackendKey, BackendState, FrontendKey, FrontendKind, MapContents, NodeFacts, Selection, Settings,
};

// Written out, not taken from the product: a label that is misspelt there must not be misspelt here.
const ALGORITHM: &str = "terway.alibabacloud.com/load-balancing";
const WEIGHT: &str = "terway.alibabacloud.com/weight";
const BACKEND_TYPE: &str = "service.beta.kubernetes.io/backend-type";
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// Where a client ends up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// At one of these, each with its share in lowest terms; shares of algorithms that keep them elsewhere are 1.
    Backends(Algorithm, BTreeMap<BackendKey, u64>),
    Reject,
    Drop,
    Pass,
}

/// What is expected of a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) kind: FrontendKind,
    pub(crate) internal: Answer,
    pub(crate) external: Answer,
    pub(crate) masquerade: bool,
    pub(crate) ranges: Option<Vec<ipnetwork::IpNetwork>>,
    pub(crate) affinity: u32,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Everything {
    pub(crate) frontends: BTreeMap<FrontendKey, Expected>,
    pub(crate) backends: BTreeMap<BackendKey, (BackendState, bool)>,
    pub(crate) health: BTreeMap<u16, u32>,
    pub(crate) problems: BTreeMap<ObjectKey, BTreeSet<String>>,
}

#[derive(Clone)]
struct Ep {
    key: BackendKey,
    state: BackendState,
    local: bool,
    weight: u64,
    zones: Vec<String>,
    nodes: Vec<String>,
}

fn lowest_terms(shares: &mut BTreeMap<BackendKey, u64>) {
    let divides_all = |d: u64, s: &BTreeMap<BackendKey, u64>| s.values().all(|v| v % d == 0);
    let largest = shares.values().copied().max().unwrap_or(1);
    let divisor = (1..=largest).rev().find(|d| divides_all(*d, shares)).unwrap_or(1);
    shares.values_mut().for_each(|v| *v /= divisor);
}

fn answer(algorithm: Algorithm, eps: &[&Ep], otherwise: Answer) -> Answer {
    if eps.is_empty() {
        return otherwise;
    }
    let everyone_zero = eps.iter().all(|e| e.weight == 0);
    let weight = |e: &Ep| if everyone_zero { 1 } else { e.weight };
    let mut shares: BTreeMap<BackendKey, u64> =
        eps.iter().filter(|e| weight(e) > 0).map(|e| (e.key, weight(e))).collect();
    match algorithm {
        Algorithm::Random | Algorithm::LeastConnections => lowest_terms(&mut shares),
        Algorithm::Maglev => shares.values_mut().for_each(|v| *v = 1),
    }
    Answer::Backends(algorithm, shares)
}

fn weight_of(objects: &Objects, pod: Option<(&str, &str)>) -> u64 {
    let find = |(ns, name)| objects.pods().iter().find(|(n, _)| &*n.namespace == ns && &*n.name == name);
    let text = pod.and_then(find).and_then(|(_, pod)| pod.meta.annotations.get(WEIGHT).map(str::to_owned));
    text.and_then(|t| t.parse().ok()).filter(|w| *w <= 100).unwrap_or(1)
}

fn endpoints(objects: &Objects, me: &str, service: &Service, port: &ServicePort, v6: bool) -> Vec<Ep> {
    let mut all: BTreeMap<BackendKey, Ep> = BTreeMap::new();
    for slice in objects.slices().values() {
        let named = slice.meta.labels.get("kubernetes.io/service-name") == Some(&*service.meta.object.name);
        let skip = slice.meta.labels.get(PROXY_NAME).is_some() || slice.meta.labels.get(HEADLESS).is_some();
        if !named || skip || slice.meta.object.namespace != service.meta.object.namespace {
            continue;
        }
        for p in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            for e in &slice.endpoints {
                let (Some(number), Some(address)) = (p.port, e.address) else { continue };
                if address.is_ipv6() != v6 {
                    continue;
                }
                let key = BackendKey { address, port: number, protocol: port.protocol };
                let state = if e.ready || service.publish_not_ready {
                    BackendState::Ready
                } else if e.serving && e.terminating {
                    BackendState::Draining
                } else {
                    BackendState::Unready
                };
                let hints = e.hints.as_deref().cloned().unwrap_or_default();
                let target = e.target.as_ref().filter(|t| &*t.kind == "Pod").map(|t| (&*t.namespace, &*t.name));
                let new = Ep {
                    key,
                    state,
                    local: e.node.as_deref() == Some(me),
                    weight: weight_of(objects, target),
                    zones: hints.zones.iter().map(|z| z.to_string()).collect(),
                    nodes: hints.nodes.iter().map(|z| z.to_string()).collect(),
                };
                let local = new.local || all.get(&key).is_some_and(|old| old.local);
                if all.get(&key).is_none_or(|old| old.state < state) {
                    all.insert(key, new);
                }
                all.get_mut(&key).unwrap().local = local;
            }
        }
    }
    all.into_values().collect()
}

fn cluster_policy<'a>(eps: &'a [Ep], me: &str, zone: Option<&str>) -> Vec<&'a Ep> {
    let ready: Vec<&Ep> = eps.iter().filter(|e| e.state == BackendState::Ready).collect();
    if ready.is_empty() {
        return eps.iter().filter(|e| e.state == BackendState::Draining).collect();
    }
    let for_me = |e: &&&Ep| e.nodes.iter().any(|n| n == me);
    if ready.iter().all(|e| !e.nodes.is_empty()) && ready.iter().any(|e| for_me(&e)) {
        return ready.iter().filter(for_me).copied().collect();
    }
    let in_zone = |e: &&&Ep| zone.is_some_and(|zone| e.zones.iter().any(|z| z == zone));
    if ready.iter().all(|e| !e.zones.is_empty()) && ready.iter().any(|e| in_zone(&e)) {
        return ready.iter().filter(in_zone).copied().collect();
    }
    ready
}

fn local_policy(eps: &[Ep]) -> Vec<&Ep> {
    let of = |state| -> Vec<&Ep> { eps.iter().filter(|e| e.local && e.state == state).collect() };
    let ready = of(BackendState::Ready);
    if ready.is_empty() { of(BackendState::Draining) } else { ready }
}

fn object(kind: Kind, name: &ObjectName) -> ObjectKey {
    ObjectKey { kind, name: name.clone() }
}

/// Everything that the node must serve.
pub(crate) fn expected(objects: &Objects, facts: &NodeFacts, settings: &Settings) -> Everything {
    let me = &*facts.name;
    let node = objects.nodes().values().find(|n| n.meta.object.name == facts.name);
    let zone = node.and_then(|n| n.zone()).map(str::to_owned).or_else(|| facts.zone.as_deref().map(str::to_owned));
    let mut out = Everything::default();
    // Who comes first by kind, then by name, owns a frontend.
    let mut claims: Vec<(FrontendKind, u8, String, usize, FrontendKey, Expected)> = Vec::new();
    for (name, service) in objects.services() {
        let given_away = service.meta.labels.get(PROXY_NAME).is_some() || service.meta.labels.get(HEADLESS).is_some();
        let nothing_to_serve =
            service.headless || service.cluster_ips.is_empty() || service.kind == ServiceType::ExternalName;
        if given_away || nothing_to_serve {
            continue;
        }
        let wish = service.meta.annotations.get(ALGORITHM);
        if let Some(word) = wish.filter(|word| !["random", "least-connections", "maglev"].contains(word)) {
            let text = format!(
                "annotation {ALGORITHM}: `{word}` is none of random, least-connections and maglev; {} is used",
                settings.algorithm.name()
            );
            out.problems.entry(object(Kind::Service, name)).or_default().insert(text);
        }
        let algorithm = match wish {
            Some("random") => Algorithm::Random,
            Some("least-connections") => Algorithm::LeastConnections,
            Some("maglev") => Algorithm::Maglev,
            _ => settings.algorithm,
        };
        let mut local_ready: Vec<IpAddr> = Vec::new();
        for (place, port) in service.ports.iter().enumerate() {
            for v6 in [false, true] {
                let eps = endpoints(objects, me, service, port, v6);
                for e in &eps {
                    let known = out.backends.entry(e.key).or_insert((e.state, e.local));
                    *known = (known.0.max(e.state), known.1 || e.local);
                    if e.local && e.state == BackendState::Ready && !local_ready.contains(&e.key.address) {
                        local_ready.push(e.key.address);
                    }
                }
                let cluster = answer(algorithm, &cluster_policy(&eps, me, zone.as_deref()), Answer::Reject);
                let usable = eps.iter().any(|e| e.state != BackendState::Unready);
                let locals = local_policy(&eps);
                let inside_vip = match service.internal_policy {
                    TrafficPolicy::Cluster => cluster.clone(),
                    TrafficPolicy::Local => answer(algorithm, &locals, Answer::Reject),
                };
                let from_outside = match service.external_policy {
                    TrafficPolicy::Cluster => cluster.clone(),
                    TrafficPolicy::Local => {
                        answer(algorithm, &locals, if usable { Answer::Drop } else { Answer::Reject })
                    }
                };
                let mut add = |kind, address: IpAddr, number: u16, internal: &Answer, external: &Answer| {
                    if address.is_ipv6() != v6 {
                        return;
                    }
                    let is_external = kind != FrontendKind::ClusterIp;
                    let ranges = (kind == FrontendKind::LoadBalancer && !service.source_ranges.is_empty())
                        .then(|| service.source_ranges.clone());
                    let key = if number == 0 {
                        FrontendKey::rest(address)
                    } else {
                        FrontendKey::new(address, number, port.protocol)
                    };
                    let expected = Expected {
                        kind,
                        internal: internal.clone(),
                        external: external.clone(),
                        masquerade: is_external && service.external_policy == TrafficPolicy::Cluster,
                        ranges,
                        affinity: service.affinity_seconds.unwrap_or(0),
                    };
                    claims.push((kind, 0, name.to_string(), place, key, expected));
                };
                for vip in &service.cluster_ips {
                    add(FrontendKind::ClusterIp, *vip, port.port, &inside_vip, &Answer::Pass);
                    add(FrontendKind::ClusterIp, *vip, 0, &Answer::Reject, &Answer::Pass);
                }
                let has_node_port = port.node_port != 0 && service.kind != ServiceType::ClusterIP;
                let any: IpAddr = if v6 { "::" } else { "0.0.0.0" }.parse().unwrap();
                if has_node_port && service.cluster_ips.iter().any(|vip| vip.is_ipv6() == v6) {
                    add(FrontendKind::NodePort, any, port.node_port, &cluster, &from_outside);
                }
                let shortcut = if settings.in_cluster_loadbalance { cluster.clone() } else { Answer::Pass };
                if service.kind == ServiceType::LoadBalancer {
                    let eni = service.meta.annotations.get(BACKEND_TYPE) == Some("eni");
                    for ingress in service.ingress.iter().filter(|i| i.ip_mode != IpMode::Proxy) {
                        let external = if eni { &Answer::Pass } else { &from_outside };
                        if let Some(ip) = ingress.ip {
                            add(FrontendKind::LoadBalancer, ip, port.port, &shortcut, external);
                        }
                    }
                }
                for ip in &service.external_ips {
                    add(FrontendKind::ExternalIp, *ip, port.port, &shortcut, &from_outside);
                }
            }
        }
        let balanced = service.kind == ServiceType::LoadBalancer && service.external_policy == TrafficPolicy::Local;
        if balanced && service.health_check_port != 0 {
            out.health.entry(service.health_check_port).or_insert(local_ready.len() as u32);
        }
    }
    for (name, pod) in objects.pods() {
        if pod.node.as_deref() == Some(me) && !pod.host_network && pod.holds_addresses() {
            host_ports(pod, &name.to_string(), &mut out, &mut claims);
        }
    }
    claims.sort_by(|a, b| (a.0, a.1, &a.2, a.3).cmp(&(b.0, b.1, &b.2, b.3)));
    let mut holders: BTreeMap<FrontendKey, (u8, String)> = BTreeMap::new();
    for (_, kind, name, _, key, expected) in claims {
        let object = |kind: u8, name: &str| {
            let (namespace, name) = name.split_once('/').unwrap();
            object(if kind == 0 { Kind::Service } else { Kind::Pod }, &ObjectName::new(namespace, name))
        };
        let holder = holders.entry(key).or_insert_with(|| (kind, name.clone()));
        if *holder != (kind, name.clone()) && key.protocol.is_some() {
            let text = format!("{key} belongs to {} already", object(holder.0, &holder.1));
            out.problems.entry(object(kind, &name)).or_default().insert(text);
        }
        out.frontends.entry(key).or_insert(expected);
    }
    out
}

fn host_ports(
    pod: &Pod,
    name: &str,
    out: &mut Everything,
    claims: &mut Vec<(FrontendKind, u8, String, usize, FrontendKey, Expected)>,
) {
    for (place, port) in pod.ports.iter().filter(|p| p.host_port != 0).enumerate() {
        for ip in &pod.ips {
            let backend = BackendKey { address: *ip, port: port.port, protocol: port.protocol };
            let known = out.backends.entry(backend).or_insert((BackendState::Ready, true));
            *known = (BackendState::Ready, true);
            let any: IpAddr = if ip.is_ipv6() { "::" } else { "0.0.0.0" }.parse().unwrap();
            let host = port.host_ip.unwrap_or(any);
            if host.is_ipv4() == ip.is_ipv4() {
                let to_pod = Answer::Backends(Algorithm::Random, [(backend, 1)].into());
                let expected = Expected {
                    kind: FrontendKind::HostPort,
                    internal: to_pod.clone(),
                    external: to_pod,
                    masquerade: false,
                    ranges: None,
                    affinity: 0,
                };
                let key = FrontendKey::new(host, port.host_port, port.protocol);
                claims.push((FrontendKind::HostPort, 1, name.to_owned(), place, key, expected));
            }
        }
    }
}

/// The protocol of a backend, for tests that look at one.
pub(crate) const TCP: Protocol = Protocol::Tcp;

/// What the maps give a client: follows frontend, table and backends, and refuses anything that dangles.
pub(crate) fn resolve(kernel: &MapContents, selection: Selection) -> Answer {
    let id = match selection {
        Selection::Table(id) => id,
        Selection::Reject => return Answer::Reject,
        Selection::Drop => return Answer::Drop,
        Selection::Pass => return Answer::Pass,
    };
    let table = kernel.tables.get(&id).unwrap_or_else(|| panic!("{id:?} is not there"));
    assert!(!table.slots.is_empty(), "a table without slots");
    let mut shares: BTreeMap<BackendKey, u64> = BTreeMap::new();
    for slot in &table.slots {
        let backend = kernel.backends.get(&slot.backend).unwrap_or_else(|| panic!("{slot:?} of {id:?} is not there"));
        assert_eq!(backend.generation, slot.generation, "a slot names a life of {} that is over", backend.key);
        *shares.entry(backend.key).or_default() += 1;
    }
    match table.algorithm {
        Algorithm::Random | Algorithm::LeastConnections => lowest_terms(&mut shares),
        Algorithm::Maglev => shares.values_mut().for_each(|v| *v = 1),
    }
    Answer::Backends(table.algorithm, shares)
}

/// What the maps say, in the oracle's words.
pub(crate) fn seen(kernel: &MapContents) -> BTreeMap<FrontendKey, Expected> {
    let ranges = |port| kernel.ranges.iter().filter(|(p, _)| *p == port).map(|(_, net)| *net).collect::<Vec<_>>();
    let frontends = kernel.frontends.iter().map(|(key, f)| {
        let expected = Expected {
            kind: f.kind,
            internal: resolve(kernel, f.internal),
            external: resolve(kernel, f.external),
            masquerade: f.masquerade,
            ranges: f.check_source.then(|| ranges(f.port)),
            affinity: f.affinity_seconds,
        };
        (*key, expected)
    });
    frontends.collect()
}
