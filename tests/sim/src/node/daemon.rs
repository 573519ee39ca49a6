//! Starting, stopping and asking `terwayd` of one node.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use terway_proto::v1::node_network_client::NodeNetworkClient;
use terway_proto::{ANSWER_BYTES, v1};
use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint};

use super::Node;

/// How the daemon of a node is to run.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// The folder with `terwayd`, `terway-cli` and the plugin `terway`.
    pub bin_dir: PathBuf,
    /// The document `eni_conf`.
    pub eni_conf: Value,
    /// URL of the ECS and VPC endpoint.
    pub endpoint: String,
    /// How long a freed address rests, in seconds.
    pub cooling: u64,
    /// Time between two audits, in seconds.
    pub audit: u64,
    /// By what its own waiting times are divided.
    pub time_scale: u32,
    /// Whether it watches the node's folder of manifests.
    pub objects: bool,
    /// Where the cgroup hierarchy is mounted.
    pub cgroups: PathBuf,
    /// Whether who enters the node or its pods is served at the socket.
    pub sockets: bool,
    /// The log filter.
    pub log: String,
    /// Whether [`Node::inject_panic`] works; only in a daemon of the development profile.
    pub panics: bool,
    /// Once true, waiting ends with an error.
    pub interrupted: Arc<AtomicBool>,
}

/// The daemon's process, if it runs.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Option<Child>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to the daemon's socket; calls block the calling thread.
#[derive(Debug)]
pub struct Rpc {
    handle: Handle,
    client: NodeNetworkClient<Channel>,
}

impl Rpc {
    pub(super) fn connect(handle: &Handle, socket: &Path) -> Result<Self> {
        let channel = handle
            .block_on(async {
                Endpoint::try_from(format!("unix://{}", socket.display()))?
                    .timeout(Duration::from_secs(10))
                    .connect()
                    .await
            })
            .with_context(|| format!("connect to terwayd at {}", socket.display()))?;
        let client = NodeNetworkClient::new(channel).max_decoding_message_size(ANSWER_BYTES);
        Ok(Self { handle: handle.clone(), client })
    }

    /// `Status`.
    ///
    /// # Errors
    /// When the call fails.
    pub fn status(&mut self) -> Result<v1::StatusResponse> {
        let call = self.client.status(v1::StatusRequest {});
        self.handle.block_on(call).map(tonic::Response::into_inner).map_err(|status| refused("Status", &status))
    }

    /// `ListPolicies` of one namespace.
    ///
    /// # Errors
    /// When the call fails.
    pub fn policies(&mut self, namespace: &str) -> Result<v1::ListPoliciesResponse> {
        let request = v1::ListPoliciesRequest { namespace: namespace.to_owned(), name: String::new() };
        let call = self.client.list_policies(request);
        self.handle.block_on(call).map(tonic::Response::into_inner).map_err(|status| refused("ListPolicies", &status))
    }

    /// `AddPod`.
    ///
    /// # Errors
    /// When the call fails.
    pub fn add_pod(&mut self, request: v1::AddPodRequest) -> Result<v1::AddPodResponse> {
        let call = self.client.add_pod(request);
        self.handle.block_on(call).map(tonic::Response::into_inner).map_err(|status| refused("AddPod", &status))
    }

    /// `DelPod`.
    ///
    /// # Errors
    /// When the call fails.
    pub fn del_pod(&mut self, attachment: v1::Attachment) -> Result<()> {
        let call = self.client.del_pod(v1::DelPodRequest { attachment: Some(attachment), ..Default::default() });
        self.handle.block_on(call).map(drop).map_err(|status| refused("DelPod", &status))
    }

    /// `ListPods`.
    ///
    /// # Errors
    /// When the call fails.
    pub fn list_pods(&mut self) -> Result<Vec<v1::PodState>> {
        let call = self.client.list_pods(v1::ListPodsRequest {});
        self.handle.block_on(call).map(|answer| answer.into_inner().pods).map_err(|status| refused("ListPods", &status))
    }
}

fn refused(call: &str, status: &tonic::Status) -> anyhow::Error {
    anyhow!("{call}: {:?}: {}", status.code(), status.message())
}

/// A kubelet's patience (`terminationGracePeriodSeconds`, 30 by default). The kernel takes some of it on a busy machine: closing inotify
/// descriptors waits for a grace period.
const GRACE: Duration = Duration::from_secs(30);

impl Node {
    /// Starts the daemon; it is not ready yet.
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    pub fn start_daemon(&self) -> Result<()> {
        let mut slot = self.daemon.lock();
        if slot.is_some() {
            bail!("terwayd of {} runs already", self.name);
        }
        let log = fs::File::options().create(true).append(true).open(self.daemon_log())?;
        let mut command = self.ns.command(self.options.bin_dir.join("terwayd"));
        // The one place that knows the daemon's flags.
        command
            .arg("--state-dir")
            .arg(self.work.join("state"))
            .arg("--socket")
            .arg(self.socket())
            .arg("--bpffs")
            .arg(self.bpffs().join("terway"))
            .arg("--cni-conf-dir")
            .arg(self.cni_conf_dir())
            .arg("--cgroup")
            .arg(self.cgroup())
            .args(["--listen", "127.0.0.1:19099"])
            .args(self.daemon_flags_of_the_laboratory())
            .current_dir(&self.work)
            .env("RUST_BACKTRACE", "1")
            // Ctrl-C at a terminal is for the scenario, which stops the daemon in its own time.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(kubeconfig) = self.api_server.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            command.arg("--objects").arg(format!("kube:{}", kubeconfig.display()));
        } else if self.options.objects {
            command.arg("--objects").arg(format!("dir:{}", self.objects_dir().display()));
        }
        if self.options.panics {
            command.env("TERWAY_PANIC_DIR", self.panic_dir());
        }
        *slot = Some(command.spawn().context("start terwayd")?);
        Ok(())
    }

    /// The flags of the daemon that do not depend on the paths of the node: its configuration and name, where the cloud is, and how fast
    /// time goes.
    #[must_use]
    pub fn daemon_flags_of_the_laboratory(&self) -> Vec<String> {
        let options = &self.options;
        let configuration = if self.config_map.load(Ordering::Relaxed) {
            vec![("--config", "configmap".to_owned())]
        } else {
            vec![
                ("--config", self.configuration.folder().display().to_string()),
                ("--config-overlay", self.configuration.overlay().display().to_string()),
            ]
        };
        let flags = [
            ("--node", self.name.clone()),
            ("--ecs-endpoint", options.endpoint.clone()),
            ("--vpc-endpoint", options.endpoint.clone()),
            ("--cooling", options.cooling.to_string()),
            ("--audit-interval", options.audit.to_string()),
            ("--time-scale", options.time_scale.to_string()),
            ("--log", options.log.clone()),
        ];
        configuration.into_iter().chain(flags).flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    fn panic_dir(&self) -> PathBuf {
        self.work.join("panic")
    }

    /// Makes the daemon's task `task` panic the next time it runs, and returns when the daemon has seen that.
    ///
    /// # Errors
    /// When the daemon does not look for it.
    pub fn inject_panic(&self, task: &str) -> Result<()> {
        fs::create_dir_all(self.panic_dir())?;
        let file = self.panic_dir().join(task);
        fs::write(&file, "")?;
        self.wait(Duration::from_secs(20), "the daemon has seen the injected panic", |_| Ok(!file.exists()))
    }

    /// Waits until the daemon ends by itself and returns how; it can be started again then.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn daemon_exit(&self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let mut slot = self.daemon.lock();
            let Some(child) = slot.as_mut() else { bail!("terwayd of {} was not started", self.name) };
            if let Some(status) = child.try_wait()? {
                *slot = None;
                return Ok(status);
            }
            drop(slot);
            if Instant::now() > deadline {
                bail!("terwayd runs on after {limit:?}; the end of its log:\n{}", self.log_tail(30));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where the daemon logs to.
    #[must_use]
    pub fn daemon_log(&self) -> PathBuf {
        self.work.join("terwayd.log")
    }

    /// Waits until the daemon takes pods: the conflist is there and `Status` says ready.
    ///
    /// # Errors
    /// When it ended, or is not ready in time, with the end of its log.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let ready = self.wait(limit, "terwayd is ready", |node| {
            node.daemon_alive()?;
            let status = node.status()?;
            if let Some(problem) = status.problems.first() {
                bail!("{} {} {}", problem.code, problem.cause, problem.detail);
            }
            Ok(status.ready && node.conflist().is_ok())
        });
        ready.map_err(|error| anyhow!("{error:#}\nthe end of {}:\n{}", self.daemon_log().display(), self.log_tail(30)))
    }

    /// The last lines of the daemon's log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.daemon_log()).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }

    fn daemon_alive(&self) -> Result<()> {
        match self.daemon.lock().as_mut() {
            None => bail!("terwayd was not started"),
            Some(child) => match child.try_wait()? {
                Some(status) => bail!("terwayd ended with {status}"),
                None => Ok(()),
            },
        }
    }

    /// The daemon's process id, while it runs.
    #[must_use]
    pub fn daemon_pid(&self) -> Option<u32> {
        self.daemon.lock().as_ref().map(Child::id)
    }

    /// Stops the daemon by SIGTERM, as the kubelet does; no error when it does not run.
    ///
    /// # Errors
    /// When it does not end within [`GRACE`] (it is killed then) or does not exit with 0.
    pub fn stop_daemon(&self) -> Result<()> {
        let Some(mut child) = self.daemon.lock().take() else { return Ok(()) };
        if child.try_wait()?.is_none() {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + GRACE;
        loop {
            match child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("terwayd ended with {status}; the end of its log:\n{}", self.log_tail(30)),
                None if Instant::now() > deadline => {
                    child.kill()?;
                    child.wait()?;
                    bail!(
                        "terwayd does not end within {GRACE:?} of SIGTERM; the end of its log:\n{}",
                        self.log_tail(30)
                    );
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Ends the daemon by SIGKILL, as an OOM kill does; no error when it does not run.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_daemon(&self) -> Result<()> {
        let Some(mut child) = self.daemon.lock().take() else { return Ok(()) };
        child.kill()?;
        child.wait()?;
        Ok(())
    }
}
