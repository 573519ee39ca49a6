//! What touches the kernel: the packet, the maps, the way through the tables, and the exit.

pub mod exit;
pub mod slow_path;
pub mod icmp_nat;
pub mod policy_check;
pub mod maps;
pub mod nat;
pub mod fast_path;
pub mod reject;
pub mod service_nat;
pub mod skb;
pub mod socket;
pub mod flow_events;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable in a program that the verifier takes; the linker wants a symbol.
    loop {}
}
