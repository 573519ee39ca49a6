//! Services for a client outside: a host of the VPC that is no node reaches pods by node ports, by load balancer and external
//! addresses and by host ports, and the pods see the client, or the node that passed it on.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use terway_sim::cluster::Cluster;
use terway_sim::fabric::{Fabric as _, FabricEni};
use terway_sim::netns::NetNs;
use terway_sim::node::ServiceSpec;
use terway_sim::probe::{self, Echo, Traffic};

use super::{pod, with_cluster};

/// What a change may take until packets see it.
const SOON: Duration = Duration::from_secs(5);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often servers look whether they shall end.
const TICK: Duration = Duration::from_millis(20);
/// The port of servers that tell clients who they are.
const WHO: u16 = 7008;

/// A server for TCP and UDP, IPv4 and IPv6, that answers everybody with the address he comes from. It ends on drop.
struct Mirror {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Mirror {
    fn start(ns: &NetNs) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, WHO));
        let (listener, socket) =
            ns.run(|| -> std::io::Result<_> { Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?)) })??;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(TICK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp, udp) = (Arc::clone(&stop), Arc::clone(&stop));
        let threads = vec![
            std::thread::spawn(move || {
                while !tcp.load(Ordering::Acquire) {
                    match listener.accept() {
                        Ok((mut stream, from)) => {
                            drop(stream.write_all(from.ip().to_canonical().to_string().as_bytes()))
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
            }),
            std::thread::spawn(move || {
                while !udp.load(Ordering::Acquire) {
                    if let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
                        drop(socket.send_to(from.ip().to_canonical().to_string().as_bytes(), from));
                    }
                }
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// As whom a client in `ns` is seen at `to`, by TCP and by UDP.
fn who(ns: &NetNs, to: SocketAddr) -> Result<[IpAddr; 2]> {
    ns.run(|| -> Result<_> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut by_tcp = String::new();
        stream.read_to_string(&mut by_tcp).context("read")?;
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(to)?;
        socket.send(b"who")?;
        let mut by_udp = [0; 64];
        let length = socket.recv(&mut by_udp).context("receive")?;
        let by_udp = std::str::from_utf8(by_udp.get(..length).unwrap_or_default())?;
        Ok([by_tcp.parse().context(by_tcp)?, by_udp.parse()?])
    })?
    .with_context(|| format!("from {} to {to}", ns.name()))
}

/// A Service of type LoadBalancer for the mirror and the echo servers, with node ports from `base` on, and the load balancer's and an
/// external address with the number `number`.
struct Exposed<'a> {
    name: &'a str,
    number: u8,
    base: u16,
    policy: &'a str,
    endpoints: Vec<(Vec<IpAddr>, &'a str)>,
    ranges: &'a [&'a str],
}

impl Exposed<'_> {
    fn balancers(&self) -> [IpAddr; 2] {
        [IpAddr::from([10, 98, 0, self.number]), IpAddr::from([0x2001, 0xdb8, 0, 0x98, 0, 0, 0, self.number.into()])]
    }

    fn externals(&self) -> [IpAddr; 2] {
        [IpAddr::from([10, 98, 1, self.number]), IpAddr::from([0x2001, 0xdb8, 0, 0x98, 0, 0, 1, self.number.into()])]
    }

    fn objects(&self) -> Vec<Value> {
        let spec = ServiceSpec {
            name: self.name.to_owned(),
            cluster_ips: vec![
                IpAddr::from([10, 96, 1, self.number]),
                IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 1, self.number.into()]),
            ],
            ports: vec![(80, WHO), (probe::PORT, probe::PORT)],
            endpoints: self.endpoints.iter().map(|(ips, node)| (ips.clone(), (*node).to_owned())).collect(),
        };
        let mut objects = spec.objects();
        let service = &mut objects[0];
        service["spec"]["type"] = json!("LoadBalancer");
        service["spec"]["externalTrafficPolicy"] = json!(self.policy);
        service["spec"]["externalIPs"] = json!(self.externals());
        service["spec"]["loadBalancerSourceRanges"] = json!(self.ranges);
        service["status"] = json!({"loadBalancer": {"ingress": self.balancers().map(|ip| json!({"ip": ip}))}});
        for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
            port["nodePort"] = json!(self.base + u16::from(port["port"] != 80));
        }
        objects
    }
}

/// Writes objects on every node.
fn put(cluster: &Cluster, name: &str, items: &[Value]) -> Result<()> {
    for node in cluster.nodes() {
        let (folder, list) = (node.objects_dir(), json!({"apiVersion": "v1", "kind": "List", "items": items}));
        std::fs::write(folder.join("fresh"), list.to_string())?;
        std::fs::rename(folder.join("fresh"), folder.join(format!("{name}.json")))?;
    }
    Ok(())
}

/// Makes the VPC send these addresses to a node, as a load balancer in front of it, or a route, would.
fn lead_to(cluster: &Cluster, eni: &FabricEni, addresses: &[IpAddr]) -> Result<()> {
    let (mut v4, mut v6) = (eni.v4.clone(), eni.v6.clone());
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4.push(*address),
            IpAddr::V6(address) => v6.push(*address),
        }
    }
    cluster.vpc().set_addresses(&eni.id, &v4, &v6)
}

#[test]
fn clients_outside_reach_pods_by_every_way_in() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let primary = |name| cluster.vpc().primary(name).context("no primary ENI");
            let (eni1, eni2) = (primary("n1")?, primary("n2")?);
            let node_ips = |eni: &FabricEni| [IpAddr::V4(eni.v4[0]), IpAddr::V6(eni.v6[0])];
            let (n1_ips, n2_ips) = (node_ips(&eni1), node_ips(&eni2));
            let (a, b) = (pod(n1, "a")?, pod(n2, "b")?);
            let mut servers = Vec::new();
            for ns in [&a.ns, &b.ns, n1.netns()] {
                servers.push((Mirror::start(ns)?, Echo::start(ns)?));
            }
            let exposed = |name, number, policy, endpoints| Exposed {
                name,
                number,
                base: 30_000 + u16::from(number) * 10,
                policy,
                endpoints,
                ranges: &[],
            };
            let on_a = || vec![(a.ips.clone(), "n1")];
            let on_b = || vec![(b.ips.clone(), "n2")];
            let near = exposed("near", 1, "Cluster", on_a());
            let far = exposed("far", 2, "Cluster", on_b());
            let near_local = exposed("near-local", 3, "Local", on_a());
            let far_local = exposed("far-local", 4, "Local", on_b());
            let host = exposed("host", 5, "Cluster", vec![(n1_ips.to_vec(), "n1")]);
            let empty = exposed("empty", 6, "Cluster", Vec::new());
            let barred = Exposed { ranges: &["192.0.2.0/24"], ..exposed("barred", 7, "Cluster", on_a()) };
            let all = [&near, &far, &near_local, &far_local, &host, &empty, &barred];
            let objects: Vec<Value> = all.iter().flat_map(|service| service.objects()).collect();
            put(cluster, "services", &objects)?;
            let host_ports =
                ["TCP", "UDP"].map(|protocol| json!({"containerPort": WHO, "hostPort": 8008, "protocol": protocol}));
            let pod_ips: Vec<Value> = a.ips.iter().map(|ip| json!({"ip": ip})).collect();
            let host_port = json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "default"},
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": host_ports}]},
                "status": {"phase": "Running", "podIPs": pod_ips},
            });
            put(cluster, "pod", &[host_port])?;
            for (node, last) in [(n1, ":8008"), (n2, "default/near")] {
                node.wait(SOON, "the Services are served", |node| {
                    let listed = node.cli(&["svc", "list"])?;
                    ensure!(
                        all.iter().all(|service| listed.contains(service.name)) && listed.contains(last),
                        "{listed}"
                    );
                    Ok(true)
                })?;
            }
            let ways: Vec<IpAddr> = all.iter().flat_map(|s| [s.balancers(), s.externals()].concat()).collect();
            lead_to(cluster, &eni1, &ways)?;

            let outside = cluster.external();
            let (me_v4, me_v6) = cluster.external_addresses();
            let me = |to: IpAddr| if to.is_ipv4() { me_v4 } else { me_v6 };
            let node = |ips: [IpAddr; 2], to: IpAddr| if to.is_ipv4() { ips[0] } else { ips[1] };
            println!("{}", n1.cli(&["svc", "list", "-o", "wide"])?);

            // By node ports of either node; where the pod is on another, it sees the node.
            for (service, ips, kept) in [
                (&near, n1_ips, true),
                (&near, n2_ips, false),
                (&far, n1_ips, false),
                (&far, n2_ips, true),
                (&near_local, n1_ips, true),
                (&far_local, n2_ips, true),
                (&host, n1_ips, true),
                (&host, n2_ips, false),
            ] {
                for ip in ips {
                    let wanted = if kept { me(ip) } else { node(ips, ip) };
                    let seen = who(outside, SocketAddr::new(ip, service.base)).context(service.name)?;
                    ensure!(seen == [wanted; 2], "{} at {ip}: seen as {seen:?}, not {wanted}", service.name);
                    for length in [1, 1000, 300_000] {
                        probe::tcp_at(outside, SocketAddr::new(ip, service.base + 1), length).context(service.name)?;
                    }
                    for length in [1, 1000, 4000] {
                        probe::udp_at(outside, SocketAddr::new(ip, service.base + 1), length).context(service.name)?;
                    }
                }
            }
            // By addresses that lead to n1.
            for (service, kept) in [(&near, true), (&far, false), (&near_local, true), (&host, true)] {
                for ip in [service.balancers(), service.externals()].concat() {
                    let wanted = if kept { me(ip) } else { node(n1_ips, ip) };
                    let seen = who(outside, SocketAddr::new(ip, 80)).context(service.name)?;
                    ensure!(seen == [wanted; 2], "{} at {ip}: seen as {seen:?}, not {wanted}", service.name);
                    probe::tcp_at(outside, SocketAddr::new(ip, probe::PORT), 100_000).context(service.name)?;
                }
            }
            for ip in n1_ips {
                let seen = who(outside, SocketAddr::new(ip, 8008)).context("host port")?;
                ensure!(seen == [me(ip); 2], "host port at {ip}: seen as {seen:?}");
            }
            // Refused at once, or without a word.
            for ip in [n1_ips, empty.balancers()].concat() {
                let port = if n1_ips.contains(&ip) { empty.base } else { 80 };
                probe::refused(outside, SocketAddr::new(ip, port)).context("no endpoints")?;
            }
            for to in [SocketAddr::new(n1_ips[0], far_local.base), SocketAddr::new(barred.balancers()[1], 80)] {
                let error = who(outside, to).err().with_context(|| format!("{to} answers"))?;
                let kind = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
                ensure!(kind == Some(std::io::ErrorKind::TimedOut), "{to}: {error:#}");
            }
            println!("{}", n1.cli(&["ct", "list", "--proto", "tcp"])?);

            // A path that is narrower than the pods believe: they must be told in their own words.
            cluster.vpc().set_mtu(&terway_core::ident::EniId::new("eni-external"), 1300)?;
            for service in [&near, &far, &host] {
                for ip in n1_ips {
                    probe::tcp_at(outside, SocketAddr::new(ip, service.base + 1), 300_000).context("narrow path")?;
                }
            }
            cluster.vpc().set_mtu(&terway_core::ident::EniId::new("eni-external"), 1500)?;

            // Connections outlive the daemon, and new ones do not need it.
            let traffic = [near.balancers(), far.balancers(), host.balancers()].concat().into_iter();
            let traffic: Vec<(IpAddr, Traffic)> =
                traffic.map(|to| Traffic::start(outside, to).map(|t| (to, t))).collect::<Result<_>>()?;
            n1.kill_daemon()?;
            who(outside, SocketAddr::new(far.balancers()[0], 80)).context("without a daemon")?;
            n1.start_daemon()?;
            n1.wait_ready(Duration::from_secs(20))?;
            std::thread::sleep(Duration::from_millis(1500));
            for (to, traffic) in traffic {
                let (tcp, udp) = traffic.stop().with_context(|| format!("to {to}"))?;
                ensure!(tcp.lost == 0 && udp.lost == 0, "to {to}: TCP {tcp:?}, UDP {udp:?}");
            }
            for (node, pod) in [(n1, &a), (n2, &b)] {
                node.del(pod)?;
            }
            lead_to(cluster, &eni1, &[])
        },
    )
}
