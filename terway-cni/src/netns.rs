//! Whether a path names a pod's network namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use terway_core::errors::{CNI_NETNS, Error};

/// The plugin's own network namespace.
const OWN: &str = "/proc/self/ns/net";

/// Asks a namespace's file what kind of namespace it is: `_IO(0xb7, 0x3)`, include/uapi/linux/nsfs.h, Linux 4.11.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Checks that `path` is a network namespace and not the node's own, where an ADD would take the node off its network.
///
/// # Errors
/// `TW0005` (CNI code 8).
pub(crate) fn check(path: &str) -> Result<(), Error> {
    let bad = |reason: &str| Error::new(CNI_NETNS, format!("{path} {reason}."));
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| bad(&format!("cannot be opened: {error}")))?;
    let found = file.metadata().map_err(|error| bad(&format!("cannot be read: {error}")))?;
    let own = std::fs::metadata(OWN).map_err(|error| bad(&format!("cannot be compared with {OWN}: {error}")))?;
    // All namespaces lie on one file system (fs/nsfs.c); an ioctl on anything else could mean something else.
    if found.dev() != own.dev()
        || kind(&file).map_err(|error| bad(&format!("does not say its kind: {error}")))? != libc::CLONE_NEWNET
    {
        return Err(bad("is not a network namespace"));
    }
    if found.ino() == own.ino() {
        return Err(bad("is the node's own network namespace"));
    }
    Ok(())
}

fn kind(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open for the whole call, and NS_GET_NSTYPE takes no argument.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(path: &str) -> String {
        let error = check(path).unwrap_err();
        assert_eq!(error.code.cni, 8);
        error.detail
    }

    #[test]
    fn everything_but_another_network_namespace_is_refused() {
        assert!(reason("/nonexistent/ns").contains("cannot be opened"));
        assert!(reason("/dev/null").contains("is not a network namespace"));
        assert!(reason("/proc/self/ns/mnt").contains("is not a network namespace"));
        assert!(reason("/proc/self/ns").contains("is not a network namespace"));
        assert!(reason(OWN).contains("own"));
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo").to_str().unwrap().to_owned();
        let name = std::ffi::CString::new(fifo.as_str()).unwrap();
        // SAFETY: `name` is a terminated string that lives through the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        assert!(reason(&fifo).contains("is not a network namespace"));
    }
}
