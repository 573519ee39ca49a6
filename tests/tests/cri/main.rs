//! The cri rung: a real containerd calls our plugin. Debian's containerd 1.6, and 2.x, which speaks CNI 1.1.0 and calls STATUS.

mod daemonset;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::containerd::{cache_dir, fetch_containerd_2};
use terway_sim::cri::{Cri, PodSpec};
use terway_sim::leftovers;
use terway_sim::netns::NetNs;
use terway_sim::node::{Node, ServiceSpec};
use terway_sim::probe::{self, Echo};

const SETTLE: Duration = Duration::from_secs(20);

fn with_containerd(bin_dir: PathBuf, test: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    let mut options = Options::new()?;
    options.containerd = Some(bin_dir);
    if let Some(obstacle) = Cluster::obstacle(&options) {
        println!("SKIP: {obstacle}");
        return Ok(());
    }
    let cluster = Cluster::start(&options)?;
    test(&cluster)?;
    let spoofed = cluster.vpc().spoofed()?;
    ensure!(spoofed.total() == 0, "{spoofed:?}");
    cluster.finish()
}

fn cri(node: &Node) -> Result<&Cri> {
    Ok(node.containerd()?.cri())
}

fn network_ready(node: &Node, wanted: bool) -> Result<()> {
    node.wait(Duration::from_secs(5), "NetworkReady changes", |node| {
        let readiness = cri(node)?.readiness()?;
        ensure!(readiness.network == wanted, "NetworkReady is {}: {}", readiness.network, readiness.message);
        Ok(true)
    })
}

/// What holds with every containerd.
fn pods_live_and_die(cluster: &Cluster) -> Result<()> {
    let (n1, n2) = (cluster.node(1), cluster.node(2));
    let before = [leftovers::node(n1)?, leftovers::node(n2)?];
    for node in cluster.nodes() {
        network_ready(node, true)?;
    }
    // Eight at once, four on each node.
    let start = Instant::now();
    let specs: Vec<(&Node, PodSpec)> =
        (0..8).map(|n| (if n % 2 == 0 { n1 } else { n2 }, PodSpec::new("team", &format!("web-{n}")))).collect();
    let sandboxes: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = specs.iter().map(|(node, spec)| scope.spawn(|| cri(node)?.run_pod(spec))).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<_>>()
    })?;
    println!("eight pods at once in {:?}", start.elapsed());
    let ips = specs
        .iter()
        .zip(&sandboxes)
        .map(|((node, _), sandbox)| Ok(cri(node)?.pod_status(sandbox)?.ips))
        .collect::<Result<Vec<_>>>()?;
    for ips in &ips {
        ensure!(ips.len() == 2 && ips[0].is_ipv4() && ips[1].is_ipv6(), "{ips:?}");
    }
    // From a container of the first to all others.
    let container = cri(n1)?.start_container(&sandboxes[0], &specs[0].1, "main", &["/pause"])?;
    for ip in ips[1..].iter().flatten() {
        let ping = cri(n1)?.exec(&container, &["ping", "-c", "1", "-W", "1", &ip.to_string()])?;
        ensure!(ping.code == 0, "{ip}: {}", ping.output);
    }
    // The daemon knows the pods by name.
    let listed = n1.list_pods()?;
    let names: Vec<_> = listed.iter().filter_map(|pod| Some(pod.pod.as_ref()?.name.clone())).collect();
    ensure!(listed.len() == 4 && names.contains(&"web-2".to_owned()), "{names:?}");
    // A pod on the node's network gets none of ours.
    let mut host = PodSpec::new("team", "agent");
    host.host_network = true;
    let sandbox = cri(n1)?.run_pod(&host)?;
    ensure!(n1.list_pods()?.len() == 4, "a host network pod was given an address");
    cri(n1)?.stop_pod(&sandbox)?;
    cri(n1)?.remove_pod(&sandbox)?;
    // Stop twice, remove: three DELs. The last pod is removed without having been stopped.
    for (index, ((node, _), sandbox)) in specs.iter().zip(&sandboxes).enumerate() {
        if index < 7 {
            cri(node)?.stop_pod(sandbox)?;
            cri(node)?.stop_pod(sandbox)?;
        }
        cri(node)?.remove_pod(sandbox)?;
    }
    leftovers::wait_until_pods_removed(n1, &before[0], SETTLE)?;
    leftovers::wait_until_pods_removed(n2, &before[1], SETTLE)
}

/// A container is in its node's cgroup, so its connections to Services are made straight to a backend; who is in the pod's network but not
/// in the cgroup has the packets' path.
fn containers_connect_at_the_socket(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let before = leftovers::node(node)?;
    let cri = cri(node)?;
    let specs = ["server", "client"].map(|name| PodSpec::new("team", name));
    let server = cri.run_pod(&specs[0])?;
    let client = cri.run_pod(&specs[1])?;
    let ns = |sandbox: &str| -> Result<NetNs> {
        NetNs::open(&cri.pod_status(sandbox)?.netns.context("the runtime does not tell the namespace")?)
    };
    let echo = Echo::start(&ns(&server)?)?;
    let backends = cri.pod_status(&server)?.ips;
    let service = ServiceSpec {
        name: "web".to_owned(),
        cluster_ips: vec!["10.96.0.80".parse()?, "fd96::80".parse()?],
        ports: vec![(80, probe::PORT)],
        endpoints: vec![(backends.clone(), "n1".to_owned())],
    };
    node.put_service(&service)?;
    node.wait(Duration::from_secs(5), "the Service is served", |node| {
        Ok(node.cli(&["svc", "list"])?.matches("1/1").count() >= 4)
    })?;
    let container = cri.start_container(&client, &specs[1], "main", &["/pause"])?;
    let flows = || node.cli(&["ct", "list", "--pod", "team/client", "--proto", "tcp"]);
    for (vip, backend) in service.cluster_ips.iter().zip(&backends) {
        let ask = format!("echo question | nc -w 2 {vip} 80");
        let asked = cri.exec(&container, &["ash", "-c", &ask])?;
        ensure!(asked.output.contains("question"), "{vip}: {} {}", asked.code, asked.output);
        let flows = flows()?;
        let direct = SocketAddr::new(*backend, probe::PORT).to_string();
        let translated = SocketAddr::new(*vip, 80).to_string();
        ensure!(flows.contains(&direct) && !flows.contains(&translated), "not at the socket:\n{flows}");
    }
    for vip in &service.cluster_ips {
        let translated = SocketAddr::new(*vip, 80);
        probe::tcp_at(&ns(&client)?, translated, 10)?;
        let flows = flows()?;
        ensure!(flows.contains(&translated.to_string()), "not by packets:\n{flows}");
    }
    node.remove_service("web")?;
    drop(echo);
    for sandbox in [server, client] {
        cri.stop_pod(&sandbox)?;
        cri.remove_pod(&sandbox)?;
    }
    leftovers::wait_until_pods_removed(node, &before, SETTLE)
}

/// Failures reach the user through the runtime, and deletions pass without the daemon.
fn without_the_daemon(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let before = leftovers::node(node)?;
    let cri = cri(node)?;
    let spec = PodSpec::new("team", "stays");
    let sandbox = cri.run_pod(&spec)?;
    node.kill_daemon()?;
    let error = cri.run_pod(&PodSpec::new("team", "fails")).err().context("a pod was run without the daemon")?;
    let text = format!("{error:#}");
    ensure!(text.contains("TW0101") && text.contains("terway"), "{text}");
    cri.stop_pod(&sandbox)?;
    cri.remove_pod(&sandbox)?;
    node.start_daemon()?;
    node.wait_ready(Duration::from_secs(20))?;
    // The same pod again, as the kubelet tries again.
    let sandbox = cri.run_pod(&PodSpec::new("team", "fails"))?;
    cri.stop_pod(&sandbox)?;
    cri.remove_pod(&sandbox)?;
    for id in cri.list_pods()? {
        cri.stop_pod(&id)?;
        cri.remove_pod(&id)?;
    }
    leftovers::wait_until_pods_removed(node, &before, SETTLE)
}

#[test]
fn containerd_of_debian() -> Result<()> {
    if !Path::new("/usr/bin/containerd").exists() {
        println!("SKIP: containerd is not installed");
        return Ok(());
    }
    with_containerd("/usr/bin".into(), |cluster| {
        pods_live_and_die(cluster)?;
        containers_connect_at_the_socket(cluster)?;
        daemonset::daemon_runs_in_its_container(cluster)?;
        without_the_daemon(cluster)
    })
}

#[test]
fn containerd_2() -> Result<()> {
    let bin_dir = match fetch_containerd_2(&cache_dir()) {
        Ok(bin_dir) => bin_dir,
        Err(reason) => {
            println!("SKIP: containerd 2 cannot be had here: {reason:#}");
            return Ok(());
        }
    };
    with_containerd(bin_dir, |cluster| {
        pods_live_and_die(cluster)?;
        containers_connect_at_the_socket(cluster)?;
        daemonset::daemon_runs_in_its_container(cluster)?;
        without_the_daemon(cluster)?;
        // CNI 1.1.0: STATUS tells the kubelet through the runtime what the daemon knows.
        let node = cluster.node(1);
        node.kill_daemon()?;
        network_ready(node, false)?;
        let message = cri(node)?.readiness()?.message;
        ensure!(message.contains("TW0101"), "{message}");
        node.start_daemon()?;
        node.wait_ready(Duration::from_secs(20))?;
        network_ready(node, true)
    })
}
