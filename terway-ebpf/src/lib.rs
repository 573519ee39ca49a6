//! The datapath library: packet parser, flow keys, routes, policies, Services and NAT. It runs under the host's `cargo test`. The kernel half
//! (`kernel`) exists in the BPF build only, and `bin/terway.rs` holds the programs.
//!
//! Packet path: [`parse`] → flow table lookup → (without a usable entry: [`service`] → [`route`] → [`policy`] → new [`flow`] entry) → verdict.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// Indexing can panic, and the verifier rejects a program with a panic path.
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

pub mod csum;
pub mod family;
pub mod flow;
pub mod frame;
pub mod icmp;
pub mod nat;
pub mod neighbour;
pub mod parse;
pub mod policy;
pub mod reject;
pub mod route;
pub mod service;

#[cfg(target_arch = "bpf")]
pub mod kernel;
