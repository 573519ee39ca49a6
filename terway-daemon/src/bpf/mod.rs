//! The eBPF datapath: loads the programs, adopts or creates the pinned maps, and hands out a handle for each part.
//!
//! ```text
//! let datapath = Datapath::open(&Config::new("/sys/fs/bpf/terway"))?;       // adopts what an earlier daemon pinned
//! datapath.host_prefixes().set(&[...])?;                                    // what the host stack serves
//! datapath.interfaces().attach_eni(eni_ifindex)?;                           // once per ENI, and again at each start
//! datapath.endpoints().upsert(&endpoint)?;                                  // first the pod's endpoint ...
//! datapath.interfaces().attach_pod(endpoint.host_ifindex)?;                 // ... then its interface; again at each start
//! datapath.endpoints().remove(host_ifindex)?;                               // true if there was one; its flows are invalid at once
//! ```
//!
//! | handle | owns |
//! |---|---|
//! | [`Datapath::programs`] | the loaded programs, the ring buffer of flow events |
//! | [`Datapath::interfaces`] | attachments to pods' interfaces and ENIs |
//! | [`Datapath::endpoints`] | endpoint maps, epochs, slots |
//! | [`Datapath::host_prefixes`] | prefixes that the host stack serves |
//! | [`Datapath::services`] | frontends, backends, backend tables, source ranges, the filter |
//! | [`Datapath::sockets`] | programs on a cgroup and their table of translated sockets |
//! | [`Datapath::policies`] | policy maps, identities of addresses |
//! | [`Datapath::policy_counters`] | what each policy rule decided |
//! | [`Datapath::uplinks`] | ENIs by which external clients reach Services |
//! | [`Datapath::flows`] | flow tables |
//! | [`Datapath::counters`] | packets and bytes by path and drop reason |
//!
//! Every method takes `&self`, is synchronous and may be called from any thread. Interface indices are those of the network namespace in
//! which [`Datapath::open`] was called. Everything in the kernel outlives the daemon: maps and links are pinned, and filters belong to
//! their interfaces. After a restart `open` finds the endpoints and flows in the pinned maps. The caller attaches its pods and ENIs again,
//! which replaces the programs without a gap, and removes endpoints whose pods are gone.
//!
//! # Locks
//!
//! Each handle has its own lock, and a map is written by one handle only. There is one order: `services` or `host_prefixes` before
//! `endpoints`, because a change of what an address means invalidates flows; `interfaces` and `sockets` before `programs`. [`Datapath::set_debug`]
//! holds a lock of its own before those of `interfaces`.
//! The flow tables have no lock.
//!
//! A lock is not poisoned by a panic of its holder (`parking_lot`). Maps are written before the mirrors of them, so a mirror can only lack
//! the write that was under way; whoever handles the panic calls `recover` of the handle ([`ServiceMaps::recover`],
//! [`EndpointMaps::recover`]; [`PolicyMaps::read`] has no mirror), which reads the maps anew.

mod address;
mod attach;
mod clsact;
mod counters;
mod debug_log;
mod elements;
mod endpoints;
mod error;
mod flow_events;
mod flows;
mod host_prefixes;
mod interfaces;
mod object;
mod pin;
mod policy_counters;
mod policy_maps;
mod programs;
mod rcu;
mod service_maps;
mod sockets;
mod sys;
#[cfg(feature = "test-api")]
mod test_run;
mod uplinks;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

pub use self::attach::EniHook;
pub use self::counters::{Counters, PathCounters};
pub use self::debug_log::DebugLog;
pub use self::endpoints::{Endpoint, EndpointMaps};
pub use self::error::BpfError;
pub use self::flow_events::FlowEvents;
pub use self::flows::{
    FLOW_BYTES, FamilyGcReport, FlowFilter, FlowRow, FlowSide, FlowStats, FlowTables, GcOptions, GcReport,
};
pub use self::host_prefixes::HostPrefixes;
pub use self::interfaces::Interfaces;
pub use self::object::OBJECT;
pub use self::policy_counters::PolicyCounters;
pub use self::policy_maps::PolicyMaps;
pub use self::programs::Programs;
pub use self::rcu::synchronize as synchronize_rcu;
pub use self::service_maps::{RETIRE_AFTER, ServiceMaps};
pub use self::sockets::{SocketPrograms, SocketRow, SocketTable};
#[cfg(feature = "test-api")]
pub use self::test_run::{Ran, RunContext};
pub use self::uplinks::{Uplink, UplinkMap};

/// Configuration of the datapath.
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
    /// Loads the programs with their debug log: a line for each decision of the slow path; see [`Programs::take_debug_log`].
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

/// What the running kernel can do, as found by probing it.
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
#[derive(Debug)]
pub struct Datapath {
    pins: PathBuf,
    features: Features,
    /// As of now: its `debug` follows [`Datapath::set_debug`].
    config: Mutex<Config>,
    programs: Arc<Programs>,
    interfaces: Interfaces,
    endpoints: Arc<EndpointMaps>,
    host_prefixes: HostPrefixes,
    services: ServiceMaps,
    sockets: SocketTable,
    policies: PolicyMaps,
    policy_counters: PolicyCounters,
    uplinks: UplinkMap,
    flows: FlowTables,
    counters: PathCounters,
}

impl Datapath {
    /// Loads the programs and adopts or creates the maps.
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
        let features = Features { tcx: features.tcx && !config.force_clsact, ..features };
        let mut loaded = object::load(config, &pins, features)?;

        let endpoints = Arc::new(EndpointMaps::open(&mut loaded)?);
        let flows = FlowTables::open(&pins, features.hz)?;
        let copied = flows.copy_old_tables(&pins)?;
        if copied > 0 {
            tracing::info!(copied, "flows were copied into tables of another size");
        }
        let host_prefixes = HostPrefixes::open(&mut loaded, Arc::clone(&endpoints))?;
        let services = ServiceMaps::open(&mut loaded, Arc::clone(&endpoints))?;
        let policies = PolicyMaps::open(&mut loaded, Arc::clone(&endpoints))?;
        let policy_counters = PolicyCounters::open(&mut loaded)?;
        let uplinks = UplinkMap::open(&mut loaded)?;
        let counters = PathCounters::open(&mut loaded)?;
        let socket_map = sockets::take_sockets(&mut loaded)?;

        let programs = Arc::new(Programs::load(loaded)?);
        let interfaces = Interfaces::open(Arc::clone(&programs), links.clone(), features.tcx)?;
        let sockets = SocketTable::open(socket_map, &pins, Arc::clone(&programs), links)?;
        Ok(Self {
            pins,
            features,
            config: Mutex::new(config.clone()),
            programs,
            interfaces,
            endpoints,
            host_prefixes,
            services,
            sockets,
            policies,
            policy_counters,
            uplinks,
            flows,
            counters,
        })
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

    /// The loaded programs.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Whether the programs have their debug log.
    #[must_use]
    pub fn debug(&self) -> bool {
        self.config.lock().debug
    }

    /// Loads the programs with or without their debug log and puts them in place of the present ones, on each interface without a gap: maps,
    /// flows and the stream of flow events stay. Takes as long as the kernel verifies, up to a second. The programs of sockets have no debug
    /// log and stay.
    ///
    /// # Errors
    /// [`BpfError`]. If an interface could not be attached, it keeps its programs, which work on.
    pub fn set_debug(&self, debug: bool) -> Result<(), BpfError> {
        let mut config = self.config.lock();
        if config.debug == debug {
            return Ok(());
        }
        let wanted = Config { debug, ..config.clone() };
        let loaded = Programs::verify(object::load(&wanted, &self.pins, self.features)?)?;
        config.debug = debug;
        self.interfaces.exchange(loaded)
    }

    /// Attachments to interfaces.
    #[must_use]
    pub const fn interfaces(&self) -> &Interfaces {
        &self.interfaces
    }

    /// The endpoint maps.
    #[must_use]
    pub fn endpoints(&self) -> &EndpointMaps {
        &self.endpoints
    }

    /// The prefixes that the host stack serves.
    #[must_use]
    pub const fn host_prefixes(&self) -> &HostPrefixes {
        &self.host_prefixes
    }

    /// The Service maps.
    #[must_use]
    pub const fn services(&self) -> &ServiceMaps {
        &self.services
    }

    /// The socket programs and their table.
    #[must_use]
    pub const fn sockets(&self) -> &SocketTable {
        &self.sockets
    }

    /// The policy maps.
    #[must_use]
    pub const fn policies(&self) -> &PolicyMaps {
        &self.policies
    }

    /// The policy counters.
    #[must_use]
    pub const fn policy_counters(&self) -> &PolicyCounters {
        &self.policy_counters
    }

    /// The uplinks.
    #[must_use]
    pub const fn uplinks(&self) -> &UplinkMap {
        &self.uplinks
    }

    /// The flow tables.
    #[must_use]
    pub const fn flows(&self) -> &FlowTables {
        &self.flows
    }

    /// The path counters.
    #[must_use]
    pub const fn counters(&self) -> &PathCounters {
        &self.counters
    }

    /// Removes the maps of other versions of the daemon, and flow tables of another size. To be called once every pod and ENI is
    /// attached: until then packets are still handled by programs that use them.
    ///
    /// # Errors
    /// [`BpfError`]; calling again completes it.
    pub fn remove_other_versions(&self) -> Result<(), BpfError> {
        self.flows.finish_resize(&self.pins)?;
        pin::remove_others(&self.pins)
    }
}

/// Shared between all threads of the daemon.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Datapath>();
};
