//! What the plugin does beyond the matrix: words of its errors, the queue of DELs, deadlines, broken connections and pipes.

use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use terway_core::cni::QueuedDel;
use terway_core::errors;
use terway_proto::v1::{DelPodRequest, StatusResponse};
use terway_sim::netns::NetNs;

use crate::scripted::{ScriptedDaemon, Seen, detail};
use crate::{namespace, program};

/// A plugin with its daemon, and one pod.
struct Bench {
    folder: TempDir,
    daemon: ScriptedDaemon,
    pod: NetNs,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let daemon = ScriptedDaemon::new(folder.path());
        Self { folder, daemon, pod: namespace() }
    }

    fn conf(&self, more: Value) -> Value {
        let mut conf = json!({
            "cniVersion": "1.1.0", "name": "terway", "type": "terway", "timeout_ms": 4000,
            "daemon_socket": self.daemon.socket(), "queue_dir": self.daemon.queue(),
        });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        conf
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(program());
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", self.pod.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn call(&self, verb: &str, more: Value) -> Output {
        let mut child = self.command(verb).spawn().unwrap();
        child.stdin.take().unwrap().write_all(self.conf(more).to_string().as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn succeed(&self, verb: &str, more: Value) -> Value {
        let output = self.call(verb, more);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    fn fail(&self, verb: &str, more: Value) -> Value {
        let output = self.call(verb, more);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn queued(&self) -> Vec<QueuedDel> {
        let files = std::fs::read_dir(self.daemon.queue()).into_iter().flatten();
        files.map(|file| QueuedDel::decode(&std::fs::read(file.unwrap().path()).unwrap()).unwrap()).collect()
    }
}

fn none() -> Value {
    json!({})
}

#[test]
fn add_passes_runtime_config() {
    let bench = Bench::new();
    let runtime = json!({
        "bandwidth": {"IngressRate": 8_000_000, "IngressBurst": 4_294_967_295u32, "EgressRate": 0, "EgressBurst": 0},
        "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "udp", "HostIP": ""}],
        "io.kubernetes.cri.pod-annotations": {"k8s.aliyun.com/x": "y"},
        "dns": {"Servers": ["10.96.0.10"]},
    });
    let mut child = bench
        .command("ADD")
        .env("CNI_ARGS", "K8S_POD_UID=u1;K8S_POD_NAME=web-0;IgnoreUnknown=1;FOO=;K8S_POD_NAMESPACE=team-a")
        .spawn()
        .unwrap();
    let conf = bench.conf(json!({"mtu": 1400, "runtimeConfig": runtime, "timeout_ms": 20_000}));
    child.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["dns"]["nameservers"][0], "10.96.0.10");
    assert_eq!(result["interfaces"][1]["sandbox"], json!(bench.pod.path()));

    let seen = bench.daemon.seen();
    let [Seen::Add(request, Some(timeout))] = &seen[..] else { panic!("{seen:?}") };
    let pod = request.pod.clone().unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()), ("team-a", "web-0", "u1"));
    assert_eq!((request.mtu, request.bandwidth.unwrap().ingress_rate), (1400, 8_000_000));
    assert_eq!((request.port_mappings[0].host_port, request.port_mappings[0].protocol.as_str()), (8080, "udp"));
    assert_eq!(request.annotations["k8s.aliyun.com/x"], "y");
    assert!(*timeout > Duration::from_secs(15) && *timeout < Duration::from_secs(20), "{timeout:?}");
}

#[test]
fn add_as_chained_plugin_keeps_prev_result() {
    let bench = Bench::new();
    let previous = json!({
        "cniVersion": "0.4.0",
        "interfaces": [{"name": "eth1", "sandbox": "/n"}],
        "ips": [{"version": "4", "address": "192.0.2.7/24", "interface": 0}],
    });
    let result = bench.succeed("ADD", json!({"prevResult": previous, "cniVersion": "0.4.0"}));
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(result["ips"][0], json!({"version": "4", "address": "192.0.2.7/24", "interface": 0}));
    assert_eq!(result["ips"][1]["interface"], 2);
    // Only the addresses of its own interface are the daemon's business.
    bench.succeed("CHECK", json!({"prevResult": result, "cniVersion": "0.4.0"}));
}

#[test]
fn add_error_has_cause_and_remedy() {
    let bench = Bench::new();
    bench.daemon.script(|script| script.refusal = Some(detail(errors::VSWITCH_EXHAUSTED, "vsw-1 in cn-x.")));
    for verb in ["ADD", "DEL"] {
        let error = bench.fail(verb, none());
        assert_eq!((error["code"].as_u64(), error["msg"].as_str()), (Some(11), Some(errors::VSWITCH_EXHAUSTED.cause)));
        let details = error["details"].as_str().unwrap();
        assert!(details.starts_with("TW0202 vsw-1 in cn-x. "), "{details}");
        assert!(details.ends_with(errors::VSWITCH_EXHAUSTED.remedy), "{details}");
    }
    assert!(bench.queued().is_empty());
}

#[test]
fn check_reports_differences() {
    let bench = Bench::new();
    let result = bench.succeed("ADD", none());
    bench.succeed("CHECK", json!({"prevResult": result}));
    let mut other = result;
    other["ips"][0]["address"] = "10.9.0.77/32".into();
    let error = bench.fail("CHECK", json!({"prevResult": other}));
    assert_eq!(error["code"], 100);
    assert!(error["details"].as_str().unwrap().contains("10.9.0.77/32"), "{error}");
    bench.succeed("DEL", none());
    assert_eq!(bench.fail("CHECK", json!({"prevResult": other}))["code"], 3);
}

#[test]
fn status_reports_node_state() {
    let bench = Bench::new();
    let tell = |ready, code: Option<errors::Code>, cni_code| {
        let problem = code.map(|code| terway_proto::v1::ErrorDetail { cni_code, ..detail(code, "eni-1.") });
        let status = StatusResponse { ready, problems: problem.into_iter().collect(), ..StatusResponse::default() };
        bench.daemon.script(|script| script.status = Some(status));
    };
    tell(true, None, 0);
    assert!(bench.call("STATUS", none()).stdout.is_empty());
    tell(true, Some(errors::CLOUD_THROTTLED), 11);
    assert!(bench.call("STATUS", none()).status.success());
    tell(false, Some(errors::NO_ADDRESS), 11);
    let error = bench.fail("STATUS", none());
    assert_eq!((error["code"].as_u64(), error["msg"].as_str()), (Some(50), Some(errors::NO_ADDRESS.cause)));
    tell(false, None, 0);
    assert_eq!(bench.fail("STATUS", none())["code"], 50);
    tell(true, Some(errors::BPF_FAILED), 51);
    assert_eq!(bench.fail("STATUS", none())["code"], 51);
}

#[test]
fn status_with_hanging_daemon_times_out() {
    let bench = Bench::new();
    bench.daemon.script(|script| script.slow = true);
    let start = Instant::now();
    let mut conf = bench.conf(none());
    conf.as_object_mut().unwrap().remove("timeout_ms");
    let mut child = bench.command("STATUS").spawn().unwrap();
    child.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 50);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    bench.daemon.script(|script| script.slow = false);
}

#[test]
fn absent_daemon_is_waited_for_once() {
    let bench = Bench::new();
    bench.daemon.stop();
    let start = Instant::now();
    let error = bench.fail("ADD", json!({"timeout_ms": 6000}));
    // Half of the time, as long as that is below 8 s.
    let took = start.elapsed();
    assert!(took > Duration::from_millis(2500) && took < Duration::from_millis(5500), "{took:?}");
    assert_eq!((error["code"].as_u64(), error["msg"].as_str()), (Some(11), Some(errors::DAEMON_UNREACHABLE.cause)));
}

#[test]
fn add_during_daemon_restart() {
    for is_socket_gone in [false, true] {
        let bench = Bench::new();
        bench.daemon.stop();
        if is_socket_gone {
            std::fs::remove_file(bench.daemon.socket()).unwrap();
        }
        // Longer than a restart with a large state takes, and shorter than the plugin's patience (8 s).
        let away = Duration::from_millis(6500);
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(away);
                bench.daemon.start();
            });
            bench.succeed("ADD", json!({"timeout_ms": 60_000}));
        });
        let took = start.elapsed();
        assert!(took >= away && took < away + Duration::from_millis(1400), "{took:?}");
        // DEL never waits that long: it is queued.
        bench.daemon.stop();
        let start = Instant::now();
        assert!(bench.call("DEL", json!({"timeout_ms": 60_000})).status.success());
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert_eq!(bench.queued().len(), 1);
    }
}

#[test]
fn del_without_daemon_is_queued() {
    let bench = Bench::new();
    bench.succeed("ADD", none());
    bench.daemon.stop();
    for netns in [bench.pod.path().display().to_string(), String::new()] {
        let mut child = bench.command("DEL").env("CNI_NETNS", netns).spawn().unwrap();
        child.stdin.take().unwrap().write_all(bench.conf(none()).to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    }
    let queued = bench.queued();
    assert_eq!(queued.len(), 1);
    assert_eq!(queued[0].attachment.to_string(), "terway/c1/eth0");
    bench.daemon.start();
    assert!(bench.queued().is_empty() && !bench.daemon.holds("c1"));
}

#[test]
fn del_that_cannot_be_queued_succeeds() {
    let bench = Bench::new();
    bench.daemon.stop();
    let output = bench.call("DEL", json!({"queue_dir": "/dev/null/queue"}));
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("could not be queued"), "{output:?}");
}

#[test]
fn add_with_known_key_deletes_first() {
    let bench = Bench::new();
    bench.succeed("ADD", none());
    bench.daemon.stop();
    bench.succeed("DEL", none());
    // As if the daemon had looked into the queue just before the DEL was written: aside, then back.
    let aside = bench.folder.path().join("aside");
    std::fs::rename(bench.daemon.queue(), &aside).unwrap();
    bench.daemon.start();
    bench.daemon.seen();
    let conf = json!({"queue_dir": aside});
    bench.succeed("ADD", conf.clone());
    let seen = bench.daemon.seen();
    assert!(matches!(&seen[..], [Seen::Del(DelPodRequest { .. }), Seen::Add(..)]), "{seen:?}");
    assert_eq!(std::fs::read_dir(&aside).unwrap().count(), 0);
    assert!(bench.daemon.holds("c1"));
    // And in the warm case there is one call.
    bench.succeed("DEL", conf.clone());
    bench.daemon.seen();
    bench.succeed("ADD", conf);
    assert_eq!(bench.daemon.seen().len(), 1);
}

#[test]
fn add_waits_for_daemon_socket() {
    let bench = Bench::new();
    bench.daemon.stop();
    thread::scope(|scope| {
        let add = scope.spawn(|| bench.succeed("ADD", none()));
        thread::sleep(Duration::from_millis(300));
        bench.daemon.start();
        assert_eq!(add.join().unwrap()["ips"][0]["interface"], 1);
    });
}

#[test]
fn call_is_retried_when_daemon_dies() {
    let bench = Bench::new();
    bench.daemon.script(|script| script.break_off = true);
    bench.succeed("ADD", none());
    assert_eq!(bench.daemon.seen().len(), 2);
    assert!(bench.daemon.holds("c1"));
}

#[test]
fn del_while_daemon_starts() {
    let bench = Bench::new();
    bench.daemon.stop();
    // The daemon listens and reads its queue; the plugin meanwhile connects, and is served.
    let listener = bench.daemon.listen();
    thread::scope(|scope| {
        let del = scope.spawn(|| bench.succeed("DEL", none()));
        thread::sleep(Duration::from_millis(200));
        bench.daemon.serve(listener);
        del.join().unwrap();
    });
    assert!(matches!(&bench.daemon.seen()[..], [Seen::Del(_)]));
    assert!(bench.queued().is_empty());
}

#[test]
fn closed_stdout_is_an_exit_code() {
    let bench = Bench::new();
    let mut child = bench.command("VERSION").stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(b"{}").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.status.signal()), (Some(1), None), "{output:?}");
    assert!(output.stderr.is_empty());
}

#[test]
fn endless_stdin_is_refused() {
    let bench = Bench::new();
    let mut child = bench.command("ADD").spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let block = vec![b' '; 1 << 20];
    // Ends with a broken pipe when the plugin has had enough.
    let refused = (0..64).any(|_| stdin.write_all(&block).is_err());
    drop(stdin);
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let error: Value = serde_json::from_str(&text).unwrap();
    assert!(refused && error["code"] == 6, "{error}");
}

#[test]
fn usage_on_terminal() {
    let output = Command::new(program()).env_clear().stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{text}");
}

/// The same binary under the name `loopback`, as a runtime calls it for each pod, without a daemon.
#[test]
fn loopback_plugin_sets_lo_up() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("loopback");
    std::os::unix::fs::symlink(program(), &plugin).unwrap();
    let pod = namespace();
    pod.ip("link set lo down").unwrap();
    let call = |verb: &str, netns: &str, more: Value| -> (bool, Value) {
        let mut conf = json!({"cniVersion": "1.0.0", "name": "cni-loopback", "type": "loopback"});
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let mut child = Command::new(&plugin)
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_IFNAME", "lo")
            .env("CNI_NETNS", netns)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default())
    };
    let is_up = || pod.output("ip", &["-o", "link", "show", "lo"]).unwrap().contains("LOOPBACK,UP");
    let path = pod.path().to_str().unwrap();
    assert!(!is_up());
    let (succeeds, error) = call("CHECK", path, json!({}));
    assert!(!succeeds && error["msg"].is_string(), "{error}");
    let (succeeds, result) = call("ADD", path, json!({}));
    assert!(succeeds && is_up(), "{result}");
    let addresses: Vec<_> = result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].clone()).collect();
    assert_eq!(addresses, ["127.0.0.1/8", "::1/128"]);
    assert_eq!(
        (result["interfaces"][0]["name"].clone(), result["interfaces"][0]["sandbox"].clone()),
        (json!("lo"), json!(path))
    );
    // In a chain, the result of the plugins before it is passed on.
    let (succeeds, passed) = call("ADD", path, json!({"prevResult": result}));
    assert!(succeeds && passed == result, "{passed}");
    assert!(call("CHECK", path, json!({"prevResult": result})).0);
    assert!(call("DEL", path, json!({})).0 && is_up(), "lo goes with the namespace");
    assert!(call("DEL", "/run/netns/gone", json!({})).0);
    let (succeeds, error) = call("ADD", "/proc/self/ns/net", json!({}));
    assert!(!succeeds && error["code"] == 8, "the node's own namespace is refused: {error}");
}
