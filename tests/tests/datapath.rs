//! Real traffic through the attached programs: two pods on a node, and a gateway in a namespace that stands for the VPC. The topology is
//! made with `ip`: the suite depends on the datapath only.
//!
//! ```text
//!   pod a ──veth── node ──veth── pod b
//!                   │ eni-1
//!                  gateway (VPC), which also is the remote 10.9.0.9
//! ```

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use terway_abi::{BackendRange, BackendRef, Counter, Frontend, HOOK_INGRESS, PathCounter};
use terway_core::ident::{Addresses, Mac, PodRef};
use terway_core::objects::{self, Change, Object, Objects};
use terway_core::policy::{Compiler, Event, Op};
use terway_daemon::bpf::{Config, Datapath, Endpoint};
use terway_tests::packet::Frame;
use terway_tests::sandbox::{Namespace, Sandbox, command, ifindex, ip};
use terway_tests::sctp::SCTP;
use terway_tests::{prog_harness, sandbox_or_skip};

const ENI_MAC: &str = "02:00:00:00:00:e1";
const GATEWAY_MAC: &str = "02:00:00:00:00:99";

struct World {
    datapath: Datapath,
    a: Namespace,
    b: Namespace,
    vpc: Namespace,
    pods: [Endpoint; 2],
    eni: u32,
}

impl World {
    fn build(sandbox: &Sandbox, config: &Config) -> Self {
        assert!(config.pin_root.starts_with(sandbox.bpffs()));
        command("sysctl", "-qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0")
            .unwrap();
        let vpc = Namespace::new().unwrap();
        ip(&format!(
            "link add eni-1 address {ENI_MAC} type veth peer name gw address {GATEWAY_MAC} netns {}",
            vpc.pid()
        ))
        .unwrap();
        ip("link set eni-1 up").unwrap();
        ip("addr add 10.0.0.100/32 dev eni-1").unwrap();
        ip("-6 addr add fd00::100/128 dev eni-1 nodad").unwrap();
        for line in [
            "link set gw up",
            "addr add 10.0.0.253/32 dev gw",
            "addr add 10.9.0.9/32 dev lo",
            "route add 10.0.0.0/24 dev gw src 10.9.0.9",
            "-6 addr add fd00::fd/128 dev gw nodad",
            "-6 addr add fd09::9/128 dev lo nodad",
            "-6 route add fd00::/64 dev gw src fd09::9",
        ] {
            vpc.ip(line).unwrap();
        }
        // The VPC knows where each address is; nobody has to answer for it.
        for number in [1, 2, 100] {
            vpc.ip(&format!("neigh add 10.0.0.{number} lladdr {ENI_MAC} dev gw nud permanent")).unwrap();
            vpc.ip(&format!("-6 neigh add fd00::{number} lladdr {ENI_MAC} dev gw nud permanent")).unwrap();
        }
        ip(&format!("neigh add 10.0.0.253 lladdr {GATEWAY_MAC} dev eni-1 nud permanent")).unwrap();
        ip(&format!("-6 neigh add fd00::fd lladdr {GATEWAY_MAC} dev eni-1 nud permanent")).unwrap();

        ip("route add default via 10.0.0.253 dev eni-1 onlink table 100").unwrap();
        ip("-6 route add default via fd00::fd dev eni-1 onlink table 100").unwrap();

        let datapath = Datapath::open(config).unwrap();
        let eni = ifindex("eni-1").unwrap();
        let (a, pod_a) = pod(1, eni);
        let (b, pod_b) = pod(2, eni);
        datapath.host_prefixes().set(&["10.0.0.100/32".parse().unwrap(), "fd00::100/128".parse().unwrap()]).unwrap();
        datapath.interfaces().attach_eni(eni).unwrap();
        for endpoint in [&pod_a, &pod_b] {
            datapath.endpoints().upsert(endpoint).unwrap();
            datapath.interfaces().attach_pod(endpoint.host_ifindex).unwrap();
        }
        Self { datapath, a, b, vpc, pods: [pod_a, pod_b], eni }
    }

    fn counter(&self, kind: PathCounter) -> Counter {
        self.datapath.counters().read().unwrap().kind(kind)
    }
}

/// A pod as the veth plan makes it: /32, default route over a link-local gateway whose neighbour entry is permanent.
fn pod(number: u8, eni: u32) -> (Namespace, Endpoint) {
    let namespace = Namespace::new().unwrap();
    let (host_mac, pod_mac) = (Mac([2, 0, 0, 0, 1, number]), Mac([2, 0, 0, 0, 2, number]));
    let host = format!("cali{number}");
    ip(&format!(
        "link add {host} address {host_mac} type veth peer name eth0 address {pod_mac} netns {}",
        namespace.pid()
    ))
    .unwrap();
    ip(&format!("link set {host} up")).unwrap();
    ip(&format!("route add 10.0.0.{number}/32 dev {host}")).unwrap();
    ip(&format!("-6 route add fd00::{number}/128 dev {host}")).unwrap();
    // Without these entries the host would have to resolve the pod's address first, which fails for IPv6 in the interface's first second,
    // during duplicate address detection.
    ip(&format!("neigh add 10.0.0.{number} lladdr {pod_mac} dev {host} nud permanent")).unwrap();
    ip(&format!("-6 neigh add fd00::{number} lladdr {pod_mac} dev {host} nud permanent")).unwrap();
    // Routes of the pod's packets: the host stack looks them up before it sends a "TTL exceeded" error.
    ip(&format!("rule add from 10.0.0.{number} lookup 100")).unwrap();
    ip(&format!("-6 rule add from fd00::{number} lookup 100")).unwrap();
    for line in [
        "link set eth0 up".to_owned(),
        format!("addr add 10.0.0.{number}/32 dev eth0"),
        "route add default via 169.254.1.1 dev eth0 onlink".to_owned(),
        format!("neigh add 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent"),
        format!("-6 addr add fd00::{number}/128 dev eth0 nodad"),
        "-6 route add default via fe80::1 dev eth0 onlink".to_owned(),
        format!("-6 neigh add fe80::1 lladdr {host_mac} dev eth0 nud permanent"),
    ] {
        namespace.ip(&line).unwrap();
    }
    // The kernel accepts packets to an IPv6 address a while after it was added, later on a busy machine (net/ipv6/addrconf.c, addrconf_dad_work).
    let is_accepted = || namespace.run(&format!("ping -c 1 -W 1 fd00::{number}")).is_ok();
    assert!((0..20).any(|_| is_accepted()), "fd00::{number} is not accepted");
    let endpoint = Endpoint {
        host_ifindex: ifindex(&host).unwrap(),
        host_mac,
        pod_mac,
        addresses: Addresses {
            v4: Some(format!("10.0.0.{number}").parse().unwrap()),
            v6: Some(format!("fd00::{number}").parse().unwrap()),
        },
        eni_ifindex: eni,
        gateway_v4: Some("10.0.0.253".parse().unwrap()),
        gateway_v6: Some("fd00::fd".parse().unwrap()),
    };
    (namespace, endpoint)
}

/// Bytes of a bulk transfer, in each direction.
const TRANSFER: u32 = 300_000;

/// An echo server in one namespace returns what a client in another sends.
fn tcp(server: &Namespace, client: &Namespace, address: &str) {
    let address = SocketAddr::new(address.parse::<IpAddr>().unwrap(), 8080);
    let (bound, ready) = std::sync::mpsc::channel();
    let serving = server
        .spawn(move || {
            let listener = TcpListener::bind(address).unwrap();
            bound.send(()).unwrap();
            let (mut stream, peer) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
            peer
        })
        .unwrap();
    ready.recv().unwrap();
    let sent: Vec<u8> = (0..TRANSFER).map(|i| i as u8).collect();
    let expected = sent.clone();
    let received = client
        .spawn(move || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.write_all(&sent).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        })
        .unwrap()
        .join()
        .unwrap();
    serving.join().unwrap();
    assert!(received == expected, "{} of {} bytes came back", received.len(), expected.len());
}

fn ping(from: &Namespace, to: &str) {
    from.run(&format!("ping -c 3 -i 0.05 -W 2 {to}")).unwrap();
}

#[test]
fn pod_to_pod_vpc_and_host() {
    let sandbox = sandbox_or_skip!();
    let world = World::build(&sandbox, &Config::new(sandbox.pin_root()));
    let World { a, b, vpc, .. } = &world;

    for to in ["10.0.0.2", "fd00::2"] {
        ping(a, to);
        tcp(b, a, to);
    }
    // All bytes went from pod to pod, nothing through the host stack. Packets are not counted: segmentation offload merges them, more of
    // them on a faster machine. Both families, there and back.
    assert!(world.counter(PathCounter::PodToPod).bytes > 2 * 2 * u64::from(TRANSFER));
    assert_eq!(world.counter(PathCounter::PodToHost).packets, 0);
    // The host's multicast reports at interface start create no flow.
    let flows = world.datapath.flows().list(1000).unwrap();
    assert!(!flows.is_empty() && flows.iter().all(|flow| flow.hook == HOOK_INGRESS));

    for to in ["10.9.0.9", "fd09::9"] {
        ping(a, to);
        tcp(vpc, b, to);
    }
    for path in [PathCounter::PodToVpc, PathCounter::VpcToPod] {
        assert!(world.counter(path).bytes > 2 * u64::from(TRANSFER), "{path:?}");
    }
    for (pod, to) in [(a, "10.0.0.1"), (b, "fd00::2")] {
        ping(vpc, to);
        tcp(pod, vpc, to);
    }
    assert_eq!(world.counter(PathCounter::PodToHost).packets, 0);

    // The host reaches its pods, and they it.
    for to in ["10.0.0.100", "fd00::100"] {
        ping(a, to);
    }
    for to in ["10.0.0.1", "fd00::2"] {
        command("ping", &format!("-c 2 -i 0.05 -W 2 {to}")).unwrap();
    }
    assert!(world.counter(PathCounter::HostToPod).packets > 5 && world.counter(PathCounter::PodToHost).packets > 5);
    assert_eq!(drops(&world.datapath), Vec::<&str>::new());
}

#[test]
fn vlan_tagged_frames_are_dropped() {
    let sandbox = sandbox_or_skip!();
    let world = World::build(&sandbox, &Config::new(sandbox.pin_root()));
    let (host, pod) = (world.pods[0].host_mac.0, world.pods[0].pod_mac.0);
    let plain = Frame::new(host, pod).ip("10.0.0.1", "10.9.0.9").udp(1, 9).build();
    // The tag of VLAN 7 behind the addresses.
    let tagged = [&plain[..12], &[0x81, 0x00, 0x00, 0x07], &plain[12..]].concat();
    for (frame, reason) in [(plain, 0), (tagged, 1)] {
        world.a.spawn(move || send_raw("eth0", &frame)).unwrap().join().unwrap();
        let counters = world.datapath.counters().read().unwrap();
        assert_eq!(counters.drop(terway_abi::Drop::VlanTagged).packets, reason);
        assert_eq!(counters.kind(PathCounter::PodToVpc).packets, 1);
    }
}

/// Sends a frame as it is (`AF_PACKET`, `SOCK_RAW`).
fn send_raw(interface: &str, frame: &[u8]) {
    use nix::libc;
    // SAFETY: plain system calls on a descriptor that is ours; the address is initialised and lives through the call.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(socket >= 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = nix::net::if_::if_nametoindex(interface).unwrap().cast_signed();
        let length = size_of::<libc::sockaddr_ll>() as u32;
        let sent = libc::sendto(socket, frame.as_ptr().cast(), frame.len(), 0, (&raw const address).cast(), length);
        libc::close(socket);
        assert_eq!(sent, frame.len().cast_signed());
    }
}

/// The drop reasons that were counted, without the multicast that IPv6 sends on each new interface.
fn drops(datapath: &Datapath) -> Vec<&'static str> {
    let counters = datapath.counters().read().unwrap();
    let dropped = terway_abi::Drop::ALL.iter().filter(|reason| counters.drop(**reason).packets > 0);
    dropped.filter(|reason| **reason != terway_abi::Drop::Multicast).map(|reason| reason.name()).collect()
}

#[test]
fn eni_with_clsact() {
    let sandbox = sandbox_or_skip!();
    let config = Config { force_clsact: true, ..Config::new(sandbox.pin_root()) };
    let world = World::build(&sandbox, &config);
    for to in ["10.9.0.9", "fd09::9"] {
        ping(&world.a, to);
        tcp(&world.vpc, &world.b, to);
    }
    assert!(world.counter(PathCounter::VpcToPod).bytes > 2 * u64::from(TRANSFER));
    world.datapath.interfaces().detach_eni(world.eni).unwrap();
    assert!(!command("tc", "filter show dev eni-1 ingress").unwrap().contains("terway"));
}

#[test]
fn ttl_expiry_fragments_and_icmp_errors() {
    let sandbox = sandbox_or_skip!();
    let world = World::build(&sandbox, &Config::new(sandbox.pin_root()));
    // The first hop's error comes from the node: `ping -t 1` fails, and says who answered.
    let answered = world.a.run("ping -c 1 -W 2 -t 1 10.9.0.9").unwrap_err().to_string();
    assert!(answered.contains("Time to live exceeded"), "{answered}");
    let answered = world.a.run("ping -c 1 -W 2 -t 1 fd09::9").unwrap_err().to_string();
    assert!(answered.contains("Hop limit"), "{answered}");
    assert_eq!(world.counter(PathCounter::TtlExpired).packets, 2);
    // 4 000 bytes are three fragments on a 1 500-byte link.
    for to in ["10.0.0.2", "10.9.0.9", "fd00::2", "fd09::9"] {
        world.a.run(&format!("ping -c 2 -i 0.05 -W 2 -s 4000 {to}")).unwrap();
    }
    // The ICMP error of a closed port is delivered to the sender.
    let refused = world
        .a
        .spawn(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("10.9.0.9:9").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket.send(b"x").unwrap();
            socket.recv(&mut [0; 1]).unwrap_err().kind()
        })
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);
    assert_eq!(drops(&world.datapath), Vec::<&str>::new());
}

#[test]
fn connections_survive_daemon_restart() {
    let sandbox = sandbox_or_skip!();
    let config = Config::new(sandbox.pin_root());
    let world = World::build(&sandbox, &config);
    let (bound, ready) = std::sync::mpsc::channel();
    let server = world
        .vpc
        .spawn(move || {
            let listener = TcpListener::bind("10.9.0.9:8080").unwrap();
            bound.send(()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        })
        .unwrap();
    ready.recv().unwrap();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (wrote, written) = std::sync::mpsc::channel();
    let client = world
        .a
        .spawn(move || {
            let mut stream = TcpStream::connect("10.9.0.9:8080").unwrap();
            for part in ["one ", "two ", "three"] {
                stream.write_all(part.as_bytes()).unwrap();
                wrote.send(()).unwrap();
                wait.recv().unwrap();
            }
        })
        .unwrap();
    written.recv().unwrap();

    let World { datapath, pods, eni, a, b, vpc } = world;
    let flows = datapath.flows().count().unwrap();
    let made = datapath.counters().read().unwrap().kind(PathCounter::FlowNew).packets;
    drop(datapath);
    // No daemon runs: packets are forwarded all the same.
    ping(&a, "10.0.0.2");
    go.send(()).unwrap();
    written.recv().unwrap();

    let datapath = Datapath::open(&config).unwrap();
    assert_eq!(datapath.endpoints().list(), pods);
    let links = if datapath.features().tcx { vec![eni] } else { vec![] };
    assert_eq!(datapath.interfaces().attached_enis().unwrap(), links);
    datapath.interfaces().attach_eni(eni).unwrap();
    for endpoint in &pods {
        datapath.endpoints().upsert(endpoint).unwrap();
        datapath.interfaces().attach_pod(endpoint.host_ifindex).unwrap();
    }
    go.send(()).unwrap();
    written.recv().unwrap();
    go.send(()).unwrap();
    client.join().unwrap();
    assert_eq!(server.join().unwrap(), b"one two three");
    assert!(datapath.flows().count().unwrap().0 >= flows.0);
    // Only the ping above created a flow: the restart has invalidated none.
    let counters = datapath.counters().read().unwrap();
    assert_eq!(
        (counters.kind(PathCounter::FlowNew).packets - made, counters.kind(PathCounter::FlowStale).packets),
        (1, 0)
    );

    // A removed endpoint is cut off at once, with established flows.
    assert!(datapath.endpoints().remove(pods[0].host_ifindex).unwrap());
    assert!(a.run("ping -c 1 -W 0.3 10.0.0.2").is_err());
    assert!(vpc.run("ping -c 1 -W 0.3 10.0.0.2").is_ok());
    assert!(b.run("ping -c 1 -W 0.3 10.9.0.9").is_ok());
    datapath.interfaces().detach_eni(eni).unwrap();
    assert_eq!(datapath.interfaces().attached_enis().unwrap(), [0_u32; 0]);
}

/// A socket of SCTP, one association at a time (`sctp(7)`), bound to one address: an end with several would tell of all of them, and be
/// talked to at each.
fn sctp_socket(at: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::from(i32::from(SCTP))))?;
    socket.bind(&at.into())?;
    Ok(socket)
}

/// An association of `client` at `own` with a server on `server` at `real`, by way of `to`; the client may be kept waiting.
fn sctp(server: &Namespace, real: SocketAddr, client: &Namespace, own: IpAddr, to: SocketAddr) -> std::io::Result<()> {
    let (bound, ready) = std::sync::mpsc::channel();
    let serving = server
        .spawn(move || -> std::io::Result<_> {
            let socket = sctp_socket(real)?;
            socket.listen(1)?;
            bound.send(()).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(4)))?;
            let (stream, peer) = socket.accept()?;
            let mut stream = TcpStream::from(stream);
            let mut bytes = [0; 1000];
            stream.read_exact(&mut bytes)?;
            stream.write_all(&bytes)?;
            Ok(peer.as_socket().unwrap().ip())
        })
        .unwrap();
    ready.recv().unwrap();
    let asking = client.spawn(move || -> std::io::Result<_> {
        let socket = sctp_socket(SocketAddr::new(own, 0))?;
        socket.connect_timeout(&to.into(), Duration::from_secs(3))?;
        let peer = socket.peer_addr()?.as_socket().unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(&[7; 1000])?;
        let mut bytes = [0; 1000];
        stream.read_exact(&mut bytes)?;
        Ok((peer, bytes))
    });
    let asked = asking.unwrap().join().unwrap();
    let seen = serving.join().unwrap();
    let (peer, bytes) = asked?;
    assert_eq!((peer, bytes), (to, [7; 1000]));
    assert_eq!(seen?, own, "as whom the client is seen");
    Ok(())
}

/// SCTP associations, if the kernel supports SCTP: directly, through a Service, and under a policy.
#[test]
fn sctp_service_and_policy() {
    let sandbox = sandbox_or_skip!();
    if let Err(error) = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(i32::from(SCTP)))) {
        println!("SKIP: this kernel has no SCTP: {error}");
        return;
    }
    let world = World::build(&sandbox, &Config::new(sandbox.pin_root()));
    let World { datapath, a, b, pods, .. } = &world;
    let families = [("10.0.0.1", "10.0.0.2", "10.96.0.1"), ("fd00::1", "fd00::2", "fd96::1")];
    let at = |text: &str| SocketAddr::new(text.parse().unwrap(), 8080);
    for (number, (own, real, vip)) in (1..).zip(families) {
        sctp(b, at(real), a, own.parse().unwrap(), at(real)).unwrap();
        let backend = prog_harness::backend(real, 8080, SCTP);
        datapath.services().set_backend(number, &backend).unwrap();
        datapath
            .services()
            .set_members(number, &[BackendRef { backend: number, generation: backend.generation }])
            .unwrap();
        let run = BackendRange { first: number, count: 1 };
        let frontend = Frontend { service: number, internal: run, external: run, ..Frontend::default() };
        datapath.services().set_frontend(&prog_harness::at(vip, 8080, SCTP), &frontend).unwrap();
        sctp(b, at(real), a, own.parse().unwrap(), at(vip)).unwrap();
    }

    let (mut compiler, ops) = Compiler::new();
    let apply = |ops: Vec<Op>| ops.iter().for_each(|op| datapath.policies().apply(op).unwrap());
    apply(ops);
    let mut objects = Objects::default();
    for (pod, name) in pods.iter().zip(["a", "b"]) {
        let (slot, _) = datapath.endpoints().reserve_slot(pod.host_ifindex).unwrap();
        let named = PodRef { namespace: "x".to_owned(), name: name.to_owned(), uid: String::new() };
        apply(compiler.step(Event::Attach { slot, pod: named, addresses: pod.addresses }));
    }
    let mut put = |kind, document: &Value| {
        let change = Change::Upsert(Box::new(Object::read(kind, document).unwrap()));
        if let Some(event) = objects.apply(change).and_then(Event::from_applied) {
            apply(compiler.step(event));
        }
    };
    for name in ["a", "b"] {
        put(objects::Kind::Pod, &json!({"metadata": {"namespace": "x", "name": name, "labels": {"pod": name}}}));
    }
    for (protocol, passes) in [("SCTP", true), ("TCP", false)] {
        put(
            objects::Kind::NetworkPolicy,
            &json!({
                "metadata": {"namespace": "x", "name": "p"},
                "spec": {
                    "podSelector": {"matchLabels": {"pod": "b"}},
                    "ingress": [{"ports": [{"protocol": protocol, "port": 8080}]}],
                },
            }),
        );
        for (own, real, vip) in families {
            for to in [real, vip] {
                let outcome = sctp(b, at(real), a, own.parse().unwrap(), at(to));
                assert_eq!(outcome.is_ok(), passes, "to {to}, {protocol} allowed: {outcome:?}");
            }
        }
    }
}
