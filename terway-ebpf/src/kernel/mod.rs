//! The kernel half: packet access, maps, and the packet path. Built for the BPF target only.
//!
//! The modules form a chain: each imports only from those above it.
//!
//! | module | content |
//! |---|---|
//! | [`skb`] | packet context and directly accessible bytes |
//! | [`hook`] | the program as a const parameter: its hook and its path counters |
//! | [`scratch`] | per-CPU scratch memory of the slow path |
//! | [`maps`] | maps, globals, and the lookups of the host-testable library on them |
//! | [`counters`] | per-CPU counters and the clock |
//! | [`verdict`] | the verdict of a packet, and the outcome of a slow-path stage |
//! | [`flow_events`], [`debug_log`] | drop events and sampled connections; the debug log |
//! | [`exit`] | the common exit of all programs |
//! | [`icmp_nat`] → [`nat`] | NAT of ICMP errors and of packets |
//! | [`flow_table`] | lookup and validity of flow entries |
//! | [`forward`] | forwarding a packet by its flow entry |
//! | [`policy_check`] | policy check of new and of stale flows |
//! | [`service_nat`] | backend selection, NAT entries |
//! | [`reject`] | TCP reset and ICMP error for Services without backends |
//! | [`fragments`], [`neighbour`] | ports of later fragments; ARP and neighbour discovery |
//! | [`slow_path`] | the stages of a packet without a usable flow entry |
//! | [`fast_path`] | the entry point: one lookup for an established packet |
//!
//! [`socket`] stands beside the chain: it uses [`maps`] and [`counters`] only.

pub mod counters;
pub mod debug_log;
pub mod exit;
pub mod fast_path;
pub mod flow_events;
pub mod flow_table;
pub mod forward;
pub mod fragments;
pub mod hook;
pub mod icmp_nat;
pub mod maps;
pub mod nat;
pub mod neighbour;
pub mod policy_check;
pub mod reject;
pub mod scratch;
pub mod service_nat;
pub mod skb;
pub mod slow_path;
pub mod socket;
pub mod verdict;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The linker needs the symbol; the verifier rejects programs that can reach it.
    loop {}
}
