//! One call of a plugin, and whether it ended as it has to.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::spec::Ending;
use super::{HANGS, Plugin};

/// A call of the plugin.
pub(super) struct Call {
    pub(super) env: BTreeMap<&'static str, String>,
    pub(super) stdin: Vec<u8>,
}

/// How a call ended.
pub(super) struct Outcome {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) took: Duration,
}

/// Calls the plugin as a runtime does: an environment of its own, the configuration on stdin, stdout read to its end.
pub(super) fn call(plugin: &dyn Plugin, call: &Call) -> Outcome {
    let started = Instant::now();
    let mut command = plugin.command();
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(&call.env);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let stderr = format!("{command:?} cannot be started: {error}");
            return Outcome { code: None, stdout: String::new(), stderr, took: started.elapsed() };
        }
    };
    let reader = |mut pipe: Box<dyn std::io::Read + Send>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is checked.
            drop(pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = child.stdout.take().map(|pipe| reader(Box::new(pipe)));
    let stderr = child.stderr.take().map(|pipe| reader(Box::new(pipe)));
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read its stdin breaks the pipe, and may.
        drop(stdin.write_all(&call.stdin));
    }
    let code = wait(&mut child, started + HANGS);
    let text =
        |handle: Option<thread::JoinHandle<String>>| handle.and_then(|handle| handle.join().ok()).unwrap_or_default();
    Outcome { code, stdout: text(stdout), stderr: text(stderr), took: started.elapsed() }
}

/// The exit code; `None` for a plugin that was killed, by us where it hung.
fn wait(child: &mut Child, until: Instant) -> Option<i32> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.code(),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_micros(500)),
            _ => {
                drop(child.kill());
                drop(child.wait());
                return None;
            }
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code.map_or_else(|| "a signal".to_owned(), |code| format!("exit {code}"));
        write!(f, "{code} after {:?}, stdout {:?}, stderr {:?}", self.took, self.stdout.trim(), self.stderr.trim())
    }
}

impl Outcome {
    pub(super) fn judge(&self, ending: Ending, version: Option<&str>) -> Result<(), String> {
        match ending {
            Ending::Error(codes) => {
                let error = self.error()?;
                let code = error["code"].as_u64().unwrap_or_default();
                if !codes.is_empty() && !codes.iter().any(|wanted| u64::from(*wanted) == code) {
                    return Err(format!("code should be one of {codes:?}: {}", self.stdout.trim()));
                }
                match (error["cniVersion"].as_str(), version) {
                    (None, _) => Err(format!("the error has no cniVersion: {}", self.stdout.trim())),
                    (Some(have), Some(want)) if have != want => Err(format!("the error is of {have}, not {want}")),
                    _ => Ok(()),
                }
            }
            _ if self.code != Some(0) => Err(format!("should succeed: {self}")),
            Ending::Silence if self.stdout.trim().is_empty() => Ok(()),
            Ending::Silence => Err(format!("should write nothing to stdout: {self}")),
            Ending::About if self.stdout.is_empty() && !self.stderr.trim().is_empty() => Ok(()),
            Ending::About => Err(format!("should introduce itself on stderr: {self}")),
            Ending::Versions => {
                let answer = self.document()?;
                let spoken =
                    answer["supportedVersions"].as_array().is_some_and(|list| list.iter().all(Value::is_string));
                if spoken && answer["cniVersion"].is_string() { Ok(()) } else { Err(format!("no versions: {answer}")) }
            }
            Ending::Result => {
                let result = self.document()?;
                result_form(&result, version.unwrap_or_default()).map_err(|fault| format!("{fault}: {result}"))
            }
        }
    }

    /// stdout is one JSON object and nothing besides.
    pub(super) fn document(&self) -> Result<Value, String> {
        match serde_json::from_str(&self.stdout) {
            Ok(document @ Value::Object(_)) => Ok(document),
            _ => Err(format!("stdout should be one JSON object: {self}")),
        }
    }

    /// "Error": exit code not 0, `code` and `msg` on stdout.
    pub(super) fn error(&self) -> Result<Value, String> {
        match self.code {
            Some(code) if code != 0 => {}
            _ => return Err(format!("should fail: {self}")),
        }
        let error = self.document()?;
        if error["code"].as_u64().is_none() || error["msg"].as_str().is_none_or(str::is_empty) {
            return Err(format!("the error has no code or msg: {error}"));
        }
        Ok(error)
    }

    pub(super) fn addresses(&self) -> Vec<String> {
        let result: Value = serde_json::from_str(&self.stdout).unwrap_or_default();
        let ips = result["ips"].as_array().cloned().unwrap_or_default();
        ips.iter().filter_map(|ip| ip["address"].as_str().map(str::to_owned)).collect()
    }
}

/// "ADD success", and the older texts' sections "Result".
pub(super) fn result_form(result: &Value, version: &str) -> Result<(), String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    if result["cniVersion"] != version {
        return Err(format!("the result is not of {version}"));
    }
    let interfaces = list(&result["interfaces"]);
    let Some(pod) = interfaces
        .iter()
        .position(|one| one["name"] == "eth0" && one["sandbox"].as_str().is_some_and(|s| !s.is_empty()))
    else {
        return Err("the result lists no interface eth0 in a sandbox".to_owned());
    };
    let ips = list(&result["ips"]);
    if !ips.iter().any(|ip| ip["interface"] == pod) {
        return Err("eth0 has no address".to_owned());
    }
    for ip in &ips {
        let address = ip["address"].as_str().unwrap_or_default();
        let Some((host, length)) = address.split_once('/') else {
            return Err(format!("{address:?} has no prefix length"));
        };
        let Ok(host) = host.parse::<std::net::IpAddr>() else { return Err(format!("{host:?} is no address")) };
        if length.parse::<u8>().is_err() {
            return Err(format!("{length:?} is no prefix length"));
        }
        let family = if host.is_ipv4() { "4" } else { "6" };
        match (&ip["version"], version < "1.0.0") {
            (Value::String(have), true) if have == family => {}
            (Value::Null, false) => {}
            (have, _) => return Err(format!("ips[].version is {have} in {version}")),
        }
        if ip["interface"].as_u64().is_some_and(|index| index >= interfaces.len() as u64) {
            return Err("an address is of an interface that is not listed".to_owned());
        }
    }
    let new_keys = [("interfaces", ["mtu", "socketPath", "pciID"]), ("routes", ["mtu", "advmss", "table"])];
    for (key, inner) in new_keys {
        let early = |entry: &Value| inner.iter().any(|name| !entry[*name].is_null());
        if version < "1.1.0" && list(&result[key]).iter().any(early) {
            return Err(format!("{key} has a key that {version} has not"));
        }
    }
    Ok(())
}
