//! Uplinks for external clients of Services: the ENIs at which the datapath serves them, and the node's addresses there.
//!
//! The primary ENI is the node's own and carries no pods; it gets the programs only for this, and nothing else of it is touched.

use std::sync::Arc;
use std::time::Duration;

use terway_core::cloud::Subnet;
use terway_core::errors::{self, Error};
use terway_core::ident::Addresses;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Engine;
use crate::bpf::{BpfError, Datapath, Uplink};

/// The first and the longest time until the primary ENI is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

impl Engine {
    /// Attaches the primary ENI for external clients of Services; or detaches it, if this daemon serves no Services. Ends when that is done.
    pub async fn serve_external_clients(self: Arc<Self>) {
        let mut pause = RETRY.0;
        loop {
            let outcome = if self.info.services { self.open_primary().await } else { self.close_uplinks().await };
            match outcome {
                Ok(()) => return,
                Err(error) => {
                    let mac = self.info.identity.primary_mac;
                    warn!(%mac, %error, again_in = ?pause, "failed to attach the primary ENI for external clients of Services");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    async fn open_primary(&self) -> Result<(), Error> {
        let (mac, within) = (self.info.identity.primary_mac, self.info.nic_within);
        let nic = self
            .links
            .wait_for_mac(mac, Instant::now() + within)
            .await
            .ok_or_else(|| Error::new(errors::NIC_MISSING, format!("MAC {mac}, waited {within:?}")))?;
        let subnet = self.subnet(mac).await?;
        let uplink = self.uplink(nic.ifindex, self.info.addresses, &subnet);
        self.with_datapath(move |datapath| attach(datapath, nic.ifindex, uplink.as_ref())).await?;
        info!(%mac, ifindex = nic.ifindex, ports = ?self.info.own_ports, "external clients of Services are served");
        Ok(())
    }

    /// Other ENIs keep their programs, for their pods.
    async fn close_uplinks(&self) -> Result<(), Error> {
        let primary = self.links.nics().into_iter().find(|nic| nic.mac == self.info.identity.primary_mac);
        self.with_datapath(move |datapath| {
            for uplink in datapath.uplinks().list()? {
                if primary.as_ref().is_some_and(|primary| primary.ifindex == uplink.ifindex) {
                    datapath.interfaces().detach_eni(uplink.ifindex)?;
                }
                datapath.uplinks().remove(uplink.ifindex)?;
            }
            Ok(())
        })
        .await
    }

    /// The uplink entry of an ENI, if the node serves Services. `node` are the node's addresses that the VPC accepts from it.
    pub(super) fn uplink(&self, ifindex: u32, node: Addresses, subnet: &Subnet) -> Option<Uplink> {
        self.info.services.then(|| Uplink {
            ifindex,
            node,
            gateway_v4: self.info.stack.v4().then_some(subnet.gateway_v4),
            gateway_v6: subnet.gateway_v6.filter(|_| self.info.stack.v6()),
            ports: self.info.own_ports.clone(),
        })
    }
}

/// Attaches the programs of an ENI, which meet a complete map.
pub(super) fn attach(datapath: &Datapath, ifindex: u32, uplink: Option<&Uplink>) -> Result<(), BpfError> {
    if let Some(uplink) = uplink {
        datapath.uplinks().set(uplink)?;
    }
    datapath.interfaces().attach_eni(ifindex).map(drop)
}

/// Reverses [`attach`].
pub(super) fn detach(datapath: &Datapath, ifindex: u32) -> Result<(), BpfError> {
    datapath.interfaces().detach_eni(ifindex)?;
    datapath.uplinks().remove(ifindex).map(drop)
}
