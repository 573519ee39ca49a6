//! A node: a network namespace with the primary ENI of an ECS instance, a work folder with its own BPF file system, our daemon and
//! plugin, a cgroup for its processes, and where a test wants it, a containerd.
//!
//! All nodes share the machine's mount namespace; nothing of one node's paths is another's. The work folder is kept short, because a
//! unix socket's path has at most 107 bytes.

pub mod cni;
mod configuration;
mod daemon;
mod objects;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::Value;
use terway_proto::v1;
use tokio::runtime::Handle;

use crate::cgroup::Cgroup;
use crate::containerd::{self, Containerd};
use crate::fabric::FabricEni;
use crate::fabric::vpc::{Vpc, configure_primary};
use crate::netns::{self, NetNs};

pub use daemon::{DaemonOptions, Rpc};
pub use objects::ServiceSpec;

/// Where the built programs are: `$TERWAY_BIN_DIR`, or the folder of the running program's profile.
///
/// # Errors
/// When the running program's own path is unknown.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("TERWAY_BIN_DIR") {
        return Ok(folder.into());
    }
    let exe = std::env::current_exe().context("find the running program")?;
    let folder = exe.parent().context("the running program has no folder")?;
    // Test programs are one folder deeper: target/debug/deps.
    Ok(if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder }.to_owned())
}

/// A node of a cluster.
#[derive(Debug)]
pub struct Node {
    name: String,
    ns: Arc<NetNs>,
    work: PathBuf,
    handle: Handle,
    daemon: daemon::Slot,
    containerd: Option<Containerd>,
    options: DaemonOptions,
    cgroup: Arc<Cgroup>,
    configuration: configuration::Mounted,
    /// The kubeconfig by which the daemon reads objects from an API server, instead of the folder of manifests.
    api_server: Mutex<Option<PathBuf>>,
    config_map: AtomicBool,
    /// Numbers the pods that tests make by hand.
    pods: AtomicU32,
}

impl Node {
    /// Makes the namespace `netns`, the folders, the BPF file system and the link to the plugin, and joins `vpc` as `name`; there is no
    /// ENI yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(
        vpc: &Vpc,
        netns: &str,
        name: &str,
        work: &Path,
        options: DaemonOptions,
        handle: &Handle,
    ) -> Result<Self> {
        let ns = Arc::new(NetNs::create(netns)?);
        for folder in ["net.d", "cni", "bpf", "state", "run", "objects"] {
            fs::create_dir_all(work.join(folder))?;
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), &work.join("bpf"), Some("bpf"), flags, Some("mode=0700"))
            .context("mount a BPF file system")?;
        // As systemd has it, so that containers can take it with HostToContainer propagation.
        let none = None::<&str>;
        mount(none, &work.join("bpf"), none, MsFlags::MS_SHARED, none).context("share the BPF file system")?;
        // As the init container of the DaemonSet does.
        let mut install = Command::new(options.bin_dir.join("terway-cli"));
        install.arg("install").arg("--plugin").arg(options.bin_dir.join("terway")).arg("--to").arg(work.join("cni"));
        let installed = install.output().context("run terway-cli install")?;
        ensure!(installed.status.success(), "terway-cli install: {}", String::from_utf8_lossy(&installed.stderr));
        let cgroup = Arc::new(Cgroup::create(&options.cgroups, netns, options.sockets)?);
        if options.sockets {
            ns.within(Arc::clone(&cgroup));
        }
        vpc.add_node(name, Arc::clone(&ns));
        let configuration = configuration::Mounted::create(work, options.eni_conf.clone())?;
        Ok(Self {
            configuration,
            name: name.to_owned(),
            ns,
            work: work.to_owned(),
            handle: handle.clone(),
            daemon: daemon::Slot::default(),
            containerd: None,
            options,
            cgroup,
            api_server: Mutex::default(),
            config_map: AtomicBool::new(false),
            pods: AtomicU32::new(0),
        })
    }

    /// Configures the primary ENI, which the cloud has plugged, as an instance's first boot does.
    ///
    /// # Errors
    /// When the link is not there.
    pub fn boot(&self, primary: &FabricEni) -> Result<()> {
        configure_primary(&self.ns, primary)
    }

    /// Its name, as the cloud and the daemon know it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    #[must_use]
    pub const fn netns(&self) -> &Arc<NetNs> {
        &self.ns
    }

    /// From its next start on the daemon reads objects from an API server, and writes to it.
    pub fn set_api_server(&self, kubeconfig: PathBuf) {
        *self.api_server.lock().unwrap_or_else(PoisonError::into_inner) = Some(kubeconfig);
    }

    /// From its next start on the daemon reads its configuration from the ConfigMap `kube-system/eni-config` of the API server.
    pub fn read_config_map(&self) {
        self.config_map.store(true, Ordering::Relaxed);
    }

    /// The `eni_conf` that it was made with.
    #[must_use]
    pub const fn eni_conf(&self) -> &Value {
        &self.options.eni_conf
    }

    /// Its work folder.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// The daemon's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.work.join("run/t.sock")
    }

    /// The mounted BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.work.join("bpf")
    }

    /// The cgroup whose processes its daemon serves at the socket.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The folder of network configurations.
    #[must_use]
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.work.join("net.d")
    }

    /// The first network configuration list, as a runtime would choose it.
    ///
    /// # Errors
    /// When there is none or it is not JSON.
    pub fn conflist(&self) -> Result<Value> {
        let folder = self.cni_conf_dir();
        let mut lists: Vec<PathBuf> = fs::read_dir(&folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "conflist"))
            .collect();
        lists.sort();
        let list = lists.first().with_context(|| format!("no conflist in {}", folder.display()))?;
        serde_json::from_slice(&fs::read(list)?).with_context(|| format!("read {}", list.display()))
    }

    /// Starts a containerd of `bin_dir` in the node.
    ///
    /// # Errors
    /// When it is not up in time.
    pub fn start_containerd(&mut self, bin_dir: &Path, image: &Path) -> Result<&Containerd> {
        if self.containerd.is_some() {
            bail!("{} has a containerd already", self.name);
        }
        let containerd = Containerd::start(self.containerd_options(bin_dir), &self.ns, &self.handle, image)?;
        Ok(self.containerd.insert(containerd))
    }

    /// The node's containerd.
    ///
    /// # Errors
    /// When none was started.
    pub fn containerd(&self) -> Result<&Containerd> {
        self.containerd.as_ref().with_context(|| format!("{} has no containerd", self.name))
    }

    fn containerd_options(&self, bin_dir: &Path) -> containerd::Options {
        containerd::Options {
            work: self.work.join("c"),
            bin_dir: bin_dir.to_owned(),
            cni_bin_dir: self.work.join("cni"),
            cni_conf_dir: self.cni_conf_dir(),
            cgroup_parent: format!("/{}", self.ns.name()),
        }
    }

    /// A pod without a container: a namespace as a runtime would make it, and an id.
    ///
    /// # Errors
    /// When the namespace cannot be made.
    pub fn new_pod(&self, name: &str) -> Result<cni::Pod> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let pod = cni::Pod::create(&format!("{}-p{number}", self.ns.name()), name)?;
        if self.options.sockets {
            pod.ns.within(Arc::clone(&self.cgroup));
        }
        Ok(pod)
    }

    /// What the daemon says about the node.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<v1::StatusResponse> {
        self.rpc()?.status()
    }

    /// What the daemon says about the node's pods.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn list_pods(&self) -> Result<Vec<v1::PodState>> {
        self.rpc()?.list_pods()
    }

    /// A connection to the daemon.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn rpc(&self) -> Result<Rpc> {
        Rpc::connect(&self.handle, &self.socket())
    }

    /// Runs `terway-cli` against this node and gives back what it prints.
    ///
    /// # Errors
    /// When it exits with another status than 0.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.ns.command(self.options.bin_dir.join("terway-cli"));
        netns::feed(command.arg("--socket").arg(self.socket()).args(arguments), "")
    }

    /// Waits until `done` is true, asking every 10 ms.
    ///
    /// # Errors
    /// After `limit`, with the last answer that `done` gave.
    pub fn wait(&self, limit: Duration, what: &str, mut done: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            let answer = done(self);
            if matches!(answer, Ok(true)) {
                return Ok(());
            }
            if self.options.interrupted.load(Ordering::Acquire) {
                bail!("interrupted");
            }
            if std::time::Instant::now() > deadline {
                let why = answer.err().map(|error| format!(": {error:#}")).unwrap_or_default();
                bail!("{}: not within {limit:?}: {what}{why}", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends everything of the node: containerd with its pods, the daemon, all processes of the namespace, mounts, cgroups.
    ///
    /// # Errors
    /// All that went wrong, after all was tried.
    pub fn finish(mut self) -> Result<()> {
        let mut errors: Vec<anyhow::Error> = Vec::new();
        if let Some(containerd) = self.containerd.take() {
            errors.extend(containerd.stop().err().map(|error| error.context("stop containerd")));
        }
        errors.extend(self.stop_daemon().err().map(|error| error.context("stop terwayd")));
        errors.extend(self.ns.kill_processes().err());
        errors.extend(self.cgroup.remove().err());
        errors.extend(containerd::unmount_below(&self.work).err());
        let name = self.name.clone();
        // Tests may still hold the namespace; its name goes now in any case.
        errors.extend(netns::remove_name(self.ns.path()).err());
        if errors.is_empty() {
            return Ok(());
        }
        bail!("{name}: {}", errors.iter().map(|error| format!("{error:#}")).collect::<Vec<_>>().join("; "))
    }
}

impl Drop for Node {
    /// After a panic: what [`Node::finish`] does, without asking anybody to cooperate.
    fn drop(&mut self) {
        self.containerd = None;
        let _ = containerd::wipe(&self.containerd_options(Path::new("/usr/bin")));
        let _ = self.ns.kill_processes();
        let _ = self.cgroup.remove();
        let _ = containerd::unmount_below(&self.work);
    }
}
