//! What touches the kernel: the packet, the maps, the way through the tables, and the exit.

pub mod exit;
pub mod first;
pub mod icmp;
pub mod judge;
pub mod maps;
pub mod nat;
pub mod path;
pub mod refuse;
pub mod serve;
pub mod skb;
pub mod socket;
pub mod tell;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable in a program that the verifier takes; the linker wants a symbol.
    loop {}
}
