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

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use aya::maps::{Array, IterableMap as _, MapData};

    /// A program's map value, shared with it by mmap.
    #[repr(C)]
    struct Shared {
        first: AtomicU64,
        second: AtomicU64,
        /// Runs that have read 0 from `first`, and later 1 from `second`.
        violations: AtomicU64,
        runs: AtomicU64,
    }

    /// `struct bpf_insn` (include/uapi/linux/bpf.h).
    const fn insn(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
        code as u64 | (registers as u64) << 8 | (offset as u16 as u64) << 16 | (immediate as u32 as u64) << 32
    }

    /// Iterations of the program's loop: some 50 microseconds, and few enough for the verifier, which follows each.
    const DELAY: i32 = 100_000;

    fn bpf(command: libc::c_long, attributes: &mut [u64]) -> io::Result<libc::c_long> {
        // SAFETY: `attributes` is a union bpf_attr of this size, and its pointers are to memory that outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// Loads a socket filter that reads `first`, delays, reads `second`, and counts violations.
    fn load(map: i32) -> io::Result<OwnedFd> {
        let program = [
            insn(0x62, 0x0a, -4, 0),    // *(u32 *)(r10 - 4) = 0
            insn(0xbf, 0xa2, 0, 0),     // r2 = r10
            insn(0x07, 0x02, 0, -4),    // r2 += -4
            insn(0x18, 0x11, 0, map),   // r1 = map
            insn(0, 0, 0, 0),           //
            insn(0x85, 0, 0, 1),        // call bpf_map_lookup_elem
            insn(0x15, 0x00, 13, 0),    // if r0 == 0 goto out
            insn(0xbf, 0x06, 0, 0),     // r6 = r0
            insn(0x79, 0x67, 0, 0),     // r7 = first
            insn(0xb7, 0x08, 0, DELAY), // r8 = DELAY
            insn(0x17, 0x08, 0, 1),     // r8 -= 1
            insn(0x55, 0x08, -2, 0),    // if r8 != 0 goto -2
            insn(0x79, 0x69, 8, 0),     // r9 = second
            insn(0x79, 0x61, 24, 0),    // r1 = runs
            insn(0x07, 0x01, 0, 1),     // r1 += 1
            insn(0x7b, 0x16, 24, 0),    // runs = r1
            insn(0x3d, 0x97, 3, 0),     // if r7 >= r9 goto out
            insn(0x79, 0x61, 16, 0),    // r1 = violations
            insn(0x07, 0x01, 0, 1),     // r1 += 1
            insn(0x7b, 0x16, 16, 0),    // violations = r1
            insn(0xb7, 0x00, 0, 0),     // out: r0 = 0
            insn(0x95, 0, 0, 0),        // exit
        ];
        /// `BPF_PROG_LOAD` and `BPF_PROG_TYPE_SOCKET_FILTER`.
        const LOAD: libc::c_long = 5;
        const SOCKET_FILTER: u64 = 1;
        let mut attributes = [0_u64; 6];
        attributes[0] = SOCKET_FILTER | (program.len() as u64) << 32;
        attributes[1] = program.as_ptr() as u64;
        attributes[2] = c"GPL".as_ptr() as u64;
        let fd = bpf(LOAD, &mut attributes)?;
        // SAFETY: the call has just returned this descriptor, which nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    fn until_next_run(shared: &Shared) {
        let run = shared.runs.load(Ordering::SeqCst);
        while shared.runs.load(Ordering::SeqCst) == run {
            std::hint::spin_loop();
        }
    }

    /// Violations in so many runs of the program, while a writer sets `first`, waits, and sets `second`.
    fn violations(shared: &Shared, program: &OwnedFd, runs: u64, wait: impl Fn()) -> u64 {
        const TEST_RUN: libc::c_long = 10;
        let (before, stop) = (shared.violations.load(Ordering::SeqCst), AtomicBool::new(false));
        let end = shared.runs.load(Ordering::SeqCst) + runs;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let packet = [0_u8; 64];
                while !stop.load(Ordering::Relaxed) {
                    let mut attributes = [0_u64; 6];
                    attributes[0] = program.as_raw_fd() as u64;
                    attributes[1] = packet.len() as u64;
                    attributes[2] = packet.as_ptr() as u64;
                    bpf(TEST_RUN, &mut attributes).unwrap();
                }
            });
            for cycle in 0_u64.. {
                shared.second.store(0, Ordering::SeqCst);
                shared.first.store(0, Ordering::SeqCst);
                if shared.runs.load(Ordering::SeqCst) >= end {
                    break;
                }
                until_next_run(shared);
                // Each time at another place of the next run.
                (0..cycle * 97 % 2_000).for_each(|_| std::hint::spin_loop());
                shared.first.store(1, Ordering::SeqCst);
                wait();
                shared.second.store(1, Ordering::SeqCst);
                until_next_run(shared);
            }
            stop.store(true, Ordering::Relaxed);
        });
        shared.violations.load(Ordering::SeqCst) - before
    }

    #[test]
    fn no_program_that_ran_before_the_barrier_runs_after_it() {
        /// `BPF_F_MMAPABLE`.
        const MMAPABLE: u32 = 1 << 10;
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            return println!("SKIP: on a single CPU no program runs beside a writer");
        }
        let map = match Array::<MapData, [u64; 4]>::create(1, MMAPABLE) {
            Ok(map) => map,
            Err(error) => return println!("SKIP: this process may not create BPF maps: {error}"),
        };
        let fd = map.map().fd().as_fd().as_raw_fd();
        let program = load(fd).unwrap();
        // SAFETY: a new mapping of the map's page; it is never unmapped.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(page, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        // SAFETY: the mapping is larger than the value, aligned to a page, and all access to it is atomic.
        let shared: &Shared = unsafe { &*page.cast() };

        let mut without = 0;
        for _ in 0..100 {
            without += violations(shared, &program, 100, || {});
            if without > 0 {
                break;
            }
        }
        assert!(without > 0, "without a barrier the test sees no violation: it proves nothing");
        assert_eq!(violations(shared, &program, 2000, super::synchronize), 0);
    }
}
