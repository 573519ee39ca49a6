//! Calling the plugin as a runtime does: environment, configuration on standard input, a result on standard output.
//!
//! CNI specification 1.1.0, "Section 2: Execution Protocol"; the shape of the calls is what containerd was seen to do.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::Node;
use crate::netns::NetNs;

/// A pod without containers.
#[derive(Debug)]
pub struct Pod {
    /// Its network namespace.
    pub ns: NetNs,
    /// The sandbox id, 64 hex digits.
    pub id: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// Its addresses, once ADD answered.
    pub ips: Vec<IpAddr>,
    /// The result of ADD, which a runtime hands back on CHECK and DEL.
    pub result: Value,
}

impl Pod {
    pub(super) fn create(netns: &str, name: &str) -> Result<Self> {
        let id = hex::encode(Sha256::digest(format!("{netns}/{name}")));
        let (namespace, name) = ("default".to_owned(), name.to_owned());
        Ok(Self { ns: NetNs::create(netns)?, id, namespace, name, ips: Vec::new(), result: Value::Null })
    }

    /// A pod of a container runtime: its namespace, the sandbox id, and its name.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn of_runtime(netns: &Path, id: &str, name: &str) -> Result<Self> {
        let ns = NetNs::open(netns)?;
        let (namespace, name) = ("default".to_owned(), name.to_owned());
        Ok(Self { ns, id: id.to_owned(), namespace, name, ips: Vec::new(), result: Value::Null })
    }

    /// Its IPv4 address.
    ///
    /// # Errors
    /// When it has none.
    pub fn v4(&self) -> Result<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv4).with_context(|| format!("{} has no IPv4 address", self.name))
    }

    /// Its IPv6 address.
    ///
    /// # Errors
    /// When it has none.
    pub fn v6(&self) -> Result<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv6).with_context(|| format!("{} has no IPv6 address", self.name))
    }
}

/// What a call of the plugin did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit status; -1 when a signal ended it.
    pub code: i32,
    /// Standard output as JSON, null when it was empty.
    pub json: Value,
    /// Standard error.
    pub stderr: String,
    /// From exec to exit.
    pub elapsed: Duration,
}

impl Outcome {
    /// The outcome if it is a success.
    ///
    /// # Errors
    /// The plugin's own error otherwise.
    pub fn ok(self) -> Result<Self> {
        if self.code == 0 {
            return Ok(self);
        }
        bail!("plugin: status {}: {} {}", self.code, self.json, self.stderr.trim())
    }
}

impl Node {
    /// ADD; the pod's addresses and result are filled in.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn add(&self, pod: &mut Pod) -> Result<Outcome> {
        let outcome = self.cni("ADD", pod).and_then(Outcome::ok).with_context(|| format!("ADD {}", pod.name))?;
        pod.ips = addresses(&outcome.json)?;
        pod.result = outcome.json.clone();
        Ok(outcome)
    }

    /// DEL.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn del(&self, pod: &Pod) -> Result<Outcome> {
        self.cni("DEL", pod).and_then(Outcome::ok).with_context(|| format!("DEL {}", pod.name))
    }

    /// CHECK.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn check(&self, pod: &Pod) -> Result<Outcome> {
        self.cni("CHECK", pod).and_then(Outcome::ok).with_context(|| format!("CHECK {}", pod.name))
    }

    /// Any verb, to its end, whatever it answers.
    ///
    /// # Errors
    /// When the plugin cannot be run.
    pub fn cni(&self, verb: &str, pod: &Pod) -> Result<Outcome> {
        let (mut command, conf) = self.plugin_call(verb, pod)?;
        let start = Instant::now();
        let child = launch(&mut command, &conf)?;
        finish(child, start)
    }

    /// Any verb, without waiting: for tests that kill the plugin.
    ///
    /// # Errors
    /// When the plugin cannot be started.
    pub fn spawn_cni(&self, verb: &str, pod: &Pod) -> Result<Child> {
        let (mut command, conf) = self.plugin_call(verb, pod)?;
        launch(&mut command, &conf)
    }

    /// What a runtime starts, and what it writes to it.
    fn plugin_call(&self, verb: &str, pod: &Pod) -> Result<(Command, String)> {
        let conf = self.plugin_conf(verb, pod)?.to_string();
        let (namespace, name, id) = (&pod.namespace, &pod.name, &pod.id);
        let path = self.work.join("cni");
        let mut command: Command = self.ns.command(path.join("terway"));
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", pod.ns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", path)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={id};\
                     K8S_POD_UID=uid-{name}"
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok((command, conf))
    }

    /// The configuration that a runtime derives from the conflist for our plugin.
    fn plugin_conf(&self, verb: &str, pod: &Pod) -> Result<Value> {
        let list = self.conflist()?;
        let mut conf: Map<String, Value> =
            list["plugins"][0].as_object().context("the conflist has no plugin")?.clone();
        conf.insert("name".to_owned(), list["name"].clone());
        conf.insert("cniVersion".to_owned(), json!(list["cniVersion"]));
        if verb != "ADD" && !pod.result.is_null() {
            conf.insert("prevResult".to_owned(), pod.result.clone());
        }
        Ok(Value::Object(conf))
    }

    /// The path under which the plugin is found.
    #[must_use]
    pub fn plugin(&self) -> PathBuf {
        self.work.join("cni/terway")
    }
}

fn launch(command: &mut Command, conf: &str) -> Result<Child> {
    let mut child = command.spawn().context("start the plugin")?;
    if let Some(mut stdin) = child.stdin.take() {
        // Killed before it read: the test wants exactly that.
        let _ = stdin.write_all(conf.as_bytes());
    }
    Ok(child)
}

/// Waits for a call that [`Node::spawn_cni`] started at `start`.
///
/// # Errors
/// When it printed something that is not JSON.
pub fn finish(mut child: Child, start: Instant) -> Result<Outcome> {
    let (mut stdout, mut stderr) = (String::new(), String::new());
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut stdout)?;
    }
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut stderr)?;
    }
    let status = child.wait()?;
    let elapsed = start.elapsed();
    let json = if stdout.trim().is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&stdout).with_context(|| format!("the plugin printed no JSON: {stdout}"))?
    };
    Ok(Outcome { code: status.code().unwrap_or(-1), json, stderr, elapsed })
}

/// The addresses of a result of version 1.0.0 or later.
fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("the result has no ips")?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().unwrap_or_default();
            let address = text.split('/').next().unwrap_or_default();
            address.parse().with_context(|| format!("`{text}` in the result is no address"))
        })
        .collect()
}
