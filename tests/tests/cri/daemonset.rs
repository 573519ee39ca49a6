//! The daemon in a container, with the rights and mounts that the shipped DaemonSet gives it.
//!
//! The image is that of `cargo xtask image` if `TERWAY_IMAGE` names its archive; else the programs of the development build, which need the
//! host's libraries beside them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use terway_sim::cluster::Cluster;
use terway_sim::cri::{ContainerSpec, Mount, PodSpec};
use terway_sim::image;
use terway_sim::leftovers;
use terway_sim::node::{Node, bin_dir};

use super::{SETTLE, cri};

/// The name of the image in `TERWAY_IMAGE`.
const IMAGE: &str = "localhost/terway:0.1.0";

/// The runtime's folder of network namespaces as a shared mount, as `/run/netns` is where systemd runs or `ip netns add` made it. Undone when
/// it is dropped.
struct SharedNetnsDir(PathBuf);

impl SharedNetnsDir {
    /// `dir` must be empty: what is mounted below it would be hidden.
    fn new(dir: PathBuf) -> Result<Self> {
        let none = None::<&str>;
        mount(Some(&dir), &dir, none, MsFlags::MS_BIND, none).with_context(|| format!("bind {}", dir.display()))?;
        let this = Self(dir);
        mount(none, &this.0, none, MsFlags::MS_SHARED, none).with_context(|| format!("share {}", this.0.display()))?;
        Ok(this)
    }
}

impl Drop for SharedNetnsDir {
    fn drop(&mut self) {
        let _gone_already = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The pod template of the shipped DaemonSet.
fn template() -> Result<Value> {
    let daemonset: Value = yaml_serde::from_str(include_str!("../../../manifests/base/daemonset.yaml"))?;
    Ok(daemonset["spec"]["template"]["spec"].clone())
}

/// Where a path of the node is in the simulated one.
fn path_of(node: &Node, netns: &Path, path: &str) -> Result<String> {
    let work = node.work();
    let found = match path {
        "/opt/cni/bin" => work.join("cni"),
        "/etc/cni/net.d" => node.cni_conf_dir(),
        "/var/lib/cni/terway" => work.join("state"),
        "/var/run/eni" => node.socket().parent().context("the socket has no folder")?.to_owned(),
        "/sys/fs/bpf" => node.bpffs(),
        "/sys/fs/cgroup" => node.cgroup().to_owned(),
        "/run/netns" => netns.to_owned(),
        "/proc/sys/net" => path.into(),
        other => anyhow::bail!("the DaemonSet mounts {other}, which this test does not know"),
    };
    Ok(found.to_str().context("a path that is no text")?.to_owned())
}

fn words(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|word| word.as_str().map(ToOwned::to_owned)).collect()
}

/// Whether this machine has a capability to give: some virtual machines lack SYS_RESOURCE, which only kernels before 5.11 need.
fn may_add(name: &str) -> bool {
    // linux/capability.h
    const SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bounding = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapBnd:")?.trim(), 16).ok());
    name != "SYS_RESOURCE" || bounding.is_some_and(|set| set >> SYS_RESOURCE & 1 == 1)
}

/// A container of the DaemonSet on a simulated node: paths that the conflist names are the same inside and outside.
fn container(node: &Node, netns: &Path, pod: &Value, container: &Value) -> Result<ContainerSpec> {
    let mut mounts = Vec::new();
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let volumes = pod["volumes"].as_array().context("no volumes")?;
        let volume =
            volumes.iter().find(|volume| volume["name"] == mount["name"]).context("a mount without its volume")?;
        let Some(path) = volume["hostPath"]["path"].as_str() else { continue };
        let from = path_of(node, netns, path)?;
        let inside = mount["mountPath"].as_str().context("no mountPath")?;
        let same = ["/var/lib/cni/terway", "/var/run/eni", "/run/netns"].contains(&path);
        let to = if same { from.clone() } else { inside.to_owned() };
        let host_to_container = mount["mountPropagation"] == "HostToContainer";
        mounts.push(Mount { from, to, read_only: mount["readOnly"] == true, host_to_container });
    }
    let plain =
        |variable: &Value| Some((variable["name"].as_str()?.to_owned(), variable["value"].as_str()?.to_owned()));
    let security = &container["securityContext"];
    let mut command = words(&container["command"]);
    command.extend(words(&container["args"]));
    Ok(ContainerSpec {
        name: container["name"].as_str().context("no name")?.to_owned(),
        image: image::NAME.to_owned(),
        command,
        env: container["env"].as_array().into_iter().flatten().filter_map(plain).collect(),
        mounts,
        add_capabilities: words(&security["capabilities"]["add"]).into_iter().filter(|name| may_add(name)).collect(),
        drop_capabilities: words(&security["capabilities"]["drop"]),
        read_only: security["readOnlyRootFilesystem"] == true,
        no_new_privileges: security["allowPrivilegeEscalation"] == false,
        default_seccomp: pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault",
    })
}

/// Puts the programs into a container: by their image, or from the development build.
fn with_programs(node: &Node, spec: &mut ContainerSpec) -> Result<()> {
    if let Some(archive) = std::env::var_os("TERWAY_IMAGE") {
        node.containerd()?.import(Path::new(&archive))?;
        spec.image = IMAGE.to_owned();
        return Ok(());
    }
    let programs = bin_dir()?;
    let file = |name: &str, to: &str| Mount {
        from: programs.join(name).display().to_string(),
        to: to.to_owned(),
        read_only: true,
        host_to_container: false,
    };
    spec.mounts.push(file("terwayd", "/usr/bin/terwayd"));
    spec.mounts.push(file("terway-cli", "/usr/bin/terway-cli"));
    spec.mounts.push(file("terway", "/opt/cni/bin/terway"));
    for folder in
        ["/etc/ssl/certs", "/lib", "/lib64", "/usr/lib"].into_iter().filter(|folder| Path::new(folder).exists())
    {
        let folder = folder.to_owned();
        spec.mounts.push(Mount { from: folder.clone(), to: folder, read_only: true, host_to_container: false });
    }
    Ok(())
}

/// The pod of the DaemonSet takes over from the daemon that runs as a process, serves pods, and goes without a trace in their network.
pub(super) fn daemon_runs_in_its_container(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let cri = cri(node)?;
    let baseline = leftovers::node(node)?;
    let before = PodSpec::new("team", "before");
    let running = cri.run_pod(&before)?;
    let netns = cri.pod_status(&running)?.netns.context("the runtime does not tell the namespace")?;
    let netns = netns.parent().context("a namespace without a folder")?.to_owned();
    cri.stop_pod(&running)?;
    cri.remove_pod(&running)?;
    leftovers::wait_until_pods_removed(node, &baseline, SETTLE)?;
    let shared = SharedNetnsDir::new(netns.clone())?;
    let running = cri.run_pod(&before)?;
    let address = cri.pod_status(&running)?.ips[0];
    node.stop_daemon()?;

    let pod = template()?;
    let mut spec = PodSpec::new("kube-system", "terway");
    spec.host_network = true;
    let sandbox = cri.run_pod(&spec)?;
    let mut install = container(node, &netns, &pod, &pod["initContainers"][0])?;
    with_programs(node, &mut install)?;
    std::fs::remove_file(node.work().join("cni/terway"))?;
    let installed = cri.start(&sandbox, &spec, &install)?;
    node.wait(SETTLE, "the init container ends", |_| {
        let code = cri.exit_code(&installed)?;
        ensure!(code.unwrap_or(0) == 0, "terway-cli install ended with {code:?}: {}", log(node, &spec, &install.name));
        Ok(code.is_some())
    })?;
    ensure!(node.work().join("cni/terway").exists(), "the init container has not installed the plugin");

    let mut daemon = container(node, &netns, &pod, &pod["containers"][0])?;
    with_programs(node, &mut daemon)?;
    // What is different in the laboratory: where the cloud and the objects are.
    let objects = node.objects_dir().display().to_string();
    daemon.mounts.push(Mount { from: objects, to: "/objects".to_owned(), ..Mount::default() });
    let source =
        daemon.command.iter_mut().find(|word| *word == "kube").context("the DaemonSet has no --objects kube")?;
    "dir:/objects".clone_into(source);
    daemon.command.extend(node.daemon_flags_of_the_laboratory());
    for flag in ["--config", "--config-overlay"] {
        let at = daemon.command.iter().position(|word| word == flag).context("no configuration")?;
        let folder = daemon.command[at + 1].clone();
        daemon.mounts.push(Mount { from: folder.clone(), to: folder, read_only: true, ..Mount::default() });
    }
    daemon.command.extend(["--state-dir".to_owned(), path_of(node, &netns, "/var/lib/cni/terway")?]);
    daemon.command.extend(["--socket".to_owned(), node.socket().display().to_string()]);
    private_bpffs_is_refused(node, &sandbox, &spec, daemon.clone())?;
    let daemon_id = cri.start(&sandbox, &spec, &daemon)?;
    let ready = node.wait(Duration::from_secs(30), "the daemon in the container is ready", |node| {
        ensure!(cri.exit_code(&daemon_id)?.is_none(), "it ended");
        let status = node.status()?;
        ensure!(status.problems.is_empty(), "{:?}", status.problems);
        Ok(status.ready)
    });
    ready.with_context(|| log(node, &spec, &daemon.name))?;

    // It has adopted the pod that was there, wires new ones, and serves the node's root cgroup.
    let names: Vec<_> = node.list_pods()?.into_iter().filter_map(|pod| Some(pod.pod?.name)).collect();
    ensure!(names == ["before"], "{names:?}");
    let status = node.status()?.socket_path.context("no socket path")?;
    ensure!(status.programs > 0 && status.cgroup == "/host/cgroup", "{status:?}");
    let client = PodSpec::new("team", "after");
    let started = cri.run_pod(&client)?;
    let shell = cri.start_container(&started, &client, "main", &["/pause"])?;
    let ping = || -> Result<()> {
        let ping = cri.exec(&shell, &["ping", "-c", "1", "-W", "1", &address.to_string()])?;
        ensure!(ping.code == 0, "{}", ping.output);
        Ok(())
    };
    ping()?;
    // The way of an upgrade: the container ends, pods talk on, deletions succeed.
    cri.stop_container(&daemon_id)?;
    ping().context("without the daemon")?;
    cri.stop_pod(&sandbox)?;
    cri.remove_pod(&sandbox)?;
    node.start_daemon()?;
    node.wait_ready(Duration::from_secs(20))?;
    ping().context("with the next daemon")?;
    for sandbox in [started, running] {
        cri.stop_pod(&sandbox)?;
        cri.remove_pod(&sandbox)?;
    }
    drop(shared);
    leftovers::wait_until_pods_removed(node, &baseline, SETTLE)
}

/// A daemon whose bpffs is mounted without propagation could have one of its own, which would end with it.
fn private_bpffs_is_refused(node: &Node, sandbox: &str, pod: &PodSpec, mut daemon: ContainerSpec) -> Result<()> {
    let cri = cri(node)?;
    "private".clone_into(&mut daemon.name);
    let bpffs = daemon.mounts.iter_mut().find(|mount| mount.to == "/sys/fs/bpf").context("no bpffs")?;
    bpffs.host_to_container = false;
    let started = cri.start(sandbox, pod, &daemon)?;
    node.wait(SETTLE, "the daemon ends", |_| {
        let code = cri.exit_code(&started)?;
        ensure!(code != Some(0), "it took a private BPF file system");
        Ok(code.is_some())
    })?;
    let log = log(node, pod, &daemon.name);
    ensure!(log.contains("TW0305") && log.contains("/sys/fs/bpf was not propagated"), "{log}");
    Ok(())
}

/// The end of a container's log.
fn log(node: &Node, pod: &PodSpec, container: &str) -> String {
    let found = Command::new("find")
        .arg(node.work())
        .args(["-path", &format!("*{}*", pod.name), "-name", &format!("{container}.log")])
        .output();
    let paths = found.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let text = paths.lines().filter_map(|path| std::fs::read_to_string(path).ok()).collect::<String>();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
