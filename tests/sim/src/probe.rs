//! Whether two network namespaces reach each other: echo servers and clients of our own, with payloads of any size, that check every
//! byte; and `ping`, for what only ICMP can show.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::netns::NetNs;

/// The port of every echo server.
pub const PORT: u16 = 7007;

/// How long a client waits for anything.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often servers look whether they shall end.
const TICK: Duration = Duration::from_millis(20);

/// An echo server for TCP and UDP, IPv4 and IPv6, in a namespace. It ends on drop.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Echo {
    /// Starts the servers and returns when they listen.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(ns: &NetNs) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
        let (listener, socket) = ns
            .run(|| -> io::Result<_> { Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?)) })?
            .with_context(|| format!("listen in {}", ns.name()))?;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(TICK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp, udp) = (Arc::clone(&stop), Arc::clone(&stop));
        // The sockets belong to the namespace; it does not matter where the threads live.
        let threads = vec![
            std::thread::spawn(move || serve_tcp(&listener, &tcp)),
            std::thread::spawn(move || serve_udp(&socket, &udp)),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, stop: &Arc<AtomicBool>) -> Result<()> {
    while !stop.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => {
                let stop = Arc::clone(stop);
                std::thread::spawn(move || echo(stream, &stop));
            }
            Err(error) if idle(&error) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn echo(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => stream.write_all(buffer.get(..length).unwrap_or_default())?,
            Err(error) if idle(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        match socket.recv_from(&mut buffer) {
            // An ICMP error of an earlier answer may be reported here; it is that client's matter.
            Ok((length, from)) => drop(socket.send_to(buffer.get(..length).unwrap_or_default(), from)),
            Err(error) if idle(&error) || error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn idle(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// `length` bytes that a lost, doubled or swapped segment would change.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// Connects from `ns` to an echo server, sends `length` bytes and checks that the same come back.
///
/// # Errors
/// When there is no connection, or not every byte returns in time.
pub fn tcp(ns: &NetNs, to: IpAddr, length: usize) -> Result<()> {
    tcp_at(ns, SocketAddr::new(to, PORT), length)
}

/// The same at another port, that of a Service.
///
/// # Errors
/// As [`tcp`].
pub fn tcp_at(ns: &NetNs, to: SocketAddr, length: usize) -> Result<()> {
    ns.run(|| -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let sent = pattern(length);
        let mut received = vec![0; length];
        std::thread::scope(|scope| -> Result<()> {
            let mut writer = stream.try_clone()?;
            let sent = &sent;
            let writing = scope.spawn(move || writer.write_all(sent));
            stream.read_exact(&mut received).context("read the echo")?;
            writing.join().map_err(|_panic| anyhow!("the writing thread panicked"))?.context("write")
        })?;
        ensure!(sent == received, "the echo differs");
        Ok(())
    })?
    .with_context(|| format!("TCP from {} to {to}, {length} bytes", ns.name()))
}

/// Sends one datagram of `length` bytes from `ns` to an echo server and checks that the same comes back; it is not repeated.
///
/// # Errors
/// When it does not.
pub fn udp(ns: &NetNs, to: IpAddr, length: usize) -> Result<()> {
    udp_at(ns, SocketAddr::new(to, PORT), length)
}

/// The same at another port, that of a Service.
///
/// # Errors
/// As [`udp`].
pub fn udp_at(ns: &NetNs, to: SocketAddr, length: usize) -> Result<()> {
    ns.run(|| -> Result<()> {
        let socket = udp_to(to)?;
        let sent = pattern(length);
        socket.send(&sent).context("send")?;
        let mut received = vec![0; 65_536];
        let got = socket.recv(&mut received).context("wait for the echo")?;
        ensure!(received.get(..got) == Some(&*sent), "the echo differs: {got} bytes");
        Ok(())
    })?
    .with_context(|| format!("UDP from {} to {to}, {length} bytes", ns.name()))
}

fn udp_to(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to).context("connect")?;
    Ok(socket)
}

/// Nobody serves this address and port, and the client is told so at once, by TCP and by UDP.
///
/// # Errors
/// When somebody answers, or the client has to wait.
pub fn refused(ns: &NetNs, to: SocketAddr) -> Result<()> {
    for (protocol, outcome, took) in [
        {
            let start = Instant::now();
            ("TCP", tcp_at(ns, to, 1), start.elapsed())
        },
        {
            let start = Instant::now();
            ("UDP", udp_at(ns, to, 1), start.elapsed())
        },
    ] {
        let Err(error) = outcome else { bail!("{protocol} from {} to {to}: somebody answers", ns.name()) };
        let kind = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
        ensure!(kind == Some(io::ErrorKind::ConnectionRefused), "{protocol}: not refused: {error:#}");
        ensure!(took < Duration::from_millis(500), "{protocol}: refused after {took:?}");
    }
    Ok(())
}

/// One `ping` from `ns` with further arguments; gives back what it prints.
///
/// # Errors
/// When no echo reply came within a second; the error holds what it printed.
pub fn ping(ns: &NetNs, to: IpAddr, arguments: &[&str]) -> Result<String> {
    let output = ns.command("ping").args(["-n", "-c", "1", "-W", "1"]).args(arguments).arg(to.to_string()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(text);
    }
    bail!("ping {} {to} from {}: {text}", arguments.join(" "), ns.name())
}

/// Traffic that goes on while something happens: one TCP connection and datagrams, a request every few milliseconds.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    tcp: JoinHandle<Result<Result<Seen>>>,
    udp: JoinHandle<Result<Result<Seen>>>,
}

/// What became of the requests of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Requests sent.
    pub sent: u64,
    /// Requests that got no answer within 200 ms.
    pub lost: u64,
    /// The longest time from a request to its answer.
    pub slowest: Duration,
}

impl Traffic {
    /// Starts it from `ns` to an echo server; the TCP connection stands when this returns.
    ///
    /// # Errors
    /// When there is no connection.
    pub fn start(ns: &NetNs, to: IpAddr) -> Result<Self> {
        let to = SocketAddr::new(to, PORT);
        let (stream, socket) = ns.run(|| -> Result<_> {
            Ok((TcpStream::connect_timeout(&to, PATIENCE).context("connect")?, udp_to(to)?))
        })??;
        let wait = Duration::from_millis(200);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(wait))?;
        socket.set_read_timeout(Some(wait))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tcp_stop, udp_stop) = (Arc::clone(&stop), Arc::clone(&stop));
        let tcp = ns.spawn(move || {
            let mut stream = stream;
            requests(&tcp_stop, |number, answer| {
                stream.write_all(number)?;
                stream.read_exact(answer)
            })
        });
        let udp = ns.spawn(move || {
            requests(&udp_stop, |number, answer| {
                socket.send(number)?;
                // A late answer to an earlier request is not the one waited for.
                while socket.recv(answer)? != number.len() || answer != number {}
                Ok(())
            })
        });
        Ok(Self { stop, tcp, udp })
    }

    /// Ends it: what TCP and UDP saw.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn stop(self) -> Result<(Seen, Seen)> {
        self.stop.store(true, Ordering::Release);
        let join = |thread: JoinHandle<Result<Result<Seen>>>| {
            thread.join().map_err(|_panic| anyhow!("a traffic thread panicked"))??
        };
        let (tcp, udp) = (join(self.tcp), join(self.udp));
        Ok((tcp.context("TCP")?, udp.context("UDP")?))
    }
}

fn requests(stop: &AtomicBool, mut exchange: impl FnMut(&[u8; 8], &mut [u8; 8]) -> io::Result<()>) -> Result<Seen> {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Acquire) {
        let start = Instant::now();
        seen.sent += 1;
        let number = seen.sent.to_be_bytes();
        let mut answer = [0; 8];
        match exchange(&number, &mut answer) {
            Ok(()) => {
                ensure!(answer == number, "request {} was answered with {answer:?}", seen.sent);
                seen.slowest = seen.slowest.max(start.elapsed());
            }
            Err(error) if idle(&error) || error.kind() == io::ErrorKind::ConnectionRefused => seen.lost += 1,
            Err(error) => return Err(error.into()),
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echoes_come_back_and_their_absence_is_noticed() {
        let Ok(ns) = NetNs::create(&format!("fabric-e{}", std::process::id())) else {
            println!("SKIP: no right to make network namespaces");
            return;
        };
        let (v4, v6) = (IpAddr::from([127, 0, 0, 1]), IpAddr::V6(Ipv6Addr::LOCALHOST));
        assert!(tcp(&ns, v4, 1).is_err(), "nobody listens");
        let server = Echo::start(&ns).unwrap();
        for to in [v4, v6] {
            tcp(&ns, to, 3_000_000).unwrap();
            udp(&ns, to, 20_000).unwrap();
            ping(&ns, to, &[]).unwrap();
        }
        let traffic = Traffic::start(&ns, v4).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let (tcp_seen, udp_seen) = traffic.stop().unwrap();
        assert!(tcp_seen.sent > 5 && tcp_seen.lost == 0 && udp_seen.sent > 5 && udp_seen.lost == 0);
        let traffic = Traffic::start(&ns, v6).unwrap();
        drop(server);
        std::thread::sleep(Duration::from_millis(300));
        assert!(traffic.stop().is_err(), "the server closed the connection");
    }
}
