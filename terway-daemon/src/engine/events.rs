//! Flow events with names: reads what the datapath tells of dropped packets and new connections, remembers the latest, tells whoever follows.

mod filter;

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use terway_abi::{Drop, FlowEvent, Program};
use terway_core::ident::Mac;
use terway_proto::v1;
use tokio::sync::broadcast;
use tracing::{debug, warn};

use self::filter::{ALLOWED, DROPPED};
use super::Engine;
use crate::policy::FlowAnnotator;
use crate::services::Services;
use crate::supervise;

pub(crate) use self::filter::Filter;

/// Events that are remembered for those who ask later: new connections, and drops, which the former must not push out.
const REMEMBERED: [usize; 2] = [3072, 1024];

/// Drops that `drops` shows of them.
const DROPS_SHOWN: usize = 256;

/// Events that a follower may lag behind before it misses some.
const LAG: usize = 1024;

/// Events that are given names at a time.
const BATCH: usize = 256;

/// The memory of flow events.
#[derive(Debug)]
pub(super) struct FlowLog(Mutex<State>);

#[derive(Debug)]
struct State {
    /// New connections and drops, each with its number in the order of all.
    recent: [VecDeque<(u64, Arc<v1::FlowEvent>)>; 2],
    told: u64,
    /// `None` once the daemon stops: subscribers end then.
    live: Option<broadcast::Sender<Arc<v1::FlowEvent>>>,
}

impl Default for FlowLog {
    fn default() -> Self {
        let live = Some(broadcast::Sender::new(LAG));
        Self(Mutex::new(State { recent: Default::default(), told: 0, live }))
    }
}

impl FlowLog {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    fn push(&self, event: v1::FlowEvent) {
        let mut state = self.state();
        let event = Arc::new(event);
        if let Some(live) = &state.live {
            // Nobody may be following.
            let _ = live.send(Arc::clone(&event));
        }
        state.told += 1;
        let number = state.told;
        let ([allowed, dropped], [most_allowed, most_dropped]) = (&mut state.recent, REMEMBERED);
        let (recent, most) = if event.verdict == DROPPED { (dropped, most_dropped) } else { (allowed, most_allowed) };
        if recent.len() == most {
            recent.pop_front();
        }
        recent.push_back((number, event));
    }

    /// The latest `last` of those that a filter takes.
    fn recent_and_live(&self, filter: &Filter, last: usize) -> RecentAndLive {
        let state = self.state();
        let mut all: Vec<_> = state.recent.iter().flatten().filter(|(_, event)| filter.takes(event)).cloned().collect();
        let live = state.live.as_ref().map(broadcast::Sender::subscribe);
        drop(state);
        all.sort_by_key(|(number, _)| *number);
        (all.split_off(all.len().saturating_sub(last)).into_iter().map(|(_, event)| event).collect(), live)
    }
}

/// Those that are remembered, oldest first, and a receiver of those to come; `None` when the daemon is stopping.
pub(crate) type RecentAndLive = (Vec<Arc<v1::FlowEvent>>, Option<broadcast::Receiver<Arc<v1::FlowEvent>>>);

impl Engine {
    /// Reads flow events as long as the daemon lives.
    pub async fn run_flow_log(self: Arc<Self>, services: Arc<Services>) {
        // Kept for the next run of this task, should it panic: the datapath gives the ring buffer out once.
        let mut reader = self.flow_reader.lock().await;
        if reader.is_none() {
            match self.datapath.programs().take_events() {
                Ok(events) => *reader = Some(events),
                Err(error) => {
                    warn!(%error, "failed to open the ring buffer of flow events; drops are still counted");
                    return;
                }
            }
        }
        let Some(events) = reader.as_mut() else { return };
        loop {
            let first = match events.next().await {
                Ok(first) => first,
                Err(error) => {
                    warn!(%error, "failed to read flow events; drops are still counted");
                    return;
                }
            };
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Some(event) = events.try_next()
            {
                batch.push(event);
            }
            let (this, services) = (Arc::clone(&self), Arc::clone(&services));
            // A step of policies or Services may hold its lock for a second; the kernel's buffer takes what comes meanwhile.
            supervise::blocking(move || this.annotate_and_publish(&batch, &services)).await;
        }
    }

    /// The latest events that a filter takes.
    pub(crate) fn flow_events(&self, filter: &Filter, last: usize) -> RecentAndLive {
        self.events.recent_and_live(filter, last)
    }

    /// The latest drops.
    pub(crate) fn drops(&self) -> RecentAndLive {
        self.flow_events(&Filter::drops(), DROPS_SHOWN)
    }

    /// Ends every follower, so that the server can end.
    pub fn close_flow_streams(&self) {
        self.events.state().live = None;
    }

    fn annotate_and_publish(&self, batch: &[FlowEvent], services: &Services) {
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let numbers = batch.iter().map(|event| event.service).filter(|service| *service != 0);
        let served = services.port_owners(&numbers.collect());
        let mut interfaces = Interfaces { engine: self, names: HashMap::new(), pods: None };
        let named: Vec<v1::FlowEvent> = self
            .policies
            .annotate(|names| batch.iter().map(|event| name(event, at_ms, names, &served, &mut interfaces)).collect());
        for event in named {
            debug!(?event, "told");
            self.events.push(event);
        }
    }
}

/// What interfaces are called and whose they are, asked once for a batch.
struct Interfaces<'a> {
    engine: &'a Engine,
    names: HashMap<u32, String>,
    pods: Option<HashMap<u32, v1::Pod>>,
}

impl Interfaces<'_> {
    fn name(&mut self, ifindex: u32) -> String {
        let ask = || nix::net::if_::if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok());
        self.names.entry(ifindex).or_insert_with(|| ask().unwrap_or_default()).clone()
    }

    fn pod(&mut self, ifindex: u32) -> Option<v1::Pod> {
        let engine = self.engine;
        let pods = self.pods.get_or_insert_with(|| {
            let attachments = engine.pool_state().pool.list();
            let endpoints = engine.datapath.endpoints().list().into_iter();
            let pod = |endpoint: &crate::bpf::Endpoint| {
                let own = attachments.iter().find(|a| a.lease.addresses == endpoint.addresses)?;
                Some((endpoint.host_ifindex, crate::grpc::pod(&own.pod)))
            };
            endpoints.filter_map(|endpoint| pod(&endpoint)).collect()
        });
        pods.get(&ifindex).cloned()
    }
}

fn name(
    event: &FlowEvent,
    at_ms: u64,
    names: &FlowAnnotator<'_>,
    served: &HashMap<u32, String>,
    interfaces: &mut Interfaces<'_>,
) -> v1::FlowEvent {
    let reason = Drop::from_number(event.reason);
    let dropped = event.reason != 0;
    let [a, b, c, d] = event.ports.to_ne_bytes();
    let [e, f, ..] = event.policy_port.to_ne_bytes();
    let port = |high, low| u32::from(u16::from_be_bytes([high, low]));
    let end = |words: [u32; 4], port: u32| {
        let address = address(event.family, words);
        let pod = address.and_then(|address| names.pod(address)).map(|pod| crate::grpc::pod_name(&pod));
        v1::FlowEnd { address: address.map(|address| address.to_string()).unwrap_or_default(), port, pod }
    };
    let (source, destination) = (end(event.src, port(a, b)), end(event.dst, port(c, d)));
    let is_policed = event.verdicts != [0; 2];
    // Of what answers, the connection's destination is who sends it.
    let elsewhere = event.policy_destination != event.dst && event.policy_destination != event.src;
    let translated = is_policed && (event.service != 0 || elsewhere);
    let [egress, ingress] = event.verdicts.map(|number| names.verdict(number).map(crate::grpc::policy::verdict));
    let mac = |mac: [u8; 6]| if dropped { Mac(mac).to_string() } else { String::new() };
    v1::FlowEvent {
        at_ms,
        verdict: if dropped { DROPPED } else { ALLOWED }.to_owned(),
        source: Some(source),
        destination: Some(destination),
        protocol: u32::from(event.protocol),
        service: served.get(&event.service).cloned().unwrap_or_default(),
        backend: translated.then(|| end(event.policy_destination, port(e, f))),
        egress,
        ingress,
        reason: match reason {
            Some(reason) => reason.name().to_owned(),
            None if dropped => event.reason.to_string(),
            None => String::new(),
        },
        text: reason.map(Drop::text).unwrap_or_default().to_owned(),
        program: Program::from_number(event.program).map(Program::name).unwrap_or_default().to_owned(),
        ifindex: event.ifindex,
        ifname: interfaces.name(event.ifindex),
        pod: dropped.then(|| interfaces.pod(event.ifindex)).flatten(),
        length: event.length,
        source_mac: mac(event.mac.source()),
        destination_mac: mac(event.mac.destination()),
        lost: event.lost,
    }
}

/// A drop as `drops` tells it.
pub(crate) fn dropped_packet(event: &v1::FlowEvent) -> v1::DroppedPacket {
    let end = |end: &Option<v1::FlowEnd>| end.clone().unwrap_or_default();
    let (source, destination) = (end(&event.source), end(&event.destination));
    let decided = [&event.egress, &event.ingress].into_iter().flatten().find(|decision| !decision.allowed);
    let decided = decided.cloned().unwrap_or_default();
    v1::DroppedPacket {
        at_ms: event.at_ms,
        reason: event.reason.clone(),
        text: event.text.clone(),
        program: event.program.clone(),
        ifindex: event.ifindex,
        ifname: event.ifname.clone(),
        source: source.address,
        destination: destination.address,
        protocol: event.protocol,
        source_port: source.port,
        destination_port: destination.port,
        source_mac: event.source_mac.clone(),
        destination_mac: event.destination_mac.clone(),
        length: event.length,
        lost: event.lost,
        pod: event.pod.clone(),
        policy: decided.policies.join(", "),
        decided: decided.reason,
    }
}

/// An address of an event; IPv4 is in the first word.
fn address(family: u8, words: [u32; 4]) -> Option<IpAddr> {
    let [first, ..] = words;
    match family {
        4 => Some(IpAddr::V4(Ipv4Addr::from(first.to_ne_bytes()))),
        6 => {
            let mut bytes = [0u8; 16];
            for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_network_order() {
        let read = |family, words| address(family, words).map(|address| address.to_string());
        assert_eq!(read(4, [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0]).unwrap(), "10.0.0.1");
        let v6 = [u32::from_ne_bytes([0xfd, 0, 0, 0]), 0, 0, u32::from_ne_bytes([0, 0, 0, 1])];
        assert_eq!(read(6, v6).unwrap(), "fd00::1");
        assert_eq!(read(0, [1; 4]), None);
    }

    fn event(verdict: &str, length: u32) -> v1::FlowEvent {
        v1::FlowEvent { verdict: verdict.into(), length, ..Default::default() }
    }

    #[test]
    fn the_memory_is_bounded_keeps_the_order_and_drops_are_not_pushed_out() {
        let log = FlowLog::default();
        for n in 0..2 {
            log.push(event(DROPPED, n));
        }
        for n in 2..10_000 {
            log.push(event(ALLOWED, n));
        }
        log.push(event(DROPPED, 10_000));
        let lengths = |last| -> Vec<u32> {
            log.recent_and_live(&Filter::default(), last).0.iter().map(|event| event.length).collect()
        };
        let all = lengths(usize::MAX);
        assert_eq!(all.len(), REMEMBERED[0] + 3);
        assert!(all.is_sorted() && all.starts_with(&[0, 1, 6928]) && all.ends_with(&[9999, 10_000]), "{all:?}");
        assert_eq!(lengths(2), [9999, 10_000]);
        for n in 0..REMEMBERED[1] as u32 {
            log.push(event(DROPPED, n));
        }
        assert_eq!(log.recent_and_live(&Filter::drops(), usize::MAX).0.len(), REMEMBERED[1]);
        assert_eq!(log.recent_and_live(&Filter::drops(), 1).0[0].length, REMEMBERED[1] as u32 - 1);
    }

    #[test]
    fn followers_end_with_the_daemon() {
        let log = FlowLog::default();
        let mut follower = log.state().live.as_ref().unwrap().subscribe();
        log.push(event(DROPPED, 1));
        log.state().live = None;
        assert_eq!(follower.try_recv().unwrap().length, 1);
        assert!(matches!(follower.try_recv(), Err(broadcast::error::TryRecvError::Closed)));
    }

    #[test]
    fn a_drop_tells_who_forbids_it() {
        let side = |allowed, policy: &str| {
            Some(v1::FlowDecision { allowed, reason: format!("by {policy}"), policies: vec![policy.into()] })
        };
        let event = v1::FlowEvent {
            egress: side(true, "a"),
            ingress: side(false, "b"),
            destination: Some(v1::FlowEnd { address: "10.0.0.1".into(), port: 80, pod: None }),
            ..event(DROPPED, 60)
        };
        let packet = dropped_packet(&event);
        assert_eq!((packet.policy.as_str(), packet.decided.as_str()), ("b", "by b"));
        assert_eq!((packet.destination.as_str(), packet.destination_port), ("10.0.0.1", 80));
    }
}
