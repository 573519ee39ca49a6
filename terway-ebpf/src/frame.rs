//! Access to the bytes of a frame, in the kernel and in tests.

use terway_abi::MacPair;

/// Plain data that may be read from and written to a packet.
///
/// # Safety
/// Every bit pattern must be a value of the type, and it must have no padding.
pub unsafe trait Plain: Copy {}

// SAFETY: integers have no invalid bit patterns and no padding.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: three integers of the same size.
unsafe impl Plain for MacPair {}

/// Zeroes a value word by word: `memset` is a loop over bytes on the BPF target.
///
/// # Safety
/// All zeros must be a value of `T`.
#[inline(always)]
pub unsafe fn zero<T>(place: &mut T) {
    const { assert!(align_of::<T>() == 8 && size_of::<T>().is_multiple_of(8)) };
    for word in 0..size_of::<T>() / 8 {
        // SAFETY: within the value, and aligned as asserted.
        unsafe { core::ptr::write_volatile(core::ptr::from_mut(place).cast::<u64>().add(word), 0) };
    }
}

/// Length of an Ethernet header without tags.
pub const ETH_LEN: usize = 14;

/// A frame, beginning with its Ethernet header.
pub trait Frame {
    /// Reads a `T` at a constant offset; `None` beyond the end of the frame.
    fn read<T: Plain>(&self, at: usize) -> Option<T>;

    /// Reads a `T` at an offset that depends on the packet.
    fn read_dynamic<T: Plain>(&self, at: usize) -> Option<T>;

    /// The same number, with unknown bounds for the verifier.
    ///
    /// The verifier explores each path through options and extension headers, and the code behind them once per distinct state. A number
    /// with unknown bounds makes these states equal, so that they are pruned.
    #[inline(always)]
    fn hide_from_verifier(&self, number: usize) -> usize {
        number
    }

    /// Writes a value at a constant offset; `None`, and nothing is written, beyond the end of the frame.
    fn write<T: Plain>(&mut self, at: usize, value: T) -> Option<()>;

    /// The MAC addresses of the Ethernet header.
    #[inline(always)]
    fn macs(&self) -> Option<MacPair> {
        self.read(0)
    }

    /// The Ethernet type in network byte order.
    #[inline(always)]
    fn ethertype(&self) -> Option<u16> {
        self.read(12)
    }
}

/// A frame in ordinary memory.
#[cfg(not(target_arch = "bpf"))]
impl<B: AsRef<[u8]> + AsMut<[u8]>> Frame for B {
    fn read<T: Plain>(&self, at: usize) -> Option<T> {
        let bytes = self.as_ref().get(at..at.checked_add(size_of::<T>())?)?;
        // SAFETY: the slice has the size of `T`, every bit pattern of which is a value; the read does not ask for alignment.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn read_dynamic<T: Plain>(&self, at: usize) -> Option<T> {
        self.read(at)
    }

    fn write<T: Plain>(&mut self, at: usize, value: T) -> Option<()> {
        let bytes = self.as_mut().get_mut(at..at.checked_add(size_of::<T>())?)?;
        // SAFETY: the slice has the size of `T`, which has no padding; the write does not ask for alignment.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        Some(())
    }
}
