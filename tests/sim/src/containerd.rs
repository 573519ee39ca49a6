//! One containerd per node, inside the node's network namespace: what the plugin does to "the host" it does to that namespace.
//!
//! Its folders, socket and cgroups are the node's own. Shared with every other containerd of the machine, but by unique names, are
//! `/run/containerd/s`, `/run/containerd/runc/k8s.io` and libcni's cache `/var/lib/cni/results`; [`Containerd::stop`] removes ours there.

mod config;
mod fetch;

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::Handle;

use crate::cri::Cri;
use crate::netns::{NetNs, feed};

pub use fetch::{cache_dir, fetch_containerd_2};

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
    child: Child,
    version: String,
    cri: Cri,
}

impl Containerd {
    /// Starts one in `ns`, waits until it answers and imports the image at `image`.
    ///
    /// # Errors
    /// When the binaries are missing, or it is not up within 15 s; the error names its log.
    pub fn start(options: Options, ns: &NetNs, handle: &Handle, image: &Path) -> Result<Self> {
        let binary = options.bin_dir.join("containerd");
        let version = feed(Command::new(&binary).arg("--version"), "")?;
        let version = version
            .split_whitespace()
            .map(|word| word.trim_start_matches('v'))
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .with_context(|| format!("no version in `{version}`"))?
            .to_owned();
        fs::create_dir_all(&options.work)?;
        let path = options.work.join("config.toml");
        fs::write(&path, config::render(&options, &version))?;
        let log = fs::File::options().create(true).append(true).open(options.work.join("containerd.log"))?;
        let mut command = ns.command(&binary);
        command
            .arg("-c")
            .arg(&path)
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
            Ok(cri) => Ok(Self { options, child, version, cri }),
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

    /// Imports an OCI archive.
    ///
    /// # Errors
    /// When the archive is none, or containerd refuses it.
    pub fn import(&self, image: &Path) -> Result<()> {
        import_image(&self.options, image)
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
        errors.extend(wipe(&self.options).err());
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
    import_image(options, image)?;
    Ok(cri)
}

fn import_image(options: &Options, image: &Path) -> Result<()> {
    let mut import = Command::new(options.bin_dir.join("ctr"));
    import.arg("-a").arg(options.work.join("c.sock")).args(["-n", "k8s.io", "images", "import"]).arg(image);
    feed(&mut import, "").map(drop).context("import the image")
}

/// Removes what a containerd with these options left behind, also when it was killed.
///
/// # Errors
/// All that could not be removed, after all was tried.
pub fn wipe(options: &Options) -> Result<()> {
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
            match umount2(mounted, MntFlags::MNT_DETACH) {
                // Another process that clears the same away was faster.
                Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
                Err(error) => return Err(error).with_context(|| format!("unmount {mounted}")),
            }
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

#[cfg(test)]
mod tests;
