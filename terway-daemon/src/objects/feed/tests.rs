//! The feed's contract, with a scripted source and subscribers that record what they receive.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use terway_core::objects::{Change, Object, ObjectKey, ObjectName};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::super::Update;
use super::*;

fn service(name: &str, cluster_ip: &str) -> Object {
    let service = json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": cluster_ip, "ports": [{"port": 80}]},
    });
    Object::read(Kind::Service, service).unwrap()
}

fn upsert(object: Object) -> Update {
    Update::Change(Change::Upsert(Box::new(object)))
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { kind: Kind::Service, name: ObjectName::new("shop", name) }
}

fn batch(updates: Vec<Update>) -> Batch {
    Batch { updates, problems: None }
}

/// One run of a source for each script: it sends the batches, then does what the script says.
#[derive(Clone)]
enum Then {
    Wait,
    Fail,
    Panic,
}

struct Script(Vec<Batch>, Then);

#[async_trait]
impl ObjectSource for Script {
    async fn run(self: Box<Self>, batches: mpsc::Sender<Batch>) -> Result<(), SourceError> {
        for batch in self.0 {
            batches.send(batch).await.unwrap();
            // Until the feed has taken it; time is paused and passes only when nothing else is to do.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        match self.1 {
            Then::Wait => batches.closed().await,
            Then::Fail => {
                let source = std::io::Error::other("away");
                return Err(SourceError::Watch { path: "/objects".into(), source });
            }
            Then::Panic => panic!("scripted"),
        }
        Ok(())
    }
}

/// What a subscriber received, and the Services in the store at that moment.
type Received = (&'static str, ObjectChanges, Vec<String>);

struct Recorder {
    name: &'static str,
    store: Arc<ObjectStore>,
    received: mpsc::UnboundedSender<Received>,
    /// Each delivery takes one permit.
    permits: Arc<Semaphore>,
}

#[async_trait]
impl Subscriber for Recorder {
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        let services = self.store.read().names(Kind::Service).iter().map(|name| name.name.to_string()).collect();
        self.received.send((self.name, (*changes).clone(), services)).unwrap();
        self.permits.acquire().await.unwrap().forget();
    }
}

struct World {
    feed: Arc<Feed>,
    store: Arc<ObjectStore>,
    received: mpsc::UnboundedReceiver<Received>,
    permits: Arc<Semaphore>,
    runs: Arc<AtomicUsize>,
}

impl World {
    /// A feed with two subscribers and a source that follows one script after the other, the last one for ever.
    fn start(scripts: Vec<(Vec<Batch>, Then)>, permits: usize) -> Self {
        let store = Arc::<ObjectStore>::default();
        let (sender, received) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(permits));
        let recorder = |name| -> Arc<dyn Subscriber> {
            let (store, received, permits) = (Arc::clone(&store), sender.clone(), Arc::clone(&permits));
            Arc::new(Recorder { name, store, received, permits })
        };
        let runs = Arc::<AtomicUsize>::default();
        let open: OpenSource = {
            let runs = Arc::clone(&runs);
            Box::new(move || {
                let run = runs.fetch_add(1, Ordering::Relaxed);
                let (batches, then) = scripts.get(run).or(scripts.last()).cloned().unwrap();
                Ok(Box::new(Script(batches, then)))
            })
        };
        let subscribers = vec![recorder("policies"), recorder("services")];
        let metrics = ObjectMetrics::new(&mut prometheus_client::registry::Registry::default());
        let feed = Feed::start(Setup { open, store: Arc::clone(&store), subscribers, metrics });
        Self { feed, store, received, permits, runs }
    }

    async fn next(&mut self) -> Received {
        timeout(Duration::from_secs(60), self.received.recv()).await.expect("a delivery").unwrap()
    }

    fn services(&self) -> Vec<String> {
        self.store.read().names(Kind::Service).iter().map(|name| name.name.to_string()).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn policies_receive_each_batch_before_services() {
    let batches = vec![batch(vec![Update::Replace(Kind::Service, vec![service("a", "10.96.0.1")])])];
    let mut world = World::start(vec![(batches, Then::Wait)], 100);
    let (first, changes, _) = world.next().await;
    let (second, same, _) = world.next().await;
    assert_eq!((first, second), ("policies", "services"));
    assert_eq!(changes, same);
    assert_eq!(changes.changes.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn batches_that_wait_for_a_subscriber_are_delivered_as_one_and_the_store_waits_with_them() {
    let upserts = ["b", "c", "d"].map(|name| batch(vec![upsert(service(name, "10.96.0.9"))]));
    let first = batch(vec![Update::Replace(Kind::Service, vec![service("a", "10.96.0.1")])]);
    let batches = std::iter::once(first).chain(upserts).collect();
    // No delivery returns before the test adds permits.
    let mut world = World::start(vec![(batches, Then::Wait)], 0);
    let (name, changes, services) = world.next().await;
    assert_eq!((name, changes.changes.len()), ("policies", 1));
    assert_eq!(services, ["a"]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(world.services(), ["a"], "nothing is applied while a delivery is pending");
    assert!(world.received.try_recv().is_err(), "the second subscriber waits for the first");
    world.permits.add_permits(100);
    assert_eq!(world.next().await.0, "services");
    let (_, changes, services) = world.next().await;
    assert_eq!(changes.changes.len(), 3);
    assert_eq!(services, ["a", "b", "c", "d"]);
}

#[tokio::test(start_paused = true)]
async fn kinds_become_synced_one_by_one_and_an_unreadable_kind_never_does() {
    let forbidden = Problem { scope: Scope::Kind(Kind::NetworkPolicy), reason: "forbidden".to_owned() };
    let batches = vec![
        Batch { updates: vec![upsert(service("a", "10.96.0.1"))], problems: Some(vec![forbidden]) },
        batch(vec![Update::Replace(Kind::Service, vec![service("a", "10.96.0.1")])]),
        batch(vec![Update::Replace(Kind::EndpointSlice, vec![])]),
    ];
    let mut world = World::start(vec![(batches, Then::Wait)], 100);
    let mut last = ObjectChanges::default();
    while !last.has_synced(&[Kind::Service, Kind::EndpointSlice]) {
        last = world.next().await.1;
    }
    assert!(!last.has_synced(&[Kind::NetworkPolicy]) && !last.has_synced(&Kind::ALL));
    let problems = world.feed.problems();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].code, errors::OBJECTS_UNREADABLE);
    assert_eq!(problems[0].detail, "NetworkPolicy: forbidden.");
    let kinds = world.feed.kinds();
    let service = kinds.iter().find(|status| status.kind == Kind::Service).unwrap();
    assert_eq!((service.count, service.is_synced), (1, true));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_or_panics_is_started_again_and_only_differences_are_delivered() {
    let list = |names: &[&str]| {
        let all = names.iter().map(|name| service(name, "10.96.0.1")).collect();
        vec![batch(vec![Update::Replace(Kind::Service, all)])]
    };
    let scripts = vec![
        (list(&["a", "b"]), Then::Fail),
        (list(&["a", "b"]), Then::Panic),
        (vec![], Then::Fail),
        (list(&["b", "c"]), Then::Wait),
    ];
    let mut world = World::start(scripts, 100);
    assert_eq!(world.next().await.1.changes.len(), 2);
    assert_eq!(world.next().await.0, "services");
    tokio::time::sleep(RESTART_AFTER / 2).await;
    let problems = world.feed.problems();
    assert_eq!(problems.iter().map(|p| p.detail.as_str()).collect::<Vec<_>>(), ["cannot watch /objects: away."]);
    assert_eq!(world.services(), ["a", "b"], "the last state stays in force");
    // The second run lists the same and the third nothing: nothing is delivered.
    let (name, changes, services) = world.next().await;
    assert_eq!((name, changes.changes.len()), ("policies", 2), "a goes and c comes");
    assert_eq!(services, ["b", "c"]);
    assert_eq!(world.runs.load(Ordering::Relaxed), 4);
    assert!(world.feed.problems().is_empty());
}

#[test]
fn a_list_in_parts_deletes_what_it_does_not_name_at_its_end_only() {
    let store = Arc::<ObjectStore>::default();
    let mut writer = StoreWriter::new(Arc::clone(&store));
    let mut apply = |updates| writer.apply(vec![batch(updates)]);
    let names = || store.read().names(Kind::Service).iter().map(|name| name.name.to_string()).collect::<Vec<_>>();
    apply(vec![Update::Replace(Kind::Service, vec![service("a", "10.96.0.1"), service("b", "10.96.0.2")])]);
    let changes = apply(vec![Update::ListBegin(Kind::Service), upsert(service("b", "10.96.0.2"))]);
    assert_eq!(changes.changes, vec![], "b is unchanged");
    apply(vec![upsert(service("c", "10.96.0.3")), upsert(service("d", "10.96.0.4"))]);
    // A change that is not of the list counts like one of it.
    apply(vec![Update::Change(Change::Delete(key("d")))]);
    assert_eq!(names(), ["a", "b", "c"]);
    let changes = apply(vec![Update::ListEnd(Kind::Service)]);
    assert_eq!(changes.changes.len(), 1);
    assert_eq!(names(), ["b", "c"]);
    // A list that was cut off is begun again; its end counts once.
    apply(vec![Update::ListBegin(Kind::Service), Update::ListBegin(Kind::Service), upsert(service("b", "10.96.0.2"))]);
    apply(vec![Update::ListEnd(Kind::Service)]);
    apply(vec![Update::ListEnd(Kind::Service)]);
    assert_eq!(names(), ["b"]);
}
