//! The program as a const parameter: each program is compiled for its own hook.

use terway_abi::{HOOK_INGRESS, HOOK_TO_POD, HOOK_TO_VPC, PathCounter, Program};

/// [`Program::FromPod`] as a const parameter.
pub const FROM_POD: u8 = Program::FromPod as u8;
/// [`Program::ToPod`] as a const parameter.
pub const TO_POD: u8 = Program::ToPod as u8;
/// [`Program::FromVpc`] as a const parameter.
pub const FROM_VPC: u8 = Program::FromVpc as u8;
/// [`Program::ToVpc`] as a const parameter.
pub const TO_VPC: u8 = Program::ToVpc as u8;

/// The hook of a program as flow entries store it.
#[inline(always)]
pub(super) const fn hook<const PROGRAM: u8>() -> u8 {
    match PROGRAM {
        TO_POD => HOOK_TO_POD,
        TO_VPC => HOOK_TO_VPC,
        _ => HOOK_INGRESS,
    }
}

/// The path counters of a program, by forwarding action.
pub(super) struct PathCounters {
    /// Packets to the host stack, or on to the next program.
    pub(super) stack: PathCounter,
    /// Packets to a local pod.
    pub(super) local: PathCounter,
    /// Packets to the VPC.
    pub(super) vpc: PathCounter,
}

pub(super) const fn path_counters<const PROGRAM: u8>() -> PathCounters {
    use PathCounter::{HostToPod, HostToVpc, PodToHost, PodToPod, PodToVpc, VpcToHost, VpcToPod, VpcToVpc};
    match PROGRAM {
        FROM_POD => PathCounters { stack: PodToHost, local: PodToPod, vpc: PodToVpc },
        TO_POD => PathCounters { stack: HostToPod, local: HostToPod, vpc: HostToPod },
        TO_VPC => PathCounters { stack: HostToVpc, local: HostToVpc, vpc: HostToVpc },
        _ => PathCounters { stack: VpcToHost, local: VpcToPod, vpc: VpcToVpc },
    }
}
