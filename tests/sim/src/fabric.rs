//! The border between the simulated control plane (`cloud`) and the simulated wire: what the one tells the other.
//!
//! The cloud calls a [`Fabric`] from a blocking thread, one call at a time and in the order in which the changes became true in the
//! VPC. A fabric never calls back into the cloud.

pub mod vpc;

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use terway_core::ident::{EniId, Mac, VSwitchId};

/// All that the wire has to know of an ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FabricEni {
    /// Its id.
    pub id: EniId,
    /// The Ethernet address the NIC has in the node.
    pub mac: Mac,
    /// Whether it is the instance's own interface (`eth0`).
    pub primary: bool,
    /// The vSwitch it stands in.
    pub vswitch: VSwitchId,
    /// The vSwitch's IPv4 block.
    pub cidr_v4: Ipv4Network,
    /// The IPv4 gateway, in the block and answered by the VPC.
    pub gateway_v4: Ipv4Addr,
    /// The vSwitch's IPv6 block, if it has one.
    pub cidr_v6: Option<Ipv6Network>,
    /// The IPv6 gateway, if there is a block.
    pub gateway_v6: Option<Ipv6Addr>,
    /// The IPv4 addresses it may send from and receives for; the primary address comes first.
    pub v4: Vec<Ipv4Addr>,
    /// The IPv6 addresses.
    pub v6: Vec<Ipv6Addr>,
}

/// A VPC that carries packets.
pub trait Fabric: Send + Sync {
    /// Makes the NIC of `eni` appear in `node`, and carries packets of its addresses from now on.
    ///
    /// The cloud's delays (attaching, late arrival of the NIC) lie before this call; it should return as soon as the NIC is there.
    ///
    /// # Errors
    /// When the NIC could not be made. The cloud logs it and goes on: the daemon sees an ENI that is attached and never arrives.
    fn hotplug(&self, node: &str, eni: &FabricEni) -> anyhow::Result<()>;

    /// Takes the NIC of an ENI out of its node, wherever in that node it is by now. Succeeds when there is none.
    ///
    /// # Errors
    /// When the NIC is still there afterwards.
    fn hot_unplug(&self, node: &str, eni: &EniId, mac: Mac) -> anyhow::Result<()>;

    /// The addresses of a hotplugged ENI, all of them and the primary one first, replacing what was said before.
    ///
    /// # Errors
    /// When the old set is still in force.
    fn set_addresses(&self, eni: &EniId, v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> anyhow::Result<()>;

    /// The prefixes of a hotplugged ENI, all of them, replacing what was said before; none after a hotplug. Their addresses are carried as
    /// single ones are. A fabric without packets has nothing to do.
    ///
    /// # Errors
    /// When the old set is still in force.
    fn set_prefixes(&self, _eni: &EniId, _v4: &[Ipv4Network], _v6: &[Ipv6Network]) -> anyhow::Result<()> {
        Ok(())
    }
}

/// No wire at all: for tests of the API alone, where no packet flows and no NIC ever appears.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFabric;

impl Fabric for NoFabric {
    fn hotplug(&self, _node: &str, _eni: &FabricEni) -> anyhow::Result<()> {
        Ok(())
    }

    fn hot_unplug(&self, _node: &str, _eni: &EniId, _mac: Mac) -> anyhow::Result<()> {
        Ok(())
    }

    fn set_addresses(&self, _eni: &EniId, _v4: &[Ipv4Addr], _v6: &[Ipv6Addr]) -> anyhow::Result<()> {
        Ok(())
    }
}
