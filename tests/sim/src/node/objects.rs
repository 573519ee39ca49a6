//! Kubernetes' objects of a node without an API server: manifests in the folder that the daemon watches.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use super::Node;

/// A Service of type ClusterIP with its endpoints.
#[derive(Clone, Debug, Default)]
pub struct ServiceSpec {
    /// Its name, in the namespace `default`.
    pub name: String,
    /// Its addresses, at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports with those of the pods behind them; each for TCP and UDP.
    pub ports: Vec<(u16, u16)>,
    /// The pods behind it: their addresses and their node.
    pub endpoints: Vec<(Vec<IpAddr>, String)>,
}

impl ServiceSpec {
    /// The Service, and an EndpointSlice for each family, as the API server would have them.
    #[must_use]
    pub fn objects(&self) -> Vec<Value> {
        let ports = || {
            self.ports.iter().flat_map(|(port, target)| {
                ["TCP", "UDP"].map(|protocol| (format!("{}-{port}", protocol.to_lowercase()), protocol, *port, *target))
            })
        };
        let family = |ip: &IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let mut all = vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name, "namespace": "default"},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": self.cluster_ips.first(), "clusterIPs": self.cluster_ips,
                "ipFamilies": self.cluster_ips.iter().map(family).collect::<Vec<_>>(),
                "ports": ports().map(|(name, protocol, port, target)| json!({
                    "name": name, "protocol": protocol, "port": port, "targetPort": target,
                })).collect::<Vec<_>>(),
            },
        })];
        all.extend(self.cluster_ips.iter().map(|vip| {
            let of_family = |(ips, node): &(Vec<IpAddr>, String)| {
                let ip = ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
                Some(json!({"addresses": [ip], "nodeName": node, "conditions": {"ready": true}}))
            };
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}", self.name, family(vip).to_lowercase()), "namespace": "default",
                    "labels": {"kubernetes.io/service-name": self.name},
                },
                "addressType": family(vip),
                "ports": ports().map(|(name, protocol, _, target)| json!({
                    "name": name, "protocol": protocol, "port": target,
                })).collect::<Vec<_>>(),
                "endpoints": self.endpoints.iter().filter_map(of_family).collect::<Vec<_>>(),
            })
        }));
        all
    }
}

impl Node {
    /// The folder of manifests; the daemon watches it if [`super::DaemonOptions::objects`] says so.
    #[must_use]
    pub fn objects_dir(&self) -> PathBuf {
        self.work.join("objects")
    }

    /// Writes objects into one file, in place of what it had, which takes effect as a whole.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, name: &str, items: &[impl Serialize]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        let folder = self.objects_dir();
        let fresh = folder.join(format!("{name}.new"));
        fs::write(&fresh, list.to_string())?;
        Ok(fs::rename(fresh, folder.join(format!("{name}.json")))?)
    }

    /// Writes a Service and its endpoints, into a file of the Service's name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_service(&self, service: &ServiceSpec) -> Result<()> {
        self.put(&service.name, &service.objects())
    }

    /// Removes a Service, or whatever objects are in a file of this name.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove_service(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.objects_dir().join(format!("{name}.json")))?)
    }
}
