//! Typed map access by `bpf(2)` where aya has no method for it: batches, flags, and lookups that also delete.
//!
//! A batch is one system call for thousands of elements (Linux 5.6 for arrays and hash tables; `bpf_map_do_batch`, kernel/bpf/syscall.c).
//! A handle may be used by several threads at once: the kernel's maps lock for themselves.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use aya::Pod;
use aya::maps::{MapData, MapError};
use aya::sys::SyscallError;

use super::error::BpfError;

/// Commands of `bpf(2)` (`enum bpf_cmd`, include/uapi/linux/bpf.h).
const LOOKUP: i64 = 1;
const UPDATE: i64 = 2;
const DELETE: i64 = 3;
const LOOKUP_AND_DELETE: i64 = 21;
const LOOKUP_BATCH: i64 = 24;
const UPDATE_BATCH: i64 = 26;

/// The kernel's own number for "not supported" (`ENOTSUPP`, include/linux/errno.h), which it should not show but does.
const ENOTSUPP: i32 = 524;

/// Elements of one batch: less than a megabyte of the largest, and a system call's price in a thousand parts.
const CHUNK: usize = 4096;

/// Insert, but do not replace (`BPF_NOEXIST`).
pub(super) const NOEXIST: u64 = 1;

/// The part of `union bpf_attr` for one element.
#[repr(C)]
struct One {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` for batches.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// An array or hash map with keys `K` and values `V`.
#[derive(Debug)]
pub(super) struct Elements<K, V> {
    map: MapData,
    name: &'static str,
    capacity: u32,
    _types: PhantomData<fn(K) -> V>,
}

fn address<T>(of: &T) -> u64 {
    std::ptr::from_ref(of) as u64
}

fn call<T>(command: i64, attr: &mut T) -> io::Result<()> {
    // SAFETY: the kernel reads and writes no more than the given size of `attr`, and behind its pointers no more than what the map's
    // sizes say, which `over` has compared with those of the types.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

impl<K: Pod, V: Pod> Elements<K, V> {
    /// Opens a pinned map.
    pub(super) fn open(pins: &Path, name: &'static str) -> Result<Self, BpfError> {
        Self::at(&pins.join(name), name)
    }

    /// Opens a map that is pinned under another name than its own.
    pub(super) fn at(pin: &Path, name: &'static str) -> Result<Self, BpfError> {
        Self::over(MapData::from_pin(pin).map_err(BpfError::map(name))?, name)
    }

    /// Takes over an open map, whose descriptor keeps its number.
    pub(super) fn over(map: MapData, name: &'static str) -> Result<Self, BpfError> {
        let info = map.info().map_err(BpfError::map(name))?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        if (key, value) != (size_of::<K>(), size_of::<V>()) {
            let describe = |key: usize, value: usize| format!("{key}-byte keys and {value}-byte values");
            return Err(BpfError::Layout {
                path: name.into(),
                found: describe(key, value),
                wanted: describe(size_of::<K>(), size_of::<V>()),
            });
        }
        Ok(Self { capacity: info.max_entries(), map, name, _types: PhantomData })
    }

    /// The number of elements of an array, or the most that a hash map can have (`max_entries`).
    pub(super) const fn capacity(&self) -> u32 {
        self.capacity
    }

    fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd().cast_unsigned()
    }

    fn failed(&self, call: &'static str, io_error: io::Error) -> BpfError {
        BpfError::Map { name: self.name, source: MapError::SyscallError(SyscallError { call, io_error }) }
    }

    fn one(&self, command: i64, key: &K, value: u64, flags: u64) -> io::Result<()> {
        call(command, &mut One { map_fd: self.fd(), pad: 0, key: address(key), value, flags })
    }

    /// A copy of the value of a key; none if there is no such element.
    pub(super) fn get(&self, key: &K) -> Result<Option<V>, BpfError> {
        let mut value = MaybeUninit::<V>::uninit();
        match self.one(LOOKUP, key, value.as_mut_ptr() as u64, 0) {
            // SAFETY: the kernel has written the whole value, and any bytes are one (`Pod`).
            Ok(()) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(self.failed("bpf_map_lookup_elem", error)),
        }
    }

    /// Writes one element; `false` if `flags` forbid it because of what is there.
    pub(super) fn put(&self, key: &K, value: &V, flags: u64) -> Result<bool, BpfError> {
        match self.one(UPDATE, key, address(value), flags) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(self.failed("bpf_map_update_elem", error)),
        }
    }

    /// Deletes an element; `false` if there is none.
    pub(super) fn delete(&self, key: &K) -> Result<bool, BpfError> {
        match self.one(DELETE, key, 0, 0) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(self.failed("bpf_map_delete_elem", error)),
        }
    }

    /// Deletes an element, and returns what it was at that moment; none if there is none. Kernels before 5.14 do not support it.
    fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::uninit();
        match self.one(LOOKUP_AND_DELETE, key, value.as_mut_ptr() as u64, 0) {
            // SAFETY: the kernel has written the whole value, and any bytes are one (`Pod`).
            Ok(()) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes an element if `still` is true of its value; `false` if there is none, or it is not.
    ///
    /// An element that is not deleted is absent for the time of two system calls. Before Linux 5.14, which added lookup-and-delete for
    /// hash maps, `still` is not asked.
    pub(super) fn delete_if(&self, key: &K, still: impl FnOnce(&V) -> bool) -> Result<bool, BpfError> {
        match self.take(key) {
            Ok(None) => Ok(false),
            Ok(Some(value)) if still(&value) => Ok(true),
            // Unless there is a newer one already.
            Ok(Some(value)) => self.put(key, &value, NOEXIST).map(|_| false),
            Err(error) if unsupported(&error) => self.delete(key),
            Err(error) => Err(self.failed("bpf_map_lookup_and_delete_elem", error)),
        }
    }

    /// Reads all elements, as long as `each` wants more. One that comes or goes meanwhile may be missed, one that stays is not.
    pub(super) fn each(&self, mut each: impl FnMut(&K, &V) -> ControlFlow<()>) -> Result<(), BpfError> {
        let mut chunk = CHUNK.min(self.capacity as usize).max(1);
        let mut keys: Vec<K> = Vec::with_capacity(chunk);
        let mut values: Vec<V> = Vec::with_capacity(chunk);
        // A place in the map: a bucket's number for hash tables, a key for arrays; no key here is longer.
        let (mut from, mut to) = ([0_u64; 8], [0_u64; 8]);
        let mut first = true;
        loop {
            let mut attr = Batch {
                in_batch: if first { 0 } else { address(&from) },
                out_batch: to.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: chunk as u32,
                map_fd: self.fd(),
                elem_flags: 0,
                flags: 0,
            };
            let done = call(LOOKUP_BATCH, &mut attr);
            let last = match done {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // A bucket is longer than the room; nothing was read.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    chunk *= 2;
                    keys.reserve(chunk);
                    values.reserve(chunk);
                    continue;
                }
                Err(error) => return Err(self.failed("bpf_map_lookup_batch", error)),
            };
            let count = (attr.count as usize).min(chunk);
            // SAFETY: the kernel has written so many of both, there is room for `chunk` of them, and any bytes are one (`Pod`).
            unsafe {
                keys.set_len(count);
                values.set_len(count);
            }
            for (key, value) in keys.iter().zip(&values) {
                if each(key, value).is_break() {
                    return Ok(());
                }
            }
            if last {
                return Ok(());
            }
            keys.clear();
            values.clear();
            (from, first) = (to, false);
        }
    }

    /// Writes many elements, in their order; what is there is replaced.
    pub(super) fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), BpfError> {
        for (keys, values) in keys.chunks(CHUNK).zip(values.chunks(CHUNK)) {
            let mut attr = Batch {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_ptr() as u64,
                values: values.as_ptr() as u64,
                count: keys.len() as u32,
                map_fd: self.fd(),
                elem_flags: 0,
                flags: 0,
            };
            match call(UPDATE_BATCH, &mut attr) {
                Ok(()) => {}
                Err(error) if unsupported(&error) => {
                    for (key, value) in keys.iter().zip(values) {
                        self.put(key, value, 0)?;
                    }
                }
                Err(error) => return Err(self.failed("bpf_map_update_batch", error)),
            }
        }
        Ok(())
    }

    /// Writes many elements as [`Self::put_all`] does, and goes on behind those that are refused; their indices and errors.
    pub(super) fn put_each(&self, keys: &[K], values: &[V]) -> Vec<(usize, BpfError)> {
        if self.put_all(keys, values).is_ok() {
            return Vec::new();
        }
        // The kernel does not say on every version where a batch ended, and writing an element twice changes nothing.
        let elements = keys.iter().zip(values).enumerate();
        elements.filter_map(|(index, (key, value))| Some((index, self.put(key, value, 0).err()?))).collect()
    }
}
