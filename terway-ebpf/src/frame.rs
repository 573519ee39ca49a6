//! Access to the bytes of a frame, the same in the kernel and in tests.

use terway_abi::MacPair;

/// Types that may be read from and written to a packet as they are.
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

/// Fills a value with zeros, word by word: LLVM would call `memset`, which on the BPF target is a loop over bytes.
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
    /// The `T` that stands `at` bytes from the start, which must be a constant; `None` if the frame ends before.
    fn read<T: Plain>(&self, at: usize) -> Option<T>;

    /// As [`Frame::read`], for an offset that depends on the packet.
    fn read_far<T: Plain>(&self, at: usize) -> Option<T>;

    /// The same number, of which the verifier forgets what it knew.
    ///
    /// It follows every way through the options and extension headers, and follows what comes behind them once for each different
    /// thing that it knows then. A number that it knows nothing of is the same on all ways.
    #[inline(always)]
    fn blur(&self, number: usize) -> usize {
        number
    }

    /// Overwrites what stands `at` bytes from the start, which must be a constant; `None` if the frame ends before, and then nothing is written.
    fn write<T: Plain>(&mut self, at: usize, value: T) -> Option<()>;

    /// The two addresses of the Ethernet header.
    #[inline(always)]
    fn macs(&self) -> Option<MacPair> {
        self.read(0)
    }

    /// The Ethernet type as it stands in the frame.
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

    fn read_far<T: Plain>(&self, at: usize) -> Option<T> {
        self.read(at)
    }

    fn write<T: Plain>(&mut self, at: usize, value: T) -> Option<()> {
        let bytes = self.as_mut().get_mut(at..at.checked_add(size_of::<T>())?)?;
        // SAFETY: the slice has the size of `T`, which has no padding; the write does not ask for alignment.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        Some(())
    }
}
