//! One boot: QEMU, on the CPU where that can run guests, else by emulation; its output as it comes, and how the command ended.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::guest::{self, Payload};
use super::kernel::Kernel;
use crate::process;
use crate::setup;
use crate::workspace::Workspace;

/// Kernel command line. `norandmaps`: with the same addresses in each process the emulator reuses translated code, a
/// third of an exec's time. `cryptomgr.notests` and the blacklist skip self-tests that take long under emulation.
/// `oops=panic panic=-1` with `-no-reboot` turns a crash of the kernel into the end of QEMU.
const APPEND: &str = "console=ttyS0 quiet loglevel=4 rdinit=/init panic=-1 oops=panic reboot=t nokaslr norandmaps \
    mitigations=off audit=0 nowatchdog tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests \
    initcall_blacklist=crypto_kdf108_init,jent_mod_init";

/// How the command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With this code; 128 and the signal's number when a signal ended it.
    Exit(u8),
    /// Its time was up.
    TimedOut,
    /// The guest ended first: the last lines of its console say why.
    Died(String),
}

/// Limits and extras of a boot.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// MiB. Memory that the guest does not touch costs nothing.
    pub(crate) memory: u32,
    /// For the whole run, boot included.
    pub(crate) limit: Duration,
    /// Where to keep the kernel's console.
    pub(crate) console: Option<PathBuf>,
}

impl Default for Machine {
    fn default() -> Self {
        Self { memory: 1024, limit: Duration::from_secs(300), console: None }
    }
}

/// Boots `kernel`, runs the payload's command, and hands its output over as it comes.
///
/// # Errors
/// QEMU or a file of the payload is missing, or a signal arrives.
pub(super) fn boot(
    workspace: &Workspace,
    kernel: &Kernel,
    payload: &Payload,
    machine: &Machine,
    mut on_output: impl FnMut(&[u8]),
) -> Result<Outcome> {
    let work = scratch()?;
    let initrd = work.path().join("initrd");
    guest::write(workspace, kernel, payload, &initrd)?;
    let image = unpacked(workspace, kernel)?;
    let console = machine.console.clone().unwrap_or_else(|| work.path().join("console"));
    let (out, result) = (work.path().join("out"), work.path().join("result"));
    File::create(&out)?;

    let mut command = emulator(workspace)?;
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.args(["-machine", "q35,usb=off,smm=off,sata=off,smbus=off,vmport=off"]);
    if hardware_virtualisation() {
        // QEMU takes the first that works.
        command.args(["-accel", "kvm"]);
    }
    // One thread for both virtual CPUs: steadier on a busy machine than a thread each, and a third less CPU time.
    command.args(["-accel", "tcg,thread=single,tb-size=256", "-smp", "2"]);
    // erms: `rep movsb` is a byte loop in the emulator; without it the guest's kernel copies by words, 5 times faster.
    command.args(["-cpu", "max,la57=off,erms=off", "-m", &machine.memory.to_string()]);
    command.arg("-kernel").arg(&image).arg("-initrd").arg(&initrd).args(["-append", APPEND]);
    command.args(["-chardev", &format!("file,id=console,path={}", console.display()), "-serial", "chardev:console"]);
    // virtio-serial is a thousand times faster than an emulated UART. ioeventfd=off: a write of the guest has reached
    // the file when it returns, so nothing is lost at the reset.
    command.args(["-device", "virtio-serial-pci,id=ports,ioeventfd=off"]);
    for (number, file) in [(1, &out), (2, &result)] {
        command.args(["-chardev", &format!("file,id=port{number},path={}", file.display())]);
        command.args(["-device", &format!("virtserialport,bus=ports.0,nr={number},chardev=port{number}")]);
    }
    let log = work.path().join("qemu.log");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);

    let mut qemu = Guard(process::spawn(&mut command)?);
    let mut output = File::open(&out)?;
    let mut buffer = vec![0; 1 << 16];
    let started = Instant::now();
    loop {
        // Asked before the read, so that what was written before the end is still read.
        let ended = qemu.0.try_wait()?.is_some();
        loop {
            let n = output.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            on_output(&buffer[..n]);
        }
        if ended {
            break;
        }
        process::interrupted()?;
        if started.elapsed() > machine.limit {
            return Ok(Outcome::TimedOut);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if let Some(code) = exit_code(&fs::read_to_string(&result).unwrap_or_default()) {
        return Ok(Outcome::Exit(code));
    }
    let mut tail = last_lines(&String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()), 10);
    tail.push_str(&last_lines(&String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()), 60));
    Ok(Outcome::Died(tail))
}

/// QEMU; an unpacked one with its own libraries, modules and firmware.
fn emulator(workspace: &Workspace) -> Result<Command> {
    let programs = setup::vm_programs(workspace);
    let path = programs.find("qemu-system-x86_64").context("no QEMU; run `cargo xtask setup --only vm`")?;
    let mut command = Command::new(&path);
    workspace.prepare(&mut command);
    if programs.holds(&path) {
        command.env("LD_LIBRARY_PATH", programs.libraries());
        command.envs(programs.folder("usr/lib/x86_64-linux-gnu/qemu").map(|modules| ("QEMU_MODULE_DIR", modules)));
        for firmware in ["usr/share/qemu", "usr/share/seabios"].iter().filter_map(|folder| programs.folder(folder)) {
            command.arg("-L").arg(firmware);
        }
    }
    Ok(command)
}

/// Whether the kernel can run guests on the CPU itself: the device may be there without the CPU's support for it.
fn hardware_virtualisation() -> bool {
    /// `KVM_CREATE_VM` (include/uapi/linux/kvm.h): `_IO(KVMIO, 0x01)`.
    const CREATE_VM: libc::Ioctl = 0xae01;
    // Without them KVM may still be there by other means (kvm-pvm), which boot only kernels made for it.
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !flags.split_whitespace().any(|flag| matches!(flag, "svm" | "vmx")) {
        return false;
    }
    let Ok(device) = File::options().read(true).write(true).open("/dev/kvm") else { return false };
    // SAFETY: the descriptor is open, and the request takes a number, 0 for the default type of machine.
    let vm = unsafe { libc::ioctl(device.as_raw_fd(), CREATE_VM, 0) };
    if vm < 0 {
        return false;
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    true
}

fn exit_code(result: &str) -> Option<u8> {
    result.lines().find_map(|l| l.strip_prefix("EXIT:"))?.trim().parse().ok()
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|l| format!("{l}\n")).collect()
}

/// Ends QEMU with us, whatever the way out.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            process::kill_group(&mut self.0);
        }
    }
}

/// A scratch folder in memory where there is room: a busy disk must not stall the guest's output.
fn scratch() -> Result<tempfile::TempDir> {
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("terway-vm-");
        builder
    };
    let memory = Path::new("/dev/shm");
    if free_bytes(memory).is_some_and(|b| b > 2 << 30)
        && let Ok(dir) = builder().tempdir_in(memory)
    {
        return Ok(dir);
    }
    builder().tempdir().context("no scratch folder for the guest")
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(dir.to_str()?).ok()?;
    // SAFETY: all-zero bytes are a valid value of this plain struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call, the path ends with a zero byte.
    let failed = unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) } != 0;
    (!failed).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The ELF kernel inside the bzImage, cached: QEMU starts it directly (PVH), which saves unpacking it under emulation.
/// A kernel in a format that is not known here boots as it is, only slower.
fn unpacked(workspace: &Workspace, kernel: &Kernel) -> Result<PathBuf> {
    let dir = workspace.cache.join("guests");
    let path = dir.join(format!("{}.vmlinux", kernel.version));
    if path.is_file() {
        return Ok(path);
    }
    let image = fs::read(&kernel.image).with_context(|| kernel.image.display().to_string())?;
    let Some((program, payload)) = payload_of(&image) else { return Ok(kernel.image.clone()) };
    fs::create_dir_all(&dir)?;
    let mut packed = tempfile::NamedTempFile::new_in(&dir)?;
    std::io::Write::write_all(&mut packed, payload)?;
    let elf = process::output_bytes(setup::vm_programs(workspace).command(program)?.arg("-dcq").arg(packed.path()))?;
    if !elf.starts_with(b"\x7fELF") {
        return Ok(kernel.image.clone());
    }
    let mut file = tempfile::NamedTempFile::new_in(&dir)?;
    std::io::Write::write_all(&mut file, &elf)?;
    file.persist(&path)?;
    Ok(path)
}

/// The compressed kernel in a bzImage and the program that unpacks it (Documentation/arch/x86/boot.rst: setup_sects at
/// 0x1f1, payload_offset and payload_length at 0x248).
fn payload_of(image: &[u8]) -> Option<(&'static str, &[u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + number(0x248)?;
    // The last four bytes are the unpacked size, which is the boot loader's and not part of the stream.
    let payload = image.get(start..start + number(0x24c)?.checked_sub(4)?)?;
    let formats: [(&[u8], &str); 4] =
        [(b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4"), (b"\xfd7zX", "xz"), (b"\x1f\x8b\x08", "gzip")];
    let (_, program) = formats.into_iter().find(|(magic, _)| payload.starts_with(magic))?;
    Some((program, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_is_found_by_the_boot_header() {
        let mut image = vec![0; 0x600];
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&0x10u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        image[0x410..0x41c].copy_from_slice(b"\x28\xb5\x2f\xfdabcdSIZE");
        assert_eq!(payload_of(&image), Some(("zstd", &b"\x28\xb5\x2f\xfdabcd"[..])));
        image[0x410] = 0;
        assert_eq!(payload_of(&image), None);
        assert_eq!(payload_of(&image[..0x200]), None);
    }

    #[test]
    fn exit_codes_are_read_from_the_result_port() {
        assert_eq!(exit_code("EXIT:0\n"), Some(0));
        assert_eq!(exit_code("noise\nEXIT:137\n"), Some(137));
        assert_eq!(exit_code(""), None);
    }
}
