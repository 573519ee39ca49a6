//! One containerd per node, inside the node's network namespace: what the plugin does to "the host" it does to that namespace.
//!
//! Its folders, socket and cgroups are the node's own. Shared with every other containerd of the machine, but by unique names, are
//! `/run/containerd/s`, `/run/containerd/runc/k8s.io` and libcni's cache `/var/lib/cni/results`; [`Containerd::stop`] removes ours there.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Handle;

use crate::cri::Cri;
use crate::image;
use crate::netns::{NetNs, feed};

/// Where libcni keeps the results of ADD.
const CNI_CACHE: &str = "/var/lib/cni/results";

/// How a containerd is to be set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its own folder; the socket's path must stay under 108 bytes.
    pub work: PathBuf,
    /// The folder with `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub bin_dir: PathBuf,
    /// Where plugins are.
    pub cni_bin_dir: PathBuf,
    /// Where the network configuration is.
    pub cni_conf_dir: PathBuf,
    /// The cgroup below which all pods go, as `/name`; unique to this node.
    pub cgroup_parent: String,
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    options: Options,
    ns: Arc<NetNs>,
    child: Child,
    version: String,
    cri: Cri,
}

impl Containerd {
    /// Starts one in `ns`, waits until it answers and imports the image at `image`.
    ///
    /// # Errors
    /// When the binaries are missing, or it is not up within 15 s; the error names its log.
    pub fn start(options: Options, ns: Arc<NetNs>, handle: &Handle, image: &Path) -> Result<Self> {
        let binary = options.bin_dir.join("containerd");
        let version = feed(Command::new(&binary).arg("--version"), "")?;
        let version = version
            .split_whitespace()
            .map(|word| word.trim_start_matches('v'))
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .with_context(|| format!("no version in `{version}`"))?
            .to_owned();
        fs::create_dir_all(&options.work)?;
        let config = options.work.join("config.toml");
        let text = if version.starts_with('1') { config_1(&options) } else { config_2(&options) };
        fs::write(&config, text)?;
        let log = fs::File::options().create(true).append(true).open(options.work.join("containerd.log"))?;
        let mut command = ns.command(&binary);
        command
            .arg("-c")
            .arg(&config)
            .current_dir(&options.work)
            // It hands its whole environment on to the plugins: they get what a node's containerd would give them.
            .env_clear()
            .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", options.bin_dir.display()))
            .env("HOME", "/root")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn().with_context(|| format!("start {}", binary.display()))?;
        match up(&options, &mut child, handle, image) {
            Ok(cri) => Ok(Self { options, ns, child, version, cri }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(format!("containerd {version}, see {}/containerd.log", options.work.display())))
            }
        }
    }

    /// Its version, such as `1.6.20~ds1`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A client of it.
    #[must_use]
    pub const fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Ends it with everything that it left: pods, shims, mounts, cgroups and files outside its folder.
    ///
    /// # Errors
    /// All that could not be removed, after all was tried.
    pub fn stop(mut self) -> Result<()> {
        let mut errors: Vec<anyhow::Error> = Vec::new();
        errors.extend(self.cri.remove_all().err());
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                errors.push(anyhow::anyhow!("containerd does not end on SIGTERM"));
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        errors.extend(wipe(&self.options, &self.ns).err());
        match errors.len() {
            0 => Ok(()),
            _ => bail!("{}", errors.iter().map(|error| format!("{error:#}")).collect::<Vec<_>>().join("; ")),
        }
    }
}

/// Waits for the socket, and gives containerd the image.
fn up(options: &Options, child: &mut Child, handle: &Handle, image: &Path) -> Result<Cri> {
    let socket = options.work.join("c.sock");
    let logs = options.work.join("pods");
    let deadline = Instant::now() + Duration::from_secs(15);
    let cri = loop {
        if let Some(status) = child.try_wait()? {
            bail!("ended with {status}");
        }
        // The socket exists some time before the CRI service is registered.
        match Cri::connect(handle, &socket, &options.cgroup_parent, &logs).and_then(|cri| cri.version().map(|_| cri)) {
            Ok(cri) => break cri,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut import = Command::new(options.bin_dir.join("ctr"));
    import.arg("-a").arg(&socket).args(["-n", "k8s.io", "images", "import"]).arg(image);
    feed(&mut import, "").context("import the image")?;
    Ok(cri)
}

/// Removes what a containerd with these options left behind, also when it was killed.
///
/// # Errors
/// All that could not be removed, after all was tried.
pub fn wipe(options: &Options, ns: &NetNs) -> Result<()> {
    let mut errors: Vec<String> = Vec::new();
    // Containers first, by their cgroup: it is ours alone. A shim whose container is gone ends.
    let groups = cgroups(&options.cgroup_parent);
    for group in &groups {
        for pid in tree(group).iter().filter_map(|group| fs::read_to_string(group.join("cgroup.procs")).ok()) {
            for pid in pid.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
    let tasks = options.work.join("state/io.containerd.runtime.v2.task/k8s.io");
    let ids: Vec<String> = fs::read_dir(&tasks)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    for shim in shims(&options.work.join("c.sock")) {
        let _ = kill(Pid::from_raw(shim), Signal::SIGKILL);
    }
    errors.extend(ns.kill_processes().err().map(|error| format!("{error:#}")));
    errors.extend(unmount_below(&options.work).err().map(|error| format!("{error:#}")));
    for id in &ids {
        let _ = fs::remove_dir_all(Path::new("/run/containerd/runc/k8s.io").join(id));
        for cached in fs::read_dir(CNI_CACHE).into_iter().flatten().flatten() {
            if cached.file_name().to_string_lossy().contains(id.as_str()) {
                let _ = fs::remove_file(cached.path());
            }
        }
    }
    for group in &groups {
        let deadline = Instant::now() + Duration::from_secs(2);
        // A cgroup is busy until the last of its processes is reaped.
        while let Err(error) = remove_tree(group) {
            if Instant::now() > deadline {
                errors.push(format!("remove cgroup {}: {error}", group.display()));
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    if errors.is_empty() { Ok(()) } else { bail!("{}", errors.join("; ")) }
}

/// Where `parent` exists in the cgroup hierarchies: one per controller with version 1, one in all with version 2.
#[must_use]
pub fn cgroups(parent: &str) -> Vec<PathBuf> {
    let parent = parent.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    std::iter::once(root.to_owned())
        .chain(fs::read_dir(root).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())))
        .map(|hierarchy| hierarchy.join(parent))
        .filter(|group| group.join("cgroup.procs").exists())
        .collect()
}

/// A cgroup and all below it, the deepest first.
fn tree(group: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(group)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .flat_map(|entry| tree(&entry.path()))
        .collect();
    all.push(group.to_owned());
    all
}

/// Removes a cgroup with all below it; it is no error when it is gone.
///
/// # Errors
/// What `rmdir` said first.
pub fn remove_tree(group: &Path) -> io::Result<()> {
    for group in tree(group) {
        match fs::remove_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Unmounts everything below a folder, the latest mount first.
///
/// # Errors
/// When one cannot be unmounted.
pub fn unmount_below(folder: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    for mounted in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(mounted).starts_with(folder) {
            umount2(mounted, MntFlags::MNT_DETACH).with_context(|| format!("unmount {mounted}"))?;
        }
    }
    Ok(())
}

/// The shims of one containerd, which carry its socket as `-address`.
fn shims(socket: &Path) -> Vec<i32> {
    let socket = socket.to_string_lossy();
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(arguments) = fs::read(entry.path().join("cmdline")) else { continue };
        let mut arguments = arguments.split(|byte| *byte == 0);
        if arguments.next().is_some_and(|program| program.ends_with(b"containerd-shim-runc-v2"))
            && arguments.any(|argument| argument == socket.as_bytes())
        {
            pids.push(pid);
        }
    }
    pids
}

fn config_1(options: &Options) -> String {
    let Options { work, cni_bin_dir, cni_conf_dir, .. } = options;
    let (work, bin, conf) = (work.display(), cni_bin_dir.display(), cni_conf_dir.display());
    format!(
        r#"version = 2
root = "{work}/root"
state = "{work}/state"
[grpc]
  address = "{work}/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{work}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "/usr/sbin/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
    max_conf_num = 1
"#,
        image = image::NAME
    )
}

fn config_2(options: &Options) -> String {
    let Options { work, cni_bin_dir, cni_conf_dir, .. } = options;
    let (work, bin, conf) = (work.display(), cni_bin_dir.display(), cni_conf_dir.display());
    format!(
        r#"version = 3
root = "{work}/root"
state = "{work}/state"
[grpc]
  address = "{work}/c.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "{work}/opt"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{image}"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      sandboxer = "podsandbox"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = "/usr/sbin/runc"
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{bin}"]
    conf_dir = "{conf}"
    max_conf_num = 1
[plugins.'io.containerd.grpc.v1.cri']
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
"#,
        image = image::NAME
    )
}

/// Where downloads are kept between runs: `$TERWAY_CACHE_DIR`, or `~/.cache/terway`.
#[must_use]
pub fn cache_dir() -> PathBuf {
    std::env::var_os("TERWAY_CACHE_DIR").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/terway"),
        PathBuf::from,
    )
}

/// Gets containerd 2 of Debian testing into `cache` through apt with a root of its own; the machine's sources and packages stay as
/// they are. Gives back the folder with its binaries, at once when they are there already.
///
/// # Errors
/// Why it cannot be had here: no apt, no network, no keyring. A suite then says so and skips.
pub fn fetch_containerd_2(cache: &Path) -> Result<PathBuf> {
    let bin_dir = cache.join("containerd-2/usr/bin");
    if bin_dir.join("containerd").exists() {
        return Ok(bin_dir);
    }
    let sources = fs::read_to_string("/etc/apt/sources.list.d/debian.sources").context("not Debian's apt sources")?;
    let mirror = sources
        .lines()
        .find_map(|line| line.strip_prefix("URIs:"))
        .and_then(|uris| uris.split_whitespace().next())
        .context("no URIs in debian.sources")?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    // Made beside its place and renamed: two suites at once, or a kill, leave no half of it.
    let part = cache.join(format!("part-{}", std::process::id()));
    for folder in ["lists/partial", "cache/archives/partial", "debs", "tree"] {
        fs::create_dir_all(part.join(folder))?;
    }
    fs::write(part.join("sources.list"), format!("deb [signed-by={keyring}] {mirror} forky main\n"))?;
    let at = part.display();
    let options = [
        "Dir::Etc::sourceparts=-".to_owned(),
        format!("Dir::Etc::sourcelist={at}/sources.list"),
        format!("Dir::State::lists={at}/lists"),
        format!("Dir::Cache={at}/cache"),
        "Acquire::http::Timeout=10".to_owned(),
        "Acquire::Retries=1".to_owned(),
    ];
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.current_dir(part.join("debs")).arg("-q");
        for option in &options {
            command.args(["-o", option]);
        }
        feed(command.args(arguments), "")
    };
    let fetched = (|| -> Result<()> {
        apt(&["update"])?;
        apt(&["download", "containerd"])?;
        let package = fs::read_dir(part.join("debs"))?.next().context("apt-get download left no file")??.path();
        feed(Command::new("dpkg").arg("-x").arg(&package).arg(part.join("tree")), "")?;
        match fs::rename(part.join("tree"), cache.join("containerd-2")) {
            Err(_) if bin_dir.join("containerd").exists() => Ok(()),
            renamed => renamed.context("move the unpacked package into its place"),
        }
    })();
    fs::remove_dir_all(&part)?;
    fetched.map(|()| bin_dir)
}

#[cfg(test)]
mod tests;
