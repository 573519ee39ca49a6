//! Monitor of rtnetlink events: the node's NICs and addresses.
//!
//! One thread receives rtnetlink's multicast groups. It subscribes first and dumps the state afterwards, so that no change is missed; when
//! the kernel dropped events (`ENOBUFS`), it dumps the state again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage as Message;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use terway_core::ident::Mac;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, timeout_at};

use super::decode::NamedLink;
use super::netns::PodNetns;
use super::socket::{NetlinkSocket, route_message};
use super::{NetError, decode, observe};

/// Receive buffer for events while the thread is busy: some thousand links.
const RECEIVE_BYTES: usize = 4 << 20;
/// Events that a slow subscriber may lag behind before it gets `RecvError::Lagged`.
const EVENTS: usize = 256;
/// Delay before a failed resync is repeated, in milliseconds.
const RETRY_MS: u16 = 200;

/// A network interface that may be an ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Interface index.
    pub ifindex: u32,
    /// Interface name. udev may change it soon after the interface appeared.
    pub name: String,
    /// Ethernet address.
    pub mac: Mac,
}

/// A change among the NICs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NicEvent {
    /// It appeared, or its name or address changed.
    Present(Nic),
    /// It was removed from the node.
    Removed(Nic),
}

/// The monitor thread and the state it has seen. Dropping it ends the thread.
pub struct NetMonitor {
    shared: Arc<Shared>,
    /// The thread ends when this end closes.
    _stop: UnixStream,
}

struct Shared {
    nics: Mutex<BTreeMap<u32, Nic>>,
    /// Number of changes of `nics`.
    version: watch::Sender<u64>,
    events: broadcast::Sender<NicEvent>,
    addresses: watch::Sender<Arc<Vec<IpNetwork>>>,
}

impl Shared {
    fn nics(&self) -> MutexGuard<'_, BTreeMap<u32, Nic>> {
        // Nothing under the lock can panic.
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NetMonitor {
    /// Starts the thread in the namespace `netns`. When this returns, the present NICs and addresses are known.
    pub(super) fn start(netns: &PodNetns) -> Result<Self, NetError> {
        let shared = Arc::new(Shared {
            nics: Mutex::default(),
            version: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENTS),
            addresses: watch::Sender::new(Arc::default()),
        });
        let (stop, stop_signal) =
            UnixStream::pair().map_err(|source| NetError::io("start the network monitor", source))?;
        let (started, outcome) = std::sync::mpsc::sync_channel(1);
        let (netns, seen) = (netns.clone(), Arc::clone(&shared));
        let body = move || match Listener::open(&netns, seen) {
            Ok(listener) => {
                let _ = started.send(Ok(()));
                listener.listen(&stop_signal);
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        };
        thread::Builder::new()
            .name("net-monitor".to_owned())
            .stack_size(512 * 1024)
            .spawn(body)
            .map_err(|source| NetError::io("start the network monitor", source))?;
        outcome.recv().unwrap_or(Err(NetError::Worker))?;
        Ok(Self { shared, _stop: stop })
    }

    /// Waits until a NIC with this MAC address is present, or until `deadline`. Any number of callers may wait at once.
    pub async fn wait_for_mac(&self, mac: Mac, deadline: Instant) -> Option<Nic> {
        let mut version = self.shared.version.subscribe();
        loop {
            version.borrow_and_update();
            if let Some(nic) = self.shared.nics().values().find(|nic| nic.mac == mac).cloned() {
                return Some(nic);
            }
            timeout_at(deadline, version.changed()).await.ok()?.ok()?;
        }
    }

    /// The present NICs.
    #[must_use]
    pub fn nics(&self) -> Vec<Nic> {
        self.shared.nics().values().cloned().collect()
    }

    /// Subscribes to changes from now on. A receiver that got `RecvError::Lagged` should read [`NetMonitor::nics`].
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NicEvent> {
        self.shared.events.subscribe()
    }

    /// Subscribes to the node's addresses that are reachable from other hosts, sorted.
    #[must_use]
    pub fn addresses(&self) -> watch::Receiver<Arc<Vec<IpNetwork>>> {
        self.shared.addresses.subscribe()
    }
}

/// State of the monitor thread.
struct Listener {
    events: NetlinkSocket,
    dumps: NetlinkSocket,
    shared: Arc<Shared>,
    addresses: BTreeSet<(u32, IpNetwork)>,
}

impl Listener {
    fn open(netns: &PodNetns, shared: Arc<Shared>) -> Result<Self, NetError> {
        if PodNetns::own()?.id() != netns.id() {
            netns.enter()?;
        }
        let mut events = NetlinkSocket::route()?;
        events.set_receive_buffer(RECEIVE_BYTES)?;
        for group in [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR] {
            events.subscribe(group)?;
        }
        let mut listener = Self { events, dumps: NetlinkSocket::route()?, shared, addresses: BTreeSet::new() };
        listener.resync()?;
        Ok(listener)
    }

    fn listen(mut self, stop_signal: &UnixStream) {
        let mut needs_resync = false;
        loop {
            let mut ready = [
                PollFd::new(stop_signal.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            ];
            let timeout = if needs_resync { PollTimeout::from(RETRY_MS) } else { PollTimeout::NONE };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the network monitor failed");
                    return;
                }
            }
            let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
            let (should_stop, has_events) = (is_ready(&ready[0]), is_ready(&ready[1]));
            if should_stop {
                return;
            }
            if has_events {
                needs_resync |= !self.read_events();
            }
            if needs_resync {
                match self.resync() {
                    Ok(()) => needs_resync = false,
                    Err(error) => {
                        tracing::warn!(%error, "cannot list the node's links");
                        thread::sleep(Duration::from_millis(u64::from(RETRY_MS)));
                    }
                }
            }
        }
    }

    /// Processes one datagram of events; false if events were lost.
    fn read_events(&mut self) -> bool {
        let mut events = Vec::new();
        match self.events.events(|message| events.push(message.to_vec())) {
            Ok(()) => {}
            Err(libc::EAGAIN) => return true,
            Err(errno) => {
                tracing::debug!(errno, "the kernel dropped rtnetlink events");
                return false;
            }
        }
        let mut addresses_changed = false;
        for message in events {
            if let Some(found) = decode::link(&message) {
                self.update_nic(found);
                continue;
            }
            if let Some(index) = decode::deleted_link(&message) {
                self.remove_nic(index);
                continue;
            }
            match route_message(&message) {
                Some(Message::NewAddress(message)) => {
                    addresses_changed |=
                        decode::address(&message).is_some_and(|address| self.addresses.insert(address));
                }
                Some(Message::DelAddress(message)) => {
                    addresses_changed |=
                        decode::address(&message).is_some_and(|address| self.addresses.remove(&address));
                }
                _ => {}
            }
        }
        if addresses_changed {
            self.publish_addresses();
        }
        true
    }

    fn resync(&mut self) -> Result<(), NetError> {
        let links = observe::links(&mut self.dumps)?;
        self.addresses = observe::addresses(&mut self.dumps)?.into_iter().collect();
        let present: BTreeSet<u32> = links.iter().map(|found| found.link.index).collect();
        let removed: Vec<u32> = self.shared.nics().keys().copied().filter(|index| !present.contains(index)).collect();
        removed.into_iter().for_each(|index| self.remove_nic(index));
        links.into_iter().for_each(|found| self.update_nic(found));
        self.publish_addresses();
        Ok(())
    }

    fn update_nic(&self, found: NamedLink) {
        // VLANs, IPvlan interfaces and bridges have the MAC address of their lower NIC. (In the simulated cloud a NIC is a veth.)
        let is_nic = matches!(found.link.kind.as_deref(), None | Some("veth"));
        let nic = match found.link.mac {
            Some(mac) if is_nic && !found.is_loopback && !found.link.is_ours() => {
                Nic { ifindex: found.link.index, name: found.name, mac }
            }
            _ => return self.remove_nic(found.link.index),
        };
        let old = self.shared.nics().insert(nic.ifindex, nic.clone());
        if old.as_ref() != Some(&nic) {
            self.publish_nic(NicEvent::Present(nic));
        }
    }

    fn remove_nic(&self, index: u32) {
        let old = self.shared.nics().remove(&index);
        if let Some(nic) = old {
            self.publish_nic(NicEvent::Removed(nic));
        }
    }

    fn publish_nic(&self, event: NicEvent) {
        // An error only says that there is no subscriber.
        let _ = self.shared.events.send(event);
        self.shared.version.send_modify(|version| *version += 1);
    }

    fn publish_addresses(&self) {
        let mut nets: Vec<IpNetwork> =
            self.addresses.iter().map(|(_, net)| *net).filter(|net| observe::reachable(net.ip())).collect();
        nets.sort_unstable();
        nets.dedup();
        self.shared.addresses.send_if_modified(|old| {
            let modified = **old != nets;
            if modified {
                *old = Arc::new(nets);
            }
            modified
        });
    }
}
