//! Tests of the merger.

use serde_json::{Value, json};

use super::*;

fn merger() -> (Merger, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Merger::new(Arc::new(Servers::open(dir.path().join("api-servers")))), dir)
}

fn object(kind: Kind, namespace: &str, name: &str, mut rest: Value) -> Event {
    rest["metadata"]["namespace"] = namespace.into();
    rest["metadata"]["name"] = name.into();
    Event::Item(Item::Object(Box::new(Object::read(kind, rest).unwrap())))
}

fn pod(name: &str, node: &str) -> Event {
    object(Kind::Pod, "n", name, json!({ "metadata": {}, "spec": { "nodeName": node } }))
}

fn policy(name: &str, selects_peers: bool) -> Event {
    let from = if selects_peers { json!([{ "from": [{ "podSelector": {} }] }]) } else { json!([]) };
    object(Kind::NetworkPolicy, "n", name, json!({ "metadata": {}, "spec": { "podSelector": {}, "ingress": from } }))
}

fn key(kind: Kind, name: &str) -> ObjectKey {
    ObjectKey { kind, name: ObjectName::new("n", name) }
}

/// A complete list.
fn list(events: impl IntoIterator<Item = Event>) -> Vec<Event> {
    let mut all = vec![Event::ListBegin];
    all.extend(events);
    all.extend([Event::ListEnd, Event::Readable(Ok(())), Event::Confirmed]);
    all
}

/// What a batch says, shortly.
fn shown(batch: &Batch) -> Vec<String> {
    let update = |update: &Update| match update {
        Update::Replace(kind, all) => format!("replace {kind} {}", all.len()),
        Update::ListBegin(kind) => format!("begin {kind}"),
        Update::ListEnd(kind) => format!("end {kind}"),
        Update::Keep(key) => format!("keep {key}"),
        Update::Change(Change::Upsert(object)) => format!("upsert {}", object.key()),
        Update::Change(Change::Delete(key)) => format!("delete {key}"),
    };
    batch.updates.iter().map(update).collect()
}

#[test]
fn pods_are_complete_without_other_nodes_when_no_policy_needs_them() {
    let (mut merger, _dir) = merger();
    assert_eq!(shown(&merger.begin()), ["begin Pod"]);
    assert_eq!(shown(&merger.merge(Stream::OwnPods, list([pod("a", "n1")]))), ["upsert Pod n/a"]);
    let policies = merger.merge(Stream::NetworkPolicies, list([policy("p", false)]));
    assert_eq!(shown(&policies), ["begin NetworkPolicy", "upsert NetworkPolicy n/p", "end NetworkPolicy"]);
    let last = merger.merge(Stream::ClusterNetworkPolicies, list([]));
    assert_eq!(shown(&last), ["end Pod", "begin ClusterNetworkPolicy", "end ClusterNetworkPolicy"]);
    assert!(!merger.needs_other_pods());
}

#[test]
fn policies_are_delivered_behind_the_pods_that_they_need() {
    let (mut merger, _dir) = merger();
    merger.merge(Stream::OwnPods, list([pod("a", "n1")]));
    merger.merge(Stream::ClusterNetworkPolicies, list([]));
    assert!(shown(&merger.merge(Stream::NetworkPolicies, list([policy("p", true)]))).is_empty());
    assert!(merger.needs_other_pods());
    merger.widen();
    assert_eq!(shown(&merger.merge(Stream::OtherPods, vec![Event::ListBegin, pod("b", "n2")])), ["upsert Pod n/b"]);
    // What happens to the policy meanwhile keeps its place.
    assert!(shown(&merger.merge(Stream::NetworkPolicies, vec![policy("q", true)])).is_empty());
    let end = merger.merge(Stream::OtherPods, vec![Event::ListEnd]);
    let expected =
        ["end Pod", "begin NetworkPolicy", "upsert NetworkPolicy n/p", "end NetworkPolicy", "upsert NetworkPolicy n/q"];
    assert_eq!(shown(&end), expected);
    // The demand ends; the pods of other nodes go.
    merger.merge(Stream::NetworkPolicies, vec![Event::Delete(ObjectName::new("n", "p"))]);
    merger.merge(Stream::NetworkPolicies, vec![Event::Delete(ObjectName::new("n", "q"))]);
    assert!(!merger.needs_other_pods());
    assert_eq!(shown(&merger.narrow()), ["delete Pod n/b"]);
    assert!(shown(&merger.merge(Stream::OtherPods, vec![pod("late", "n2")])).is_empty());
}

#[test]
fn pod_that_is_scheduled_to_this_node_moves_between_the_streams_without_a_gap() {
    for own_first in [true, false] {
        let (mut merger, _dir) = merger();
        merger.widen();
        merger.merge(Stream::OwnPods, list([]));
        merger.merge(Stream::OtherPods, list([pod("a", "")]));
        let mut updates = Vec::new();
        let own = |merger: &mut Merger| shown(&merger.merge(Stream::OwnPods, vec![pod("a", "n1")]));
        let gone = |merger: &mut Merger| {
            shown(&merger.merge(Stream::OtherPods, vec![Event::Delete(ObjectName::new("n", "a"))]))
        };
        if own_first {
            updates.extend(own(&mut merger));
            updates.extend(gone(&mut merger));
            assert_eq!(updates, ["upsert Pod n/a"]);
        } else {
            updates.extend(gone(&mut merger));
            updates.extend(own(&mut merger));
            assert_eq!(updates, ["delete Pod n/a", "upsert Pod n/a"]);
        }
    }
}

#[test]
fn relist_of_one_stream_deletes_only_its_own_pods() {
    let (mut merger, _dir) = merger();
    merger.widen();
    merger.merge(Stream::OwnPods, list([pod("a", "n1"), pod("b", "n1")]));
    merger.merge(Stream::OtherPods, list([pod("c", "n2"), pod("d", "n2")]));
    assert_eq!(shown(&merger.merge(Stream::OwnPods, list([pod("b", "n1")]))), ["upsert Pod n/b", "delete Pod n/a"]);
    assert_eq!(shown(&merger.merge(Stream::OtherPods, list([pod("d", "n2")]))), ["upsert Pod n/d", "delete Pod n/c"]);
}

#[test]
fn object_that_cannot_be_decoded_keeps_its_last_good_version_and_is_a_problem() {
    let (mut merger, _dir) = merger();
    let bad = |reason: &str| Event::Item(Item::Invalid(key(Kind::Service, "s"), reason.to_owned()));
    let batch = merger.merge(Stream::Services, list([bad("no port")]));
    assert_eq!(shown(&batch), ["begin Service", "keep Service n/s", "end Service"]);
    let problems = batch.problems.unwrap();
    assert_eq!(problems.iter().map(ToString::to_string).collect::<Vec<_>>(), ["Service n/s: no port"]);
    // Nothing has changed: nothing is said.
    assert_eq!(merger.merge(Stream::Services, vec![bad("no port")]).problems, None);
    let good = object(Kind::Service, "n", "s", json!({ "metadata": {} }));
    assert_eq!(merger.merge(Stream::Services, vec![good]).problems, Some(Vec::new()));
    merger.merge(Stream::Services, vec![bad("again")]);
    // A list without it ends the problem with the object.
    assert_eq!(merger.merge(Stream::Services, list([])).problems, Some(Vec::new()));
}

#[test]
fn forbidden_kind_blocks_only_what_depends_on_it() {
    let (mut merger, _dir) = merger();
    let forbidden =
        Failure { is_forbidden: true, reason: "failed to list: HTTP status 403: networkpolicies".to_owned() };
    let batch = merger.merge(Stream::NetworkPolicies, vec![Event::ListBegin, Event::Readable(Err(forbidden))]);
    assert_eq!(batch.problems.unwrap()[0].scope, Scope::Kind(Kind::NetworkPolicy));
    // Nobody knows whether a policy needs them, so the pods of other nodes are watched.
    assert!(merger.needs_other_pods());
    merger.widen();
    assert_eq!(shown(&merger.merge(Stream::OwnPods, list([]))), [""; 0]);
    let services = merger.merge(Stream::Services, list([]));
    assert_eq!(shown(&services), ["begin Service", "end Service"]);
    assert!(shown(&merger.merge(Stream::OtherPods, list([]))).contains(&"end Pod".to_owned()));
}

#[test]
fn api_server_that_is_away_is_one_problem() {
    let (mut merger, _dir) = merger();
    let away = || Failure { is_forbidden: false, reason: "failed to watch: connection refused".to_owned() };
    let mut last = None;
    for stream in Stream::ALL.into_iter().filter(|stream| *stream != Stream::OtherPods) {
        last = merger.merge(stream, vec![Event::Readable(Err(away()))]).problems.or(last);
    }
    let problems = last.unwrap();
    assert_eq!((problems.len(), &problems[0].scope), (1, &Scope::Source));
    assert!(problems[0].reason.contains("connection refused"), "{}", problems[0].reason);
}

#[test]
fn addresses_of_api_servers_are_learned_from_their_slices() {
    let (mut merger, _dir) = merger();
    let slice = json!({
        "metadata": { "labels": { "kubernetes.io/service-name": "kubernetes" } }, "addressType": "IPv4",
        "endpoints": [{ "addresses": ["10.0.0.1"] }, { "addresses": ["10.0.0.2"], "conditions": { "ready": false } }],
        "ports": [{ "name": "https", "port": 6443 }, { "name": "metrics", "port": 1 }],
    });
    merger.merge(Stream::EndpointSlices, vec![object(Kind::EndpointSlice, "default", "kubernetes", slice.clone())]);
    assert_eq!(merger.servers.in_order(), ["10.0.0.1:6443".parse().unwrap()]);
    // The same slice in another namespace is anybody's.
    merger.merge(Stream::EndpointSlices, vec![object(Kind::EndpointSlice, "evil", "kubernetes", slice)]);
    assert_eq!(merger.servers.in_order().len(), 1);
}
