//! Through a ClusterIP, with few Services and with many: against the direct way, and against what kube-proxy has the kernel do.
//!
//! By packets, every packet of a connection is translated at the pod's interface; a pod whose sockets are served has the direct way once it is
//! connected, so that one size tells all about it.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Result, ensure};
use terway_sim::cluster::Options;
use terway_sim::node::cni::Pod;
use terway_sim::node::{Node, ServiceSpec};

use super::sync;
use crate::bench::path::{Routed, Turns, in_turns};
use crate::figures::{Bar, Better, Figure};
use crate::load::{Ends, Kind, PORT};

/// Services in the cluster.
pub const SIZES: [usize; 4] = [1, 1_000, 10_000, 30_000];
/// The size at which the rules' bars are set.
const RULES_AT: usize = 10_000;
/// The kinds of traffic that are compared with the direct way.
const KINDS: [Kind; 3] = [Kind::TcpRr, Kind::TcpCrr, Kind::UdpRr];
/// Turns of two ways, one right after the other.
/// Rounds of one way differ by a tenth on a machine that is somebody's guest, and the bar is three hundredths.
const TURNS: Turns = Turns { count: 120, length: Duration::from_millis(100) };
/// Longest time until the maps hold what the folder does.
const PATIENCE: Duration = Duration::from_secs(240);
/// The Service that is used by packets; the others stand around it.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 1);
/// The one that is used at the socket.
const AT_SOCKET: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 2);

/// One node, whose cgroup threads may enter.
///
/// # Errors
/// When it is unknown where our programs are.
pub fn node() -> Result<Options> {
    Ok(Options { sockets: true, ..crate::bench::one_node("info")? })
}

/// The ways from one pod to another on the same node, and those of rules between two plain namespaces.
#[derive(Debug)]
pub struct Traffic<'a> {
    node: &'a Node,
    /// From outside of the node's cgroup.
    direct: Ends,
    vip: Ends,
    nftables: Routed,
    iptables: Routed,
    /// Services there are.
    served: usize,
}

impl<'a> Traffic<'a> {
    /// Serves `behind` for `client`, on a node whose daemon watches its folder of objects; `near` is its direct neighbour.
    ///
    /// They are two, because a connection to a pod and one through its Service from the same port look alike there, and one gets another port.
    ///
    /// # Errors
    /// When the kernel refuses, or the daemon does not serve it.
    pub fn create(node: &'a Node, client: &Pod, near: &Pod, behind: &Pod, prefix: &str) -> Result<Self> {
        for (name, vip, pod) in [("hot", VIP, behind), ("socket", AT_SOCKET, near)] {
            node.put_service(&ServiceSpec {
                name: name.to_owned(),
                cluster_ips: vec![IpAddr::V4(vip)],
                ports: vec![(PORT, PORT)],
                endpoints: vec![(vec![pod.v4()?], node.name().to_owned())],
            })?;
            await_service(node, &format!("default/{name}"))?;
        }
        let ends = |server: &Pod, address| Ends {
            client: client.ns.path().to_owned(),
            server: server.ns.path().to_owned(),
            address,
            cgroup: None,
        };
        Ok(Self {
            node,
            direct: ends(near, near.v4()?),
            vip: ends(behind, IpAddr::V4(VIP)),
            nftables: Routed::create(&format!("{prefix}-nf"))?,
            iptables: Routed::create(&format!("{prefix}-ip"))?,
            served: 1,
        })
    }

    /// Measures with so many Services; not fewer than the last time.
    ///
    /// # Errors
    /// When a way does not carry the traffic.
    pub fn measure(&mut self, size: usize) -> Result<Vec<Figure>> {
        ensure!(size >= self.served, "{size} Services after {}", self.served);
        if size > self.served {
            sync::fill(self.node, self.served..size)?;
            await_service(self.node, &format!("bench/s{}", size - 1))?;
            self.served = size;
        }
        let vip = self.vip.clone();
        let mut figures = Vec::new();
        for kind in KINDS {
            let (value, anchor) = in_turns(kind, &vip, &self.direct, TURNS)?;
            figures.push(figure(&format!("vip_{size}"), kind, value, ("direct", anchor), Bar::Ratio(0.97)));
        }
        let at_bar = |ratio| if size == RULES_AT { Bar::Ratio(ratio) } else { Bar::None };
        self.nftables.rules("nft", &["-f", "-"], &for_nftables(size))?;
        let (value, anchor) = in_turns(Kind::TcpCrr, &vip, &to_vip(&self.nftables.ends()), TURNS)?;
        figures.push(figure(&format!("vip_{size}"), Kind::TcpCrr, value, ("nftables", anchor), at_bar(1.1)));
        if size <= RULES_AT {
            self.iptables.rules("iptables-legacy-restore", &[], &for_iptables(size))?;
            let (value, anchor) = in_turns(Kind::TcpCrr, &vip, &to_vip(&self.iptables.ends()), TURNS)?;
            figures.push(figure(&format!("vip_{size}"), Kind::TcpCrr, value, ("iptables-legacy", anchor), at_bar(4.0)));
        }
        if Some(&size) == SIZES.last() {
            figures.extend(self.at_the_socket(size)?);
        }
        Ok(figures)
    }

    /// The same by a pod whose sockets are served, as its direct connections are.
    fn at_the_socket(&self, size: usize) -> Result<Vec<Figure>> {
        let direct = Ends { cgroup: Some(self.node.cgroup().to_owned()), ..self.direct.clone() };
        let vip = Ends { address: IpAddr::V4(AT_SOCKET), ..direct.clone() };
        let measure = |kind| {
            let (value, anchor) = in_turns(kind, &vip, &direct, TURNS)?;
            Ok(figure(&format!("socket_{size}"), kind, value, ("direct", anchor), Bar::Ratio(0.97)))
        };
        KINDS.into_iter().map(measure).collect()
    }
}

/// Asked rarely: whoever asks has the daemon write a list.
fn await_service(node: &Node, name: &str) -> Result<()> {
    node.wait(PATIENCE, &format!("{name} is served"), |node| {
        let served = node.cli(&["svc", "show", name]).map(|_| true);
        if served.is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        served
    })
}

fn to_vip(ends: &Ends) -> Ends {
    Ends { address: IpAddr::V4(VIP), ..ends.clone() }
}

fn figure(way: &str, kind: Kind, value: f64, anchor: (&'static str, f64), bar: Bar) -> Figure {
    let name = format!("{way}_{}_per_s", kind.name());
    Figure { bench: "svc", name, value, anchor: Some(anchor), better: Better::More, bars: vec![bar] }
}

/// The ClusterIPs and ports of so many Services, the used one in the middle: what a list of rules costs on average.
fn frontends(size: usize) -> impl Iterator<Item = (Ipv4Addr, u16, bool)> {
    (0..size).map(move |i| match i == size / 2 {
        true => (VIP, PORT, true),
        false => (sync::address(i), 80, false),
    })
}

/// As kube-proxy's nftables mode writes them: one verdict map from address, protocol and port to a Service's chain, and from there to one for
/// its endpoint (pkg/proxy/nftables/proxier.go).
///
/// Services that no packet is for share a chain: a packet meets the same, and checking the jumps of tens of thousands of chains keeps the
/// kernel busy for minutes.
fn for_nftables(size: usize) -> String {
    let mut elements = String::new();
    for (i, (address, port, used)) in frontends(size).enumerate() {
        let (comma, chain) = (if i == 0 { "" } else { "," }, if used { "service" } else { "other" });
        // Writing into a string does not fail.
        let _ = write!(elements, "{comma}{address} . tcp . {port} : goto {chain}");
    }
    let server = Ipv4Addr::from(Routed::SERVER);
    format!(
        "table ip proxy\ndelete table ip proxy\ntable ip proxy {{\n \
         chain other {{ meta l4proto tcp dnat to 172.16.0.1:8080; }}\n \
         chain endpoint {{ meta l4proto tcp dnat to {server}:{PORT}; }}\n \
         chain service {{ numgen random mod 1 vmap {{ 0 : goto endpoint }}; }}\n \
         map ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}\n \
         chain services {{ ip daddr . meta l4proto . th dport vmap @ips; }}\n \
         chain pre {{ type nat hook prerouting priority dstnat; jump services; }}\n}}\n"
    )
}

/// As its iptables mode writes them: one rule after the other, each with its comment (pkg/proxy/iptables/proxier.go). Services have one endpoint
/// each, and the pods' range is the client's.
fn for_iptables(size: usize) -> String {
    let mut chains = String::new();
    let mut services = String::new();
    let mut rules = String::new();
    for (i, (address, port, used)) in frontends(size).enumerate() {
        let (backend, to): (Ipv4Addr, _) =
            if used { (Routed::SERVER.into(), PORT) } else { (Ipv4Addr::new(172, 16, 0, 1), 8080) };
        let (service, endpoint) = (format!("KUBE-SVC-{i:016}"), format!("KUBE-SEP-{i:016}"));
        let comment = format!("-m comment --comment \"default/service-{i}:http");
        let frontend = format!("-d {address}/32 -p tcp {comment} cluster IP\" -m tcp --dport {port}");
        // Writing into a string does not fail.
        let _ = writeln!(chains, ":{service} - [0:0]\n:{endpoint} - [0:0]");
        let _ = writeln!(services, "-A KUBE-SERVICES {frontend} -j {service}");
        let _ = writeln!(
            rules,
            "-A {service} ! -s 10.99.0.0/16 {frontend} -j KUBE-MARK-MASQ\n\
             -A {service} {comment} -> {backend}:{to}\" -j {endpoint}\n\
             -A {endpoint} -s {backend}/32 {comment}\" -j KUBE-MARK-MASQ\n\
             -A {endpoint} -p tcp {comment}\" -m tcp -j DNAT --to-destination {backend}:{to}"
        );
    }
    format!("{FILTER}*nat\n{NAT_CHAINS}{chains}{NAT_RULES}{services}{rules}COMMIT\n")
}

/// What it has in front of every new connection and behind it.
const FILTER: &str = "*filter\n\
    :KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-SERVICES - [0:0]\n\
    -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
    -A FORWARD -j KUBE-FORWARD\n\
    -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
    -A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
    -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
    -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
    -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
    COMMIT\n";
const NAT_CHAINS: &str = ":KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-SERVICES - [0:0]\n";
const NAT_RULES: &str = "-A PREROUTING -j KUBE-SERVICES\n\
    -A POSTROUTING -j KUBE-POSTROUTING\n\
    -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
    -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
    -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
    -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n";
