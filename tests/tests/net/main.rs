//! Rung netns, subject net: plans against the real kernel, in network namespaces that live as long as their test. The expected state is
//! compared with what `ip` shows.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, where the backtrace points at it")]

mod monitor;
mod rig;

use std::fs::File;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use terway_core::errors::{self, Error};
use terway_core::route::{KnownResources, NetOp, PodPlan, Rule, Step, alias, eni_table, orphans};
use terway_daemon::net::{NetError, PodNetns};

use rig::{
    FAR_V4, FAR_V6, NODE_V4, Netns, Node, Stack, exchange, futures, ifindex, node_and_far, skipped, unreachable,
};

fn applied_and_undone(stack: Stack) {
    let node = Node::new(stack);
    let bare = node.netns.everything();
    node.ensure_eni();
    let found = node.runtime.block_on(node.host.check(node.eni.steps.clone(), None)).unwrap();
    assert_eq!(found, []);
    let with_eni = node.netns.everything();

    let pod = Netns::new();
    let empty_pod = pod.everything();
    let plan = node.plan(stack, "c1", "web", 7);
    let netns = PodNetns::open(pod.path()).unwrap();
    let links = node.runtime.block_on(node.host.create_pod(&plan, &netns)).unwrap();
    assert_eq!(links.host_ifindex, ifindex(&node.netns, &plan.inputs.host_ifname));
    assert_eq!(links.pod_ifindex, ifindex(&pod, "eth0"));
    let ends = [pod.ip("-d link show eth0"), node.netns.ip(&format!("-d link show {}", plan.inputs.host_ifname))];
    assert!(ends.iter().all(|end| end.contains("numtxqueues 1 numrxqueues 1 ")), "{ends:?}");
    // Created is not open: neither end is up, and nothing leads there.
    assert!(!pod.ip("-o link show eth0").contains(",UP"));
    assert!(!node.netns.ip(&format!("-o link show {}", plan.inputs.host_ifname)).contains(",UP"));
    for address in plan.inputs.addresses.iter() {
        let (node_address, _) = node_and_far(address);
        assert!(unreachable(&pod, address, &node.netns, node_address));
    }

    node.runtime.block_on(node.host.enable_pod(&plan, &netns, links)).unwrap();
    // The first packets pass, in both directions: nothing is left to resolve or to come up.
    for address in plan.inputs.addresses.iter() {
        let (node_address, far) = node_and_far(address);
        exchange(&node.netns, node_address, &pod, address).unwrap();
        exchange(&pod, address, &node.netns, node_address).unwrap();
        exchange(&pod, address, &node.vpc, far).unwrap();
    }
    assert_eq!(node.problems(&plan, &pod), Vec::<String>::new());
    assert!(!pod.ip("-6 addr show dev eth0").contains("fe80"), "the pod must have no link-local address");
    let table = eni_table(node.eni.inputs.ifindex);
    for address in plan.inputs.addresses.iter() {
        let (rules, bits) = match address {
            IpAddr::V4(_) => (node.netns.ip("rule"), ""),
            IpAddr::V6(_) => (node.netns.ip("-6 rule"), ""),
        };
        assert!(rules.contains(&format!("512:\tfrom all to {address}{bits} lookup main\n")), "{rules}");
        assert!(rules.contains(&format!("2048:\tfrom {address}{bits} lookup {table}\n")), "{rules}");
    }

    node.runtime.block_on(node.host.detach_pod(&plan)).unwrap();
    for address in plan.inputs.addresses.iter() {
        let (node_address, _) = node_and_far(address);
        assert!(unreachable(&node.netns, node_address, &pod, address), "still reachable");
    }
    node.runtime.block_on(node.host.delete_link(&plan)).unwrap();
    assert_eq!(node.netns.everything(), with_eni);
    assert_eq!(pod.everything(), empty_pod);

    node.runtime.block_on(node.host.remove_eni(&node.eni)).unwrap();
    assert_eq!(node.netns.everything(), bare);
}

#[test]
fn plans_are_applied_and_undone_v4() {
    if !skipped() {
        applied_and_undone(Stack::V4);
    }
}

#[test]
fn plans_are_applied_and_undone_v6() {
    if !skipped() {
        applied_and_undone(Stack::V6);
    }
}

#[test]
fn plans_are_applied_and_undone_dual_stack() {
    if !skipped() {
        applied_and_undone(Stack::Dual);
    }
}

#[test]
fn plans_are_idempotent() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let before = node.netns.everything();
    node.runtime.block_on(node.host.ensure_eni(&node.eni)).unwrap();
    assert_eq!(node.netns.everything(), before);

    let (pod, plan) = (Netns::new(), node.plan(Stack::Dual, "c1", "web", 7));
    let first = node.up(&plan, &pod);
    let (host_once, pod_once) = (node.netns.everything(), pod.everything());
    assert_eq!(node.up(&plan, &pod), first, "the pair that is there is used again");
    assert_eq!((node.netns.everything(), pod.everything()), (host_once, pod_once));
    node.down(&plan);
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);

    node.runtime.block_on(node.host.remove_eni(&node.eni)).unwrap();
    node.runtime.block_on(node.host.remove_eni(&node.eni)).unwrap();
}

#[test]
fn ipv6_is_enabled_in_a_sandbox_that_disabled_it() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let (pod, plan) = (Netns::new(), node.plan(Stack::Dual, "c1", "web", 7));
    pod.inside(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap());
    node.up(&plan, &pod);
    let address = IpAddr::V6(plan.inputs.addresses.v6.unwrap());
    exchange(&pod, address, &node.vpc, FAR_V6.parse().unwrap()).unwrap();
    // A pod also talks to itself.
    exchange(&pod, address, &pod, address).unwrap();
}

#[test]
fn conflicting_rules_are_replaced_and_partial_pods_completed_or_removed() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let before = node.netns.everything();
    let (pod, plan) = (Netns::new(), node.plan(Stack::V4, "c1", "web", 7));
    // What a lost state file could leave: rules to other ENIs, in front of ours; a route to another link.
    for table in [1998, 1999] {
        node.netns.ip(&format!("rule add from 10.0.1.7 lookup {table} priority 2048 protocol kernel"));
    }
    node.netns.ip("route add 10.0.1.7/32 dev eth1");
    node.up(&plan, &pod);
    let rules = node.netns.ip("rule");
    assert_eq!(rules.matches("from 10.0.1.7 ").count(), 1, "{rules}");
    assert_eq!(node.problems(&plan, &pod), Vec::<String>::new());
    exchange(&pod, [10, 0, 1, 7].into(), &node.vpc, FAR_V4.parse().unwrap()).unwrap();

    // Every single thing may be gone before the teardown.
    node.netns.ip("rule del priority 512");
    node.netns.ip("route del 10.0.1.7/32");
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);

    // An interrupted try has made only the pair, without its alias.
    node.netns.ip(&format!(
        "link add {} address {} group {} type veth peer name eth0 address {} group {} netns {}",
        plan.inputs.host_ifname,
        plan.inputs.host_mac,
        terway_core::route::LINK_GROUP,
        plan.inputs.pod_mac,
        terway_core::route::LINK_GROUP,
        pod.path()
    ));
    let index = ifindex(&node.netns, &plan.inputs.host_ifname);
    let links = node.up(&plan, &pod);
    assert_eq!(links.host_ifindex, index, "the half-made pair is completed");
    assert_eq!(
        node.problems(&plan, &pod),
        [
            format!("on the node, {} has the MTU 1500 instead of 1480", plan.inputs.host_ifname),
            "on the node, eth0 has the MTU 1500 instead of 1480".to_owned()
        ]
    );
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);
}

#[test]
fn drift_is_reported_and_repaired() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let (pod, plan) = (Netns::new(), node.plan(Stack::Dual, "c1", "web", 7));
    node.up(&plan, &pod);
    let name = &plan.inputs.host_ifname;
    // udev's MACAddressPolicy, nm-cloud-setup, and someone with root in the pod.
    node.netns.ip(&format!("link set {name} address 06:00:00:00:00:09"));
    node.netns.ip("rule del priority 512");
    node.netns.ip("-6 rule del priority 2048");
    node.netns.ip("route del 10.0.1.7/32");
    pod.ip("route del default");
    pod.ip("neigh del 169.254.1.1 dev eth0");
    pod.ip("addr del 10.0.1.7/32 dev eth0");
    pod.ip("link set eth0 mtu 1400");

    let netns = PodNetns::open(pod.path()).unwrap();
    let found = node.runtime.block_on(node.host.check_pod(&plan, Some(&netns))).unwrap();
    let text: Vec<_> = found.iter().map(|difference| difference.message.as_str()).collect();
    for part in [
        "has the MAC address 06:00:00:00:00:09",
        "has the MTU 1400 instead of 1480",
        "rule 512: to 10.0.1.7/32 lookup main is missing",
        "rule 2048: from fd00:1::7/128",
        "route 10.0.1.7/32 dev",
        "route 0.0.0.0/0 via 169.254.1.1 dev eth0 onlink is missing",
        "eth0 lacks the address 10.0.1.7/32",
        "neighbour 169.254.1.1",
    ] {
        assert!(text.iter().any(|sentence| sentence.contains(part)), "{part} not in {text:#?}");
    }
    let repairs: Vec<Step> = found.into_iter().filter_map(|difference| difference.repair).collect();
    node.runtime.block_on(node.host.repair(repairs, Some(&netns))).unwrap();
    assert_eq!(node.problems(&plan, &pod), Vec::<String>::new());
    exchange(&pod, [10, 0, 1, 7].into(), &node.vpc, FAR_V4.parse().unwrap()).unwrap();
    let gone = node.runtime.block_on(node.host.check_pod(&plan, None)).unwrap();
    assert_eq!(gone.len(), 1, "{gone:?}");
}

#[test]
fn foreign_links_are_refused_and_kept() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let (pod, plan) = (Netns::new(), node.plan(Stack::V4, "c1", "web", 7));

    // Another plugin's interface in the pod.
    pod.ip("link add eth0 type veth peer name other");
    let (host_before, pod_before) = (node.netns.everything(), pod.everything());
    let error = node.try_up(&plan, &pod).unwrap_err();
    assert!(matches!(error, NetError::IfnameTaken { .. }), "{error}");
    let error = Error::from(error);
    assert_eq!(error.code, errors::IFNAME_TAKEN);
    assert!(error.detail.contains("CNI_IFNAME"), "{error}");
    node.down(&plan);
    assert_eq!((node.netns.everything(), pod.everything()), (host_before, pod_before));
    pod.ip("link del eth0");

    // Another's interface on the node: by name, by alias and even as a veth.
    node.netns.ip(&format!("link add {} type veth peer name tunnel0", plan.inputs.host_ifname));
    node.netns.ip(&format!("link set {} alias calico", plan.inputs.host_ifname));
    let before = node.netns.everything();
    let error = node.try_up(&plan, &pod).unwrap_err();
    assert!(matches!(error, NetError::ForeignLink { .. }), "{error}");
    assert_eq!(Error::from(error).code, errors::NET_FAILED);
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);
}

#[test]
fn statefulset_pod_replaces_the_host_link_of_its_predecessor() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let before = node.netns.everything();
    let (old_pod, old) = (Netns::new(), node.plan(Stack::V4, "old", "db-0", 7));
    let (new_pod, new) = (Netns::new(), node.plan(Stack::V4, "new", "db-0", 8));
    assert_eq!(old.inputs.host_ifname, new.inputs.host_ifname);
    node.up(&old, &old_pod);
    node.runtime.block_on(node.host.detach_pod(&old)).unwrap();
    // The old link is not deleted yet when the new pod comes.
    node.up(&new, &new_pod);
    node.down(&old);
    assert_eq!(node.problems(&new, &new_pod), Vec::<String>::new());
    exchange(&new_pod, [10, 0, 1, 8].into(), &node.vpc, FAR_V4.parse().unwrap()).unwrap();
    assert!(!old_pod.try_ip("link show eth0").status.success(), "the old pair is gone");
    node.down(&new);
    assert_eq!(node.netns.everything(), before);
}

#[test]
fn vanished_pod_netns_leaves_no_state() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let before = node.netns.everything();
    let plan = node.plan(Stack::Dual, "c1", "web", 7);
    let link = format!("link show {}", plan.inputs.host_ifname);
    let gone = |node: &Node| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while node.netns.try_ip(&link).status.success() {
            assert!(Instant::now() < deadline, "the kernel keeps the link");
            std::thread::sleep(Duration::from_millis(5));
        }
    };

    // Between the two stages.
    let pod = Netns::new();
    let netns = PodNetns::open(pod.path()).unwrap();
    let links = node.runtime.block_on(node.host.create_pod(&plan, &netns)).unwrap();
    drop((pod, netns));
    gone(&node);
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);

    // The pair is deleted under us.
    let pod = Netns::new();
    let netns = PodNetns::open(pod.path()).unwrap();
    node.netns.ip("link add keeps-index type veth peer name keeps-index2");
    node.netns.ip("link del keeps-index");
    let error = node.runtime.block_on(node.host.enable_pod(&plan, &netns, links)).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENODEV), "{error}");
    let error = Error::from(error);
    assert_eq!(error.code, errors::NET_FAILED);
    assert!(error.detail.contains(&plan.inputs.host_ifname), "{error}");
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);

    // After everything: the routes went with the link, the rules did not.
    let links = node.up(&plan, &pod);
    assert_ne!(links.host_ifindex, 0);
    drop((pod, netns));
    gone(&node);
    assert!(node.netns.ip("rule").contains("2048:"));
    node.down(&plan);
    assert_eq!(node.netns.everything(), before);
}

#[test]
fn netns_path_is_validated() {
    if skipped() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let missing = folder.path().join("missing");
    for (path, reason) in [
        (missing.to_str().unwrap(), "No such file"),
        (file.to_str().unwrap(), "no network namespace"),
        ("/proc/self/ns/uts", "no network namespace"),
        ("/proc/thread-self/ns/net", "the node's own"),
        ("", "No such file"),
    ] {
        let error = PodNetns::open(path).unwrap_err();
        assert!(error.to_string().contains(reason), "{path}: {error}");
        assert_eq!(Error::from(error).code, errors::CNI_NETNS);
    }
    // Asked from another thread, the node's is still recognised.
    let node = Node::new(Stack::V4);
    assert!(matches!(node.host.open_netns(&node.netns.path()), Err(NetError::Netns { .. })));
    let outside = PodNetns::open(node.netns.path()).unwrap();
    let plan = node.plan(Stack::V4, "c1", "web", 7);
    assert!(matches!(node.runtime.block_on(node.host.create_pod(&plan, &outside)), Err(NetError::Netns { .. })));
}

#[test]
fn netns_threads_return_to_the_host_netns_after_a_panic() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let inode = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let home = node.netns.inside(inode);
    let pod = Netns::new();
    let netns = PodNetns::open(pod.path()).unwrap();
    node.runtime.block_on(async {
        assert_eq!(node.host.pool().run_in(&netns, inode).await.unwrap(), pod.inside(inode));
        for _ in 0..8 {
            let outcome = node.host.pool().run_in(&netns, || panic!("a test's panic")).await;
            assert!(matches!(outcome, Err(NetError::Worker)));
        }
        // All threads are still there, and at home: they see the node's ENI.
        let nets = node.host.host_addresses().await.unwrap();
        assert_eq!(nets, [format!("{NODE_V4}/32").parse().unwrap()]);
    });
    assert_ne!(home, pod.inside(inode));
    let plan = node.plan(Stack::V4, "c1", "web", 7);
    node.up(&plan, &pod);
    assert_eq!(node.problems(&plan, &pod), Vec::<String>::new());
}

#[test]
fn panic_while_a_pod_is_connected_fails_that_pod_alone() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let before = node.netns.everything();
    let plan = node.plan(Stack::Dual, "c1", "web", 7);
    let connect = |pod: &Netns, install_datapath: fn(u32) -> Result<(), Error>| {
        let netns = node.host.open_netns(&pod.path()).unwrap();
        node.runtime.block_on(node.host.connect_pod(&plan, &netns, || Ok(()), install_datapath))
    };
    // More panics than the pool has threads, at the point where the pair exists and nothing else.
    for _ in 0..6 {
        let pod = Netns::new();
        let error = connect(&pod, |_| panic!("a test's panic")).unwrap_err();
        assert_eq!(error.code, errors::PANIC, "{error}");
        assert!(pod.try_ip("link show eth0").status.success(), "the pair was created before the panic");
        // The next try of the same pod completes what is there, and its teardown removes it.
        connect(&pod, |_| Ok(())).unwrap();
        assert_eq!(node.problems(&plan, &pod), Vec::<String>::new());
        exchange(&pod, [10, 0, 1, 7].into(), &node.vpc, FAR_V4.parse().unwrap()).unwrap();
        node.down(&plan);
        assert_eq!(node.netns.everything(), before);
        // The teardown alone removes it as well.
        assert_eq!(connect(&pod, |_| panic!("a test's panic")).unwrap_err().code, errors::PANIC);
        node.down(&plan);
        assert_eq!(node.netns.everything(), before);
    }
}

#[test]
fn leftovers_are_removed_and_foreign_state_is_kept() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let (kept_pod, kept) = (Netns::new(), node.plan(Stack::Dual, "kept", "kept", 7));
    node.up(&kept, &kept_pod);
    // Things of others that look alike.
    node.netns.ip("link add cali00000000000 type veth peer name other");
    node.netns.ip("link set cali00000000000 up");
    node.netns.ip("route add 10.9.9.9/32 dev cali00000000000");
    node.netns.ip("rule add to 10.9.9.9 lookup main priority 512");
    node.netns.ip("rule add from 10.9.9.9 fwmark 1 lookup 1700 priority 2048 protocol kernel");
    node.netns.ip("route add default via 10.0.1.253 dev eth1 onlink table 1700");
    let before = node.netns.everything();

    let (lost_pod, lost) = (Netns::new(), node.plan(Stack::Dual, "lost", "lost", 8));
    node.up(&lost, &lost_pod);
    let known = KnownResources {
        aliases: [alias(&kept.inputs.key)].into(),
        addresses: kept.inputs.addresses.iter().collect(),
        enis: [node.eni.inputs.ifindex].into(),
    };
    node.runtime.block_on(async {
        let state = node.host.observe(Default::default()).await.unwrap();
        let found = orphans(&state, &known);
        assert_eq!(found.len(), 4 + 2 + 1, "{found:#?}");
        node.host.remove(found).await.unwrap();
        let state = node.host.observe(Default::default()).await.unwrap();
        assert_eq!(orphans(&state, &known), []);
    });
    assert_eq!(node.netns.everything(), before);
    assert_eq!(node.problems(&kept, &kept_pod), Vec::<String>::new());
}

#[test]
fn unplanned_eni_addresses_are_removed() {
    if skipped() {
        return;
    }
    let node = Node::new(Stack::V4);
    node.netns.ip("addr add 10.0.1.6/24 dev eth1");
    node.netns.ip("link set eth1 up");
    assert!(node.netns.ip("route").contains("10.0.1.0/24"));
    node.runtime.block_on(node.host.ensure_eni(&node.eni)).unwrap();
    assert!(!node.netns.ip("route").contains("10.0.1.0/24"));
    assert!(node.netns.ip("-o addr show eth1").contains(&format!("{NODE_V4}/32")));
    // Another name by now: the plan is refused as a whole.
    node.netns.ip("link set eth1 down");
    node.netns.ip("link set eth1 name ens6");
    let error = node.runtime.block_on(node.host.ensure_eni(&node.eni)).unwrap_err();
    assert!(matches!(error, NetError::Renamed { .. }), "{error}");
}

#[test]
fn parallel_set_up_and_group_delete_of_32_pods() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let before = node.netns.everything();
    let pods: Vec<(Netns, PodPlan)> = (0..32)
        .map(|i| (Netns::new(), node.plan(Stack::Dual, &format!("c{i}"), &format!("web-{i}"), 10 + i)))
        .collect();
    let Node { netns, vpc, host, runtime, .. } = &node;
    let host = &host;
    runtime.block_on(async {
        let ups = pods.iter().map(|(pod, plan)| async move {
            let netns = host.open_netns(&pod.path()).unwrap();
            let links = host.create_pod(plan, &netns).await.unwrap();
            host.enable_pod(plan, &netns, links).await.unwrap();
            assert_eq!(host.check_pod(plan, Some(&netns)).await.unwrap(), []);
        });
        futures(ups).await;
    });
    for (pod, plan) in &pods {
        for address in plan.inputs.addresses.iter() {
            exchange(pod, address, vpc, node_and_far(address).1).unwrap();
        }
    }
    runtime.block_on(async {
        let downs = pods.iter().skip(16).map(|(_, plan)| async move {
            host.detach_pod(plan).await.unwrap();
            host.delete_link(plan).await.unwrap();
        });
        futures(downs).await;
        let rest: Vec<PodPlan> = pods.iter().take(16).map(|(_, plan)| plan.clone()).collect();
        futures(rest.iter().map(|plan| async move { host.detach_pod(plan).await.unwrap() })).await;
        host.delete_links(rest.clone()).await.unwrap();
        host.delete_links(rest).await.unwrap();
    });
    assert_eq!(netns.everything(), before);
}

#[test]
fn group_delete_skips_vanished_and_successor_links() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let before = node.netns.everything();
    let mut pods: Vec<(Netns, PodPlan)> =
        (0..4).map(|i| (Netns::new(), node.plan(Stack::V4, &format!("c{i}"), &format!("web-{i}"), 10 + i))).collect();
    for (pod, plan) in &pods {
        node.up(plan, pod);
    }
    // One is gone with its namespace, one's name belongs to its successor, two are there; one more stays.
    let (vanished, _) = pods.remove(0);
    drop(vanished);
    let (successor_pod, successor) = (Netns::new(), node.plan(Stack::V4, "next", "web-1", 20));
    node.up(&successor, &successor_pod);
    let (kept_pod, kept) = (Netns::new(), node.plan(Stack::V4, "kept", "kept", 21));
    node.up(&kept, &kept_pod);
    let plans: Vec<PodPlan> =
        (0..4).map(|i| node.plan(Stack::V4, &format!("c{i}"), &format!("web-{i}"), 10 + i)).collect();
    node.runtime.block_on(async {
        for plan in &plans {
            node.host.detach_pod(plan).await.unwrap();
        }
        node.host.delete_links(plans).await.unwrap();
    });
    for (pod, plan) in [(&successor_pod, &successor), (&kept_pod, &kept)] {
        assert_eq!(node.problems(plan, pod), Vec::<String>::new());
        node.down(plan);
    }
    assert_eq!(node.netns.everything(), before);
}

#[test]
fn machine_netns_is_untouched() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::Dual);
    let (pod, plan) = (Netns::new(), node.plan(Stack::Dual, "c1", "web", 7));
    node.up(&plan, &pod);
    // Others use this machine too, so that only what could be ours is looked for.
    let own = Netns(File::open("/proc/self/ns/net").unwrap());
    let all = own.everything();
    for ours in [plan.inputs.host_ifname.as_str(), "10.0.1.7", "fd00:1::7"] {
        assert!(!all.contains(ours), "{ours} in {all}");
    }
    node.down(&plan);
}

#[test]
fn rule_moves_to_the_table_of_another_eni() {
    if skipped() {
        return;
    }
    let node = Node::ready(Stack::V4);
    let (pod, plan) = (Netns::new(), node.plan(Stack::V4, "c1", "web", 7));
    node.up(&plan, &pod);
    let moved = Rule::from_pod([10, 0, 1, 7].into(), 1234);
    node.runtime.block_on(node.host.repair(vec![Step::host(NetOp::AddRule(moved))], None)).unwrap();
    let rules = node.netns.ip("rule");
    assert_eq!(rules.matches("2048:").count(), 1, "{rules}");
    assert!(rules.contains("from 10.0.1.7 lookup 1234"), "{rules}");
    let table = eni_table(node.eni.inputs.ifindex);
    let expected = [format!(
        "on the node, the rule 2048: from 10.0.1.7/32 lookup 1234 stands beside rule 2048: from 10.0.1.7/32 lookup {table}"
    )];
    assert_eq!(node.problems(&plan, &pod), expected);
}
