//! What the engine tells about itself: CHECK, status, list, readiness, gauges.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use terway_abi::Drop;
use terway_core::errors::{self, Error};
use terway_core::ident::AttachmentKey;
use terway_core::ipam::Phase;
use terway_core::route::host_ifname;
use terway_proto::v1;

use super::Engine;
use super::pod::{PodOptions, net_error};

impl Engine {
    /// CHECK: compares a pod's network with what was set up.
    ///
    /// # Errors
    /// [`errors::UNKNOWN_ATTACHMENT`], or [`errors::CHECK_FAILED`] with every difference.
    pub async fn check(
        self: &Arc<Self>,
        key: AttachmentKey,
        netns: String,
        addresses: Vec<String>,
    ) -> Result<(), Error> {
        let attachment = self.core().pool.get(&key);
        let Some(attachment) = attachment.filter(|a| a.phase != Phase::Releasing) else {
            return Err(Error::new(errors::UNKNOWN_ATTACHMENT, key.to_string()));
        };
        let mut wrong = Vec::new();
        for text in addresses {
            let given: Option<IpAddr> = text.split('/').next().and_then(|a| a.parse().ok());
            if !given.is_some_and(|given| attachment.grant.addresses.iter().any(|own| own == given)) {
                wrong.push(format!("the runtime's result has {text}, which is not the pod's"));
            }
        }
        let options = PodOptions::decode(&attachment.options);
        let plan = self.plan(&key, &attachment.pod, &attachment.grant, &options);
        let path = if netns.is_empty() { attachment.netns } else { netns };
        let netns = self.host.open_netns(&path).map_err(net_error)?;
        let differences = self.host.check_pod(&plan, Some(&netns)).await.map_err(net_error)?;
        wrong.extend(differences.into_iter().map(|difference| difference.sentence));

        let own = attachment.grant.addresses;
        let endpoint = self.datapath.endpoints().into_iter().find(|endpoint| endpoint.addresses == own);
        match endpoint {
            None => wrong.push("the datapath does not know the pod".to_owned()),
            Some(endpoint) => {
                if !self.with_datapath(move |datapath| datapath.pod_is_attached(endpoint.host_ifindex)).await? {
                    wrong.push("the datapath's programs are not attached to the pod's interface".to_owned());
                }
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::new(errors::CHECK_FAILED, wrong.join("; "))) }
    }

    /// Whether the node can take pods, or what is in the way. A shortage of addresses on a node with pods is not: a runtime would make the
    /// node NotReady for it, and Kubernetes evict pods that lack nothing (docs/adr/0007).
    ///
    /// # Errors
    /// What is in the way.
    pub fn ready(&self) -> Result<(), Error> {
        if let Some(error) = self.fatal.borrow().clone() {
            return Err(error);
        }
        let core = self.core();
        let stats = core.pool.stats();
        if stats.bound + stats.idle + stats.pending + stats.cooling > 0 {
            return Ok(());
        }
        core.pool.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// The whole state on one screen.
    #[must_use]
    pub fn status(&self) -> v1::StatusResponse {
        let (stats, enis, mut problems) = {
            let core = self.core();
            (core.pool.stats(), core.pool.enis(), core.pool.problems())
        };
        problems.extend(self.fatal.borrow().clone());
        let nics: HashMap<_, _> = self.links.nics().into_iter().map(|nic| (nic.mac, nic.name)).collect();
        let enis = enis.into_iter().map(|eni| v1::EniState {
            id: eni.id.map(|id| id.to_string()).unwrap_or_default(),
            mac: eni.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            vswitch: eni.vswitch.to_string(),
            state: eni.phase.as_str().to_owned(),
            ifname: eni.mac.and_then(|mac| nics.get(&mac).cloned()).unwrap_or_default(),
            addresses: u32::try_from(eni.addresses.len()).unwrap_or(u32::MAX),
            bound: eni.bound,
        });
        v1::StatusResponse {
            ready: self.ready().is_ok(),
            problems: problems.iter().map(crate::server::detail).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.facts.node.clone(),
            pool: Some(v1::Pool {
                capacity: stats.capacity,
                idle: stats.idle,
                bound: stats.bound,
                cooling: stats.cooling,
                pending: stats.pending,
            }),
            enis: enis.collect(),
            datapath: Some(self.datapath_view()),
        }
    }

    fn datapath_view(&self) -> v1::Datapath {
        let counters = self.datapath.counters().unwrap_or_default();
        let drops = Drop::ALL.iter().map(|reason| (reason.name().to_owned(), counters.drop(*reason).packets));
        v1::Datapath {
            pod_hook: "clsact".to_owned(),
            eni_hook: if self.datapath.features().tcx { "tcx" } else { "clsact" }.to_owned(),
            abi_version: terway_abi::ABI_VERSION,
            endpoints: self.datapath.endpoints().len() as u64,
            drops: drops.collect(),
        }
    }

    /// The attachments of this node.
    #[must_use]
    pub fn list(&self) -> Vec<v1::PodState> {
        let attachments = self.core().pool.list();
        attachments
            .into_iter()
            .map(|a| v1::PodState {
                host_ifname: host_ifname(&a.pod, &a.key),
                attachment: Some(v1::Attachment {
                    network: a.key.network,
                    container_id: a.key.container_id,
                    ifname: a.key.ifname,
                }),
                pod: Some(v1::Pod { namespace: a.pod.namespace, name: a.pod.name, uid: a.pod.uid }),
                phase: a.phase.as_str().to_owned(),
                addresses: a.grant.addresses.iter().map(|address| address.to_string()).collect(),
                eni: a.grant.eni.to_string(),
            })
            .collect()
    }

    /// Brings the gauges up to date; called before each scrape.
    pub fn refresh_gauges(&self) {
        let (stats, enis) = {
            let core = self.core();
            (core.pool.stats(), core.pool.enis())
        };
        for (state, count) in
            [("idle", stats.idle), ("bound", stats.bound), ("cooling", stats.cooling), ("pending", stats.pending)]
        {
            self.metrics.addresses(state, count);
        }
        let mut by_state: HashMap<&'static str, u32> = HashMap::new();
        for eni in &enis {
            *by_state.entry(eni.phase.as_str()).or_default() += 1;
        }
        for (state, count) in by_state {
            self.metrics.enis(state, count);
        }
    }
}
