//! Debian packages: which are missing, and installing those without starting their services.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process;
use crate::progress::Step;
use crate::workspace::{is_root, which};

/// How long another apt may hold its locks before we give up.
const PATIENCE: Duration = Duration::from_secs(600);

/// Installs those of `packages` that are missing; says whether there were any.
///
/// # Errors
/// Something is missing, and this is no Debian, we are not root, or the mirror does not have it.
pub(super) fn ensure(packages: &[&str]) -> Result<bool> {
    if which("dpkg-query").is_none() {
        bail!("this machine has no dpkg; install what Debian calls {} by other means", packages.join(", "));
    }
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(false);
    }
    get(&missing)?;
    Ok(true)
}

/// Installs `packages`, in place of older versions too.
///
/// # Errors
/// As [`ensure`].
pub(super) fn get(packages: &[&str]) -> Result<()> {
    if !is_root() {
        bail!("{} missing; run as root, or install by `apt-get install {}`", list(packages), packages.join(" "));
    }
    // The lists of a fresh machine are empty, those of an old one name files that the mirror no longer has.
    let unavailable = |p: &&&str| candidate(p).is_none();
    let mut updated = false;
    if !lists_are_fresh() || packages.iter().any(|p| unavailable(&p)) {
        update()?;
        updated = true;
    }
    if let Some(unknown) = packages.iter().find(unavailable) {
        bail!(
            "the machine's apt sources have no package `{unknown}`; enable Debian 12 with its security updates in them"
        );
    }
    let guard = NoServices::new()?;
    let mut result = install(packages);
    if result.is_err() && !updated {
        update()?;
        result = install(packages);
    }
    drop(guard);
    result?;
    keep_off(packages);
    Ok(())
}

/// The version of a package that apt would install.
pub(super) fn candidate(package: &str) -> Option<String> {
    parse_candidate(&process::output(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C")).ok()?)
}

/// The lists of the machine's sources, anew when there are none yet.
///
/// # Errors
/// Not root, or the mirror cannot be reached.
pub(super) fn ensure_lists() -> Result<()> {
    if lists_are_fresh() { Ok(()) } else { update() }
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|l| l.trim().strip_prefix("Candidate:"))?.trim();
    (version != "(none)").then(|| version.to_owned())
}

fn list(names: &[&str]) -> String {
    match names {
        [one] => format!("the package {one} is"),
        many => format!("the packages {} are", many.join(", ")),
    }
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query fails when one of the names is unknown to it, yet prints the others.
    let out = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query")?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(without_installed(packages, &text))
}

fn without_installed<'a>(packages: &[&'a str], status: &str) -> Vec<&'a str> {
    let there: Vec<_> = status.lines().filter_map(|l| l.strip_suffix(" installed")).collect();
    packages.iter().copied().filter(|p| !there.contains(p)).collect()
}

/// Lists exist, and the last update was within a day: both folders are written to by each update.
fn lists_are_fresh() -> bool {
    let lists = Path::new("/var/lib/apt/lists");
    let Ok(mut entries) = std::fs::read_dir(lists) else { return false };
    let filled = entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().contains("_Packages")));
    let touched = |dir: &Path| std::fs::metadata(dir).and_then(|m| m.modified()).ok();
    let age = [lists.to_path_buf(), lists.join("partial")].iter().filter_map(|d| touched(d)?.elapsed().ok()).min();
    filled && age.is_some_and(|age| age < Duration::from_secs(86_400))
}

/// Fetches the lists of the machine's sources.
///
/// # Errors
/// Not root, or the mirror cannot be reached.
pub(super) fn update() -> Result<()> {
    apt(&["update"]).context("cannot fetch the package lists")
}

fn install(packages: &[&str]) -> Result<()> {
    // --no-remove: what is on the machine stays, a conflict is the administrator's to solve.
    let mut args = vec!["install", "-y", "--no-install-recommends", "--no-remove"];
    args.extend(packages);
    apt(&args).with_context(|| format!("cannot install {}", packages.join(", ")))
}

/// Runs apt-get quietly; waits while another apt holds a lock.
fn apt(args: &[&str]) -> Result<()> {
    let started = Instant::now();
    let step = Step::start(&format!("apt-get {}", args.join(" ")));
    // rust-web-src has tens of thousands of files, and dpkg syncs each; a CI machine that crashes is made anew anyway.
    let in_ci = std::env::var_os("CI").is_some();
    loop {
        let mut command = Command::new("apt-get");
        command
            .args(["-q", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=5", "-o", "Dpkg::Use-Pty=0"])
            // Keeps the administrator's version of a changed configuration file without asking.
            .args(["-o", "Dpkg::Options::=--force-confold"])
            .args(in_ci.then_some(["-o", "Dpkg::Options::=--force-unsafe-io"]).into_iter().flatten())
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        match process::output_as(&mut command, &format!("apt-get {}", args.join(" "))) {
            Ok(_) => return Ok(()),
            // DPkg::Lock::Timeout does not cover the lock of the lists.
            Err(error) if is_lock(&error.to_string()) && started.elapsed() < PATIENCE => {
                step.detail("another apt is at work, waiting");
                std::thread::sleep(Duration::from_secs(5));
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_lock(message: &str) -> bool {
    message.contains("Could not get lock")
        || message.contains("Unable to lock")
        || message.contains("dpkg frontend lock")
}

/// While it lives, package scripts do not start services.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn new() -> Result<Self> {
        // invoke-rc.d and deb-systemd-invoke both ask this program; 101 means "not allowed".
        let path = Path::new("/usr/sbin/policy-rc.d");
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(path);
        match file {
            Ok(mut file) => {
                file.write_all(b"#!/bin/sh\n# Placed by cargo xtask setup while it installs packages.\nexit 101\n")?;
                Ok(Self(Some(path.into())))
            }
            // The administrator's own answer stands.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self(None)),
            Err(e) => Err(e).context("cannot write /usr/sbin/policy-rc.d"),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(error) = std::fs::remove_file(&path)
        {
            eprintln!("setup: remove {} by hand: {error}", path.display());
        }
    }
}

/// Under systemd a package also enables its service for the next boot; the suites start their own daemons.
fn keep_off(installed: &[&str]) {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    for service in installed.iter().filter(|p| **p == "containerd") {
        if process::output(Command::new("systemctl").args(["disable", service])).is_ok() {
            eprintln!("setup      {service}.service left disabled: the suites start their own");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_counts_as_installed() {
        let status = "runc installed\nnftables config-files\niproute2 installed\n";
        assert_eq!(without_installed(&["iproute2", "nftables", "runc", "zstd"], status), ["nftables", "zstd"]);
    }

    #[test]
    fn a_package_without_candidate_is_not_available() {
        let version = parse_candidate("zstd:\n  Installed: (none)\n  Candidate: 1.5.4\n");
        assert_eq!(version.as_deref(), Some("1.5.4"));
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn lock_messages_of_apt_are_known() {
        assert!(is_lock("E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"));
        assert!(!is_lock("E: Unable to locate package nosuch"));
    }
}
