//! What others break on a node is told by `terway-cli mapping`, and set right by the audit; what is not ours is left alone.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use serde_json::Value;
use terway_sim::cluster::Options;
use terway_sim::leftovers;
use terway_sim::node::{self, Node};
use terway_sim::probe;

use super::{SETTLE, agreement, baseline, fixed_pool, pod, with_cluster};

/// Exit code and stdout of `terway-cli`.
pub(super) fn cli(node: &Node, arguments: &[&str]) -> Result<(i32, String)> {
    let mut command = node.netns().command(node::bin_dir()?.join("terway-cli"));
    command.arg("--socket").arg(node.socket()).args(arguments).stdin(Stdio::null());
    let output = command.output().context("run terway-cli")?;
    let text = String::from_utf8(output.stdout)?;
    Ok((output.status.code().unwrap_or(-1), text))
}

pub(super) fn json(node: &Node, arguments: &[&str]) -> Result<(i32, Value)> {
    let (code, text) = cli(node, &[arguments, &["-o", "json"]].concat())?;
    Ok((code, serde_json::from_str(&text).with_context(|| format!("{arguments:?}: {code}: {text}"))?))
}

/// The kinds of mismatches that the comparison finds.
fn kinds(node: &Node) -> Result<Vec<String>> {
    let (_, mapping) = json(node, &["mapping"])?;
    let findings = mapping["findings"].as_array().context("findings")?;
    let mut kinds: Vec<String> = findings
        .iter()
        .filter(|finding| finding["mismatch"] == true)
        .filter_map(|finding| Some(finding["kind"].as_str()?.to_owned()))
        .collect();
    kinds.sort();
    kinds.dedup();
    Ok(kinds)
}

fn one_node(audit: u64) -> impl FnOnce(&mut Options) {
    move |options| {
        options.nodes = 1;
        options.adapters = 2;
        options.audit = audit;
        fixed_pool(options);
    }
}

/// The host end of a pod, its index, and its ENI's table.
fn host_end(node: &Node, name: &str) -> Result<(String, u32, u32)> {
    let (_, pods) = json(node, &["list"])?;
    let row = pods.as_array().context("a list")?.iter().find(|row| row["name"] == name).context("the pod is listed")?;
    let dev = row["hostInterface"].as_str().context("an interface")?.to_owned();
    let index = |dev: &str| -> Result<u32> {
        let line = node.netns().output("ip", &["-o", "link", "show", "dev", dev])?;
        Ok(line.split(':').next().context("an index")?.trim().parse()?)
    };
    let eni = node.status()?.enis.into_iter().next().context("an ENI")?;
    Ok((dev.clone(), index(&dev)?, 1000 + index(&eni.ifname)?))
}

/// Deletes a pod's entry from the datapath's map, behind the daemon's back.
fn forget_endpoint(node: &Node, ifindex: u32) -> Result<()> {
    let pin = node.bpffs().join("terway").join(terway_abi::PIN_DIR).join(terway_abi::names::ENDPOINTS);
    let mut map: HashMap<_, u32, terway_abi::Endpoint> = Map::HashMap(MapData::from_pin(pin)?).try_into()?;
    map.remove(&ifindex).context("the entry was there")
}

#[test]
fn audit_repairs_links_rules_and_routes() -> Result<()> {
    with_cluster(one_node(1), |cluster| {
        let node = cluster.node(1);
        let before = baseline(node, 15)?;
        let outside = cluster.external_addresses().0;
        let (a, b) = (pod(node, "a")?, pod(node, "b")?);
        let (dev, index, table) = host_end(node, "a")?;
        let (v4, v6) = (a.v4()?.to_string(), a.v6()?.to_string());
        let table = table.to_string();
        let run = |line: &str| -> Result<()> {
            let words: Vec<&str> = line.split(' ').collect();
            node.netns().output(words[0], &words[1..]).map(drop).with_context(|| line.to_owned())
        };
        let healed = |what: &str| -> Result<()> {
            node.wait(Duration::from_secs(15), what, |node| Ok(kinds(node)?.is_empty()))?;
            for pod in [&a, &b] {
                probe::ping(&pod.ns, outside, &[]).with_context(|| what.to_owned())?;
            }
            node.check(&a).with_context(|| what.to_owned()).map(drop)
        };
        healed("at first")?;
        for line in [
            format!("ip rule del from {v4} lookup {table} pref 2048"),
            format!("ip -6 rule del to {v6} lookup main pref 512"),
            format!("ip route del {v4} dev {dev}"),
            format!("ip neigh del {v4} dev {dev}"),
            format!("ip link set {dev} mtu 1400"),
            format!("ip link set {dev} down"),
            format!("ip route del default table {table}"),
            format!("tc qdisc del dev {dev} clsact"),
        ] {
            run(&line)?;
            healed(&line)?;
        }
        forget_endpoint(node, index)?;
        healed("an endpoint")?;

        // Leftovers of ours go; what looks alike and is not ours stays.
        run("ip link add caliorphan type veth peer name orphan0")?;
        run("ip link set caliorphan alias terway:terway/nobody/eth0")?;
        run("ip rule add from 10.9.9.9 lookup 1999 pref 2048 protocol kernel")?;
        run("ip link add calistranger type veth peer name stranger0")?;
        run("ip rule add from 10.9.9.8 lookup 1999 pref 2048")?;
        node.wait(Duration::from_secs(15), "leftovers are removed", |node| {
            let links = node.netns().output("ip", &["-o", "link"])?;
            let rules = node.netns().output("ip", &["rule"])?;
            ensure!(links.contains("calistranger") && rules.contains("10.9.9.8"), "foreign things: {links}\n{rules}");
            Ok(!links.contains("caliorphan") && !rules.contains("10.9.9.9"))
        })?;
        run("ip link del calistranger")?;
        run("ip rule del from 10.9.9.8 lookup 1999 pref 2048")?;

        let metrics = node.netns().run(|| metrics("127.0.0.1:19099"))??;
        for line in [
            r#"terway_reconcile_findings{kind="rule-missing"} 0"#,
            r#"terway_reconcile_corrections_total{action="remove"} 2"#,
        ] {
            ensure!(metrics.contains(line), "{line} is not among\n{metrics}");
        }
        // A pod that went without a DEL is found by the audit, too.
        drop(b);
        node.wait(SETTLE, "one pod is left", |node| Ok(node.list_pods()?.len() == 1))?;
        node.del(&a)?;
        leftovers::wait_until_restored(node, &before, SETTLE)?;
        agreement(cluster, node)
    })
}

/// With the audit an hour away, only the events of the deletions can lead to their repair.
#[test]
fn deleted_rules_routes_and_addresses_are_repaired_on_rtnetlink_events() -> Result<()> {
    with_cluster(one_node(3600), |cluster| {
        let node = cluster.node(1);
        baseline(node, 15)?;
        let a = pod(node, "a")?;
        let (dev, _, table) = host_end(node, "a")?;
        let (v4, v6) = (a.v4()?.to_string(), a.v6()?.to_string());
        let eni = node.status()?.enis.into_iter().next().context("an ENI")?.ifname;
        let show = |line: &str| node.netns().output("ip", &line.split(' ').collect::<Vec<_>>());
        let addresses = show(&format!("-o -4 addr show dev {eni}"))?;
        let address = addresses.split_whitespace().nth(3).context("the ENI has an address")?.to_owned();
        for (delete, query, entry) in [
            (
                format!("rule del from {v4} lookup {table} pref 2048"),
                "rule".to_owned(),
                format!("from {v4} lookup {table}"),
            ),
            (format!("-6 rule del to {v6} lookup main pref 512"), "-6 rule".to_owned(), format!("to {v6} lookup main")),
            (format!("route del {v4} dev {dev}"), "route".to_owned(), format!("{v4} dev {dev}")),
            (format!("-6 route del {v6} dev {dev}"), "-6 route".to_owned(), format!("{v6} dev {dev}")),
            (format!("route del default table {table}"), format!("route show table {table}"), "default".to_owned()),
            (format!("addr del {address} dev {eni}"), format!("-o addr show dev {eni}"), format!("inet {address} ")),
        ] {
            ensure!(show(&query)?.contains(&entry), "{entry} is not among\n{}", show(&query)?);
            show(&delete)?;
            let deleted = Instant::now();
            node.wait(Duration::from_secs(60), &delete, |_| Ok(show(&query)?.contains(&entry)))?;
            println!("repaired after {:?}: {delete}", deleted.elapsed());
        }
        node.wait(Duration::from_secs(60), "everything is as planned", |node| Ok(kinds(node)?.is_empty()))?;
        probe::ping(&a.ns, cluster.external_addresses().0, &[])?;
        node.del(&a)?;
        Ok(())
    })
}

fn metrics(address: &str) -> Result<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn cli_mapping_shows_differences() -> Result<()> {
    with_cluster(one_node(3600), |cluster| {
        let node = cluster.node(1);
        baseline(node, 15)?;
        let a = pod(node, "a")?;
        let v4 = a.v4()?.to_string();
        let (dev, index, _) = host_end(node, "a")?;
        for good in [&["status"][..], &["mapping"], &["metadata"], &["eni", "list"], &["show"], &["list", "-o", "wide"]]
        {
            let (code, text) = cli(node, good)?;
            ensure!(code == 0 && !text.is_empty(), "{good:?}: {code}: {text}");
        }

        let (code, enis) = json(node, &["eni", "list"])?;
        let roles: Vec<&str> =
            enis["enis"].as_array().context("ENIs")?.iter().filter_map(|e| e["role"].as_str()).collect();
        ensure!(code == 0 && roles == ["primary", "pods"], "{code}: {enis:#}");
        let eni = &enis["enis"][1];
        ensure!(eni["used"] == 2 && eni["status"] == "InUse" && eni["interface"] == "eth1", "{eni:#}");
        ensure!(enis["vswitches"].as_array().is_some_and(|v| v.iter().all(|v| v["available"].is_u64())), "{enis:#}");

        let (code, metadata) = json(node, &["metadata"])?;
        ensure!(code == 0 && metadata["nics"].as_array().is_some_and(|nics| nics.len() == 2), "{code}: {metadata:#}");
        ensure!(metadata["nics"][0]["primary"] == true && metadata["nics"][1]["eni"] == eni["id"], "{metadata:#}");

        let (code, shown) = json(node, &["show", "address", &v4])?;
        ensure!(code == 0 && shown["pod"]["name"] == "a" && shown["eni"] == eni["id"], "{code}: {shown:#}");
        let vswitch = eni["vswitch"].as_str().context("a vSwitch")?;
        ensure!(json(node, &["show", "vswitch", vswitch])?.1["eniIDs"].as_array().is_some_and(|ids| !ids.is_empty()));

        // Deleted rules and routes would be repaired at once; these wait for the next audit.
        node.netns().output("ip", &["neigh", "del", &v4, "dev", &dev])?;
        node.netns().output("ip", &["link", "set", &dev, "mtu", "1400"])?;
        forget_endpoint(node, index)?;
        ensure!(kinds(node)? == ["endpoint-missing", "link-differs", "neighbour-missing"], "{:?}", kinds(node)?);
        let (code, text) = cli(node, &["mapping"])?;
        ensure!(code == 1 && text.contains("WRONG") && text.contains("neighbour-missing"), "{code}: {text}");
        let (code, text) = cli(node, &["show", "pod", &format!("{}/a", namespace(node)?)])?;
        ensure!(code == 1 && text.contains("link WRONG"), "{code}: {text}");

        ensure!(cli(node, &["show", "eni", "eni-unknown"])?.0 == 1);
        ensure!(cli(node, &["show", "pod", "no-slash"])?.0 == 2);
        node.stop_daemon()?;
        ensure!(cli(node, &["status"])?.0 == 3);
        node.start_daemon()?;
        node.wait_ready(SETTLE)?;
        // What was missing is written again when the pod is adopted.
        ensure!(!kinds(node)?.contains(&"endpoint-missing".to_owned()), "{:?}", kinds(node)?);
        node.del(&a)?;
        Ok(())
    })
}

fn namespace(node: &Node) -> Result<String> {
    let (_, pods) = json(node, &["list"])?;
    Ok(pods[0]["namespace"].as_str().context("a namespace")?.to_owned())
}
