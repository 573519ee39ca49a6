//! What the C library is told about the process's memory. A daemon that has read a whole cluster's objects shall be as small afterwards as what
//! it keeps of them. Other C libraries decide for themselves.

/// Tables of so many bytes are mapped each on its own.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 1 << 20;

/// Has large tables mapped each on its own. By default the C library stops doing so once one was freed, and a table that grows then leaves its
/// former places, and the room it does not use yet, as resident memory. To be called before there are any.
pub(crate) fn map_large_tables() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no preconditions.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives back what is free. Reading a cluster's objects and planning from them leaves as much free memory behind as they take, which the C
/// library keeps for itself otherwise.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no preconditions, and nothing that is allocated moves.
    unsafe {
        libc::malloc_trim(0);
    }
}
