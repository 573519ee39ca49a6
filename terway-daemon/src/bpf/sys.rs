//! The few calls of bpf(2) that aya does not have: what links of cgroups need to be found again and updated in place.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// `BPF_OBJ_GET` and its siblings (include/uapi/linux/bpf.h, `enum bpf_cmd`).
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_UPDATE: libc::c_long = 29;

/// `BPF_LINK_TYPE_CGROUP`.
const LINK_TYPE_CGROUP: u32 = 3;

/// `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The same for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct ObjInfo {
    fd: u32,
    length: u32,
    info: u64,
}

/// The same for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// The beginning of `struct bpf_link_info`, with the branch of cgroups. A kernel that knows more writes no more than it is asked for.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    hole: u32,
    cgroup: u64,
    attach_type: u32,
    tail: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the pointer is to a live structure of the size given, in the shape that the command reads; pointers in it are to memory
    // that outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Opens what is pinned at `path`.
///
/// # Errors
/// The kernel's, `ENOENT` if there is nothing.
pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &mut ObjGet { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the call has just given this descriptor to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The cgroup that a link is attached to, by the number of its folder; none if it is no link of a cgroup or its cgroup is gone.
///
/// # Errors
/// The kernel's.
pub(super) fn cgroup_of(link: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let mut info = LinkInfo::default();
    let mut attributes = ObjInfo {
        fd: link.as_raw_fd().cast_unsigned(),
        length: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    // SAFETY: volatile, because the kernel has written it behind the compiler's back.
    let info = unsafe { (&raw const info).read_volatile() };
    Ok((info.kind == LINK_TYPE_CGROUP && info.cgroup != 0).then_some(info.cgroup))
}

/// Has a link run another program from now on, without a moment of neither or both.
///
/// # Errors
/// The kernel's, such as `ENOLINK` if what it was attached to is gone (kernel/bpf/cgroup.c, `cgroup_bpf_replace`).
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link, program) = (link.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned());
    bpf(LINK_UPDATE, &mut LinkUpdate { link, program, flags: 0, old: 0 }).map(drop)
}
