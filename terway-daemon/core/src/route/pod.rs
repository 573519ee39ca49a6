//! The plan of a pod's veth pair.
//!
//! It has two stages. `create` makes the pair, both ends down: no packet can pass. Then the daemon attaches its programs to the host
//! end and writes their maps, and `enable` opens the way. So a pod never sends a packet that the programs do not see.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{Neighbour, NetOp, Route, Rule, Step, StepNetns, TABLE_MAIN, VethEnd, alias, eni_table, gateway};
use crate::cidr::{self, Cidr};
use crate::ident::{Addresses, AttachmentKey, Family, Mac};

/// What a pod's plan depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInputs {
    /// Whose network it is.
    pub key: AttachmentKey,
    /// Name of the host end, see [`super::host_ifname`].
    pub host_ifname: String,
    /// Name of the pod's interface (`CNI_IFNAME`).
    pub pod_ifname: String,
    /// MAC of the host end: the pod's next hop.
    pub host_mac: Mac,
    /// MAC of the pod's interface.
    pub pod_mac: Mac,
    /// The pod's addresses.
    pub addresses: Addresses,
    /// Interface index of the ENI that owns the addresses.
    pub eni_ifindex: u32,
    /// Bytes.
    pub mtu: u32,
    /// Whether this interface carries the pod's default routes; only one of a pod's interfaces does.
    pub default_route: bool,
    /// Further destinations through this interface.
    #[serde(default)]
    pub extra_routes: Vec<IpNetwork>,
}

/// Everything the kernel must hold for one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPlan {
    /// What it was made from.
    pub inputs: PodInputs,
    /// Makes the pair and all that can be said while it is down.
    pub create: Vec<Step>,
    /// Opens the way: the host end first, so that the pod has a next hop from its first packet on.
    pub enable: Vec<Step>,
}

/// How a pod's plan is taken back, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Teardown {
    /// Cheap: makes the pod unreachable. Done before DEL is answered.
    pub detach: Vec<Step>,
    /// Costs a grace period of the kernel: deletes the pair, and all that hangs on it. Done in the background.
    pub delete: Vec<Step>,
}

impl PodPlan {
    /// The plan of a pod behind a veth pair, with policy routing to its ENI.
    #[must_use]
    pub fn veth(inputs: PodInputs) -> Self {
        let (pod_dev, host_dev) = (&inputs.pod_ifname, &inputs.host_ifname);
        let addresses: Vec<IpAddr> = inputs.addresses.iter().collect();
        let table = eni_table(inputs.eni_ifindex);

        // Steps in one namespace stand together: each run of them is one system call.
        let mut create = vec![
            Step::host(NetOp::AddVeth {
                host: VethEnd { name: host_dev.clone(), mac: inputs.host_mac },
                pod: VethEnd { name: pod_dev.clone(), mac: inputs.pod_mac },
                mtu: inputs.mtu,
                owner: alias(&inputs.key),
            }),
            Step::host(NetOp::NoAddrGen { dev: host_dev.clone() }),
        ];
        for address in &addresses {
            // With no link-local address the host could not ask for the pod's; and an answer that needs no asking cannot be forged.
            create.push(neighbour(StepNetns::Host, *address, inputs.pod_mac, host_dev));
        }
        if inputs.addresses.v6.is_some() {
            // Some runtimes create sandboxes with IPv6 off. Writing `all` reaches every interface that exists, `lo` included.
            create.push(sysctl("net/ipv6/conf/all/disable_ipv6", "0"));
            create.push(sysctl(&format!("net/ipv6/conf/{pod_dev}/accept_ra"), "0"));
        }
        create.push(Step::pod(NetOp::NoAddrGen { dev: pod_dev.clone() }));
        for address in &addresses {
            let gateway = gateway(Family::of(*address));
            create.push(Step::pod(NetOp::AddAddress { dev: pod_dev.clone(), address: IpNetwork::from(*address) }));
            create.push(neighbour(StepNetns::Pod, gateway, inputs.host_mac, pod_dev));
        }

        let mut enable = vec![Step::host(NetOp::SetUp { dev: host_dev.clone() })];
        for address in &addresses {
            enable.push(Step::host(NetOp::AddRoute(Route::link(IpNetwork::from(*address), host_dev))));
        }
        for address in &addresses {
            enable.push(Step::host(NetOp::AddRule(Rule::to_pod(*address))));
            enable.push(Step::host(NetOp::AddRule(Rule::from_pod(*address, table))));
        }
        enable.push(Step::pod(NetOp::SetUp { dev: pod_dev.clone() }));
        for dst in inputs.destinations() {
            let via = gateway(Family::of(dst.ip()));
            enable.push(Step::pod(NetOp::AddRoute(Route::via(dst, via, pod_dev, TABLE_MAIN))));
        }
        Self { create, enable, inputs }
    }

    /// All steps, in the order of execution.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.create.iter().chain(&self.enable)
    }

    /// The way back. Nothing is said about the pod's namespace: what is there goes with the pair, and the namespace may be gone.
    #[must_use]
    pub fn teardown(&self) -> Teardown {
        let inverse = self.steps().filter(|step| step.netns == StepNetns::Host).filter_map(|step| step.op.inverse());
        let mut detach = Vec::new();
        let mut delete = Vec::new();
        for op in inverse {
            match op {
                NetOp::DelLink { .. } => delete.push(Step::host(op)),
                // Closing an interface waits for a grace period under RTNL; deleting it closes it anyway.
                NetOp::SetDown { .. } => {}
                _ => detach.push(Step::host(op)),
            }
        }
        detach.reverse();
        Teardown { detach, delete }
    }
}

impl PodInputs {
    /// Destinations that the pod reaches through this interface, as far as it has an address of their family.
    fn destinations(&self) -> Vec<IpNetwork> {
        let mut all = Vec::new();
        if self.default_route {
            all.extend(self.addresses.v4.map(|_| IpNetwork::V4(cidr::ALL_V4)));
            all.extend(self.addresses.v6.map(|_| IpNetwork::V6(cidr::ALL_V6)));
        }
        all.extend(self.extra_routes.iter().map(Cidr::truncated).filter(|dst| match dst {
            IpNetwork::V4(_) => self.addresses.v4.is_some(),
            IpNetwork::V6(_) => self.addresses.v6.is_some(),
        }));
        all
    }
}

fn sysctl(path: &str, value: &str) -> Step {
    Step::pod(NetOp::Sysctl { path: path.to_owned(), value: value.to_owned() })
}

fn neighbour(netns: StepNetns, address: IpAddr, mac: Mac, dev: &str) -> Step {
    Step { netns, op: NetOp::AddNeighbour(Neighbour { address, mac, dev: dev.to_owned() }) }
}
