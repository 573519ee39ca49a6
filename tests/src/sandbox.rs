//! A place for one test: its own network and mount namespace with a bpffs, on the test's own thread. Everything goes when the
//! thread ends, however it ends.

use std::fs;
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// The namespaces of the calling thread.
#[derive(Debug)]
pub struct Sandbox {
    folder: tempfile::TempDir,
    /// Must stay on the thread that entered.
    _thread: PhantomData<*const ()>,
}

impl Sandbox {
    /// Moves the calling thread into namespaces of its own.
    ///
    /// # Errors
    /// A sentence that says which right is missing: the test is to be skipped.
    pub fn enter() -> Result<Self, String> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .map_err(|e| format!("no network namespaces without CAP_SYS_ADMIN ({e})"))?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(|e| format!("private mounts: {e}"))?;
        let folder =
            tempfile::Builder::new().prefix("ebpf-test-").tempdir().map_err(|e| format!("temporary folder: {e}"))?;
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).map_err(|e| format!("bpffs: {e}"))?;
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).map_err(|e| format!("sysfs: {e}"))?;
        ip("link set lo up").map_err(|e| e.to_string())?;
        Ok(Self { folder, _thread: PhantomData })
    }

    /// A folder on the sandbox's bpffs.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        self.folder.path()
    }

    /// Where a [`terway_daemon::bpf::Datapath`] may pin.
    #[must_use]
    pub fn pin_root(&self) -> PathBuf {
        self.bpffs().join("terway")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The folder itself can only be removed once nothing is mounted on it.
        let _busy = nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Enters a [`Sandbox`], or prints why not and returns from the test.
#[macro_export]
macro_rules! sandbox_or_skip {
    () => {
        match $crate::sandbox::Sandbox::enter() {
            Ok(sandbox) => sandbox,
            Err(reason) => {
                println!("SKIP: {reason}");
                return;
            }
        }
    };
}

/// Runs `ip` with these arguments in the thread's namespace.
///
/// # Errors
/// What `ip` complains about.
pub fn ip(arguments: &str) -> io::Result<String> {
    command("ip", arguments)
}

/// Runs a command in the thread's namespaces and returns its output.
///
/// # Errors
/// What it wrote to stderr, if it failed.
pub fn command(name: &str, arguments: &str) -> io::Result<String> {
    let output = Command::new(name).args(arguments.split_whitespace()).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout);
    Err(io::Error::other(format!("{name} {arguments}: {} {} {}", output.status, said.trim(), complaint.trim())))
}

/// A further network namespace, held open by a process that sleeps in it.
#[derive(Debug)]
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> io::Result<Self> {
        let holder = Command::new("unshare").args(["--net", "sleep", "600"]).stdin(Stdio::null()).spawn()?;
        let namespace = Self { holder };
        // `unshare` execs `sleep` once it is in the new namespace.
        let own = fs::read_link("/proc/thread-self/ns/net")?;
        let entered = || fs::read_link(format!("/proc/{}/ns/net", namespace.pid())).is_ok_and(|other| other != own);
        for _ in 0..1000 {
            if entered() {
                namespace.ip("link set lo up")?;
                return Ok(namespace);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Err(io::Error::other("the namespace's process did not start"))
    }

    /// The process in it, for `ip link set … netns PID`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Runs `ip` in it.
    ///
    /// # Errors
    /// What `ip` complains about.
    pub fn ip(&self, arguments: &str) -> io::Result<String> {
        self.run(&format!("ip {arguments}"))
    }

    /// Runs a command in it.
    ///
    /// # Errors
    /// What it complains about.
    pub fn run(&self, command_line: &str) -> io::Result<String> {
        command("nsenter", &format!("--net=/proc/{}/ns/net {command_line}", self.pid()))
    }

    /// Runs a function on a thread of its own in it.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<std::thread::JoinHandle<T>> {
        let file = fs::File::open(format!("/proc/{}/ns/net", self.pid()))?;
        let (entered, wait) = std::sync::mpsc::channel();
        let handle = std::thread::spawn(move || {
            let result = nix::sched::setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            let failed = result.is_err();
            let _gone = entered.send(result);
            if failed {
                // The caller returns the error and never joins.
                loop {
                    std::thread::park();
                }
            }
            work()
        });
        wait.recv().map_err(io::Error::other)??;
        Ok(handle)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _gone = self.holder.kill();
        let _status = self.holder.wait();
    }
}

/// The index of an interface of the thread's namespace.
///
/// # Errors
/// When there is none of this name.
pub fn ifindex(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}
