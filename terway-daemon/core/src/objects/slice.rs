//! Endpoint slices.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use super::Protocol;
use super::decode::null_is_default;
use super::meta::{Interner, Labels, ObjectMeta};

/// The label that names the Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What the addresses of a slice are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
pub enum AddressType {
    /// IPv4 addresses.
    IPv4,
    /// IPv6 addresses.
    IPv6,
    /// Names, which a datapath cannot use.
    FQDN,
}

/// Whose traffic an endpoint is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// Nodes.
    pub nodes: Box<[Arc<str>]>,
    /// Zones.
    pub zones: Box<[Arc<str>]>,
}

/// What stands behind an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetRef {
    /// Its kind, most often `Pod`.
    pub kind: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// One endpoint of a slice. There may be hundreds of thousands: what most do not have stands elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The first of its addresses; the others count nowhere in Kubernetes.
    pub address: Option<IpAddr>,
    /// Whether new clients may be sent to it. Not told means yes.
    pub ready: bool,
    /// Whether it still answers, though perhaps on its way out. Not told means the same as `ready`.
    pub serving: bool,
    /// Whether it is on its way out.
    pub terminating: bool,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// The zone it runs in.
    pub zone: Option<Arc<str>>,
    /// Whose traffic it is meant for; none when the controller gave no hint.
    pub hints: Option<Box<Hints>>,
    /// What stands behind it.
    pub target: Option<Box<TargetRef>>,
}

/// One port that all endpoints of a slice have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    /// The name of the Service's port that it serves; empty for the only one.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The port; none means the slice says nothing about ports, and such an entry serves nothing.
    pub port: Option<u16>,
    /// What is spoken on it, as a hint.
    pub app_protocol: Option<Arc<str>>,
}

/// A slice of the endpoints of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointSlice {
    /// Metadata.
    pub meta: ObjectMeta,
    /// What its addresses are.
    pub address_type: AddressType,
    /// Its endpoints; none if the addresses are names.
    pub endpoints: Box<[Endpoint]>,
    /// Its ports.
    pub ports: Box<[EndpointPort]>,
}

impl EndpointSlice {
    /// The Service it belongs to, in its own namespace.
    #[must_use]
    pub fn service(&self) -> Option<&Arc<str>> {
        self.meta.labels.shared(SERVICE_NAME).filter(|name| !name.is_empty())
    }

    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
        for port in &mut self.ports {
            port.name = interner.string(&port.name);
            port.app_protocol = port.app_protocol.as_ref().map(|text| interner.string(text));
        }
        for endpoint in &mut self.endpoints {
            endpoint.node = endpoint.node.as_ref().map(|text| interner.string(text));
            endpoint.zone = endpoint.zone.as_ref().map(|text| interner.string(text));
            if let Some(hints) = &mut endpoint.hints {
                for text in hints.nodes.iter_mut().chain(&mut hints.zones) {
                    *text = interner.string(text);
                }
            }
            if let Some(target) = &mut endpoint.target {
                target.kind = interner.string(&target.kind);
                target.namespace = interner.string(&target.namespace);
            }
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
struct RawName {
    name: Arc<str>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawHints {
    #[serde(deserialize_with = "null_is_default")]
    for_nodes: Vec<RawName>,
    #[serde(deserialize_with = "null_is_default")]
    for_zones: Vec<RawName>,
}

#[derive(Deserialize)]
struct RawTarget {
    kind: Option<Arc<str>>,
    namespace: Option<Arc<str>>,
    name: Option<Arc<str>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawEndpoint {
    #[serde(deserialize_with = "null_is_default")]
    addresses: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    conditions: RawConditions,
    node_name: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    /// Labels of the node: `topology` in discovery/v1beta1, this in v1 slices that were converted from it.
    #[serde(alias = "topology", deserialize_with = "null_is_default")]
    deprecated_topology: Labels,
    hints: Option<RawHints>,
    target_ref: Option<RawTarget>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPort {
    name: Option<Arc<str>>,
    #[serde(deserialize_with = "null_is_default")]
    protocol: Protocol,
    port: Option<u16>,
    app_protocol: Option<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSlice {
    #[serde(default)]
    metadata: ObjectMeta,
    address_type: AddressType,
    #[serde(default, deserialize_with = "null_is_default")]
    endpoints: Vec<RawEndpoint>,
    #[serde(default, deserialize_with = "null_is_default")]
    ports: Vec<RawPort>,
}

fn address(kind: AddressType, text: &str) -> Result<IpAddr, String> {
    let parsed = text.parse().ok().ok_or_else(|| format!("endpoint address `{text}` is not an IP address"))?;
    match (kind, parsed) {
        (AddressType::IPv4, IpAddr::V4(_)) | (AddressType::IPv6, IpAddr::V6(_)) => Ok(parsed),
        _ => Err(format!("endpoint address `{text}` is not of the slice's addressType")),
    }
}

fn endpoint(kind: AddressType, raw: RawEndpoint) -> Result<Endpoint, String> {
    let ready = raw.conditions.ready.unwrap_or(true);
    let names = |list: Vec<RawName>| list.into_iter().map(|entry| entry.name).collect();
    let topology = |key: &str| raw.deprecated_topology.get(key).map(Arc::from);
    let addresses = raw.addresses.iter().map(|text| address(kind, text));
    let first = addresses.reduce(|first, other| first.and_then(|first| other.map(|_| first))).transpose()?;
    Ok(Endpoint {
        address: first,
        ready,
        serving: raw.conditions.serving.unwrap_or(ready),
        terminating: raw.conditions.terminating.unwrap_or(false),
        node: raw.node_name.or_else(|| topology("kubernetes.io/hostname")),
        zone: raw.zone.or_else(|| topology("topology.kubernetes.io/zone")),
        hints: raw.hints.map(|hints| Box::new(Hints { nodes: names(hints.for_nodes), zones: names(hints.for_zones) })),
        target: raw.target_ref.and_then(|t| {
            let namespace = t.namespace.unwrap_or_else(|| Arc::from(""));
            Some(Box::new(TargetRef { kind: t.kind?, namespace, name: t.name? }))
        }),
    })
}

impl<'de> Deserialize<'de> for EndpointSlice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let raw = RawSlice::deserialize(from)?;
        let named = raw.address_type == AddressType::FQDN;
        let endpoints = if named { Vec::new() } else { raw.endpoints };
        let port = |p: RawPort| EndpointPort {
            name: p.name.unwrap_or_else(|| Arc::from("")),
            protocol: p.protocol,
            port: p.port,
            app_protocol: p.app_protocol,
        };
        Ok(Self {
            meta: raw.metadata,
            address_type: raw.address_type,
            endpoints: endpoints
                .into_iter()
                .map(|e| endpoint(raw.address_type, e))
                .collect::<Result<_, _>>()
                .map_err(serde::de::Error::custom)?,
            ports: raw.ports.into_iter().map(port).collect(),
        })
    }
}
