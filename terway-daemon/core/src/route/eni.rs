//! The plans of an ENI and of the node itself.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{NetOp, Route, Step, eni_table};
use crate::cidr;
use crate::ident::Addresses;

/// What an ENI's plan depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniInputs {
    /// Interface index: the table's number derives from it.
    pub ifindex: u32,
    /// Interface name.
    pub ifname: String,
    /// Bytes.
    pub mtu: u32,
    /// The *node's* addresses, which the ENI carries too so that the kernel has a source for ARP and ND on it. May be empty.
    pub node: Addresses,
    /// The vSwitch's IPv4 gateway, if pods have IPv4.
    pub gateway_v4: Option<Ipv4Addr>,
    /// The vSwitch's IPv6 gateway, if pods have IPv6.
    pub gateway_v6: Option<Ipv6Addr>,
}

/// Everything the kernel must hold for one ENI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniPlan {
    /// What it was made from.
    pub inputs: EniInputs,
    /// Steps in the order of execution, all in the node's namespace.
    pub steps: Vec<Step>,
}

impl EniPlan {
    /// The plan of an ENI whose addresses pods share.
    #[must_use]
    pub fn shared(inputs: EniInputs) -> Self {
        let dev = &inputs.ifname;
        let table = eni_table(inputs.ifindex);
        let mut ops = vec![NetOp::SetMtu { dev: dev.clone(), mtu: inputs.mtu }];
        if inputs.gateway_v4.is_some() {
            ops.push(sysctl(format!("net/ipv4/conf/{dev}/forwarding"), "1"));
            // The way back to a pod's peer may lead through another ENI; the programs check sources exactly.
            ops.push(sysctl(format!("net/ipv4/conf/{dev}/rp_filter"), "0"));
        }
        if inputs.gateway_v6.is_some() {
            ops.push(sysctl(format!("net/ipv6/conf/{dev}/disable_ipv6"), "0"));
            ops.push(sysctl(format!("net/ipv6/conf/{dev}/forwarding"), "1"));
            // A router's advertisement would put a second default route into the main table.
            ops.push(sysctl(format!("net/ipv6/conf/{dev}/accept_ra"), "0"));
            // The cloud gives an address out once. While DAD lasts, the kernel cannot ask for the gateway (ndisc_send_ns needs a link-local
            // address that is not tentative), and the first pod's packets wait for more than a second.
            ops.push(sysctl(format!("net/ipv6/conf/{dev}/accept_dad"), "0"));
        }
        for address in inputs.node.iter() {
            ops.push(NetOp::AddAddress { dev: dev.clone(), address: IpNetwork::from(address) });
        }
        ops.push(NetOp::SetUp { dev: dev.clone() });
        if let Some(gateway) = inputs.gateway_v4 {
            ops.push(NetOp::AddRoute(Route::via(cidr::ALL_V4.into(), gateway.into(), dev, table)));
        }
        if let Some(gateway) = inputs.gateway_v6 {
            // `onlink` spares the gateway a route of its own, which in the main table all ENIs of a vSwitch would share.
            ops.push(NetOp::AddRoute(Route::via(cidr::ALL_V6.into(), gateway.into(), dev, table)));
        }
        let steps = ops.into_iter().map(Step::host).collect();
        Self { inputs, steps }
    }

    /// The way back. The kernel does most of it by itself when the NIC is unplugged.
    #[must_use]
    pub fn teardown(&self) -> Vec<Step> {
        self.steps.iter().rev().filter_map(|step| step.op.inverse()).map(Step::host).collect()
    }
}

/// What the node's plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInputs {
    /// Pods have IPv4.
    pub v4: bool,
    /// Pods have IPv6.
    pub v6: bool,
    /// Interfaces with `accept_ra` 1: they would stop learning the node's default route once the node forwards.
    #[serde(default)]
    pub ra_links: Vec<String>,
}

/// What must hold on the node before the first ENI is set up. It is never taken back: others on the node may rely on it too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    /// Steps in the order of execution, all in the node's namespace.
    pub steps: Vec<Step>,
}

impl NodePlan {
    /// The plan of a node that forwards for its pods.
    #[must_use]
    pub fn forwarding(inputs: &NodeInputs) -> Self {
        let mut ops = Vec::new();
        if inputs.v4 {
            ops.push(sysctl("net/ipv4/ip_forward", "1"));
            ops.push(sysctl("net/ipv4/conf/default/forwarding", "1"));
            // The kernel takes the greater of `all` and the interface's own value; new interfaces start with `default`.
            ops.push(sysctl("net/ipv4/conf/all/rp_filter", "0"));
            ops.push(sysctl("net/ipv4/conf/default/rp_filter", "0"));
        }
        if inputs.v6 {
            ops.push(sysctl("net/ipv6/conf/all/disable_ipv6", "0"));
            ops.push(sysctl("net/ipv6/conf/default/disable_ipv6", "0"));
            // 2 = learn although forwarding (Documentation/networking/ip-sysctl.rst, accept_ra). Before forwarding, or the route is lost.
            ops.extend(inputs.ra_links.iter().map(|dev| sysctl(format!("net/ipv6/conf/{dev}/accept_ra"), "2")));
            ops.push(sysctl("net/ipv6/conf/all/forwarding", "1"));
            ops.push(sysctl("net/ipv6/conf/default/forwarding", "1"));
        }
        Self { steps: ops.into_iter().map(Step::host).collect() }
    }
}

fn sysctl(path: impl Into<String>, value: &str) -> NetOp {
    NetOp::Sysctl { path: path.into(), value: value.to_owned() }
}
