//! Queries to the engine: CHECK, status, list, readiness, gauges.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use terway_abi::Drop;
use terway_core::clock::Moment;
use terway_core::cloud::{self, CloudError, EniKind};
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, AttachmentKey, EniId, PodRef, VSwitchId};
use terway_core::ipam::{AddressView, EniPhase, EniView, Phase, Stats, VSwitchView};
use terway_core::route::host_ifname;
use terway_proto::v1;
use tokio::sync::watch;

use super::Engine;
use super::pod::{PodOptions, net_error};
use crate::cloud::EniFilter;
use crate::grpc::{attachment, error_detail, pod};

/// Limit for one cloud call on behalf of a user at a terminal: `terway-cli` gives up after 30 s, and the client's own repeating
/// may last longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(12);

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
        let attachment = self.pool_state().pool.get(&key);
        let Some(attachment) = attachment.filter(|a| a.phase != Phase::Releasing) else {
            return Err(Error::new(errors::UNKNOWN_ATTACHMENT, key.to_string()));
        };
        let mut wrong = Vec::new();
        for text in addresses {
            let given: Option<IpAddr> = text.split('/').next().and_then(|a| a.parse().ok());
            if !given.is_some_and(|given| attachment.lease.addresses.iter().any(|own| own == given)) {
                wrong.push(format!("the runtime's result has {text}, which is not the pod's"));
            }
        }
        let options = PodOptions::decode(&attachment.options);
        let plan = self.plan(&key, &attachment.pod, &attachment.lease, &options);
        let path = if netns.is_empty() { attachment.netns } else { netns };
        let netns = self.host.open_netns(&path).map_err(net_error)?;
        let differences = self.host.check_pod(&plan, Some(&netns)).await.map_err(net_error)?;
        wrong.extend(differences.into_iter().map(|difference| difference.message));

        let own = attachment.lease.addresses;
        let endpoint = self.datapath.endpoints().list().into_iter().find(|endpoint| endpoint.addresses == own);
        match endpoint {
            None => wrong.push("the datapath does not know the pod".to_owned()),
            Some(endpoint) => {
                if !self
                    .with_datapath(move |datapath| datapath.interfaces().pod_is_attached(endpoint.host_ifindex))
                    .await?
                {
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
        let state = self.pool_state();
        let stats = state.pool.stats();
        if stats.bound + stats.idle + stats.pending + stats.cooling > 0 {
            return Ok(());
        }
        state.pool.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// The pool in numbers, and what is wrong with it.
    #[must_use]
    pub fn pool_state_view(&self) -> (Stats, Vec<Error>) {
        let state = self.pool_state();
        (state.pool.stats(), state.pool.problems())
    }

    /// Pods whose network is complete, with their addresses.
    #[must_use]
    pub fn attached(&self) -> Vec<(PodRef, Addresses)> {
        let all = self.pool_state().pool.list();
        all.into_iter().filter(|view| view.phase == Phase::Ready).map(|view| (view.pod, view.lease.addresses)).collect()
    }

    /// Changes with every step of the pool.
    #[must_use]
    pub fn pool_changes(&self) -> watch::Receiver<()> {
        self.stepped.subscribe()
    }

    /// Cloud calls that are being repeated.
    pub(super) fn delayed(&self) -> impl Iterator<Item = Error> {
        self.cloud.delayed().into_iter().map(|error| {
            let Error { code, detail } = error.explain();
            Error::new(code, format!("{detail}; the call is being repeated"))
        })
    }

    /// The cloud's answer, or the error, within [`ANSWER_WITHIN`].
    pub(super) async fn answered<T>(
        &self,
        mut call: impl Future<Output = Result<T, CloudError>> + Unpin,
    ) -> Result<T, Error> {
        match tokio::time::timeout(ANSWER_WITHIN, &mut call).await {
            Ok(answer) => answer.map_err(|error| error.explain()),
            // The call lives on to here, so it still counts as one that is being repeated.
            Err(_) => Err(self.delayed().next().unwrap_or_else(|| {
                Error::new(errors::CLOUD_UNREACHABLE, format!("no answer within {} s", ANSWER_WITHIN.as_secs()))
            })),
        }
    }

    /// State of the node in one message.
    #[must_use]
    pub fn status(&self) -> v1::StatusResponse {
        let (stats, enis, mut problems) = {
            let state = self.pool_state();
            (state.pool.stats(), state.pool.enis(), state.pool.problems())
        };
        problems.extend(self.fatal.borrow().clone());
        problems.extend(self.audit.problems());
        problems.extend(self.delayed());
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
            problems: problems.iter().map(error_detail).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.info.node.clone(),
            pool: Some(pool_counts(&stats)),
            enis: enis.collect(),
            datapath: Some(self.datapath_view()),
            configuration: None,
            socket_path: None,
            policy: None,
        }
    }

    /// ENIs, addresses and vSwitches; with `ask_cloud`, also the cloud's view of them.
    pub async fn pool(&self, ask_cloud: bool) -> v1::GetPoolResponse {
        let now = self.now();
        let (stats, views, addresses, vswitches, problems) = {
            let pool = &self.pool_state().pool;
            let enis: Vec<EniView> = pool.enis().into_iter().chain(pool.foreign_enis()).collect();
            (pool.stats(), enis, pool.addresses(), pool.vswitches(), pool.problems())
        };
        let mut cloud_error = None;
        let mut listed: BTreeMap<EniId, cloud::Eni> = BTreeMap::new();
        if ask_cloud {
            match self.answered(self.cloud.enis(&EniFilter::of_instance(self.instance()))).await {
                Ok(enis) => listed.extend(enis.into_iter().map(|eni| (eni.id.clone(), eni))),
                Err(error) => cloud_error = Some(error_detail(&error)),
            }
        }
        let nics: HashMap<_, _> = self.links.nics().into_iter().map(|nic| (nic.mac, nic.name)).collect();
        let mut by_eni: HashMap<&EniId, Vec<&AddressView>> = HashMap::new();
        for address in &addresses {
            by_eni.entry(&address.eni).or_default().push(address);
        }
        let mut enis = Vec::with_capacity(views.len());
        for view in views {
            let known = view.id.as_ref().and_then(|id| listed.remove(id));
            let own = view.id.as_ref().and_then(|id| by_eni.get(id)).map(Vec::as_slice).unwrap_or_default();
            let interface = view.mac.and_then(|mac| nics.get(&mac)).cloned().unwrap_or_default();
            enis.push(eni_row(view, own, known, interface, now));
        }
        enis.extend(listed.into_values().map(|eni| {
            let interface = nics.get(&eni.mac).cloned().unwrap_or_default();
            unmanaged_eni_row(eni, interface)
        }));
        enis.sort_by(|a, b| {
            (a.role != "primary", a.id.is_empty(), &a.id).cmp(&(b.role != "primary", b.id.is_empty(), &b.id))
        });
        let mut vswitches = vswitches_of(&enis, vswitches, now);
        if ask_cloud && cloud_error.is_none() {
            let ids: Vec<VSwitchId> = vswitches.keys().map(|id| VSwitchId::new(id.as_str())).collect();
            match self.answered(self.cloud.vswitches(&ids)).await {
                Ok(known) => {
                    for vswitch in known {
                        if let Some(row) = vswitches.get_mut(vswitch.id.as_str()) {
                            row.zone = vswitch.zone;
                            row.cidr = vswitch.cidr_v4.to_string();
                            row.available = Some(vswitch.available);
                        }
                    }
                }
                Err(error) => cloud_error = Some(error_detail(&error)),
            }
        }
        v1::GetPoolResponse {
            pool: Some(pool_counts(&stats)),
            enis,
            vswitches: vswitches.into_values().collect(),
            problems: problems.into_iter().chain(self.delayed()).map(|problem| error_detail(&problem)).collect(),
            cloud_error,
        }
    }

    fn datapath_view(&self) -> v1::Datapath {
        let counters = self.datapath.counters().read().unwrap_or_default();
        let drops = Drop::ALL.iter().map(|reason| (reason.name().to_owned(), counters.drop(*reason).packets));
        v1::Datapath {
            pod_hook: "clsact".to_owned(),
            eni_hook: if self.datapath.features().tcx { "tcx" } else { "clsact" }.to_owned(),
            abi_version: terway_abi::ABI_VERSION,
            endpoints: self.datapath.endpoints().list().len() as u64,
            drops: drops.collect(),
        }
    }

    /// Paths of the network namespaces of this node's pods.
    #[must_use]
    pub fn pod_namespaces(&self) -> Vec<String> {
        self.pool_state().pool.list().into_iter().map(|attachment| attachment.netns).collect()
    }

    /// The attachments of this node.
    #[must_use]
    pub fn list(&self) -> Vec<v1::PodState> {
        let attachments = self.pool_state().pool.list();
        attachments
            .into_iter()
            .map(|a| v1::PodState {
                host_ifname: host_ifname(&a.pod, &a.key),
                attachment: Some(attachment(&a.key)),
                pod: Some(pod(&a.pod)),
                phase: a.phase.as_str().to_owned(),
                addresses: a.lease.addresses.iter().map(|address| address.to_string()).collect(),
                eni: a.lease.eni.to_string(),
            })
            .collect()
    }

    /// Brings the gauges up to date; called before each scrape.
    pub fn refresh_gauges(&self) {
        let (stats, enis) = {
            let state = self.pool_state();
            (state.pool.stats(), state.pool.enis())
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

fn pool_counts(stats: &Stats) -> v1::Pool {
    v1::Pool {
        capacity: stats.capacity,
        idle: stats.idle,
        bound: stats.bound,
        cooling: stats.cooling,
        pending: stats.pending,
    }
}

/// An ENI of the pool, or a foreign one, which the pool does not manage.
fn eni_row(view: EniView, own: &[&AddressView], known: Option<cloud::Eni>, ifname: String, now: Moment) -> v1::Eni {
    let other = |address: &IpAddr| v1::EniAddress { address: address.to_string(), state: "other".into(), pod: None };
    let address = |view: &&AddressView| v1::EniAddress {
        address: view.address.to_string(),
        state: view.state.as_str().to_owned(),
        pod: view.owner.as_ref().map(|(_, owner)| pod(owner)),
    };
    let foreign = view.phase == EniPhase::Foreign;
    v1::Eni {
        id: view.id.as_ref().map(ToString::to_string).unwrap_or_default(),
        mac: view.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        vswitch: view.vswitch.to_string(),
        role: if foreign { "foreign" } else { "pods" }.to_owned(),
        status: known.as_ref().map(|known| format!("{:?}", known.status)).unwrap_or_default(),
        state: view.phase.as_str().to_owned(),
        ifname,
        addresses: if foreign { view.addresses.iter().map(other).collect() } else { own.iter().map(address).collect() },
        prefixes: view.prefixes.iter().map(|prefix| prefix.prefix.to_string()).collect(),
        security_groups: known.iter().flat_map(|k| &k.security_groups).map(ToString::to_string).collect(),
        tags: known.map(|known| known.tags).unwrap_or_default(),
        reason: view.reason.map_or_else(|| reason_unused(view.phase).to_owned(), |reason| reason.detail),
        backoff_seconds: seconds_until(view.backoff_until, now),
        error: view.error.as_ref().map(error_detail),
    }
}

/// An ENI that only the cloud lists: the primary one, or one that was attached after the pool's last inventory.
fn unmanaged_eni_row(eni: cloud::Eni, ifname: String) -> v1::Eni {
    let primary = eni.kind == EniKind::Primary;
    let addresses = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
    let prefixes = eni.v4_prefixes.iter().map(ToString::to_string);
    v1::Eni {
        id: eni.id.to_string(),
        mac: eni.mac.to_string(),
        vswitch: eni.vswitch.to_string(),
        role: if primary { "primary" } else { "foreign" }.to_owned(),
        status: format!("{:?}", eni.status),
        ifname,
        addresses: addresses
            .map(|address| v1::EniAddress { address: address.to_string(), state: "other".to_owned(), pod: None })
            .collect(),
        prefixes: prefixes.chain(eni.v6_prefixes.iter().map(ToString::to_string)).collect(),
        security_groups: eni.security_groups.iter().map(ToString::to_string).collect(),
        reason: if primary { "primary ENI of the instance" } else { "attached after the last inventory" }.to_owned(),
        tags: eni.tags,
        ..Default::default()
    }
}

/// Whole seconds until a moment, 0 if it has passed or there is none.
fn seconds_until(moment: Option<Moment>, now: Moment) -> u32 {
    moment.map_or(0, |moment| u32::try_from(moment.since(now).as_secs()).unwrap_or(u32::MAX))
}

/// Why an ENI of the pool gives no address to new pods.
const fn reason_unused(phase: EniPhase) -> &'static str {
    match phase {
        EniPhase::InUse => "",
        EniPhase::Creating | EniPhase::Attaching | EniPhase::Configuring => "not ready yet",
        EniPhase::Draining => "being emptied",
        EniPhase::Detaching | EniPhase::Deleting => "being released",
        EniPhase::Missing => "the cloud does not list it as attached",
        EniPhase::Mismatched => "does not fit the configuration",
        EniPhase::Foreign => "not managed by the pool",
    }
}

fn vswitches_of(enis: &[v1::Eni], views: Vec<VSwitchView>, now: Moment) -> BTreeMap<String, v1::VSwitch> {
    let mut all: BTreeMap<String, v1::VSwitch> = BTreeMap::new();
    for view in views {
        let row = v1::VSwitch {
            id: view.id.to_string(),
            available: view.available,
            configured: view.configured,
            blocked: view.error.as_ref().map(error_detail),
            backoff_seconds: seconds_until(view.backoff_until, now),
            fragmented: view.fragmented_until.is_some(),
            ..Default::default()
        };
        all.insert(row.id.clone(), row);
    }
    for eni in enis {
        let row = all.entry(eni.vswitch.clone()).or_default();
        row.id.clone_from(&eni.vswitch);
        row.enis += 1;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        row.addresses += count(eni.addresses.len());
        row.bound += count(eni.addresses.iter().filter(|address| address.state == "bound").count());
    }
    all
}
