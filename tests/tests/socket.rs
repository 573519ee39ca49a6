//! Services at the socket: a process in a cgroup of its own connects and sends to Services, with real sockets.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use terway_abi::{Backend, Frontend, Member, Run, backend_flags};
use terway_daemon::bpf::{Config, Datapath, FrontendAt};
use terway_tests::sandbox::ip;
use terway_tests::sandbox_or_skip;

/// A cgroup that this process is in as long as it lives.
struct Cgroup {
    mount: tempfile::TempDir,
    own: PathBuf,
    /// Where the process was.
    before: PathBuf,
}

impl Cgroup {
    fn enter() -> Self {
        use nix::mount::{MsFlags, mount};
        let folder = tempfile::Builder::new().prefix("socket-test-").tempdir().unwrap();
        mount(Some("none"), folder.path(), Some("cgroup2"), MsFlags::empty(), None::<&str>).unwrap();
        // "0::/path" is the place in the hierarchy of version 2.
        let text = fs::read_to_string("/proc/self/cgroup").unwrap();
        let place = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
        let before = folder.path().join(place);
        let own = folder.path().join(format!("bpf-socket-test-{}", std::process::id()));
        fs::create_dir(&own).unwrap();
        let cgroup = Self { mount: folder, own, before };
        join(&cgroup.own);
        cgroup
    }
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        join(&self.before);
        let _busy = fs::remove_dir(&self.own);
        let _busy = nix::mount::umount2(self.mount.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn words(address: IpAddr) -> [u32; 4] {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes.copy_from_slice(&v6.octets()),
    }
    std::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
}

/// A Service of one backend.
fn serve(datapath: &Datapath, number: u32, at: SocketAddr, backend: SocketAddr, protocol: u8) {
    let flags = if backend.is_ipv6() { backend_flags::V6 } else { 0 };
    let value = Backend {
        address: words(backend.ip()),
        port: backend.port().to_be(),
        protocol,
        flags,
        generation: 1,
        spare: [0; 2],
    };
    datapath.set_backend(number, &value).unwrap();
    datapath.set_members(number, &[Member { backend: number, generation: 1 }]).unwrap();
    let run = Run { first: number, count: 1 };
    let place = FrontendAt::Address { address: at.ip(), port: at.port(), protocol };
    datapath
        .set_frontend(&place, &Frontend { service: number, internal: run, external: run, ..Frontend::default() })
        .unwrap();
}

fn answers(to: SocketAddr, server: &TcpListener) -> SocketAddr {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    accepted.write_all(b"served").unwrap();
    let mut bytes = [0; 6];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"served");
    stream.peer_addr().unwrap()
}

/// One test for all: the process is in the cgroup or it is not.
#[test]
fn sockets_reach_services() {
    let sandbox = sandbox_or_skip!();
    let datapath = Datapath::open(&Config::new(sandbox.pin_root())).unwrap();
    ip("addr add 10.0.0.100/32 dev lo").unwrap();
    ip("-6 addr add fd00::100/128 dev lo nodad").unwrap();
    let cgroup = Cgroup::enter();
    for (number, (vip, host)) in (1..).zip([("10.96.0.1", "10.0.0.100"), ("fd96::1", "fd00::100")]) {
        let (vip, host): (IpAddr, IpAddr) = (vip.parse().unwrap(), host.parse().unwrap());
        let (at, dns) = (SocketAddr::new(vip, 80), SocketAddr::new(vip, 53));
        let (backend, resolver) = (SocketAddr::new(host, 8080), SocketAddr::new(host, 5353));
        serve(&datapath, 10 * number, at, backend, 6);
        serve(&datapath, 10 * number + 1, dns, resolver, 17);
        let server = TcpListener::bind(backend).unwrap();
        // Without the programs nobody is there.
        if number == 1 {
            assert!(TcpStream::connect_timeout(&at, Duration::from_millis(200)).is_err());
        }
        datapath.attach_sockets(&cgroup.own).unwrap();
        // Attaching again, as a restarted daemon does, leaves one of each.
        datapath.attach_sockets(&cgroup.own).unwrap();
        // The application believes to talk to the Service.
        assert_eq!(answers(at, &server), at);
        assert_eq!(answers(backend, &server), backend);
        if let IpAddr::V4(v4) = vip {
            // An IPv6 socket with an IPv4 destination.
            let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), 80);
            assert_eq!(answers(mapped, &server), mapped);
        }

        let resolving = UdpSocket::bind(resolver).unwrap();
        let client = UdpSocket::bind(SocketAddr::new(host, 0)).unwrap();
        for socket in [&resolving, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        let mut bytes = [0; 16];
        // Unconnected, then connected.
        client.send_to(b"question", dns).unwrap();
        let (n, from) = resolving.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..n], from), (&b"question"[..], client.local_addr().unwrap()));
        resolving.send_to(b"answer", from).unwrap();
        assert_eq!(client.recv_from(&mut bytes).unwrap(), (6, dns));
        client.connect(dns).unwrap();
        client.send(b"more").unwrap();
        let (_, from) = resolving.recv_from(&mut bytes).unwrap();
        resolving.send_to(b"answer", from).unwrap();
        assert_eq!((client.recv(&mut bytes).unwrap(), client.peer_addr().unwrap()), (6, dns));
    }
    datapath.detach_sockets().unwrap();
    let left = fs::read_dir(sandbox.pin_root().join("links")).unwrap().count();
    assert_eq!(left, 0);
}
