//! Services.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer};

use super::decode::{cidrs, ip, ips, null_is_default};
use super::meta::{Interner, Labels, ObjectMeta};
use super::{IntOrString, Protocol};

/// How a Service is published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum ServiceType {
    /// On an address inside the cluster.
    #[default]
    ClusterIP,
    /// Also on a port of every node.
    NodePort,
    /// Also on an address of a load balancer.
    LoadBalancer,
    /// A name in DNS and nothing for a datapath.
    ExternalName,
}

/// Which endpoints a client may be sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum TrafficPolicy {
    /// Any.
    #[default]
    Cluster,
    /// Those of the node that the packet meets first.
    Local,
}

/// `spec.trafficDistribution`. The EndpointSlice controller turns it into hints; a node follows the hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
pub enum TrafficDistribution {
    /// The older name of [`Self::PreferSameZone`].
    PreferClose,
    /// Endpoints of the client's zone first.
    PreferSameZone,
    /// Endpoints of the client's node first, then of its zone.
    PreferSameNode,
    /// A value that is newer than this code.
    #[serde(other)]
    Other,
}

/// Whether packets to a load balancer's address arrive with that address (`ipMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum IpMode {
    /// Yes: nodes serve it.
    #[default]
    VIP,
    /// No, the balancer is a proxy and must see the traffic: nodes leave the address alone.
    Proxy,
}

/// One entry of `status.loadBalancer.ingress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerIngress {
    /// The address; none where the balancer is known by name only.
    #[serde(deserialize_with = "ip")]
    pub ip: Option<IpAddr>,
    /// Who serves it.
    #[serde(deserialize_with = "null_is_default")]
    pub ip_mode: IpMode,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Its name, which endpoint slices refer to; empty for the only port.
    #[serde(default = "no_name", deserialize_with = "null_or_name")]
    pub name: Arc<str>,
    /// Protocol.
    #[serde(default, deserialize_with = "null_is_default")]
    pub protocol: Protocol,
    /// The port on the Service's addresses.
    pub port: u16,
    /// The port of the pods, resolved by the endpoint slices.
    #[serde(default)]
    pub target_port: Option<IntOrString>,
    /// The port on the nodes; 0 = none.
    #[serde(default, deserialize_with = "null_is_default")]
    pub node_port: u16,
}

fn no_name() -> Arc<str> {
    Arc::from("")
}

fn null_or_name<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_else(no_name))
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum RawAffinity {
    #[default]
    None,
    ClientIP,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawClientIp {
    timeout_seconds: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAffinityConfig {
    #[serde(rename = "clientIP", deserialize_with = "null_is_default")]
    client_ip: RawClientIp,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(rename = "type", deserialize_with = "null_is_default")]
    kind: ServiceType,
    #[serde(deserialize_with = "null_is_default")]
    ports: Vec<ServicePort>,
    #[serde(deserialize_with = "null_is_default")]
    selector: Labels,
    #[serde(rename = "clusterIP", deserialize_with = "null_is_default")]
    cluster_ip: String,
    #[serde(rename = "clusterIPs", deserialize_with = "null_is_default")]
    cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", deserialize_with = "ips")]
    external_ips: Vec<IpAddr>,
    #[serde(rename = "loadBalancerSourceRanges", deserialize_with = "cidrs")]
    source_ranges: Vec<IpNetwork>,
    #[serde(deserialize_with = "null_is_default")]
    internal_traffic_policy: TrafficPolicy,
    #[serde(deserialize_with = "null_is_default")]
    external_traffic_policy: TrafficPolicy,
    traffic_distribution: Option<TrafficDistribution>,
    #[serde(deserialize_with = "null_is_default")]
    publish_not_ready_addresses: bool,
    #[serde(deserialize_with = "null_is_default")]
    session_affinity: RawAffinity,
    #[serde(deserialize_with = "null_is_default")]
    session_affinity_config: RawAffinityConfig,
    #[serde(deserialize_with = "null_is_default")]
    health_check_node_port: u16,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawBalancer {
    #[serde(deserialize_with = "null_is_default")]
    ingress: Vec<LoadBalancerIngress>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawStatus {
    #[serde(deserialize_with = "null_is_default")]
    load_balancer: RawBalancer,
}

#[derive(Deserialize)]
struct RawService {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: RawSpec,
    #[serde(default, deserialize_with = "null_is_default")]
    status: RawStatus,
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "RawService")]
pub struct Service {
    /// Metadata.
    pub meta: ObjectMeta,
    /// How it is published.
    pub kind: ServiceType,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Whether `clusterIP: None`: clients talk to the pods themselves.
    pub headless: bool,
    /// Its addresses inside the cluster, one of a family.
    pub cluster_ips: Vec<IpAddr>,
    /// Addresses of others that nodes serve for it.
    pub external_ips: Vec<IpAddr>,
    /// What its load balancer reported.
    pub ingress: Vec<LoadBalancerIngress>,
    /// Clients that may use the load balancer's addresses; empty = all.
    pub source_ranges: Vec<IpNetwork>,
    /// Which endpoints clients at the cluster address get.
    pub internal_policy: TrafficPolicy,
    /// Which endpoints clients from outside get.
    pub external_policy: TrafficPolicy,
    /// What the hints of its slices were made from.
    pub distribution: Option<TrafficDistribution>,
    /// Whether endpoints count as ready whatever their pods say.
    pub publish_not_ready: bool,
    /// How long a client stays with its endpoint, in seconds; none = no affinity.
    pub affinity_seconds: Option<u32>,
    /// The port on which nodes tell a load balancer whether they have ready endpoints; 0 = none.
    pub health_check_port: u16,
    /// Whether it selects pods (a Service without selector has hand-made endpoints).
    pub has_selector: bool,
}

/// The API's default of `sessionAffinityConfig.clientIP.timeoutSeconds` (core/v1 `DefaultClientIPServiceAffinitySeconds`).
const AFFINITY_SECONDS: u32 = 10_800;

impl Service {
    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
        for port in &mut self.ports {
            port.name = interner.string(&port.name);
        }
    }
}

impl TryFrom<RawService> for Service {
    type Error = String;

    fn try_from(raw: RawService) -> Result<Self, String> {
        let spec = raw.spec;
        let mut texts = spec.cluster_ips;
        if texts.is_empty() && !spec.cluster_ip.is_empty() {
            texts.push(spec.cluster_ip);
        }
        let headless = texts.iter().any(|text| text == "None");
        let parse = |text: &String| text.parse().ok().ok_or_else(|| format!("clusterIP `{text}` is not an IP address"));
        let addresses = texts.iter().filter(|text| !text.is_empty() && *text != "None");
        let affinity_seconds = (spec.session_affinity == RawAffinity::ClientIP)
            .then(|| spec.session_affinity_config.client_ip.timeout_seconds.unwrap_or(AFFINITY_SECONDS));
        if affinity_seconds.is_some_and(|s| s == 0 || s > 86_400) {
            return Err("timeoutSeconds of the session affinity must be 1 to 86400".to_owned());
        }
        if spec.ports.iter().any(|port| port.port == 0) {
            return Err("a port must be 1 to 65535".to_owned());
        }
        Ok(Self {
            meta: raw.metadata,
            kind: spec.kind,
            ports: spec.ports,
            headless,
            cluster_ips: addresses.map(parse).collect::<Result<_, String>>()?,
            external_ips: spec.external_ips,
            ingress: raw.status.load_balancer.ingress,
            source_ranges: spec.source_ranges,
            internal_policy: spec.internal_traffic_policy,
            external_policy: spec.external_traffic_policy,
            distribution: spec.traffic_distribution,
            publish_not_ready: spec.publish_not_ready_addresses,
            affinity_seconds,
            health_check_port: spec.health_check_node_port,
            has_selector: !spec.selector.is_empty(),
        })
    }
}
