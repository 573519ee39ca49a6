//! What tests of Services with many ways in share: servers that tell clients as whom they see them, Services of type LoadBalancer, and the
//! way that leads to their addresses.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use terway_sim::cluster::Cluster;
use terway_sim::fabric::{Fabric as _, FabricEni};
use terway_sim::netns::NetNs;
use terway_sim::node::ServiceSpec;
use terway_sim::probe;

/// How often servers look whether they shall end.
const TICK: Duration = Duration::from_millis(20);
/// The port of servers that tell clients who they are.
pub(crate) const WHO: u16 = 7008;

/// A server for TCP and UDP, IPv4 and IPv6, that answers everybody with the address he comes from. It ends on drop.
pub(crate) struct Mirror {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Mirror {
    pub(crate) fn start(ns: &NetNs) -> Result<Self> {
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
                            drop(stream.write_all(from.ip().to_canonical().to_string().as_bytes()));
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

/// As whom a client in `ns` is seen at `to` by TCP.
pub(crate) fn by_tcp(ns: &NetNs, to: SocketAddr, patience: Duration) -> Result<IpAddr> {
    ns.run(|| -> Result<_> {
        let mut stream = TcpStream::connect_timeout(&to, patience).context("connect")?;
        stream.set_read_timeout(Some(patience))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("read")?;
        answer.parse().context(answer)
    })?
    .with_context(|| format!("TCP from {} to {to}", ns.name()))
}

/// As whom a client in `ns` is seen at `to` by UDP.
pub(crate) fn by_udp(ns: &NetNs, to: SocketAddr, patience: Duration) -> Result<IpAddr> {
    ns.run(|| -> Result<_> {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(patience))?;
        socket.connect(to).context("connect")?;
        socket.send(b"who").context("send")?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).context("receive")?;
        Ok(std::str::from_utf8(answer.get(..length).unwrap_or_default())?.parse()?)
    })?
    .with_context(|| format!("UDP from {} to {to}", ns.name()))
}

/// A Service of type LoadBalancer for the mirror and the echo servers, with node ports from `base` on, and the load balancer's and an
/// external address with the number `number`.
pub(crate) struct Exposed<'a> {
    pub(crate) name: &'a str,
    pub(crate) number: u8,
    pub(crate) base: u16,
    pub(crate) policy: &'a str,
    pub(crate) endpoints: Vec<(Vec<IpAddr>, &'a str)>,
    pub(crate) ranges: &'a [&'a str],
}

impl Exposed<'_> {
    pub(crate) fn cluster_ips(&self) -> [IpAddr; 2] {
        [IpAddr::from([10, 96, 1, self.number]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 1, self.number.into()])]
    }

    pub(crate) fn balancers(&self) -> [IpAddr; 2] {
        [IpAddr::from([10, 98, 0, self.number]), IpAddr::from([0x2001, 0xdb8, 0, 0x98, 0, 0, 0, self.number.into()])]
    }

    pub(crate) fn externals(&self) -> [IpAddr; 2] {
        [IpAddr::from([10, 98, 1, self.number]), IpAddr::from([0x2001, 0xdb8, 0, 0x98, 0, 0, 1, self.number.into()])]
    }

    pub(crate) fn objects(&self) -> Vec<Value> {
        let spec = ServiceSpec {
            name: self.name.to_owned(),
            cluster_ips: self.cluster_ips().to_vec(),
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

/// Makes the VPC send these addresses to a node, as a load balancer in front of it, or a route, would.
pub(crate) fn lead_to(cluster: &Cluster, eni: &FabricEni, addresses: &[IpAddr]) -> Result<()> {
    let (mut v4, mut v6) = (eni.v4.clone(), eni.v6.clone());
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4.push(*address),
            IpAddr::V6(address) => v6.push(*address),
        }
    }
    cluster.vpc().set_addresses(&eni.id, &v4, &v6)
}

/// The addresses of a node's primary ENI, one of each family.
pub(crate) fn node_addresses(eni: &FabricEni) -> [IpAddr; 2] {
    [IpAddr::V4(eni.v4[0]), IpAddr::V6(eni.v6[0])]
}
