//! Executor of network plans, in the node's network namespace and in those of pods.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use terway_core::route::{
    Difference, EniInputs, EniPlan, KernelState, NetOp, NodePlan, ObservedState, Orphan, PodPlan, Step, StepNetns,
    alias, diff,
};

use super::apply::{self, StepContext};
use super::decode::NamedLink;
use super::netns::{NetnsPool, PodNetns, Worker};
use super::socket::NetlinkSocket;
use super::{NetError, NetMonitor, decode, messages, observe, pod};
use crate::supervise;

/// Number of threads. The RTNL mutex serialises changes anyway; a few threads suffice to prepare requests and to read.
const THREADS: usize = 4;

/// Time limit for a link to get its IPv6 link-local address after it was brought up. The kernel processes carrier events up to a second
/// late (net/core/link_watch.c).
const LINK_LOCAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Interface indices of a pod's veth pair, each in its own namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Links {
    /// The end in the node's namespace.
    pub host_ifindex: u32,
    /// The end in the pod's.
    pub pod_ifindex: u32,
}

/// Durations of the phases of [`Host::connect_pod`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectTimings {
    /// Creating the veth pair.
    pub create: Duration,
    /// Installing endpoint, policies and programs (`install_datapath`).
    pub datapath: Duration,
    /// Links up, routes and rules.
    pub enable: Duration,
}

/// Executes plans in the network namespace of the thread that created it (the node's) and in the namespaces of pods.
///
/// All methods are idempotent and may run concurrently. The work of a method finishes even if its future is dropped.
pub struct Host {
    pool: NetnsPool,
}

impl Host {
    /// Creates an executor. The calling thread's network namespace becomes the node's.
    ///
    /// # Errors
    /// When the own namespace cannot be opened or no thread can be started.
    pub fn new() -> Result<Self, NetError> {
        Ok(Self { pool: NetnsPool::new(THREADS)? })
    }

    /// Starts a monitor of the node's NICs and addresses, and of deletions by others.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn monitor(&self) -> Result<NetMonitor, NetError> {
        NetMonitor::start(self.pool.host_netns(), self.pool.own_ports())
    }

    /// The thread pool, for other work inside pods' namespaces.
    #[must_use]
    pub const fn pool(&self) -> &NetnsPool {
        &self.pool
    }

    /// Opens a pod's network namespace, see [`PodNetns::open`]; callable from any thread.
    ///
    /// # Errors
    /// [`NetError::Netns`].
    pub fn open_netns(&self, path: &str) -> Result<PodNetns, NetError> {
        let netns = PodNetns::open(path)?;
        self.refuse_host_netns(&netns)?;
        Ok(netns)
    }

    /// Creates a pod's veth pair, both ends down, with addresses and neighbours. A link of the same name that another attachment of ours
    /// left behind is deleted first.
    ///
    /// # Errors
    /// [`NetError::IfnameTaken`], [`NetError::ForeignLink`], or what the kernel refused. The plan's teardown cleans up.
    pub async fn create_pod(&self, plan: &PodPlan, netns: &PodNetns) -> Result<Links, NetError> {
        self.refuse_host_netns(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        self.pool
            .run(move |worker| {
                worker.inside(&netns, |host| pod::create(host, &mut NetlinkSocket::route()?, &plan, netns.as_raw_fd()))
            })
            .await
    }

    /// Sets the links up and adds routes and rules. When it returns, the pod is reachable.
    ///
    /// # Errors
    /// What the kernel refused; the plan's teardown cleans up.
    pub async fn enable_pod(&self, plan: &PodPlan, netns: &PodNetns, links: Links) -> Result<(), NetError> {
        self.refuse_host_netns(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        self.pool
            .run(move |worker| {
                worker.inside(&netns, |host| pod::enable(host, &mut NetlinkSocket::route()?, &plan, links))
            })
            .await
    }

    /// [`Self::create_pod`], then `install_datapath` with the host end's interface index, then [`Self::enable_pod`], all on one thread: a change
    /// of threads would cost an ADD more than most of its system calls do. Nothing is changed before `wait_until_persisted` has returned,
    /// which may block. `install_datapath` runs in the node's namespace and may wait for RTNL.
    ///
    /// # Errors
    /// Those of the steps, and [`NetError::Worker`] if one of them panicked; the plan's teardown cleans up.
    pub async fn connect_pod<E: From<NetError> + Send + 'static>(
        &self,
        plan: &PodPlan,
        netns: &PodNetns,
        wait_until_persisted: impl FnOnce() -> Result<(), E> + Send + 'static,
        install_datapath: impl FnOnce(u32) -> Result<(), E> + Send + 'static,
    ) -> Result<ConnectTimings, E> {
        self.refuse_host_netns(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        let job = move |worker: &mut Worker| {
            // A socket belongs to the namespace in which it was opened.
            let mut pod = worker.inside(&netns, |_| NetlinkSocket::route())?;
            if let Err(error) = wait_until_persisted() {
                return Ok(Err(error));
            }
            let start = Instant::now();
            let links = worker.inside(&netns, |host| pod::create(host, &mut pod, &plan, netns.as_raw_fd()))?;
            let created = Instant::now();
            if let Err(error) = install_datapath(links.host_ifindex) {
                return Ok(Err(error));
            }
            let installed = Instant::now();
            supervise::injection_point("connect-pod");
            worker.inside(&netns, |host| pod::enable(host, &mut pod, &plan, links))?;
            Ok(Ok(ConnectTimings {
                create: created - start,
                datapath: installed - created,
                enable: installed.elapsed(),
            }))
        };
        self.pool.run(job).await?
    }

    /// Makes a pod unreachable: removes its rules, routes and neighbours in the node's namespace. The pod's own namespace is not needed.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn detach_pod(&self, plan: &PodPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool.run(move |worker| pod::detach(worker.host()?, &plan)).await
    }

    /// Deletes the veth pairs of these pods. Pairs that are gone, or whose names belong to other attachments by now, are skipped.
    ///
    /// It holds RTNL for about 25 ms, however many pairs there are, and no interface can be created meanwhile: callers collect deletions for
    /// a second. Most pairs are gone by then, with their namespace, which the container runtime removes after DEL.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn delete_links(&self, plans: Vec<PodPlan>) -> Result<(), NetError> {
        self.pool.run(move |worker| pod::delete(worker.host()?, &plans)).await
    }

    /// [`Self::delete_links`] for one pod.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn delete_link(&self, plan: &PodPlan) -> Result<(), NetError> {
        self.delete_links(vec![plan.clone()]).await
    }

    /// Configures an ENI. Addresses that others (DHCP, cloud-init) added to it are removed: their subnet route would attract the node's own
    /// traffic.
    ///
    /// # Errors
    /// [`NetError::Renamed`] if the plan's name and index do not belong together, or what the kernel refused.
    pub async fn ensure_eni(&self, plan: &EniPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let indices = vec![(plan.inputs.ifname.clone(), eni_link(host, &plan)?.link.index)];
                remove_unplanned_addresses(host, &plan)?;
                apply::run(&plan.steps, &mut StepContext::host(host, indices))
            })
            .await
    }

    /// Waits until an ENI can send neighbour solicitations to its IPv6 gateway, if it has one. The kernel adds the link-local address that
    /// it solicits from some time after the link came up. No thread is blocked meanwhile; callers should hold no lock.
    ///
    /// # Errors
    /// When addresses cannot be listed.
    pub async fn wait_link_local(&self, plan: &EniPlan) -> Result<(), NetError> {
        let EniInputs { ifindex, ref ifname, gateway_v6: Some(_), .. } = plan.inputs else { return Ok(()) };
        let deadline = Instant::now() + LINK_LOCAL_TIMEOUT;
        while !self.pool.run(move |worker| observe::has_usable_link_local(worker.host()?, ifindex)).await? {
            if Instant::now() >= deadline {
                // Not an error: an administrator may have disabled link-local addresses on purpose.
                tracing::warn!(ifname, "the ENI has no IPv6 link-local address yet");
                break;
            }
            tokio::time::sleep(LINK_LOCAL_TIMEOUT / 200).await;
        }
        Ok(())
    }

    /// Removes an ENI's configuration. What is absent is skipped.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_eni(&self, plan: &EniPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let name = match eni_link(host, &plan) {
                    Ok(link) => link.name,
                    // The NIC was detached: the kernel has removed its addresses and routes.
                    Err(NetError::Renamed { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                };
                let indices = vec![(name, plan.inputs.ifindex)];
                apply::run(&plan.teardown(), &mut StepContext::host(host, indices))
            })
            .await
    }

    /// Enables forwarding on the node.
    ///
    /// # Errors
    /// The sysctl that could not be written.
    pub async fn ensure_node(&self, plan: &NodePlan) -> Result<(), NetError> {
        self.repair(plan.steps.clone(), None).await
    }

    /// Names of interfaces that learn routes from router advertisements and would stop doing so once the node forwards (`accept_ra` = 1).
    ///
    /// # Errors
    /// When links cannot be listed.
    pub async fn ra_links(&self) -> Result<Vec<String>, NetError> {
        self.pool
            .run(|worker| {
                let names = observe::links(worker.host()?)?
                    .into_iter()
                    .filter(|link| !link.is_loopback && !link.link.is_ours());
                let learns_routes = |name: &String| {
                    apply::read_sysctl(&format!("net/ipv6/conf/{name}/accept_ra")).is_ok_and(|value| value == "1")
                };
                Ok(names.map(|link| link.name).filter(learns_routes).collect())
            })
            .await
    }

    /// Reads the state of the node's namespace, with these sysctls.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn observe(&self, sysctls: BTreeSet<String>) -> Result<KernelState, NetError> {
        self.pool.run(move |worker| observe::read_state(worker.host()?, sysctls.iter().map(String::as_str))).await
    }

    /// Reads the state of a pod's namespace, with these sysctls.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn observe_pod(&self, netns: &PodNetns, sysctls: BTreeSet<String>) -> Result<KernelState, NetError> {
        let netns = netns.clone();
        self.pool
            .run(move |worker| {
                worker.inside(&netns, |_| {
                    observe::read_state(&mut NetlinkSocket::route()?, sysctls.iter().map(String::as_str))
                })
            })
            .await
    }

    /// Compares a pod's plan with the kernel's state. `netns` is `None` when the pod's namespace is gone, which is reported as a difference.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn check_pod(&self, plan: &PodPlan, netns: Option<&PodNetns>) -> Result<Vec<Difference>, NetError> {
        let steps: Vec<Step> = plan.steps().cloned().collect();
        self.check(steps, netns).await
    }

    /// Compares the result of `steps` with the kernel's state.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn check(&self, steps: Vec<Step>, netns: Option<&PodNetns>) -> Result<Vec<Difference>, NetError> {
        let host = self.observe(sysctl_paths(&steps, StepNetns::Host)).await?;
        let pod = match netns {
            Some(netns) => Some(self.observe_pod(netns, sysctl_paths(&steps, StepNetns::Pod)).await?),
            None => None,
        };
        Ok(diff(&steps, &ObservedState { host, pod }))
    }

    /// Executes single steps, such as the repairs of [`Difference`]s.
    ///
    /// # Errors
    /// What the kernel refused; [`NetError::Netns`] for steps in the pod without `netns`.
    pub async fn repair(&self, steps: Vec<Step>, netns: Option<&PodNetns>) -> Result<(), NetError> {
        let Some(netns) = netns.cloned() else {
            return self
                .pool
                .run(move |worker| apply::run(&steps, &mut StepContext::host(worker.host()?, Vec::new())))
                .await;
        };
        self.refuse_host_netns(&netns)?;
        self.pool
            .run(move |worker| {
                // The node's sysctls cannot be written by a thread in the pod's namespace.
                let (inside, outside): (Vec<_>, Vec<_>) =
                    steps.into_iter().partition(|step| step.netns == StepNetns::Pod);
                apply::run(&outside, &mut StepContext::host(worker.host()?, Vec::new()))?;
                worker.inside(&netns, |host| {
                    let mut pod = NetlinkSocket::route()?;
                    apply::run(&inside, &mut StepContext::host(host, Vec::new()).and_pod(&mut pod, Vec::new()))
                })
            })
            .await
    }

    /// Removes orphans that [`terway_core::route::orphans`] found.
    ///
    /// # Errors
    /// The first orphan that could not be removed; the others have been tried.
    pub async fn remove(&self, orphans: Vec<Orphan>) -> Result<(), NetError> {
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let mut outcome = Ok(());
                for orphan in orphans {
                    let one = match orphan {
                        Orphan::Rule(rule) => apply_one(host, NetOp::DelRule(rule)),
                        Orphan::Route(route) => apply_one(host, NetOp::DelRoute(route)),
                        Orphan::Link { index, alias, .. } => pod::delete_stale(host, index, alias.as_deref()),
                    };
                    outcome = outcome.and(one);
                }
                outcome
            })
            .await
    }

    /// The node's addresses that are reachable from other hosts, without those of Services on `kube-ipvs0`.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn host_addresses(&self) -> Result<Vec<IpNetwork>, NetError> {
        self.pool
            .run(|worker| {
                let netlink = worker.host()?;
                let links = observe::links(netlink)?;
                let service_links = links.iter().filter(|found| observe::holds_service_addresses(found));
                let service_links = service_links.map(|found| found.link.index).collect();
                Ok(observe::node_addresses(&observe::addresses(netlink)?, &service_links))
            })
            .await
    }

    /// Refuses the node's own namespace, in which a pod's plan must never be executed.
    fn refuse_host_netns(&self, netns: &PodNetns) -> Result<(), NetError> {
        if netns.id() == self.pool.host_netns().id() {
            let reason = "this is the node's own network namespace".to_owned();
            return Err(NetError::Netns { path: "CNI_NETNS".to_owned(), reason });
        }
        Ok(())
    }
}

/// The link alias (`IFLA_IFALIAS`) of a plan's host end, which names the attachment that owns it.
pub(super) fn owner_alias(plan: &PodPlan) -> String {
    alias(&plan.inputs.key)
}

fn sysctl_paths(steps: &[Step], netns: StepNetns) -> BTreeSet<String> {
    let paths = steps.iter().filter(|step| step.netns == netns).filter_map(|step| match &step.op {
        NetOp::Sysctl { path, .. } => Some(path.clone()),
        _ => None,
    });
    paths.collect()
}

fn apply_one(host: &mut NetlinkSocket, op: NetOp) -> Result<(), NetError> {
    apply::run(&[Step::host(op)], &mut StepContext::host(host, Vec::new()))
}

/// The link of an ENI, if its name is still the one in the plan.
fn eni_link(host: &mut NetlinkSocket, plan: &EniPlan) -> Result<NamedLink, NetError> {
    let (index, planned) = (plan.inputs.ifindex, plan.inputs.ifname.clone());
    let (message, flags) = messages::get_link_at(index);
    match host.request(message, flags)?.map(decode::link_of) {
        Ok(Some(link)) if link.name == planned => Ok(link),
        Ok(Some(link)) => Err(NetError::Renamed { index, planned, found: link.name }),
        Ok(None) => Err(NetError::Renamed { index, planned, found: "gone".to_owned() }),
        Err(error) if error.errno == libc::ENODEV => {
            Err(NetError::Renamed { index, planned, found: "gone".to_owned() })
        }
        Err(error) => Err(error.during(format!("look up interface {planned}"))),
    }
}

/// Removes addresses from an ENI that are not in its plan.
fn remove_unplanned_addresses(host: &mut NetlinkSocket, plan: &EniPlan) -> Result<(), NetError> {
    let planned: Vec<_> = plan.inputs.node.iter().map(IpNetwork::from).collect();
    let dev = &plan.inputs.ifname;
    let all = observe::addresses(host)?;
    let surplus = all
        .into_iter()
        .filter(|(index, net)| *index == plan.inputs.ifindex && observe::reachable(net.ip()) && !planned.contains(net));
    let steps: Vec<_> =
        surplus.map(|(_, address)| Step::host(NetOp::DelAddress { dev: dev.clone(), address })).collect();
    for step in &steps {
        tracing::warn!(%step, "removing an address from the ENI that is not in its plan");
    }
    apply::run(&steps, &mut StepContext::host(host, vec![(dev.clone(), plan.inputs.ifindex)]))
}
