//! The verifier rung: the running kernel accepts every program in every shape. A branch that a global folds away is not verified, so the
//! shapes cover both values of each condition.

use aya::EbpfLoader;
use aya::programs::{CgroupSockAddr, ProgramType, SchedClassifier};
use aya::sys::{BpfHelper, is_helper_supported};
use terway_abi::names;
use terway_daemon::bpf::OBJECT;
use terway_tests::sandbox_or_skip;

/// Loads all programs with these globals; returns the verified and the translated instructions of each.
fn load(hz: u32, events_per_second: u32, debug: u32, host_netns: u64) -> Result<Vec<(&'static str, u32, u32)>, String> {
    // A kernel without the helper refuses it, and the daemon asks first.
    let helper = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    let sets_errno = u32::from(host_netns != 0 && helper.unwrap_or_default());
    let mut loaded = EbpfLoader::new()
        .override_global(names::HZ, &hz, true)
        .override_global(names::EVENTS_PER_SECOND, &events_per_second, true)
        .override_global(names::DEBUG, &debug, true)
        .override_global(names::HOST_NETNS, &host_netns, true)
        .override_global(names::SETS_ERRNO, &sets_errno, true)
        .map_max_entries(names::FLOWS_V4, 1024)
        .map_max_entries(names::FLOWS_V6, 1024)
        .load(OBJECT)
        .map_err(|e| format!("object: {e:?}"))?;
    let mut sizes = Vec::new();
    for name in names::PROGRAMS {
        let program: &mut SchedClassifier =
            loaded.program_mut(name).ok_or("missing")?.try_into().map_err(|e| format!("{name}: {e}"))?;
        program.load().map_err(|e| format!("{name}: {e}\n{e:?}"))?;
        let info = program.info().map_err(|e| format!("{name}: {e}"))?;
        sizes.push((name, info.verified_instruction_count().unwrap_or(0), info.size_translated().unwrap_or(0) / 8));
    }
    for name in names::SOCKET_PROGRAMS.into_iter().chain(names::BIND_PROGRAMS) {
        let program: &mut CgroupSockAddr =
            loaded.program_mut(name).ok_or("missing")?.try_into().map_err(|e| format!("{name}: {e}"))?;
        program.load().map_err(|e| format!("{name}: {e}\n{e:?}"))?;
        let info = program.info().map_err(|e| format!("{name}: {e}"))?;
        sizes.push((name, info.verified_instruction_count().unwrap_or(0), info.size_translated().unwrap_or(0) / 8));
    }
    Ok(sizes)
}

/// A shape of the programs: values of the globals by which the verifier folds branches.
struct Shape {
    hz: u32,
    events_per_second: u32,
    debug: u32,
    host_netns: u64,
}

/// The shapes that together verify every branch.
///
/// Four globals decide branches: `EVENTS_PER_SECOND` (0 folds the reports of drops and of connections away, any other value keeps both or,
/// halved to 0, one of them), `DEBUG`, `HOST_NETNS` and `SETS_ERRNO` (0 or not; they occur in the socket programs only, which do not
/// report events, so they may change together with `DEBUG`). `HZ` is a number in arithmetic, not a condition: one value of each magnitude.
/// A branch is explored with the other globals at both extremes: hence the product of events and the rest, and nothing in between.
const SHAPES: [Shape; 4] = [
    Shape { hz: 250, events_per_second: u32::MAX, debug: 0, host_netns: 0 },
    Shape { hz: 1000, events_per_second: u32::MAX, debug: 1, host_netns: 1 },
    Shape { hz: 250, events_per_second: 0, debug: 0, host_netns: 0 },
    Shape { hz: 100, events_per_second: 0, debug: 1, host_netns: 1 },
];

/// Fewer instructions than the debug log has in any program.
const DEBUG_LOG: u32 = 2_000;

#[test]
fn every_program_loads_in_every_shape() {
    let _sandbox = sandbox_or_skip!();
    let sizes = SHAPES.map(|Shape { hz, events_per_second, debug, host_netns }| {
        match load(hz, events_per_second, debug, host_netns) {
            Ok(sizes) => {
                println!("hz {hz} events {events_per_second} debug {debug}: {sizes:?} (verified, instructions)");
                sizes
            }
            Err(reason) => panic!("hz {hz}, events {events_per_second}, debug {debug}: {}", tail(&reason)),
        }
    });
    // Without the debug log the kernel has removed its code; a program without a slow path is the same in both shapes.
    let [off, on, ..] = &sizes;
    for ((name, _, off), (_, _, on)) in off.iter().zip(on).take(names::PROGRAMS.len()) {
        if *name == names::TO_VPC {
            assert_eq!(off, on, "{name}");
        } else {
            assert!(off + DEBUG_LOG < *on, "{name}: {off} instructions without the debug log, {on} with it");
        }
    }
}

/// The end of the verifier's log, which has the error.
fn tail(text: &str) -> &str {
    text.char_indices().rev().nth(6000).map_or(text, |(at, _)| &text[at..])
}
