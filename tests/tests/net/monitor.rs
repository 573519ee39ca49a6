//! What the kernel tells of NICs and addresses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::ident::Mac;
use terway_daemon::net::{NetMonitor, NicEvent};
use tokio::time::Instant as TokioInstant;

use crate::rig::{Netns, Node, Stack, ifindex, skipped};

#[test]
fn nics_are_found_when_they_appear() {
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
            async move { watch.wait_for_mac(mac, TokioInstant::now() + Duration::from_secs(10)).await }
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
            match tokio::time::timeout(Duration::from_secs(5), events.recv()).await.unwrap().unwrap() {
                NicEvent::Present(nic) => seen.push(nic.name),
                NicEvent::Removed(nic) => panic!("{nic:?}"),
            }
        }
        assert!(watch.nics().iter().any(|nic| nic.name == "ens7" && nic.mac == late));
        node.vpc.ip("link del nic-peer");
        let gone = loop {
            if let NicEvent::Removed(nic) =
                tokio::time::timeout(Duration::from_secs(5), events.recv()).await.unwrap().unwrap()
            {
                break nic;
            }
        };
        assert_eq!(gone.mac, late);
        assert!(!watch.nics().iter().any(|nic| nic.mac == late));
    });
}

#[test]
fn our_own_links_are_no_nics_and_floods_end_in_the_truth() {
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
    let found = node.runtime.block_on(watch.wait_for_mac(last, TokioInstant::now() + Duration::from_secs(10)));
    assert!(found.is_some());
    // The peer of "last" may be told of before or after it.
    let deadline = Instant::now() + Duration::from_secs(5);
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
fn addresses_are_told_as_they_change() {
    if skipped() {
        return;
    }
    let node = Node::new(Stack::Dual);
    let watch = node.host.monitor().unwrap();
    let mut addresses = watch.addresses();
    assert!(addresses.borrow_and_update().is_empty(), "neither loopback nor link-local counts");
    let mut change = || {
        let change = async { tokio::time::timeout(Duration::from_secs(5), addresses.changed()).await };
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
