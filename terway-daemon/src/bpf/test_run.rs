//! Test runs: a program is run on a packet that goes nowhere (`BPF_PROG_TEST_RUN`).

use std::time::Duration;

use aya::TestRunOptions;
use aya::programs::TestRun as _;
use terway_abi::Program;

use super::error::BpfError;
use super::object::LoadedPrograms;

/// The context of a test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunContext {
    /// The interface that the packet is on; it must exist in the calling thread's network namespace.
    pub ifindex: u32,
    /// The packet's mark.
    pub mark: u32,
    /// The number of runs; the packet is not reset in between.
    pub repeat: u32,
}

impl RunContext {
    /// One run on an interface, without a mark.
    #[must_use]
    pub const fn on(ifindex: u32) -> Self {
        Self { ifindex, mark: 0, repeat: 1 }
    }
}

/// The result of a test run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// The program's answer (`TC_ACT_*`).
    pub action: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Its mark afterwards.
    pub mark: u32,
    /// Time of one run, on average.
    pub duration: Duration,
}

/// `struct __sk_buff` (include/uapi/linux/bpf.h) as far as a test run may set it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Context {
    len: u32,
    pkt_type: u32,
    mark: u32,
    queue_mapping: u32,
    protocol: u32,
    vlan: [u32; 3],
    priority: u32,
    ingress_ifindex: u32,
    ifindex: u32,
    rest: [u32; 37],
}

const _: () = assert!(size_of::<Context>() == 192);

pub(super) fn run(
    programs: &LoadedPrograms,
    program: Program,
    packet: &[u8],
    context: RunContext,
) -> Result<Ran, BpfError> {
    let before = Context {
        len: 0,
        pkt_type: 0,
        mark: context.mark,
        queue_mapping: 0,
        protocol: 0,
        vlan: [0; 3],
        priority: 0,
        ingress_ifindex: 0,
        ifindex: context.ifindex,
        rest: [0; 37],
    };
    let mut out = vec![0; packet.len() + 256];
    let (ctx_in, mut ctx_out) = (bytes(&before).to_vec(), vec![0; size_of::<Context>()]);
    let ran = programs
        .get(program)?
        .test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&ctx_in),
            ctx_out: Some(&mut ctx_out),
            repeat: context.repeat,
            ..TestRunOptions::default()
        })
        .map_err(BpfError::program(program.name()))?;
    out.truncate(ran.data_size_out as usize);
    let mark = ctx_out.get(8..12).map_or(0, |mark| u32::from_ne_bytes([mark[0], mark[1], mark[2], mark[3]]));
    Ok(Ran { action: ran.return_value.cast_signed(), packet: out, mark, duration: ran.duration })
}

fn bytes(context: &Context) -> &[u8] {
    // SAFETY: the struct is made of integers without padding, so all of its bytes are initialised; the slice lives as long as it.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(context).cast(), size_of::<Context>()) }
}
