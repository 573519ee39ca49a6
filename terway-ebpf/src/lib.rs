//! The datapath as a library: how packets are parsed, what is decided about them, and what a flow remembers. Everything here runs
//! under the host's `cargo test`; what touches the kernel (`kernel`) exists only in the BPF build, and `bin/terway.rs` holds the
//! programs, which are shells around this.
//!
//! The way of a packet: [`parse`] → flow table → (first packet only: [`route`] → [`flow`] entries of both directions) → verdict.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
// An index is a panic, and a panic is a program that the verifier refuses.
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
