//! Waiting for programs that are running.

use std::io;
use std::time::Duration;

/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h).
const MEMBARRIER_GLOBAL: libc::c_int = 1;

/// Where the kernel has no such call (`nohz_full`): programs run for microseconds, with bottom halves off.
const LONG: Duration = Duration::from_millis(100);

/// Waits until no program runs that was running before: some milliseconds.
///
/// Traffic-control programs are RCU readers, and the system call waits for a grace period (`membarrier`, kernel/sched/membarrier.c); on a
/// single CPU no program can be running while another task is in a system call.
pub(super) fn fence() {
    // SAFETY: the call takes numbers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_GLOBAL, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no grace period to be had by membarrier; waiting instead");
        std::thread::sleep(LONG);
    }
}
