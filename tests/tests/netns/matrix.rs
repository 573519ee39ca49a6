//! Every kind of client with every kind of Service address, under both traffic policies and in both families, by TCP and by UDP: who is
//! reached, and as whom the client is seen, compared with a rule that is written from the Kubernetes documentation.
//!
//! One pod, on the first node, is all that is behind the Services.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use terway_sim::cluster::Cluster;
use terway_sim::netns::NetNs;

use super::load_balancer::{Exposed, Mirror, WHO, by_tcp, by_udp, lead_to, node_addresses};
use super::{pod, with_cluster};

/// What a change may take until packets see it.
const SOON: Duration = Duration::from_secs(5);
/// How long is waited for an answer that must come, and for one that must not.
const PATIENCE: Duration = Duration::from_secs(3);
const SILENCE: Duration = Duration::from_millis(500);

/// The node of the pod that is behind everything.
const HOME: usize = 1;

const HOST_PORT: u16 = 8008;

/// Who asks.
#[derive(Clone, Copy, Debug)]
enum Client {
    /// Another pod of this node.
    Pod(usize),
    /// A process of this node.
    Host(usize),
    /// A host that is no node.
    Outside,
}

/// What is asked. Numbers are nodes: whose port it is, or to which the VPC leads who comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    ClusterIp,
    NodePort(usize),
    ExternalIp(usize),
    Balancer(usize),
    HostPort(usize),
}

/// As whom a client is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Itself,
    Node(usize),
}

/// What the documentation says; nothing if nobody answers. `local` is the policy, `internalTrafficPolicy` inside and
/// `externalTrafficPolicy` outside.
fn rule(client: Client, entry: Entry, local: bool) -> Option<Seen> {
    let home = match client {
        Client::Pod(node) | Client::Host(node) => Some(node),
        Client::Outside => None,
    };
    match (entry, home) {
        // "Makes the Service only reachable from within the cluster."
        (Entry::ClusterIp, None) => None,
        // "Packets sent to ClusterIP from within the cluster are never source NAT'd"; with Local, "kube-proxy only uses node local
        // endpoints for cluster internal traffic".
        (Entry::ClusterIp, Some(node)) => (!local || node == HOME).then_some(Seen::Itself),
        // A container's port on the address of the node that it runs on; no Service, no policy.
        (Entry::HostPort(node), _) => (node == HOME).then_some(Seen::Itself),
        // "Traffic sent to an External IP or LoadBalancer IP from within the cluster will always get \"Cluster\" semantics."
        (Entry::ExternalIp(_) | Entry::Balancer(_), Some(_)) => Some(Seen::Itself),
        // A node's own clients are inside, so this is the same short cut.
        (Entry::NodePort(node), Some(own)) if node == own => Some(Seen::Itself),
        // "Clients sending to a NodePort from within the cluster may need to take traffic policy into account when picking a node":
        // to another node they are as good as outside. Cluster "routes to all endpoints", in the node's name if they are elsewhere;
        // Local "preserves the source IP of the traffic by routing only to endpoints on the same node", dropping it if there is none.
        (Entry::NodePort(node) | Entry::ExternalIp(node) | Entry::Balancer(node), _) => match (node == HOME, local) {
            (true, _) => Some(Seen::Itself),
            (false, false) => Some(Seen::Node(node)),
            (false, true) => None,
        },
    }
}

/// The Services: one for each policy, each with addresses of its own that lead to either node.
struct Pair<'a>([Exposed<'a>; 2]);

impl Pair<'_> {
    /// An address of a kind for each family, and the port there.
    fn at(&self, entry: Entry, local: bool, nodes: &[[IpAddr; 2]]) -> [SocketAddr; 2] {
        let service = &self.0[usize::from(local)];
        let led_to = |node: usize| Exposed {
            number: service.number + 100 * (node as u8 - 1),
            endpoints: Vec::new(),
            ..*service
        };
        let (ips, port) = match entry {
            Entry::ClusterIp => (service.cluster_ips(), 80),
            Entry::NodePort(node) => (nodes[node - 1], service.base),
            Entry::ExternalIp(node) => (led_to(node).externals(), 80),
            Entry::Balancer(node) => (led_to(node).balancers(), 80),
            Entry::HostPort(node) => (nodes[node - 1], HOST_PORT),
        };
        ips.map(|ip| SocketAddr::new(ip, port))
    }

    /// Addresses that lead to a node.
    fn ways(&self, node: usize) -> Vec<IpAddr> {
        let kinds = [Entry::ExternalIp(node), Entry::Balancer(node)];
        let all = kinds.into_iter().flat_map(|entry| [(entry, false), (entry, true)]);
        all.flat_map(|(entry, local)| self.at(entry, local, &[])).map(|at| at.ip()).collect()
    }

    fn objects(&self) -> Vec<Value> {
        let mut all = Vec::new();
        for (local, service) in [false, true].into_iter().zip(&self.0) {
            let mut objects = service.objects();
            let ips = |kind: fn(usize) -> Entry| {
                [1, 2]
                    .map(|node| self.at(kind(node), local, &[]))
                    .concat()
                    .into_iter()
                    .map(|at| at.ip())
                    .collect::<Vec<_>>()
            };
            objects[0]["spec"]["externalIPs"] = json!(ips(Entry::ExternalIp));
            let ingress: Vec<Value> = ips(Entry::Balancer).into_iter().map(|ip| json!({"ip": ip})).collect();
            objects[0]["status"]["loadBalancer"]["ingress"] = json!(ingress);
            objects[0]["spec"]["internalTrafficPolicy"] = json!(service.policy);
            all.extend(objects);
        }
        all
    }
}

/// One probe, and what is wrong with its outcome.
fn check(ns: &NetNs, to: SocketAddr, udp: bool, wanted: Option<IpAddr>) -> Option<String> {
    let patience = if wanted.is_some() { PATIENCE } else { SILENCE };
    let seen = if udp { by_udp(ns, to, patience) } else { by_tcp(ns, to, patience) };
    match (seen, wanted) {
        (Ok(seen), Some(wanted)) if seen == wanted => None,
        (Err(_), None) => None,
        (Ok(seen), Some(wanted)) => Some(format!("seen as {seen}, not {wanted}")),
        (Ok(seen), None) => Some(format!("reached, seen as {seen}")),
        (Err(error), Some(_)) => Some(format!("{error:#}")),
    }
}

fn matrix(cluster: &Cluster, sockets: bool) -> Result<()> {
    let (n1, n2) = (cluster.node(1), cluster.node(2));
    let primaries = ["n1", "n2"].map(|name| cluster.vpc().primary(name).context("no primary ENI"));
    let [eni1, eni2] = primaries;
    let enis = [eni1?, eni2?];
    let nodes = [node_addresses(&enis[0]), node_addresses(&enis[1])];
    let (a, c, d) = (pod(n1, "a")?, pod(n1, "c")?, pod(n2, "d")?);
    let _server = Mirror::start(&a.ns)?;
    let service = |name, number, policy| Exposed {
        name,
        number,
        base: 30_000 + u16::from(number) * 10,
        policy,
        endpoints: vec![(a.ips.clone(), "n1")],
        ranges: &[],
    };
    let services = Pair([service("everywhere", 1, "Cluster"), service("local", 2, "Local")]);
    cluster.put("services", &services.objects())?;
    let ports =
        ["TCP", "UDP"].map(|protocol| json!({"containerPort": WHO, "hostPort": HOST_PORT, "protocol": protocol}));
    cluster.put(
        "pod",
        &[json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "default"},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": a.ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()},
        })],
    )?;
    for (node, also) in [(n1, ":8008"), (n2, "default/local")] {
        node.wait(SOON, "the Services are served", |node| {
            let listed = node.cli(&["svc", "list"])?;
            ensure!(["default/everywhere", "default/local", also].iter().all(|text| listed.contains(text)), "{listed}");
            Ok(true)
        })?;
    }
    for (node, eni) in enis.iter().enumerate() {
        lead_to(cluster, eni, &services.ways(node + 1))?;
    }
    let outside = cluster.external_addresses();
    let mut clients: Vec<(Client, &NetNs, [IpAddr; 2])> = vec![
        (Client::Pod(1), &c.ns, [c.v4()?, c.v6()?]),
        (Client::Pod(2), &d.ns, [d.v4()?, d.v6()?]),
        (Client::Outside, cluster.external(), [outside.0, outside.1]),
    ];
    if sockets {
        // The node's own processes have Services at the socket only.
        clients.push((Client::Host(1), n1.netns(), nodes[0]));
        clients.push((Client::Host(2), n2.netns(), nodes[1]));
    }
    let either = |kind: fn(usize) -> Entry| [kind(1), kind(2)];
    let kinds: [fn(usize) -> Entry; 4] = [Entry::NodePort, Entry::ExternalIp, Entry::Balancer, Entry::HostPort];
    let entries: Vec<Entry> = kinds.into_iter().flat_map(either).chain([Entry::ClusterIp]).collect();

    let start = Instant::now();
    // Clients are each other's business no more than in life.
    let outcomes: Vec<Result<(usize, usize, Vec<String>)>> = std::thread::scope(|scope| {
        let works: Vec<_> = clients
            .iter()
            .map(|(client, ns, own)| {
                let (services, entries, nodes) = (&services, &entries, &nodes);
                scope.spawn(move || {
                    let (mut reached, mut cells, mut wrong) = (0, 0, Vec::new());
                    for (entry, local) in entries.iter().flat_map(|entry| [(*entry, false), (*entry, true)]) {
                        let seen = rule(*client, entry, local);
                        for (family, to) in services.at(entry, local, nodes).into_iter().enumerate() {
                            let wanted = seen.map(|seen| match seen {
                                Seen::Itself => own[family],
                                Seen::Node(node) => nodes[node - 1][family],
                            });
                            for udp in [false, true] {
                                cells += 1;
                                reached += usize::from(wanted.is_some());
                                if let Some(fault) = check(ns, to, udp, wanted) {
                                    let (policy, protocol) =
                                        (if local { "Local" } else { "Cluster" }, if udp { "UDP" } else { "TCP" });
                                    wrong
                                        .push(format!("{client:?} to {entry:?} ({to}, {protocol}), {policy}: {fault}"));
                                }
                            }
                        }
                    }
                    (cells, reached, wrong)
                })
            })
            .collect();
        works.into_iter().map(|work| work.join().map_err(|_panic| anyhow!("a client panicked"))).collect()
    });
    let (mut cells, mut reached, mut wrong) = (0, 0, Vec::new());
    for outcome in outcomes {
        let (more, also, faults) = outcome?;
        cells += more;
        reached += also;
        wrong.extend(faults);
    }
    println!("{cells} cells, {reached} of them reached, in {:?}", start.elapsed());
    ensure!(wrong.is_empty(), "{} of {cells} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    for (node, pod) in [(n1, &a), (n1, &c), (n2, &d)] {
        node.del(pod)?;
    }
    enis.iter().try_for_each(|eni| lead_to(cluster, eni, &[]))
}

#[test]
fn reachability_matrix_tc() -> Result<()> {
    with_cluster(|_| {}, |cluster| matrix(cluster, false))
}

#[test]
fn reachability_matrix_socket() -> Result<()> {
    with_cluster(|options| options.sockets = true, |cluster| matrix(cluster, true))
}
