//! The VPC against the kernel: what it carries, and that it drops what it must not carry.

use std::time::{Duration, Instant};

use super::*;

struct TestNode {
    ns: Arc<NetNs>,
    eni: FabricEni,
}

fn eni(id: &str, primary: bool, host: u8) -> FabricEni {
    FabricEni {
        id: EniId::new(id),
        mac: Mac::derived(&[id.as_bytes()]),
        primary,
        vswitch: VSwitchId::new("vsw-a"),
        cidr_v4: "10.7.0.0/24".parse().unwrap(),
        gateway_v4: "10.7.0.253".parse().unwrap(),
        cidr_v6: Some("fd07::/64".parse().unwrap()),
        gateway_v6: Some("fd07::fffd".parse().unwrap()),
        v4: vec![Ipv4Addr::new(10, 7, 0, host)],
        v6: vec![Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, u16::from(host))],
    }
}

fn node(vpc: &Vpc, name: &str, host: u8) -> TestNode {
    let ns = Arc::new(NetNs::create(name).unwrap());
    vpc.add_node(name, Arc::clone(&ns));
    let eni = eni(&format!("eni-{name}"), true, host);
    vpc.hotplug(name, &eni).unwrap();
    configure_primary(&ns, &eni).unwrap();
    TestNode { ns, eni }
}

fn pings(from: &NetNs, args: &[&str]) -> bool {
    let mut args = args.to_vec();
    args.extend(["-c", "1", "-W", "1", "-n"]);
    from.output("ping", &args).is_ok()
}

fn setup(tag: &str) -> Option<(Vpc, String)> {
    let prefix = format!("fabric-{tag}{}", std::process::id());
    match Vpc::create(&format!("{prefix}-vpc"), 1500) {
        Ok(vpc) => Some((vpc, prefix)),
        Err(error) => {
            println!("SKIP: {error:#}");
            assert!(!nix::unistd::geteuid().is_root(), "root can make a VPC: {error:#}");
            None
        }
    }
}

#[test]
fn instances_reach_each_other_their_gateway_and_servers_of_the_vpc() {
    let Some((vpc, prefix)) = setup("a") else { return };
    let start = Instant::now();
    let a = node(&vpc, &format!("{prefix}-a"), 1);
    assert!(start.elapsed() < Duration::from_secs(3), "a node took {:?}", start.elapsed());
    let b = node(&vpc, &format!("{prefix}-b"), 2);
    for target in ["10.7.0.2", "10.7.0.253", "fd07::2", "fd07::fffd"] {
        assert!(pings(&a.ns, &[target]), "{target}");
    }
    assert!(pings(&b.ns, &["10.7.0.1"]));
    assert!(!pings(&a.ns, &["10.7.0.9"]), "nobody has 10.7.0.9");
    let listener = vpc.listen("100.100.100.200:80".parse().unwrap()).unwrap();
    let peer = std::thread::scope(|scope| {
        let server = scope.spawn(|| listener.accept().unwrap().1);
        a.ns.run(|| std::net::TcpStream::connect("100.100.100.200:80").unwrap()).unwrap();
        server.join().unwrap()
    });
    assert_eq!(peer.ip().to_string(), "10.7.0.1");
    let ext = Arc::new(NetNs::create(&format!("{prefix}-x")).unwrap());
    vpc.attach_external_host("x", Arc::clone(&ext), Ipv4Addr::new(10, 99, 0, 5), "fd99::5".parse().unwrap()).unwrap();
    assert!(pings(&ext, &["10.7.0.1"]) && pings(&ext, &["fd07::2"]));
    assert_eq!(vpc.spoofed().unwrap(), Spoofed::default());
    vpc.delete().unwrap();
}

#[test]
fn prefixes_in_fabric() {
    let Some((vpc, prefix)) = setup("p") else { return };
    let a = node(&vpc, &format!("{prefix}-a"), 1);
    let b = node(&vpc, &format!("{prefix}-b"), 2);
    a.ns.ip("addr add 10.7.0.20/32 dev eth0\naddr add fd07:0:0:0:8000::9/128 dev eth0 nodad\n").unwrap();
    let (v4, v6) = (["10.7.0.16/28".parse().unwrap()], ["fd07:0:0:0:8000::/80".parse().unwrap()]);
    let own = ["10.7.0.20", "fd07::8000:0:0:9"];
    assert!(!pings(&a.ns, &["-I", own[0], "10.7.0.2"]) && !pings(&a.ns, &["-I", own[1], "fd07::2"]));
    vpc.set_prefixes(&a.eni.id, &v4, &v6).unwrap();
    assert!(pings(&b.ns, &own[..1]) && pings(&b.ns, &own[1..]));
    assert!(pings(&a.ns, &["-I", own[0], "10.7.0.2"]) && pings(&a.ns, &["-I", own[1], "fd07::2"]));
    let before = vpc.spoofed().unwrap();
    a.ns.ip("addr add 10.7.0.32/32 dev eth0\n").unwrap();
    assert!(!pings(&a.ns, &["-I", "10.7.0.32", "10.7.0.2"]), "the next address after the prefix");
    vpc.set_prefixes(&a.eni.id, &[], &v6).unwrap();
    assert!(!pings(&a.ns, &["-I", own[0], "10.7.0.2"]) && pings(&a.ns, &["-I", own[1], "fd07::2"]));
    assert_eq!(vpc.spoofed().unwrap().v4, before.v4 + 2);
    vpc.hot_unplug("", &a.eni.id, a.eni.mac).unwrap();
    vpc.delete().unwrap();
}

#[test]
fn eni_source_check_of_fabric() {
    let Some((vpc, prefix)) = setup("s") else { return };
    let a = node(&vpc, &format!("{prefix}-a"), 1);
    let b = node(&vpc, &format!("{prefix}-b"), 2);
    // An address that was never assigned.
    a.ns.ip("addr add 10.7.0.7/32 dev eth0\naddr add fd07::7/128 dev eth0 nodad\n").unwrap();
    assert!(!pings(&a.ns, &["-I", "10.7.0.7", "10.7.0.2"]));
    assert!(!pings(&a.ns, &["-I", "fd07::7", "fd07::2"]));
    assert_eq!(vpc.spoofed().unwrap(), Spoofed { mac: 0, v4: 1, v6: 1 });
    // Assigned, it passes; unassigned again, it is dropped again.
    let (v4, v6) = (["10.7.0.1".parse().unwrap(), "10.7.0.7".parse().unwrap()], ["fd07::7".parse().unwrap()]);
    vpc.set_addresses(&a.eni.id, &v4, &v6).unwrap();
    assert!(pings(&a.ns, &["-I", "10.7.0.7", "10.7.0.2"]) && pings(&a.ns, &["-I", "fd07::7", "fd07::2"]));
    assert!(pings(&b.ns, &["10.7.0.7"]));
    vpc.set_addresses(&a.eni.id, &a.eni.v4, &a.eni.v6).unwrap();
    assert!(!pings(&a.ns, &["-I", "10.7.0.7", "10.7.0.2"]));
    assert_eq!(vpc.spoofed().unwrap(), Spoofed { mac: 0, v4: 2, v6: 1 });
    // The right address by the wrong ENI, and a foreign MAC.
    let second = eni("eni-second", false, 3);
    vpc.hotplug(&format!("{prefix}-a"), &second).unwrap();
    assert!(a.ns.output("ip", &["-br", "link"]).unwrap().contains("eth1"));
    a.ns.ip("link set eth1 up\nroute add 10.7.0.2 via 10.7.0.253 dev eth1 onlink src 10.7.0.1\n").unwrap();
    assert!(!pings(&a.ns, &["10.7.0.2"]));
    assert_eq!(vpc.spoofed().unwrap(), Spoofed { mac: 0, v4: 3, v6: 1 });
    a.ns.ip(
        "route del 10.7.0.2\nlink set eth0 address 02:00:00:00:00:99\nroute replace default via 10.7.0.253 dev eth0\n",
    )
    .unwrap();
    assert!(!pings(&a.ns, &["10.7.0.2"]));
    assert!(vpc.spoofed().unwrap().mac >= 1);
    // Unplugged, the NIC is gone from the node, and unplugging again is no error.
    for _ in 0..2 {
        vpc.hot_unplug("", &second.id, second.mac).unwrap();
    }
    assert!(!a.ns.output("ip", &["-br", "link"]).unwrap().contains("eth1"));
    assert_eq!(vpc.addresses().len(), 2);
    vpc.delete().unwrap();
}
