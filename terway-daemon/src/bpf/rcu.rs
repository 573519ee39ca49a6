//! RCU barrier: waiting until every program that was running has finished.

use std::io;
use std::time::Duration;

/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h).
const MEMBARRIER_GLOBAL: libc::c_int = 1;

/// The time to wait where the kernel has no such command (`nohz_full`). Programs run for microseconds, with bottom halves disabled.
const FALLBACK: Duration = Duration::from_millis(100);

/// Waits until no program runs that was running before (`synchronize_rcu`).
///
/// Traffic-control programs are RCU readers, and the system call waits for a grace period (`membarrier`, kernel/sched/membarrier.c); on a
/// single CPU no program can be running while another task is in a system call.
pub fn synchronize() {
    // SAFETY: the call takes numbers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_GLOBAL, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "membarrier gives no RCU grace period; waiting instead");
        std::thread::sleep(FALLBACK);
    }
}
