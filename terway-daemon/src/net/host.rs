//! The node's network: plans go in, the kernel changes.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use terway_core::route::{
    Difference, EniInputs, EniPlan, KernelState, Leftover, NetOp, NodePlan, Observed, Place, PodPlan, Step, alias, diff,
};

use super::apply::{self, Sides};
use super::decode::NamedLink;
use super::netns::{NetnsPool, PodNetns, Worker};
use super::socket::Netlink;
use super::{NetError, Watch, decode, encode, observe, pod};

/// Threads: RTNL lets one change the kernel at a time, so a few are enough to prepare and to read.
const THREADS: usize = 4;

/// How long a link that was brought up may take to get its link-local address. Link events may be a second late (net/core/link_watch.c).
const LINK_LOCAL: Duration = Duration::from_secs(2);

/// Interface indices of a pod's veth pair, each in its own namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Links {
    /// The end in the node's namespace.
    pub host_ifindex: u32,
    /// The end in the pod's.
    pub pod_ifindex: u32,
}

/// How long the parts of [`Host::connect_pod`] took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Took {
    /// Making the pair.
    pub create: Duration,
    /// What the caller had to do in between.
    pub plug: Duration,
    /// Opening the way.
    pub enable: Duration,
}

/// Executes plans in the network namespace of the thread that made it, and in those of pods.
///
/// All methods are idempotent, may run at the same time, and finish even if their future is dropped.
pub struct Host {
    pool: NetnsPool,
}

impl Host {
    /// Takes the calling thread's network namespace for the node's.
    ///
    /// # Errors
    /// When the own namespace cannot be opened or no thread can be started.
    pub fn new() -> Result<Self, NetError> {
        Ok(Self { pool: NetnsPool::new(THREADS)? })
    }

    /// Starts to watch the node's links and addresses.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn watch(&self) -> Result<Watch, NetError> {
        Watch::start(self.pool.home())
    }

    /// The threads, for other work inside of pods.
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
        self.foreign(&netns)?;
        Ok(netns)
    }

    /// Makes a pod's veth pair, both ends down, with addresses and neighbours. A link of the same name that another of our attachments
    /// left behind is deleted first.
    ///
    /// # Errors
    /// [`NetError::IfnameTaken`], [`NetError::ForeignLink`], or what the kernel refused. The plan's teardown cleans up.
    pub async fn create_pod(&self, plan: &PodPlan, netns: &PodNetns) -> Result<Links, NetError> {
        self.foreign(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        self.pool
            .run(move |worker| {
                worker.inside(&netns, |host| pod::create(host, &mut Netlink::open()?, &plan, netns.as_raw_fd()))
            })
            .await
    }

    /// Opens the way: links up, routes, rules. When it returns, the pod can be reached.
    ///
    /// # Errors
    /// What the kernel refused; the plan's teardown cleans up.
    pub async fn enable_pod(&self, plan: &PodPlan, netns: &PodNetns, links: Links) -> Result<(), NetError> {
        self.foreign(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        self.pool
            .run(move |worker| worker.inside(&netns, |host| pod::enable(host, &mut Netlink::open()?, &plan, links)))
            .await
    }

    /// [`Self::create_pod`], `plug` with the host end's index, [`Self::enable_pod`], in one go on one thread: each change of threads would cost an ADD
    /// more than most of its system calls do. Nothing is changed before `gate` has returned, which may block. `plug` runs in the node's
    /// namespace and may wait for RTNL.
    ///
    /// # Errors
    /// Those of the five; the plan's teardown cleans up.
    pub async fn connect_pod<E: From<NetError> + Send + 'static>(
        &self,
        plan: &PodPlan,
        netns: &PodNetns,
        gate: impl FnOnce() -> Result<(), E> + Send + 'static,
        plug: impl FnOnce(u32) -> Result<(), E> + Send + 'static,
    ) -> Result<Took, E> {
        self.foreign(netns)?;
        let (plan, netns) = (plan.clone(), netns.clone());
        let job = move |worker: &mut Worker| {
            // A socket belongs to the namespace in which it was opened.
            let mut pod = worker.inside(&netns, |_| Netlink::open())?;
            if let Err(error) = gate() {
                return Ok(Err(error));
            }
            let start = Instant::now();
            let links = worker.inside(&netns, |host| pod::create(host, &mut pod, &plan, netns.as_raw_fd()))?;
            let created = Instant::now();
            if let Err(error) = plug(links.host_ifindex) {
                return Ok(Err(error));
            }
            let plugged = Instant::now();
            worker.inside(&netns, |host| pod::enable(host, &mut pod, &plan, links))?;
            Ok(Ok(Took { create: created - start, plug: plugged - created, enable: plugged.elapsed() }))
        };
        self.pool.run(job).await?
    }

    /// Makes a pod unreachable, quickly: rules, routes and neighbours of the node's side go. Needs nothing of the pod to be there.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn detach_pod(&self, plan: &PodPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool.run(move |worker| pod::detach(worker.host()?, &plan)).await
    }

    /// Deletes the veth pairs of these pods, as far as they are there and their names do not belong to other attachments by now.
    ///
    /// It takes some 25 ms however many they are, and no interface can be made meanwhile: collect for a second what is to be deleted. Most of
    /// it is gone by then, with its namespace, which the runtime removes after DEL.
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

    /// Sets up an ENI. Addresses that others (DHCP, cloud-init) put on it are removed: their subnet route would draw the node's own
    /// traffic to it.
    ///
    /// # Errors
    /// [`NetError::Renamed`] if the plan's name and index do not belong together, or what the kernel refused.
    pub async fn ensure_eni(&self, plan: &EniPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let indices = vec![(plan.inputs.ifname.clone(), named(host, &plan)?.link.index)];
                strip(host, &plan)?;
                apply::run(&plan.steps, &mut Sides::host(host, indices))
            })
            .await
    }

    /// Waits until an ENI that is set up can ask for its IPv6 gateway, if it has one: the kernel makes the link-local address, without which
    /// it asks for no neighbour, some time after the link came up. No thread is held meanwhile; it should be no lock either.
    ///
    /// # Errors
    /// When addresses cannot be listed.
    pub async fn await_link_local(&self, plan: &EniPlan) -> Result<(), NetError> {
        let EniInputs { ifindex, ref ifname, gateway_v6: Some(_), .. } = plan.inputs else { return Ok(()) };
        let deadline = Instant::now() + LINK_LOCAL;
        while !self.pool.run(move |worker| observe::may_solicit(worker.host()?, ifindex)).await? {
            if Instant::now() >= deadline {
                // The rest of the set-up is good, and somebody may have turned link-local addresses off on purpose.
                tracing::warn!(ifname, "the ENI has no IPv6 link-local address yet");
                break;
            }
            tokio::time::sleep(LINK_LOCAL / 200).await;
        }
        Ok(())
    }

    /// Takes an ENI's set-up back, as far as it is there.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_eni(&self, plan: &EniPlan) -> Result<(), NetError> {
        let plan = plan.clone();
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let name = match named(host, &plan) {
                    Ok(link) => link.name,
                    // Unplugged: the kernel has cleaned up.
                    Err(NetError::Renamed { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                };
                let indices = vec![(name, plan.inputs.ifindex)];
                apply::run(&plan.teardown(), &mut Sides::host(host, indices))
            })
            .await
    }

    /// Makes the node forward.
    ///
    /// # Errors
    /// The sysctl that could not be written.
    pub async fn ensure_node(&self, plan: &NodePlan) -> Result<(), NetError> {
        self.repair(plan.steps.clone(), None).await
    }

    /// Interfaces that learn their routes from router advertisements and would stop when the node forwards (`accept_ra` 1).
    ///
    /// # Errors
    /// When links cannot be listed.
    pub async fn ra_links(&self) -> Result<Vec<String>, NetError> {
        self.pool
            .run(|worker| {
                let names =
                    observe::links(worker.host()?)?.into_iter().filter(|link| !link.loopback && !link.link.is_ours());
                let learns = |name: &String| {
                    apply::read_sysctl(&format!("net/ipv6/conf/{name}/accept_ra")).is_ok_and(|value| value == "1")
                };
                Ok(names.map(|link| link.name).filter(learns).collect())
            })
            .await
    }

    /// What the node's namespace holds, with these sysctls.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn observe(&self, sysctls: BTreeSet<String>) -> Result<KernelState, NetError> {
        self.pool.run(move |worker| observe::state(worker.host()?, sysctls.iter().map(String::as_str))).await
    }

    /// What a pod's namespace holds, with these sysctls.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn observe_pod(&self, netns: &PodNetns, sysctls: BTreeSet<String>) -> Result<KernelState, NetError> {
        let netns = netns.clone();
        self.pool
            .run(move |worker| {
                worker.inside(&netns, |_| observe::state(&mut Netlink::open()?, sysctls.iter().map(String::as_str)))
            })
            .await
    }

    /// Compares a pod's plan with the kernel. `netns` is `None` when the pod's namespace is gone, which is one of the differences.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn check_pod(&self, plan: &PodPlan, netns: Option<&PodNetns>) -> Result<Vec<Difference>, NetError> {
        let steps: Vec<Step> = plan.steps().cloned().collect();
        self.check(steps, netns).await
    }

    /// Compares what `steps` set up with the kernel.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub async fn check(&self, steps: Vec<Step>, netns: Option<&PodNetns>) -> Result<Vec<Difference>, NetError> {
        let host = self.observe(sysctl_paths(&steps, Place::Host)).await?;
        let pod = match netns {
            Some(netns) => Some(self.observe_pod(netns, sysctl_paths(&steps, Place::Pod)).await?),
            None => None,
        };
        Ok(diff(&steps, &Observed { host, pod }))
    }

    /// Carries out single steps, such as the repairs of [`Difference`]s.
    ///
    /// # Errors
    /// What the kernel refused; [`NetError::Netns`] for steps in the pod without `netns`.
    pub async fn repair(&self, steps: Vec<Step>, netns: Option<&PodNetns>) -> Result<(), NetError> {
        let Some(netns) = netns.cloned() else {
            return self.pool.run(move |worker| apply::run(&steps, &mut Sides::host(worker.host()?, Vec::new()))).await;
        };
        self.foreign(&netns)?;
        self.pool
            .run(move |worker| {
                // The node's sysctls cannot be written from inside of the pod.
                let (inside, outside): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| step.place == Place::Pod);
                apply::run(&outside, &mut Sides::host(worker.host()?, Vec::new()))?;
                worker.inside(&netns, |host| {
                    let mut pod = Netlink::open()?;
                    apply::run(&inside, &mut Sides::host(host, Vec::new()).and_pod(&mut pod, Vec::new()))
                })
            })
            .await
    }

    /// Removes what [`terway_core::route::leftovers`] found.
    ///
    /// # Errors
    /// The first thing that could not be removed; the rest has been tried.
    pub async fn remove(&self, leftovers: Vec<Leftover>) -> Result<(), NetError> {
        self.pool
            .run(move |worker| {
                let host = worker.host()?;
                let mut outcome = Ok(());
                for leftover in leftovers {
                    let one = match leftover {
                        Leftover::Rule(rule) => single(host, NetOp::DelRule(rule)),
                        Leftover::Route(route) => single(host, NetOp::DelRoute(route)),
                        Leftover::Link { index, alias, .. } => pod::delete_stale(host, index, alias.as_deref()),
                    };
                    outcome = outcome.and(one);
                }
                outcome
            })
            .await
    }

    /// The node's addresses that others can reach.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn host_addresses(&self) -> Result<Vec<IpNetwork>, NetError> {
        self.pool
            .run(|worker| {
                let all = observe::addresses(worker.host()?)?;
                let mut nets: Vec<_> =
                    all.into_iter().map(|(_, net)| net).filter(|net| observe::reachable(net.ip())).collect();
                nets.sort_unstable();
                nets.dedup();
                Ok(nets)
            })
            .await
    }

    /// Refuses the node's own namespace, into which a pod's plan must never go.
    fn foreign(&self, netns: &PodNetns) -> Result<(), NetError> {
        if netns.id() == self.pool.home().id() {
            let reason = "this is the node's own network namespace".to_owned();
            return Err(NetError::Netns { path: "CNI_NETNS".to_owned(), reason });
        }
        Ok(())
    }
}

/// The alias of a plan's host end.
pub(super) fn owner(plan: &PodPlan) -> String {
    alias(&plan.inputs.key)
}

fn sysctl_paths(steps: &[Step], place: Place) -> BTreeSet<String> {
    let paths = steps.iter().filter(|step| step.place == place).filter_map(|step| match &step.op {
        NetOp::Sysctl { path, .. } => Some(path.clone()),
        _ => None,
    });
    paths.collect()
}

fn single(host: &mut Netlink, op: NetOp) -> Result<(), NetError> {
    apply::run(&[Step::host(op)], &mut Sides::host(host, Vec::new()))
}

/// The ENI's link, if it has the name that the plan's sysctls and routes were made for.
fn named(host: &mut Netlink, plan: &EniPlan) -> Result<NamedLink, NetError> {
    let (index, planned) = (plan.inputs.ifindex, plan.inputs.ifname.clone());
    let (message, flags) = encode::get_link_at(index);
    match host.request(message, flags)?.map(decode::link_of) {
        Ok(Some(link)) if link.name == planned => Ok(link),
        Ok(Some(link)) => Err(NetError::Renamed { index, planned, found: link.name }),
        Ok(None) => Err(NetError::Renamed { index, planned, found: "gone".to_owned() }),
        Err(refusal) if refusal.errno == libc::ENODEV => {
            Err(NetError::Renamed { index, planned, found: "gone".to_owned() })
        }
        Err(refusal) => Err(refusal.during(format!("look up interface {planned}"))),
    }
}

/// Removes addresses from an ENI that the plan does not have.
fn strip(host: &mut Netlink, plan: &EniPlan) -> Result<(), NetError> {
    let planned: Vec<_> = plan.inputs.node.iter().map(IpNetwork::from).collect();
    let dev = &plan.inputs.ifname;
    let all = observe::addresses(host)?;
    let surplus = all
        .into_iter()
        .filter(|(index, net)| *index == plan.inputs.ifindex && observe::reachable(net.ip()) && !planned.contains(net));
    let steps: Vec<_> =
        surplus.map(|(_, address)| Step::host(NetOp::DelAddress { dev: dev.clone(), address })).collect();
    for step in &steps {
        tracing::warn!(%step, "the ENI had an address that is not planned");
    }
    apply::run(&steps, &mut Sides::host(host, vec![(dev.clone(), plan.inputs.ifindex)]))
}
