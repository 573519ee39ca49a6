//! The embedded object file: loading, globals, features.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::path::Path;

use aya::maps::{Map, MapError};
use aya::programs::{CgroupSockAddr, ProgramError, ProgramType, SchedClassifier, TcAttachType};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader, Pod};
use terway_abi::{Program, names};

use super::debug_log::{self, DebugLog};
use super::elements::Elements;
use super::error::BpfError;
use super::flow_events::FlowEvents;
use super::{Config, Features};

/// The object file with all programs; empty if the build skipped it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/terway.o"));

/// Kernels before 5.11 charge maps to this limit, whose default is 64 KiB; later ones do not look at it, and there it does not
/// matter that a container without CAP_SYS_RESOURCE is refused.
pub(super) fn raise_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the pointer is to a live value, which the call only reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "cannot raise RLIMIT_MEMLOCK; kernels before 5.11 need that");
    }
}

/// Asks the kernel what it can do.
pub(super) fn probe() -> Result<Features, BpfError> {
    // The query fails with EINVAL where the attach type is unknown; every network namespace has a loopback interface.
    let tcx = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    let mut resolution = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live value, which the call fills.
    if unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut resolution) } != 0 {
        return Err(BpfError::System { call: "clock_getres", source: io::Error::last_os_error() });
    }
    // The coarse clock's resolution is one tick (`KTIME_LOW_RES`, kernel/time/posix-timers.c).
    let hz = u32::try_from(1_000_000_000 / resolution.tv_nsec.max(1)).unwrap_or(1000);
    // A kernel that cannot be asked is taken for one that cannot do it: the programs then load on any.
    let sets_errno =
        is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or_default();
    Ok(Features { tcx, hz, sets_errno, host_netns: netns_cookie()? })
}

/// The cookie of the calling thread's network namespace; 0 where the kernel does not tell (`SO_NETNS_COOKIE` is of Linux 5.14).
fn netns_cookie() -> Result<u64, BpfError> {
    crate::net::netns_cookie()
        .map(Option::unwrap_or_default)
        .map_err(|source| BpfError::System { call: "getsockopt(SO_NETNS_COOKIE)", source })
}

/// Loads maps and relocates programs; adopts maps that are pinned in `pins`.
pub(super) fn load(config: &Config, pins: &Path, features: Features) -> Result<Ebpf, BpfError> {
    if OBJECT.is_empty() {
        return Err(BpfError::NoPrograms);
    }
    let (debug, sets_errno) = (u32::from(config.debug), u32::from(features.sets_errno));
    let mut loader = EbpfLoader::new();
    loader
        .override_global(names::HZ, &features.hz, true)
        .override_global(names::EVENTS_PER_SECOND, &config.events_per_second, true)
        .override_global(names::DEBUG, &debug, true)
        .override_global(names::HOST_NETNS, &features.host_netns, true)
        .override_global(names::SETS_ERRNO, &sets_errno, true)
        .map_max_entries(names::FLOWS_V4, config.flows_v4)
        .map_max_entries(names::FLOWS_V6, config.flows_v6)
        .map_max_entries(debug_log::MAP, if config.debug { debug_log::MAP_BYTES.0 } else { debug_log::MAP_BYTES.1 });
    for name in names::MAPS {
        loader.map_pin_path(name, pins.join(name));
    }
    Ok(loader.load(OBJECT)?)
}

/// A typed map out of the loaded object.
pub(super) fn take<M>(loaded: &mut Ebpf, name: &'static str) -> Result<M, BpfError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = loaded.take_map(name).ok_or_else(|| BpfError::Missing(name.to_owned()))?;
    M::try_from(map).map_err(BpfError::map(name))
}

/// An array or hash map out of the loaded object.
pub(super) fn take_elements<K: Pod, V: Pod>(loaded: &mut Ebpf, name: &'static str) -> Result<Elements<K, V>, BpfError> {
    match loaded.take_map(name) {
        Some(Map::Array(map) | Map::HashMap(map) | Map::LruHashMap(map)) => Elements::over(map, name),
        _ => Err(BpfError::Missing(name.to_owned())),
    }
}

/// The programs of the object, loaded into the kernel.
#[derive(Debug)]
pub(super) struct LoadedPrograms {
    loaded: Ebpf,
    events: Option<Map>,
}

impl LoadedPrograms {
    /// Has the kernel verify all programs, each in a thread of its own: that takes most of the time of a start.
    pub(super) fn load(mut loaded: Ebpf) -> Result<Self, BpfError> {
        for name in names::PROGRAMS {
            classifier(&mut loaded, name)?;
        }
        std::thread::scope(|scope| {
            let programs = loaded.programs_mut().filter_map(|(name, program)| {
                let name = names::PROGRAMS.into_iter().find(|n| *n == name)?;
                Some((name, <&mut SchedClassifier>::try_from(program).ok()?))
            });
            let verified =
                |name, program: &mut SchedClassifier| verify(|| program.load()).map_err(BpfError::program(name));
            let threads: Vec<_> =
                programs.map(|(name, program)| scope.spawn(move || verified(name, program))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        let events = loaded.take_map(names::EVENTS);
        Ok(Self { loaded, events })
    }

    /// The same, where another reader has the flow events.
    pub(super) fn without_events(self) -> Self {
        Self { events: None, ..self }
    }

    pub(super) fn get(&self, program: Program) -> Result<&SchedClassifier, BpfError> {
        let name = program.name();
        let found = self.loaded.program(name).ok_or_else(|| BpfError::Missing(name.to_owned()))?;
        found.try_into().map_err(BpfError::program(name))
    }

    pub(super) fn get_mut(&mut self, program: Program) -> Result<&mut SchedClassifier, BpfError> {
        classifier(&mut self.loaded, program.name())
    }

    pub(super) fn fd(&self, program: Program) -> Result<BorrowedFd<'_>, BpfError> {
        Ok(self.get(program)?.fd().map_err(BpfError::program(program.name()))?.as_fd())
    }

    pub(super) fn take_debug_log(&mut self) -> Result<DebugLog, BpfError> {
        DebugLog::take(&mut self.loaded)
    }

    pub(super) fn take_events(&mut self) -> Result<FlowEvents, BpfError> {
        FlowEvents::new(self.events.take().ok_or(BpfError::EventsTaken)?)
    }
}

/// A program on sockets, loaded when it is first asked for: a node whose Services are served by another component does without.
pub(super) fn socket_program<'a>(
    programs: &'a mut LoadedPrograms,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, BpfError> {
    let found = programs.loaded.program_mut(name).ok_or_else(|| BpfError::Missing(name.to_owned()))?;
    let program: &mut CgroupSockAddr = found.try_into().map_err(BpfError::program(name))?;
    if program.fd().is_err() {
        verify(|| program.load()).map_err(BpfError::program(name))?;
    }
    Ok(program)
}

/// Has the kernel verify a program.
///
/// Verification takes a good part of a second, and the kernel gives it up with EAGAIN when a signal comes in between (`do_check`,
/// kernel/bpf/verifier.c); even one that the process ignores.
fn verify(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..VERIFY_ATTEMPTS {
        match load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
    load()
}

/// libbpf's number for the same (`PROG_LOAD_ATTEMPTS`) is 5; a daemon has more signals coming in than a tool.
const VERIFY_ATTEMPTS: u32 = 20;

fn classifier<'a>(loaded: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, BpfError> {
    let found = loaded.program_mut(name).ok_or_else(|| BpfError::Missing(name.to_owned()))?;
    found.try_into().map_err(BpfError::program(name))
}
