//! Test harness of the prog suites: program actions, a run that compares every counter, and Services on a [`Stage`].

#![allow(clippy::unwrap_used, reason = "what suites share panics where it fails, as they do")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use terway_abi::{Backend, BackendRange, BackendRef, Frontend, Program, backend_flags};
use terway_core::ident::Family;
use terway_core::objects::Protocol;
use terway_core::service::FrontendKey;
use terway_daemon::bpf::{Counters, Ran, RunContext};

use crate::packet::{Frame, checksums_are_right};
use crate::prog_bench::Stage;

/// `TC_ACT_UNSPEC`: on to the next program or the stack (include/uapi/linux/pkt_cls.h).
pub const NEXT: i32 = -1;
/// `TC_ACT_SHOT`: dropped.
pub const SHOT: i32 = 2;
/// `TC_ACT_REDIRECT`: sent by another interface.
pub const REDIRECT: i32 = 7;

/// An address.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn words(address: IpAddr) -> [u32; 4] {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes.copy_from_slice(&v6.octets()),
    }
    std::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
}

/// A backend of generation 1.
///
/// # Panics
/// When `address` is none.
#[must_use]
pub fn backend(address: &str, port: u16, protocol: u8) -> Backend {
    let address = ip(address);
    Backend {
        address: words(address),
        port: port.to_be(),
        protocol,
        flags: if address.is_ipv6() { backend_flags::V6 } else { 0 },
        generation: 1,
        spare: [0; 2],
    }
}

fn protocol(number: u8) -> Protocol {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| protocol.number() == number).unwrap()
}

/// The key of a frontend: one port of an address.
///
/// # Panics
/// When `number` is not the number of a protocol that Services have.
#[must_use]
pub fn frontend_key(address: IpAddr, port: u16, number: u8) -> FrontendKey {
    FrontendKey::new(address, port, protocol(number))
}

/// The key of a frontend: a port of all addresses of the node.
///
/// # Panics
/// When `number` is not the number of a protocol that Services have.
#[must_use]
pub fn node_port_key(v6: bool, port: u16, number: u8) -> FrontendKey {
    FrontendKey::node(if v6 { Family::V6 } else { Family::V4 }, port, protocol(number))
}

/// The key of a frontend: one port of an address.
///
/// # Panics
/// When `address` is none.
#[must_use]
pub fn at(address: &str, port: u16, protocol: u8) -> FrontendKey {
    frontend_key(ip(address), port, protocol)
}

/// Writes a Service of number `service` with these backends, at indices from 10 times `service` on.
///
/// # Panics
/// When the kernel refuses.
pub fn serve(stage: &Stage, service: u32, place: &FrontendKey, backends: &[Backend], template: Frontend) {
    let first = 10 * service;
    for (number, backend) in (first..).zip(backends) {
        stage.datapath.services().set_backend(number, backend).unwrap();
        stage
            .datapath
            .services()
            .set_members(number, &[BackendRef { backend: number, generation: backend.generation }])
            .unwrap();
    }
    let run = BackendRange { first, count: backends.len() as u32 };
    stage
        .datapath
        .services()
        .set_frontend(place, &Frontend { service, internal: run, external: run, ..template })
        .unwrap();
}

fn nonzero(counters: &Counters) -> BTreeMap<&'static str, u64> {
    counters.iter().map(|(name, counter)| (name, counter.packets)).filter(|(_, packets)| *packets > 0).collect()
}

/// Runs a program once on an interface and compares every counter.
///
/// # Panics
/// When one differs, or the kernel refuses.
#[track_caller]
pub fn run(stage: &Stage, program: Program, ifindex: u32, packet: &[u8], expected: &[(&str, u64)]) -> Ran {
    run_in(stage, program, RunContext::on(ifindex), packet, expected)
}

/// As [`run`], with a whole context instead of an interface.
///
/// # Panics
/// When a counter differs, or the kernel refuses.
#[track_caller]
pub fn run_in(stage: &Stage, program: Program, context: RunContext, packet: &[u8], expected: &[(&str, u64)]) -> Ran {
    let before = stage.datapath.counters().read().unwrap();
    let ran = stage.datapath.programs().run(program, packet, context).unwrap();
    let after = stage.datapath.counters().read().unwrap();
    let (before, mut change) = (nonzero(&before), nonzero(&after));
    change.iter_mut().for_each(|(name, packets)| *packets -= before.get(name).unwrap_or(&0));
    change.retain(|_, packets| *packets > 0);
    assert_eq!(change, expected.iter().copied().collect(), "counters");
    ran
}

/// The packet came out as this frame, with checksums that are right.
///
/// # Panics
/// When it did not.
#[track_caller]
pub fn came_out(ran: &Ran, action: i32, expected: &Frame) {
    assert_eq!(ran.action, action);
    assert!(checksums_are_right(&ran.packet), "{:02x?}", ran.packet);
    assert_eq!(ran.packet, expected.build());
}
