//! What is written to the API: events, the Node's condition, annotation and taints, pods' annotations; with a pool that the test makes up.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use terway_core::config::{self, Config};
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, PodRef};
use terway_core::ipam::Stats;
use terway_core::kube_writes::{NodeSettings, Reason};
use terway_daemon::kube_writes::{EventLevel, KubeWriteMetrics, KubeWrites, NodeState, Setup};
use terway_daemon::objects::Subscriber;
use terway_sim::apiserver::{DAEMON, User};
use tokio::sync::watch;

use super::rig::{NODE, Rig, namespace, pod};

/// Pauses of the daemon are divided by this.
const TIME_SCALE: u32 = 20;

/// The pool and the readiness of a node, as the test wants them.
pub(crate) struct Pool {
    stats: Mutex<(Stats, Vec<Error>)>,
    attached: Mutex<Vec<(PodRef, Addresses)>>,
    is_ready: AtomicBool,
    changed: watch::Sender<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Sets the numbers: addresses that the node can have, idle ones, problems.
    pub(crate) fn set(&self, capacity: u32, idle: u32, problems: Vec<Error>) {
        *lock(&self.stats) = (Stats { capacity, idle, ..Stats::default() }, problems);
        self.changed.send_replace(());
    }

    pub(crate) fn attach(&self, name: &str, uid: &str, address: [u8; 4]) {
        let pod = PodRef { namespace: "shop".to_owned(), name: name.to_owned(), uid: uid.to_owned() };
        let addresses = Addresses { v4: Some(Ipv4Addr::from(address)), v6: None };
        let mut attached = lock(&self.attached);
        attached.retain(|(other, _)| *other != pod);
        attached.push((pod, addresses));
        drop(attached);
        self.changed.send_replace(());
    }

    fn set_ready(&self) {
        self.is_ready.store(true, Ordering::Relaxed);
        self.changed.send_replace(());
    }
}

impl NodeState for Pool {
    fn pool(&self) -> (Stats, Vec<Error>) {
        lock(&self.stats).clone()
    }

    fn attached(&self) -> Vec<(PodRef, Addresses)> {
        lock(&self.attached).clone()
    }

    fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Relaxed)
    }

    fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// The writes of a daemon, and what they are about.
pub(crate) struct Writes {
    pub(crate) kube: Arc<KubeWrites>,
    pub(crate) pool: Arc<Pool>,
    config: watch::Sender<Arc<Config>>,
}

fn configuration(extra: &str) -> Result<Arc<Config>> {
    let document = format!(r#"{{"vswitches": {{"z": ["vsw-1"]}}, "security_group": "sg-1"{extra}}}"#);
    let (config, _) = config::parse(&document).map_err(|bad| anyhow::anyhow!("{bad:?}"))?;
    Ok(Arc::new(config))
}

fn settings() -> NodeSettings {
    NodeSettings { has_status: true, clears_network_unavailable: false, startup_taint: None }
}

impl Writes {
    /// Follows the API as a user, and writes to it.
    pub(crate) fn start(rig: &mut Rig, user: User<'_>, settings: NodeSettings) -> Result<Self> {
        let (config, configs) = watch::channel(configuration("")?);
        let mut kube = None;
        rig.follow_with(user, TIME_SCALE, |api, objects| {
            let writes = KubeWrites::new(Setup {
                api: Some(api),
                objects,
                node: NODE.to_owned(),
                settings,
                events: EventLevel::All,
                config: configs,
                metrics: KubeWriteMetrics::new(&mut Registry::default()),
                time_scale: TIME_SCALE,
            });
            kube = Some(Arc::clone(&writes));
            vec![writes as Arc<dyn Subscriber>]
        })?;
        let kube = kube.context("the writes")?;
        let pool = Arc::new(Pool {
            stats: Mutex::default(),
            attached: Mutex::default(),
            is_ready: AtomicBool::new(false),
            changed: watch::Sender::new(()),
        });
        pool.set(30, 5, Vec::new());
        let (this, state) = (Arc::clone(&kube), Arc::clone(&pool) as Arc<dyn NodeState>);
        rig.runtime()?.block_on(async move { this.start(&state) });
        Ok(Self { kube, pool, config })
    }

    /// With the shipped role.
    fn start_as_shipped(rig: &mut Rig, settings: NodeSettings) -> Result<Self> {
        rig.apply_role()?;
        Self::start(rig, DAEMON, settings)
    }
}

fn object(rig: &Rig, arguments: &[&str]) -> Result<Value> {
    let text = rig.server.kubectl(&[&["get", "-o", "json", "--show-managed-fields"], arguments].concat(), "")?;
    Ok(serde_json::from_str(&text)?)
}

fn node(rig: &Rig) -> Result<Value> {
    object(rig, &["node", NODE])
}

fn condition(node: &Value, kind: &str) -> Option<Value> {
    node["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind).cloned()
}

/// Waits until the Node in the API fulfils a condition.
fn wait_node(rig: &Rig, what: &str, until: impl Fn(&Value) -> bool) -> Result<Value> {
    rig.poll(what, || node(rig).is_ok_and(|node| until(&node)))?;
    node(rig)
}

fn has_status(node: &Value, kind: &str, status: &str) -> bool {
    condition(node, kind).is_some_and(|condition| condition["status"] == status)
}

/// Replaces the Node's status, as kubelet and cloud controllers write it.
fn edit_status(rig: &Rig, edit: impl Fn(&mut Value)) -> Result<()> {
    // The daemon may write in between.
    let mut last = Ok(());
    for _ in 0..20 {
        let mut node = node(rig)?;
        edit(&mut node["status"]);
        let path = format!("/api/v1/nodes/{NODE}/status");
        last = rig.server.kubectl(&["replace", "--raw", &path, "-f", "-"], &node.to_string()).map(drop);
        if last.is_ok() {
            break;
        }
    }
    last
}

/// The events of a namespace with a reason.
fn events(rig: &Rig, namespace: &str, reason: &str) -> Result<Vec<Value>> {
    let list = object(rig, &["events", "-n", namespace])?;
    let items = list["items"].as_array().into_iter().flatten();
    Ok(items.filter(|event| event["reason"] == reason).cloned().collect())
}

fn wait_events(rig: &Rig, namespace: &str, reason: &str, until: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
    rig.poll(&format!("events {reason}"), || events(rig, namespace, reason).is_ok_and(|events| until(&events)))?;
    events(rig, namespace, reason)
}

fn pod_ref(rig: &Rig, name: &str) -> Result<PodRef> {
    let uid = object(rig, &["pod", name, "-n", "shop"])?["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    Ok(PodRef { namespace: "shop".to_owned(), name: name.to_owned(), uid })
}

#[test]
fn events_are_aggregated_and_shown_by_kubectl_describe() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-events")? else { return Ok(()) };
    rig.server.apply(&[namespace("shop"), pod("shop", "web", Some(NODE))])?;
    let writes = Writes::start_as_shipped(&mut rig, settings())?;
    rig.wait_synced()?;
    let web = pod_ref(&rig, "web")?;
    for _ in 0..3 {
        writes.kube.record_on_pod(&web, Reason::AllocIpFailed, "vsw-1 has no address");
    }
    // A runtime that tells no UID: it is the one of the object.
    let without_uid = PodRef { uid: String::new(), ..web.clone() };
    writes.kube.record_on_pod(&without_uid, Reason::AllocIpFailed, "vsw-1 has no address");
    writes.kube.record_on_pod(&web, Reason::AllocIpSucceed, "Alloc IP 10.0.0.1 took 2ms");
    writes.kube.record_on_node(Reason::ConfigError, "max_pool_size = -1: is not a number from 0 on");
    let failed = wait_events(&rig, "shop", "AllocIPFailed", |events| events.iter().any(|event| event["count"] == 4))?;
    ensure!(failed.len() == 1, "{failed:?}");
    let event = &failed[0];
    ensure!(event["type"] == "Warning" && event["source"] == json!({ "component": "terway", "host": NODE }), "{event}");
    ensure!(event["involvedObject"]["uid"] == *web.uid, "{event}");
    let succeeded = wait_events(&rig, "shop", "AllocIPSucceed", |events| !events.is_empty())?;
    ensure!(succeeded[0]["type"] == "Normal", "{succeeded:?}");
    wait_events(&rig, "default", "ConfigError", |events| !events.is_empty())?;
    let described = rig.server.kubectl(&["describe", "pod", "web", "-n", "shop"], "")?;
    ensure!(described.contains("AllocIPFailed") && described.contains("vsw-1 has no address"), "{described}");
    let described = rig.server.kubectl(&["describe", "node", NODE], "")?;
    ensure!(described.contains("ConfigError"), "{described}");
    ensure!(writes.kube.problems().is_empty(), "{:?}", writes.kube.problems());
    Ok(())
}

#[test]
fn outage_is_survived_and_the_state_of_the_moment_is_written_afterwards() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-write-outage")? else { return Ok(()) };
    rig.server.apply(&[namespace("shop"), pod("shop", "web", Some(NODE))])?;
    let writes = Writes::start_as_shipped(&mut rig, settings())?;
    rig.wait_synced()?;
    wait_node(&rig, "SufficientIP", |node| has_status(node, "SufficientIP", "True"))?;
    let web = pod_ref(&rig, "web")?;
    rig.server.kill()?;
    for _ in 0..5 {
        writes.kube.record_on_pod(&web, Reason::AllocIpFailed, "no address");
    }
    writes.pool.set(30, 0, vec![Error::new(errors::VSWITCH_EXHAUSTED, "vsw-1")]);
    rig.poll("a problem with writing", || {
        writes.kube.problems().iter().any(|problem| problem.code == errors::KUBE_WRITE_FAILED)
    })?;
    // What was between is never written.
    writes.pool.set(31, 0, vec![Error::new(errors::VSWITCH_EXHAUSTED, "vsw-2")]);
    rig.server.restart()?;
    let node = wait_node(&rig, "the condition", |node| has_status(node, "SufficientIP", "False"))?;
    ensure!(condition(&node, "SufficientIP").is_some_and(|c| c["message"].to_string().contains("vsw-2")), "{node}");
    let failed = wait_events(&rig, "shop", "AllocIPFailed", |events| events.iter().any(|event| event["count"] == 5))?;
    ensure!(failed.len() == 1, "{failed:?}");
    rig.poll("no problem", || writes.kube.problems().is_empty())
}

#[test]
fn condition_flips_with_the_supply_and_comes_back_when_it_is_removed() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-condition")? else { return Ok(()) };
    edit_status(&rig, |status| {
        status["conditions"] = json!([{ "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "m" }]);
    })?;
    rig.server.kubectl(&["annotate", "node", NODE, "example.com/owner=team"], "")?;
    let writes = Writes::start_as_shipped(&mut rig, settings())?;
    let is_at = |node: &Value, ips: &str| node["metadata"]["annotations"]["k8s.aliyun.com/max-available-ip"] == *ips;
    let first = wait_node(&rig, "SufficientIP", |node| has_status(node, "SufficientIP", "True") && is_at(node, "30"))?;
    writes.pool.set(20, 0, vec![Error::new(errors::VSWITCH_EXHAUSTED, "vsw-1 is empty")]);
    let short = wait_node(&rig, "a shortage", |node| has_status(node, "SufficientIP", "False") && is_at(node, "20"))?;
    let reason = condition(&short, "SufficientIP").unwrap_or_default();
    ensure!(
        reason["reason"] == "InsufficientIP" && reason["message"].to_string().contains("vsw-1 is empty"),
        "{reason}"
    );
    // What others have written is as it was.
    for node in [&first, &short] {
        ensure!(node["metadata"]["annotations"]["example.com/owner"] == "team", "{node}");
        ensure!(condition(node, "Ready").is_some_and(|ready| ready["reason"] == "KubeletReady"), "{node}");
    }
    wait_events(&rig, "default", "AllocIPFailed", |events| events.len() == 1)?;
    edit_status(&rig, |status| {
        let conditions = status["conditions"].as_array_mut().into_iter();
        conditions.for_each(|all| all.retain(|condition| condition["type"] != "SufficientIP"));
    })?;
    wait_node(&rig, "the condition again", |node| has_status(node, "SufficientIP", "False"))?;
    writes.pool.set(20, 3, Vec::new());
    wait_node(&rig, "the end of the shortage", |node| has_status(node, "SufficientIP", "True"))?;
    wait_events(&rig, "default", "SufficientIP", |events| events.len() == 1)?;
    // Nothing is written while nothing changes.
    let version = |node: &Value| node["metadata"]["resourceVersion"].clone();
    let before = version(&node(&rig)?);
    writes.pool.set(20, 4, Vec::new());
    std::thread::sleep(std::time::Duration::from_secs(2));
    ensure!(version(&node(&rig)?) == before, "written without need");
    Ok(())
}

#[test]
fn startup_taint_goes_when_the_node_is_ready_and_others_stay() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-taint")? else { return Ok(()) };
    for taint in ["example.com/a=x:NoSchedule", "terway/starting=:NoSchedule", "example.com/b=y:NoExecute"] {
        rig.server.kubectl(&["taint", "node", NODE, taint], "")?;
    }
    let taint = NodeSettings { startup_taint: Some("terway/starting".to_owned()), ..settings() };
    let writes = Writes::start_as_shipped(&mut rig, taint)?;
    let keys = |node: &Value| -> Vec<String> {
        let taints = node["spec"]["taints"].as_array().into_iter().flatten();
        // The API server adds its own to a node that is not ready.
        let keys =
            taints.filter_map(|taint| taint["key"].as_str()).filter(|key| !key.starts_with("node.kubernetes.io/"));
        keys.map(str::to_owned).collect()
    };
    let waiting = wait_node(&rig, "the condition", |node| has_status(node, "SufficientIP", "True"))?;
    ensure!(keys(&waiting).len() == 3, "{waiting}");
    writes.pool.set_ready();
    let ready = wait_node(&rig, "the taint", |node| keys(node).len() < 3)?;
    ensure!(keys(&ready).iter().all(|key| key.starts_with("example.com/")) && keys(&ready).len() == 2, "{ready}");
    wait_events(&rig, "default", "TaintRemoved", |events| events.len() == 1)?;
    // A node that comes back with it loses it again.
    rig.server.kubectl(&["taint", "node", NODE, "terway/starting=:NoSchedule"], "")?;
    wait_node(&rig, "the taint again", |node| keys(node).len() == 2).map(drop)
}

#[test]
fn network_unavailable_is_reported_and_cleared_only_by_option() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-network")? else { return Ok(()) };
    edit_status(&rig, |status| {
        status["conditions"] = json!([{
            "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": "no route",
        }]);
        status["allocatable"] = json!({ "pods": "110" });
    })?;
    let writes = Writes::start_as_shipped(&mut rig, settings())?;
    writes.pool.set_ready();
    let has = |writes: &Writes, code| writes.kube.problems().iter().any(|problem| problem.code == code);
    rig.poll("both problems", || has(&writes, errors::NETWORK_UNAVAILABLE) && has(&writes, errors::MAX_PODS))?;
    wait_events(&rig, "default", "NetworkUnavailable", |events| events.len() == 1)?;
    let told = wait_events(&rig, "default", "MaxPodsExceedCapacity", |events| events.len() == 1)?;
    ensure!(told[0]["message"].to_string().contains("maxPods is 110, addresses are 30"), "{told:?}");
    wait_node(&rig, "the condition", |node| has_status(node, "SufficientIP", "True"))?;
    ensure!(has_status(&node(&rig)?, "NetworkUnavailable", "True"), "cleared without the option");
    edit_status(&rig, |status| status["allocatable"] = json!({ "pods": "30" }))?;
    rig.poll("no problem with maxPods", || !has(&writes, errors::MAX_PODS))?;

    let clear = NodeSettings { clears_network_unavailable: true, ..settings() };
    let writes = Writes::start_as_shipped(&mut rig, clear)?;
    writes.pool.set_ready();
    let cleared = wait_node(&rig, "the network", |node| has_status(node, "NetworkUnavailable", "False"))?;
    ensure!(condition(&cleared, "NetworkUnavailable").is_some_and(|c| c["reason"] == "TerwayIsUp"), "{cleared}");
    rig.poll("no problem", || writes.kube.problems().is_empty())
}

#[test]
fn pod_is_annotated_with_its_addresses_and_nothing_else_of_it_changes() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-pod-ips")? else { return Ok(()) };
    let mut web = pod("shop", "web", Some(NODE));
    web["metadata"]["annotations"] = json!({ "example.com/owner": "team", "k8s.aliyun.com/pod-ips": "stale" });
    rig.server.apply(&[namespace("shop"), web, pod("shop", "other", Some(NODE))])?;
    let writes = Writes::start_as_shipped(&mut rig, settings())?;
    let annotations = |name: &str| -> Result<Value> {
        Ok(object(&rig, &["pod", name, "-n", "shop"])?["metadata"]["annotations"].clone())
    };
    let has = |name: &str, ips: &str| annotations(name).is_ok_and(|all| all["k8s.aliyun.com/pod-ips"] == *ips);
    let before = object(&rig, &["pod", "web", "-n", "shop"])?;
    let uid = pod_ref(&rig, "web")?.uid;
    // An earlier pod of the same name.
    writes.pool.attach("other", "11111111-2222-3333-4444-555555555555", [10, 0, 0, 9]);
    writes.pool.attach("web", &uid, [10, 0, 0, 1]);
    rig.poll("the annotation", || has("web", "10.0.0.1"))?;
    let after = object(&rig, &["pod", "web", "-n", "shop"])?;
    ensure!(after["metadata"]["annotations"]["example.com/owner"] == "team", "{after}");
    ensure!(after["spec"] == before["spec"] && after["metadata"]["labels"] == before["metadata"]["labels"], "{after}");
    ensure!(after["metadata"]["managedFields"].to_string().contains("\"terway\""), "{after}");
    ensure!(annotations("other")?["k8s.aliyun.com/pod-ips"].is_null(), "another pod of the same name");
    ensure!(writes.kube.problems().is_empty(), "{:?}", writes.kube.problems());
    // The key of eni-config is live.
    writes.config.send_replace(configuration(r#", "enable_patch_pod_ips": false"#)?);
    writes.pool.attach("other", "", [10, 0, 0, 2]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    ensure!(!has("other", "10.0.0.2"), "annotated although it is switched off");
    writes.config.send_replace(configuration("")?);
    rig.poll("the other annotation", || has("other", "10.0.0.2"))
}
