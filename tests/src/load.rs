//! Load between two network namespaces: request/response, connect/request/response, stream, over TCP and UDP.
//!
//! Client and server are threads pinned to one CPU: with two, an idle CPU's wake-up time decides the figure (9 000 or 45 000
//! round trips a second were seen for one and the same path).

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

/// What is measured. The unit of the figure is transactions per second, for [`Kind::TcpStream`] bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One byte there and back on one connection.
    TcpRr,
    /// Connect, one byte there and back, close.
    TcpCrr,
    /// Bulk data one way.
    TcpStream,
    /// One byte there and back by datagrams.
    UdpRr,
}

impl Kind {
    /// All kinds, in the order of the table.
    pub const ALL: [Self; 4] = [Self::TcpRr, Self::TcpCrr, Self::TcpStream, Self::UdpRr];

    /// Short name for figures.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcpRr => "tcp_rr",
            Self::TcpCrr => "tcp_crr",
            Self::TcpStream => "tcp_stream",
            Self::UdpRr => "udp_rr",
        }
    }
}

/// Two ends of a path: where each lives, and the server's address as the client sees it.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Network namespace of the client.
    pub client: PathBuf,
    /// Network namespace of the server.
    pub server: PathBuf,
    /// Where the client connects to.
    pub address: IpAddr,
    /// The threaded cgroup that the client's socket belongs to; none for that of the benchmark itself.
    pub cgroup: Option<PathBuf>,
}

/// Where the servers listen.
pub const PORT: u16 = 7777;
const IO_TIMEOUT: Duration = Duration::from_secs(3);

/// Runs `kind` over the path for `duration` on `cpu` and returns the figure.
///
/// # Errors
/// When the path does not carry the traffic.
pub fn run(kind: Kind, ends: &Ends, cpu: usize, duration: Duration) -> Result<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    let server = serve(kind, ends, cpu, &stop)?;
    let client = {
        let ends = ends.clone();
        in_netns(ends.client.clone(), cpu, move || {
            if let Some(cgroup) = &ends.cgroup {
                std::fs::write(cgroup.join("cgroup.threads"), "0").context("enter the client's cgroup")?;
            }
            client(kind, SocketAddr::new(ends.address, PORT), duration)
        })
    };
    let figure = client.join().unwrap_or_else(|panic| resume_unwind(panic));
    stop.store(true, Ordering::Release);
    server.join().unwrap_or_else(|panic| resume_unwind(panic))?;
    figure.with_context(|| format!("{} to {}", kind.name(), ends.address))
}

fn in_netns<T: Send + 'static>(
    netns: PathBuf,
    cpu: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> JoinHandle<Result<T>> {
    std::thread::spawn(move || {
        enter(&netns)?;
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        work()
    })
}

fn enter(netns: &Path) -> Result<()> {
    let file = std::fs::File::open(netns).with_context(|| netns.display().to_string())?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("setns {}", netns.display()))
}

/// Starts the server and returns once its socket is bound, so that the client never meets a closed port.
fn serve(kind: Kind, ends: &Ends, cpu: usize, stop: &Arc<AtomicBool>) -> Result<JoinHandle<Result<()>>> {
    let any: IpAddr = if ends.address.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    let (bound, ready) = std::sync::mpsc::channel();
    let stop = Arc::clone(stop);
    let handle = in_netns(ends.server.clone(), cpu, move || {
        let address = SocketAddr::new(any, PORT);
        if kind == Kind::UdpRr {
            let socket = UdpSocket::bind(address)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let _ = bound.send(());
            return udp_echo(&socket, &stop);
        }
        let listener = TcpListener::bind(address)?;
        let _ = bound.send(());
        tcp_server(kind, &listener, &stop)
    });
    if ready.recv_timeout(IO_TIMEOUT).is_err() {
        match handle.join() {
            Ok(Err(error)) => return Err(error.context("server did not start")),
            _ => bail!("server did not start"),
        }
    }
    Ok(handle)
}

fn udp_echo(socket: &UdpSocket, stop: &AtomicBool) -> Result<()> {
    let mut buffer = [0u8; 64];
    while !stop.load(Ordering::Acquire) {
        match socket.recv_from(&mut buffer) {
            Ok((n, from)) => {
                socket.send_to(buffer.get(..n).unwrap_or_default(), from)?;
            }
            Err(e) if would_block(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn tcp_server(kind: Kind, listener: &TcpListener, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0u8; 256 * 1024];
    while !stop.load(Ordering::Acquire) {
        // Blocks in accept, as a server does; a poll in between would be part of the figure.
        if !readable(listener, 100)? {
            continue;
        }
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        loop {
            let n = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                Err(e) => return Err(e.into()),
            };
            if kind != Kind::TcpStream {
                stream.write_all(buffer.get(..n).unwrap_or_default())?;
            }
        }
    }
    Ok(())
}

fn readable(listener: &TcpListener, timeout_ms: u16) -> Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::from(timeout_ms))? > 0)
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn client(kind: Kind, to: SocketAddr, duration: Duration) -> Result<f64> {
    let mut byte = [42u8];
    let mut count = 0u64;
    match kind {
        Kind::TcpCrr => {
            let start = Instant::now();
            while start.elapsed() < duration {
                let mut stream = TcpStream::connect_timeout(&to, IO_TIMEOUT)?;
                stream.set_read_timeout(Some(IO_TIMEOUT))?;
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)?;
                // Reset instead of TIME_WAIT: 28 000 ports would otherwise last for a second.
                linger_zero(&stream)?;
                count += 1;
            }
            Ok(count as f64 / start.elapsed().as_secs_f64())
        }
        Kind::UdpRr => {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(IO_TIMEOUT))?;
            let start = Instant::now();
            while start.elapsed() < duration {
                socket.send(&byte)?;
                socket.recv(&mut byte)?;
                count += 1;
            }
            Ok(count as f64 / start.elapsed().as_secs_f64())
        }
        Kind::TcpRr | Kind::TcpStream => {
            let mut stream = TcpStream::connect_timeout(&to, IO_TIMEOUT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(IO_TIMEOUT))?;
            stream.set_write_timeout(Some(IO_TIMEOUT))?;
            let block = vec![0u8; 128 * 1024];
            let start = Instant::now();
            while start.elapsed() < duration {
                if kind == Kind::TcpRr {
                    stream.write_all(&byte)?;
                    stream.read_exact(&mut byte)?;
                    count += 1;
                } else {
                    count += stream.write(&block)? as u64;
                }
            }
            Ok(count as f64 / start.elapsed().as_secs_f64())
        }
    }
}

fn linger_zero(stream: &TcpStream) -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt::Linger};
    Ok(setsockopt(stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?)
}
