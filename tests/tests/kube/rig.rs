//! The rig: an API server in a namespace, and the daemon's object feed on it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use terway_core::objects::{Applied, Kind, Objects};
use terway_daemon::objects::{
    ApiClient, Credentials, Feed, NodeContext, ObjectChanges, ObjectMetrics, ObjectStore, Origin, Stored, Subscriber,
    feed,
};
use terway_sim::apiserver::{ApiServer, DAEMON, Programs, User};
use terway_sim::netns::NetNs;
use tokio::runtime::Runtime;

/// The node for which the feed reads.
pub(crate) const NODE: &str = "n1";
/// By what bounds that are not about correctness are multiplied on a busy machine.
pub(crate) const PATIENCE: u32 = 4;
/// The time after which waiting has failed.
const LIMIT: Duration = Duration::from_secs(120);

const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 6));

/// An API server and a feed.
pub(crate) struct Rig {
    pub(crate) server: ApiServer,
    pub(crate) feed: Arc<Feed>,
    pub(crate) store: Arc<ObjectStore>,
    log: Arc<Log>,
    runtime: Option<Runtime>,
    folder: tempfile::TempDir,
}

/// What was delivered.
#[derive(Default)]
struct Log(Mutex<Vec<(Kind, String)>>);

#[async_trait]
impl Subscriber for Log {
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        let name = |applied: &Applied| match applied {
            Applied::Node(delta) => (Kind::Node, delta.name.name.to_string()),
            Applied::Namespace(delta) => (Kind::Namespace, delta.name.name.to_string()),
            Applied::Pod(delta) => (Kind::Pod, delta.name.name.to_string()),
            Applied::Service(delta) => (Kind::Service, delta.name.name.to_string()),
            Applied::EndpointSlice(delta) => (Kind::EndpointSlice, delta.name.name.to_string()),
            Applied::NetworkPolicy(delta) => (Kind::NetworkPolicy, delta.name.name.to_string()),
            Applied::ClusterNetworkPolicy(delta) => (Kind::ClusterNetworkPolicy, delta.name.name.to_string()),
        };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(changes.changes.iter().map(name));
    }
}

/// A moment in the log.
pub(crate) struct Mark {
    at: usize,
    pub(crate) services: usize,
}

impl Rig {
    /// Starts an API server; none where the programs are missing, which is told as skipped.
    pub(crate) fn start(name: &str) -> Result<Option<Self>> {
        let Some(programs) = Programs::find() else {
            println!("SKIP: no kube-apiserver (cargo xtask setup, or KUBEBUILDER_ASSETS)");
            return Ok(None);
        };
        let netns = Arc::new(NetNs::create(name)?);
        let folder = tempfile::tempdir()?;
        netns.ip(&format!("addr add {ADDRESS}/32 dev lo\n"))?;
        let server = ApiServer::start(Arc::clone(&netns), ADDRESS, programs, &folder.path().join("server"))?;
        let runtime = netns.run(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().context("a runtime")
        })??;
        let store = Arc::new(ObjectStore::default());
        let log = Arc::new(Log::default());
        // Replaced by `follow`; until then there is nothing to read.
        let feed =
            feed_of(&runtime, &store, vec![Arc::clone(&log) as _], feed::open(None, context(folder.path(), 1), None))?;
        let rig = Self { server, feed, store, log, runtime: Some(runtime), folder };
        rig.server.apply(&[
            json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE }, "status": { "addresses": [{ "type": "InternalIP", "address": "10.0.0.1" }] } }),
        ])?;
        Ok(Some(rig))
    }

    /// Reads the API as the daemon's service account, with the shipped role.
    pub(crate) fn follow(&mut self, time_scale: u32) -> Result<()> {
        self.apply_role()?;
        self.follow_as(DAEMON, time_scale)
    }

    /// Applies the shipped service account and role.
    pub(crate) fn apply_role(&self) -> Result<()> {
        self.server.kubectl(&["apply", "-f", "-"], include_str!("../../../manifests/base/rbac.yaml")).map(drop)
    }

    /// Reads the API as a user.
    pub(crate) fn follow_as(&mut self, user: User<'_>, time_scale: u32) -> Result<()> {
        self.follow_with(user, time_scale, |_, _| Vec::new())
    }

    /// Reads the API as a user, for further subscribers, which are made with the client and the store.
    pub(crate) fn follow_with(
        &mut self,
        user: User<'_>,
        time_scale: u32,
        subscribers: impl FnOnce(Arc<ApiClient>, Arc<ObjectStore>) -> Vec<Arc<dyn Subscriber>>,
    ) -> Result<()> {
        let origin = Origin::Kube(Credentials::Kubeconfig(self.server.kubeconfig(user)?));
        self.store = Arc::new(ObjectStore::default());
        self.log = Arc::new(Log::default());
        let context = context(self.folder.path(), time_scale);
        let api = origin.api_client(&context).context("a client")?;
        let mut all: Vec<Arc<dyn Subscriber>> = vec![Arc::clone(&self.log) as _];
        all.extend(subscribers(Arc::clone(&api), Arc::clone(&self.store)));
        let open = feed::open(Some(origin), context, Some(api));
        self.feed = feed_of(self.runtime()?, &self.store, all, open)?;
        Ok(())
    }

    /// A folder of the test's own.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The runtime whose threads live in the server's namespace.
    pub(crate) fn runtime(&self) -> Result<&Runtime> {
        self.runtime.as_ref().context("a runtime")
    }

    pub(crate) fn objects(&self) -> impl Deref<Target = Stored> {
        self.store.read()
    }

    /// Waits until the objects fulfil a condition.
    pub(crate) fn wait(&self, until: impl Fn(&Objects) -> bool) -> Result<()> {
        self.poll("the objects", || until(&self.store.read()))
    }

    pub(crate) fn wait_synced(&self) -> Result<()> {
        self.poll("synced", || {
            let kinds = self.feed.kinds();
            kinds.len() == Kind::ALL.len() && kinds.iter().all(|status| status.is_synced)
        })
    }

    /// Waits for a problem whose text contains `text`.
    pub(crate) fn wait_problem(&self, text: &str) -> Result<()> {
        self.poll(&format!("a problem `{text}`"), || {
            self.feed.problems().iter().any(|problem| problem.to_string().contains(text))
        })
    }

    pub(crate) fn wait_no_problem(&self) -> Result<()> {
        self.poll("no problem", || self.feed.problems().is_empty())
    }

    pub(crate) fn poll(&self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !done() {
            if Instant::now() > deadline {
                bail!("waited in vain for {what}; kinds {:?}, problems {:?}", self.feed.kinds(), self.feed.problems());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub(crate) fn delivered(&self) -> Mark {
        let at = self.log.0.lock().unwrap_or_else(PoisonError::into_inner).len();
        Mark { at, services: self.store.read().services().len() }
    }

    /// The names of the objects of a kind that were delivered since.
    pub(crate) fn changed_since(&self, mark: &Mark, kind: Kind) -> BTreeSet<String> {
        let log = self.log.0.lock().unwrap_or_else(PoisonError::into_inner);
        log[mark.at..].iter().filter(|(of, _)| *of == kind).map(|(_, name)| name.clone()).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }
}

fn context(folder: &std::path::Path, time_scale: u32) -> NodeContext {
    NodeContext {
        node: NODE.to_owned(),
        api_servers: Vec::new(),
        api_servers_file: folder.join("api-servers"),
        time_scale,
    }
}

fn feed_of(
    runtime: &Runtime,
    store: &Arc<ObjectStore>,
    subscribers: Vec<Arc<dyn Subscriber>>,
    open: feed::OpenSource,
) -> Result<Arc<Feed>> {
    let store = Arc::clone(store);
    let (sender, receiver) = mpsc::channel();
    // On a thread of the runtime: those live in the namespace.
    runtime.spawn(async move {
        let metrics = ObjectMetrics::new(&mut Registry::default());
        let _sent = sender.send(Feed::start(feed::Setup { open, store, subscribers, metrics }));
    });
    receiver.recv().context("the feed did not start")
}

pub(crate) fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

pub(crate) fn service(namespace: &str, name: &str, cluster_ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": namespace, "name": name },
        "spec": { "clusterIP": cluster_ip, "ports": [{ "port": 80, "protocol": "TCP" }] },
    })
}

/// In the version that the server of the tests has.
pub(crate) fn slice(namespace: &str, service: &str, addresses: &[&str]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice",
        "metadata": { "namespace": namespace, "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4", "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
        "endpoints": addresses.iter().map(|address| json!({ "addresses": [address], "topology": { "kubernetes.io/hostname": "n2" } })).collect::<Vec<_>>(),
    })
}

pub(crate) fn pod(namespace: &str, name: &str, node: Option<&str>) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": namespace, "name": name, "labels": { "app": name } },
        "spec": { "containers": [{ "name": "c", "image": "none" }], "terminationGracePeriodSeconds": 0 },
    });
    if let Some(node) = node {
        pod["spec"]["nodeName"] = node.into();
    }
    pod
}

pub(crate) fn policy(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "namespace": namespace, "name": name },
        "spec": { "podSelector": {}, "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "other" } } }] }] },
    })
}

/// The resource of ClusterNetworkPolicies, without a schema.
pub(crate) fn cluster_network_policy_crd() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "clusternetworkpolicies.policy.networking.k8s.io",
            "annotations": { "api-approved.kubernetes.io": "unapproved, a test's stand-in without schema" },
        },
        "spec": {
            "group": "policy.networking.k8s.io", "scope": "Cluster",
            "names": { "plural": "clusternetworkpolicies", "singular": "clusternetworkpolicy", "kind": "ClusterNetworkPolicy" },
            "versions": [{
                "name": "v1alpha2", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
            }],
        },
    })
}
