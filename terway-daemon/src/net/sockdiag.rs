//! Asking the kernel for its sockets and ending some of them: `NETLINK_SOCK_DIAG`, in the calling thread's network namespace.
//!
//! Layouts: include/uapi/linux/inet_diag.h; the destroying: net/ipv4/udp_diag.c, net/ipv4/tcp_diag.c, net/core/sock_diag.c.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;

use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Message types.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// Length of `struct nlmsghdr`, `struct inet_diag_sockid` and `struct inet_diag_req_v2`.
const HEADER: usize = 16;
const ID: usize = 48;
const REQUEST: usize = 8 + ID;

/// States of a socket that has a peer: `TCP_ESTABLISHED`, which a connected UDP socket is in as well, `TCP_SYN_SENT`, `TCP_FIN_WAIT1`,
/// `TCP_FIN_WAIT2` and `TCP_CLOSE_WAIT` (include/net/tcp_states.h).
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;

/// Room for one part of a dump.
const ANSWER_BYTES: usize = 32 * 1024;

/// A socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketInfo {
    /// Its cookie, the same that programs see.
    pub cookie: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// Its peer; of an IPv6 socket that talks to an IPv4 address, that address.
    pub peer: SocketAddr,
    family: u8,
    id: [u8; ID],
}

/// What became of the wish to end a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyOutcome {
    /// Its owner gets `ECONNABORTED`.
    Destroyed,
    /// It ended by itself, or has another peer by now.
    NotFound,
    /// The kernel cannot (`CONFIG_INET_DIAG_DESTROY`).
    NotSupported,
}

/// A socket to ask by.
pub struct SockDiag {
    socket: Socket,
    sequence: u32,
    incoming: Vec<u8>,
}

impl SockDiag {
    /// Opens one in the calling thread's network namespace, of which it speaks from then on.
    ///
    /// # Errors
    /// The kernel's, such as `EPROTONOSUPPORT` without `CONFIG_INET_DIAG`.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind(&NetlinkAddr::new(0, 0))?;
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(Self { socket, sequence: 0, incoming: Vec::with_capacity(ANSWER_BYTES) })
    }

    /// All sockets of a protocol that have a peer.
    ///
    /// # Errors
    /// The kernel's, `ENOENT` if it has no listing of this protocol (`CONFIG_INET_UDP_DIAG`).
    pub fn connected(&mut self, protocol: u8) -> io::Result<Vec<SocketInfo>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
            self.send(SOCK_DIAG_BY_FAMILY, flags, request(family, protocol, CONNECTED, &[0; ID]))?;
            self.answers(|body| found.extend(socket_info(body, protocol)))?;
        }
        Ok(found)
    }

    /// Ends a socket, if it is still the one that was seen.
    ///
    /// # Errors
    /// What the kernel says beyond what [`DestroyOutcome`] names.
    pub fn destroy(&mut self, socket: &SocketInfo) -> io::Result<DestroyOutcome> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.send(SOCK_DESTROY, flags, request(socket.family, socket.protocol, u32::MAX, &socket.id))?;
        match self.answers(|_| {}) {
            Ok(()) => Ok(DestroyOutcome::Destroyed),
            Err(error) => match error.raw_os_error() {
                // ESTALE: another socket has its ports by now (`sock_diag_check_cookie`).
                Some(libc::ENOENT | libc::ESTALE) => Ok(DestroyOutcome::NotFound),
                Some(libc::EOPNOTSUPP) => Ok(DestroyOutcome::NotSupported),
                _ => Err(error),
            },
        }
    }

    fn send(&mut self, kind: u16, flags: u16, body: [u8; REQUEST]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = [0; HEADER + REQUEST];
        let (header, rest) = message.split_at_mut(HEADER);
        header[0..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&flags.to_ne_bytes());
        header[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        rest.copy_from_slice(&body);
        self.socket.send(&message, 0).map(drop)
    }

    /// Reads the answers to the last request, up to the one that says how it ended.
    fn answers(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            self.incoming.clear();
            match self.socket.recv_from(&mut self.incoming, 0) {
                Ok((_, from)) if from.port_number() == 0 => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let mut rest = self.incoming.as_slice();
            while let Some((kind, sequence, body, next)) = message(rest) {
                rest = next;
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) };
                    }
                    _ => each(body),
                }
            }
        }
    }
}

/// The first message: its type, its sequence number, its body, and what follows.
fn message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, sequence, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; ID]) -> [u8; REQUEST] {
    let mut body = [0; REQUEST];
    body[0] = family;
    body[1] = protocol;
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    body[8..].copy_from_slice(id);
    body
}

/// A socket out of `struct inet_diag_msg`: family, state, two bytes about timers, and the id: ports, addresses, interface, cookie.
fn socket_info(body: &[u8], protocol: u8) -> Option<SocketInfo> {
    let family = *body.first()?;
    let id: [u8; ID] = body.get(4..4 + ID)?.try_into().ok()?;
    let port = u16::from_be_bytes([id[2], id[3]]);
    let address = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::new(id[20], id[21], id[22], id[23])),
        libc::AF_INET6 => {
            let octets: [u8; 16] = id.get(20..36)?.try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    let cookie: [u8; 8] = id.get(40..48)?.try_into().ok()?;
    // Two words, the low one first; the same as one number only where bytes run that way, too.
    let [a, b, c, d, e, f, g, h] = cookie;
    let cookie = u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32;
    Some(SocketInfo { cookie, protocol, peer: SocketAddr::new(address, port), family, id })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn sockets_are_listed_by_their_peer_and_cookie() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let Ok(mut diag) = SockDiag::open() else {
            println!("SKIP: this kernel lists no sockets");
            return;
        };
        let ours = |diag: &mut SockDiag| -> Vec<SocketInfo> {
            let all = diag.connected(libc::IPPROTO_UDP as u8).unwrap();
            all.into_iter().filter(|seen| seen.peer == server.local_addr().unwrap()).collect()
        };
        let found = ours(&mut diag);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_ne!(found[0].cookie, 0);
        drop(client);
        assert!(ours(&mut diag).is_empty());
        if nix::unistd::geteuid().is_root() {
            // It is gone, and where the kernel cannot end sockets at all it says so.
            assert_ne!(diag.destroy(&found[0]).unwrap(), DestroyOutcome::Destroyed);
        }
    }
}
