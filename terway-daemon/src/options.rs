//! Command line of `terwayd`. Paths have the defaults of a Kubernetes node; everything else comes from `eni_conf`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Parser};

use crate::cloud::{EndpointNetwork, KEY_FOLDER, Scheme, SignatureMethod};
use crate::config_source::{ConfigLocation, Paths};
use crate::kube_writes::EventLevel;
use crate::objects::{NodeContext, Origin};
use crate::services::CgroupAt;
use terway_core::kube_writes::NodeSettings;
use terway_core::service::SocketTermination;

/// The node daemon of the terway container network.
#[derive(Clone, Debug, Parser)]
#[command(name = "terwayd", version)]
pub struct Options {
    /// The configuration, followed while the daemon runs: the eni-config ConfigMap as mounted, or its `eni_conf` document alone; or, with --objects
    /// kube, configmap:NAMESPACE/NAME, a ConfigMap of the API server, over which the one that the node's label terway-config names is merged.
    #[arg(long, env = "TERWAY_CONFIG", default_value = "/etc/eni", value_name = "PATH|configmap:NAMESPACE/NAME")]
    pub config: ConfigLocation,
    /// The node's own configuration, merged over that of a mounted ConfigMap: a folder or an `eni_conf` document.
    #[arg(long, value_name = "PATH")]
    pub config_overlay: Option<PathBuf>,
    /// State that survives restarts: the store, the lock, queued DELs.
    #[arg(long, default_value = "/var/lib/cni/terway", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Unix socket of the gRPC service, made with mode 0600.
    #[arg(long, default_value = terway_core::cni::DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,
    /// Folder on a BPF file system; programs and maps are pinned below it.
    #[arg(long, default_value = "/sys/fs/bpf/terway", value_name = "DIR")]
    pub bpffs: PathBuf,
    /// Where the runtime looks for network configurations.
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    pub cni_conf_dir: PathBuf,
    /// Folder of the kernel's sysctls. That of a container is read-only: mount the node's /proc/sys/net as net in another folder.
    #[arg(long, env = "TERWAY_SYSCTL_DIR", default_value = "/proc/sys", value_name = "DIR")]
    pub sysctl_dir: PathBuf,
    /// Rename the files of other plugins that the runtime would take before terway's; without it they are only reported.
    #[arg(long)]
    pub cni_exclusive: bool,
    /// Source of Kubernetes objects (Services, EndpointSlices, pods, namespaces, the node, NetworkPolicies, ClusterNetworkPolicies): kube, the API
    /// server; kube:PATH, the same with a kubeconfig; dir:PATH, a folder of manifests. Without it, the node serves no Services and enforces no policies.
    #[arg(long, env = "TERWAY_OBJECTS", value_name = "SOURCE")]
    pub objects: Option<Origin>,
    /// Address and port of an API server, tried before those that are learned from the cluster; may be repeated.
    #[arg(long, env = "TERWAY_API_SERVERS", value_delimiter = ',', value_name = "ADDRESS:PORT")]
    pub api_server: Vec<SocketAddr>,
    /// Which Kubernetes events are written about pods and the node, with --objects kube.
    #[arg(long, env = "TERWAY_EVENTS", value_enum, default_value_t, value_name = "WHICH")]
    pub events: EventLevel,
    /// Whether the condition SufficientIP and the annotation k8s.aliyun.com/max-available-ip of the own Node are written, with --objects kube.
    #[arg(long, env = "TERWAY_NODE_STATUS", default_value_t = true, action = ArgAction::Set, value_name = "BOOL")]
    pub node_status: bool,
    /// Set the condition NetworkUnavailable of the own Node to False when a cloud controller has set it to True; without it that is only reported.
    #[arg(long, env = "TERWAY_CLEAR_NETWORK_UNAVAILABLE")]
    pub clear_network_unavailable: bool,
    /// Key of a taint that is removed from the own Node when pods can start.
    #[arg(long, env = "TERWAY_STARTUP_TAINT", value_name = "KEY")]
    pub startup_taint: Option<String>,
    /// The cgroup (version 2) whose processes get Services translated at connect(): its folder, or none; default: the root cgroup.
    #[arg(long, env = "TERWAY_CGROUP", value_name = "PATH")]
    pub cgroup: Option<CgroupAt>,
    /// Which sockets are closed when the Service backend they are connected to is removed: none, udp, or all (udp and tcp).
    #[arg(long, default_value_t, value_name = "WHOSE")]
    pub end_sockets: SocketTermination,
    /// Address of /metrics, /healthz and /readyz. A port that is taken is tried again.
    #[arg(long, default_value = "127.0.0.1:19099", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Name of this node, which no other node of the cluster has; default: the host name.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: Option<String>,
    /// MTU of pod interfaces in bytes; default: the MTU of the pod's ENI.
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// ECS endpoint; default: the region's VPC endpoint.
    #[arg(long, env = "ECS_ENDPOINT", value_name = "URL")]
    pub ecs_endpoint: Option<String>,
    /// VPC endpoint; default: the region's VPC endpoint.
    #[arg(long, env = "VPC_ENDPOINT", value_name = "URL")]
    pub vpc_endpoint: Option<String>,
    /// URL scheme of the endpoints.
    #[arg(long, env = "ALICLOUD_CLIENT_SCHEME", default_value = "https", value_parser = ["https", "http", "HTTPS", "HTTP"], value_name = "SCHEME")]
    pub endpoint_scheme: String,
    /// The network by which the region's endpoints are reached.
    #[arg(long, env = "ALICLOUD_ENDPOINT_TYPE", default_value = "vpc", value_parser = ["vpc", "public"], value_name = "NETWORK")]
    pub endpoint_type: String,
    /// How requests are signed: ACS3-HMAC-SHA256, or HMAC-SHA1 for private clouds that know nothing newer.
    #[arg(long, default_value = "acs3", value_parser = ["acs3", "hmac-sha1"], value_name = "METHOD")]
    pub signature: String,
    /// Folder with the files access-key-id and access-key-secret; if both are there, they go before the keys of eni_conf.
    #[arg(long, default_value = KEY_FOLDER, value_name = "DIR")]
    pub credentials_dir: PathBuf,
    /// Metadata service.
    #[arg(long, default_value = "http://100.100.100.200", value_name = "URL")]
    pub metadata: String,
    /// Entries of the flow table, for each family; default: bpf_ct_max_v4 and bpf_ct_max_v6 of eni_conf.
    #[arg(long, value_name = "N")]
    pub flow_entries: Option<u32>,
    /// Seconds for which a released address is not given to another pod.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub cooling: u64,
    /// Seconds between two audits of the node's links, rules, routes and datapath entries.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub audit_interval: u64,
    /// Divides the time-outs and pauses that have no option of their own by this factor. For tests.
    #[arg(long, hide = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub time_scale: u32,
    /// Folder with the DMI identifiers of the machine. For tests.
    #[arg(long, hide = true, default_value = "/sys/class/dmi/id", value_name = "DIR")]
    pub dmi_dir: PathBuf,
    /// Log filter, such as info or terway_daemon=debug.
    #[arg(long, env = "TERWAY_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// Start with the debug log of the datapath: one line per decision of the slow path, at level info of the target terway_datapath. Established
    /// packets write none. `terway-cli datapath-log on|off` switches it while the daemon runs.
    #[arg(long, env = "TERWAY_DATAPATH_LOG")]
    pub datapath_log: bool,
    /// Log as JSON, one object a line.
    #[arg(long)]
    pub log_json: bool,
}

impl Options {
    /// The name of this node.
    #[must_use]
    pub fn node_name(&self) -> String {
        self.node
            .clone()
            .or_else(|| nix::unistd::gethostname().ok()?.into_string().ok())
            .unwrap_or_else(|| "node".into())
    }

    /// The scheme as the client of the cloud names it.
    #[must_use]
    pub fn endpoint_scheme(&self) -> Scheme {
        if self.endpoint_scheme.eq_ignore_ascii_case("http") { Scheme::Http } else { Scheme::Https }
    }

    /// The network of the endpoints, likewise.
    #[must_use]
    pub fn endpoint_network(&self) -> EndpointNetwork {
        if self.endpoint_type == "public" { EndpointNetwork::Public } else { EndpointNetwork::Vpc }
    }

    /// The method of signing, likewise.
    #[must_use]
    pub fn signature(&self) -> SignatureMethod {
        if self.signature == "hmac-sha1" { SignatureMethod::HmacSha1 } else { SignatureMethod::Acs3 }
    }

    /// What the object source needs to know of the node.
    #[must_use]
    pub fn node_context(&self) -> NodeContext {
        NodeContext {
            node: self.node_name(),
            api_servers: self.api_server.clone(),
            api_servers_file: self.state_dir.join("api-servers"),
            time_scale: self.time_scale,
        }
    }

    /// What is written to the own Node.
    #[must_use]
    pub fn node_settings(&self) -> NodeSettings {
        NodeSettings {
            has_status: self.node_status,
            clears_network_unavailable: self.clear_network_unavailable,
            startup_taint: self.startup_taint.clone(),
        }
    }

    /// The store's file.
    #[must_use]
    pub fn store_path(&self) -> PathBuf {
        self.state_dir.join("terway.redb")
    }

    /// The kept identity of the node.
    #[must_use]
    pub fn node_path(&self) -> PathBuf {
        self.state_dir.join("node.json")
    }

    /// The kept subnets of the node's ENIs.
    #[must_use]
    pub fn subnets_path(&self) -> PathBuf {
        self.state_dir.join("subnets.json")
    }

    /// Where a mounted configuration lies, and where the last good one is kept.
    #[must_use]
    pub fn config_paths(&self, config: PathBuf) -> Paths {
        Paths { config, overlay: self.config_overlay.clone(), kept: Some(self.kept_config_path()) }
    }

    /// The last good configuration.
    #[must_use]
    pub fn kept_config_path(&self) -> PathBuf {
        self.state_dir.join("config.json")
    }

    /// Where the plugin leaves DELs that found no daemon.
    #[must_use]
    pub fn spool_dir(&self) -> PathBuf {
        self.state_dir.join("del")
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }
}
