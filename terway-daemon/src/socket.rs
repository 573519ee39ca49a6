//! The instance lock of the state folder, and the gRPC socket, which only root may use.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tracing::warn;

/// Exclusive lock of the state folder; the kernel releases it when the process ends.
#[derive(Debug)]
pub struct InstanceLock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

impl InstanceLock {
    /// Takes the lock of `state_dir`, making the folder if needed.
    ///
    /// # Errors
    /// `WouldBlock` when another daemon holds it; otherwise what the file system says.
    pub fn take(state_dir: &Path) -> io::Result<Self> {
        make_private_dir(state_dir)?;
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .open(state_dir.join("terwayd.lock"))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map(Self).map_err(|(_, errno)| errno.into())
    }
}

/// Makes a folder that only its owner can enter; an existing one is left as it is.
///
/// # Errors
/// What the file system says.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Binds the service's socket with mode 0600. A leftover of an earlier daemon is replaced: the instance lock says nobody serves it.
///
/// # Errors
/// What the file system says.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        make_private_dir(parent)?;
    }
    // Bound under another name and renamed, so that nobody meets the socket before its mode is right, and a client that
    // retries never finds the path missing.
    let fresh = path.with_extension("new");
    remove_if_there(&fresh)?;
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Connections whose peer is root or the daemon's own user. The socket's mode says the same; this holds even where a
/// bind mount or a careless chmod opened the path.
pub fn trusted(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> {
    let own = nix::unistd::geteuid().as_raw();
    UnixListenerStream::new(listener).filter_map(move |connection| match connection {
        Ok(stream) => match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own => Some(Ok(stream)),
            Ok(peer) => {
                warn!(uid = peer.uid(), pid = peer.pid(), "refused a connection: only root may use the socket");
                None
            }
            Err(error) => {
                warn!(%error, "refused a connection whose peer is unknown");
                None
            }
        },
        // Out of file descriptors or an aborted connection: the next accept may work, so the service must not end.
        Err(error) => {
            warn!(%error, "accept failed");
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_instance_is_refused_and_the_lock_ends_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let first = InstanceLock::take(dir.path()).unwrap();
        assert_eq!(InstanceLock::take(dir.path()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(first);
        InstanceLock::take(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn the_socket_is_private_and_replaces_a_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/terway.socket");
        drop(bind(&path).unwrap());
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        let client = UnixStream::connect(&path).await.unwrap();
        let mut trusted = std::pin::pin!(trusted(listener));
        trusted.next().await.unwrap().unwrap();
        drop(client);
    }
}
