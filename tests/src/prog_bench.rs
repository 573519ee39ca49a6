//! Nanoseconds per packet of the eBPF programs, by `BPF_PROG_TEST_RUN`: established packets (fast path) and first packets (slow path).

use std::net::IpAddr;

use anyhow::ensure;
use aya::maps::{HashMap, Map, MapData};
use terway_abi::{
    Backend, BackendRange, BackendRef, Flow, FlowKey, Frontend, Program, backend_flags, flow_flags, names,
};
use terway_core::ident::Addresses;
use terway_daemon::bpf::{BpfError, Config, Datapath, Endpoint, RunContext, Uplink};

use crate::packet::{Frame, flags};
use crate::prog_harness::frontend_key;
use crate::sandbox::{Sandbox, ifindex, ip};

/// Two pods and an ENI, as interfaces of the calling thread's namespace and as endpoints of a datapath.
#[derive(Debug)]
pub struct Stage {
    /// The datapath.
    pub datapath: Datapath,
    /// First pod: 10.0.0.1, fd00::1.
    pub a: Endpoint,
    /// Second pod, on the same ENI: 10.0.0.2, fd00::2.
    pub b: Endpoint,
    /// The ENI.
    pub eni: u32,
    /// The ENI's Ethernet address.
    pub eni_mac: [u8; 6],
    /// Another ENI.
    pub other_eni: u32,
}

/// Host ends have the Ethernet address `HOST_MAC`.
pub const HOST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
/// The gateway's Ethernet address.
pub const GATEWAY_MAC: [u8; 6] = [0xee, 0xff, 0xff, 0xff, 0xff, 0xff];

fn mac(index: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0, index]
}

fn text([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

impl Stage {
    /// Sets the stage in a sandbox.
    ///
    /// # Errors
    /// When the kernel refuses a step.
    pub fn set(sandbox: &Sandbox) -> anyhow::Result<Self> {
        Self::with(&Config::new(sandbox.pin_root()))
    }

    /// As [`Stage::set`], with another configuration.
    ///
    /// # Errors
    /// When the kernel refuses a step.
    pub fn with(config: &Config) -> anyhow::Result<Self> {
        let eni_mac = mac(0xe1);
        for (name, address) in [("pod-a", HOST_MAC), ("pod-b", HOST_MAC), ("eni-1", eni_mac), ("eni-2", mac(0xe2))] {
            ip(&format!("link add {name} address {} type veth peer name {name}-p", text(address)))?;
            ip(&format!("link set {name} up"))?;
            ip(&format!("link set {name}-p up"))?;
        }
        let datapath = Datapath::open(config)?;
        let eni = ifindex("eni-1")?;
        let endpoint = |name: &str, number: u8| -> anyhow::Result<Endpoint> {
            Ok(Endpoint {
                host_ifindex: ifindex(name)?,
                host_mac: terway_core::ident::Mac(HOST_MAC),
                pod_mac: terway_core::ident::Mac(mac(number)),
                addresses: Addresses {
                    v4: Some(std::net::Ipv4Addr::new(10, 0, 0, number)),
                    v6: Some(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into())),
                },
                eni_ifindex: eni,
                gateway_v4: Some(std::net::Ipv4Addr::new(10, 0, 0, 253)),
                gateway_v6: Some(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0xfd)),
            })
        };
        let (a, b) = (endpoint("pod-a", 1)?, endpoint("pod-b", 2)?);
        datapath.endpoints().upsert(&a)?;
        datapath.endpoints().upsert(&b)?;
        datapath.host_prefixes().set(&[
            "10.0.0.100/32".parse()?,
            "169.254.20.10/32".parse()?,
            "fd00::100/128".parse()?,
        ])?;
        Ok(Self { datapath, a, b, eni, eni_mac, other_eni: ifindex("eni-2")? })
    }

    /// A frame that a pod sends.
    #[must_use]
    pub fn sent_by(&self, pod: &Endpoint) -> Frame {
        Frame::new(pod.host_mac.0, pod.pod_mac.0)
    }

    /// A frame that comes in from the VPC.
    #[must_use]
    pub fn by_gateway(&self) -> Frame {
        Frame::new(self.eni_mac, GATEWAY_MAC)
    }
}

/// Runs of one batch: the TTL falls with every run, because nothing resets the packet.
const BATCH: u32 = 250;
const BATCHES: u32 = 25;
/// Many short rounds: disturbances of a shared machine come in bursts.
const ROUNDS: u32 = 40;

/// A line for each case: its name and nanoseconds per packet, the lowest of all rounds (the machine is shared).
///
/// `established`: the flow entry is valid. `first`: each run creates the flow entry, because the endpoint's epoch differs from that of the
/// epoch map; so each run also replaces the entries of the run before.
///
/// # Errors
/// When a right is missing or the kernel refuses a step. Must be called on a thread of its own: it enters a sandbox.
pub fn measure() -> anyhow::Result<Vec<(String, f64)>> {
    let sandbox = Sandbox::enter().map_err(anyhow::Error::msg)?;
    let stage = Stage::set(&sandbox)?;
    // Frames to this pod look like frames from `a`, so that a delivered packet can be run again.
    let mirror = Endpoint { host_mac: stage.a.pod_mac, pod_mac: stage.a.host_mac, ..stage.b };
    stage.datapath.endpoints().upsert(&mirror)?;
    let (a, eni) = (stage.a.host_ifindex, stage.eni);
    let cases = [
        ("from_pod local v4", Program::FromPod, a, stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2")),
        ("from_pod local v6", Program::FromPod, a, stage.sent_by(&stage.a).ip("fd00::1", "fd00::2")),
        ("from_pod vpc v4", Program::FromPod, a, stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.9.9")),
        ("from_pod vpc v6", Program::FromPod, a, stage.sent_by(&stage.a).ip("fd00::1", "fd00:9::9")),
        ("from_pod host v4", Program::FromPod, a, stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.100")),
        ("from_vpc v4", Program::FromVpc, eni, stage.by_gateway().ip("10.0.9.9", "10.0.0.1")),
        ("from_vpc v6", Program::FromVpc, eni, stage.by_gateway().ip("fd00:9::9", "fd00::1")),
        ("to_pod v4", Program::ToPod, a, Frame::new(stage.a.pod_mac.0, HOST_MAC).ip("10.0.0.100", "10.0.0.1")),
        ("to_vpc host v4", Program::ToVpc, eni, Frame::new(GATEWAY_MAC, stage.eni_mac).ip("10.0.0.100", "10.0.9.9")),
    ];
    let mut results = Vec::new();
    for (name, program, ifindex, frame) in &cases {
        let established = lowest(&stage.datapath, *program, *ifindex, frame, ESTABLISHED)?;
        results.push((format!("{name} established"), established));
    }
    let services = serve(&stage)?;
    for (number, Served { name, program, ifindex, frame, .. }) in (1..).zip(&services) {
        there_and_back(&stage.datapath, number, *program, *ifindex, frame)?;
        let established = lowest(&stage.datapath, *program, *ifindex, frame, ESTABLISHED)?;
        results.push((format!("{name} established"), established));
    }
    // Sampling does not affect established packets.
    stage.datapath.policies().sample_flows(1)?;
    if let Some((name, program, ifindex, frame)) = cases.first() {
        let told = lowest(&stage.datapath, *program, *ifindex, frame, ESTABLISHED)?;
        results.push((format!("{name} told established"), told));
    }
    stage.datapath.policies().sample_flows(0)?;
    unsettle(&stage.datapath)?;
    for Served { name, program, ifindex, first, .. } in &services {
        // Flows between client and remote backend depend on no endpoint, so they stay valid.
        if let Some(frame) = first {
            results.push((format!("{name} first"), lowest_first(&stage.datapath, *program, *ifindex, frame)?));
        }
    }
    for (name, program, ifindex, frame) in cases.iter().filter(|(_, program, ..)| *program != Program::ToVpc) {
        results.push((format!("{name} first"), lowest_first(&stage.datapath, *program, *ifindex, frame)?));
    }
    Ok(results)
}

/// A packet to a Service, with program and interface.
#[derive(Debug)]
struct Served {
    name: &'static str,
    program: Program,
    ifindex: u32,
    frame: Frame,
    /// The frame of first packets.
    first: Option<Frame>,
}

/// Services of both families, numbered from 1, and the packets of a pod and of external clients to them.
///
/// The packet of a test run is not reset between runs, and after NAT it is not for the Service any more. Every other run translates an
/// established packet back, see [`there_and_back`]. For first packets the Service is its own backend: the whole NAT is done, and the packet
/// stays the same.
fn serve(stage: &Stage) -> anyhow::Result<Vec<Served>> {
    let (a, eni) = (stage.a.host_ifindex, stage.eni);
    let addresses = |v4: [u8; 4], v6: &str| anyhow::Ok(Addresses { v4: Some(v4.into()), v6: Some(v6.parse()?) });
    stage.datapath.uplinks().set(&Uplink {
        ifindex: eni,
        node: addresses([10, 0, 0, 100], "fd00::100")?,
        gateway_v4: stage.a.gateway_v4,
        gateway_v6: stage.a.gateway_v6,
        ports: 40_000..=40_000,
    })?;
    // No other case uses this endpoint.
    let served = Endpoint { host_ifindex: stage.other_eni, addresses: addresses([10, 0, 0, 3], "fd00::3")?, ..stage.b };
    stage.datapath.endpoints().upsert(&served)?;
    let mut cases = Vec::new();
    for (number, (name, program, from, to, behind, first)) in (1..).zip([
        ("from_pod service v4", Program::FromPod, "10.0.0.1", "10.0.9.96", "10.0.9.98", Some("10.0.9.98")),
        ("from_pod service v6", Program::FromPod, "fd00::1", "fd00:9::96", "fd00:9::98", Some("fd00:9::98")),
        ("from_vpc service pod v4", Program::FromVpc, "10.0.9.9", "10.0.9.95", "10.0.0.3", Some("10.0.0.3")),
        ("from_vpc service pod v6", Program::FromVpc, "fd00:9::9", "fd00:9::95", "fd00::3", Some("fd00::3")),
        ("from_vpc service node v4", Program::FromVpc, "10.0.9.8", "10.0.9.97", "10.0.9.99", None),
        ("from_vpc service node v6", Program::FromVpc, "fd00:9::8", "fd00:9::97", "fd00:9::99", None),
    ]) {
        let (ifindex, frame) =
            if program == Program::FromPod { (a, stage.sent_by(&stage.a)) } else { (eni, stage.by_gateway()) };
        forward(&stage.datapath, number, (to, ESTABLISHED.0), (behind, TARGET_PORT))?;
        if let Some(itself) = first {
            forward(&stage.datapath, FIRST_SERVICE + number, (itself, FIRST_PORT), (itself, FIRST_PORT))?;
        }
        let first = first.map(|itself| frame.clone().ip(from, itself));
        cases.push(Served { name, program, ifindex, frame: frame.ip(from, to), first });
    }
    Ok(cases)
}

/// Writes a Service with one backend. Service, backend reference and backend have the same number.
fn forward(
    datapath: &Datapath,
    number: u32,
    (to, port): (&str, u16),
    (behind, target): (&str, u16),
) -> anyhow::Result<()> {
    let (to, behind): (IpAddr, IpAddr) = (to.parse()?, behind.parse()?);
    let mut address = [0; 4];
    let bytes = match behind {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    for (word, bytes) in address.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into()?);
    }
    let flags = if behind.is_ipv6() { backend_flags::V6 } else { 0 };
    let backend = Backend { address, port: target.to_be(), protocol: 6, flags, generation: 1, ..Backend::default() };
    datapath.services().set_backend(number, &backend)?;
    datapath.services().set_members(number, &[BackendRef { backend: number, generation: 1 }])?;
    let run = BackendRange { first: number, count: 1 };
    let frontend = Frontend { service: number, internal: run, external: run, ..Frontend::default() };
    datapath.services().set_frontend(&frontend_key(to, port, 6), &frontend)?;
    Ok(())
}

/// Creates the flow of an established packet, and replaces its reply entry by one that translates the packet back.
fn there_and_back(
    datapath: &Datapath,
    backend: u32,
    program: Program,
    ifindex: u32,
    frame: &Frame,
) -> anyhow::Result<()> {
    let packet = packet_of(frame, ESTABLISHED);
    let there = datapath.programs().run(program, &packet, RunContext::on(ifindex))?;
    turn_back::<u32>(datapath, names::FLOWS_V4, backend)?;
    turn_back::<[u32; 4]>(datapath, names::FLOWS_V6, backend)?;
    let back = datapath.programs().run(program, &packet, RunContext { repeat: 2, ..RunContext::on(ifindex) })?;
    // Ports and checksum are compared; the Ethernet header depends on the route.
    let transport = packet.len() - PAYLOAD - 20;
    ensure!(there.packet[transport..] != packet[transport..], "the packet is not translated");
    ensure!(back.packet[transport..] == packet[transport..], "it does not become what it was");
    Ok(())
}

fn turn_back<A: Copy>(datapath: &Datapath, map: &str, backend: u32) -> anyhow::Result<()>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    let map = Map::LruHashMap(MapData::from_pin(datapath.pins().join(map))?);
    let mut map: HashMap<_, FlowKey<A>, Flow<A>> = map.try_into()?;
    let mut all = map.iter().collect::<Result<Vec<_>, _>>()?;
    all.retain(|(_, flow)| flow.backend == backend);
    let is_answer = |(_, flow): &&(FlowKey<A>, Flow<A>)| flow.directions[0].flags & flow_flags::REPLY != 0;
    let (answer, asked) = (all.iter().find(is_answer), all.iter().find(|entry| !is_answer(entry)));
    // A Service is of one family.
    let (Some((key, answer)), Some((_, asked))) = (answer, asked) else { return Ok(()) };
    let back = Flow {
        initiator: 1 - answer.initiator,
        nat_src: answer.nat_dst,
        nat_dst: answer.nat_src,
        nat_ports: answer.nat_ports.rotate_left(16),
        address_delta: !asked.address_delta,
        port_delta: !asked.port_delta,
        ..*asked
    };
    map.insert(key, back, 0)?;
    Ok(())
}

/// Port and flags of an established packet.
const ESTABLISHED: (u16, u8) = (80, flags::ACK);
/// The port that Services of established packets lead to.
const TARGET_PORT: u16 = 8080;
/// What is added to the number of a Service for first packets.
const FIRST_SERVICE: u32 = 100;
/// Bytes behind the headers.
const PAYLOAD: usize = 64;

/// The port of first packets.
pub const FIRST_PORT: u16 = 81;

/// Nanoseconds of a first packet, after [`unsettle`].
///
/// # Errors
/// When the kernel refuses a step.
pub fn lowest_first(datapath: &Datapath, program: Program, ifindex: u32, frame: &Frame) -> Result<f64, BpfError> {
    lowest(datapath, program, ifindex, frame, (FIRST_PORT, flags::SYN))
}

fn packet_of(frame: &Frame, (port, flags): (u16, u8)) -> Vec<u8> {
    frame.clone().ttl(255).tcp(40_000, port, flags).payload(&[0; PAYLOAD]).build()
}

fn lowest(
    datapath: &Datapath,
    program: Program,
    ifindex: u32,
    frame: &Frame,
    (port, flags): (u16, u8),
) -> Result<f64, BpfError> {
    let packet = packet_of(frame, (port, flags));
    let context = RunContext { repeat: BATCH, ..RunContext::on(ifindex) };
    datapath.programs().run(program, &packet, context)?;
    let round = || -> Result<f64, BpfError> {
        (0..BATCHES).try_fold(0.0, |sum, _| {
            Ok(sum + datapath.programs().run(program, &packet, context)?.duration.as_nanos() as f64)
        })
    };
    (0..ROUNDS).try_fold(f64::MAX, |least, _| Ok(least.min(round()? / f64::from(BATCHES))))
}

/// Gives every endpoint an epoch that differs from the epoch map's, so that no flow entry is ever valid.
///
/// # Errors
/// When a map cannot be read or written.
pub fn unsettle(datapath: &Datapath) -> anyhow::Result<()> {
    for name in [names::ENDPOINTS, names::ENDPOINTS_V4] {
        let map = Map::HashMap(MapData::from_pin(datapath.pins().join(name))?);
        let mut map: HashMap<_, u32, terway_abi::Endpoint> = map.try_into()?;
        for (key, entry) in map.iter().collect::<Result<Vec<_>, _>>()? {
            map.insert(key, terway_abi::Endpoint { epoch: terway_abi::next_route_epoch(entry.epoch), ..entry }, 0)?;
        }
    }
    let map = Map::HashMap(MapData::from_pin(datapath.pins().join(names::ENDPOINTS_V6))?);
    let mut map: HashMap<_, [u32; 4], terway_abi::Endpoint> = map.try_into()?;
    for (key, entry) in map.iter().collect::<Result<Vec<_>, _>>()? {
        map.insert(key, terway_abi::Endpoint { epoch: terway_abi::next_route_epoch(entry.epoch), ..entry }, 0)?;
    }
    Ok(())
}
