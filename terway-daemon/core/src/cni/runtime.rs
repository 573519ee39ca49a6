//! `runtimeConfig`: what the runtime hands over for the capabilities that the configuration asks for
//! (containernetworking/cni, CONVENTIONS.md).
//!
//! containerd writes the keys inside as Go writes exported fields (`HostPort`, `IngressRate`, `Servers`) where the conventions
//! have lower camel case; Go plugins do not notice. Keys are therefore read in any case.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::json::Object;
use super::result::Dns;
use crate::errors::Error;

/// What the runtime handed over; empty for a capability that was not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `portMappings` without those whose host port is 0, which stands for none.
    pub port_mappings: Vec<PortMapping>,
    /// `bandwidth`.
    pub bandwidth: Bandwidth,
    /// `dns`.
    pub dns: Option<Dns>,
    /// `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// One hostPort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// Port of the node; not 0.
    pub host_port: u16,
    /// Port of the pod; not 0.
    pub container_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Address of the node that the mapping is limited to.
    pub host_ip: Option<IpAddr>,
}

/// Transport protocol of a hostPort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, also where the runtime says nothing.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// In lower case.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// Rate limits in bits per second; 0 is no limit. Bursts are accepted and not used: containerd sends 2^32-1 for every pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress_rate: u64,
    /// From the pod.
    pub egress_rate: u64,
}

impl RuntimeConfig {
    /// Reads `runtimeConfig` of the configuration `root`.
    pub(super) fn read(root: &Object<'_>) -> Result<Self, Error> {
        let Some(config) = root.object("runtimeConfig")? else { return Ok(Self::default()) };
        let mut port_mappings = Vec::new();
        for object in config.objects("portMappings")? {
            port_mappings.extend(port_mapping(&object)?);
        }
        let bandwidth = match config.object("bandwidth")? {
            Some(object) => Bandwidth {
                ingress_rate: object.unsigned("ingressRate")?.unwrap_or(0),
                egress_rate: object.unsigned("egressRate")?.unwrap_or(0),
            },
            None => Bandwidth::default(),
        };
        let dns = match config.object("dns")? {
            // CONVENTIONS.md: `searches` and `servers`, unlike the result's `search` and `nameservers`.
            Some(object) => Some(Dns {
                nameservers: object.strings("servers")?,
                domain: String::new(),
                search: object.strings("searches")?,
                options: object.strings("options")?,
            })
            .filter(|dns| *dns != Dns::default()),
            None => None,
        };
        let annotations = config
            .object("io.kubernetes.cri.pod-annotations")?
            .map(|object| object.string_pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
            .unwrap_or_default();
        Ok(Self { port_mappings, bandwidth, dns, annotations })
    }
}

fn port_mapping(object: &Object<'_>) -> Result<Option<PortMapping>, Error> {
    const A_PORT: &str = "a port from 1 to 65535";
    let port = |key| match object.unsigned(key)?.map(u16::try_from) {
        Some(Ok(port)) => Ok(port),
        None => Ok(0),
        Some(Err(_too_big)) => Err(object.wrong(key, A_PORT)),
    };
    let host_port = port("hostPort")?;
    if host_port == 0 {
        return Ok(None);
    }
    let container_port = port("containerPort")?;
    if container_port == 0 {
        return Err(object.wrong("containerPort", A_PORT));
    }
    let protocol = match object.string("protocol")?.unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return Err(object.wrong("protocol", "tcp, udp or sctp")),
    };
    let host_ip = object.parsed("hostIP", "an IP address")?;
    Ok(Some(PortMapping { host_port, container_port, protocol, host_ip }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(runtime_config: &Value) -> Result<RuntimeConfig, Error> {
        let document = json!({ "runtimeConfig": runtime_config });
        RuntimeConfig::read(&Object::root(document.as_object().unwrap()))
    }

    #[test]
    fn capability_args_in_both_spellings() {
        let containerd = read(&json!({
            "bandwidth": {"IngressRate": 10_000_000, "IngressBurst": 4_294_967_295u32, "EgressRate": 0, "EgressBurst": 0},
            "dns": {"Servers": ["10.96.0.10"], "Searches": ["a.b"], "Options": ["ndots:5"]},
            "io.kubernetes.cri.pod-annotations": {"kubernetes.io/ingress-bandwidth": "10M"},
            "portMappings": [
                {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""},
                {"HostPort": 8081, "ContainerPort": 81, "Protocol": "sctp", "HostIP": "10.0.0.1"},
                {"HostPort": 0, "ContainerPort": 9, "Protocol": "udp", "HostIP": ""},
            ],
            "cgroupPath": "/critest/pod1",
        }));
        let conventions = read(&json!({
            "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 1},
            "dns": {"servers": ["10.96.0.10"], "searches": ["a.b"], "options": ["ndots:5"]},
            "io.kubernetes.cri.pod-annotations": {"kubernetes.io/ingress-bandwidth": "10M"},
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80},
                {"hostPort": 8081, "containerPort": 81, "protocol": "SCTP", "hostIP": "10.0.0.1"},
            ],
        }));
        assert_eq!(containerd, conventions);
        let config = containerd.unwrap();
        assert_eq!(config.bandwidth, Bandwidth { ingress_rate: 10_000_000, egress_rate: 0 });
        assert_eq!(config.port_mappings.len(), 2);
        assert_eq!(config.port_mappings[1].protocol.as_str(), "sctp");
        assert_eq!(config.port_mappings[1].host_ip, Some("10.0.0.1".parse().unwrap()));
        assert_eq!(config.dns.unwrap().search, ["a.b"]);
        assert_eq!(config.annotations["kubernetes.io/ingress-bandwidth"], "10M");
    }

    #[test]
    fn runtime_config_absent() {
        assert_eq!(read(&Value::Null), Ok(RuntimeConfig::default()));
        assert_eq!(read(&json!({"portMappings": null, "dns": {}})), Ok(RuntimeConfig::default()));
    }

    #[test]
    fn invalid_runtime_config_names_its_key() {
        let cases = [
            (json!({"portMappings": [{"hostPort": 65536, "containerPort": 1}]}), "portMappings[0].hostPort"),
            (json!({"portMappings": [{"hostPort": 1}]}), "portMappings[0].containerPort"),
            (json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}]}), "protocol"),
            (json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "host"}]}), "hostIP"),
            (json!({"bandwidth": {"ingressRate": -1}}), "runtimeConfig.bandwidth.ingressRate"),
            (json!(7), "runtimeConfig should be an object"),
        ];
        for (config, naming) in cases {
            let error = read(&config).unwrap_err();
            assert!(error.code.cni == 7 && error.detail.contains(naming), "{}", error.detail);
        }
    }
}
