//! Dropped packets with names: reads the datapath's events, remembers the latest, tells whoever follows.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use terway_abi::{Drop, DropEvent, Program};
use terway_core::ident::Mac;
use terway_proto::v1;
use tokio::sync::broadcast;
use tracing::{debug, warn};

use super::Engine;

/// Drops that are remembered for those who ask later.
const REMEMBERED: usize = 256;

/// Drops that a follower may lag behind before it misses some.
const LAG: usize = 256;

/// The memory of dropped packets.
pub(super) struct DropLog(Mutex<State>);

struct State {
    recent: VecDeque<v1::DroppedPacket>,
    /// `None` once the daemon stops: followers end then.
    live: Option<broadcast::Sender<v1::DroppedPacket>>,
}

impl Default for DropLog {
    fn default() -> Self {
        let live = Some(broadcast::Sender::new(LAG));
        Self(Mutex::new(State { recent: VecDeque::with_capacity(REMEMBERED), live }))
    }
}

impl DropLog {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, packet: v1::DroppedPacket) {
        let mut state = self.state();
        if let Some(live) = &state.live {
            // Nobody may be following.
            let _ = live.send(packet.clone());
        }
        if state.recent.len() == REMEMBERED {
            state.recent.pop_front();
        }
        state.recent.push_back(packet);
    }
}

impl Engine {
    /// Reads drop events as long as the daemon lives.
    pub async fn log_drops(self: Arc<Self>) {
        let mut events = match self.datapath.take_events() {
            Ok(events) => events,
            Err(error) => {
                warn!(%error, "drop events cannot be read; drops are counted all the same");
                return;
            }
        };
        loop {
            match events.next().await {
                Ok(event) => {
                    let told = if event.rule == 0 { None } else { self.policies.reason(event.rule).await };
                    let packet = self.name_drop(&event, told);
                    debug!(?packet, "dropped");
                    self.drops.push(packet);
                }
                Err(error) => {
                    warn!(%error, "drop events cannot be read any more; drops are counted all the same");
                    return;
                }
            }
        }
    }

    /// The latest drops, oldest first, and a receiver of those to come; `None` when the daemon is stopping.
    #[must_use]
    pub fn drops(&self) -> (Vec<v1::DroppedPacket>, Option<broadcast::Receiver<v1::DroppedPacket>>) {
        let state = self.drops.state();
        (state.recent.iter().cloned().collect(), state.live.as_ref().map(broadcast::Sender::subscribe))
    }

    /// Ends every follower, so that the server can end.
    pub fn stop_following(&self) {
        self.drops.state().live = None;
    }

    /// A drop with names; `told` is the policy that forbade the packet, and why.
    fn name_drop(&self, event: &DropEvent, told: Option<(String, String)>) -> v1::DroppedPacket {
        let reason = Drop::from_number(event.reason);
        let [a, b, c, d] = event.ports.to_ne_bytes();
        let (policy, decided) = told.unwrap_or_default();
        v1::DroppedPacket {
            at_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            reason: reason.map_or_else(|| event.reason.to_string(), |r| r.name().to_owned()),
            text: reason.map(Drop::text).unwrap_or_default().to_owned(),
            program: Program::from_number(event.program).map(Program::name).unwrap_or_default().to_owned(),
            ifindex: event.ifindex,
            ifname: nix::net::if_::if_indextoname(event.ifindex)
                .ok()
                .and_then(|name| name.into_string().ok())
                .unwrap_or_default(),
            source: address(event.family, event.src),
            destination: address(event.family, event.dst),
            protocol: u32::from(event.protocol),
            source_port: u32::from(u16::from_be_bytes([a, b])),
            destination_port: u32::from(u16::from_be_bytes([c, d])),
            source_mac: Mac(event.mac.source()).to_string(),
            destination_mac: Mac(event.mac.destination()).to_string(),
            length: event.length,
            lost: event.lost,
            pod: self.pod_behind(event.ifindex),
            policy,
            decided,
        }
    }

    fn pod_behind(&self, host_ifindex: u32) -> Option<v1::Pod> {
        let endpoint = self.datapath.endpoints().into_iter().find(|e| e.host_ifindex == host_ifindex)?;
        let attachments = self.core().pool.list();
        let pod = attachments.into_iter().find(|a| a.grant.addresses == endpoint.addresses)?.pod;
        Some(v1::Pod { namespace: pod.namespace, name: pod.name, uid: pod.uid })
    }
}

/// An address of an event; IPv4 is in the first word.
fn address(family: u8, words: [u32; 4]) -> String {
    let [first, ..] = words;
    match family {
        4 => IpAddr::V4(Ipv4Addr::from(first.to_ne_bytes())).to_string(),
        6 => {
            let mut bytes = [0u8; 16];
            for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_string()
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_network_order() {
        assert_eq!(address(4, [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0]), "10.0.0.1");
        let v6 = [u32::from_ne_bytes([0xfd, 0, 0, 0]), 0, 0, u32::from_ne_bytes([0, 0, 0, 1])];
        assert_eq!(address(6, v6), "fd00::1");
        assert_eq!(address(0, [1; 4]), "");
    }

    #[test]
    fn the_memory_is_bounded_and_followers_end_with_the_daemon() {
        let log = DropLog::default();
        let mut follower = log.state().live.as_ref().unwrap().subscribe();
        for n in 0..REMEMBERED as u32 + 10 {
            log.push(v1::DroppedPacket { length: n, ..Default::default() });
        }
        assert_eq!(log.state().recent.len(), REMEMBERED);
        assert_eq!(log.state().recent.front().unwrap().length, 10);
        log.state().live = None;
        let mut last = None;
        loop {
            match follower.try_recv() {
                Ok(packet) => last = Some(packet.length),
                Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => break,
            }
        }
        assert_eq!(last, Some(REMEMBERED as u32 + 9));
    }
}
