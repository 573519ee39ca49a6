//! Packet access at a traffic-control hook: the context and the directly accessible bytes.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_csum_update, bpf_skb_pull_data};

use crate::frame::{Frame, Plain};

/// `PACKET_HOST` (include/uapi/linux/if_packet.h): the frame was addressed to the interface.
const PACKET_HOST: u32 = 0;

/// Bound of dynamic offsets: headers end well before, and the verifier needs a bound (`MAX_PACKET_OFF`).
const REACH: usize = 512;

/// Number of bytes that are made directly accessible for a full parse.
const HEADERS: u32 = 192;

/// The bytes of a packet that may be read and written directly.
///
/// A window is invalid after any helper that may move the packet.
#[derive(Clone, Copy)]
pub struct Window {
    data: usize,
    end: usize,
    /// A number that the verifier cannot know; see [`Frame::hide_from_verifier`].
    noise: usize,
}

impl Frame for Window {
    #[inline(always)]
    fn read<T: Plain>(&self, at: usize) -> Option<T> {
        if self.data + at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: the bytes lie between `data` and `end`, as the verifier checks. Alignment: an IP header stands at an address that
        // is 2 modulo 4 where the machine needs alignment (`NET_IP_ALIGN`), which makes the words of this crate's types aligned;
        // x86-64 does not need it, and the BPF target has no wider accesses than the ones written.
        Some(unsafe { load((self.data + at) as *const T) })
    }

    #[inline(always)]
    fn read_dynamic<T: Plain>(&self, at: usize) -> Option<T> {
        // The verifier derives bounds for the compared register only: the compared value must be the one that is used, in the same 64
        // bits, so LLVM must not rewrite either. The comparison must have the form "start plus size beyond end", which LLVM would change
        // for a single byte.
        let at = opaque(at);
        if at > REACH {
            return None;
        }
        let start = opaque(self.data + at);
        if opaque(start + size_of::<T>()) > self.end {
            return None;
        }
        // SAFETY: as above.
        Some(unsafe { load(start as *const T) })
    }

    #[inline(always)]
    fn hide_from_verifier(&self, mut number: usize) -> usize {
        // SAFETY: two operations on one register that cancel each other.
        unsafe {
            core::arch::asm!(
                "{number} ^= {noise}",
                "{number} ^= {noise}",
                number = inout(reg) number,
                noise = in(reg) self.noise,
                options(nostack, preserves_flags, nomem, pure),
            );
        }
        number
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, at: usize, value: T) -> Option<()> {
        if self.data + at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: as for reading; traffic-control programs may write their packet (the kernel unshares it in the prologue).
        unsafe { store((self.data + at) as *mut T, value) };
        Some(())
    }
}

/// Reads a value in whole words where its alignment allows it.
///
/// A struct copy may become a call of `memcpy` or `memmove`, which copy byte by byte on this target.
///
/// # Safety
/// As for `*from`.
#[inline(always)]
unsafe fn load<T: Plain>(from: *const T) -> T {
    if align_of::<T>() != align_of::<u32>() {
        // SAFETY: the caller's.
        return unsafe { *from };
    }
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    for word in 0..size_of::<T>() / size_of::<u32>() {
        // SAFETY: a type of this alignment consists of words.
        unsafe { *value.as_mut_ptr().cast::<u32>().add(word) = core::ptr::read_volatile(from.cast::<u32>().add(word)) };
    }
    // SAFETY: every word was written, and every bit pattern is a value.
    unsafe { value.assume_init() }
}

/// Writes a value in whole words; see [`load`].
///
/// # Safety
/// As for `*to = value`.
#[inline(always)]
unsafe fn store<T: Plain>(to: *mut T, value: T) {
    if align_of::<T>() != align_of::<u32>() {
        // SAFETY: the caller's.
        unsafe { *to = value };
        return;
    }
    let from: *const u32 = (&raw const value).cast();
    for word in 0..size_of::<T>() / size_of::<u32>() {
        // SAFETY: a type of this alignment consists of words.
        unsafe { core::ptr::write_volatile(to.cast::<u32>().add(word), *from.add(word)) };
    }
}

/// The same value, opaque to the compiler.
#[inline(always)]
fn opaque(mut value: usize) -> usize {
    // An empty template would leave two entries for one instruction in the line table, which the kernel refuses.
    // SAFETY: a move of a register to itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(nostack, preserves_flags, nomem, pure)) };
    value
}

/// The context of a traffic-control program.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

/// Reads a field of the context.
///
/// The instruction is spelled out because the verifier takes field accesses only as "context plus constant", and LLVM, given a
/// field that is used twice, likes to keep its address ("dereference of modified ctx ptr").
macro_rules! field {
    ($ctx:expr, $name:ident) => {{
        let value: u64;
        // SAFETY: the kernel passes a valid context, and the field is readable for traffic-control programs.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({ctx} + {offset})",
                value = lateout(reg) value,
                ctx = in(reg) $ctx,
                offset = const core::mem::offset_of!(__sk_buff, $name),
                options(nostack, preserves_flags, readonly, pure),
            );
        }
        value
    }};
}

impl Skb {
    /// The directly accessible bytes.
    #[inline(always)]
    #[must_use]
    pub fn window(self) -> Window {
        // Not through `field!`: the verifier gives these two their meaning as packet pointers, and a pull changes them.
        // SAFETY: the kernel passes a valid context; these fields are readable.
        unsafe {
            Window { data: (*self.0).data as usize, end: (*self.0).data_end as usize, noise: self.len() as usize }
        }
    }

    /// Makes all headers directly accessible. Packets of some drivers have them in page fragments.
    #[inline(always)]
    #[must_use]
    pub fn pull(self) -> Window {
        let wanted = self.len().min(HEADERS);
        let window = self.window();
        if window.end - window.data >= wanted as usize {
            return window;
        }
        // SAFETY: valid context; the windows taken so far are not used any more.
        unsafe { bpf_skb_pull_data(self.0, wanted) };
        self.window()
    }

    /// Bytes of the packet, Ethernet header included.
    #[inline(always)]
    #[must_use]
    pub fn len(self) -> u32 {
        field!(self.0, len) as u32
    }

    /// The interface of the hook.
    #[inline(always)]
    #[must_use]
    pub fn ifindex(self) -> u32 {
        field!(self.0, ifindex) as u32
    }

    /// Whether the frame carries a VLAN tag, which the kernel has moved out of the frame's bytes.
    #[inline(always)]
    #[must_use]
    pub fn has_vlan(self) -> bool {
        field!(self.0, vlan_present) != 0
    }

    /// Whether the frame was addressed to the interface that received it.
    #[inline(always)]
    #[must_use]
    pub fn is_to_us(self) -> bool {
        field!(self.0, pkt_type) as u32 == PACKET_HOST
    }

    /// The packet mark.
    #[inline(always)]
    #[must_use]
    pub fn mark(self) -> u32 {
        field!(self.0, mark) as u32
    }

    /// Sets the packet mark.
    #[inline(always)]
    pub fn set_mark(self, mark: u32) {
        // SAFETY: writable field of a valid context.
        unsafe { (*self.0).mark = mark }
    }

    /// Updates the NIC's checksum over the packet (`CHECKSUM_COMPLETE`) after the hop limit was decremented.
    ///
    /// It covers everything after the Ethernet header, and IPv6 has no header checksum that would cancel the change. For other packets the
    /// helper does nothing.
    #[inline(always)]
    pub fn update_csum_for_hop_limit(self) {
        let change = u32::from(0x0001_u16.to_be());
        // SAFETY: valid context; adding the complement subtracts.
        unsafe { bpf_csum_update(self.0, !change) };
    }
}
