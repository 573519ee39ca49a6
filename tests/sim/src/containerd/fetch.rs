//! A newer containerd than the machine's, by apt with a root of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::netns::feed;

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
