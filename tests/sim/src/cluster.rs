//! A whole cluster on one machine: the VPC, the cloud that commands it, and nodes with our daemon; and taking it down again.
//!
//! Everything of one cluster carries one prefix, `tw<pid>.<n>`: its namespaces, its folder in /tmp and its cgroups. What a killed
//! process left is found by that prefix and cleared away by the next one ([`sweep()`]).

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::cgroup;
use crate::cloud::CloudConfig;
use crate::fabric::vpc::Vpc;
use crate::image;
use crate::leftovers::{self, Snapshot};
use crate::netns::NetNs;
use crate::node::{self, DaemonOptions, Node};

mod lock;
mod setup;
mod sweep;

use lock::ClusterLock;
pub use setup::CloudHandle;
pub use sweep::{clean, sweep};
use sweep::{remove, save_logs};

/// The first part of every prefix.
const PREFIX: &str = "tw";

/// Where the cgroup hierarchy is mounted in the folder of a cluster.
const CGROUPS: &str = "cgroup";

/// How long the daemons may take to be ready: the verifier needs a second of CPU for each, and other clusters start meanwhile.
const START: Duration = Duration::from_secs(90);

/// A file in the folder of a cluster whose process only waits.
const KEPT: &str = "kept";

/// What a cluster consists of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nodes, named `n1` and so on.
    pub nodes: usize,
    /// `ip_stack`: `ipv4`, `ipv6` or `dual`.
    pub ip_stack: &'static str,
    /// MTU of every ENI, in bytes.
    pub mtu: u32,
    /// ENIs an instance can carry, the primary one included.
    pub adapters: u32,
    /// Addresses of each family an ENI can carry, its primary one included.
    pub addresses_per_adapter: u32,
    /// Idle addresses that a node keeps (`min_pool_size`), and above which it gives them back (`max_pool_size`).
    pub pool: (u32, u32),
    /// How long a freed address rests, in seconds.
    pub cooling: u64,
    /// Time between two audits of a node, in seconds.
    pub audit: u64,
    /// How long the cloud takes to attach an ENI, and then for its NIC to arrive.
    pub attach: (Duration, Duration),
    /// Merged over the document `eni_conf` of every node (RFC 7396).
    pub conf: Value,
    /// Changes the cloud before anything is switched on.
    pub cloud: fn(&mut CloudConfig),
    /// By what the daemon's own waiting times are divided.
    pub time_scale: u32,
    /// Whether tests can make the daemon's tasks panic ([`Node::inject_panic`](crate::node::Node::inject_panic)).
    pub panics: bool,
    /// The binaries of the containerd that every node gets, if any.
    pub containerd: Option<PathBuf>,
    /// Whether the daemons have Services, from each node's folder of manifests.
    pub objects: bool,
    /// Whether threads and processes that enter a node's or a pod's namespace are in the node's cgroup, so that Services are resolved at
    /// their sockets; else only containerd's pods are, and the others have the packets' path. Not together with containerd.
    pub sockets: bool,
    /// The daemon's log filter.
    pub log: String,
    /// The folder of our own programs.
    pub bin_dir: PathBuf,
    /// Whether no other cluster runs on the machine meanwhile: for figures, and for loads that leave others no CPU.
    pub exclusive: bool,
    /// Once true, waiting ends with an error.
    pub interrupted: Arc<AtomicBool>,
}

impl Options {
    /// Two dual-stack nodes with room for 60 pods each.
    ///
    /// # Errors
    /// When it is unknown where our programs are.
    pub fn new() -> Result<Self> {
        Ok(Self {
            nodes: 2,
            ip_stack: "dual",
            mtu: 1500,
            adapters: 5,
            addresses_per_adapter: 15,
            pool: (5, 10),
            cooling: 1,
            audit: 60,
            attach: (Duration::from_millis(100), Duration::from_millis(50)),
            conf: Value::Null,
            cloud: |_| {},
            time_scale: 1,
            panics: false,
            containerd: None,
            objects: true,
            sockets: false,
            log: "info".to_owned(),
            bin_dir: node::bin_dir()?,
            exclusive: false,
            interrupted: Arc::default(),
        })
    }

    /// As [`Options::new`], for a cluster that runs alone on the machine.
    ///
    /// # Errors
    /// As [`Options::new`].
    pub fn exclusive() -> Result<Self> {
        Ok(Self { exclusive: true, ..Self::new()? })
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    prefix: String,
    work: PathBuf,
    nodes: Vec<Node>,
    cloud: Option<CloudHandle>,
    vpc: Arc<Vpc>,
    external: Arc<NetNs>,
    machine: Snapshot,
    runtime: Runtime,
    interrupted: Arc<AtomicBool>,
    /// Held until the end, or until the cluster only waits.
    lock: Mutex<Option<ClusterLock>>,
}

impl Cluster {
    /// Why there can be no cluster here, in one sentence; nothing when there can.
    #[must_use]
    pub fn obstacle(options: &Options) -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("needs root".to_owned());
        }
        for tool in ["ip", "tc", "nft", "ping"] {
            let found =
                std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(tool).exists());
            if !found {
                return Some(format!("`{tool}` is missing"));
            }
        }
        for program in ["terwayd", "terway-cli", "terway"] {
            if !options.bin_dir.join(program).exists() {
                return Some(format!("{} is not built", options.bin_dir.join(program).display()));
            }
        }
        None
    }

    /// Starts everything and waits until every daemon is ready.
    ///
    /// # Errors
    /// When something does not start; what was started is taken down again.
    pub fn start(options: &Options) -> Result<Self> {
        let mut cluster = Self::power_on(options)?;
        cluster.start_programs(options)?;
        Ok(cluster)
    }

    /// VPC, cloud, and nodes as they are after their first boot, with none of our programs.
    fn power_on(options: &Options) -> Result<Self> {
        static CLUSTERS: AtomicU32 = AtomicU32::new(0);
        let lock = ClusterLock::acquire(options.exclusive, &options.interrupted)?;
        sweep()?;
        let number = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX}{}.{number}", std::process::id());
        let machine = leftovers::machine(&prefix)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("terway-sim")
            .enable_all()
            .build()
            .context("start the async runtime")?;
        let vpc = Arc::new(Vpc::create(&format!("{prefix}-vpc"), options.mtu)?);
        let external = Arc::new(NetNs::create(&format!("{prefix}-ext"))?);
        let work = Path::new("/tmp").join(&prefix);
        fs::create_dir(&work).with_context(|| format!("create {}", work.display()))?;
        let mut cluster = Self {
            prefix,
            work,
            nodes: Vec::new(),
            cloud: None,
            vpc,
            external,
            machine,
            runtime,
            interrupted: Arc::clone(&options.interrupted),
            lock: Mutex::new(Some(lock)),
        };
        cluster.boot(options)?;
        Ok(cluster)
    }

    fn boot(&mut self, options: &Options) -> Result<()> {
        cgroup::mount_at(&self.work.join(CGROUPS))?;
        self.vpc.attach_external_host(
            "external",
            Arc::clone(&self.external),
            setup::EXTERNAL_V4,
            setup::EXTERNAL_V6,
        )?;
        let daemon = DaemonOptions {
            bin_dir: options.bin_dir.clone(),
            eni_conf: setup::eni_conf(options),
            endpoint: setup::ENDPOINT_URL.to_owned(),
            cooling: options.cooling,
            audit: options.audit,
            time_scale: options.time_scale,
            panics: options.panics,
            objects: options.objects,
            cgroups: self.work.join(CGROUPS),
            sockets: options.sockets,
            log: options.log.clone(),
            interrupted: Arc::clone(&options.interrupted),
        };
        for number in 1..=options.nodes {
            let name = format!("n{number}");
            let netns = format!("{}-{name}", self.prefix);
            let work = self.work.join(&name);
            let node = Node::create(&self.vpc, &netns, &name, &work, daemon.clone(), self.runtime.handle())?;
            self.nodes.push(node);
        }
        self.cloud = Some(setup::start_cloud(options, &self.nodes, &self.vpc, &self.runtime)?);
        for node in &self.nodes {
            let primary = self.vpc.primary(node.name()).with_context(|| format!("{} has no ENI", node.name()))?;
            node.boot(&primary)?;
        }
        Ok(())
    }

    fn start_programs(&mut self, options: &Options) -> Result<()> {
        for node in &self.nodes {
            node.start_daemon()?;
        }
        if let Some(bin_dir) = &options.containerd {
            let image = self.work.join("image.tar");
            image::write(&image, &[])?;
            for node in &mut self.nodes {
                node.start_containerd(bin_dir, &image)?;
            }
        }
        for node in &self.nodes {
            node.wait_ready(START)?;
        }
        Ok(())
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node `n<number>`; numbers start at 1.
    ///
    /// # Panics
    /// When there is no such node.
    #[must_use]
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// Writes objects on every node, as [`Node::put`] does.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn put(&self, name: &str, items: &[impl Serialize]) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.put(name, items))
    }

    /// The VPC.
    #[must_use]
    pub fn vpc(&self) -> &Vpc {
        &self.vpc
    }

    /// The cloud.
    ///
    /// # Panics
    /// Never, once [`Cluster::start`] has returned.
    #[must_use]
    pub fn cloud(&self) -> &CloudHandle {
        self.cloud.as_ref().expect("a cluster is given out only with its cloud")
    }

    /// A host on the VPC that is none of the nodes.
    #[must_use]
    pub fn external(&self) -> &NetNs {
        &self.external
    }

    /// The addresses of that host.
    #[must_use]
    pub const fn external_addresses(&self) -> (IpAddr, IpAddr) {
        (IpAddr::V4(setup::EXTERNAL_V4), IpAddr::V6(setup::EXTERNAL_V6))
    }

    /// The blocks that pods' addresses come from.
    #[must_use]
    pub const fn pod_blocks(&self) -> (Ipv4Network, Ipv6Network) {
        (setup::PODS_V4, setup::PODS_V6)
    }

    /// The folder of the cluster.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// The prefix of all names of the cluster.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Marks the cluster as one to be looked at: [`clean`] then asks its process to end, and other clusters no longer wait for it.
    ///
    /// # Errors
    /// When the mark cannot be written.
    pub fn mark_kept(&self) -> Result<()> {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
        fs::write(self.work.join(KEPT), "").context("write the mark")
    }

    /// Takes everything down and checks that nothing is left: no process, namespace, mount, cgroup or file, and the machine as it was.
    ///
    /// # Errors
    /// All that went wrong, after all was tried.
    pub fn finish(mut self) -> Result<()> {
        let mut errors: Vec<String> = Vec::new();
        for node in self.nodes.drain(..) {
            errors.extend(node.finish().err().map(|error| format!("{error:#}")));
        }
        self.cloud = None;
        errors.extend(remove(&self.prefix).err().map(|error| format!("{error:#}")));
        match leftovers::machine(&self.prefix) {
            Ok(after) => errors
                .extend(self.machine.differences(&after).map(|text| format!("the machine is not as it was:\n{text}"))),
            Err(error) => errors.push(format!("{error:#}")),
        }
        if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("\n")) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.work.exists() {
            return; // finished
        }
        if !self.interrupted.load(Ordering::Acquire) {
            save_logs(&self.prefix, &self.work);
        }
        self.nodes.clear();
        self.cloud = None;
        let _ = remove(&self.prefix);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn nodes_reach_their_cloud_and_nothing_is_left() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let cluster = Cluster::power_on(&Options::new().unwrap()).unwrap();
        for (node, request) in [
            ("n1", "PUT /latest/api/token HTTP/1.0\r\nX-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n\r\n"),
            ("n2", "PUT /latest/api/token HTTP/1.0\r\nX-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n\r\n"),
        ] {
            let node = cluster.nodes.iter().find(|known| known.name() == node).unwrap();
            let answer = node.netns().run(|| {
                let mut stream = std::net::TcpStream::connect("100.100.100.200:80").unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                std::io::read_to_string(stream).unwrap()
            });
            let answer = answer.unwrap();
            assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        }
        let primary = cluster.vpc.primary("n2").unwrap();
        crate::probe::ping(cluster.node(1).netns(), primary.v4[0].into(), &[]).unwrap();
        crate::probe::ping(cluster.external(), primary.v6[0].into(), &[]).unwrap();
        assert_eq!(cluster.vpc.spoofed().unwrap().total(), 0);
        let work = cluster.work.clone();
        cluster.finish().unwrap();
        assert!(!work.exists());
    }
}
