//! Services at the socket: clients on the node and in pods reach them by a direct connection to a backend, keep it while the daemon is
//! away, and lose it, where nobody would tell them otherwise, together with the backend.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use terway_daemon::net::SockDiag;
use terway_sim::cluster::{Cluster, Options};
use terway_sim::leftovers;
use terway_sim::netns::NetNs;
use terway_sim::node::cni::Pod;
use terway_sim::node::{Node, ServiceSpec};
use terway_sim::probe::{self, Echo};

use super::{SETTLE, pod, with_cluster};

/// What a change may take until sockets see it.
const SOON: Duration = Duration::from_secs(5);

const NODE_PORT: u16 = 30_080;

/// Threads of the test are in the cgroup of the node that they act for.
fn at_the_socket(options: &mut Options) {
    options.sockets = true;
}

/// The addresses of a Service: in the cluster, of its load balancer, and external ones.
fn vips(number: u8) -> [[IpAddr; 2]; 3] {
    [96, 97, 98].map(|block: u8| {
        let v6 = 0xfd00 + u16::from(block);
        [IpAddr::from([10, block, 1, number]), IpAddr::from([v6, 1, 0, 0, 0, 0, 0, number.into()])]
    })
}

fn at(number: u8) -> [SocketAddr; 2] {
    vips(number)[0].map(|ip| SocketAddr::new(ip, 80))
}

/// A Service of type LoadBalancer at port 80, and at the node port if one is given, for TCP and UDP.
fn put(cluster: &Cluster, name: &str, number: u8, node_port: u16, endpoints: &[(&Pod, usize)]) -> Result<()> {
    let [cluster_ips, ingress, external] = vips(number);
    let spec = ServiceSpec {
        name: name.to_owned(),
        cluster_ips: cluster_ips.to_vec(),
        ports: vec![(80, probe::PORT)],
        endpoints: endpoints.iter().map(|(pod, node)| (pod.ips.clone(), format!("n{node}"))).collect(),
    };
    let mut objects = spec.objects();
    let service = &mut objects[0];
    service["spec"]["type"] = json!("LoadBalancer");
    service["spec"]["externalIPs"] = json!(external);
    service["status"] = json!({"loadBalancer": {"ingress": ingress.map(|ip| json!({"ip": ip, "ipMode": "VIP"}))}});
    for port in service["spec"]["ports"].as_array_mut().context("no ports")? {
        if node_port != 0 {
            port["nodePort"] = json!(node_port);
        }
    }
    cluster.put(name, &objects)?;
    for node in cluster.nodes() {
        node.wait(SOON, "the Service is served", |node| {
            let text = node.cli(&["svc", "show", &format!("default/{name}"), "-o", "json"])?;
            let shown: Value = serde_json::from_str(&text)?;
            let ports = shown["ports"].as_array().context("no ports")?;
            let frontends = ports.iter().flat_map(|port| port["frontends"].as_array().into_iter().flatten());
            let served: Vec<usize> = frontends
                .filter(|frontend| frontend["port"].as_u64() != Some(0))
                .map(|frontend| frontend["internal"]["backends"].as_array().map_or(0, Vec::len))
                .collect();
            let each = if node_port == 0 { 6 } else { 8 };
            ensure!(served.len() == 2 * each && served.iter().all(|count| *count == endpoints.len()), "{text}");
            Ok(true)
        })?;
    }
    Ok(())
}

/// Where the node's own processes are.
fn ns(node: &Node) -> &NetNs {
    node.netns()
}

/// The node's own addresses.
fn addresses(cluster: &Cluster, node: &Node) -> Result<[IpAddr; 2]> {
    let primary = cluster.vpc().primary(node.name()).context("no primary ENI")?;
    Ok([primary.v4[0].into(), primary.v6[0].into()])
}

/// The packets of a namespace, all interfaces, from the moment it is made.
struct Wire(OwnedFd);

impl Wire {
    fn open(ns: &NetNs) -> Result<Self> {
        let fd = ns.run(|| {
            // SAFETY: no pointers; ETH_P_ALL is to be in network byte order (packet(7)).
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0x0003_u16.to_be().into()) }
        })?;
        ensure!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: the call above gave the descriptor to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sources and destinations of the packets so far.
    fn ends(&self) -> Vec<[IpAddr; 2]> {
        let mut ends = Vec::new();
        let mut bytes = [0_u8; 128];
        loop {
            // SAFETY: the buffer is live and as long as said.
            let length = unsafe { libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if length < 0 {
                return ends;
            }
            let part = |from: usize, to: usize| bytes[from..to].to_vec();
            let v4 = |bytes: Vec<u8>| IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap_or_default());
            let v6 = |bytes: Vec<u8>| IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap_or_default());
            match bytes[0] >> 4 {
                _ if length < 20 => {}
                4 => ends.push([v4(part(12, 16)), v4(part(16, 20))]),
                6 if length >= 40 => ends.push([v6(part(8, 24)), v6(part(24, 40))]),
                _ => {}
            }
        }
    }
}

/// The peer that the kernel has for a socket of this namespace, found by its cookie.
fn kernels_peer(ns: &NetNs, protocol: i32, socket: &impl std::os::fd::AsRawFd) -> Result<SocketAddr> {
    const SO_COOKIE: libc::c_int = 57;
    let (mut cookie, mut length) = (0_u64, 8 as libc::socklen_t);
    // SAFETY: both pointers are to live variables, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    ensure!(result == 0, "SO_COOKIE: {}", io::Error::last_os_error());
    let listed = ns.run(|| SockDiag::open()?.connected(protocol as u8))??;
    let found = listed.into_iter().find(|seen| seen.cookie == cookie).context("the socket is not listed")?;
    Ok(found.peer)
}

/// A connection and an exchange of datagrams through `to`: the application sees `to`, the kernel and the wire only `backend`.
fn direct(ns: &NetNs, to: SocketAddr, backend: IpAddr) -> Result<()> {
    let wire = Wire::open(ns)?;
    let patience = Some(Duration::from_secs(2));
    let (mut stream, connected, loose) = ns.run(|| -> Result<_> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).context("connect")?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let (connected, loose) = (UdpSocket::bind(any)?, UdpSocket::bind(any)?);
        connected.connect(to).context("connect UDP")?;
        Ok((stream, connected, loose))
    })??;
    let real = SocketAddr::new(backend, probe::PORT);
    ensure!(stream.peer_addr()? == to && connected.peer_addr()? == to, "the application sees another peer");
    for (protocol, peer) in [
        (libc::IPPROTO_TCP, kernels_peer(ns, libc::IPPROTO_TCP, &stream)?),
        (libc::IPPROTO_UDP, kernels_peer(ns, libc::IPPROTO_UDP, &connected)?),
    ] {
        ensure!(peer == real, "protocol {protocol} to {to}: the kernel's peer is {peer}, not {real}");
    }
    let mut bytes = [0; 16];
    stream.set_read_timeout(patience)?;
    stream.write_all(b"question")?;
    stream.read_exact(&mut bytes[..8]).context("TCP")?;
    connected.set_read_timeout(patience)?;
    connected.send(b"question")?;
    ensure!(connected.recv_from(&mut bytes).context("connected UDP")? == (8, to), "answered by another");
    loose.set_read_timeout(patience)?;
    loose.send_to(b"question", to)?;
    ensure!(loose.recv_from(&mut bytes).context("unconnected UDP")? == (8, to), "answered by another");
    let ends = wire.ends();
    ensure!(ends.iter().flatten().any(|end| *end == backend), "no packet to {backend}: {ends:?}");
    // Loopback is on every host's wire; what must not be there is the Service.
    let translated = !to.ip().is_loopback() && ends.iter().flatten().any(|end| *end == to.ip().to_canonical());
    ensure!(!translated, "packets for {to}: {ends:?}");
    Ok(())
}

#[test]
fn socket_translation_for_node_and_pods() -> Result<()> {
    with_cluster(at_the_socket, |cluster| {
        let (n1, n2) = (cluster.node(1), cluster.node(2));
        let before = [leftovers::node(n1)?, leftovers::node(n2)?];
        let (a, b, c) = (pod(n1, "a")?, pod(n2, "b")?, pod(n1, "c")?);
        let servers = [Echo::start(&a.ns)?, Echo::start(&b.ns)?];
        put(cluster, "near", 1, NODE_PORT, &[(&a, 1)])?;
        put(cluster, "far", 2, NODE_PORT + 1, &[(&b, 2)])?;
        put(cluster, "empty", 3, NODE_PORT + 2, &[])?;
        let own = addresses(cluster, n1)?;
        for (number, server, port) in [(1, &a, NODE_PORT), (2, &b, NODE_PORT + 1)] {
            let backends = [server.v4()?, server.v6()?];
            for (client, name) in [(ns(n1), "the node"), (&c.ns, "a pod")] {
                for (family, backend) in backends.into_iter().enumerate() {
                    for vip in vips(number) {
                        let to = SocketAddr::new(vip[family], 80);
                        direct(client, to, backend).with_context(|| format!("{name} to {to}"))?;
                    }
                }
                let IpAddr::V4(vip) = vips(number)[0][0] else { bail!("not IPv4") };
                let mapped = SocketAddr::new(vip.to_ipv6_mapped().into(), 80);
                direct(client, mapped, backends[0]).with_context(|| format!("{name} to {mapped}"))?;
            }
            // The loopback of the node is the node's, that of a pod the pod's.
            for (loopback, backend) in
                [IpAddr::from([127, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()].into_iter().zip(backends)
            {
                let to = SocketAddr::new(loopback, port);
                direct(ns(n1), to, backend).with_context(|| format!("the node to {to}"))?;
                probe::refused(&c.ns, to)?;
            }
        }
        // A pod to itself through its Service.
        for to in at(1) {
            probe::tcp_at(&a.ns, to, 1000).context("to itself")?;
            probe::udp_at(&a.ns, to, 1000).context("to itself")?;
        }
        // Nobody serves these; both kinds of clients are told at once.
        for client in [ns(n1), &c.ns] {
            for to in [at(3)[0], at(3)[1], SocketAddr::new(own[0], NODE_PORT + 2), SocketAddr::new(at(1)[0].ip(), 81)] {
                let start = Instant::now();
                ensure!(probe::tcp_at(client, to, 1).is_err() && probe::udp_at(client, to, 1).is_err(), "{to} answers");
                ensure!(start.elapsed() < Duration::from_millis(500), "{to}: told after {:?}", start.elapsed());
            }
        }
        let status = n1.cli(&["status"])?;
        ensure!(status.contains("10 programs on /tmp/"), "{status}");
        drop(servers);
        for (node, pod) in [(n1, &a), (n2, &b), (n1, &c)] {
            node.del(pod)?;
        }
        leftovers::wait_until_pods_removed(n1, &before[0], SETTLE)?;
        leftovers::wait_until_pods_removed(n2, &before[1], SETTLE)
    })
}

#[test]
fn bind_to_service_port_is_refused() -> Result<()> {
    with_cluster(
        |options| {
            at_the_socket(options);
            options.nodes = 1;
        },
        |cluster| {
            let node = cluster.node(1);
            let a = pod(node, "a")?;
            let bound = |ns: &NetNs| -> Result<Vec<bool>> {
                let all = ["0.0.0.0", "127.0.0.1", "[::]", "[::1]"].map(|at| format!("{at}:{NODE_PORT}"));
                ns.run(|| {
                    let both = |at: &String| [TcpListener::bind(at).is_ok(), UdpSocket::bind(at).is_ok()];
                    all.iter().flat_map(both).collect()
                })
            };
            ensure!(bound(ns(node))?.iter().all(|ok| *ok), "before there was a Service");
            put(cluster, "web", 1, NODE_PORT, &[(&a, 1)])?;
            ensure!(bound(ns(node))?.iter().all(|ok| !ok), "the node binds a node port");
            ensure!(bound(&a.ns)?.iter().all(|ok| *ok), "a pod has ports of its own");
            let error = ns(node).run(|| TcpListener::bind(("0.0.0.0", NODE_PORT)).err())?;
            println!("{error:?}");
            // Also while the daemon is away.
            node.stop_daemon()?;
            ensure!(bound(ns(node))?.iter().all(|ok| !ok), "the node binds a node port while the daemon is away");
            node.start_daemon()?;
            node.wait_ready(Duration::from_secs(20))?;
            node.remove_service("web")?;
            node.wait(SOON, "the port is free", |node| Ok(bound(ns(node))?.iter().all(|ok| *ok)))?;
            node.del(&a).map(drop)
        },
    )
}

/// A client as resolvers and agents are: it keeps one connected socket, and makes a new one when that one fails.
struct Stubborn<'a> {
    ns: &'a NetNs,
    to: SocketAddr,
    socket: UdpSocket,
    /// The errors of sockets that failed.
    errors: Vec<io::Error>,
}

impl<'a> Stubborn<'a> {
    fn new(ns: &'a NetNs, to: SocketAddr) -> Result<Self> {
        Ok(Self { ns, to, socket: Self::connect(ns, to)?, errors: Vec::new() })
    }

    fn connect(ns: &NetNs, to: SocketAddr) -> Result<UdpSocket> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = ns.run(|| -> io::Result<_> {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            Ok(socket)
        })??;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(socket)
    }

    /// Whether a question is answered; time is no error, for a socket tells of it in no other way.
    fn ask(&mut self) -> Result<bool> {
        let mut bytes = [0; 16];
        let Err(error) = self.socket.send(b"question").and_then(|_| self.socket.recv(&mut bytes)) else {
            return Ok(true);
        };
        if error.kind() != io::ErrorKind::WouldBlock {
            self.errors.push(error);
            self.socket = Self::connect(self.ns, self.to)?;
        }
        Ok(false)
    }
}

#[test]
fn udp_client_survives_backend_removal() -> Result<()> {
    with_cluster(at_the_socket, |cluster| {
        let (n1, n2) = (cluster.node(1), cluster.node(2));
        let (a, b, c) = (pod(n2, "a")?, pod(n2, "b")?, pod(n1, "c")?);
        let server_a = Echo::start(&a.ns)?;
        let _server_b = Echo::start(&b.ns)?;
        put(cluster, "web", 1, 0, &[(&a, 2)])?;
        put(cluster, "other", 2, 0, &[(&b, 2)])?;
        let mut clients = Vec::new();
        for client in [ns(n1), &c.ns] {
            for to in at(1) {
                clients.push(Stubborn::new(client, to)?);
            }
        }
        // These are nobody's to end: through another Service, straight to the backend, and TCP, which finds out by itself.
        let mut others = Vec::new();
        for client in [ns(n1), &c.ns] {
            for to in [at(2)[0], SocketAddr::new(a.v4()?, probe::PORT), SocketAddr::new(a.v6()?, probe::PORT)] {
                others.push(Stubborn::new(client, to)?);
            }
        }
        let mut stream = c.ns.run(|| TcpStream::connect(at(1)[0]))??;
        // An answer: the server has taken the connection. One that still waits to be taken would be reset with its listener.
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])?;
        for client in clients.iter_mut().chain(&mut others) {
            ensure!(client.ask()?, "{}", client.to);
        }
        // What goes away does not answer; its namespace is still there, and takes datagrams in silence.
        drop(server_a);
        a.ns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, probe::PORT)).map(std::mem::forget))??;
        put(cluster, "web", 1, 0, &[(&b, 2)])?;
        let deadline = Instant::now() + SOON;
        for client in &mut clients {
            while !client.ask()? {
                ensure!(Instant::now() < deadline, "{} has no answer, after {:?}", client.to, client.errors);
            }
            // The second is what sending on it gives, which is no longer connected.
            let told = client.errors.iter().map(|error| error.raw_os_error()).collect::<Vec<_>>();
            let known = [[Some(libc::ECONNABORTED)], [Some(libc::EDESTADDRREQ)]];
            ensure!(known.iter().any(|known| told == known), "{}: {:?}", client.to, client.errors);
        }
        // The second look comes a second later.
        std::thread::sleep(Duration::from_millis(1500));
        for client in &mut others {
            client.ask()?;
            ensure!(client.errors.is_empty(), "{}: {:?}", client.to, client.errors);
        }
        ensure!(others[0].ask()? && others[3].ask()?, "the other Service");
        ensure!(stream.take_error()?.is_none() && stream.peer_addr()? == at(1)[0], "TCP was not to be ended");
        let status = n1.cli(&["status"])?;
        ensure!(status.contains("4 sockets ended"), "{status}");
        let metrics = ns(n1).run(|| -> io::Result<String> {
            let mut stream = TcpStream::connect("127.0.0.1:19099")?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
            io::read_to_string(stream)
        })??;
        for line in
            [r#"terway_sockets_destroyed_total{protocol="udp",outcome="destroyed"} 4"#, "terway_socket_programs 10"]
        {
            ensure!(metrics.contains(line), "{line} is not in\n{metrics}");
        }
        // The table has forgotten the dead, so that they are not looked for again.
        put(cluster, "web", 1, 0, &[])?;
        put(cluster, "web", 1, 0, &[(&b, 2)])?;
        drop((clients, others, stream));
        for (node, pod) in [(n2, &a), (n2, &b), (n1, &c)] {
            node.del(pod)?;
        }
        Ok(())
    })
}

#[test]
fn socket_translation_survives_daemon_restart() -> Result<()> {
    with_cluster(at_the_socket, |cluster| {
        let (n1, n2) = (cluster.node(1), cluster.node(2));
        let (a, b, c) = (pod(n1, "a")?, pod(n2, "b")?, pod(n1, "c")?);
        let _servers = [Echo::start(&a.ns)?, Echo::start(&b.ns)?];
        put(cluster, "near", 1, NODE_PORT, &[(&a, 1)])?;
        put(cluster, "far", 2, NODE_PORT + 1, &[(&b, 2)])?;
        let mut kept = Vec::new();
        for client in [ns(n1), &c.ns] {
            for to in [at(1), at(2)].concat() {
                let stream = client.run(|| TcpStream::connect(to))??;
                stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                kept.push((stream, Stubborn::new(client, to)?));
            }
        }
        for round in 0..4 {
            if round % 2 == 0 {
                n1.stop_daemon()?;
            } else {
                n1.kill_daemon()?;
            }
            let fresh = |text: &str| -> Result<()> {
                for client in [ns(n1), &c.ns] {
                    for to in [at(1), at(2)].concat() {
                        probe::tcp_at(client, to, 1000).with_context(|| text.to_owned())?;
                        probe::udp_at(client, to, 1000).with_context(|| text.to_owned())?;
                    }
                }
                probe::tcp_at(ns(n1), SocketAddr::new(Ipv6Addr::LOCALHOST.into(), NODE_PORT), 1)
            };
            fresh("without a daemon")?;
            n1.start_daemon()?;
            n1.wait_ready(Duration::from_secs(20))?;
            fresh("with the next daemon")?;
            let status = n1.cli(&["status"])?;
            ensure!(status.contains("10 programs on") && status.contains(" 0 sockets ended"), "{status}");
        }
        // Past the second look.
        std::thread::sleep(Duration::from_millis(1500));
        for (stream, client) in &mut kept {
            let mut bytes = [0; 8];
            stream.write_all(b"question")?;
            stream.read_exact(&mut bytes)?;
            ensure!(stream.peer_addr()? == client.to, "the peer's name is lost");
            ensure!(client.ask()? && client.errors.is_empty(), "{}: {:?}", client.to, client.errors);
        }
        // Before their peers: the last packets of a connection to a pod that is gone wander through the VPC.
        drop(kept);
        for (node, pod) in [(n1, &a), (n2, &b), (n1, &c)] {
            node.del(pod)?;
        }
        Ok(())
    })
}
