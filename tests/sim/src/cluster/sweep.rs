//! Finding clusters by their prefix, and clearing away what killed ones left.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{KEPT, PREFIX, lock};
use crate::containerd;
use crate::netns::{self, NetNs};

/// Copies the logs of a failed cluster to where the next sweep does not reach, and says where.
#[expect(clippy::print_stderr, reason = "shown by the test runner beside the failure that it explains")]
pub(super) fn save_logs(prefix: &str, work: &Path) {
    let to = std::env::temp_dir().join(format!("terway-failed-{prefix}"));
    let mut saved = 0;
    for node in fs::read_dir(work).into_iter().flatten().flatten() {
        for log in ["terwayd.log", "c/containerd.log"] {
            let name = format!("{}-{}", node.file_name().to_string_lossy(), log.replace('/', "-"));
            if fs::create_dir_all(&to).is_ok() && fs::copy(node.path().join(log), to.join(name)).is_ok() {
                saved += 1;
            }
        }
    }
    if saved > 0 {
        eprintln!("logs of the nodes: {}", to.display());
    }
}

/// The prefixes of all clusters of this machine, also of those whose process is gone.
fn prefixes() -> Result<Vec<String>> {
    let mut prefixes: Vec<String> = netns::names(PREFIX)?
        .into_iter()
        .filter_map(|name| Some(name.split_once('-')?.0.to_owned()))
        .chain(fs::read_dir("/tmp")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()))
        .filter(|prefix| owner(prefix).is_some())
        .collect();
    prefixes.sort();
    prefixes.dedup();
    Ok(prefixes)
}

/// Clears away clusters whose process is gone, and gives back their prefixes.
///
/// # Errors
/// When one cannot be cleared away.
pub fn sweep() -> Result<Vec<String>> {
    let _sweeping = lock::sweeping()?;
    let alive = |pid: u32| Path::new("/proc").join(pid.to_string()).exists();
    let dead: Vec<String> = prefixes()?.into_iter().filter(|prefix| !owner(prefix).is_some_and(alive)).collect();
    for prefix in &dead {
        remove(prefix)?;
    }
    Ok(dead)
}

/// Ends clusters that are kept to be looked at, and clears away what killed ones left. Gives back their prefixes.
///
/// # Errors
/// When one does not end within 30 s or cannot be cleared away.
pub fn clean() -> Result<Vec<String>> {
    let mut cleared = Vec::new();
    for prefix in prefixes()? {
        let work = Path::new("/tmp").join(&prefix);
        let Some(pid) = owner(&prefix).filter(|_| work.join(KEPT).exists()) else { continue };
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if exe.file_name().is_some_and(|name| name == "terway-sim") {
            kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).with_context(|| format!("end process {pid}"))?;
            let deadline = Instant::now() + Duration::from_secs(30);
            while work.exists() {
                if Instant::now() > deadline {
                    bail!("process {pid} does not clear {prefix} away");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            cleared.push(prefix);
        }
    }
    cleared.extend(sweep()?);
    Ok(cleared)
}

/// The process that a prefix belongs to.
fn owner(prefix: &str) -> Option<u32> {
    let (pid, number) = prefix.strip_prefix(PREFIX)?.split_once('.')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// Removes everything that carries a prefix, whoever made it.
pub(super) fn remove(prefix: &str) -> Result<()> {
    let mut errors: Vec<anyhow::Error> = Vec::new();
    let work = Path::new("/tmp").join(prefix);
    let names = netns::names(&format!("{prefix}-"))?;
    // All processes before the first cgroup, which may have some of other namespaces and does not tell them if it is a threaded one.
    for ns in names.iter().filter_map(|name| NetNs::open(&Path::new("/run/netns").join(name)).ok()) {
        errors.extend(ns.kill_processes().err());
    }
    for name in names {
        let path = Path::new("/run/netns").join(&name);
        if path.exists() {
            let node = name.trim_start_matches(prefix).trim_start_matches('-');
            let options = containerd::Options {
                work: work.join(node).join("c"),
                bin_dir: PathBuf::new(),
                cni_bin_dir: PathBuf::new(),
                cni_conf_dir: PathBuf::new(),
                cgroup_parent: format!("/{name}"),
            };
            errors.extend(containerd::wipe(&options).err());
        }
        errors.extend(netns::remove_name(&path).err());
    }
    errors.extend(containerd::unmount_below(&work).err());
    match fs::remove_dir_all(&work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            errors.push(anyhow::Error::new(error).context(format!("remove {}", work.display())));
        }
        _ => {}
    }
    if errors.is_empty() {
        return Ok(());
    }
    bail!("clear away {prefix}: {}", errors.iter().map(|error| format!("{error:#}")).collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_name_their_owner() {
        assert_eq!(owner("tw12.3"), Some(12));
        for other in ["tw", "tw12", "tw12.x", "twx.1", "xtw12.3", "tw12.3-vpc"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
