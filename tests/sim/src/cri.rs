//! A client of the container runtime interface, as the kubelet is one: `runtime.v1` over gRPC.
//!
//! The messages are written by hand and hold only the fields used; prost skips the others, so a subset is safe. Field numbers: the
//! Kubernetes project's `cri-api/pkg/apis/runtime/v1/api.proto`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use http::uri::PathAndQuery;
use prost::Message;
use tokio::runtime::Handle;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};

use crate::image;

macro_rules! messages {
    ($($name:ident { $( $field:ident: $type:ty = #[$attr:meta] ),* $(,)? })*) => { $(
        #[derive(Clone, PartialEq, Message)]
        struct $name { $( #[$attr] $field: $type, )* }
    )* };
}

messages! {
    Metadata {
        name: String = #[prost(string, tag = "1")],
        uid: String = #[prost(string, tag = "2")],
        namespace: String = #[prost(string, tag = "3")],
        attempt: u32 = #[prost(uint32, tag = "4")],
    }
    PortMapping {
        protocol: i32 = #[prost(int32, tag = "1")],
        container_port: i32 = #[prost(int32, tag = "2")],
        host_port: i32 = #[prost(int32, tag = "3")],
        host_ip: String = #[prost(string, tag = "4")],
    }
    NamespaceOption {
        network: i32 = #[prost(int32, tag = "1")],
        pid: i32 = #[prost(int32, tag = "2")],
    }
    SandboxSecurity { namespaces: Option<NamespaceOption> = #[prost(message, optional, tag = "1")] }
    SandboxLinux {
        cgroup_parent: String = #[prost(string, tag = "1")],
        security: Option<SandboxSecurity> = #[prost(message, optional, tag = "2")],
    }
    SandboxConfig {
        metadata: Option<Metadata> = #[prost(message, optional, tag = "1")],
        hostname: String = #[prost(string, tag = "2")],
        log_directory: String = #[prost(string, tag = "3")],
        port_mappings: Vec<PortMapping> = #[prost(message, repeated, tag = "5")],
        annotations: HashMap<String, String> = #[prost(map = "string, string", tag = "7")],
        linux: Option<SandboxLinux> = #[prost(message, optional, tag = "8")],
    }
    RunPodSandbox { config: Option<SandboxConfig> = #[prost(message, optional, tag = "1")] }
    Id { id: String = #[prost(string, tag = "1")] }
    IdVerbose {
        id: String = #[prost(string, tag = "1")],
        verbose: bool = #[prost(bool, tag = "2")],
    }
    IdTimeout {
        id: String = #[prost(string, tag = "1")],
        timeout: i64 = #[prost(int64, tag = "2")],
    }
    PodIp { ip: String = #[prost(string, tag = "1")] }
    SandboxNetwork {
        ip: String = #[prost(string, tag = "1")],
        additional: Vec<PodIp> = #[prost(message, repeated, tag = "2")],
    }
    SandboxStatus {
        state: i32 = #[prost(int32, tag = "3")],
        network: Option<SandboxNetwork> = #[prost(message, optional, tag = "5")],
    }
    SandboxStatusAnswer {
        status: Option<SandboxStatus> = #[prost(message, optional, tag = "1")],
        info: HashMap<String, String> = #[prost(map = "string, string", tag = "2")],
    }
    ListedSandbox {
        id: String = #[prost(string, tag = "1")],
        metadata: Option<Metadata> = #[prost(message, optional, tag = "2")],
        state: i32 = #[prost(int32, tag = "3")],
    }
    ListAnswer { items: Vec<ListedSandbox> = #[prost(message, repeated, tag = "1")] }
    ContainerMetadata { name: String = #[prost(string, tag = "1")] }
    Capability {
        add: Vec<String> = #[prost(string, repeated, tag = "1")],
        drop: Vec<String> = #[prost(string, repeated, tag = "2")],
    }
    SecurityProfile { kind: i32 = #[prost(int32, tag = "1")] }
    KeyValue {
        key: String = #[prost(string, tag = "1")],
        value: String = #[prost(string, tag = "2")],
    }
    ContainerMount {
        container_path: String = #[prost(string, tag = "1")],
        host_path: String = #[prost(string, tag = "2")],
        readonly: bool = #[prost(bool, tag = "3")],
        propagation: i32 = #[prost(int32, tag = "5")],
    }
    ContainerState {
        state: i32 = #[prost(int32, tag = "3")],
        exit_code: i32 = #[prost(int32, tag = "7")],
    }
    ContainerStateAnswer { status: Option<ContainerState> = #[prost(message, optional, tag = "1")] }
    ContainerSecurity {
        capabilities: Option<Capability> = #[prost(message, optional, tag = "1")],
        namespaces: Option<NamespaceOption> = #[prost(message, optional, tag = "3")],
        readonly_rootfs: bool = #[prost(bool, tag = "7")],
        no_new_privs: bool = #[prost(bool, tag = "11")],
        seccomp: Option<SecurityProfile> = #[prost(message, optional, tag = "15")],
    }
    ContainerLinux { security: Option<ContainerSecurity> = #[prost(message, optional, tag = "2")] }
    ContainerConfig {
        metadata: Option<ContainerMetadata> = #[prost(message, optional, tag = "1")],
        image: Option<Id> = #[prost(message, optional, tag = "2")],
        command: Vec<String> = #[prost(string, repeated, tag = "3")],
        envs: Vec<KeyValue> = #[prost(message, repeated, tag = "6")],
        mounts: Vec<ContainerMount> = #[prost(message, repeated, tag = "7")],
        log_path: String = #[prost(string, tag = "11")],
        linux: Option<ContainerLinux> = #[prost(message, optional, tag = "15")],
    }
    CreateContainer {
        sandbox: String = #[prost(string, tag = "1")],
        config: Option<ContainerConfig> = #[prost(message, optional, tag = "2")],
        sandbox_config: Option<SandboxConfig> = #[prost(message, optional, tag = "3")],
    }
    ExecSync {
        id: String = #[prost(string, tag = "1")],
        command: Vec<String> = #[prost(string, repeated, tag = "2")],
        timeout: i64 = #[prost(int64, tag = "3")],
    }
    ExecAnswer {
        stdout: Vec<u8> = #[prost(bytes = "vec", tag = "1")],
        stderr: Vec<u8> = #[prost(bytes = "vec", tag = "2")],
        exit_code: i32 = #[prost(int32, tag = "3")],
    }
    Nothing {}
    Condition {
        kind: String = #[prost(string, tag = "1")],
        status: bool = #[prost(bool, tag = "2")],
        reason: String = #[prost(string, tag = "3")],
        message: String = #[prost(string, tag = "4")],
    }
    RuntimeStatus { conditions: Vec<Condition> = #[prost(message, repeated, tag = "1")] }
    StatusAnswer { status: Option<RuntimeStatus> = #[prost(message, optional, tag = "1")] }
    VersionAnswer {
        name: String = #[prost(string, tag = "2")],
        version: String = #[prost(string, tag = "3")],
    }
}

/// `CONTAINER_EXITED`.
const EXITED: i32 = 2;

/// A bind mount of a container.
#[derive(Clone, Debug, Default)]
pub struct Mount {
    /// Path of the node.
    pub from: String,
    /// Path in the container.
    pub to: String,
    /// It cannot be written to.
    pub read_only: bool,
    /// What is mounted on the node later appears in the container.
    pub host_to_container: bool,
}

/// What a container is to be.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpec {
    /// Its name, unique in its pod.
    pub name: String,
    /// Its image.
    pub image: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Bind mounts.
    pub mounts: Vec<Mount>,
    /// Capabilities beyond the runtime's default, without `CAP_`.
    pub add_capabilities: Vec<String>,
    /// Capabilities of the default that it does not have; `ALL` for all.
    pub drop_capabilities: Vec<String>,
    /// Its root file system is read-only.
    pub read_only: bool,
    /// `no_new_privs` is set.
    pub no_new_privileges: bool,
    /// It has the runtime's default seccomp profile; else none.
    pub default_seccomp: bool,
}

/// What a pod is to be.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    /// Its name, unique in its namespace.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Annotations, such as `kubernetes.io/ingress-bandwidth`.
    pub annotations: HashMap<String, String>,
    /// (host port, container port, protocol `tcp`, `udp` or `sctp`).
    pub ports: Vec<(u16, u16, &'static str)>,
    /// Whether it shares the node's network.
    pub host_network: bool,
}

impl PodSpec {
    /// A plain pod.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { name: name.to_owned(), namespace: namespace.to_owned(), ..Self::default() }
    }
}

/// What the runtime says of a sandbox.
#[derive(Clone, Debug)]
pub struct PodStatus {
    /// Whether it runs.
    pub ready: bool,
    /// Its addresses, the first one first.
    pub ips: Vec<IpAddr>,
    /// The path of its network namespace, if the runtime tells.
    pub netns: Option<PathBuf>,
}

/// What a command in a container did.
#[derive(Clone, Debug)]
pub struct Exec {
    /// Its exit status.
    pub code: i32,
    /// Its standard output and then its standard error.
    pub output: String,
}

/// The runtime's readiness.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// `NetworkReady`.
    pub network: bool,
    /// The message of `NetworkReady`, empty when it is true.
    pub message: String,
}

/// A connection to one runtime. Clones share it; calls block the calling thread, which must not be one of the async runtime.
#[derive(Clone, Debug)]
pub struct Cri {
    grpc: Grpc<Channel>,
    handle: Handle,
    cgroup_parent: String,
    logs: PathBuf,
}

impl Cri {
    /// Connects to the runtime's socket. Pods go below `cgroup_parent`, their logs below `logs`.
    ///
    /// # Errors
    /// When the socket does not answer.
    pub fn connect(handle: &Handle, socket: &Path, cgroup_parent: &str, logs: &Path) -> Result<Self> {
        let channel = handle
            .block_on(async { Endpoint::try_from(format!("unix://{}", socket.display()))?.connect().await })
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self {
            grpc: Grpc::new(channel),
            handle: handle.clone(),
            cgroup_parent: cgroup_parent.to_owned(),
            logs: logs.to_owned(),
        })
    }

    fn call<Q: Message + Default + 'static, A: Message + Default + 'static>(
        &self,
        method: &'static str,
        request: Q,
    ) -> Result<A> {
        let mut grpc = self.grpc.clone();
        self.handle.block_on(async move {
            let work = async {
                grpc.ready().await?;
                let path: PathAndQuery = format!("/runtime.v1.RuntimeService/{method}").parse()?;
                let codec = tonic_prost::ProstCodec::<Q, A>::default();
                grpc.unary(tonic::Request::new(request), path, codec)
                    .await
                    .map_err(|status| anyhow!("{method}: {:?}: {}", status.code(), status.message()))
                    .map(tonic::Response::into_inner)
            };
            // The kubelet's own limit for sandbox calls is four minutes; nothing here takes a tenth of that.
            tokio::time::timeout(Duration::from_secs(30), work)
                .await
                .with_context(|| format!("{method} got no answer in 30 s"))?
        })
    }

    fn config(&self, spec: &PodSpec) -> SandboxConfig {
        let network = if spec.host_network { 2 } else { 0 };
        SandboxConfig {
            metadata: Some(Metadata {
                name: spec.name.clone(),
                uid: format!("{}-{}", spec.namespace, spec.name),
                namespace: spec.namespace.clone(),
                attempt: 0,
            }),
            // On the node's network the node's name counts; runc refuses another.
            hostname: if spec.host_network { String::new() } else { spec.name.clone() },
            log_directory: self.logs.join(&spec.name).display().to_string(),
            port_mappings: spec
                .ports
                .iter()
                .map(|(host, container, protocol)| PortMapping {
                    protocol: ["tcp", "udp", "sctp"].iter().position(|known| known == protocol).unwrap_or(0) as i32,
                    container_port: i32::from(*container),
                    host_port: i32::from(*host),
                    host_ip: String::new(),
                })
                .collect(),
            annotations: spec.annotations.clone(),
            linux: Some(SandboxLinux {
                cgroup_parent: self.cgroup_parent.clone(),
                security: Some(SandboxSecurity { namespaces: Some(NamespaceOption { network, pid: 1 }) }),
            }),
        }
    }

    /// The runtime's name and version.
    ///
    /// # Errors
    /// When the call fails.
    pub fn version(&self) -> Result<String> {
        let answer: VersionAnswer = self.call("Version", Nothing {})?;
        Ok(format!("{} {}", answer.name, answer.version))
    }

    /// Whether the runtime has a network for pods.
    ///
    /// # Errors
    /// When the call fails or the condition is missing.
    pub fn readiness(&self) -> Result<Readiness> {
        let answer: StatusAnswer = self.call("Status", IdVerbose::default())?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let network = conditions.into_iter().find(|c| c.kind == "NetworkReady").context("no NetworkReady condition")?;
        Ok(Readiness { network: network.status, message: network.message })
    }

    /// Runs a sandbox and gives back its id.
    ///
    /// # Errors
    /// What the runtime says, which holds what the plugin said.
    pub fn run_pod(&self, spec: &PodSpec) -> Result<String> {
        let answer: Id = self.call("RunPodSandbox", RunPodSandbox { config: Some(self.config(spec)) })?;
        Ok(answer.id)
    }

    /// Stops a sandbox: the first DEL of the plugin.
    ///
    /// # Errors
    /// When the call fails.
    pub fn stop_pod(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("StopPodSandbox", Id { id: id.to_owned() }).map(drop)
    }

    /// Removes a sandbox: one more DEL, without netns and prevResult.
    ///
    /// # Errors
    /// When the call fails.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("RemovePodSandbox", Id { id: id.to_owned() }).map(drop)
    }

    /// The state of a sandbox.
    ///
    /// # Errors
    /// When the call fails or answers something else than addresses.
    pub fn pod_status(&self, id: &str) -> Result<PodStatus> {
        let answer: SandboxStatusAnswer =
            self.call("PodSandboxStatus", IdVerbose { id: id.to_owned(), verbose: true })?;
        let status = answer.status.unwrap_or_default();
        let network = status.network.unwrap_or_default();
        let ips = [network.ip]
            .into_iter()
            .chain(network.additional.into_iter().map(|ip| ip.ip))
            .filter(|ip| !ip.is_empty())
            .map(|ip| ip.parse().with_context(|| format!("`{ip}` is no address")))
            .collect::<Result<_>>()?;
        let info: serde_json::Value =
            answer.info.get("info").and_then(|info| serde_json::from_str(info).ok()).unwrap_or_default();
        let netns = info["runtimeSpec"]["linux"]["namespaces"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|ns| ns["type"] == "network")
            .and_then(|ns| ns["path"].as_str())
            .map(PathBuf::from);
        Ok(PodStatus { ready: status.state == 0, ips, netns })
    }

    /// The ids of all sandboxes, also of those that do not run.
    ///
    /// # Errors
    /// When the call fails.
    pub fn list_pods(&self) -> Result<Vec<String>> {
        let answer: ListAnswer = self.call("ListPodSandbox", Nothing {})?;
        Ok(answer.items.into_iter().map(|item| item.id).collect())
    }

    /// Creates and starts a container of our image in a sandbox, with NET_RAW and NET_ADMIN: pods of tests may try to cheat.
    ///
    /// # Errors
    /// When a call fails.
    pub fn start_container(&self, pod: &str, spec: &PodSpec, name: &str, command: &[&str]) -> Result<String> {
        self.start(
            pod,
            spec,
            &ContainerSpec {
                name: name.to_owned(),
                image: image::NAME.to_owned(),
                command: command.iter().map(|&word| word.to_owned()).collect(),
                add_capabilities: vec!["NET_RAW".to_owned(), "NET_ADMIN".to_owned()],
                ..ContainerSpec::default()
            },
        )
    }

    /// Creates and starts a container in a sandbox, as a kubelet does for what a pod's specification says.
    ///
    /// # Errors
    /// When a call fails.
    pub fn start(&self, pod: &str, spec: &PodSpec, container: &ContainerSpec) -> Result<String> {
        let security = ContainerSecurity {
            capabilities: Some(Capability {
                add: container.add_capabilities.clone(),
                drop: container.drop_capabilities.clone(),
            }),
            namespaces: Some(NamespaceOption { network: if spec.host_network { 2 } else { 0 }, pid: 1 }),
            readonly_rootfs: container.read_only,
            no_new_privs: container.no_new_privileges,
            // Of the kind 0, the runtime's default.
            seccomp: container.default_seccomp.then(SecurityProfile::default),
        };
        let mounts = container.mounts.iter().map(|mount| ContainerMount {
            container_path: mount.to.clone(),
            host_path: mount.from.clone(),
            readonly: mount.read_only,
            propagation: i32::from(mount.host_to_container),
        });
        let envs = container.env.iter().map(|(key, value)| KeyValue { key: key.clone(), value: value.clone() });
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: container.name.clone() }),
            image: Some(Id { id: container.image.clone() }),
            command: container.command.clone(),
            envs: envs.collect(),
            mounts: mounts.collect(),
            log_path: format!("{}.log", container.name),
            linux: Some(ContainerLinux { security: Some(security) }),
        };
        let request =
            CreateContainer { sandbox: pod.to_owned(), config: Some(config), sandbox_config: Some(self.config(spec)) };
        let container: Id = self.call("CreateContainer", request)?;
        self.call::<_, Nothing>("StartContainer", container.clone())?;
        Ok(container.id)
    }

    /// The exit code of a container; `None` while it runs.
    ///
    /// # Errors
    /// When the call fails.
    pub fn exit_code(&self, id: &str) -> Result<Option<i32>> {
        let answer: ContainerStateAnswer = self.call("ContainerStatus", Id { id: id.to_owned() })?;
        let status = answer.status.unwrap_or_default();
        Ok((status.state == EXITED).then_some(status.exit_code))
    }

    /// Stops a container: TERM, and KILL two seconds later.
    ///
    /// # Errors
    /// When the call fails.
    pub fn stop_container(&self, id: &str) -> Result<()> {
        self.call::<_, Nothing>("StopContainer", IdTimeout { id: id.to_owned(), timeout: 2 }).map(drop)
    }

    /// Runs a command in a container to its end, at most 20 seconds.
    ///
    /// # Errors
    /// When the command cannot be run; that it failed is no error.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Exec> {
        let request = ExecSync {
            id: container.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 20,
        };
        let answer: ExecAnswer = self.call("ExecSync", request)?;
        let mut output = String::from_utf8_lossy(&answer.stdout).into_owned();
        output.push_str(&String::from_utf8_lossy(&answer.stderr));
        Ok(Exec { code: answer.exit_code, output })
    }

    /// Stops and removes every sandbox.
    ///
    /// # Errors
    /// All that failed, after all were tried.
    pub fn remove_all(&self) -> Result<()> {
        let mut errors = Vec::new();
        for pod in self.list_pods()? {
            if let Err(error) = self.stop_pod(&pod).and_then(|()| self.remove_pod(&pod)) {
                errors.push(format!("{error:#}"));
            }
        }
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
    }
}
