//! Test environment: anonymous network namespaces, a node with an ENI, and a VPC at the ENI's other end.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use terway_core::ident::{Addresses, AttachmentKey, Mac, PodRef};
use terway_core::route::{EniInputs, EniPlan, NodeInputs, NodePlan, PodInputs, PodPlan, host_ifname};
use terway_daemon::net::{Host, Links, NetError, PodNetns};
use tokio::runtime::Runtime;

/// Whether the tests can run at all; says why not.
pub(crate) fn skipped() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    println!("SKIP: network namespaces need root");
    true
}

/// A network namespace without a name: it goes when the last reference does, however the test ends.
pub(crate) struct Netns(pub(crate) File);

impl Netns {
    pub(crate) fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        let netns = Self(std::thread::spawn(make).join().unwrap());
        netns.inside(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
        netns.ip("link set lo up");
        netns
    }

    /// Waits until the kernel's workers have seen that a link's other end is up, and given it its link-local address.
    pub(crate) fn settle(&self, dev: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let settled = || {
            let local = self.ip(&format!("-6 -o addr show dev {dev} scope link"));
            self.ip(&format!("-o link show {dev}")).contains("state UP")
                && local.contains("fe80")
                && !local.contains("tentative")
        };
        while !settled() {
            assert!(Instant::now() < deadline, "{dev} does not come up");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            entered.join().unwrap()
        })
    }

    pub(crate) fn try_ip(&self, arguments: &str) -> std::process::Output {
        let netns = self.0.try_clone().unwrap();
        let mut command = Command::new("ip");
        command.args(arguments.split(' '));
        // SAFETY: setns(2) is async-signal-safe and touches nothing of the parent's.
        unsafe { command.pre_exec(move || Ok(setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?)) };
        command.output().unwrap()
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        let output = self.try_ip(arguments);
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// All that `ip` can see and that does not change by itself.
    pub(crate) fn everything(&self) -> String {
        let queries = ["-o link", "-o addr", "route show table all", "-6 route show table all", "rule", "-6 rule"];
        let mut all = String::new();
        for query in queries {
            // The kernel counts lifetimes and queue activations; neither is ours.
            for line in self.ip(query).lines() {
                let line = line.split("valid_lft").next().unwrap_or_default();
                all.push_str(&format!("{query}: {}\n", line.replace("qdisc noop ", "").replace("qdisc noqueue ", "")));
            }
        }
        all
    }
}

/// A node with one ENI, whose other end is the VPC's gateway.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) vpc: Netns,
    pub(crate) host: Host,
    pub(crate) eni: EniPlan,
    pub(crate) runtime: Runtime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stack {
    V4,
    V6,
    Dual,
}

impl Stack {
    pub(crate) fn v4(self) -> bool {
        self != Self::V6
    }
    pub(crate) fn v6(self) -> bool {
        self != Self::V4
    }
}

pub(crate) const FAR_V4: &str = "203.0.113.1";
pub(crate) const FAR_V6: &str = "2001:db8::1";
pub(crate) const NODE_V4: &str = "10.0.0.9";
pub(crate) const NODE_V6: &str = "fd00:1::9";

impl Node {
    pub(crate) fn new(stack: Stack) -> Self {
        let (netns, vpc) = (Netns::new(), Netns::new());
        netns.ip(&format!("link add eth1 type veth peer name gw netns {}", vpc.path()));
        vpc.ip("link set gw up");
        for command in [
            "addr add 10.0.1.253/32 dev gw",
            "-6 addr add fd00:1::fffd/128 dev gw nodad",
            &format!("addr add {FAR_V4}/32 dev lo"),
            &format!("-6 addr add {FAR_V6}/128 dev lo nodad"),
            &format!("route add {NODE_V4}/32 dev gw"),
            &format!("-6 route add {NODE_V6}/128 dev gw"),
            &format!("route add 10.0.1.0/24 via {NODE_V4} dev gw onlink"),
            &format!("-6 route add fd00:1::/64 via {NODE_V6} dev gw onlink"),
        ] {
            vpc.ip(command);
        }
        let ifindex = ifindex(&netns, "eth1");
        let eni = EniPlan::shared(EniInputs {
            ifindex,
            ifname: "eth1".into(),
            mtu: 1500,
            node: Addresses {
                v4: stack.v4().then(|| NODE_V4.parse().unwrap()),
                v6: stack.v6().then(|| NODE_V6.parse().unwrap()),
            },
            gateway_v4: stack.v4().then(|| "10.0.1.253".parse().unwrap()),
            gateway_v6: stack.v6().then(|| "fd00:1::fffd".parse().unwrap()),
        });
        let host = netns.inside(|| Host::new().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let inputs = NodeInputs { v4: stack.v4(), v6: stack.v6(), ra_links: Vec::new() };
        runtime.block_on(host.ensure_node(&NodePlan::forwarding(&inputs))).unwrap();
        Self { netns, vpc, host, eni, runtime }
    }

    /// A node whose ENI is ready.
    pub(crate) fn ready(stack: Stack) -> Self {
        let node = Self::new(stack);
        node.ensure_eni();
        node
    }

    pub(crate) fn ensure_eni(&self) {
        self.runtime.block_on(self.host.ensure_eni(&self.eni)).unwrap();
        self.netns.settle("eth1");
        self.vpc.settle("gw");
    }

    pub(crate) fn plan(&self, stack: Stack, container: &str, name: &str, number: u8) -> PodPlan {
        let key = AttachmentKey { network: "terway".into(), container_id: container.into(), ifname: "eth0".into() };
        let pod = PodRef { namespace: "default".into(), name: name.into(), uid: String::new() };
        PodPlan::veth(PodInputs {
            host_ifname: host_ifname(&pod, &key),
            pod_ifname: "eth0".into(),
            host_mac: Mac::derived(&[b"host", container.as_bytes()]),
            pod_mac: Mac::derived(&[b"pod", container.as_bytes()]),
            addresses: Addresses {
                v4: stack.v4().then(|| [10, 0, 1, number].into()),
                v6: stack.v6().then(|| format!("fd00:1::{number:x}").parse().unwrap()),
            },
            eni_ifindex: self.eni.inputs.ifindex,
            mtu: 1480,
            default_route: true,
            extra_routes: vec!["192.168.0.0/16".parse().unwrap()],
            key,
        })
    }

    pub(crate) fn up(&self, plan: &PodPlan, pod: &Netns) -> Links {
        self.try_up(plan, pod).unwrap()
    }

    pub(crate) fn try_up(&self, plan: &PodPlan, pod: &Netns) -> Result<Links, NetError> {
        self.runtime.block_on(async {
            let netns = PodNetns::open(pod.path())?;
            let links = self.host.create_pod(plan, &netns).await?;
            self.host.enable_pod(plan, &netns, links).await?;
            Ok(links)
        })
    }

    pub(crate) fn down(&self, plan: &PodPlan) {
        self.runtime.block_on(async {
            self.host.detach_pod(plan).await.unwrap();
            self.host.delete_link(plan).await.unwrap();
        });
    }

    /// Sentences of what is not as planned.
    pub(crate) fn problems(&self, plan: &PodPlan, pod: &Netns) -> Vec<String> {
        let netns = PodNetns::open(pod.path()).unwrap();
        let found = self.runtime.block_on(self.host.check_pod(plan, Some(&netns))).unwrap();
        found.into_iter().map(|difference| difference.message).collect()
    }
}

pub(crate) fn ifindex(netns: &Netns, name: &str) -> u32 {
    netns.ip(&format!("-o link show {name}")).split(':').next().unwrap().parse().unwrap()
}

/// Sends a datagram from one namespace to an address of another, and back; the source address must survive both ways.
pub(crate) fn exchange(from: &Netns, source: IpAddr, to: &Netns, target: IpAddr) -> Result<(), String> {
    exchange_within(Duration::from_secs(30), from, source, to, target)
}

/// Whether nothing comes through, for as long as one is willing to wait for what does not happen.
pub(crate) fn unreachable(from: &Netns, source: IpAddr, to: &Netns, target: IpAddr) -> bool {
    exchange_within(Duration::from_millis(200), from, source, to, target).is_err()
}

fn exchange_within(patience: Duration, from: &Netns, source: IpAddr, to: &Netns, target: IpAddr) -> Result<(), String> {
    let server = to.inside(|| UdpSocket::bind((target, 0))).map_err(|error| format!("bind {target}: {error}"))?;
    let client = from.inside(|| UdpSocket::bind((source, 0))).map_err(|error| format!("bind {source}: {error}"))?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(patience)).unwrap();
    }
    let mut buffer = [0; 16];
    client.send_to(b"there", server.local_addr().unwrap()).map_err(|error| format!("send: {error}"))?;
    let (_, seen) = server.recv_from(&mut buffer).map_err(|error| format!("{source} -> {target}: {error}"))?;
    if seen != SocketAddr::new(source, client.local_addr().unwrap().port()) {
        return Err(format!("{source} arrived as {seen}"));
    }
    server.send_to(b"back", seen).map_err(|error| format!("send back: {error}"))?;
    client.recv_from(&mut buffer).map_err(|error| format!("{target} -> {source}: {error}"))?;
    Ok(())
}

pub(crate) fn node_and_far(source: IpAddr) -> (IpAddr, IpAddr) {
    match source {
        IpAddr::V4(_) => (NODE_V4.parse().unwrap(), FAR_V4.parse().unwrap()),
        IpAddr::V6(_) => (NODE_V6.parse().unwrap(), FAR_V6.parse().unwrap()),
    }
}

/// Runs all futures at the same time on the current thread.
pub(crate) async fn futures<F: Future<Output = ()>>(all: impl Iterator<Item = F>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        all.retain_mut(|future| future.as_mut().poll(context).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}
