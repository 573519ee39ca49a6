//! The checks of the demo, in the order in which they are told.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Report;
use crate::cluster::Cluster;
use crate::cri::{Cri, PodSpec};
use crate::leftovers::{self, Snapshot};
use crate::netns::NetNs;
use crate::node::cni::Pod;
use crate::node::{Node, ServiceSpec};
use crate::probe::{self, Echo, Traffic};

/// A pod with one container, as containerd made it.
struct RunningPod {
    node: usize,
    spec: PodSpec,
    sandbox: String,
    container: String,
    netns: PathBuf,
    v4: IpAddr,
    v6: IpAddr,
}

impl RunningPod {
    fn start(cluster: &Cluster, node: usize, name: &str) -> Result<Self> {
        let cri = cri(cluster, node)?;
        let spec = PodSpec::new("demo", name);
        let sandbox = cri.run_pod(&spec)?;
        let status = cri.pod_status(&sandbox)?;
        let container = cri.start_container(&sandbox, &spec, "main", &["httpd", "-f", "-p", "8080", "-h", "/www"])?;
        let of = |v4: bool| {
            let ip = status.ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
            ip.with_context(|| format!("{name} has {:?}", status.ips))
        };
        let netns =
            status.netns.clone().with_context(|| format!("containerd does not tell the namespace of {name}"))?;
        Ok(Self { node, spec, container, netns, v4: of(true)?, v6: of(false)?, sandbox })
    }

    fn delete(&self, cluster: &Cluster) -> Result<()> {
        let cri = cri(cluster, self.node)?;
        cri.stop_pod(&self.sandbox)?;
        cri.remove_pod(&self.sandbox)
    }

    /// Runs a command in the container and wants it to succeed.
    fn run(&self, cluster: &Cluster, command: &[&str]) -> Result<String> {
        let done = cri(cluster, self.node)?.exec(&self.container, command)?;
        ensure!(
            done.code == 0,
            "{} in {}: status {}: {}",
            command.join(" "),
            self.spec.name,
            done.code,
            done.output.trim()
        );
        Ok(done.output)
    }

    fn ns(&self) -> Result<NetNs> {
        NetNs::open(&self.netns)
    }
}

fn cri(cluster: &Cluster, node: usize) -> Result<&Cri> {
    Ok(cluster.node(node).containerd()?.cri())
}

/// Runs all checks; those that need pods end when there are none.
pub(super) fn all(report: &mut Report, cluster: &Cluster) {
    report.check("containerd sees the network of both nodes", || {
        for node in cluster.nodes() {
            let cri = node.containerd()?.cri();
            node.wait(Duration::from_secs(5), "NetworkReady", |_| Ok(cri.readiness()?.network))?;
        }
        Ok(String::new())
    });
    let before: Vec<Snapshot> = cluster.nodes().iter().filter_map(|node| leftovers::node(node).ok()).collect();
    let mut pods = Vec::new();
    report.check("containerd creates four pods at once, two on each node", || {
        pods = create(cluster)?;
        Ok(pods.iter().map(|pod| format!("{} {}", pod.spec.name, pod.v4)).collect::<Vec<_>>().join(", "))
    });
    if pods.len() == 4 {
        connectivity(report, cluster, &pods);
        cheating(report, cluster, &pods);
        large(report, &pods);
        services(report, cluster, &pods);
        outside(report, cluster, &pods);
        policies(report, cluster, &pods);
        operation(report, cluster, &mut pods);
    }
    report.check("deleted pods leave nothing on the nodes", || {
        for pod in &pods {
            pod.delete(cluster)?;
        }
        ensure!(before.len() == cluster.nodes().len(), "there was no snapshot before");
        for (node, before) in cluster.nodes().iter().zip(&before) {
            leftovers::wait_until_pods_removed(node, before, Duration::from_secs(10))?;
        }
        Ok(String::new())
    });
    report.check("the VPC saw no packet that did not belong to its ENI", || {
        let spoofed = cluster.vpc().spoofed()?;
        ensure!(spoofed.total() == 0, "{spoofed:?}");
        Ok(String::new())
    });
}

fn create(cluster: &Cluster) -> Result<Vec<RunningPod>> {
    let names = [(1, "a"), (1, "b"), (2, "c"), (2, "d")];
    std::thread::scope(|scope| {
        let starting: Vec<_> =
            names.into_iter().map(|(node, name)| scope.spawn(move || RunningPod::start(cluster, node, name))).collect();
        starting.into_iter().map(|pod| pod.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

fn connectivity(report: &mut Report, cluster: &Cluster, pods: &[RunningPod]) {
    let [a, b, c, _] = pods else { return };
    report.check("pods have addresses of the pods' vSwitch, and nothing else in their namespace", || {
        let (v4, v6) = cluster.pod_blocks();
        for pod in pods {
            let inside = matches!((pod.v4, pod.v6), (IpAddr::V4(a), IpAddr::V6(b)) if v4.contains(a) && v6.contains(b));
            ensure!(inside, "{} has {} and {}", pod.spec.name, pod.v4, pod.v6);
            let links = pod.run(cluster, &["ip", "-o", "link"])?;
            ensure!(links.lines().count() == 2, "links of {}:\n{links}", pod.spec.name);
        }
        Ok(format!("{} {} and so on", a.v4, a.v6))
    });
    for (name, from, to) in [("on one node", a, b), ("across nodes", a, c), ("across nodes, the other way", c, b)] {
        report.check(&format!("ping {name}, IPv4 and IPv6"), || {
            for ip in [to.v4, to.v6] {
                from.run(cluster, &["ping", "-c", "2", "-i", "0.1", "-W", "1", &ip.to_string()])?;
            }
            Ok(format!("{} to {}", from.spec.name, to.spec.name))
        });
        report.check(&format!("TCP and UDP {name}, IPv4 and IPv6"), || {
            let url = format!("http://{}:8080/", to.v4);
            let page = from.run(cluster, &["wget", "-q", "-O", "-", &url])?;
            ensure!(page.contains("served by a pod"), "wget got: {page}");
            let (from, to_ns) = (from.ns()?, to.ns()?);
            let _server = Echo::start(&to_ns)?;
            for ip in [to.v4, to.v6] {
                probe::tcp(&from, ip, 100_000)?;
                probe::udp(&from, ip, 1000)?;
            }
            Ok(String::new())
        });
    }
    report.check("pods and nodes reach each other", || {
        let (pod, near, far) = (a.ns()?, cluster.node(1), cluster.node(2));
        for node in [near, far] {
            let primary = cluster.vpc().primary(node.name()).context("the node has no ENI")?;
            let (v4, v6) = (primary.v4.first().context("no address")?, primary.v6.first().context("no address")?);
            for ip in [IpAddr::V4(*v4), IpAddr::V6(*v6)] {
                probe::ping(&pod, ip, &[]).with_context(|| format!("pod to {}", node.name()))?;
            }
            for ip in [a.v4, a.v6] {
                probe::ping(node.netns(), ip, &[]).with_context(|| format!("{} to pod", node.name()))?;
            }
        }
        Ok(String::new())
    });
    report.check("a host of the VPC that is no node reaches pods, and they it", || {
        let (v4, v6) = cluster.external_addresses();
        for (pod_ip, ip) in [(a.v4, v4), (a.v6, v6)] {
            probe::ping(cluster.external(), pod_ip, &[])?;
            probe::ping(&a.ns()?, ip, &[])?;
        }
        Ok(String::new())
    });
}

fn drops(node: &Node) -> Result<BTreeMap<String, u64>> {
    Ok(node.status()?.datapath.unwrap_or_default().drops.into_iter().filter(|(_, count)| *count > 0).collect())
}

fn cheating(report: &mut Report, cluster: &Cluster, pods: &[RunningPod]) {
    let [a, b, ..] = pods else { return };
    report.check("a pod cannot send from an address that is not its own, and the drop has a reason", || {
        let before = drops(cluster.node(1))?;
        for (address, bits, target) in [
            ("10.0.7.77", "32", b.v4),
            (&*b.v4.to_string(), "32", cluster.external_addresses().0),
            ("2001:db8::77", "128", b.v6),
        ] {
            let own = format!("{address}/{bits}");
            a.run(cluster, &["ip", "addr", "add", &own, "dev", "lo"])?;
            let target = target.to_string();
            let ping = cri(cluster, 1)?.exec(&a.container, &["ping", "-c", "1", "-W", "1", "-I", address, &target])?;
            a.run(cluster, &["ip", "addr", "del", &own, "dev", "lo"])?;
            ensure!(ping.code != 0, "a ping from {address} was answered: {}", ping.output);
        }
        let after = drops(cluster.node(1))?;
        let increased: Vec<String> = after
            .iter()
            .filter_map(|(reason, count)| {
                let more = count - before.get(reason).copied().unwrap_or_default();
                (more > 0).then(|| format!("{reason} {more}"))
            })
            .collect();
        ensure!(!increased.is_empty(), "no drop was counted: {after:?}");
        Ok(format!("dropped: {}", increased.join(", ")))
    });
}

fn large(report: &mut Report, pods: &[RunningPod]) {
    let [a, b, c, _] = pods else { return };
    report.check("packets of the full MTU pass unfragmented, larger ones in fragments", || {
        let mtu = 1500;
        for to in [b, c] {
            let (from, to_ns) = (a.ns()?, to.ns()?);
            let size = (mtu - 28).to_string();
            probe::ping(&from, to.v4, &["-M", "do", "-s", &size])?;
            let size6 = (mtu - 48).to_string();
            probe::ping(&from, to.v6, &["-M", "do", "-s", &size6])?;
            let _server = Echo::start(&to_ns)?;
            for ip in [to.v4, to.v6] {
                probe::udp(&from, ip, 9000)?;
                probe::tcp(&from, ip, 4_000_000)?;
            }
        }
        Ok("4 MB by TCP, 9 kB datagrams".to_owned())
    });
    report.check("traceroute works: expired packets are answered", || {
        let text = match probe::ping(&a.ns()?, c.v4, &["-t", "1"]) {
            Err(error) => format!("{error:#}"),
            Ok(text) => bail!("a packet with TTL 1 arrived at another node: {text}"),
        };
        let text2 = probe::ping(&a.ns()?, c.v4, &["-t", "2"]).unwrap_or_else(|error| format!("{error:#}"));
        ensure!((text + &text2).contains("Time to live exceeded"), "{text2}");
        Ok(String::new())
    });
}

fn operation(report: &mut Report, cluster: &Cluster, pods: &mut Vec<RunningPod>) {
    report.check("CNI CHECK passes for a running pod", || {
        let pod = &pods[0];
        let node = cluster.node(pod.node);
        let mut cni = Pod::of_runtime(&pod.netns, &pod.sandbox, &pod.spec.name)?;
        cni.result = cached_result(node, &pod.sandbox)?;
        let outcome = node.check(&cni)?;
        Ok(format!("{:.1} ms", outcome.elapsed.as_secs_f64() * 1000.0))
    });
    report.check("terway-cli shows the node and its pods", || {
        let status = cluster.node(1).cli(&["status"])?;
        let list = cluster.node(1).cli(&["list"])?;
        ensure!(status.contains("ready") && !status.contains("NOT READY"), "{status}");
        ensure!(list.contains("demo/a") && list.contains(&pods[0].v4.to_string()), "{list}");
        Ok(String::new())
    });
    report.check("with the daemon killed, pods talk on and a pod can be deleted", || {
        let (from, to) = (pods[0].ns()?, pods[2].ns()?);
        let _server = Echo::start(&to)?;
        let traffic = Traffic::start(&from, pods[2].v4)?;
        for node in cluster.nodes() {
            node.kill_daemon()?;
        }
        // New flows too, not only those that are known.
        probe::tcp(&from, pods[2].v6, 10_000)?;
        probe::ping(&from, pods[1].v4, &[])?;
        let gone = pods.remove(1);
        gone.delete(cluster)?;
        let (tcp, udp) = traffic.stop()?;
        ensure!(tcp.lost + udp.lost == 0, "lost: TCP {tcp:?}, UDP {udp:?}");
        Ok(format!("{} requests, none lost", tcp.sent + udp.sent))
    });
    report.check(
        "the daemon comes back under traffic, with the pods that are there and without the one that is gone",
        || {
            let (from, to) = (pods[0].ns()?, pods[1].ns()?);
            let _server = Echo::start(&to)?;
            let traffic = Traffic::start(&from, pods[1].v4)?;
            for node in cluster.nodes() {
                node.start_daemon()?;
            }
            for node in cluster.nodes() {
                node.wait_ready(Duration::from_secs(20))?;
            }
            cluster.node(1).wait(Duration::from_secs(5), "only pod a is listed", |node| {
                let list = node.cli(&["list"])?;
                Ok(list.contains("demo/a") && !list.contains("demo/b"))
            })?;
            let (tcp, udp) = traffic.stop()?;
            ensure!(tcp.lost + udp.lost == 0, "lost: TCP {tcp:?}, UDP {udp:?}");
            Ok(format!("{} requests, none lost", tcp.sent + udp.sent))
        },
    );
    report.check("a new pod works after that", || {
        let pod = RunningPod::start(cluster, 1, "e")?;
        let far = pods[1].v4;
        pods.push(pod);
        let pod = &pods[pods.len() - 1];
        pod.run(cluster, &["ping", "-c", "1", "-W", "1", &far.to_string()])?;
        Ok(pod.v4.to_string())
    });
}

fn services(report: &mut Report, cluster: &Cluster, pods: &[RunningPod]) {
    let [a, b, c, d] = pods else { return };
    report.check("a Service answers by its ClusterIP on either node, IPv4 and IPv6", || {
        let vips: [IpAddr; 2] = ["10.96.0.80".parse()?, "fd96::80".parse()?];
        let web = ServiceSpec {
            name: "web".to_owned(),
            cluster_ips: vips.to_vec(),
            ports: vec![(80, 8080)],
            endpoints: [b, c].map(|pod| (vec![pod.v4, pod.v6], format!("n{}", pod.node))).to_vec(),
        };
        for node in cluster.nodes() {
            node.put_service(&web)?;
            node.wait(Duration::from_secs(5), "the Service is served", |node| {
                Ok(node.cli(&["svc", "list"])?.contains("default/web"))
            })?;
        }
        for from in [a, d] {
            // Without -T, which makes the image's busybox crash.
            for url in ["http://10.96.0.80/", "http://[fd96::80]/"] {
                for _ in 0..4 {
                    let page = from.run(cluster, &["wget", "-q", "-O", "-", url])?;
                    ensure!(page.contains("served by a pod"), "wget {url} got: {page}");
                }
            }
            probe::refused(&from.ns()?, (vips[0], 81).into())?;
        }
        for node in cluster.nodes() {
            node.remove_service("web")?;
        }
        Ok("one backend on each node; a port that is not served is refused at once".to_owned())
    });
}

/// Whether a connection from a namespace is accepted.
fn connects(from: &NetNs, to: SocketAddr) -> Result<bool> {
    from.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok())
}

fn outside(report: &mut Report, cluster: &Cluster, pods: &[RunningPod]) {
    let [_, b, ..] = pods else { return };
    report.check("a client outside reaches a pod by a node port of either node, IPv4 and IPv6", || {
        let web = ServiceSpec {
            name: "open".to_owned(),
            cluster_ips: vec!["10.96.0.81".parse()?, "fd96::81".parse()?],
            ports: vec![(80, 8080)],
            endpoints: vec![(vec![b.v4, b.v6], format!("n{}", b.node))],
        };
        let mut objects = web.objects();
        let service = objects.first_mut().context("no Service")?;
        service["spec"]["type"] = json!("NodePort");
        for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
            port["nodePort"] = json!(30_080);
        }
        cluster.put("open", &objects)?;
        for node in cluster.nodes() {
            let eni = cluster.vpc().primary(node.name()).context("no primary ENI")?;
            let v4 = eni.v4.first().copied().map(IpAddr::V4);
            let v6 = eni.v6.first().copied().map(IpAddr::V6);
            for ip in [v4, v6].into_iter().flatten() {
                node.wait(Duration::from_secs(5), "the node port answers", |_| {
                    connects(cluster.external(), SocketAddr::new(ip, 30_080))
                })?;
            }
        }
        for node in cluster.nodes() {
            node.remove_service("open")?;
        }
        Ok("directly on the pod's node, and passed on by the other one".to_owned())
    });
}

fn policies(report: &mut Report, cluster: &Cluster, pods: &[RunningPod]) {
    let [a, b, c, _] = pods else { return };
    report.check(
        "a NetworkPolicy closes a pod to all but one, on either node; `policy explain` and `flows` say why",
        || {
            let namespace = &b.spec.namespace;
            let mut objects = vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})];
            objects.extend(pods.iter().map(|pod| {
                let name = &pod.spec.name;
                json!({
                    "apiVersion": "v1", "kind": "Pod",
                    "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
                    "spec": {"nodeName": format!("n{}", pod.node), "containers": [{"name": "c"}]},
                    "status": {"phase": "Running", "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}]},
                })
            }));
            cluster.put("pods", &objects)?;
            let to = [SocketAddr::new(b.v4, 8080), SocketAddr::new(b.v6, 8080)];
            ensure!(connects(&c.ns()?, to[0])?, "nothing forbids it yet");
            let from = json!([{"podSelector": {"matchLabels": {"app": a.spec.name}}}]);
            cluster.put(
                "policy",
                &[json!({
                    "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                    "metadata": {"name": "only-one", "namespace": namespace},
                    "spec": {"podSelector": {"matchLabels": {"app": b.spec.name}}, "ingress": [{"from": from}]},
                })],
            )?;
            let home = cluster.node(b.node);
            for to in to {
                home.wait(Duration::from_secs(5), "others are kept out", |_| Ok(!connects(&c.ns()?, to)?))?;
                ensure!(connects(&a.ns()?, to)?, "who is allowed is kept out of {to}");
            }
            let (from, to) = (format!("{namespace}/{}", a.spec.name), format!("{namespace}/{}:8080", b.spec.name));
            let told = home.cli(&["policy", "explain", "--from", &from, "--to", &to])?;
            ensure!(told.contains("only-one"), "{told}");
            let dropped = home.cli(&["flows", "--verdict", "dropped", "--policy", "only-one", "--last", "1"])?;
            ensure!(dropped.contains(&c.spec.name) && dropped.contains(&b.spec.name), "{dropped}");
            for node in cluster.nodes() {
                node.remove_service("policy")?;
            }
            home.wait(Duration::from_secs(5), "it is open again", |_| connects(&c.ns()?, SocketAddr::new(b.v4, 8080)))?;
            for node in cluster.nodes() {
                node.remove_service("pods")?;
            }
            Ok(format!("{}; {}", told.lines().last().unwrap_or_default().trim(), dropped.trim()))
        },
    );
}

/// The result of ADD that libcni keeps for CHECK and DEL.
fn cached_result(node: &Node, sandbox: &str) -> Result<Value> {
    let network = node.conflist()?["name"].as_str().unwrap_or_default().to_owned();
    let path = format!("/var/lib/cni/results/{network}-{sandbox}-eth0");
    let cached: Value =
        serde_json::from_slice(&std::fs::read(&path).with_context(|| path.clone())?).context("read libcni's cache")?;
    Ok(cached["result"].clone())
}
