//! Wiring and unwiring one pod: links and routes by `net`, programs and maps by `bpf`, in an order in which no packet meets half of it.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, AttachmentKey, Family, Mac, PodRef};
use terway_core::ipam::Lease;
use terway_core::route::{PodInputs, PodPlan, gateway, host_ifname};
use terway_proto::v1;

use super::Engine;
use crate::bpf::{BpfError, Datapath, Endpoint};
use crate::metrics::{Phase, Verb};
use crate::net::NetError;
use crate::policy::Policies;
use crate::store::Gate;
use crate::supervise::{self, OnPanic};

/// What the pool keeps of an ADD for the engine, without looking at it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodOptions {
    /// MTU in bytes that the network configuration asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Destinations the pod gets routes to besides the default one (`extra_routes`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_routes: Vec<ipnetwork::IpNetwork>,
}

impl PodOptions {
    pub(super) fn encode(&self) -> String {
        // A struct of numbers always serialises.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What an older daemon wrote reads as the defaults.
    pub(super) fn decode(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }
}

impl Engine {
    /// The plan of a pod; the same inputs give the same plan after a restart.
    pub(super) fn plan(&self, key: &AttachmentKey, pod: &PodRef, lease: &Lease, options: &PodOptions) -> PodPlan {
        let seed = key.to_string();
        PodPlan::veth(PodInputs {
            key: key.clone(),
            host_ifname: host_ifname(pod, key),
            pod_ifname: key.ifname.clone(),
            host_mac: Mac::derived(&[b"host", seed.as_bytes()]),
            pod_mac: Mac::derived(&[b"pod", seed.as_bytes()]),
            addresses: lease.addresses,
            eni_ifindex: lease.nic.ifindex,
            mtu: options.mtu.unwrap_or(self.info.nic_mtu),
            default_route: true,
            extra_routes: options.extra_routes.clone(),
        })
    }

    pub(super) fn endpoint(plan: &PodPlan, lease: &Lease, host_ifindex: u32) -> Endpoint {
        let subnet = &lease.nic.subnet;
        Endpoint {
            host_ifindex,
            host_mac: plan.inputs.host_mac,
            pod_mac: plan.inputs.pod_mac,
            addresses: lease.addresses,
            eni_ifindex: lease.nic.ifindex,
            gateway_v4: lease.addresses.v4.map(|_| subnet.gateway_v4),
            gateway_v6: lease.addresses.v6.and(subnet.gateway_v6),
        }
    }

    /// Wires a pod, and prepares that before the gate is open. Idempotent: what is there already and right stays.
    pub(super) async fn connect(
        &self,
        key: &AttachmentKey,
        pod: &PodRef,
        netns: &str,
        options: &str,
        lease: &Lease,
        gate: Option<Gate>,
    ) -> Result<(), Error> {
        let plan = self.plan(key, pod, lease, &PodOptions::decode(options));
        self.policies.wait_until_known(pod).await;
        let _wiring = self.wiring.read().await;
        let netns = self.host.open_netns(netns).map_err(net_error)?;

        // Between its creation and the opening of the way both ends are down: programs and maps are complete before the first packet.
        let (endpoint, datapath) = (Self::endpoint(&plan, lease, 0), Arc::clone(&self.datapath));
        let (policies, pod) = (Arc::clone(&self.policies), pod.clone());
        let install_datapath =
            move |host_ifindex| install_datapath(&datapath, &policies, &pod, &Endpoint { host_ifindex, ..endpoint });
        let gate = || match gate.map_or(Ok(()), Gate::wait) {
            Ok(()) => Ok(()),
            Err(error) => Err(Error::new(errors::STORE_FAILED, error.to_string())),
        };
        let timings = self.host.connect_pod(&plan, &netns, gate, install_datapath).await?;
        self.metrics.phase(Verb::Add, Phase::Links, timings.create);
        self.metrics.phase(Verb::Add, Phase::Datapath, timings.datapath);
        self.metrics.phase(Verb::Add, Phase::Host, timings.enable);
        Ok(())
    }

    /// Writes an endpoint and attaches the programs of its interface.
    pub(super) async fn install_datapath(&self, endpoint: Endpoint, pod: &PodRef) -> Result<(), Error> {
        let (policies, pod) = (Arc::clone(&self.policies), pod.clone());
        self.with_datapath(move |datapath| Ok(install_datapath(datapath, &policies, &pod, &endpoint))).await?
    }

    /// Takes the policies of pods out of the maps whose endpoints have been removed.
    pub(super) async fn forget_policies(&self) {
        let policies = Arc::clone(&self.policies);
        supervise::blocking_scope("policy-maps", OnPanic::EndDaemon, move || policies.detach_removed()).await;
    }

    /// Unwires a pod, whatever of it is there. Calls `datapath_removed` when no packet can come or go any more; the links take longer.
    pub(super) async fn disconnect(
        &self,
        key: &AttachmentKey,
        pod: &PodRef,
        lease: &Lease,
        datapath_removed: impl FnOnce(),
    ) -> Result<(), Error> {
        let plan = self.plan(key, pod, lease, &PodOptions::default());
        let addresses = lease.addresses;
        let wiring = self.wiring.read().await;
        let start = Instant::now();
        let policies = Arc::clone(&self.policies);
        self.with_datapath(move |datapath| {
            forget(datapath, addresses)?;
            policies.detach_removed();
            Ok(())
        })
        .await?;
        let removed = Instant::now();
        self.metrics.phase(Verb::Del, Phase::Datapath, removed - start);

        self.host.detach_pod(&plan).await.map_err(net_error)?;
        self.metrics.phase(Verb::Del, Phase::Host, removed.elapsed());
        drop(wiring);
        datapath_removed();

        let detached = Instant::now();
        self.reaper.delete(plan).await?;
        self.metrics.phase(Verb::Del, Phase::Links, detached.elapsed());
        Ok(())
    }

    /// Runs BPF system calls off the runtime: attaching waits for RTNL, which others may hold for tens of milliseconds.
    pub(super) async fn with_datapath<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Datapath) -> Result<T, BpfError> + Send + 'static,
    ) -> Result<T, Error> {
        let datapath = Arc::clone(&self.datapath);
        let done = supervise::blocking_scope("datapath", OnPanic::EndDaemon, move || work(&datapath)).await;
        done.map_err(bpf_error)
    }

    /// The network of a pod as the CNI result needs it.
    pub(super) fn network(
        &self,
        key: &AttachmentKey,
        pod: &PodRef,
        lease: &Lease,
        options: &PodOptions,
    ) -> v1::Network {
        let plan = self.plan(key, pod, lease, options);
        let addresses = lease.addresses.iter().map(|address| {
            let gateway = gateway(Family::of(address)).to_string();
            v1::Address { cidr: ipnetwork::IpNetwork::from(address).to_string(), gateway }
        });
        let routes = lease.addresses.iter().map(|address| {
            let family = Family::of(address);
            let dst = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
            v1::Route { dst: dst.to_owned(), gw: gateway(family).to_string() }
        });
        v1::Network {
            host_ifname: plan.inputs.host_ifname.clone(),
            host_mac: plan.inputs.host_mac.to_string(),
            pod_mac: plan.inputs.pod_mac.to_string(),
            mtu: plan.inputs.mtu,
            addresses: addresses.collect(),
            routes: routes.collect(),
            eni: lease.eni.to_string(),
        }
    }
}

/// Installs policies first, then the endpoint, by which others find the pod, then the pod's own programs.
fn install_datapath(datapath: &Datapath, policies: &Policies, pod: &PodRef, endpoint: &Endpoint) -> Result<(), Error> {
    let mut reservation = Reservation { datapath, host_ifindex: endpoint.host_ifindex, is_used: false };
    policies.attach(endpoint.host_ifindex, pod, endpoint.addresses)?;
    datapath.endpoints().upsert(endpoint).map_err(bpf_error)?;
    datapath.interfaces().attach_pod(endpoint.host_ifindex).map_err(bpf_error)?;
    reservation.is_used = true;
    Ok(())
}

/// The endpoint slot that `Policies::attach` reserves. Dropping it, after an error or a panic, cancels the reservation unless it is used.
struct Reservation<'a> {
    datapath: &'a Datapath,
    host_ifindex: u32,
    is_used: bool,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            self.datapath.endpoints().cancel_reservation(self.host_ifindex);
        }
    }
}

/// Removes the endpoint that has these addresses, if there is one: found by address, since after a restart nobody remembers an index.
pub(super) fn forget(datapath: &Datapath, addresses: Addresses) -> Result<(), BpfError> {
    for endpoint in datapath.endpoints().list().into_iter().filter(|endpoint| endpoint.addresses == addresses) {
        datapath.endpoints().remove(endpoint.host_ifindex)?;
    }
    Ok(())
}

/// An error with its sources, as one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn bpf_error(error: BpfError) -> Error {
    Error::new(errors::BPF_FAILED, chain(&error))
}

pub(super) fn net_error(error: NetError) -> Error {
    error.into()
}
