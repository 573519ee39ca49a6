//! From objects to maps: the real daemon in a node's namespace, with 30 000 Services of four endpoints in its folder.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use terway_sim::node::Node;

use crate::figures::{Bar, Better, Figure, percentile};

/// Services, each with a ClusterIP and one port.
const SERVICES: usize = 30_000;
/// Endpoints of each.
const ENDPOINTS: usize = 4;
/// Services in one file.
const PER_FILE: usize = 250;
/// Changes of one endpoint that are timed.
const CHANGES: usize = 200;
/// So long after a sync the daemon has nothing more to do.
const SETTLED: Duration = Duration::from_secs(3);
/// Longest time until the daemon has read everything.
const PATIENCE: Duration = Duration::from_secs(240);

/// The address of a Service.
pub(super) fn address(i: usize) -> Ipv4Addr {
    let [.., high, low] = (i / 250 * 256 + i % 250 + 1).to_be_bytes();
    Ipv4Addr::new(10, 96, high, low)
}

/// A Service and its slice, as two items of a list; `turn` changes its last endpoint.
fn items(i: usize, turn: usize) -> String {
    let [_, _, high, low] = address(i).octets();
    let mut text = format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"s{i}","namespace":"bench"}},"spec":{{"type":"ClusterIP","clusterIP":"10.96.{high}.{low}","clusterIPs":["10.96.{high}.{low}"],"ipFamilies":["IPv4"],"ports":[{{"name":"web","protocol":"TCP","port":80,"targetPort":8080}}]}}}},
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s{i}-x","namespace":"bench","labels":{{"kubernetes.io/service-name":"s{i}"}}}},"addressType":"IPv4","ports":[{{"name":"web","protocol":"TCP","port":8080}}],"endpoints":["#
    );
    for e in 0..ENDPOINTS {
        let net = if e + 1 == ENDPOINTS { 20 + turn % 2 } else { 10 + e };
        let comma = if e == 0 { "" } else { "," };
        // Writing into a string does not fail.
        let _ = write!(
            text,
            r#"{comma}{{"addresses":["172.{net}.{high}.{low}"],"nodeName":"n2","conditions":{{"ready":true}}}}"#
        );
    }
    text.push_str("]}");
    text
}

/// Writes a file as a whole.
fn put(node: &Node, name: &str, items: &[String]) -> Result<()> {
    let text = format!(r#"{{"apiVersion":"v1","kind":"List","items":[{}]}}"#, items.join(",\n"));
    let folder = node.objects_dir();
    let fresh = folder.join(format!("{name}.new"));
    fs::write(&fresh, text)?;
    Ok(fs::rename(fresh, folder.join(format!("{name}.json")))?)
}

/// Writes these Services.
pub(super) fn fill(node: &Node, numbers: Range<usize>) -> Result<()> {
    for first in numbers.clone().step_by(PER_FILE) {
        let all: Vec<String> = (first..numbers.end.min(first + PER_FILE)).map(|i| items(i, 0)).collect();
        put(node, &format!("f{first}"), &all)?;
    }
    Ok(())
}

/// How many plans the daemon has carried out, and how many seconds that took altogether, from the arrival of the objects.
fn syncs(node: &Node) -> Result<(f64, f64)> {
    let text = node.netns().run(|| -> Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:19099")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    let value = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.with_context(|| format!("no {name}"))?.trim().parse().with_context(|| name.to_owned())
    };
    Ok((value("terway_service_sync_seconds_count")?, value("terway_service_sync_seconds_sum")?))
}

fn memory(node: &Node, field: &str) -> Result<f64> {
    let pid = node.daemon_pid().context("the daemon does not run")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let found = status.lines().find_map(|line| line.strip_prefix(field)?.trim().split(' ').next()?.parse::<f64>().ok());
    Ok(found.with_context(|| format!("no {field}"))? / 1024.0)
}

fn figure(name: &str, value: f64, bars: Vec<Bar>) -> Figure {
    Figure { bench: "svc", name: name.to_owned(), value, anchor: None, better: Better::Less, bars }
}

/// Waits until the daemon has carried out more than `before` plans; what the others took, in milliseconds.
fn next(node: &Node, before: (f64, f64), limit: Duration) -> Result<((f64, f64), f64)> {
    let deadline = Instant::now() + limit;
    loop {
        let now = syncs(node).unwrap_or(before);
        if now.0 > before.0 {
            return Ok((now, (now.1 - before.1) / (now.0 - before.0) * 1e3));
        }
        ensure!(Instant::now() < deadline, "nothing was written into the maps within {limit:?}: {}", node.log_tail(20));
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// What the daemon that runs says of its first sync.
fn first_sync(node: &Node) -> Result<String> {
    let mut line = String::new();
    node.wait(PATIENCE, "the first sync is told", |node| {
        let log = node.log_tail(usize::MAX);
        let own = log.rsplit("restored attachments=").next().unwrap_or_default();
        line = own.lines().find(|line| line.contains("Services are in force")).unwrap_or_default().to_owned();
        Ok(!line.is_empty())
    })?;
    Ok(line)
}

/// Measures on a node whose daemon runs and has no objects yet.
///
/// # Errors
/// When the daemon does not serve them.
pub fn measure(node: &Node) -> Result<Vec<Figure>> {
    let idle = memory(node, "VmRSS:")?;
    node.stop_daemon()?;
    fill(node, 1..SERVICES)?;
    put(node, "hot", &[items(0, 0)])?;
    let start = Instant::now();
    node.start_daemon()?;
    let (mut seen, full) = next(node, (0.0, 0.0), PATIENCE)?;
    let ready = start.elapsed();
    // What the first sync left for later is done by then, and free memory given back.
    std::thread::sleep(SETTLED);
    let (rss, peak) = (memory(node, "VmRSS:")?, memory(node, "VmHWM:")?);
    seen = syncs(node).unwrap_or(seen);
    let mut changes = Vec::with_capacity(CHANGES);
    for turn in 1..=CHANGES {
        put(node, "hot", &[items(0, turn)])?;
        let (now, took) = next(node, seen, Duration::from_secs(10))?;
        changes.push(took);
        seen = now;
    }
    let after = memory(node, "VmRSS:")?;
    // A restart over maps that are right already, and hold nothing that still waited for its removal.
    std::thread::sleep(SETTLED);
    node.stop_daemon()?;
    node.start_daemon()?;
    node.wait_ready(PATIENCE)?;
    let line = first_sync(node)?;
    ensure!(line.contains(" writes=0 ") && line.contains(" for_later=0 "), "a restart has written: {line}");
    std::thread::sleep(SETTLED);
    let again = memory(node, "VmRSS:")?;
    let listed = node.cli(&["svc", "show", "bench/s29999", "-o", "json"])?;
    ensure!(listed.contains("10.96.119.250"), "{listed}");
    Ok(vec![
        figure("full_sync_30k_ms", full, vec![Bar::AtMost(2000.0)]),
        figure("one_change_ms", percentile(&changes, 50.0), vec![Bar::AtMost(2.0)]),
        figure("one_change_p99_ms", percentile(&changes, 99.0), vec![]),
        figure("daemon_rss_30k_mib", rss.max(after), vec![Bar::AtMost(150.0)]),
        figure("daemon_rss_peak_30k_mib", peak, vec![]),
        figure("daemon_rss_restarted_30k_mib", again, vec![Bar::AtMost(150.0)]),
        figure("daemon_rss_idle_mib", idle, vec![]),
        figure("start_to_served_30k_ms", ready.as_secs_f64() * 1e3, vec![]),
    ])
}
