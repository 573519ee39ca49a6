//! Network namespaces by name, as `ip netns` makes them: one is the VPC, one is each node, one is each pod of a test.
//!
//! Nothing here changes the namespace of a calling thread: work inside a namespace runs on a thread of its own ([`NetNs::run`]) or in
//! a child process ([`NetNs::command`]). `ip netns exec` is not used, because it mounts another `/sys` and hides the cgroups with it.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";

/// A network namespace that this process made; it loses its name on drop, and dies when the last process in it does.
///
/// The handle is shared freely between threads: it is a name and an open file, never the state of a thread.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    path: PathBuf,
    file: Arc<File>,
    owned: bool,
    /// Who enters the namespace enters this, too.
    cgroup: OnceLock<Arc<Cgroup>>,
}

impl NetNs {
    /// Makes a namespace with nothing but its loopback interface, which is up.
    ///
    /// # Errors
    /// When the name is taken or the kernel refuses (not root).
    pub fn create(name: &str) -> Result<Self> {
        fs::create_dir_all(NAMES).with_context(|| format!("create {NAMES}"))?;
        let path = Path::new(NAMES).join(name);
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("create {}", path.display()))?;
        let made = std::thread::scope(|scope| {
            let worker = scope.spawn(|| -> Result<()> {
                unshare(CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
                loopback_up().context("set lo up")?;
                mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                    .with_context(|| format!("bind a namespace to {}", path.display()))?;
                Ok(())
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if let Err(error) = made {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), path, file: Arc::new(file), owned: true, cgroup: OnceLock::new() })
    }

    /// A namespace that somebody else made and will remove, such as a pod's of a container runtime.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { name, path: path.to_owned(), file: Arc::new(file), owned: false, cgroup: OnceLock::new() })
    }

    /// Its name in `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path that a CNI plugin gets as `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of the namespace, by which `/proc/PID/ns/net` is recognised.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|ns| (ns.dev(), ns.ino()))
    }

    /// From now on, threads and processes that enter the namespace enter this cgroup, too. Only the first call counts.
    pub fn within(&self, cgroup: Arc<Cgroup>) {
        let _known = self.cgroup.set(cgroup);
    }

    /// Moves the calling thread inside.
    fn enter(&self) -> Result<()> {
        setns(&*self.file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))?;
        if let Some(cgroup) = self.cgroup.get() {
            cgroup.enter().with_context(|| format!("enter {}", cgroup.path().display()))?;
        }
        Ok(())
    }

    /// Runs `work` on a thread of its own inside the namespace and gives back what it returns.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                self.enter()?;
                Ok(work())
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace that outlives this call, such as a server.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<Result<T>> {
        let inside = Self {
            name: self.name.clone(),
            path: self.path.clone(),
            file: Arc::clone(&self.file),
            owned: false,
            cgroup: self.cgroup.clone(),
        };
        std::thread::spawn(move || {
            inside.enter()?;
            Ok(work())
        })
    }

    /// Whether the calling thread is in the namespace, as in [`NetNs::run`].
    fn is_here(&self) -> bool {
        let here = fs::metadata("/proc/thread-self/ns/net").map(|ns| (ns.dev(), ns.ino()));
        matches!((here, self.identity()), (Ok(here), Ok(own)) if here == own)
    }

    /// A command whose process lives in the namespace; to be started by the calling thread.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        // A child that needs nothing done before its exec is started by vfork(2), as runtimes start a plugin; a fork copies page tables.
        if self.is_here() && SigSet::thread_get_mask().is_ok_and(|mask| mask == SigSet::empty()) {
            return command;
        }
        let (file, cgroup) = (Arc::clone(&self.file), self.cgroup.get().cloned());
        // SAFETY: between fork and exec the closure makes three system calls, on descriptors that it owns and on its own thread, and
        // allocates nothing.
        unsafe {
            command.pre_exec(move || {
                // A scenario that waits for signals has them blocked; a child would inherit that and never end on SIGTERM.
                SigSet::empty().thread_set_mask()?;
                if let Some(door) = cgroup.as_ref().and_then(|cgroup| cgroup.door()) {
                    nix::unistd::write(door, b"0")?;
                }
                Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?)
            });
        }
        command
    }

    /// Runs lines of `ip` in the namespace as one batch; the first that fails ends it.
    ///
    /// # Errors
    /// The words of `ip`, with the lines.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut command = self.command("ip");
        command.args(["-batch", "-"]);
        feed(&mut command, lines).map(drop).with_context(|| format!("ip in {}:\n{}", self.name, lines.trim_end()))
    }

    /// Runs a program in the namespace and gives back its standard output.
    ///
    /// # Errors
    /// When it cannot be started or exits with another status than 0.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(args);
        feed(&mut command, "").with_context(|| format!("{program} {} in {}", args.join(" "), self.name))
    }

    /// Writes a value under `/proc/sys/net`, such as `ipv4/ip_forward`, as the namespace sees it.
    ///
    /// # Errors
    /// When there is no such key, or the value is refused.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in values {
                let path = Path::new("/proc/sys/net").join(key);
                fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
            }
            Ok(())
        })?
    }

    /// The processes that live in the namespace.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let identity = self.identity()?;
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process may end while we look.
            if fs::metadata(entry.path().join("ns/net")).is_ok_and(|ns| (ns.dev(), ns.ino()) == identity) {
                pids.push(pid);
            }
        }
        Ok(pids)
    }

    /// Ends every process that lives in the namespace: whoever is in a namespace of ours was started by us or by a child of ours.
    ///
    /// # Errors
    /// When one is still there after two seconds.
    pub fn kill_processes(&self) -> Result<()> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
        let own = std::process::id().cast_signed();
        loop {
            let pids: Vec<i32> = self.pids()?.into_iter().filter(|pid| *pid != own && !is_zombie(*pid)).collect();
            if pids.is_empty() {
                return Ok(());
            }
            if std::time::Instant::now() > deadline {
                bail!("processes {pids:?} in {} outlive SIGKILL", self.name);
            }
            for pid in pids {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Takes the name away and says what went wrong, which drop cannot.
    ///
    /// # Errors
    /// When the mount or the file cannot be removed.
    pub fn delete(mut self) -> Result<()> {
        self.owned = false;
        remove_name(&self.path)
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if self.owned {
            let _ = remove_name(&self.path);
        }
    }
}

/// The names of all namespaces that start with `prefix`.
///
/// # Errors
/// When the folder exists and cannot be read.
pub fn names(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NAMES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    Ok(names)
}

/// Removes one name from `/run/netns`, whoever made it.
///
/// # Errors
/// When the mount or the file cannot be removed.
pub fn remove_name(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a plain file, left by one who died between creating and mounting.
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(error).with_context(|| format!("unmount {}", path.display())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Runs a command with `input` on its standard input and gives back its standard output.
///
/// # Errors
/// When it cannot be started or exits with another status than 0; the error holds its standard error.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that fails early closes its input; its own words tell more than EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a process has ended and only waits for its parent to ask.
fn is_zombie(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

/// `SIOCSIFFLAGS` on `lo` of the calling thread's namespace.
fn loopback_up() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let name = CString::new("lo")?;
    // SAFETY: all-zero bytes are a valid `ifreq`: it is made of integers and character arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.as_bytes_with_nul()) {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the descriptor is open, and `request` is an `ifreq` that lives across the call, as SIOCSIFFLAGS reads it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_entered_by_threads_and_processes_and_leaves_no_name() {
        let name = format!("fabric-t{}", std::process::id());
        let Ok(ns) = NetNs::create(&name) else {
            println!("SKIP: no right to make network namespaces");
            return;
        };
        let before = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        let inode = ns.run(|| fs::metadata("/proc/thread-self/ns/net").unwrap().ino()).unwrap();
        assert_eq!(inode, ns.identity().unwrap().1);
        assert_ne!(inode, before);
        assert_eq!(fs::metadata("/proc/thread-self/ns/net").unwrap().ino(), before);
        let link = ns.output("readlink", &["/proc/self/ns/net"]).unwrap();
        assert!(link.contains(&inode.to_string()), "{link}");
        ns.sysctl(&[("ipv4/ip_forward", "1")]).unwrap();
        assert!(ns.output("ip", &["-br", "link", "show", "up"]).unwrap().starts_with("lo"));
        let mut sleeper = ns.command("sleep").arg("60").spawn().unwrap();
        ns.kill_processes().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(names(&name).unwrap(), std::slice::from_ref(&name));
        ns.delete().unwrap();
        assert!(names(&name).unwrap().is_empty());
    }
}
