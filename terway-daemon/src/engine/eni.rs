//! The node's side of an ENI: its NIC, its routing table and the datapath's programs; set up and torn down.

use std::time::Duration;

use terway_core::cloud::Subnet;
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, Mac};
use terway_core::route::{EniInputs, EniPlan};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::Engine;
use super::pod::net_error;
use super::uplink::{attach, detach};
use crate::net::Nic;

/// Limit of a metadata request whose answer is kept from an earlier one.
const METADATA_WITHIN: Duration = Duration::from_secs(1);

impl Engine {
    /// Waits for the NIC with this MAC and sets it up. Idempotent.
    pub(super) async fn configure_nic(&self, mac: Mac) -> Result<(u32, Subnet), Error> {
        let within = self.info.nic_within;
        let nic = self
            .links
            .wait_for_mac(mac, Instant::now() + within)
            .await
            .ok_or_else(|| Error::new(errors::NIC_MISSING, format!("MAC {mac}, waited {within:?}")))?;
        // Asked after the NIC is there: the metadata service knows an ENI no earlier.
        let subnet = self.subnet(mac).await?;
        let plan = self.eni_plan(&nic, &subnet);
        let ifindex = nic.ifindex;
        // The node has no address on it that the VPC knows.
        let uplink = self.uplink(ifindex, Addresses::default(), &subnet);
        {
            let _wiring = self.wiring.read().await;
            self.host.ensure_eni(&plan).await.map_err(net_error)?;
            self.with_datapath(move |datapath| attach(datapath, ifindex, uplink.as_ref())).await?;
            self.audit.eni_is_set_up(mac, plan.clone());
        }
        // An audit that waits to write would hold up every ADD behind this.
        self.host.wait_link_local(&plan).await.map_err(net_error)?;
        info!(%mac, ifindex, name = nic.name, gateway = %subnet.gateway_v4, "ENI is ready");
        Ok((ifindex, subnet))
    }

    /// The subnet of an attached ENI from the metadata service, or the kept one.
    pub(super) async fn subnet(&self, mac: Mac) -> Result<Subnet, Error> {
        let asked = self.cloud.subnet(mac);
        let subnet = match self.subnets.get(mac) {
            None => asked.await.map_err(|error| Error::new(errors::CLOUD_FAILED, error.to_string()))?,
            Some(kept) => match timeout(METADATA_WITHIN, asked).await {
                Ok(Ok(subnet)) => subnet,
                _ => {
                    warn!(%mac, "failed to read the ENI's subnet from the metadata service; using the kept one");
                    kept
                }
            },
        };
        self.subnets.keep(mac, &subnet);
        Ok(subnet)
    }

    /// Takes back what [`configure_nic`](Self::configure_nic) did, as far as the NIC is still there. Best effort: detaching unplugs it anyway.
    pub(super) async fn release_nic(&self, mac: Mac) {
        let _wiring = self.wiring.read().await;
        self.subnets.forget(mac);
        self.audit.eni_is_released(mac);
        let Some(nic) = self.links.nics().into_iter().find(|nic| nic.mac == mac) else { return };
        let ifindex = nic.ifindex;
        if let Err(error) = self.with_datapath(move |datapath| detach(datapath, ifindex)).await {
            warn!(%mac, %error, "failed to detach the programs of an ENI");
        }
        if let Err(error) = self.host.remove_eni(&self.bare_eni_plan(&nic)).await {
            warn!(%mac, %error, "failed to remove the routes of an ENI");
        }
    }

    fn eni_plan(&self, nic: &Nic, subnet: &Subnet) -> EniPlan {
        EniPlan::shared(EniInputs {
            ifindex: nic.ifindex,
            ifname: nic.name.clone(),
            mtu: self.info.nic_mtu,
            node: self.info.addresses,
            gateway_v4: self.info.stack.v4().then_some(subnet.gateway_v4),
            gateway_v6: subnet.gateway_v6.filter(|_| self.info.stack.v6()),
        })
    }

    /// A plan whose teardown removes what does not depend on the subnet; the rest goes with the NIC.
    fn bare_eni_plan(&self, nic: &Nic) -> EniPlan {
        EniPlan::shared(EniInputs {
            ifindex: nic.ifindex,
            ifname: nic.name.clone(),
            mtu: self.info.nic_mtu,
            node: self.info.addresses,
            gateway_v4: None,
            gateway_v6: None,
        })
    }
}
