//! The world of the scale bar: 10 000 policies, 100 000 pods, 1 000 namespaces, 200 pods of this node.
//!
//! `cargo test --release -p terway-core --test policy -- --ignored --nocapture scale`

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::{Kind, Object, ObjectName};
use terway_core::policy::{Compiler, Event, Op};

const SPACES: usize = 1000;
const PODS: usize = 100;
const POLICIES: usize = 10;

fn read(kind: Kind, document: &Value) -> Event {
    match Object::read(kind, document).unwrap() {
        Object::Namespace(o) => Event::Namespace(Arc::clone(&o.meta.object.name), Some(Arc::new(o))),
        Object::Pod(o) => Event::Pod(o.meta.object.clone(), Some(Arc::new(o))),
        Object::NetworkPolicy(o) => Event::NetworkPolicy(o.meta.object.clone(), Some(Arc::new(o))),
        Object::ClusterNetworkPolicy(o) => Event::ClusterNetworkPolicy(o.meta.object.clone(), Some(Arc::new(o))),
        _ => unreachable!("no other kind is asked for"),
    }
}

fn address(space: usize, n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (space * 128 + n) as u32 + 1)
}

fn namespace(space: usize, team: usize) -> Event {
    let labels = json!({"team": format!("t{team}"), "stage": if space.is_multiple_of(3) { "prod" } else { "test" }});
    read(Kind::Namespace, &json!({"metadata": {"name": format!("ns{space}"), "labels": labels}}))
}

/// Five Deployments of 19 pods and a StatefulSet of five, whose pods all have labels of their own.
fn pod(space: usize, n: usize, version: &str) -> Event {
    let mut labels = json!({"app": format!("app{}", n % 5), "pod-template-hash": format!("{:x}{}", n % 5, space), "version": version});
    if n >= 95 {
        labels = json!({"app": "db", "statefulset.kubernetes.io/pod-name": format!("db-{n}"), "apps.kubernetes.io/pod-index": n.to_string()});
    }
    let meta = json!({"namespace": format!("ns{space}"), "name": format!("app{}-{n:05}-abcde", n % 5), "labels": labels,
        "uid": format!("{space:08x}-0000-0000-0000-{n:012x}")});
    let ports = json!([{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}]);
    let status = json!({"phase": "Running", "podIPs": [{"ip": address(space, n)}]});
    read(Kind::Pod, &json!({"metadata": meta, "spec": {"containers": [{"ports": ports}]}, "status": status}))
}

fn policy(space: usize, n: usize, port: u16) -> Event {
    let app = |k: usize| json!({"matchLabels": {"app": format!("app{k}")}});
    let spec = match n {
        0 => json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        1..=4 => {
            json!({"podSelector": app(n), "ingress": [{"from": [{"podSelector": app(n - 1)}], "ports": [{"port": port}]}]})
        }
        5 => {
            json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": format!("t{}", space % 50)}}}], "ports": [{"port": "http"}]}]})
        }
        6 => {
            json!({"podSelector": {}, "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ns0"}}, "podSelector": app(0)}],
            "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]}], "policyTypes": ["Egress"]})
        }
        7 => {
            json!({"podSelector": app(0), "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "100.64.0.0/10"]}}], "ports": [{"port": 443}]}], "policyTypes": ["Egress"]})
        }
        8 => {
            json!({"podSelector": app(1), "egress": [{"to": [{"ipBlock": {"cidr": format!("172.{}.{}.0/24", 16 + space / 256, space % 256)}}]}], "policyTypes": ["Egress"]})
        }
        _ => json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["app2", "db"]}]},
            "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "app3"}}}], "ports": [{"port": 9000, "endPort": 9999}]}]}),
    };
    read(
        Kind::NetworkPolicy,
        &json!({"metadata": {"namespace": format!("ns{space}"), "name": format!("p{n}")}, "spec": spec}),
    )
}

fn attach(slot: u32, space: usize, n: usize) -> Event {
    let pod =
        PodRef { namespace: format!("ns{space}"), name: format!("app{}-{n:05}-abcde", n % 5), uid: String::new() };
    Event::Attach { slot, pod, addresses: Addresses { v4: Some(address(space, n)), v6: None } }
}

/// Bytes of memory that the process has, by the kernel's count.
#[allow(clippy::disallowed_methods, reason = "a measurement looks at the process")]
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[allow(clippy::disallowed_methods, reason = "a measurement takes time")]
fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = what();
    (start.elapsed(), result)
}

#[test]
#[ignore = "a measurement: in release, alone on the machine"]
fn scale() {
    let (mut compiler, _) = Compiler::new();
    let policies: Vec<Event> = (0..SPACES).flat_map(|s| (0..POLICIES).map(move |n| policy(s, n, 8080))).collect();
    let spaces: Vec<Event> = (0..SPACES).map(|s| namespace(s, s % 50)).collect();
    let mut ops = 0;
    let mut feed = |compiler: &mut Compiler, events: Vec<Event>| {
        let (took, count) = timed(|| events.into_iter().map(|event| compiler.step(event).len()).sum::<usize>());
        ops += count;
        took
    };
    let rules = feed(&mut compiler, spaces.into_iter().chain(policies).collect());
    let before = resident();
    // Not all at once: the objects themselves must not be counted as the compiler's memory.
    let mut pods = Duration::ZERO;
    for s in 0..SPACES {
        pods += feed(&mut compiler, (0..PODS).map(|n| pod(s, n, "1")).collect());
    }
    let per_pod = (resident() - before) / (SPACES * PODS);
    let endpoints =
        feed(&mut compiler, (0..200u32).map(|slot| attach(slot, slot as usize % 50, slot as usize / 50)).collect());
    let spent = rules + pods + endpoints;
    println!("policies {rules:?}, pods {pods:?}, endpoints {endpoints:?}");
    println!("first compile {spent:?}, {ops} operations, {per_pod} B per pod");
    println!("{:?}", compiler.stats());
    assert!(spent < Duration::from_secs(3), "{spent:?}");
    assert!(per_pod <= 1024, "{per_pod}");

    let mut worst = Duration::ZERO;
    let mut measure = |compiler: &mut Compiler, what: &str, events: Vec<Event>| -> Vec<Op> {
        let mut last = Vec::new();
        let mut times: Vec<Duration> = Vec::new();
        for event in events {
            let (took, ops) = timed(|| compiler.step(event));
            last = ops;
            times.push(took);
            compiler.settle();
        }
        times.sort_unstable();
        let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{what:<44} median {median:>9.1?}  most {most:>9.1?}  operations {}", last.len());
        worst = worst.max(most);
        last
    };
    let extra = |n: usize| {
        let Event::Pod(name, Some(pod)) = pod(7, n % 95, "1") else { unreachable!("as made above") };
        let mut pod = (*pod).clone();
        let name = ObjectName::new(&name.namespace, &format!("extra{n}"));
        pod.meta.object = name.clone();
        pod.ips = [IpAddr::from(Ipv4Addr::from(0x0aff_0000 + n as u32))].into();
        Event::Pod(name, Some(Arc::new(pod)))
    };
    let ops = measure(&mut compiler, "a new pod with known labels", (0..50).map(extra).collect());
    assert_eq!(ops.iter().filter(|op| !matches!(op, Op::Stale(_))).count(), 1, "{ops:?}");
    measure(&mut compiler, "labels of a pod nobody looks at", (0..50).map(|n| pod(7, n, "2")).collect());
    measure(
        &mut compiler,
        "a new pod of a new app",
        (0..20)
            .map(|n| {
                let Event::Pod(name, Some(old)) = extra(1000 + n) else { unreachable!("as made above") };
                let mut new = (*old).clone();
                new.meta.labels = [("app", format!("new{n}"))].into_iter().collect();
                Event::Pod(name, Some(Arc::new(new)))
            })
            .collect(),
    );
    measure(
        &mut compiler,
        "the interface of a pod of this node",
        (300..350).map(|slot| attach(slot, 60 + slot as usize, 1)).collect(),
    );
    measure(&mut compiler, "its end", (300..350).map(|slot| Event::Detach { slot }).collect());
    measure(&mut compiler, "a policy of a namespace with local pods", (0..50).map(|s| policy(s, 3, 9090)).collect());
    measure(&mut compiler, "a policy of another namespace", (500..550).map(|s| policy(s, 3, 9090)).collect());
    measure(&mut compiler, "labels of a namespace", (0..50).map(|s| namespace(s, (s + 1) % 50)).collect());
    let block = |n: usize, cidr: String| {
        let spec = json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]});
        read(Kind::NetworkPolicy, &json!({"metadata": {"namespace": "ns3", "name": format!("block{n}")}, "spec": spec}))
    };
    measure(
        &mut compiler,
        "a block outside the cluster",
        (0..50).map(|n| block(0, format!("198.51.100.{n}/32"))).collect(),
    );
    measure(&mut compiler, "a block of 128 pods", (0..20).map(|n| block(0, format!("{}/25", address(n, 0)))).collect());
    let admin = |n: usize| {
        let spec = json!({"tier": "Admin", "priority": n, "subject": {"namespaces": {"matchLabels": {"stage": "prod"}}},
            "ingress": [{"action": "Deny", "from": [{"namespaces": {"matchLabels": {"stage": "test"}}}], "protocols": [{"tcp": {"destinationPort": {"number": 22}}}]}]});
        read(Kind::ClusterNetworkPolicy, &json!({"metadata": {"name": format!("admin{n}")}, "spec": spec}))
    };
    measure(&mut compiler, "a cluster policy about a third of all pods", (0..3).map(admin).collect());
    let half = block(999, "10.0.0.0/9".to_owned());
    measure(&mut compiler, "a block of every pod", vec![half]);
    let key = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"version": "1"}}}]}]});
    let key = read(Kind::NetworkPolicy, &json!({"metadata": {"namespace": "ns3", "name": "key"}, "spec": key}));
    measure(&mut compiler, "a label key of every pod, never looked at", vec![key]);
    println!("worst {worst:?}; {:?}", compiler.stats());
}
