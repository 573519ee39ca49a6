//! Everybody tries to reach everybody, at once: from each pod one thread, TCP, UDP and SCTP, two ports, both families.
//!
//! UDP and SCTP are sent from one port for the whole suite, so that their flows live through every change; TCP connects anew each time.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use terway_sim::node::cni::Pod;
use terway_tests::sctp::{Chunk, Packet, Raw, SCTP};

/// Ports that every pod serves.
pub(crate) const PORTS: [u16; 2] = [80, 81];

/// What nobody may answer has not been answered by then.
const LEAST: Duration = Duration::from_millis(50);
/// What must be answered is answered by then; lost to a loaded machine, it is sent again every [`AGAIN`].
const MOST: Duration = Duration::from_secs(4);
const AGAIN: Duration = Duration::from_millis(200);

/// One place that a pod tries to reach.
#[derive(Clone, Copy, Debug)]
struct Cell {
    to: SocketAddr,
    protocol: u8,
}

/// Protocols, by their numbers.
pub(crate) const PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The port from which every pod opens its associations.
const SCTP_CLIENT: u16 = 40_000;
/// Tags of associations are this times the round, and the number of the cell.
const ROUND: u32 = 1000;

/// What is asked of a pod's thread: the number of the round and what must be answered.
type Question = (u32, Vec<bool>);
/// What was answered.
type Answer = io::Result<Vec<bool>>;

/// The pods' servers and probing threads. They end on drop.
pub(crate) struct Probes {
    stop: Arc<AtomicBool>,
    servers: Vec<JoinHandle<()>>,
    clients: Vec<(Sender<Question>, Receiver<Answer>)>,
    round: u32,
}

impl Probes {
    pub(crate) fn start(pods: &[(usize, Pod)]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut probes = Self { stop: Arc::clone(&stop), servers: Vec::new(), clients: Vec::new(), round: 0 };
        let mut cells = Vec::new();
        for (_, pod) in pods {
            for port in PORTS {
                for protocol in PROTOCOLS {
                    for ip in [pod.v4()?, pod.v6()?] {
                        cells.push(Cell { to: SocketAddr::new(ip, port), protocol });
                    }
                }
            }
        }
        for (_, pod) in pods {
            let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            let sockets = pod.ns.run(|| -> io::Result<_> {
                let mut udp = Vec::new();
                let mut tcp = Vec::new();
                for port in PORTS {
                    udp.push(UdpSocket::bind(any(port))?);
                    tcp.push(std::net::TcpListener::bind(any(port))?);
                }
                Ok((udp, tcp, Raw::open()?, (UdpSocket::bind(any(0))?, Raw::open()?)))
            })?;
            let (udp, tcp, raw, client) = sockets.with_context(|| format!("listen in {}", pod.ns.name()))?;
            let ended = Arc::clone(&stop);
            probes.servers.push(std::thread::spawn(move || serve(&udp, &tcp, &raw, &ended)));
            let (ask, questions) = channel::<Question>();
            let (answer, answers) = channel();
            let cells = cells.clone();
            // Its sockets are to be the pod's.
            drop(pod.ns.spawn(move || {
                while let Ok((round, expected)) = questions.recv() {
                    if answer.send(probe(&client, &cells, round, &expected)).is_err() {
                        return;
                    }
                }
            }));
            probes.clients.push((ask, answers));
        }
        Ok(probes)
    }

    /// Has all pods try; by source, what was answered. `expected` says what to wait for.
    pub(crate) fn probe(&mut self, expected: &[Vec<bool>]) -> Result<Vec<Vec<bool>>> {
        self.round += 1;
        for ((ask, _), expected) in self.clients.iter().zip(expected) {
            ask.send((self.round, expected.clone())).map_err(|_ended| anyhow!("a probing thread has ended"))?;
        }
        let mut all = Vec::new();
        for (_, answers) in &self.clients {
            all.push(answers.recv().context("a probing thread has ended")?.context("probe")?);
        }
        Ok(all)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.clients.clear();
        for server in self.servers.drain(..) {
            let _ = server.join();
        }
    }
}

fn wait(fds: &mut [libc::pollfd], limit: Duration) -> io::Result<()> {
    // SAFETY: the slice lives for the call and its length is given.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit.as_millis() as libc::c_int) };
    let error = io::Error::last_os_error();
    if ready < 0 && error.kind() != io::ErrorKind::Interrupted { Err(error) } else { Ok(()) }
}

const fn interest(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// Echoes datagrams; connections are taken and closed, associations answered.
fn serve(udp: &[UdpSocket], tcp: &[std::net::TcpListener], sctp: &Raw, stop: &AtomicBool) {
    for socket in udp {
        let _ = socket.set_nonblocking(true);
    }
    for listener in tcp {
        let _ = listener.set_nonblocking(true);
    }
    let mut fds: Vec<libc::pollfd> = udp.iter().map(|s| interest(s.as_raw_fd(), libc::POLLIN)).collect();
    fds.extend(tcp.iter().map(|s| interest(s.as_raw_fd(), libc::POLLIN)));
    fds.extend(sctp.fds().map(|fd| interest(fd, libc::POLLIN)));
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Acquire) {
        let _ = wait(&mut fds, Duration::from_millis(100));
        for socket in udp {
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        }
        for listener in tcp {
            while listener.accept().is_ok() {}
        }
        sctp.answer();
    }
}

/// The address as a socket of both families wants it.
fn six(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::from((v4.to_ipv6_mapped(), address.port())),
        IpAddr::V6(_) => address,
    }
}

fn connecting(to: SocketAddr) -> io::Result<OwnedFd> {
    // SAFETY: the call has no preconditions.
    let fd = unsafe { libc::socket(libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // A reset instead of a long goodbye: there are hundreds of them.
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let SocketAddr::V6(to) = six(to) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let address = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: to.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
        sin6_scope_id: 0,
    };
    // SAFETY: pointers to live values with their sizes.
    let result = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        );
        libc::connect(fd, (&raw const address).cast(), size_of::<libc::sockaddr_in6>() as libc::socklen_t)
    };
    let error = io::Error::last_os_error();
    match result {
        0 => Ok(socket),
        _ if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        _ => Err(error),
    }
}

fn is_connected(fd: RawFd) -> bool {
    // SAFETY: an address of no family, to be filled.
    let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
    // SAFETY: pointers to live values; the length is the buffer's.
    unsafe { libc::getpeername(fd, (&raw mut address).cast(), &raw mut length) == 0 }
}

/// One round of one pod.
fn probe((udp, sctp): &(UdpSocket, Raw), cells: &[Cell], round: u32, expected: &[bool]) -> Answer {
    udp.set_nonblocking(true)?;
    let mut answered = vec![false; cells.len()];
    let mut sockets: Vec<Option<OwnedFd>> = cells.iter().map(|_| None).collect();
    let start = Instant::now();
    let mut sent = None;
    let mut buffer = [0; 64];
    loop {
        if sent.is_none_or(|sent: Instant| sent.elapsed() >= AGAIN) {
            let again = sent.is_some();
            for (n, cell) in cells.iter().enumerate() {
                if answered[n] || again && !expected[n] {
                    continue;
                }
                match cell.protocol {
                    TCP => sockets[n] = connecting(cell.to).ok(),
                    UDP => {
                        let mut datagram = round.to_be_bytes().to_vec();
                        datagram.extend((n as u32).to_be_bytes());
                        let _ = udp.send_to(&datagram, six(cell.to));
                    }
                    _ => {
                        let ports = (SCTP_CLIENT, cell.to.port());
                        let _ = sctp.send(cell.to.ip(), &Packet::init(ports, round * ROUND + n as u32));
                    }
                }
            }
            sent = Some(Instant::now());
        }
        let mut fds = vec![interest(udp.as_raw_fd(), libc::POLLIN)];
        fds.extend(sctp.fds().map(|fd| interest(fd, libc::POLLIN)));
        let pending = sockets.iter().enumerate().filter(|(n, _)| !answered[*n]);
        fds.extend(pending.filter_map(|(_, s)| Some(interest(s.as_ref()?.as_raw_fd(), libc::POLLOUT))));
        wait(&mut fds, Duration::from_millis(5))?;
        while let Ok(length) = udp.recv(&mut buffer) {
            let (head, tail) = (buffer.first_chunk::<4>(), buffer.get(4..8).and_then(|b| b.first_chunk::<4>()));
            if let (8, Some(head), Some(tail)) = (length, head, tail)
                && u32::from_be_bytes(*head) == round
                && let Some(cell) = answered.get_mut(u32::from_be_bytes(*tail) as usize)
            {
                *cell = true;
            }
        }
        for (from, packet) in sctp.received() {
            if let Some(Packet { ports: (port, _), tag, chunk: Chunk::InitAck(_) }) = packet {
                let n = (tag % ROUND) as usize;
                let own = cells.get(n).is_some_and(|cell| cell.to == SocketAddr::new(from, port));
                if own && tag / ROUND == round {
                    answered[n] = true;
                }
            }
        }
        for (n, socket) in sockets.iter().enumerate() {
            if let Some(socket) = socket
                && !answered[n]
                && is_connected(socket.as_raw_fd())
            {
                answered[n] = true;
            }
        }
        let missing = answered.iter().zip(expected).any(|(answered, expected)| *expected && !*answered);
        if start.elapsed() >= LEAST && !missing || start.elapsed() >= MOST {
            return Ok(answered);
        }
    }
}
