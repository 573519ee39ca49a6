//! `add`: from exec of the plugin to its exit, ADD and DEL with a warm pool, against the reference ptp + host-local plugins.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use terway_sim::netns::NetNs;
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;

use crate::figures::{Bar, Better, Figure, percentile};

/// Pods in turn by each plugin; enough for a 99th percentile that is not the maximum.
const PODS: usize = 150;

/// Pods before the measurement: file caches, pools of threads, neighbour tables.
const WARM: usize = 10;

/// Where Debian keeps the reference plugins.
const REFERENCE: &str = "/usr/lib/cni";

/// A namespace in which the reference plugin makes pods.
#[derive(Debug)]
pub struct Reference {
    host: NetNs,
    state: tempfile::TempDir,
}

impl Reference {
    /// Makes it.
    ///
    /// # Errors
    /// When the kernel refuses or the plugins are not installed.
    pub fn create(name: &str) -> Result<Self> {
        if !Path::new(REFERENCE).join("ptp").exists() {
            bail!("{REFERENCE}/ptp is missing: cargo xtask setup");
        }
        Ok(Self { host: NetNs::create(name)?, state: tempfile::tempdir()? })
    }

    fn call(&self, verb: &str, pod: &NetNs) -> Result<Duration> {
        let conf = json!({
            "cniVersion": "1.0.0", "name": "reference", "type": "ptp",
            "ipam": {
                "type": "host-local", "dataDir": self.state.path(),
                "ranges": [[{"subnet": "10.97.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        self.host.run(|| {
            let mut command = self.host.command(Path::new(REFERENCE).join("ptp"));
            command
                .env_clear()
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", pod.name())
                .env("CNI_NETNS", pod.path())
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", REFERENCE);
            time(&mut command, conf.to_string().as_bytes())
        })?
    }
}

/// Runs a command to its end and says how long it took.
fn time(command: &mut Command, input: &[u8]) -> Result<Duration> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin may answer without reading its input.
        match stdin.write_all(input) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
    }
    let output = child.wait_with_output()?;
    let took = start.elapsed();
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{:?}: {}: {out} {err}", command.get_program(), output.status);
    }
    Ok(took)
}

/// Times `VERSION` of a plugin, which is the cost of its start and nothing else.
fn version(program: &Path) -> Result<Duration> {
    let mut command = Command::new(program);
    command.env_clear().env("CNI_COMMAND", "VERSION");
    time(&mut command, br#"{"cniVersion":"1.0.0"}"#)
}

/// As a runtime calls the plugin: from a thread that is on the node already.
fn add_and_del(node: &Node, pod: &mut Pod) -> Result<(Duration, Duration)> {
    node.netns().run(|| Ok((node.add(pod)?.elapsed, node.del(pod)?.elapsed)))?
}

/// Measures on a node whose pool holds an idle address whenever a pod asks, and whose pods get IPv4 addresses like the reference's: with an
/// IPv6 address that one waits a second for duplicate address detection, which would flatter us.
///
/// # Errors
/// When a plugin fails.
pub fn measure(node: &Node, reference: &Reference) -> Result<Vec<Figure>> {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let (mut add, mut del, mut ver) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ptp_add, mut ptp_del, mut ptp_ver) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..WARM + PODS {
        let mut pod = node.new_pod(&format!("bench-{n}"))?;
        let (added, deleted) = add_and_del(node, &mut pod)?;
        let other = NetNs::create(&format!("{}-ref{n}", node.netns().name()))?;
        let (ptp_added, ptp_deleted) = (reference.call("ADD", &other)?, reference.call("DEL", &other)?);
        let versions = (version(&node.plugin())?, version(&Path::new(REFERENCE).join("ptp"))?);
        if n >= WARM {
            add.push(ms(added));
            del.push(ms(deleted));
            ver.push(ms(versions.0));
            ptp_add.push(ms(ptp_added));
            ptp_del.push(ms(ptp_deleted));
            ptp_ver.push(ms(versions.1));
        }
    }
    let figure = |name: &str, ours: &[f64], theirs: &[f64], p: f64, bars: Vec<Bar>| Figure {
        bench: "add",
        name: name.to_owned(),
        value: percentile(ours, p),
        anchor: Some(("ptp+host-local", percentile(theirs, p))),
        better: Better::Less,
        bars,
    };
    Ok(vec![
        figure("add_p50_ms", &add, &ptp_add, 50.0, vec![Bar::AtMost(5.0), Bar::Ratio(3.0)]),
        figure("add_p99_ms", &add, &ptp_add, 99.0, vec![Bar::AtMost(20.0)]),
        figure("del_p50_ms", &del, &ptp_del, 50.0, vec![Bar::AtMost(5.0)]),
        figure("del_p99_ms", &del, &ptp_del, 99.0, vec![]),
        figure("version_p50_ms", &ver, &ptp_ver, 50.0, vec![Bar::AtMost(1.5)]),
    ])
}

/// Measures ADD and DEL on a node whose pods get addresses of both families.
///
/// # Errors
/// When the plugin fails.
pub fn measure_dual(node: &Node) -> Result<Vec<Figure>> {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let (mut add, mut del) = (Vec::new(), Vec::new());
    for n in 0..WARM + PODS {
        let mut pod = node.new_pod(&format!("dual-{n}"))?;
        let took = add_and_del(node, &mut pod)?;
        if n >= WARM {
            add.push(ms(took.0));
            del.push(ms(took.1));
        }
    }
    let figure = |name: &str, ours: &[f64]| Figure {
        bench: "add",
        name: name.to_owned(),
        value: percentile(ours, 50.0),
        anchor: None,
        better: Better::Less,
        bars: vec![Bar::AtMost(5.0)],
    };
    Ok(vec![figure("add_dual_p50_ms", &add), figure("del_dual_p50_ms", &del)])
}

/// Adds `pods` pods and reads the daemon's resident set.
///
/// # Errors
/// When the plugin fails or the daemon is not there.
pub fn footprint(node: &Node, pods: usize) -> Result<Vec<Figure>> {
    let mut all = Vec::with_capacity(pods);
    for n in 0..pods {
        let mut pod = node.new_pod(&format!("rss-{n}"))?;
        node.add(&mut pod)?;
        all.push(pod);
    }
    let pid = node.daemon_pid().context("the daemon does not run")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse().ok())
        .context("no VmRSS")?;
    for pod in &all {
        node.del(pod)?;
    }
    Ok(vec![Figure {
        bench: "add",
        name: format!("daemon_rss_{pods}_pods_mib"),
        value: kib / 1024.0,
        anchor: None,
        better: Better::Less,
        bars: vec![Bar::AtMost(40.0)],
    }])
}
