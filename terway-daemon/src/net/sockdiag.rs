//! Lists and destroys sockets by `NETLINK_SOCK_DIAG`, in the calling thread's network namespace.
//!
//! In the kernel: net/ipv4/inet_diag.c (list), net/ipv4/udp_diag.c, net/ipv4/tcp_diag.c, net/core/sock_diag.c (destroy).

use std::net::SocketAddr;

use netlink_packet_core::Parseable as _;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, SockDiagDestroy, SockDiagMessage};

use super::NetError;
use super::socket::{HEADER, NetlinkSocket};

/// States of a socket that has a peer. A connected UDP socket is in `TCP_ESTABLISHED`, too.
const CONNECTED: StateFlags = StateFlags::ESTABLISHED
    .union(StateFlags::SYN_SENT)
    .union(StateFlags::FIN_WAIT1)
    .union(StateFlags::FIN_WAIT2)
    .union(StateFlags::CLOSE_WAIT);

/// A connected socket (`struct inet_diag_msg`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketInfo {
    /// Socket cookie, as `bpf_get_socket_cookie` returns it.
    pub cookie: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// Peer address; for an IPv6 socket with an IPv4-mapped peer, the IPv4 address.
    pub peer: SocketAddr,
    family: u8,
    id: SocketId,
}

/// Outcome of destroying a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyOutcome {
    /// Destroyed; its owner gets `ECONNABORTED`.
    Destroyed,
    /// It was closed meanwhile, or has another peer.
    NotFound,
    /// The kernel is built without `CONFIG_INET_DIAG_DESTROY`.
    NotSupported,
}

/// A sock_diag client.
#[derive(Debug)]
pub struct SockDiag(NetlinkSocket);

impl SockDiag {
    /// Opens a client of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's, such as `EPROTONOSUPPORT` without `CONFIG_INET_DIAG`.
    pub fn open() -> Result<Self, NetError> {
        NetlinkSocket::sock_diag().map(Self)
    }

    /// Lists all sockets of a protocol that have a peer.
    ///
    /// # Errors
    /// The kernel's, such as `ENOENT` if it cannot list this protocol (`CONFIG_INET_UDP_DIAG`).
    pub fn connected(&mut self, protocol: u8) -> Result<Vec<SocketInfo>, NetError> {
        let mut found = Vec::new();
        for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = SockDiagMessage::InetRequest(request(family, protocol, CONNECTED, id));
            let messages = self.0.dump("list sockets", request)?;
            found.extend(messages.iter().filter_map(|message| socket_info(message, protocol)));
        }
        Ok(found)
    }

    /// Destroys a socket, unless its cookie or addresses have changed.
    ///
    /// # Errors
    /// The kernel's, except for those that [`DestroyOutcome`] stands for.
    pub fn destroy(&mut self, socket: &SocketInfo) -> Result<DestroyOutcome, NetError> {
        let request = request(socket.family, socket.protocol, StateFlags::all(), socket.id.clone());
        match self.0.request(SockDiagDestroy::new(SockDiagMessage::InetRequest(request)), 0)? {
            Ok(_) => Ok(DestroyOutcome::Destroyed),
            // ESTALE: another socket has its addresses and ports by now (`sock_diag_check_cookie`).
            Err(error) if matches!(error.errno, libc::ENOENT | libc::ESTALE) => Ok(DestroyOutcome::NotFound),
            Err(error) if error.errno == libc::EOPNOTSUPP => Ok(DestroyOutcome::NotSupported),
            Err(error) => Err(error.during(format!("destroy the socket connected to {}", socket.peer))),
        }
    }
}

fn request(family: u8, protocol: u8, states: StateFlags, socket_id: SocketId) -> InetRequest {
    InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id }
}

/// Parses the fixed part of a message. The attributes behind it are not used, so one that cannot be parsed hides no socket.
fn socket_info(message: &[u8], protocol: u8) -> Option<SocketInfo> {
    let InetResponseHeader { family, socket_id: id, .. } = InetResponseHeader::parse(message.get(HEADER..)?).ok()?;
    let peer = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
    // Two words in host byte order, the low one first.
    let [a, b, c, d, e, f, g, h] = id.cookie;
    let cookie = u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32;
    Some(SocketInfo { cookie, protocol, peer, family, id })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    const UDP: u8 = libc::IPPROTO_UDP as u8;
    const TCP: u8 = libc::IPPROTO_TCP as u8;

    fn open() -> Option<SockDiag> {
        let diag = SockDiag::open().ok();
        if diag.is_none() {
            println!("SKIP: this kernel lists no sockets");
        }
        diag
    }

    fn connected_to(diag: &mut SockDiag, protocol: u8, peer: SocketAddr) -> Vec<SocketInfo> {
        diag.connected(protocol).unwrap().into_iter().filter(|socket| socket.peer == peer).collect()
    }

    #[test]
    fn connected_udp_socket_is_listed_until_it_is_closed() {
        let Some(mut diag) = open() else { return };
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let peer = server.local_addr().unwrap();
        let found = connected_to(&mut diag, UDP, peer);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_ne!(found[0].cookie, 0);
        drop(client);
        assert!(connected_to(&mut diag, UDP, peer).is_empty());
        if nix::unistd::geteuid().is_root() {
            // Closed sockets are not found, and a kernel that cannot destroy sockets says so.
            assert_ne!(diag.destroy(&found[0]).unwrap(), DestroyOutcome::Destroyed);
        }
    }

    #[test]
    fn ipv4_mapped_peer_of_an_ipv6_socket_is_its_ipv4_address() {
        let Some(mut diag) = open() else { return };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        let mapped = SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), peer.port());
        let Ok(client) = TcpStream::connect(mapped) else {
            println!("SKIP: this machine has no IPv6");
            return;
        };
        let found = connected_to(&mut diag, TCP, peer);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].family, AF_INET6);
        if nix::unistd::geteuid().is_root() {
            match diag.destroy(&found[0]).unwrap() {
                DestroyOutcome::Destroyed => {
                    let error = std::io::Read::read(&mut &client, &mut [0]).unwrap_err();
                    assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
                }
                outcome => println!("SKIP: this kernel cannot destroy sockets: {outcome:?}"),
            }
        }
    }
}
