//! The eBPF datapath as the daemon sees it: loaded, told about pods, attached, and read out.
//!
//! ```text
//! let datapath = Datapath::open(&Config::new("/sys/fs/bpf/terway"))?;   // adopts what an earlier daemon pinned
//! datapath.set_host_addresses(&[...])?;                                 // who the host stack is
//! datapath.attach_eni(eni_ifindex)?;                                    // once per ENI, and again at each start
//! datapath.upsert_endpoint(&endpoint)?;                                 // first the pod's entry …
//! datapath.attach_pod(endpoint.host_ifindex)?;                          // … then its interface; again at each start
//! datapath.remove_endpoint(host_ifindex)?;                              // true if there was one; its flows die at once
//! datapath.endpoints(); datapath.counters()?; datapath.flow_count()?; datapath.take_events()?;
//! ```
//!
//! Every method takes `&self`, is synchronous and may be called from any thread; calls for different pods run in parallel except for
//! the microseconds of a map write. Interface indices are those of the network namespace in which [`Datapath::open`] was called.
//! Everything in the kernel outlives the daemon: maps and links are pinned, and filters belong to their interfaces.
//!
//! After a restart `open` finds the endpoints and flows in the pinned maps. The caller attaches its pods and ENIs again, which
//! replaces the programs without a gap, and removes endpoints whose pods are gone.

mod attach;
mod clsact;
mod counters;
mod elements;
mod endpoints;
mod error;
mod flow_events;
mod flows;
mod host_prefixes;
mod object;
mod pin;
mod policy_counters;
mod policy_maps;
mod service_maps;
mod sockets;
mod sys;
mod test_run;
mod uplinks;

use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aya::maps::{MapData, PerCpuArray};
use ipnetwork::IpNetwork;
pub use object::OBJECT;
use terway_abi::{Counter, Program};
use terway_core::policy;
use terway_core::service::{MapContents, Op};

pub use self::attach::EniHook;
pub use self::endpoints::Endpoint;
pub use self::error::BpfError;
pub use self::flow_events::FlowEvents;
pub use self::flows::{FLOW_BYTES, FamilyFound, FlowFilter, FlowRow, FlowSide, FlowStats, Found, PassOptions};

pub use self::counters::Counters;
pub use self::policy_maps::fence;
pub use self::service_maps::FrontendAt;
pub use self::service_maps::RETIRE_AFTER;
pub use self::sockets::{SocketPrograms, SocketRow};
pub use self::test_run::{Ran, RunContext};
pub use self::uplinks::Uplink;

/// What the datapath is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// A folder on a bpffs, made if missing. Maps go to `v<ABI>` and links to `links` in it.
    pub pin_root: PathBuf,
    /// Entries of the IPv4 flow table. A connection takes one.
    pub flows_v4: u32,
    /// Entries of the IPv6 flow table.
    pub flows_v6: u32,
    /// Events that one CPU reports per second. Drops beyond that are only counted; new connections get half of it at most.
    pub events_per_second: u32,
    /// Reports every first packet to the kernel's trace pipe.
    pub debug: bool,
    /// Use clsact for ENIs even where the kernel has TCX.
    pub force_clsact: bool,
}

impl Config {
    /// Defaults, with pins under `pin_root`.
    #[must_use]
    pub fn new(pin_root: impl Into<PathBuf>) -> Self {
        Self {
            pin_root: pin_root.into(),
            flows_v4: 65_536,
            flows_v6: 65_536,
            events_per_second: 100,
            debug: false,
            force_clsact: false,
        }
    }
}

/// What the running kernel can do, found out by asking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// TCX links (Linux 6.6).
    pub tcx: bool,
    /// Jiffies per second (`CONFIG_HZ`).
    pub hz: u32,
    /// Programs on sockets can say with which error a system call fails (Linux 6.1).
    pub sets_errno: bool,
    /// The cookie of the network namespace in which [`Datapath::open`] was called, the node's; 0 where the kernel does not tell it.
    pub host_netns: u64,
}

/// The loaded datapath.
pub struct Datapath {
    pins: PathBuf,
    links: PathBuf,
    features: Features,
    programs: Mutex<object::Programs>,
    netlink: Mutex<clsact::Socket>,
    endpoints: Mutex<endpoints::Table>,
    host: Mutex<host_prefixes::Prefixes>,
    planned: Mutex<service_maps::Tables>,
    services: Mutex<service_maps::frontends::Services>,
    sockets: Mutex<sockets::Table>,
    policies: Mutex<policy_maps::Policies>,
    verdicts: Mutex<policy_counters::Verdicts>,
    uplinks: Mutex<uplinks::Uplinks>,
    flows: flows::Tables,
    counters: PerCpuArray<MapData, Counter>,
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath").field("pins", &self.pins).field("features", &self.features).finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the programs and adopts or makes the maps.
    ///
    /// # Errors
    /// [`BpfError`], whose text says which step failed and why.
    pub fn open(config: &Config) -> Result<Self, BpfError> {
        object::raise_memlock();
        let pins = config.pin_root.join(terway_abi::PIN_DIR);
        let links = config.pin_root.join("links");
        for folder in [&pins, &links] {
            std::fs::create_dir_all(folder).map_err(|source| BpfError::Pin { path: folder.clone(), source })?;
        }
        pin::check(&pins, config)?;
        let features = object::probe()?;
        let mut loaded = object::load(config, &pins, features)?;
        let mut endpoints = endpoints::Table::new(&mut loaded)?;
        endpoints.recover()?;
        let flows = flows::Tables::open(&pins, features.hz)?;
        let carried = flows.carry_over(&pins)?;
        if carried > 0 {
            tracing::info!(carried, "flows were carried over into tables of another size");
        }
        Ok(Self {
            features: Features { tcx: features.tcx && !config.force_clsact, ..features },
            netlink: Mutex::new(clsact::Socket::open()?),
            endpoints: Mutex::new(endpoints),
            host: Mutex::new(host_prefixes::Prefixes::new(&mut loaded)?),
            planned: Mutex::new(service_maps::Tables::open(&pins)?),
            services: Mutex::new(service_maps::frontends::Services::new(&mut loaded)?),
            sockets: Mutex::new(sockets::Table::open(&pins)?),
            policies: Mutex::new(policy_maps::Policies::new(&mut loaded)?),
            verdicts: Mutex::new(policy_counters::Verdicts::new(&mut loaded)?),
            uplinks: Mutex::new(uplinks::Uplinks::new(&mut loaded)?),
            flows,
            counters: object::take(&mut loaded, terway_abi::names::COUNTERS)?,
            programs: Mutex::new(object::Programs::load(loaded)?),
            pins,
            links,
        })
    }

    /// What the maps of Services hold: where a planner starts from ([`terway_core::service::Planner::restore`]).
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn services(&self) -> Result<MapContents, BpfError> {
        error::lock(&self.planned).recover()
    }

    /// Runs operations on the maps of Services, in their order. Those that a plan leaves for later are due after [`RETIRE_AFTER`].
    ///
    /// # Errors
    /// When a map is full or the kernel refuses. What came before stands; read [`Self::services`] again and make a new planner.
    pub fn apply_services(&self, ops: &[Op]) -> Result<(), BpfError> {
        error::lock(&self.planned).run(ops, &mut |changes| self.change_frontends(changes))
    }

    fn change_frontends(&self, changes: &[(FrontendAt, Option<terway_abi::Frontend>)]) -> Result<(), BpfError> {
        let mut services = error::lock(&self.services);
        let written: Vec<_> = changes.iter().filter_map(|(at, value)| Some((*at, (*value)?))).collect();
        let new = services.set_frontends(&written)?;
        for (at, _) in changes.iter().filter(|(_, value)| value.is_none()) {
            services.remove_frontend(at)?;
        }
        drop(services);
        error::lock(&self.endpoints).void_addresses(&new)
    }

    /// How many frontends and backends the maps hold, as far as [`Self::services`] and [`Self::apply_services`] know.
    #[must_use]
    pub fn service_counts(&self) -> (usize, usize) {
        error::lock(&self.planned).counts()
    }

    /// What the maps of policies hold: where a compiler starts from ([`policy::Compiler::take_over`]).
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn policies(&self) -> Result<policy::Maps, BpfError> {
        error::lock(&self.policies).read()
    }

    /// The identity that the maps of policies give an address which is no local endpoint's, in the phase that counts; none = 0.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn identity(&self, address: IpAddr) -> Result<policy::Identity, BpfError> {
        error::lock(&self.policies).identity(address)
    }

    /// Runs an operation on the maps of policies. [`policy::Op::RcuBarrier`] is [`fence`].
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; running it again completes it.
    pub fn apply_policy(&self, op: &policy::Op) -> Result<(), BpfError> {
        let stale = match op {
            policy::Op::RcuBarrier => {
                fence();
                return Ok(());
            }
            policy::Op::Revalidate(scope) => *scope,
            op => return error::lock(&self.policies).write(op),
        };
        let mut endpoints = error::lock(&self.endpoints);
        match stale {
            policy::FlowScope::Endpoint(slot) => endpoints.judge_slot(slot),
            policy::FlowScope::Address(address) => endpoints.judge_address(address),
            policy::FlowScope::All => endpoints.judge_all(),
        }
    }

    /// How many entries the maps of policies hold: identities of addresses, identities of blocks, what sets say, prefixes of ports.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn policy_counts(&self) -> Result<[usize; 4], BpfError> {
        error::lock(&self.policies).counts()
    }

    /// Has one in `one_in` new connections reported, all with 1, none with 0. Takes effect with the next packet.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn sample_flows(&self, one_in: u32) -> Result<(), BpfError> {
        error::lock(&self.policies).sample(one_in)
    }

    /// Makes a counter of what a reason decides, with which the programs count from now on. The tag is for the reader.
    ///
    /// # Errors
    /// [`BpfError::Map`], also if there are too many.
    pub fn make_policy_counter(&self, reason: u32, tag: u64) -> Result<(), BpfError> {
        error::lock(&self.verdicts).make(reason, tag)
    }

    /// Such a counter, summed over CPUs; zeros if there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn policy_counter(&self, reason: u32) -> Result<terway_abi::PolicyCounter, BpfError> {
        error::lock(&self.verdicts).read(reason)
    }

    /// Removes such a counter. One that is not there is no error.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove_policy_counter(&self, reason: u32) -> Result<(), BpfError> {
        error::lock(&self.verdicts).remove(reason)
    }

    /// The reasons that have one.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn policy_counters(&self) -> Result<Vec<u32>, BpfError> {
        error::lock(&self.verdicts).reasons()
    }

    /// The slot under which the policies of an interface's pod stand, before [`Datapath::upsert_endpoint`] or after it, and whether the
    /// interface has an endpoint already. The slot stays the pod's until [`Datapath::release_slot`].
    ///
    /// # Errors
    /// [`BpfError::Full`].
    pub fn reserve_slot(&self, host_ifindex: u32) -> Result<(u32, bool), BpfError> {
        error::lock(&self.endpoints).reserve(host_ifindex)
    }

    /// The endpoint for which a slot was reserved does not come.
    pub fn unreserve_slot(&self, host_ifindex: u32) {
        error::lock(&self.endpoints).unreserve(host_ifindex);
    }

    /// Nothing of a pod's policies is left under the slot.
    pub fn release_slot(&self, slot: u32) {
        error::lock(&self.endpoints).release(slot);
    }

    /// Slots of endpoints that are there, or reserved.
    #[must_use]
    pub fn slots(&self) -> std::collections::BTreeSet<u32> {
        error::lock(&self.endpoints).slots()
    }

    /// What the kernel can do.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The folder of this version's maps.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Attaches `from_pod` and `to_pod` to the host end of a pod's veth, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError::Netlink`], with `ENODEV` if the interface is gone.
    pub fn attach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        let (from, to) = (self.program_fd(Program::FromPod)?, self.program_fd(Program::ToPod)?);
        error::lock(&self.netlink).attach(ifindex, from, to)
    }

    /// Whether [`Datapath::attach_pod`] has been here and its filters are still in place.
    ///
    /// # Errors
    /// [`BpfError::Netlink`] when the kernel cannot be asked.
    pub fn pod_is_attached(&self, ifindex: u32) -> Result<bool, BpfError> {
        error::lock(&self.netlink).is_attached(ifindex)
    }

    /// Attaches `from_vpc` and `to_vpc` to an ENI, replacing what an earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn attach_eni(&self, ifindex: u32) -> Result<EniHook, BpfError> {
        if self.features.tcx {
            attach::tcx(&mut error::lock(&self.programs), &self.links, ifindex)?;
            // A daemon that was told to use clsact may have left filters, which would see every packet a second time.
            error::lock(&self.netlink).detach(ifindex)?;
            return Ok(EniHook::Tcx);
        }
        let (from, to) = (self.program_fd(Program::FromVpc)?, self.program_fd(Program::ToVpc)?);
        error::lock(&self.netlink).attach(ifindex, from, to)?;
        attach::detach(&self.links, ifindex)?;
        Ok(EniHook::Clsact)
    }

    /// Detaches from an ENI. One that is gone, or was never attached, is no error.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed.
    pub fn detach_eni(&self, ifindex: u32) -> Result<(), BpfError> {
        attach::detach(&self.links, ifindex)?;
        error::lock(&self.netlink).detach(ifindex)
    }

    /// Detaches from the host end of a pod's veth. Deleting the interface does that by itself.
    ///
    /// # Errors
    /// [`BpfError::Netlink`].
    pub fn detach_pod(&self, ifindex: u32) -> Result<(), BpfError> {
        error::lock(&self.netlink).detach(ifindex)
    }

    /// The ENIs that are attached by TCX links, by interface index: those that need [`Datapath::detach_eni`] if they are no longer
    /// wanted. A clsact attachment needs no such care, because it goes with its interface.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    pub fn attached_enis(&self) -> Result<Vec<u32>, BpfError> {
        attach::pinned_ifindexes(&self.links)
    }

    /// Removes the maps of other versions of the daemon, and flow tables of another size. To be called once every pod and ENI is
    /// attached: until then packets are still handled by programs that use them.
    ///
    /// # Errors
    /// [`BpfError`]; calling again completes it.
    pub fn remove_other_versions(&self) -> Result<(), BpfError> {
        self.flows.finish_carrying(&self.pins)?;
        pin::remove_others(&self.pins)
    }

    /// Attaches the programs that resolve Services at the socket to a cgroup (version 2) and all below it, in place of those that an
    /// earlier daemon attached.
    ///
    /// # Errors
    /// [`BpfError`], which says which step failed; calling again completes it.
    pub fn attach_sockets(&self, cgroup: &Path) -> Result<SocketPrograms, BpfError> {
        sockets::attach(&mut error::lock(&self.programs), &self.links, cgroup)
    }

    /// How many of these programs are attached now. A cgroup that is removed takes its programs with it.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    pub fn attached_sockets(&self) -> Result<usize, BpfError> {
        sockets::attached(&self.links)
    }

    /// The sockets whose peer was translated, as far as the table remembers, and the present life of their backend.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn sockets(&self) -> Result<Vec<SocketRow>, BpfError> {
        error::lock(&self.sockets).list()
    }

    /// Forgets such sockets; the next answer they get is not translated back.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn forget_sockets(&self, rows: &[SocketRow]) -> Result<(), BpfError> {
        error::lock(&self.sockets).forget(rows)
    }

    /// Takes them off again. Not attached is no error.
    ///
    /// # Errors
    /// [`BpfError::Pin`].
    pub fn detach_sockets(&self) -> Result<(), BpfError> {
        sockets::detach(&self.links)
    }

    /// Adds a pod, or changes it. Packets see it whole or not at all; flows that a change touches are decided anew.
    ///
    /// An address that another endpoint had goes over to this one, and that other endpoint is removed: two pods never share one.
    ///
    /// # Errors
    /// [`BpfError`]; nothing or a part was written, and calling again completes it.
    pub fn upsert_endpoint(&self, endpoint: &Endpoint) -> Result<(), BpfError> {
        error::lock(&self.endpoints).upsert(endpoint)
    }

    /// Removes the pod behind this interface and voids its flows; `false` if there is none.
    ///
    /// # Errors
    /// [`BpfError`]; calling again completes it.
    pub fn remove_endpoint(&self, host_ifindex: u32) -> Result<bool, BpfError> {
        error::lock(&self.endpoints).remove(host_ifindex)
    }

    /// All pods, by interface index.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        error::lock(&self.endpoints).list()
    }

    /// All pods as the kernel's maps hold them now, whatever this daemon believes. An entry that is not whole (missing under one of its
    /// addresses, or void) is left out.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn stored_endpoints(&self) -> Result<Vec<Endpoint>, BpfError> {
        error::lock(&self.endpoints).stored()
    }

    /// Takes the kernel's maps for the truth, should something else have changed them: forgets endpoints that are not there, completes
    /// those that are there by half.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn reread(&self) -> Result<(), BpfError> {
        error::lock(&self.endpoints).recover()
    }

    /// Sets which addresses the host stack serves: the node's own and `host_stack_cidrs`. Pods' packets to them are passed to it.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set_host_addresses(&self, prefixes: &[IpNetwork]) -> Result<(), BpfError> {
        let changed = error::lock(&self.host).set(prefixes)?;
        if changed { error::lock(&self.endpoints).void_unowned() } else { Ok(()) }
    }

    /// Sets which addresses of the node have NodePorts. To be called once after each start, too: it makes the filter right.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), BpfError> {
        let changed = error::lock(&self.services).set_node_addresses(addresses)?;
        changed.into_iter().try_for_each(|address| error::lock(&self.endpoints).void_address(address))
    }

    /// Makes an ENI one by which clients outside reach Services. To be called before [`Datapath::attach_eni`]: until then their
    /// packets are dropped there.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set_uplink(&self, uplink: &Uplink) -> Result<(), BpfError> {
        error::lock(&self.uplinks).set(uplink)
    }

    /// Takes that back; `false` if it was none. Connections that go on by it are not ended.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove_uplink(&self, ifindex: u32) -> Result<bool, BpfError> {
        error::lock(&self.uplinks).remove(ifindex)
    }

    /// All ENIs by which clients outside reach Services.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn uplinks(&self) -> Result<Vec<Uplink>, BpfError> {
        error::lock(&self.uplinks).list()
    }

    /// Writes a backend. One that goes gets another generation: everything that names it is void at once.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set_backend(&self, number: u32, backend: &terway_abi::Backend) -> Result<(), BpfError> {
        error::lock(&self.services).set_backend(number, backend)
    }

    /// Writes members from index `first` on, where no frontend's run may have been for a second.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set_members(&self, first: u32, members: &[terway_abi::Member]) -> Result<(), BpfError> {
        error::lock(&self.services).set_members(first, members)
    }

    /// Writes a frontend: packets see the old value or this one. Flows to the address that were made when it was no Service's are
    /// decided anew.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set_frontend(&self, at: &FrontendAt, value: &terway_abi::Frontend) -> Result<(), BpfError> {
        let new = error::lock(&self.services).set_frontend(at, value)?;
        match at.address() {
            Some(address) if new => error::lock(&self.endpoints).void_address(address),
            _ => Ok(()),
        }
    }

    /// Removes a frontend; `false` if there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn remove_frontend(&self, at: &FrontendAt) -> Result<bool, BpfError> {
        error::lock(&self.services).remove_frontend(at)
    }

    /// All frontends.
    #[must_use]
    pub fn frontends(&self) -> Vec<FrontendAt> {
        error::lock(&self.services).frontends()
    }

    /// Packets and bytes by way and by drop reason, summed over CPUs.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn counters(&self) -> Result<Counters, BpfError> {
        counters::read(&self.counters)
    }

    /// Entries of the flow tables, IPv4 and IPv6, void ones included.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn flow_count(&self) -> Result<(usize, usize), BpfError> {
        self.flows.count()
    }

    /// Both directions of up to `limit` flows of each family.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn flows(&self, limit: usize) -> Result<Vec<FlowRow>, BpfError> {
        self.flows.dump(limit)
    }

    /// Directions of flows that saw a packet and that the filter means, `most` of them, and whether there are more.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn find_flows(&self, filter: &FlowFilter, most: usize) -> Result<(Vec<FlowRow>, bool), BpfError> {
        self.flows.find(filter, most)
    }

    /// Goes through the flow tables: counts, and as told deletes what is dead and sets the loads of backends right.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn pass_flows(&self, options: &PassOptions) -> Result<Found, BpfError> {
        self.flows.pass(options)
    }

    /// Flows that were deleted by [`Self::flush_flows`] so far.
    #[must_use]
    pub fn flushed_flows(&self) -> u64 {
        self.flows.flushed()
    }

    /// Whether a Service chooses the backend with the fewest connections: then [`PassOptions::loads`] is of use.
    #[must_use]
    pub fn wants_loads(&self) -> bool {
        error::lock(&self.planned).wants_loads()
    }

    /// Deletes the flows that a filter means, entries of translated ones included as far as they match by themselves; how many.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn flush_flows(&self, filter: &FlowFilter) -> Result<u64, BpfError> {
        self.flows.flush(filter)
    }

    /// The flow tables in numbers.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn flow_stats(&self) -> Result<FlowStats, BpfError> {
        self.flows.stats()
    }

    /// The stream of flow events. The kernel's buffer has one reader, so it can be taken once.
    ///
    /// # Errors
    /// [`BpfError::EventsTaken`], or the kernel's refusal. Must be called within a tokio runtime.
    pub fn take_events(&self) -> Result<FlowEvents, BpfError> {
        error::lock(&self.programs).take_events()
    }

    /// Runs a program once or more on a packet that goes nowhere (`BPF_PROG_TEST_RUN`), for tests and benchmarks.
    ///
    /// # Errors
    /// [`BpfError::Program`].
    pub fn run(&self, program: Program, packet: &[u8], context: RunContext) -> Result<Ran, BpfError> {
        test_run::run(&error::lock(&self.programs), program, packet, context)
    }

    fn program_fd(&self, program: Program) -> Result<RawFd, BpfError> {
        // The programs live as long as `self`, so the number stays good after the lock is gone.
        Ok(error::lock(&self.programs).fd(program)?.as_raw_fd())
    }
}

/// Shared between all threads of the daemon.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Datapath>();
};
