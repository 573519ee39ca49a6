//! What clouds, admins and recycled machines do to a node's addresses, and that it shows, heals and harms no running pod.
//!
//! Each test is a problem that users of such networks report. The daemon's own waiting times (cooling, grace periods, stale listings) are
//! divided by 30 here (`--time-scale`), those with a key of their own are set by it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use terway_core::cidr;
use terway_core::cloud::EniKind;
use terway_sim::cloud::{AdminAction, CloudConfig, EniRecord, Fault, FaultKind, VSwitchConfig};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;
use terway_sim::probe::{self, Echo};

use super::audit::{cli, json};
use super::{SETTLE, pod, with_cluster};

/// Time for what heals by itself.
const HEALS: Duration = Duration::from_secs(15);

/// Another vSwitch in the same zone, and another security group.
fn another_vswitch(cloud: &mut CloudConfig) {
    let zone = cloud.vswitches[0].zone.clone();
    cloud.vswitches.push(VSwitchConfig {
        id: "vsw-more".to_owned(),
        zone,
        cidr_v4: "10.0.8.0/24".parse().expect("a CIDR"),
        cidr_v6: Some("2001:db8:0:8::/64".parse().expect("a CIDR")),
    });
    cloud.security_groups.push("sg-other".to_owned());
}

/// One node with `enis` ENIs for pods, four addresses each, and no idle address that nobody asked for.
fn small(options: &mut Options, enis: u32) {
    options.nodes = 1;
    options.adapters = enis + 1;
    options.addresses_per_adapter = 4;
    options.pool = (0, 5);
    options.cooling = 0;
    options.time_scale = 30;
    options.cloud = another_vswitch;
    options.attach = (Duration::from_millis(20), Duration::from_millis(20));
}

fn with_node(change: impl FnOnce(&mut Options), test: impl FnOnce(&Cluster, &Node) -> Result<()>) -> Result<()> {
    with_cluster(change, |cluster| test(cluster, cluster.node(1)))
}

fn pods(node: &Node, names: &str) -> Result<Vec<Pod>> {
    names.split(' ').map(|name| pod(node, name)).collect()
}

/// ADD, again and again as a kubelet does, until it succeeds.
fn pod_at_last(node: &Node, name: &str) -> Result<Pod> {
    let mut pod = node.new_pod(name)?;
    let deadline = Instant::now() + HEALS;
    loop {
        match node.add(&mut pod) {
            Ok(_) => return Ok(pod),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {
                node.del(&pod)?;
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

/// The CNI error of an ADD that must fail, after checking that it has this code and these words.
fn refused(node: &Node, name: &str, code: &str, words: &[&str]) -> Result<()> {
    let pod = node.new_pod(name)?;
    let outcome = node.cni("ADD", &pod)?;
    node.del(&pod)?;
    let text = outcome.json.to_string();
    ensure!(outcome.code != 0, "{name} got an address: {text}");
    for word in [code].iter().chain(words) {
        ensure!(text.contains(word), "`{word}` is not in {text}");
    }
    let message = outcome.json["msg"].as_str().context("a message")?;
    ensure!(!message.contains('\n') && message.len() < 400, "not one sentence: {message}");
    Ok(())
}

/// ADDs until one is refused; those that were served.
fn fill(node: &Node, prefix: &str, most: usize) -> Result<Vec<Pod>> {
    let mut served = Vec::new();
    for number in 0..=most {
        let mut pod = node.new_pod(&format!("{prefix}{number}"))?;
        if node.add(&mut pod).is_err() {
            node.del(&pod)?;
            return Ok(served);
        }
        served.push(pod);
    }
    anyhow::bail!("{} pods and no end", served.len())
}

/// Every pod has both families, and is reached from outside its node.
fn alive<'a>(cluster: &Cluster, pods: impl IntoIterator<Item = &'a Pod>) -> Result<()> {
    for pod in pods {
        for ip in [pod.v4()?, pod.v6()?] {
            probe::ping(cluster.external(), ip, &[]).with_context(|| format!("{} is unreachable", pod.name))?;
        }
    }
    Ok(())
}

fn is_in(pod: &Pod, block: &str) -> Result<bool> {
    Ok(cidr::parse::<IpNetwork>(block)?.contains(pod.v4()?))
}

/// The ENIs of pods in the cloud.
fn secondary(cluster: &Cluster) -> Vec<EniRecord> {
    cluster.cloud().enis().into_iter().filter(|eni| eni.kind != EniKind::Primary).collect()
}

/// The ENI that has an address.
fn eni_of(cluster: &Cluster, ip: IpAddr) -> Result<EniRecord> {
    let has = |eni: &EniRecord| eni.v4.iter().any(|own| IpAddr::V4(*own) == ip);
    secondary(cluster).into_iter().find(has).with_context(|| format!("no ENI has {ip}"))
}

/// The row of `terway-cli eni list` of an ENI.
fn row(node: &Node, eni: &str) -> Result<Value> {
    let (_, list) = json(node, &["eni", "list"])?;
    let rows = list["enis"].as_array().context("ENIs")?;
    rows.iter().find(|row| row["id"] == eni).cloned().with_context(|| format!("{eni} is not listed: {list}"))
}

fn vswitches(ids: &[&str]) -> Value {
    json!({"vswitches": {"cn-sim-a": ids}})
}

/// Codes and details of the problems that the daemon reports.
fn problems(node: &Node) -> Result<Vec<String>> {
    let problems = node.status()?.problems;
    Ok(problems.iter().map(|p| format!("{} {} {}", p.code, p.cause, p.detail)).collect())
}

fn throttled(cluster: &Cluster, on: bool) -> Result<()> {
    let limits = on.then(|| (String::new(), 0)).into_iter().collect();
    cluster.cloud().apply(AdminAction::RateLimits(limits))
}

fn outage(cluster: &Cluster, on: bool) {
    let error = FaultKind::Error { code: "ServiceUnavailable".to_owned(), status: 503 };
    let fault = Fault { action: "*".to_owned(), nth: None, probability: None, times: None, kind: error };
    cluster.cloud().set_faults(on.then_some(fault).into_iter().collect());
}

#[test]
fn vswitch_without_addresses() -> Result<()> {
    with_node(
        |options| small(options, 4),
        |cluster, node| {
            let mut running = pods(node, "a b")?;
            cluster.cloud().apply(AdminAction::Occupy { vswitch: "vsw-pods".to_owned(), leave: 0 })?;
            running.extend(fill(node, "more", 10)?);
            refused(node, "late", "TW0202", &["vsw-pods", "Add a vSwitch"])?;
            alive(cluster, &running)?;
            ensure!(problems(node)?.iter().any(|problem| problem.contains("vsw-pods")), "{:?}", problems(node)?);

            let pid = node.daemon_pid();
            node.edit_conf(vswitches(&["vsw-pods", "vsw-more"]))?;
            let cured = pod_at_last(node, "cured")?;
            ensure!(is_in(&cured, "10.0.8.0/24")?, "{:?}", cured.ips);
            ensure!(node.daemon_pid() == pid, "the daemon was restarted");
            alive(cluster, running.iter().chain([&cured]))
        },
    )
}

#[test]
fn enis_of_removed_vswitch_are_replaced() -> Result<()> {
    with_node(
        |options| {
            small(options, 2);
            options.pool = (8, 8);
        },
        |cluster, node| {
            node.wait(SETTLE, "both slots are full", |node| Ok(node.status()?.pool.unwrap_or_default().idle == 8))?;
            let stays = pod(node, "stays")?;
            let old = eni_of(cluster, stays.v4()?)?.id;
            node.edit_conf(vswitches(&["vsw-more"]))?;
            node.wait(SETTLE, "the edit is in effect", |node| {
                Ok(row(node, old.as_str())?["reason"].as_str().is_some_and(|reason| !reason.is_empty()))
            })?;
            println!("{}", row(node, old.as_str())?["reason"]);
            // The empty one goes at once, because somebody wants its slot.
            let new = pod_at_last(node, "new")?;
            ensure!(is_in(&new, "10.0.8.0/24")?, "{:?}", new.ips);
            alive(cluster, [&stays, &new])?;
            ensure!(eni_of(cluster, stays.v4()?)?.id == old, "the pod's ENI was replaced");
            node.del(&stays)?;
            node.wait(HEALS, "the other one goes with its pod", |_| {
                let left: Vec<_> = secondary(cluster).into_iter().map(|eni| (eni.id, eni.vswitch)).collect();
                ensure!(left.iter().all(|(_, vswitch)| vswitch == "vsw-more"), "{left:?}");
                Ok(true)
            })?;
            alive(cluster, [&new])
        },
    )
}

#[test]
fn enis_of_previous_instance_are_not_used() -> Result<()> {
    with_node(
        |options| small(options, 5),
        |cluster, node| {
            node.stop_daemon()?;
            let plant = |vswitch: &str, group: &str, tag: Option<&str>| {
                let known: Vec<_> = secondary(cluster).into_iter().map(|eni| eni.id).collect();
                cluster.cloud().apply(AdminAction::AttachForeignEni {
                    node: node.name().to_owned(),
                    vswitch: vswitch.to_owned(),
                    security_group: group.to_owned(),
                    tags: tag.map(|tag| (tag.to_owned(), "true".to_owned())).into_iter().collect(),
                })?;
                secondary(cluster).into_iter().find(|eni| !known.contains(&eni.id)).context("planted")
            };
            let elsewhere = plant("vsw-more", "sg-sim", None)?;
            let grouped = plant("vsw-pods", "sg-other", None)?;
            let excluded = plant("vsw-pods", "sg-sim", Some("terway.alibabacloud.com/excluded"))?;
            node.start_daemon()?;
            node.wait(SETTLE, "the daemon is ready", |node| Ok(node.status()?.ready))?;
            for (eni, word) in [(&elsewhere, "vSwitch"), (&grouped, "security group"), (&excluded, "excluded")] {
                let row = row(node, eni.id.as_str())?;
                let reason = row["reason"].as_str().unwrap_or_default();
                println!("{}: {reason}", eni.id);
                ensure!(reason.contains(word), "`{word}` is not in {row:#}");
            }
            let running = pods(node, "a b c")?;
            for pod in &running {
                let eni = eni_of(cluster, pod.v4()?)?.id;
                ensure!(![&elsewhere, &grouped, &excluded].iter().any(|old| old.id == eni), "{} is on {eni}", pod.name);
            }
            node.wait(HEALS, "those that do not match are released", |_| {
                let left = secondary(cluster);
                Ok(![&elsewhere, &grouped].iter().any(|old| left.iter().any(|eni| eni.id == old.id)))
            })?;
            let left = secondary(cluster).into_iter().find(|eni| eni.id == excluded.id).context("was touched")?;
            ensure!((&left.v4, &left.v6) == (&excluded.v4, &excluded.v6), "{left:?}");
            alive(cluster, &running)
        },
    )
}

#[test]
fn eni_quota_exceeded() -> Result<()> {
    with_node(
        |options| {
            small(options, 3);
            options.cloud = |cloud| cloud.max_enis = Some(2);
        },
        |cluster, node| {
            let running = fill(node, "p", 10)?;
            ensure!(running.len() == 4, "one ENI has room for four, not {}", running.len());
            refused(node, "late", "TW0211", &["quota"])?;
            cluster.cloud().apply(AdminAction::MaxEnis(None))?;
            let late = pod_at_last(node, "late")?;
            alive(cluster, running.iter().chain([&late]))
        },
    )
}

#[test]
fn attached_eni_without_nic_is_replaced() -> Result<()> {
    with_node(
        |options| small(options, 3),
        |cluster, node| {
            let mut running = pods(node, "a b c")?;
            let known: Vec<_> = secondary(cluster).into_iter().map(|eni| eni.id).collect();
            ensure!(known.len() == 1, "{known:?}");
            cluster.cloud().set_faults(vec![Fault::next("AttachNetworkInterface", 1, FaultKind::NoNic)]);
            // One is idle; two more need another ENI.
            node.edit_conf(json!({"min_pool_size": 3}))?;
            node.wait(SETTLE, "an ENI without NIC", |_| Ok(secondary(cluster).len() == 2))?;
            let dead = secondary(cluster).into_iter().find(|eni| !known.contains(&eni.id)).context("an ENI")?.id;
            let (mut slowest, mut rounds) = (Duration::ZERO, 0);
            let start = Instant::now();
            while secondary(cluster).iter().any(|eni| eni.id == dead) {
                ensure!(start.elapsed() < HEALS, "the dead ENI is not given up: {:?}", node.status()?.enis);
                // What a DEL gave back is idle a moment later.
                node.wait(SETTLE, "one is idle", |node| Ok(node.status()?.pool.unwrap_or_default().idle > 0))?;
                let mut pod = node.new_pod(&format!("r{rounds}"))?;
                slowest = slowest.max(node.add(&mut pod)?.elapsed);
                node.del(&pod)?;
                rounds += 1;
            }
            println!(
                "the dead one was deleted after {:?}; the slowest of {rounds} ADDs took {slowest:?}",
                start.elapsed()
            );
            ensure!(rounds > 3 && slowest < Duration::from_secs(1), "{rounds} ADDs, the slowest {slowest:?}");
            for name in ["d", "e", "f"] {
                running.push(pod_at_last(node, name)?);
            }
            alive(cluster, &running)
        },
    )
}

#[test]
fn invalid_config_edit_is_refused() -> Result<()> {
    with_node(
        |options| {
            small(options, 2);
            // Left over from the reference project.
            options.conf = json!({"enable_eip_pool": "true"});
        },
        |cluster, node| {
            let configuration = || -> Result<Value> { Ok(json(node, &["status"])?.1["configuration"].clone()) };
            let failure = |words: &[&str]| {
                node.wait(SETTLE, "the failure is shown", |_| {
                    let shown: Value = configuration()?;
                    let text = shown["failure"].to_string();
                    ensure!(words.iter().all(|word| text.contains(word)), "{words:?} are not in {shown:#}");
                    Ok(true)
                })
            };
            let healed = || {
                node.wait(SETTLE, "the failure is gone", |_| {
                    let shown: Value = configuration()?;
                    ensure!(shown["failure"].is_null(), "{shown:#}");
                    Ok(true)
                })
            };
            let warnings = configuration()?["warnings"].to_string();
            for word in ["enable_eip_pool", "ack-extend-network-controller"] {
                ensure!(warnings.contains(word), "`{word}` is not in {warnings}");
            }
            let mut running = pods(node, "a")?;
            let good = node.conf().to_string();
            let generation = configuration()?["generation"].clone();

            node.edit_conf(json!({"max_pool_size": "many"}))?;
            failure(&["max_pool_size", "many"])?;
            running.push(pod(node, "b")?);
            ensure!(configuration()?["generation"] == generation, "a refused edit is not one");
            // The last good one holds over a restart.
            node.stop_daemon()?;
            node.start_daemon()?;
            node.wait(SETTLE, "the daemon is ready", |node| Ok(node.status()?.ready))?;
            failure(&["max_pool_size"])?;
            running.push(pod(node, "c")?);
            node.edit_conf(json!({"max_pool_size": 6}))?;
            healed()?;

            node.overwrite_mounted_conf(&good[..good.len() / 2])?;
            failure(&["eni_conf"])?;
            running.push(pod(node, "d")?);
            node.edit_conf(json!({"vswitches": {"cn-sim-a": ["vsw-more"]}}))?;
            healed()?;
            running.push(pod_at_last(node, "e")?);
            ensure!(is_in(&running[4], "10.0.8.0/24")?, "{:?}", running[4].ips);
            alive(cluster, &running)
        },
    )
}

#[test]
fn running_pods_survive_cloud_throttling_and_outage() -> Result<()> {
    with_node(
        |options| {
            small(options, 3);
            options.pool = (4, 12);
            options.conf =
                json!({"ip_pool_sync_period": "1s", "backoff_override": {"": {"Duration": "200ms", "Cap": "1s"}}});
        },
        |cluster, node| {
            let mut running = pods(node, "a b")?;
            let mut number = 0;
            let mut trouble = |codes: &[&str],
                               told: &str,
                               on: &dyn Fn() -> Result<()>,
                               off: &dyn Fn() -> Result<()>|
             -> Result<()> {
                node.wait(SETTLE, "four are idle", |node| Ok(node.status()?.pool.unwrap_or_default().idle >= 4))?;
                on()?;
                let before: Vec<_> = secondary(cluster).into_iter().map(|e| (e.id, e.v4, e.v6)).collect();
                // What is idle is given out, and pods may go.
                number += 1;
                let mut fresh = node.new_pod(&format!("idle{number}"))?;
                let elapsed = node.add(&mut fresh)?.elapsed;
                ensure!(elapsed < Duration::from_secs(1), "an idle address took {elapsed:?}");
                node.del(&running.remove(0))?;
                running.push(fresh);
                // Several comparisons with the cloud fail meanwhile.
                std::thread::sleep(Duration::from_millis(1500));
                let calls = cluster.cloud().calls();
                ensure!(calls.values().any(|c| codes.iter().any(|code| c.refused.contains_key(*code))), "{calls:?}");
                let after: Vec<_> = secondary(cluster).into_iter().map(|e| (e.id, e.v4, e.v6)).collect();
                ensure!(before == after, "something was freed or made: {before:?} {after:?}");
                // The status says it while the client still repeats its call, not only when that gives up.
                let problems = node.status()?.problems;
                ensure!(problems.iter().any(|p| p.code == told), "{told}: {problems:?}");
                alive(cluster, &running)?;
                off()?;
                running.push(pod_at_last(node, &format!("healed{number}"))?);
                alive(cluster, &running)
            };
            trouble(&["Throttling.User"], "TW0204", &|| throttled(cluster, true), &|| throttled(cluster, false))?;
            let switch = |on| {
                outage(cluster, on);
                Ok(())
            };
            trouble(&["ServiceUnavailable"], "TW0225", &|| switch(true), &|| switch(false))
        },
    )
}

#[test]
fn start_without_metadata_service() -> Result<()> {
    with_node(
        |options| {
            small(options, 2);
            options.pool = (3, 5);
            options.conf = json!({"access_key": null, "access_secret": null});
            options.cloud = |cloud| {
                for instance in &mut cloud.instances {
                    instance.role = Some("terway".to_owned());
                }
            };
        },
        |cluster, node| {
            let mut running = pods(node, "a")?;
            cluster.cloud().set_faults(vec![Fault {
                action: "metadata".to_owned(),
                nth: None,
                probability: None,
                times: None,
                kind: FaultKind::Error { code: String::new(), status: 503 },
            }]);
            node.stop_daemon()?;
            node.start_daemon()?;
            node.wait(SETTLE, "it starts by what it knows", |node| Ok(node.status()?.ready))?;
            running.push(pod(node, "b")?);
            alive(cluster, &running)?;
            cluster.cloud().set_faults(Vec::new());
            node.wait(SETTLE, "its pool is filled", |node| Ok(node.status()?.pool.unwrap_or_default().idle >= 3))?;
            cluster.cloud().expire_role_keys();
            cluster.cloud().forget_metadata_tokens();
            for name in ["c", "d", "e", "f"] {
                running.push(pod_at_last(node, name)?);
            }
            let refused: u64 =
                cluster.cloud().calls().values().filter_map(|c| c.refused.get("InvalidSecurityToken.Expired")).sum();
            println!("calls refused for the expired keys: {refused}");
            alive(cluster, &running)
        },
    )
}

#[test]
fn address_released_in_console_is_reported() -> Result<()> {
    with_node(
        |options| {
            small(options, 2);
            options.addresses_per_adapter = 8;
            options.pool = (1, 8);
            options.conf = json!({"ip_pool_sync_period": "1s"});
        },
        |cluster, node| {
            let running = pods(node, "a b")?;
            let eni = eni_of(cluster, running[0].v4()?)?;
            // A leaked address is taken in.
            let known = node.status()?.pool.unwrap_or_default();
            cluster.cloud().apply(AdminAction::Assign { eni: eni.id.to_string() })?;
            node.wait(HEALS, "the leaked address is the pool's", |node| {
                let pool = node.status()?.pool.unwrap_or_default();
                ensure!(pool.idle > known.idle, "{pool:?} after {known:?}");
                Ok(true)
            })?;
            // One of the two that is not the ENI's primary address, which cannot be unassigned.
            let primary = eni.v4.first().copied().map(IpAddr::V4);
            let (victim, other) =
                if Some(running[0].v4()?) == primary { (&running[1], &running[0]) } else { (&running[0], &running[1]) };
            let gone = victim.v4()?;
            let reported = |code: &str, name: &str| {
                node.wait(HEALS, "the pod is reported", |node| {
                    let problems = problems(node)?;
                    let named = format!("default/{name}");
                    ensure!(problems.iter().any(|p| p.starts_with(code) && p.contains(&named)), "{problems:?}");
                    let (exit, text) = cli(node, &["mapping"])?;
                    ensure!(exit == 1 && text.contains(&named), "{exit}: {text}");
                    Ok(true)
                })
            };
            cluster.cloud().apply(AdminAction::Unassign { eni: eni.id.to_string(), address: gone.to_string() })?;
            reported("TW0234", &victim.name)?;
            alive(cluster, [other])?;
            node.del(victim)?;
            let next = fill(node, "next", 20)?;
            ensure!(next.iter().all(|pod| pod.ips.iter().all(|ip| *ip != gone)), "{gone} was given out again");
            ensure!(next.len() >= 8, "{} pods found room", next.len());
            alive(cluster, next.iter().chain([other]))?;

            cluster.cloud().apply(AdminAction::DetachEni { eni: eni.id.to_string() })?;
            reported("TW0233", &other.name)?;
            let (kept, lost): (Vec<_>, Vec<_>) = next
                .iter()
                .partition(|pod| pod.v4().is_ok_and(|ip| eni_of(cluster, ip).is_ok_and(|on| on.id != eni.id)));
            alive(cluster, kept)?;
            for pod in lost.into_iter().chain([other]) {
                node.del(pod)?;
            }
            let fresh = pod_at_last(node, "fresh")?;
            alive(cluster, [&fresh])
        },
    )
}

#[test]
fn addresses_of_deleted_pods_are_released() -> Result<()> {
    with_node(
        |options| {
            small(options, 1);
            options.pool = (0, 4);
        },
        |cluster, node| {
            let mut running = pods(node, "a b c d")?;
            refused(node, "late", "TW0", &[])?;
            node.kill_daemon()?;
            // Two namespaces go without a DEL, as after a crash of the runtime.
            let gone: Vec<Pod> = running.drain(..2).collect();
            let freed: Vec<IpAddr> = gone.iter().flat_map(|pod| pod.ips.clone()).collect();
            drop(gone);
            node.start_daemon()?;
            node.wait(SETTLE, "two are left", |node| Ok(node.status()?.ready && node.list_pods()?.len() == 2))?;
            let again = [pod_at_last(node, "e")?, pod_at_last(node, "f")?];
            ensure!(again.iter().flat_map(|pod| &pod.ips).all(|ip| freed.contains(ip)), "{freed:?} {again:?}");
            // All of them are there now: nothing is free, over another crash as well.
            node.kill_daemon()?;
            node.start_daemon()?;
            node.wait(SETTLE, "it is up", |node| Ok(node.status()?.ready && node.list_pods()?.len() == 4))?;
            refused(node, "later", "TW0", &[])?;
            alive(cluster, running.iter().chain(&again))
        },
    )
}

#[test]
fn node_label_selects_vswitch() -> Result<()> {
    with_node(
        |options| small(options, 3),
        |cluster, node| {
            let mut running = pods(node, "a")?;
            node.set_overlay(&vswitches(&["vsw-more"]))?;
            node.wait(SETTLE, "the overlay is taken", |node| {
                Ok(json(node, &["status"])?.1["configuration"]["generation"].as_u64() > Some(1))
            })?;
            running.push(pod(node, "b")?);
            ensure!(is_in(&running[1], "10.0.8.0/24")?, "{:?}", running[1].ips);
            // And back: the label is taken off.
            node.set_overlay(&json!({}))?;
            node.wait(SETTLE, "the overlay is taken", |node| {
                Ok(json(node, &["status"])?.1["configuration"]["generation"].as_u64() > Some(2))
            })?;
            running.push(pod(node, "c")?);
            ensure!(is_in(&running[2], "10.0.4.0/22")?, "{:?}", running[2].ips);
            alive(cluster, &running)
        },
    )
}

#[test]
fn pod_to_pod_with_ip_prefixes() -> Result<()> {
    with_cluster(
        |options| {
            small(options, 2);
            options.nodes = 2;
            options.pool = (0, 16);
            options.conf = json!({"enable_ip_prefix": true});
        },
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let all = [pod(n1, "a")?, pod(n1, "b")?, pod(n2, "c")?];
            ensure!(
                secondary(cluster).iter().any(|eni| !eni.v4_prefixes.is_empty() && !eni.v6_prefixes.is_empty()),
                "{:?}",
                secondary(cluster)
            );
            let _servers = all.iter().map(|pod| Echo::start(&pod.ns)).collect::<Result<Vec<_>>>()?;
            for from in &all {
                for to in all.iter().filter(|to| to.name != from.name) {
                    for ip in [to.v4()?, to.v6()?] {
                        probe::ping(&from.ns, ip, &[]).with_context(|| format!("{} to {}", from.name, to.name))?;
                        probe::tcp(&from.ns, ip, 50_000)?;
                    }
                }
            }
            alive(cluster, &all)?;
            // From now on there is no free block of sixteen: single addresses serve as well.
            cluster.cloud().apply(AdminAction::Fragment { vswitch: "vsw-pods".to_owned() })?;
            let (mut more, mut singles) = (Vec::new(), 0);
            for number in 0..24 {
                more.push(pod_at_last(n1, &format!("s{number}"))?);
                let ip = more[number].v4()?;
                singles += usize::from(eni_of(cluster, ip).is_ok());
                if singles == 2 {
                    break;
                }
            }
            ensure!(singles == 2, "{} pods, {singles} of them on single addresses", more.len());
            alive(cluster, &more[more.len() - 2..])
        },
    )
}
