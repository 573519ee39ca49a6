//! A daemon whose source of objects has not told everything: what a policy that it knows might forbid, a new pod does not do.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use terway_core::config::parse;
use terway_daemon::bpf::{Config, Datapath};
use terway_daemon::metrics::new_registry;
use terway_daemon::objects::{
    Batch, EmptySource, Feed, ObjectMetrics, ObjectSource, ObjectStore, SourceError, Update, feed,
};
use terway_daemon::policy::{Policies, PolicyMetrics, Setup};
use tokio::sync::{mpsc, watch};

use super::*;

const CONFIG: &str = r#"{"vswitches":{"z":["vsw-1"]},"security_group":"sg-1","disable_network_policy":"false"}"#;

/// An object source that sends the batches of a test.
struct Scripted(mpsc::Receiver<Batch>);

#[async_trait]
impl ObjectSource for Scripted {
    async fn run(mut self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        while let Some(batch) = self.0.recv().await {
            if batches.send(batch).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

fn object((kind, document): &(Kind, Value)) -> Object {
    Object::read(*kind, document).unwrap()
}

/// Objects that are known before their kinds are listed completely.
fn changes(documents: &[(Kind, Value)]) -> Batch {
    let update = |document| Update::Change(Change::Upsert(Box::new(object(document))));
    Batch { updates: documents.iter().map(update).collect(), problems: None }
}

/// Complete lists of all kinds.
fn lists(documents: &[(Kind, Value)]) -> Batch {
    let list = |kind: Kind| {
        let objects = documents.iter().filter(|(of, _)| *of == kind).map(object).collect();
        Update::Replace(kind, objects)
    };
    Batch { updates: Kind::ALL.into_iter().map(list).collect(), problems: None }
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
    let objects = Arc::new(ObjectStore::default());
    let policies = Policies::start(Setup {
        datapath: Arc::clone(&datapath),
        objects: Arc::clone(&objects),
        addresses,
        config,
        metrics: PolicyMetrics::new(&mut new_registry().0),
    })
    .unwrap();
    let (batches, receiver) = mpsc::channel(2);
    let scripted = Mutex::new(Some(Scripted(receiver)));
    let _feed = Feed::start(feed::Setup {
        open: Box::new(move || match scripted.lock().unwrap().take() {
            Some(source) => Ok(Box::new(source)),
            None => Ok(Box::new(EmptySource)),
        }),
        store: objects,
        subscribers: vec![Arc::<Policies>::clone(&policies)],
        metrics: ObjectMetrics::new(&mut new_registry().0),
    });

    // Something forbids `a` to be reached; whether it is about `b` too, whose object is not there, nobody knows.
    let guard = json!({
        "metadata": {"namespace": "x", "name": "guard"},
        "spec": {"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Ingress"]},
    });
    let guard = (Kind::NetworkPolicy, guard);
    batches.send(changes(&[pod("a"), guard.clone()])).await.unwrap();
    let named = |name: &str| PodRef { namespace: "x".to_owned(), name: name.to_owned(), uid: String::new() };
    let start = Instant::now();
    policies.wait_until_known(&named("a")).await;
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
    let (status, _) = policies.status().await;
    assert!(!status.is_synced, "{status:?}");

    batches.send(lists(&[pod("a"), pod("b"), guard])).await.unwrap();
    let start = Instant::now();
    while !policies.status().await.0.is_synced {
        assert!(start.elapsed() < Duration::from_secs(20), "the view is complete");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    comes("10.0.0.1", &INGRESS);
    comes("10.0.0.2", &IN);
    policies.wait_until_known(&named("a")).await;
}
