//! Handle of the loaded programs.

use std::fmt;
use std::os::fd::{AsRawFd as _, RawFd};

use aya::Ebpf;
use parking_lot::{Mutex, MutexGuard};
use terway_abi::Program;

use super::debug_log::DebugLog;
use super::error::BpfError;
use super::flow_events::FlowEvents;
use super::object::LoadedPrograms;
#[cfg(feature = "test-api")]
use super::test_run::{self, Ran, RunContext};

/// Handle of the programs that the kernel has verified.
///
/// Its lock is held for the time of an attachment and taken last.
pub struct Programs {
    loaded: Mutex<LoadedPrograms>,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").finish_non_exhaustive()
    }
}

impl Programs {
    /// Has the kernel verify the programs. The handles of maps must have been taken out of the object before, and must live until then:
    /// the programs refer to maps by descriptor.
    pub(super) fn load(object: Ebpf) -> Result<Self, BpfError> {
        Ok(Self { loaded: Mutex::new(Self::verify(object)?) })
    }

    /// Programs for [`Self::replace`].
    pub(super) fn verify(object: Ebpf) -> Result<LoadedPrograms, BpfError> {
        LoadedPrograms::load(object)
    }

    /// Puts other programs of the same version in place of these; those that are attached stay until the caller attaches again. The stream
    /// of flow events goes on: all write into one pinned ring buffer.
    pub(super) fn replace(&self, loaded: LoadedPrograms) {
        *self.loaded.lock() = loaded.without_events();
    }

    /// The stream of flow events. The kernel's ring buffer has one reader, so it can be taken once.
    ///
    /// # Errors
    /// [`BpfError::EventsTaken`], or the kernel's refusal. Must be called within a tokio runtime.
    pub fn take_events(&self) -> Result<FlowEvents, BpfError> {
        self.loaded.lock().take_events()
    }

    /// The stream of debug log records; empty unless the programs were loaded with [`Config::debug`](super::Config::debug). It can be taken
    /// once.
    ///
    /// # Errors
    /// [`BpfError::Missing`]: it was taken. Must be called within a tokio runtime.
    pub fn take_debug_log(&self) -> Result<DebugLog, BpfError> {
        self.loaded.lock().take_debug_log()
    }

    /// Runs a program once or more on a packet that goes nowhere (`BPF_PROG_TEST_RUN`).
    ///
    /// # Errors
    /// [`BpfError::Program`].
    #[cfg(feature = "test-api")]
    pub fn run(&self, program: Program, packet: &[u8], context: RunContext) -> Result<Ran, BpfError> {
        test_run::run(&self.loaded.lock(), program, packet, context)
    }

    /// The descriptor of a program, which stays open as long as `self` lives.
    pub(super) fn raw_fd(&self, program: Program) -> Result<RawFd, BpfError> {
        Ok(self.loaded.lock().fd(program)?.as_raw_fd())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, LoadedPrograms> {
        self.loaded.lock()
    }
}
