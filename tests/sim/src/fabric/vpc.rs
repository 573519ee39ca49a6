//! A VPC of one network namespace: each ENI is a veth whose one end stands here and whose other end appears in a node.
//!
//! What a vSwitch does is done by the kernel: assigned addresses are routes to their veth with the ENI's MAC as permanent neighbour,
//! gateways are addresses of this namespace, ARP for anything in the VPC is answered by proxy, and nftables drops and counts what an
//! ENI must not send. There is no link from here to the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use terway_core::cidr::Cidr as _;
use terway_core::ident::{EniId, Mac, VSwitchId};

use super::{Fabric, FabricEni};
use crate::netns::{NetNs, feed};

/// The rules of the VPC. What stays on the link is not checked: link-local and multicast, DAD probes from `::`, and neighbour discovery,
/// whose probes a node may still send from an address seconds after it was taken away.
const RULES: &str = "table inet vpc {
  set macs { type ifname . ether_addr; }
  set v4 { type ifname . ipv4_addr; }
  set v6 { type ifname . ipv6_addr; }
  set prefixes4 { type ifname . ipv4_addr; flags interval; }
  set prefixes6 { type ifname . ipv6_addr; flags interval; }
  counter foreign_mac {}
  counter foreign_v4 {}
  counter foreign_v6 {}
  chain prerouting {
    type filter hook prerouting priority raw; policy accept;
    iifname \"lo\" accept
    iifname . ether saddr != @macs counter name foreign_mac drop
    ip daddr 224.0.0.0/4 accept
    meta nfproto ipv4 iifname . ip saddr @prefixes4 accept
    meta nfproto ipv4 iifname . ip saddr != @v4 counter name foreign_v4 drop
    ip6 saddr { ::, fe80::/10 } accept
    ip6 hoplimit 255 icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept
    meta nfproto ipv6 iifname . ip6 saddr @prefixes6 accept
    meta nfproto ipv6 iifname . ip6 saddr != @v6 counter name foreign_v6 drop
  }
}
";

/// How many packets the VPC dropped because they did not belong to the ENI they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spoofed {
    /// The Ethernet source is not the ENI's.
    pub mac: u64,
    /// The IPv4 source is not assigned to the ENI.
    pub v4: u64,
    /// The IPv6 source is not assigned to the ENI.
    pub v6: u64,
}

impl Spoofed {
    /// All of them.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.mac + self.v4 + self.v6
    }
}

/// The VPC. Dropping it removes the namespace and with it every veth.
#[derive(Debug)]
pub struct Vpc {
    ns: NetNs,
    mtu: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<String, Arc<NetNs>>,
    enis: BTreeMap<EniId, HotpluggedEni>,
    primaries: BTreeMap<String, FabricEni>,
    gateways: BTreeSet<Ipv4Addr>,
    made: u32,
}

#[derive(Debug)]
struct HotpluggedEni {
    veth: String,
    mac: Mac,
    addresses: BTreeSet<IpAddr>,
    prefixes: BTreeSet<IpNetwork>,
}

impl Vpc {
    /// Makes the namespace `name` with routing and the anti-spoofing rules; `mtu` in bytes is that of every ENI.
    ///
    /// # Errors
    /// When the kernel or one of `ip` and `nft` refuses.
    pub fn create(name: &str, mtu: u32) -> Result<Self> {
        let ns = NetNs::create(name)?;
        ns.sysctl(&[
            ("ipv4/conf/all/forwarding", "1"),
            ("ipv4/conf/default/forwarding", "1"),
            ("ipv4/conf/default/proxy_arp", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            // Each error must arrive, not one a second: tests count them.
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/default/forwarding", "1"),
            ("ipv6/conf/default/accept_dad", "0"),
        ])?;
        // A VPC is silent about addresses it does not have.
        ns.ip("route add blackhole default metric 4000\nroute add blackhole ::/0 metric 4000\n")?;
        feed(ns.command("nft").args(["-f", "-"]), RULES).context("load the VPC's rules")?;
        Ok(Self { ns, mtu, state: Mutex::default() })
    }

    /// The namespace, for servers of the cloud.
    #[must_use]
    pub const fn netns(&self) -> &NetNs {
        &self.ns
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between two kernel changes leaves nothing that the next change relies on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a node known, so that the cloud may hotplug ENIs into it.
    pub fn add_node(&self, node: &str, ns: Arc<NetNs>) {
        self.state().nodes.insert(node.to_owned(), ns);
    }

    /// Forgets a node; its ENIs stay until they are unplugged.
    pub fn remove_node(&self, node: &str) {
        self.state().nodes.remove(node);
    }

    /// Listens at an address of the VPC's own, such as the metadata service's 100.100.100.200:80.
    ///
    /// # Errors
    /// When the address cannot be added or is in use.
    pub fn listen(&self, at: SocketAddr) -> Result<TcpListener> {
        self.ns.ip(&format!("addr replace {}/32 dev lo\n", at.ip()))?;
        self.ns.run(|| TcpListener::bind(at))?.with_context(|| format!("listen at {at} in the VPC"))
    }

    /// A host that is on the VPC but none of our nodes, with addresses outside every vSwitch; its namespace is the caller's.
    ///
    /// # Errors
    /// When the link cannot be made or configured.
    pub fn attach_external_host(&self, name: &str, ns: Arc<NetNs>, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<FabricEni> {
        let [a, b, c, _] = v4.octets();
        let eni = FabricEni {
            id: EniId::new(format!("eni-{name}")),
            mac: Mac::derived(&[b"external", name.as_bytes()]),
            primary: true,
            vswitch: VSwitchId::new(format!("vsw-{name}")),
            cidr_v4: Ipv4Network::new(v4, 24)?.truncated(),
            gateway_v4: Ipv4Addr::new(a, b, c, 253),
            cidr_v6: Some(Ipv6Network::new(v6, 64)?.truncated()),
            gateway_v6: Some(Ipv6Addr::from(u128::from(v6) | 0xffff)),
            v4: vec![v4],
            v6: vec![v6],
        };
        self.add_node(name, Arc::clone(&ns));
        self.hotplug(name, &eni)?;
        configure_primary(&ns, &eni)?;
        Ok(eni)
    }

    /// What was dropped by the anti-spoofing rules so far.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn spoofed(&self) -> Result<Spoofed> {
        let json = self.ns.output("nft", &["-j", "list", "counters", "table", "inet", "vpc"])?;
        let json: serde_json::Value = serde_json::from_str(&json).context("read nft's JSON")?;
        let mut spoofed = Spoofed::default();
        for counter in json["nftables"].as_array().into_iter().flatten() {
            let counter = &counter["counter"];
            let packets = counter["packets"].as_u64().unwrap_or_default();
            match counter["name"].as_str() {
                Some("foreign_mac") => spoofed.mac = packets,
                Some("foreign_v4") => spoofed.v4 = packets,
                Some("foreign_v6") => spoofed.v6 = packets,
                _ => {}
            }
        }
        Ok(spoofed)
    }

    /// The primary ENI of a node, once the cloud has hotplugged it.
    #[must_use]
    pub fn primary(&self, node: &str) -> Option<FabricEni> {
        self.state().primaries.get(node).cloned()
    }

    /// Gives the path behind one ENI another MTU, in bytes, as a tunnel or another network on the way would have.
    ///
    /// # Errors
    /// When the ENI is not hotplugged or the kernel refuses.
    pub fn set_mtu(&self, eni: &EniId, mtu: u32) -> Result<()> {
        let state = self.state();
        let hotplugged = state.enis.get(eni).with_context(|| format!("{eni} is not hotplugged"))?;
        self.ns.ip(&format!("link set {} mtu {mtu}\n", hotplugged.veth))
    }

    /// What the VPC carries for each ENI now.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<EniId, BTreeSet<IpAddr>> {
        self.state().enis.iter().map(|(id, hotplugged)| (id.clone(), hotplugged.addresses.clone())).collect()
    }

    /// Removes the namespace and says what went wrong, which drop cannot.
    ///
    /// # Errors
    /// When processes in it do not end or its name cannot be removed.
    pub fn delete(self) -> Result<()> {
        self.ns.kill_processes()?;
        self.ns.delete()
    }

    /// Changes routes, neighbours and rules of one ENI from `old` to `new`.
    fn readdress(&self, veth: &str, mac: Mac, old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>) -> Result<()> {
        let mut ip = String::new();
        let mut nft = String::new();
        for address in old.difference(new) {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            writeln!(ip, "route del {address}/{bits} dev {veth}")?;
            writeln!(ip, "neigh del {address} dev {veth}")?;
            writeln!(nft, "delete element inet vpc {} {{ \"{veth}\" . {address} }}", set_of(*address))?;
        }
        for address in new.difference(old) {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            // Not learnt by ARP: the VPC knows where it has put an address, whatever the node says.
            writeln!(ip, "neigh replace {address} lladdr {mac} dev {veth} nud permanent")?;
            writeln!(ip, "route replace {address}/{bits} dev {veth}")?;
            writeln!(nft, "add element inet vpc {} {{ \"{veth}\" . {address} }}", set_of(*address))?;
        }
        if !nft.is_empty() {
            feed(self.ns.command("nft").args(["-f", "-"]), &nft).with_context(|| format!("nft in the VPC:\n{nft}"))?;
            self.ns.ip(&ip)?;
        }
        Ok(())
    }
}

impl Fabric for Vpc {
    fn hotplug(&self, node: &str, eni: &FabricEni) -> Result<()> {
        let mut state = self.state();
        if state.enis.contains_key(&eni.id) {
            bail!("{} is hotplugged already", eni.id);
        }
        let node_ns = Arc::clone(state.nodes.get(node).with_context(|| format!("no node {node} on this VPC"))?);
        let inside = if eni.primary { "eth0".to_owned() } else { next_name(&node_ns)? };
        state.made += 1;
        let veth = format!("v{}", state.made);
        let (mtu, mac, peer, metric) = (self.mtu, eni.mac, node_ns.name(), 1000 + state.made);
        // The kernel adds the link-local route itself, but up to a second after the carrier (net/core/link_watch.c), and answers
        // no solicitation of the gateway's address until then.
        let mut ip = format!(
            "link add {veth} mtu {mtu} type veth peer name {inside} address {mac} mtu {mtu} netns {peer}\n\
             link set {veth} up\n\
             route add fe80::/64 dev {veth} metric {metric}\n"
        );
        if state.gateways.insert(eni.gateway_v4) {
            writeln!(ip, "addr add {}/32 dev lo", eni.gateway_v4)?;
        }
        if let Some(gateway) = eni.gateway_v6 {
            // On each link: ND answers for an address of this very link only.
            writeln!(ip, "addr add {gateway}/128 dev {veth} nodad")?;
        }
        let nft = format!("add element inet vpc macs {{ \"{veth}\" . {mac} }}\n");
        feed(self.ns.command("nft").args(["-f", "-"]), &nft).with_context(|| format!("nft in the VPC: {nft}"))?;
        self.ns.ip(&ip)?;
        // Else a proxy waits up to 0.8 s before it answers (net/ipv4/arp.c, arp_process).
        self.ns.sysctl(&[(&format!("ipv4/neigh/{veth}/proxy_delay"), "0")])?;
        let addresses = all(&eni.v4, &eni.v6);
        self.readdress(&veth, mac, &BTreeSet::new(), &addresses)?;
        state.enis.insert(eni.id.clone(), HotpluggedEni { veth, mac, addresses, prefixes: BTreeSet::new() });
        if eni.primary {
            state.primaries.insert(node.to_owned(), eni.clone());
        }
        Ok(())
    }

    fn hot_unplug(&self, _node: &str, eni: &EniId, _mac: Mac) -> Result<()> {
        let mut state = self.state();
        let Some(hotplugged) = state.enis.remove(eni) else { return Ok(()) };
        let HotpluggedEni { veth, mac, addresses, prefixes } = hotplugged;
        let mut nft = format!("delete element inet vpc macs {{ \"{veth}\" . {mac} }}\n");
        for address in addresses {
            writeln!(nft, "delete element inet vpc {} {{ \"{veth}\" . {address} }}", set_of(address))?;
        }
        for prefix in prefixes {
            writeln!(nft, "delete element inet vpc {} {{ \"{veth}\" . {prefix} }}", prefixes_of(prefix))?;
        }
        feed(self.ns.command("nft").args(["-f", "-"]), &nft).with_context(|| format!("nft in the VPC:\n{nft}"))?;
        // Deleting this end deletes the other wherever it is; a node that is gone has taken both with it.
        match self.ns.ip(&format!("link del {veth}\n")) {
            Err(error) if !format!("{error:#}").contains("Cannot find device") => Err(error),
            _ => Ok(()),
        }
    }

    fn set_addresses(&self, eni: &EniId, v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> Result<()> {
        let mut state = self.state();
        let hotplugged = state.enis.get_mut(eni).with_context(|| format!("{eni} is not hotplugged"))?;
        let new = all(v4, v6);
        self.readdress(&hotplugged.veth, hotplugged.mac, &hotplugged.addresses, &new)?;
        hotplugged.addresses = new;
        Ok(())
    }

    fn set_prefixes(&self, eni: &EniId, v4: &[Ipv4Network], v6: &[Ipv6Network]) -> Result<()> {
        let mut state = self.state();
        let HotpluggedEni { veth, mac, prefixes, .. } =
            state.enis.get_mut(eni).with_context(|| format!("{eni} is not hotplugged"))?;
        let new: BTreeSet<IpNetwork> =
            v4.iter().copied().map(IpNetwork::V4).chain(v6.iter().copied().map(IpNetwork::V6)).collect();
        // One neighbour for all addresses of all prefixes, of either family: an /80 has too many for one each.
        let mut ip = format!("neigh replace {BEHIND} lladdr {mac} dev {veth} nud permanent\n");
        let mut nft = String::new();
        for prefix in prefixes.difference(&new) {
            writeln!(ip, "route del {prefix} dev {veth}")?;
            writeln!(nft, "delete element inet vpc {} {{ \"{veth}\" . {prefix} }}", prefixes_of(*prefix))?;
        }
        for prefix in new.difference(prefixes) {
            writeln!(ip, "route replace {prefix} via inet6 {BEHIND} dev {veth}")?;
            writeln!(nft, "add element inet vpc {} {{ \"{veth}\" . {prefix} }}", prefixes_of(*prefix))?;
        }
        if !nft.is_empty() {
            feed(self.ns.command("nft").args(["-f", "-"]), &nft).with_context(|| format!("nft in the VPC:\n{nft}"))?;
            self.ns.ip(&ip)?;
        }
        *prefixes = new;
        Ok(())
    }
}

/// Stands for the far end of every veth in routes of prefixes; nobody asks for it, its Ethernet address is told.
const BEHIND: &str = "fe80::2";

/// Configures `eth0` of an instance as DHCP and cloud-init do: the vSwitch's prefix for IPv4, the bare address for IPv6, and the
/// default routes.
///
/// # Errors
/// The words of `ip`.
pub fn configure_primary(ns: &NetNs, eni: &FabricEni) -> Result<()> {
    let mut ip = String::from("link set eth0 up\n");
    if let Some(address) = eni.v4.first() {
        let (bits, gateway) = (eni.cidr_v4.prefix(), eni.gateway_v4);
        write!(ip, "addr add {address}/{bits} dev eth0\nroute add default via {gateway} dev eth0\n")?;
    }
    if let (Some(address), Some(gateway)) = (eni.v6.first(), eni.gateway_v6) {
        write!(
            ip,
            "addr add {address}/128 dev eth0 nodad\nroute add {gateway} dev eth0\n\
             route add ::/0 via {gateway} dev eth0 src {address}\n"
        )?;
    }
    ns.ip(&ip)
}

fn all(v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> BTreeSet<IpAddr> {
    v4.iter().copied().map(IpAddr::V4).chain(v6.iter().copied().map(IpAddr::V6)).collect()
}

const fn set_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "v4" } else { "v6" }
}

const fn prefixes_of(prefix: IpNetwork) -> &'static str {
    match prefix {
        IpNetwork::V4(_) => "prefixes4",
        IpNetwork::V6(_) => "prefixes6",
    }
}

/// The lowest free `ethN` above 0 of a node.
fn next_name(ns: &NetNs) -> Result<String> {
    let taken: BTreeSet<String> = ns.run(|| -> Result<_> {
        let links = nix::net::if_::if_nameindex().context("list the node's links")?;
        Ok(links.into_iter().map(|link| link.name().to_string_lossy().into_owned()).collect())
    })??;
    (1..).map(|n| format!("eth{n}")).find(|name| !taken.contains(name)).context("no interface name is free")
}

#[cfg(test)]
mod tests;
