//! `ipam`: how long a cold node takes to give 100 pods their addresses, what a decision costs, and what is left of an ADD without the plugin.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use terway_core::clock::Moment;
use terway_core::cloud::{Eni, EniKind, EniStatus, InstanceLimits, Subnet};
use terway_core::ident::{AttachmentKey, EniId, Family, IpStack, Mac, PodRef, VSwitchId};
use terway_core::ipam::{Add, Effect, Event, Pool, PoolConfig, Ticket};
use terway_proto::v1;
use terway_sim::cloud::{Fault, FaultKind};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::node::{Node, cni};

use crate::figures::{Bar, Better, Figure, percentile};

/// Pods that come at once.
const BURST: usize = 100;
/// Latencies of the real API, as users of the reference project measured them.
const CREATE: Duration = Duration::from_millis(800);
const ATTACH: Duration = Duration::from_secs(3);
const ASSIGN: Duration = Duration::from_millis(300);
/// Slots of the pool whose steps are timed.
const SLOTS: u32 = 1000;

fn figure(name: &str, value: f64, anchor: Option<(&'static str, f64)>, bars: Vec<Bar>) -> Figure {
    Figure { bench: "ipam", name: name.to_owned(), value, anchor, better: Better::Less, bars }
}

/// A node that has no ENI for pods and a type that carries 7 with 30 addresses each.
///
/// # Errors
/// When it is unknown where our programs are.
pub fn cold_node() -> Result<Options> {
    let mut options = Options::exclusive()?;
    options.nodes = 1;
    options.ip_stack = "ipv4";
    options.adapters = 8;
    options.addresses_per_adapter = 30;
    options.pool = (0, 0);
    options.attach = (ATTACH, Duration::from_millis(50));
    Ok(options)
}

/// All pods are added at once. No way of the API is shorter than making the ENIs with all their addresses, in parallel, and attaching them.
///
/// # Errors
/// When a pod gets no network.
pub fn cold(cluster: &Cluster) -> Result<Vec<Figure>> {
    let node = cluster.node(1);
    let delay = |action: &str, time: Duration| Fault {
        action: action.to_owned(),
        nth: None,
        probability: None,
        times: None,
        kind: FaultKind::Delay { ms: u64::try_from(time.as_millis()).unwrap_or(0) },
    };
    cluster
        .cloud()
        .set_faults(vec![delay("CreateNetworkInterface", CREATE), delay("AssignPrivateIpAddresses", ASSIGN)]);
    cluster.cloud().forget_calls();
    let pods = (0..BURST).map(|n| node.new_pod(&format!("cold-{n}"))).collect::<Result<Vec<_>>>()?;
    // Straight to the daemon: on a small machine a hundred processes of the plugin would take longer to start than the API to answer.
    let calls: Vec<_> =
        pods.iter().enumerate().map(|(n, pod)| Ok((node.rpc()?, request("cold", n, pod)))).collect::<Result<_>>()?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = calls.into_iter().map(|(mut rpc, r)| scope.spawn(move || rpc.add_pod(r))).collect();
        waiting.into_iter().try_for_each(|call| call.join().unwrap_or_else(|_| bail!("a caller panicked")).map(drop))
    })?;
    let took = start.elapsed();
    let calls: u64 = ["CreateNetworkInterface", "AttachNetworkInterface", "AssignPrivateIpAddresses"]
        .iter()
        .filter_map(|action| cluster.cloud().calls().get(*action).map(|calls| calls.total))
        .sum();
    cluster.cloud().set_faults(Vec::new());
    let mut rpc = node.rpc()?;
    for n in 0..BURST {
        rpc.del_pod(attachment("cold", n))?;
    }
    let path = (CREATE + ATTACH).as_secs_f64();
    // 100 pods need 4 ENIs of 30 addresses: each is made, with all it needs, and attached.
    let enis = BURST.div_ceil(30);
    Ok(vec![
        figure("cold_100_pods_s", took.as_secs_f64(), Some(("critical path", path)), vec![Bar::Ratio(1.0 / 1.5)]),
        #[expect(clippy::cast_precision_loss, reason = "a few calls")]
        figure("cold_100_pods_calls", calls as f64, Some(("minimum", (2 * enis) as f64)), vec![Bar::Ratio(1.0 / 1.3)]),
    ])
}

fn attachment(name: &str, n: usize) -> v1::Attachment {
    v1::Attachment { network: "terway".into(), container_id: format!("{name}-{n}"), ifname: "eth0".into() }
}

fn request(name: &str, n: usize, pod: &cni::Pod) -> v1::AddPodRequest {
    v1::AddPodRequest {
        attachment: Some(attachment(name, n)),
        pod: Some(v1::Pod { namespace: "default".into(), name: format!("{name}-{n}"), uid: String::new() }),
        netns: pod.ns.path().display().to_string(),
        ..Default::default()
    }
}

/// AddPod over the socket on a node with idle addresses: what the daemon needs, fsync included, without the plugin's process.
///
/// # Errors
/// When a pod gets no network.
pub fn warm(node: &Node) -> Result<Vec<Figure>> {
    let mut rpc = node.rpc()?;
    let mut times = Vec::new();
    for n in 0..120 {
        let pod = node.new_pod(&format!("warm-{n}"))?;
        let request = request("warm", n, &pod);
        let start = Instant::now();
        rpc.add_pod(request)?;
        if n >= 20 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        rpc.del_pod(attachment("warm", n))?;
    }
    Ok(vec![figure("warm_add_rpc_p50_ms", percentile(&times, 50.0), None, vec![Bar::AtMost(3.0)])])
}

/// Steps of a pool with [`SLOTS`] addresses, half of them bound, over whole lives of pods. The cloud and the kernel are not there: each effect
/// is reported done at once.
///
/// # Errors
/// When the pool does not do what it should.
pub fn step() -> Result<Vec<Figure>> {
    let mut bench = Steps::new();
    bench.now = bench.now.after(Duration::from_millis(100));
    for n in 0..SLOTS / 2 {
        bench.add(n);
    }
    bench.settle()?;
    ensure!(bench.pool.stats().bound == SLOTS / 2, "{:?}", bench.pool.stats());
    bench.times.clear();
    for round in 0..2_000 {
        bench.now = bench.now.after(Duration::from_millis(10));
        bench.del(round);
        bench.add(SLOTS / 2 + round);
        bench.settle()?;
    }
    let mut times = std::mem::take(&mut bench.times);
    times.sort_by(f64::total_cmp);
    Ok(vec![
        figure("step_p50_us", percentile(&times, 50.0), None, vec![Bar::AtMost(20.0)]),
        figure("step_p99_us", percentile(&times, 99.0), None, vec![]),
    ])
}

fn eni(number: usize, kind: EniKind, vswitch: VSwitchId, v4: Vec<Ipv4Addr>) -> Eni {
    Eni {
        id: EniId::new(format!("eni-{number}")),
        mac: Mac([2, 0, 0, 0, 0, u8::try_from(number).unwrap_or(u8::MAX)]),
        vswitch,
        status: EniStatus::InUse,
        kind,
        instance: Some("i-1".into()),
        primary_v4: v4.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED),
        v4,
        v6: Vec::new(),
        v4_prefixes: Vec::new(),
        v6_prefixes: Vec::new(),
        security_groups: Vec::new(),
        tags: BTreeMap::new(),
    }
}

struct Steps {
    pool: Pool,
    now: Moment,
    todo: Vec<Effect>,
    times: Vec<f64>,
    addresses: u32,
    enis: Vec<Eni>,
}

impl Steps {
    fn new() -> Self {
        let limits = InstanceLimits { adapters: 21, v4_per_adapter: SLOTS / 20, v6_per_adapter: SLOTS / 20 };
        let config = PoolConfig {
            vswitches: vec!["vsw-1".into()],
            min_idle: SLOTS / 2,
            max_idle: SLOTS,
            cooling: Duration::from_millis(20),
            ..PoolConfig::new("i-1".into(), limits, "seed")
        };
        Self {
            pool: Pool::new(config),
            now: Moment::ZERO,
            todo: Vec::new(),
            times: Vec::new(),
            addresses: 0,
            enis: vec![eni(0, EniKind::Primary, "vsw-0".into(), vec![Ipv4Addr::new(10, 255, 0, 1)])],
        }
    }

    fn feed(&mut self, event: Event) {
        let start = Instant::now();
        let effects = self.pool.step(event, self.now);
        self.times.push(start.elapsed().as_secs_f64() * 1e6);
        self.todo.extend(effects);
    }

    fn key(n: u32) -> AttachmentKey {
        AttachmentKey { network: "net".into(), container_id: format!("c{n}"), ifname: "eth0".into() }
    }

    fn add(&mut self, n: u32) {
        let pod = PodRef { namespace: "default".into(), name: format!("p{n}"), uid: String::new() };
        self.feed(Event::Add(Add {
            ticket: Ticket(u64::from(n) * 2),
            key: Self::key(n),
            pod,
            netns: "/run/netns/p".into(),
            ip_stack: IpStack::Ipv4,
            options: String::new(),
        }));
    }

    fn del(&mut self, n: u32) {
        self.feed(Event::Del { ticket: Ticket(u64::from(n) * 2 + 1), key: Self::key(n) });
    }

    fn address(&mut self) -> Ipv4Addr {
        self.addresses += 1;
        Ipv4Addr::from(0x0a00_0000 + self.addresses)
    }

    /// Reports every effect as done, until there is none left.
    fn settle(&mut self) -> Result<()> {
        let mut idle_ticks = 0;
        loop {
            let Some(effect) = self.todo.pop() else {
                if self.pool.stats().waiting == 0 && self.pool.stats().pending == 0 {
                    return Ok(());
                }
                idle_ticks += 1;
                ensure!(idle_ticks < 1000, "the pool stands still: {:?}", self.pool.stats());
                self.now = self.now.after(Duration::from_millis(50));
                self.feed(Event::Tick);
                continue;
            };
            match effect {
                Effect::Connect { op, key, .. } => self.feed(Event::Connected { op, key }),
                Effect::Disconnect { op, key, .. } => {
                    self.feed(Event::DatapathRemoved { op, key: key.clone() });
                    self.feed(Event::Disconnected { op, key });
                }
                Effect::CreateEni { op, vswitch, security_groups, v4, tags, .. } => {
                    let v4: Vec<Ipv4Addr> = (0..v4).map(|_| self.address()).collect();
                    let new = Eni { security_groups, tags, ..eni(self.enis.len(), EniKind::Secondary, vswitch, v4) };
                    self.enis.push(new.clone());
                    let result = Ok(Eni { status: EniStatus::Available, instance: None, ..new });
                    self.feed(Event::EniCreated { op, result });
                }
                Effect::TakeInventory { op } => {
                    self.feed(Event::Inventory { op, result: Ok(self.enis.clone()) });
                }
                Effect::AttachEni { op, eni } => self.feed(Event::EniAttached { op, eni, result: Ok(()) }),
                Effect::ConfigureNic { op, eni, .. } => {
                    let subnet = Subnet {
                        cidr_v4: "10.0.0.0/8".parse()?,
                        gateway_v4: "10.255.255.253".parse()?,
                        cidr_v6: None,
                        gateway_v6: None,
                    };
                    self.feed(Event::NicReady { op, eni, ifindex: 7, subnet });
                }
                Effect::Assign { op, eni, count, .. } => {
                    let new: Vec<Ipv4Addr> = (0..count).map(|_| self.address()).collect();
                    if let Some(known) = self.enis.iter_mut().find(|known| known.id == eni) {
                        known.v4.extend(&new);
                    }
                    let result = Ok(new.into_iter().map(IpAddr::V4).collect());
                    self.feed(Event::Assigned { op, eni, family: Family::V4, result });
                }
                Effect::Persist(_) | Effect::PersistLazily(_) | Effect::Reply { .. } | Effect::WakeAt(_) => {}
                // Nothing is given back in so short a life.
                other => bail!("unexpected {other:?}"),
            }
        }
    }
}
