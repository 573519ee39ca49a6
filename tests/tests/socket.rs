//! Service translation at the socket: a process in its own cgroup connects and sends to Services, with real sockets.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::programs::links::FdLink;
use terway_abi::{Backend, BackendRange, BackendRef, Frontend, backend_flags, frontend_flags};
use terway_core::service::FrontendKey;
use terway_daemon::bpf::{Config, Datapath};
use terway_tests::prog_harness::{frontend_key, node_port_key};
use terway_tests::sandbox::{Namespace, ip};
use terway_tests::sandbox_or_skip;

/// A cgroup that this process joins until the value is dropped.
struct Cgroup {
    mount: tempfile::TempDir,
    own: PathBuf,
    /// The previous cgroup of the process.
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

impl Cgroup {
    /// A second cgroup, if a test creates one.
    fn other(&self) -> PathBuf {
        self.mount.path().join(format!("bpf-socket-other-{}", std::process::id()))
    }
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        join(&self.before);
        let _busy = fs::remove_dir(&self.own);
        let _gone = fs::remove_dir(self.other());
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

/// Writes a Service with these backends, at backend indices and backend references from `number` on.
fn serve_at(
    datapath: &Datapath,
    number: u32,
    place: &FrontendKey,
    frontend: Frontend,
    backends: &[SocketAddr],
    protocol: u8,
) {
    let mut members = Vec::new();
    for (number, backend) in (number..).zip(backends) {
        set_backend(datapath, number, *backend, protocol, 1);
        members.push(BackendRef { backend: number, generation: 1 });
    }
    datapath.services().set_members(number, &members).unwrap();
    let run = BackendRange { first: number, count: members.len() as u32 };
    datapath
        .services()
        .set_frontend(place, &Frontend { service: number, internal: run, external: run, ..frontend })
        .unwrap();
}

fn set_backend(datapath: &Datapath, number: u32, at: SocketAddr, protocol: u8, generation: u32) {
    let flags = if at.is_ipv6() { backend_flags::V6 } else { 0 };
    let value =
        Backend { address: words(at.ip()), port: at.port().to_be(), protocol, flags, generation, spare: [0; 2] };
    datapath.services().set_backend(number, &value).unwrap();
}

/// Writes a Service with one backend.
fn serve(datapath: &Datapath, number: u32, at: SocketAddr, backend: SocketAddr, protocol: u8) {
    let place = frontend_key(at.ip(), at.port(), protocol);
    serve_at(datapath, number, &place, Frontend::default(), &[backend], protocol);
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "not within five seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The errno of `connect`; 0 if it succeeds.
fn connecting(to: SocketAddr) -> i32 {
    match TcpStream::connect_timeout(&to, Duration::from_millis(300)) {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::ETIMEDOUT),
    }
}

fn answers(to: SocketAddr, server: &TcpListener) -> SocketAddr {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    accepted.write_all(b"served").unwrap();
    let mut bytes = [0; 6];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"served");
    stream.peer_addr().unwrap()
}

#[test]
fn connect_and_sendto_reach_services() {
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
        // Without the programs nothing listens at the Service's address.
        if number == 1 {
            assert!(TcpStream::connect_timeout(&at, Duration::from_millis(200)).is_err());
        }
        datapath.sockets().attach(&cgroup.own).unwrap();
        // Attaching again, as a restarted daemon does, leaves one link per program.
        datapath.sockets().attach(&cgroup.own).unwrap();
        // The application sees the Service's address as its peer.
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
    datapath.sockets().detach().unwrap();
    let left = fs::read_dir(sandbox.pin_root().join("links")).unwrap().count();
    assert_eq!(left, 0);
}

/// Backends and the node's addresses on the loopback interface, and a process in a cgroup that has the programs.
fn node(sandbox: &terway_tests::sandbox::Sandbox) -> (Datapath, Cgroup) {
    let datapath = Datapath::open(&Config::new(sandbox.pin_root())).unwrap();
    ip("addr add 10.0.0.100/32 dev lo").unwrap();
    ip("-6 addr add fd00::100/128 dev lo nodad").unwrap();
    let own: Vec<IpAddr> = ["10.0.0.100", "fd00::100"].map(|text| text.parse().unwrap()).to_vec();
    datapath.host_prefixes().set(&own.iter().copied().map(ipnetwork::IpNetwork::from).collect::<Vec<_>>()).unwrap();
    datapath.services().set_node_addresses(&own).unwrap();
    let cgroup = Cgroup::enter();
    let programs = datapath.sockets().attach(&cgroup.own).unwrap();
    assert_eq!((programs.attached, programs.unprotected), (10, None));
    (datapath, cgroup)
}

/// NodePorts are reached at the node's addresses and its loopback, not at a pod's loopback; host processes cannot bind them.
#[test]
fn nodeports_are_services() {
    let sandbox = sandbox_or_skip!();
    let (datapath, _cgroup) = node(&sandbox);
    if datapath.features().host_netns == 0 {
        println!("SKIP: before Linux 5.14 the node is the machine's first network namespace, and no sandbox");
        return;
    }
    let refused = if datapath.features().sets_errno { libc::EADDRINUSE } else { libc::EPERM };
    let in_vain = if datapath.features().sets_errno { libc::ECONNREFUSED } else { libc::EPERM };
    let servers = ["10.0.0.100:8080", "[fd00::100]:8080"].map(|at| TcpListener::bind(at).unwrap());
    for (number, server) in (1..).zip(&servers) {
        let backend = server.local_addr().unwrap();
        for (protocol, base) in [(6, 0), (17, 100)] {
            let at = node_port_key(backend.is_ipv6(), 30_080, protocol);
            serve_at(&datapath, base + 10 * number, &at, Frontend::default(), &[backend], protocol);
        }
    }
    for (to, server) in [
        ("10.0.0.100:30080", &servers[0]),
        ("127.0.0.1:30080", &servers[0]),
        ("127.8.9.10:30080", &servers[0]),
        ("[::ffff:127.0.0.1]:30080", &servers[0]),
        ("[fd00::100]:30080", &servers[1]),
        ("[::1]:30080", &servers[1]),
    ] {
        assert_eq!(answers(address(to), server), address(to));
    }
    // Other ports of the node are not translated.
    assert_eq!(connecting(address("127.0.0.1:30081")), libc::ECONNREFUSED);

    let taken = |at: SocketAddr| {
        let error = |result: std::io::Result<()>| result.err().map(|error| error.raw_os_error().unwrap());
        [error(TcpListener::bind(at).map(drop)), error(UdpSocket::bind(at).map(drop))]
    };
    for at in ["0.0.0.0", "127.0.0.1", "10.0.0.100", "[::]", "[::1]", "[fd00::100]", "[::ffff:10.0.0.100]"] {
        assert_eq!(taken(address(&format!("{at}:30080"))), [Some(refused); 2], "{at}");
        assert_eq!(taken(address(&format!("{at}:30081"))), [None; 2], "{at}");
        assert_eq!(taken(address(&format!("{at}:0"))), [None; 2], "{at}");
    }
    // A pod has its own ports and its own loopback.
    let pod = Namespace::new().unwrap();
    let seen = pod.spawn(move || (taken(address("[::]:30080")), connecting(address("127.0.0.1:30080")))).unwrap();
    assert_eq!(seen.join().unwrap(), ([None; 2], libc::ECONNREFUSED));

    // A NodePort without backends is rejected at once, and still cannot be bound.
    let at = node_port_key(false, 30_080, 6);
    datapath.services().set_frontend(&at, &Frontend::default()).unwrap();
    assert_eq!(connecting(address("127.0.0.1:30080")), in_vain);
    assert!(TcpListener::bind("127.0.0.1:30080").is_err());
    datapath.services().remove_frontend(&at).unwrap();
    TcpListener::bind("127.0.0.1:30080").unwrap();
    datapath.sockets().detach().unwrap();
}

/// Services that are not translated at the socket: those not for clients in the cluster, and, in pods, rejections and backend selections
/// that need the packet path.
#[test]
fn least_connections_and_maglev_use_the_packet_path() {
    let sandbox = sandbox_or_skip!();
    let (datapath, _cgroup) = node(&sandbox);
    if datapath.features().host_netns == 0 {
        println!("SKIP: before Linux 5.14 the node is the machine's first network namespace, and no sandbox");
        return;
    }
    let in_vain = if datapath.features().sets_errno { libc::ECONNREFUSED } else { libc::EPERM };
    let server = TcpListener::bind("10.0.0.100:8080").unwrap();
    let at = |number: u8| SocketAddr::from(([10, 96, 0, number], 80));
    let place = |number: u8| frontend_key(at(number).ip(), 80, 6);
    let flags = |flags| Frontend { flags, ..Frontend::default() };
    let backend = [server.local_addr().unwrap()];
    for (number, flags) in [
        (1, flags(0)),
        (2, flags(frontend_flags::EXTERNAL_ONLY)),
        (3, flags(frontend_flags::LEAST_CONNECTIONS)),
        (4, flags(frontend_flags::MAGLEV)),
    ] {
        serve_at(&datapath, 10 * u32::from(number), &place(number), flags, &backend, 6);
    }
    serve_at(&datapath, 50, &place(5), flags(0), &[], 6);
    datapath.services().set_frontend(&FrontendKey::rest(at(1).ip()), &Frontend::default()).unwrap();
    let nowhere = libc::ENETUNREACH;
    let closed = SocketAddr::new(at(1).ip(), 81);
    let outcomes = move || [at(1), at(2), at(3), at(4), at(5), closed].map(connecting);
    assert_eq!(outcomes(), [0, nowhere, 0, 0, in_vain, in_vain]);
    // This pod has no route. One destination is translated, as the table shows; the others are left to the packet path.
    let before = datapath.sockets().list().unwrap().len();
    let pod = Namespace::new().unwrap();
    assert_eq!(pod.spawn(outcomes).unwrap().join().unwrap(), [nowhere; 6]);
    let rows = datapath.sockets().list().unwrap();
    assert_eq!(rows.len(), before + 1);
    let of_pod: Vec<_> = rows.iter().filter(|row| row.netns != datapath.features().host_netns).collect();
    assert_eq!(of_pod.len(), 1, "{rows:?}");
    assert_eq!((of_pod[0].frontend, of_pod[0].backend, of_pod[0].alive), (at(1), backend[0], true));
    datapath.sockets().detach().unwrap();
}

/// Datagrams of an unconnected socket keep their backend while it exists.
#[test]
fn udp_exchange_keeps_its_backend() {
    let sandbox = sandbox_or_skip!();
    let (datapath, _cgroup) = node(&sandbox);
    for (number, host, vip) in [(1, "10.0.0.100", "10.96.0.1"), (100, "[fd00::100]", "[fd96::1]")] {
        let servers: Vec<UdpSocket> =
            (0..4).map(|port| UdpSocket::bind(format!("{host}:{}", 5300 + port)).unwrap()).collect();
        let backends: Vec<SocketAddr> = servers.iter().map(|server| server.local_addr().unwrap()).collect();
        for server in &servers {
            server.set_nonblocking(true).unwrap();
        }
        let vip = address(&format!("{vip}:53"));
        let place = frontend_key(vip.ip(), 53, 17);
        serve_at(&datapath, number, &place, Frontend::default(), &backends, 17);
        // Datagrams per backend; each gets a reply that comes from the Service.
        let exchange = |client: &UdpSocket, count: usize| -> Vec<usize> {
            let mut got = vec![0; 4];
            let mut bytes = [0; 16];
            for _ in 0..count {
                client.send_to(b"question", vip).unwrap();
                for (server, got) in servers.iter().zip(&mut got) {
                    while let Ok((_, from)) = server.recv_from(&mut bytes) {
                        *got += 1;
                        server.send_to(b"answer", from).unwrap();
                        assert_eq!(client.recv_from(&mut bytes).unwrap(), (6, vip));
                    }
                }
            }
            got
        };
        let client = || {
            let client = UdpSocket::bind(format!("{host}:0")).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            client
        };
        let one = client();
        let got = exchange(&one, 40);
        let chosen = got.iter().position(|count| *count == 40).unwrap_or_else(|| panic!("{got:?}"));
        // The frontend leads to the other backends only: the exchange keeps its backend.
        let others: Vec<BackendRef> = (number..number + 4)
            .filter(|backend| *backend != number + chosen as u32)
            .map(|backend| BackendRef { backend, generation: 1 })
            .collect();
        datapath.services().set_members(number + 10, &others).unwrap();
        let run = BackendRange { first: number + 10, count: 3 };
        let value = Frontend { service: number, internal: run, external: run, ..Frontend::default() };
        datapath.services().set_frontend(&place, &value).unwrap();
        assert_eq!(exchange(&one, 20)[chosen], 20);
        // The backend is removed: another one is selected, and kept.
        set_backend(&datapath, number + chosen as u32, backends[chosen], 17, 2);
        let got = exchange(&one, 40);
        assert!(got[chosen] == 0 && got.contains(&40), "{got:?}");
        // Selection is per socket: the chance that none of 60 selects one of three backends is 1 in 10^10.
        let mut spread = vec![0; 4];
        for _ in 0..60 {
            spread.iter_mut().zip(exchange(&client(), 1)).for_each(|(sum, got)| *sum += got);
        }
        assert_eq!(spread.iter().filter(|count| **count > 0).count(), 3, "{spread:?}");
        // Entries of removed backends can be deleted, and only those.
        let (dead, alive): (Vec<_>, Vec<_>) =
            datapath.sockets().list().unwrap().into_iter().partition(|row| !row.alive);
        assert!(!dead.is_empty() && dead.iter().all(|row| row.backend == backends[chosen]), "{dead:?}");
        datapath.sockets().forget(&dead).unwrap();
        assert_eq!(datapath.sockets().list().unwrap().len(), alive.len());
        datapath.sockets().forget(&alive).unwrap();
    }
    datapath.sockets().detach().unwrap();
}

/// Session affinity is per network namespace, whatever socket is used.
#[test]
fn session_affinity_by_netns() {
    let sandbox = sandbox_or_skip!();
    let (datapath, _cgroup) = node(&sandbox);
    let servers: Vec<TcpListener> =
        (0..8).map(|port| TcpListener::bind(("10.0.0.100", 8080 + port)).unwrap()).collect();
    let backends: Vec<SocketAddr> = servers.iter().map(|server| server.local_addr().unwrap()).collect();
    let vip = address("10.96.0.1:80");
    let place = frontend_key(vip.ip(), 80, 6);
    let held = Frontend { affinity: 100, ..Frontend::default() };
    serve_at(&datapath, 1, &place, held, &backends, 6);
    let drawn = |count| -> std::collections::BTreeSet<SocketAddr> {
        (0..count).for_each(|_| assert_eq!(connecting(vip), 0));
        let rows = datapath.sockets().list().unwrap();
        datapath.sockets().forget(&rows).unwrap();
        rows.iter().map(|row| row.backend).collect()
    };
    let first = drawn(30);
    assert_eq!(first.len(), 1);
    assert_eq!(drawn(10), first);
    // Without affinity they spread: all of 30 at one of eight has a chance of 1 in 10^26.
    serve_at(&datapath, 1, &place, Frontend::default(), &backends, 6);
    assert!(drawn(30).len() > 1);
    datapath.sockets().detach().unwrap();
}

/// The next daemon replaces the programs of the links in place; removal of the cgroup detaches the programs.
#[test]
fn cgroup_links_are_taken_over() {
    let sandbox = sandbox_or_skip!();
    let (datapath, cgroup) = node(&sandbox);
    let server = TcpListener::bind("10.0.0.100:8080").unwrap();
    let vip = address("10.96.0.1:80");
    serve(&datapath, 1, vip, server.local_addr().unwrap(), 6);
    let pins = sandbox.pin_root().join("links");
    let numbers = || -> Vec<u32> {
        let names = terway_abi::names::SOCKET_PROGRAMS.into_iter().chain(terway_abi::names::BIND_PROGRAMS);
        let pin = |name| aya::programs::links::PinnedLink::from_pin(pins.join(format!("socket-{name}"))).unwrap();
        names.map(|name| FdLink::from(pin(name)).info().unwrap().id()).collect()
    };
    let before = numbers();
    drop(datapath);
    assert_eq!(answers(vip, &server), vip, "without a daemon");
    let next = Datapath::open(&Config::new(sandbox.pin_root())).unwrap();
    next.sockets().attach(&cgroup.own).unwrap();
    assert_eq!((numbers(), next.sockets().attached().unwrap()), (before.clone(), 10));
    assert_eq!(answers(vip, &server), vip);
    // Attached to another cgroup: the process is in the old one, and its sockets are not translated any more.
    let other = cgroup.other();
    fs::create_dir(&other).unwrap();
    next.sockets().attach(&other).unwrap();
    // The kernel detaches links asynchronously.
    eventually("the old links are gone", || connecting(vip) == libc::ENETUNREACH);
    // Connections from before still wait to be accepted.
    server.set_nonblocking(true).unwrap();
    while server.accept().is_ok() {}
    server.set_nonblocking(false).unwrap();
    assert!(numbers().iter().all(|number| !before.contains(number)));
    fs::remove_dir(&other).unwrap();
    eventually("programs go with their cgroup", || next.sockets().attached().unwrap() == 0);
    next.sockets().attach(&cgroup.own).unwrap();
    assert_eq!((answers(vip, &server), next.sockets().attached().unwrap()), (vip, 10));
    next.sockets().detach().unwrap();
    assert_eq!(fs::read_dir(&pins).unwrap().count(), 0);
}
