//! What the guest finds when it starts: one initramfs, made of a base cached per kernel (busybox, modules, init) and
//! an addition per run (the command, its files, host programs, and the libraries that all of these load).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::initramfs::Initramfs;
use super::kernel::Kernel;
use super::modules;
use crate::process;
use crate::setup::{self, Unpacked};
use crate::workspace::Workspace;

const INIT: &str = include_str!("init.sh");
/// Raise it when the base changes in a way that its inputs do not show.
const BASE_FORMAT: u32 = 3;
/// Top-level links of a merged /usr, as on Debian.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// Left to the host's own programs, if asked for: busybox's versions differ in what tests look at.
const NOT_FROM_BUSYBOX: [&str; 8] = ["busybox", "ip", "nc", "ping", "ping6", "sh", "tc", "wget"];
/// Programs that start others. Busybox's would start its own `ip` or `ping` before looking into PATH, so these are the
/// host's; each is in one of Debian's essential packages.
pub(crate) const STARTERS: [&str; 8] = ["chroot", "env", "nice", "nsenter", "setsid", "timeout", "unshare", "xargs"];

/// What one run adds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Payload {
    /// The command and its arguments; a path of the host is copied in.
    pub(crate) command: Vec<String>,
    /// Files and folders of the host, and their place in the guest.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// Programs of the host, by name.
    pub(crate) tools: Vec<String>,
    /// Environment of the command.
    pub(crate) environment: Vec<(String, String)>,
}

/// Writes the initramfs of one run to `path`.
///
/// # Errors
/// A file of the payload is missing, or does not find its libraries; or the disk is full.
pub(super) fn write(workspace: &Workspace, kernel: &Kernel, payload: &Payload, path: &Path) -> Result<()> {
    let programs = setup::vm_programs(workspace);
    let base = base(workspace, &programs, kernel)?;
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    io::copy(&mut File::open(&base)?, &mut out)?;
    let mut archive = Initramfs::new(out);
    // These are links or folders in the base; an entry of the same name would replace them.
    archive.assume(&["usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "tmp", "root", "var", "run", "vm"]);
    let mut command = payload.command.clone();
    if let Some(program) = command.first_mut()
        && program.contains('/')
        && Path::new(program.as_str()).is_file()
    {
        let host = fs::canonicalize(&program).with_context(|| program.clone())?;
        add(&mut archive, &programs, &host, &host)?;
        *program = host.to_string_lossy().into_owned();
    }
    for tool in &payload.tools {
        let host = programs.find(tool).with_context(|| format!("no program `{tool}` for the guest"))?;
        // By its resolved file, under the name that was asked for (`iptables` and `tc` are links on some systems).
        add(&mut archive, &programs, &fs::canonicalize(&host)?, &programs.installed_at(&host))?;
    }
    for (host, guest) in &payload.files {
        add(&mut archive, &programs, host, guest)?;
    }
    let mut script = String::new();
    for (name, value) in &payload.environment {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    let words: Vec<_> = command.iter().map(|w| quoted(w)).collect();
    script.push_str(&format!("cd /\nexec {}\n", words.join(" ")));
    archive.file("vm/command", 0o644, script.as_bytes())?;
    archive.finish()?;
    Ok(())
}

/// The base of this kernel, made when it is not cached.
fn base(workspace: &Workspace, programs: &Unpacked, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = programs.find("busybox").context("no busybox; run `cargo xtask setup --only vm`")?;
    let mut hash = Sha256::new();
    for part in [INIT, &kernel.version, &busybox.to_string_lossy(), &BASE_FORMAT.to_string()] {
        hash.update(part);
        hash.update([0]);
    }
    hash.update(fs::metadata(&kernel.image)?.len().to_le_bytes());
    let dir = workspace.cache.join("guests");
    let path = dir.join(format!("{}-{}.cpio", kernel.version, hex8(&hash.finalize())));
    if !path.is_file() {
        fs::create_dir_all(&dir)?;
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        write_base(&mut BufWriter::with_capacity(1 << 20, file.as_file_mut()), programs, kernel, &busybox)
            .with_context(|| format!("cannot make the guest of kernel {}", kernel.version))?;
        file.persist(&path)?;
    }
    Ok(path)
}

fn write_base(out: &mut impl Write, programs: &Unpacked, kernel: &Kernel, busybox: &Path) -> Result<()> {
    let mut archive = Initramfs::new(out);
    for dir in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "dev", "run", "etc", "root", "var/lib"] {
        archive.directory(dir, 0o755)?;
    }
    for dir in ["vm", "mnt", "opt"] {
        archive.directory(dir, 0o755)?;
    }
    archive.directory("tmp", 0o1777)?;
    for name in MERGED {
        archive.link(name, &format!("usr/{name}"))?;
    }
    archive.link("var/run", "/run")?;
    archive.link("var/tmp", "/tmp")?;
    // The kernel opens the console for init before devtmpfs is mounted.
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.device("dev/null", 0o666, (1, 3))?;
    archive.file("usr/bin/busybox", 0o755, &fs::read(busybox)?)?;
    // The shell is a starter too.
    let shell = fs::canonicalize("/bin/sh")?;
    add(&mut archive, programs, &shell, Path::new("/bin/sh"))?;
    for name in STARTERS {
        let host = programs.find(name).with_context(|| format!("no program `{name}` for the guest"))?;
        add(&mut archive, programs, &fs::canonicalize(&host)?, &Path::new("/usr/bin").join(name))?;
    }
    let applets = process::output(Command::new(busybox).arg("--list"))?;
    for applet in applets.lines().filter(|a| !NOT_FROM_BUSYBOX.contains(a) && !STARTERS.contains(a)) {
        archive.link(&format!("usr/bin/{applet}"), "busybox")?;
    }
    // Where the kernel calls it (CONFIG_MODPROBE_PATH).
    archive.link("usr/sbin/modprobe", "/bin/busybox")?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
    archive.file("etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files\n")?;

    let folder = format!("usr/lib/modules/{}", kernel.version);
    let chosen = modules::choose(programs, &kernel.modules)?;
    for module in chosen.values() {
        archive.file(&format!("{folder}/{}", module.path), 0o644, &module.object)?;
    }
    for (name, content) in modules::indexes(&chosen) {
        archive.file(&format!("{folder}/{name}"), 0o644, content.as_bytes())?;
    }
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if let Ok(content) = fs::read(kernel.modules.join(name)) {
            archive.file(&format!("{folder}/{name}"), 0o644, &content)?;
        }
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.finish()?;
    Ok(())
}

/// Adds a file with the libraries it loads, or a folder with all that is in it.
fn add<W: Write>(archive: &mut Initramfs<W>, programs: &Unpacked, host: &Path, guest: &Path) -> Result<()> {
    let about = || format!("cannot put {} into the guest", host.display());
    let meta = fs::metadata(host).with_context(about)?;
    if meta.is_dir() {
        archive.directory(&place(guest), 0o755)?;
        for entry in fs::read_dir(host).with_context(about)? {
            let entry = entry?;
            add(archive, programs, &entry.path(), &guest.join(entry.file_name()))?;
        }
        return Ok(());
    }
    let executable = meta.permissions().mode() & 0o111 != 0;
    if archive.has(&place(guest)) {
        return Ok(());
    }
    archive.file(&place(guest), if executable { 0o755 } else { 0o644 }, &fs::read(host).with_context(about)?)?;
    if executable {
        let libraries = libraries(host, programs.holds(host).then(|| programs.libraries()).as_deref());
        for library in libraries.with_context(about)? {
            let name = place(&programs.installed_at(&library));
            if !archive.has(&name) {
                archive.file(&name, 0o755, &fs::read(&library)?)?;
            }
        }
    }
    Ok(())
}

/// The shared libraries of a program, the loader among them; `search` is its `LD_LIBRARY_PATH`.
///
/// # Errors
/// One of them is not installed.
pub(crate) fn libraries(program: &Path, search: Option<&OsStr>) -> Result<Vec<PathBuf>> {
    let mut magic = [0; 4];
    let read = File::open(program).and_then(|mut f| io::Read::read_exact(&mut f, &mut magic));
    if read.is_err() || magic != *b"\x7fELF" {
        return Ok(Vec::new());
    }
    // ldd fails for a static program; that one needs nothing.
    let mut ldd = Command::new("ldd");
    ldd.arg(program).env("LC_ALL", "C").env_remove("LD_LIBRARY_PATH");
    ldd.envs(search.map(|folders| ("LD_LIBRARY_PATH", folders)));
    let out = ldd.output().context("cannot run ldd")?;
    parse_ldd(&String::from_utf8_lossy(&out.stdout))
}

fn parse_ldd(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.contains("not found") {
            bail!("{line}");
        }
        let file = line.split_once("=> ").map_or(line, |(_, file)| file);
        if let Some((file, _)) = file.split_once(" (0x")
            && file.starts_with('/')
        {
            found.push(file.into());
        }
    }
    Ok(found)
}

/// Where a path ends up below the guest's merged /usr, without the leading slash.
pub(crate) fn place(path: &Path) -> String {
    let path = path.to_string_lossy();
    let path = path.trim_start_matches('/');
    match path.split_once('/') {
        Some((top, _)) if MERGED.contains(&top) => format!("usr/{path}"),
        _ => path.to_owned(),
    }
}

/// A word that a POSIX shell reads back unchanged.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn hex8(bytes: &[u8]) -> String {
    bytes.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_from_the_three_kinds_of_lines() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse_ldd(text).unwrap();
        assert_eq!(found, [Path::new("/lib/x86_64-linux-gnu/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]);
        assert!(parse_ldd("\tlibx.so => not found\n").is_err());
        assert!(parse_ldd("\tstatically linked\n").unwrap().is_empty());
    }

    #[test]
    fn paths_follow_the_merged_usr() {
        assert_eq!(place(Path::new("/bin/sh")), "usr/bin/sh");
        assert_eq!(place(Path::new("/lib64/ld.so")), "usr/lib64/ld.so");
        assert_eq!(place(Path::new("/opt/lib/x")), "opt/lib/x");
    }

    #[test]
    fn a_shell_reads_quoted_words_back() {
        for word in ["plain", "", "two words", "it's", "$HOME", "a\nb", "*"] {
            let script = format!("printf %s {}", quoted(word));
            let out = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), word);
        }
    }
}
