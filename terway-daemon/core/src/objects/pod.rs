//! Pods.

use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;

use super::Protocol;
use super::decode::{ip, null_is_default};
use super::meta::{Interner, ObjectMeta};

/// Where a pod is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum Phase {
    /// Not started, or the phase is not told.
    #[default]
    Pending,
    /// Running.
    Running,
    /// Ended well: its addresses are no longer its own.
    Succeeded,
    /// Ended badly: likewise.
    Failed,
    /// The node does not answer.
    Unknown,
}

/// A port that a container names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodPort {
    /// Its name; empty if it has none.
    #[serde(default = "no_name", deserialize_with = "null_is_default")]
    pub name: Arc<str>,
    /// Protocol.
    #[serde(default, deserialize_with = "null_is_default")]
    pub protocol: Protocol,
    /// The port inside the pod.
    #[serde(rename = "containerPort")]
    pub port: u16,
    /// The port on the node's addresses; 0 = none.
    #[serde(default, deserialize_with = "null_is_default")]
    pub host_port: u16,
    /// The node's address the host port is on; none = all.
    #[serde(rename = "hostIP", default, deserialize_with = "ip")]
    pub host_ip: Option<IpAddr>,
}

fn no_name() -> Arc<str> {
    Arc::from("")
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawContainer {
    restart_policy: Option<String>,
    #[serde(deserialize_with = "null_is_default")]
    ports: Vec<PodPort>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    node_name: Option<Arc<str>>,
    #[serde(deserialize_with = "null_is_default")]
    host_network: bool,
    #[serde(deserialize_with = "null_is_default")]
    containers: Vec<RawContainer>,
    #[serde(deserialize_with = "null_is_default")]
    init_containers: Vec<RawContainer>,
}

#[derive(Deserialize)]
struct RawIp {
    #[serde(deserialize_with = "ip", default)]
    ip: Option<IpAddr>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawStatus {
    #[serde(deserialize_with = "null_is_default")]
    phase: Phase,
    #[serde(rename = "podIP", deserialize_with = "ip")]
    pod_ip: Option<IpAddr>,
    #[serde(rename = "podIPs", deserialize_with = "null_is_default")]
    pod_ips: Vec<RawIp>,
}

#[derive(Deserialize)]
struct RawPod {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: RawSpec,
    #[serde(default)]
    status: RawStatus,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(from = "RawPod")]
pub struct Pod {
    /// Metadata.
    pub meta: ObjectMeta,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// Whether it lives in the node's network namespace.
    pub host_network: bool,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its addresses.
    pub ips: Box<[IpAddr]>,
    /// Ports of its containers and of its sidecars (init containers with `restartPolicy: Always`).
    pub ports: Box<[PodPort]>,
}

impl Pod {
    /// Whether its addresses are its own: it has some, and has not ended.
    #[must_use]
    pub fn holds_addresses(&self) -> bool {
        !self.ips.is_empty() && !matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
        if let Some(node) = &mut self.node {
            *node = interner.string(node);
        }
        for port in &mut self.ports {
            port.name = interner.string(&port.name);
        }
    }
}

impl From<RawPod> for Pod {
    fn from(raw: RawPod) -> Self {
        let sidecars = raw.spec.init_containers.into_iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let mut ips: Vec<IpAddr> = raw.status.pod_ips.iter().filter_map(|entry| entry.ip).collect();
        if ips.is_empty() {
            ips.extend(raw.status.pod_ip);
        }
        Self {
            meta: raw.metadata,
            node: raw.spec.node_name.filter(|name| !name.is_empty()),
            host_network: raw.spec.host_network,
            phase: raw.status.phase,
            ips: ips.into_boxed_slice(),
            ports: raw.spec.containers.into_iter().chain(sidecars).flat_map(|c| c.ports).collect(),
        }
    }
}
