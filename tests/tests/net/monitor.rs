//! The monitor of rtnetlink events: NICs, addresses, deletions by others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::ident::Mac;
use terway_daemon::net::{NetMonitor, NicEvent};
use tokio::time::Instant as TokioInstant;

use crate::rig::{Netns, Node, Stack, ifindex, skipped};

/// Time limit for an event; none of the tests depends on how soon it comes.
const EVENT: Duration = Duration::from_secs(30);

#[test]
fn nic_is_found_by_mac_when_it_appears() {
    if skipped() {
        return;
    }
    let node = Node::new(Stack::V4);
    let watch = Arc::new(node.host.monitor().unwrap());
    let late: Mac = "00:16:3e:00:00:01".parse().unwrap();
    node.runtime.block_on(async {
        // Nothing there: the deadline counts.
        let start = Instant::now();
        assert_eq!(watch.wait_for_mac(late, TokioInstant::now() + Duration::from_millis(30)).await, None);
        assert!(start.elapsed() >= Duration::from_millis(30));

        let mut events = watch.events();
        let wait = |mac: Mac| {
            let watch: Arc<NetMonitor> = Arc::clone(&watch);
            async move { watch.wait_for_mac(mac, TokioInstant::now() + EVENT).await }
        };
        let waiters: Vec<_> = (0..20).map(|_| tokio::spawn(wait(late))).collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        // The NIC arrives as in the simulated cloud: moved in from the VPC.
        node.vpc.ip("link add nic address 00:16:3e:00:00:01 type veth peer name nic-peer");
        node.vpc.ip(&format!("link set nic netns {} name eth2", node.netns.path()));
        for waiter in waiters {
            let nic = waiter.await.unwrap().expect("the NIC is there");
            assert_eq!(nic.ifindex, ifindex(&node.netns, "eth2"));
            // The kernel moves it first and renames it then, and tells both.
            assert!(["nic", "eth2"].contains(&nic.name.as_str()), "{nic:?}");
        }
        // A later rename, as udev's, is seen; and so is the end.
        node.netns.ip("link set eth2 name ens7");
        let mut seen = Vec::new();
        while !seen.contains(&"ens7".to_owned()) {
            match tokio::time::timeout(EVENT, events.recv()).await.unwrap().unwrap() {
                NicEvent::Present(nic) => seen.push(nic.name),
                NicEvent::Removed(nic) => panic!("{nic:?}"),
            }
        }
        assert!(watch.nics().iter().any(|nic| nic.name == "ens7" && nic.mac == late));
        node.vpc.ip("link del nic-peer");
        let gone = loop {
            if let NicEvent::Removed(nic) = tokio::time::timeout(EVENT, events.recv()).await.unwrap().unwrap() {
                break nic;
            }
        };
        assert_eq!(gone.mac, late);
        assert!(!watch.nics().iter().any(|nic| nic.mac == late));
    });
}

#[test]
fn pod_links_are_no_nics_and_a_flood_of_link_events_is_survived() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let watch = node.host.monitor().unwrap();
    let (pod, plan) = (Netns::new(), node.plan(Stack::V4, "c1", "web", 7));
    node.up(&plan, &pod);
    let batch: String = (0..300)
        .map(|i| format!("link add f{i} type veth peer name g{i}\nlink set f{i} mtu 1400\n"))
        .chain((0..300).filter(|i| i % 100 != 0).map(|i| format!("link del f{i}\n")))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), batch).unwrap();
    node.netns.ip(&format!("-batch {}", file.path().display()));
    let last: Mac = "02:00:00:00:00:77".parse().unwrap();
    node.netns.ip("link add last address 02:00:00:00:00:77 type veth peer name last-peer");
    let found = node.runtime.block_on(watch.wait_for_mac(last, TokioInstant::now() + EVENT));
    assert!(found.is_some());
    // The peer of "last" may be told of before or after it.
    let deadline = Instant::now() + EVENT;
    let expected = ["eth1", "f0", "f100", "f200", "g0", "g100", "g200", "last", "last-peer"];
    loop {
        let mut names: Vec<String> = watch.nics().into_iter().map(|nic| nic.name).collect();
        names.sort();
        if names == expected {
            break;
        }
        assert!(Instant::now() < deadline, "{names:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn host_addresses_follow_address_events() {
    if skipped() {
        return;
    }
    let node = Node::new(Stack::Dual);
    let watch = node.host.monitor().unwrap();
    let mut addresses = watch.addresses();
    assert!(addresses.borrow_and_update().is_empty(), "neither loopback nor link-local counts");
    let mut change = || {
        let change = async { tokio::time::timeout(EVENT, addresses.changed()).await };
        node.runtime.block_on(change).unwrap().unwrap();
        addresses.borrow_and_update().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    node.netns.ip("addr add 169.254.20.10/32 dev lo");
    assert_eq!(change(), ["169.254.20.10/32"]);
    node.netns.ip("-6 addr add fd00::5/64 dev eth1 nodad");
    assert_eq!(change(), ["169.254.20.10/32", "fd00::5/64"]);
    node.netns.ip("addr del 169.254.20.10/32 dev lo");
    assert_eq!(change(), ["fd00::5/64"]);
    let listed = node.runtime.block_on(node.host.host_addresses()).unwrap();
    assert_eq!(listed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::5/64"]);
}

#[test]
fn addresses_of_kube_ipvs0_are_not_the_nodes() {
    if skipped() {
        return;
    }
    let node = Node::new(Stack::Dual);
    let watch = node.host.monitor().unwrap();
    let mut addresses = watch.addresses();
    let mut known = |wanted: &[&str]| {
        let is_wanted =
            |all: &Arc<Vec<ipnetwork::IpNetwork>>| all.iter().map(ToString::to_string).eq(wanted.iter().copied());
        let seen = async { tokio::time::timeout(EVENT, addresses.wait_for(is_wanted)).await.unwrap().map(drop) };
        node.runtime.block_on(seen).unwrap();
        let listed = node.runtime.block_on(node.host.host_addresses()).unwrap();
        assert_eq!(listed.iter().map(ToString::to_string).collect::<Vec<_>>(), wanted);
    };
    // As kube-proxy's IPVS mode does, but for the type of the link, which not every kernel has; the last address says that the events before it have been read.
    node.netns.ip("link add kube-ipvs0 type veth peer name other");
    node.netns.ip("addr add 172.16.0.1/32 dev kube-ipvs0");
    node.netns.ip("-6 addr add fd00:77::1/128 dev kube-ipvs0 nodad");
    node.netns.ip("addr add 192.0.2.1/32 dev lo");
    known(&["192.0.2.1/32"]);
    // A link of another name, as of a node-local DNS cache, has addresses of the node.
    node.netns.ip("link set kube-ipvs0 name nodelocaldns");
    known(&["172.16.0.1/32", "192.0.2.1/32", "fd00:77::1/128"]);
    node.netns.ip("link set nodelocaldns name kube-ipvs0");
    known(&["192.0.2.1/32"]);
    // A monitor that starts over the leftover sees the same.
    assert_eq!(node.host.monitor().unwrap().addresses().borrow().len(), 1);
    node.netns.ip("link del kube-ipvs0");
    node.netns.ip("addr add 172.16.0.1/32 dev lo");
    known(&["172.16.0.1/32", "192.0.2.1/32"]);
}

#[test]
fn deletions_by_others_are_reported_and_our_own_are_not() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let monitor = node.host.monitor().unwrap();
    let (mut deletions, mut addresses) = (monitor.deletions(), monitor.addresses());
    let (pod, plan) = (Netns::new(), node.plan(Stack::Dual, "c1", "web", 7));
    // Events arrive in order: once this address is known, so is what happened before it.
    let mut last = 0;
    let mut has_deletions = |deletions: &mut tokio::sync::watch::Receiver<u64>| {
        last += 1;
        let marker = format!("169.254.20.{last}/32");
        node.netns.ip(&format!("addr add {marker} dev lo"));
        let seen = addresses.wait_for(|all| all.iter().any(|network| network.to_string() == marker));
        node.runtime.block_on(async { tokio::time::timeout(EVENT, seen).await.unwrap().map(drop).unwrap() });
        let has_changed = deletions.has_changed().unwrap();
        deletions.mark_unchanged();
        has_changed
    };
    let name = &plan.inputs.host_ifname;
    for deletion in [
        "rule del priority 512".to_owned(),
        "-6 rule del priority 2048".to_owned(),
        format!("route del 10.0.1.7/32 dev {name}"),
        format!("-6 route del fd00:1::7/128 dev {name}"),
        format!("route del default table {}", terway_core::route::eni_table(node.eni.inputs.ifindex)),
        "addr del 10.0.0.9/32 dev eth1".to_owned(),
        "-6 addr del fd00:1::9/128 dev eth1".to_owned(),
    ] {
        node.ensure_eni();
        node.up(&plan, &pod);
        assert!(!has_deletions(&mut deletions), "before {deletion}");
        node.netns.ip(&deletion);
        assert!(has_deletions(&mut deletions), "{deletion}");
    }
    node.ensure_eni();
    node.up(&plan, &pod);
    // Things of others that look alike.
    node.netns.ip("rule add from 10.9.9.9 lookup 1999 priority 2048");
    node.netns.ip("rule del from 10.9.9.9 lookup 1999 priority 2048");
    node.netns.ip("route add 10.9.9.9/32 dev eth1");
    node.netns.ip("route del 10.9.9.9/32 dev eth1");
    assert!(!has_deletions(&mut deletions));
    node.down(&plan);
    assert!(!has_deletions(&mut deletions), "the teardown is ours");
}
