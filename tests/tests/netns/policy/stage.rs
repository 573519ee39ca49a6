//! The world of the policy suite: three namespaces with three pods each on two nodes, its objects, and when a change is in force.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use terway_core::objects::{Kind, Object, ObjectName};
use terway_core::policy::Packet;
use terway_oracle::cluster_state::{ClusterState, LocalEndpoint};
use terway_oracle::policy::expected_verdicts;
use terway_sim::cluster::Cluster;
use terway_sim::node::Rpc;
use terway_sim::node::cni::Pod;

/// Namespaces of the world.
pub(crate) const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// Pods of each.
pub(crate) const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a change may take until it is in force; some hundred times what it takes.
const SOON: Duration = Duration::from_secs(10);

/// Objects by kind, namespace and name.
pub(crate) type Objects = BTreeMap<(Kind, String, String), Value>;

pub(crate) struct Stage<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) pods: Vec<(usize, Pod)>,
    /// Without policies.
    pub(crate) base: Objects,
    daemons: Vec<Rpc>,
    generation: u64,
    host: Vec<IpAddr>,
}

/// The object of a pod.
pub(crate) fn pod_object(namespace: &str, name: &str, labels: &Value, ips: &[IpAddr]) -> Value {
    // One name for one number in most pods and for another in some.
    let serve = if name == "b" { 81 } else { 80 };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": format!("uid-{name}"), "labels": labels},
        "spec": {"containers": [{"name": "main", "ports": [
            {"name": "serve", "containerPort": serve, "protocol": "TCP"},
            {"name": "serve-udp", "containerPort": 81, "protocol": "UDP"},
            {"name": "nobody", "containerPort": 82, "protocol": "TCP"},
        ]}]},
        "status": {"phase": "Running", "podIPs": ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()},
    })
}

pub(crate) fn namespace_object(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

pub(crate) fn policy_object(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}

pub(crate) fn cluster_object(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": spec,
    })
}

fn key(kind: Kind, namespace: &str, name: &str) -> (Kind, String, String) {
    (kind, namespace.to_owned(), name.to_owned())
}

/// Puts an object among others.
pub(crate) trait Put {
    fn pod(&mut self, namespace: &str, name: &str, object: Value);
    fn namespace(&mut self, name: &str, labels: &Value);
    fn policy(&mut self, namespace: &str, name: &str, spec: &Value);
    fn cluster(&mut self, name: &str, spec: &Value);
    fn gone(&mut self, kind: Kind, namespace: &str, name: &str);
    fn label(&mut self, namespace: &str, name: &str, labels: &Value);
}

impl Put for Objects {
    fn pod(&mut self, namespace: &str, name: &str, object: Value) {
        self.insert(key(Kind::Pod, namespace, name), object);
    }

    fn namespace(&mut self, name: &str, labels: &Value) {
        self.insert(key(Kind::Namespace, "", name), namespace_object(name, labels));
    }

    fn policy(&mut self, namespace: &str, name: &str, spec: &Value) {
        self.insert(key(Kind::NetworkPolicy, namespace, name), policy_object(namespace, name, spec));
    }

    fn cluster(&mut self, name: &str, spec: &Value) {
        self.insert(key(Kind::ClusterNetworkPolicy, "", name), cluster_object(name, spec));
    }

    fn gone(&mut self, kind: Kind, namespace: &str, name: &str) {
        self.remove(&key(kind, namespace, name));
    }

    fn label(&mut self, namespace: &str, name: &str, labels: &Value) {
        if let Some(pod) = self.get_mut(&key(Kind::Pod, namespace, name)) {
            pod["metadata"]["labels"] = labels.clone();
        }
    }
}

impl<'a> Stage<'a> {
    /// Nine pods, every second one on the other node, so that some pairs meet on one node and some do not.
    pub(crate) fn set(cluster: &'a Cluster) -> Result<Self> {
        let daemons = cluster.nodes().iter().map(|node| node.rpc()).collect::<Result<_>>()?;
        let mut stage =
            Self { cluster, pods: Vec::new(), base: Objects::new(), daemons, generation: 0, host: Vec::new() };
        for namespace in NAMESPACES {
            stage.base.namespace(namespace, &json!({"ns": namespace}));
            for name in NAMES {
                let node = 1 + stage.pods.len() % 2;
                let pod = stage.add(node, namespace, name)?;
                let object = pod_object(namespace, name, &json!({"pod": name}), &pod.ips);
                stage.base.pod(namespace, name, object);
                stage.pods.push((node, pod));
            }
        }
        let base = stage.base.clone();
        stage.publish(&base)?;
        Ok(stage)
    }

    /// The daemons are others now.
    pub(crate) fn reconnect(&mut self) -> Result<()> {
        self.daemons = self.cluster.nodes().iter().map(|node| node.rpc()).collect::<Result<_>>()?;
        Ok(())
    }

    /// A pod of a namespace.
    pub(crate) fn add(&self, node: usize, namespace: &str, name: &str) -> Result<Pod> {
        let node = self.cluster.node(node);
        let mut pod = node.new_pod(name)?;
        namespace.clone_into(&mut pod.namespace);
        node.add(&mut pod)?;
        Ok(pod)
    }

    /// Tells every node of these objects, all others being gone, and returns when they are in force everywhere.
    pub(crate) fn publish(&mut self, objects: &Objects) -> Result<()> {
        self.generation += 1;
        // Told after all others, so that when it is known they are.
        let mark = format!("m{}", self.generation);
        let mut items: Vec<&Value> = objects.values().collect();
        let marker = policy_object("zzz-mark", &mark, &json!({"podSelector": {}}));
        items.push(&marker);
        self.cluster.put("world", &items)?;
        let start = Instant::now();
        for daemon in &mut self.daemons {
            loop {
                let known = daemon.policies("zzz-mark")?;
                if known.policies.iter().any(|policy| policy.name == mark) {
                    break;
                }
                ensure!(start.elapsed() < SOON, "a change is not in force within {SOON:?}");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// Those objects as the oracle reads them.
    pub(crate) fn world(&self, objects: &Objects) -> Result<ClusterState> {
        let mut world = ClusterState { enforce: true, ..ClusterState::default() };
        for ((kind, ..), value) in objects {
            match Object::read(*kind, value)? {
                Object::Namespace(it) => drop(world.namespaces.insert(Arc::clone(&it.meta.object.name), it)),
                Object::Pod(it) => drop(world.pods.insert(it.meta.object.clone(), it)),
                Object::NetworkPolicy(it) => drop(world.policies.insert(it.meta.object.clone(), it)),
                Object::ClusterNetworkPolicy(it) => drop(world.cluster.insert(it.meta.object.clone(), it)),
                _ => {}
            }
        }
        for (slot, (_, pod)) in (1..).zip(&self.pods) {
            let name = ObjectName::new(&pod.namespace, &pod.name);
            let local = LocalEndpoint { pod: name, uid: format!("uid-{}", pod.name), addresses: pod.ips.clone() };
            world.locals.insert(slot, local);
        }
        world.node.extend(&self.host);
        Ok(world)
    }

    /// What each pod may reach: by source, the cells of [`super::probes`].
    pub(crate) fn expected(&self, objects: &Objects) -> Result<Vec<Vec<bool>>> {
        let world = self.world(objects)?;
        let mut all = Vec::new();
        for (_, from) in &self.pods {
            let mut cells = Vec::new();
            for (_, to) in &self.pods {
                for port in super::probes::PORTS {
                    for protocol in super::probes::PROTOCOLS {
                        for v4 in [true, false] {
                            let of = |pod: &Pod| if v4 { pod.v4() } else { pod.v6() };
                            let packet = Packet { source: of(from)?, destination: of(to)?, protocol, port };
                            cells.push(expected_verdicts(&world, &packet).into_iter().flatten().all(|passes| passes));
                        }
                    }
                }
            }
            all.push(cells);
        }
        Ok(all)
    }

    /// Takes the pods away again.
    pub(crate) fn clear(self) -> Result<()> {
        for (node, pod) in &self.pods {
            self.cluster.node(*node).del(pod)?;
        }
        Ok(())
    }
}
