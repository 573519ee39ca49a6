//! Through a ClusterIP, with few Services and with many: against the direct way, and against what kube-proxy has the kernel do.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Result, ensure};
use terway_sim::node::cni::Pod;
use terway_sim::node::{Node, ServiceSpec};

use super::sync;
use crate::bench::path::{Routed, Turns, in_turns};
use crate::figures::{Bar, Better, Figure};
use crate::load::{Ends, Kind, PORT};

/// Services in the cluster.
const SIZES: [usize; 4] = [1, 1_000, 10_000, 30_000];
/// The size at which the rules' bars are set.
const RULES_AT: usize = 10_000;
/// Turns of two ways, one right after the other.
const TURNS: Turns = Turns { count: 16, length: Duration::from_millis(250) };
/// Longest time until the maps hold what the folder does.
const PATIENCE: Duration = Duration::from_secs(240);
/// The Service that is used; the others stand around it.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 200, 1);

/// Measures on a node with two pods, whose daemon watches its folder of objects. The clients' cgroup is not the node's, so that every
/// packet is translated: a pod whose sockets are has the direct way anyhow.
///
/// # Errors
/// When something does not carry traffic.
pub fn measure(node: &Node, client: &Pod, near: &Pod, prefix: &str) -> Result<Vec<Figure>> {
    let direct = Ends { client: client.ns.path().to_owned(), server: near.ns.path().to_owned(), address: near.v4()? };
    let vip = Ends { address: IpAddr::V4(VIP), ..direct.clone() };
    node.put_service(&ServiceSpec {
        name: "hot".to_owned(),
        cluster_ips: vec![IpAddr::V4(VIP)],
        ports: vec![(PORT, PORT)],
        endpoints: vec![(vec![near.v4()?], node.name().to_owned())],
    })?;
    node.wait(PATIENCE, "the Service is served", |node| Ok(node.cli(&["svc", "show", "default/hot"]).is_ok()))?;
    let (nftables, iptables) = (Routed::create(&format!("{prefix}-nf"))?, Routed::create(&format!("{prefix}-ip"))?);
    let mut figures = Vec::new();
    let mut served = 1;
    for size in SIZES {
        sync::fill(node, served..size)?;
        served = size;
        if size > 1 {
            let last = format!("bench/s{}", size - 1);
            node.wait(PATIENCE, "all Services are served", |node| Ok(node.cli(&["svc", "show", &last]).is_ok()))?;
        }
        for kind in [Kind::TcpRr, Kind::TcpCrr, Kind::UdpRr] {
            let (value, anchor) = in_turns(kind, &vip, &direct, TURNS)?;
            figures.push(figure(size, kind, value, ("direct", anchor), Bar::Ratio(0.97)));
        }
        nftables.rules("nft", &["-f", "-"], &for_nftables(size))?;
        let (value, anchor) = in_turns(Kind::TcpCrr, &vip, &through(&nftables), TURNS)?;
        let bar = |ratio| if size == RULES_AT { Bar::Ratio(ratio) } else { Bar::None };
        figures.push(figure(size, Kind::TcpCrr, value, ("nftables", anchor), bar(1.1)));
        if size <= RULES_AT {
            iptables.rules("iptables-legacy-restore", &[], &for_iptables(size))?;
            let (value, anchor) = in_turns(Kind::TcpCrr, &vip, &through(&iptables), TURNS)?;
            figures.push(figure(size, Kind::TcpCrr, value, ("iptables", anchor), bar(4.0)));
        }
    }
    ensure!(served == SIZES[SIZES.len() - 1]);
    Ok(figures)
}

fn through(routed: &Routed) -> Ends {
    Ends { address: IpAddr::V4(VIP), ..routed.ends() }
}

fn figure(size: usize, kind: Kind, value: f64, anchor: (&'static str, f64), bar: Bar) -> Figure {
    let name = format!("vip_{size}_{}_per_s", kind.name());
    Figure { bench: "svc", name, value, anchor: Some(anchor), better: Better::More, bars: vec![bar] }
}

/// The ClusterIPs and ports of so many Services, the used one in the middle.
fn frontends(size: usize) -> impl Iterator<Item = (Ipv4Addr, u16, bool)> {
    (0..size).map(move |i| match i == size / 2 {
        true => (VIP, PORT, true),
        false => (sync::address(i), 80, false),
    })
}

/// As kube-proxy's nftables mode writes them: one verdict map from address, protocol and port to a Service's chain, and from there to one for
/// each endpoint (pkg/proxy/nftables/proxier.go).
fn for_nftables(size: usize) -> String {
    let mut text = String::from("table ip proxy\ndelete table ip proxy\ntable ip proxy {\n");
    let mut elements = String::new();
    for (i, (address, port, used)) in frontends(size).enumerate() {
        let backend = if used { Routed::SERVER.into() } else { Ipv4Addr::new(172, 16, 0, 1) };
        let to = if used { PORT } else { 8080 };
        // Writing into a string does not fail.
        let _ = write!(
            text,
            " chain e{i} {{ meta l4proto tcp dnat to {backend}:{to}; }}\n chain s{i} {{ numgen random mod 1 vmap {{ 0 : goto e{i} }}; }}\n"
        );
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(elements, "{comma}{address} . tcp . {port} : goto s{i}");
    }
    let _ = write!(
        text,
        " map ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}\n \
         chain services {{ ip daddr . meta l4proto . th dport vmap @ips; }}\n \
         chain pre {{ type nat hook prerouting priority dstnat; jump services; }}\n}}\n"
    );
    text
}

/// As its iptables mode does: one rule after the other (pkg/proxy/iptables/proxier.go).
fn for_iptables(size: usize) -> String {
    let mut text = String::from("*nat\n:SERVICES - [0:0]\n");
    let mut rules = String::from("-A PREROUTING -j SERVICES\n");
    for (i, (address, port, used)) in frontends(size).enumerate() {
        let (backend, to): (Ipv4Addr, _) =
            if used { (Routed::SERVER.into(), PORT) } else { (Ipv4Addr::new(172, 16, 0, 1), 8080) };
        let _ = write!(text, ":S{i} - [0:0]\n:E{i} - [0:0]\n");
        let _ = write!(
            rules,
            "-A SERVICES -d {address}/32 -p tcp -m tcp --dport {port} -j S{i}\n-A S{i} -j E{i}\n\
             -A E{i} -p tcp -m tcp -j DNAT --to-destination {backend}:{to}\n"
        );
    }
    text + &rules + "COMMIT\n"
}
