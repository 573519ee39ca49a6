//! A daemon whose source of objects has not told everything: what a policy that it knows might forbid, a new pod does not do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::config::parse;
use terway_daemon::bpf::{Config, Datapath};
use terway_daemon::metrics::new_registry;
use terway_daemon::policy::{News, Policies, PolicyMetrics, Setup};
use tokio::sync::watch;

use super::*;

const CONFIG: &str = r#"{"vswitches":{"z":["vsw-1"]},"security_group":"sg-1","disable_network_policy":"false"}"#;

fn told(objects: &mut Objects, documents: &[(Kind, Value)], complete: bool) -> News {
    let put = |(kind, document): &(Kind, Value)| Change::Upsert(Box::new(Object::read(*kind, document).unwrap()));
    News { changes: documents.iter().filter_map(|document| objects.apply(put(document))).collect(), complete }
}

fn pod(name: &str) -> (Kind, Value) {
    let metadata = json!({"namespace": "x", "name": name, "labels": {"pod": name}});
    (Kind::Pod, json!({"metadata": metadata, "status": {"phase": "Running"}}))
}

#[tokio::test]
async fn new_pod_waits_for_policies_at_startup() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let (_addresses, addresses) = watch::channel(Arc::default());
    let (_config, config) = watch::channel(Arc::new(parse(CONFIG).unwrap().0));
    let datapath = Arc::new(Datapath::open(&Config::new(sandbox.pin_root())).unwrap());
    let (policies, listener) = Policies::start(Setup {
        datapath: Arc::clone(&datapath),
        addresses,
        config,
        metrics: PolicyMetrics::new(&mut new_registry().0),
    })
    .unwrap();

    // Something forbids `a` to be reached; whether it is about `b` too, whose object is not there, nobody knows.
    let guard = json!({
        "metadata": {"namespace": "x", "name": "guard"},
        "spec": {"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Ingress"]},
    });
    let mut objects = Objects::default();
    listener.send(told(&mut objects, &[pod("a"), (Kind::NetworkPolicy, guard)], false)).unwrap();
    let named = |name: &str| PodRef { namespace: "x".to_owned(), name: name.to_owned(), uid: String::new() };
    let start = Instant::now();
    policies.expect(&named("a")).await;
    assert!(start.elapsed() >= Duration::from_secs(3), "an ADD waits for the view");
    for (endpoint, name) in [(&stage.a, "a"), (&stage.b, "b")] {
        // New ones: the stage has them already.
        datapath.endpoints().remove(endpoint.host_ifindex).unwrap();
        policies.attach(endpoint.host_ifindex, &named(name), endpoint.addresses).unwrap();
        datapath.endpoints().upsert(endpoint).unwrap();
    }
    let mut port = 1_000;
    let mut comes = |to: &str, expected: &[(&str, u64)]| {
        port += 1;
        let frame = stage.by_gateway().ip("10.0.9.9", to).tcp(port, 80, flags::SYN);
        run(&stage, Program::FromVpc, stage.eni, &frame.build(), expected);
    };
    comes("10.0.0.1", &INGRESS);
    comes("10.0.0.2", &INGRESS);
    // Nothing that is known speaks of egress.
    let leaves = stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.9.9").tcp(2_000, 80, flags::SYN);
    run(&stage, Program::FromPod, stage.a.host_ifindex, &leaves.build(), &OUT);
    let (status, _) = policies.status().await.unwrap();
    assert!(!status.complete, "{status:?}");

    listener.send(told(&mut objects, &[pod("b")], true)).unwrap();
    let start = Instant::now();
    while !policies.status().await.unwrap().0.complete {
        assert!(start.elapsed() < Duration::from_secs(20), "the view is complete");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    comes("10.0.0.1", &INGRESS);
    comes("10.0.0.2", &IN);
    policies.expect(&named("a")).await;
}
