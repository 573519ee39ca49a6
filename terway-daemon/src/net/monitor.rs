//! Monitor of rtnetlink events: the node's NICs and addresses, and deletions of our rules, routes and addresses by others.
//!
//! One thread receives rtnetlink's multicast groups. It subscribes first and dumps the state afterwards, so that no change is missed; when
//! the kernel dropped events (`ENOBUFS`), it dumps the state again. After a panic or a failed system call it starts anew.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage as Message;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::{Mutex, MutexGuard};
use terway_core::cidr::Cidr as _;
use terway_core::ident::Mac;
use terway_core::route::TABLE_MAIN;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, timeout_at};

use super::decode::NamedLink;
use super::netns::{PodNetns, PortSet};
use super::socket::{NetlinkSocket, message_type, route_message, sender_port};
use super::{NetError, decode, observe};
use crate::supervise::{self, OnPanic};

/// Receive buffer for events while the thread is busy: some thousand links.
const RECEIVE_BYTES: usize = 4 << 20;
/// Events that a slow subscriber may lag behind before it gets `RecvError::Lagged`.
const EVENTS: usize = 256;
/// Delay before the monitor starts anew after an error, in milliseconds.
const RETRY_MS: u16 = 200;

/// The multicast groups that the monitor subscribes to.
const GROUPS: [u32; 7] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
];

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
    /// Number of deletions by others.
    deletions: watch::Sender<u64>,
}

impl Shared {
    fn nics(&self) -> MutexGuard<'_, BTreeMap<u32, Nic>> {
        // Nothing under the lock can panic.
        self.nics.lock()
    }
}

impl NetMonitor {
    /// Starts the thread in the namespace `netns`. When this returns, the present NICs and addresses are known. `own_ports` are the sockets
    /// whose deletions are ours.
    pub(super) fn start(netns: &PodNetns, own_ports: Arc<PortSet>) -> Result<Self, NetError> {
        let shared = Arc::new(Shared {
            nics: Mutex::default(),
            version: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENTS),
            addresses: watch::Sender::new(Arc::default()),
            deletions: watch::Sender::new(0),
        });
        let (stop, stop_signal) =
            UnixStream::pair().map_err(|source| NetError::io("start the network monitor", source))?;
        let (started, outcome) = std::sync::mpsc::sync_channel(1);
        let (netns, seen) = (netns.clone(), Arc::clone(&shared));
        let body = move || {
            let listener = match Listener::open(&netns, Arc::clone(&seen), Arc::clone(&own_ports)) {
                Ok(listener) => listener,
                Err(error) => return drop(started.send(Err(error))),
            };
            // An error says that the starter is gone, and then so is the other end of `stop_signal`.
            drop(started.send(Ok(())));
            let mut first = Some(listener);
            restart_on_failure(&stop_signal, || {
                let listener = match first.take() {
                    Some(listener) => listener,
                    None => {
                        let listener = Listener::open(&netns, Arc::clone(&seen), Arc::clone(&own_ports))?;
                        listener.report_deletion();
                        listener
                    }
                };
                listener.listen(&stop_signal)
            });
        };
        let builder = thread::Builder::new().stack_size(512 * 1024);
        supervise::spawn_thread_from(builder, "net-monitor", OnPanic::Restart, body)
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

    /// Subscribes to deletions of rules, routes and addresses of ours by other processes: the number of times that some were deleted. Events
    /// that the kernel dropped count as a deletion.
    #[must_use]
    pub fn deletions(&self) -> watch::Receiver<u64> {
        self.shared.deletions.subscribe()
    }

    /// Subscribes to the node's addresses that are reachable from other hosts, sorted, without those of Services on `kube-ipvs0`.
    #[must_use]
    pub fn addresses(&self) -> watch::Receiver<Arc<Vec<IpNetwork>>> {
        self.shared.addresses.subscribe()
    }
}

/// Runs `run` until it returns `Ok`, and again after each error and panic, unless the other end of `stop_signal` has closed.
fn restart_on_failure(stop_signal: &UnixStream, mut run: impl FnMut() -> Result<(), NetError>) {
    loop {
        match catch_unwind(AssertUnwindSafe(&mut run)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!(%error, "the network monitor failed and starts anew"),
            Err(_) => tracing::error!("the network monitor panicked and starts anew"),
        }
        if !matches!(
            poll(&mut [PollFd::new(stop_signal.as_fd(), PollFlags::POLLIN)], PollTimeout::from(RETRY_MS)),
            Ok(0)
        ) {
            return;
        }
    }
}

/// State of the monitor thread.
struct Listener {
    events: NetlinkSocket,
    dumps: NetlinkSocket,
    shared: Arc<Shared>,
    own_ports: Arc<PortSet>,
    addresses: BTreeSet<(u32, IpNetwork)>,
    /// Indices of our links.
    own_links: BTreeSet<u32>,
    /// Indices of links whose addresses are those of Services.
    service_links: BTreeSet<u32>,
}

impl Listener {
    fn open(netns: &PodNetns, shared: Arc<Shared>, own_ports: Arc<PortSet>) -> Result<Self, NetError> {
        if PodNetns::own()?.id() != netns.id() {
            netns.enter()?;
        }
        let mut events = NetlinkSocket::route()?;
        events.set_receive_buffer(RECEIVE_BYTES)?;
        for group in GROUPS {
            events.subscribe(group)?;
        }
        let (dumps, addresses) = (NetlinkSocket::route()?, BTreeSet::new());
        let (own_links, service_links) = (BTreeSet::new(), BTreeSet::new());
        let mut listener = Self { events, dumps, shared, own_ports, addresses, own_links, service_links };
        listener.resync()?;
        Ok(listener)
    }

    /// Processes events until the other end of `stop_signal` closes.
    fn listen(mut self, stop_signal: &UnixStream) -> Result<(), NetError> {
        loop {
            let mut ready = [
                PollFd::new(stop_signal.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(NetError::io("wait for netlink events", errno)),
            }
            let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
            let (should_stop, has_events) = (is_ready(&ready[0]), is_ready(&ready[1]));
            if should_stop {
                return Ok(());
            }
            supervise::injection_point("net-monitor");
            if has_events && !self.read_events() {
                self.resync()?;
                // What was deleted meanwhile is unknown.
                self.report_deletion();
            }
        }
    }

    /// Processes one datagram of events; false if events were lost.
    fn read_events(&mut self) -> bool {
        let mut events = Vec::new();
        let own_ports = Arc::clone(&self.own_ports);
        // New routes and rules, and our own deletions, are the bulk of the events of a busy node.
        let is_relevant = |message: &[u8]| match message_type(message) {
            libc::RTM_NEWROUTE | libc::RTM_NEWRULE => false,
            libc::RTM_DELROUTE | libc::RTM_DELRULE => !own_ports.contains(sender_port(message)),
            _ => true,
        };
        match self.events.events(|message| {
            if is_relevant(message) {
                events.push(message.to_vec());
            }
        }) {
            Ok(()) => {}
            Err(libc::EAGAIN) => return true,
            Err(errno) => {
                tracing::debug!(errno, "the kernel dropped rtnetlink events");
                return false;
            }
        }
        let (mut addresses_changed, mut is_deletion) = (false, false);
        for message in events {
            if let Some(found) = decode::link(&message) {
                // A rename moves the addresses of a link from one kind to the other.
                addresses_changed |= self.update_service_link(&found);
                self.update_nic(found);
                continue;
            }
            if let Some(index) = decode::deleted_link(&message) {
                self.own_links.remove(&index);
                self.service_links.remove(&index);
                self.remove_nic(index);
                continue;
            }
            match route_message(&message) {
                Some(Message::NewAddress(message)) => {
                    addresses_changed |=
                        decode::address(&message).is_some_and(|address| self.addresses.insert(address));
                }
                Some(Message::DelAddress(deleted)) => {
                    let Some(address) = decode::address(&deleted) else { continue };
                    addresses_changed |= self.addresses.remove(&address);
                    is_deletion |=
                        self.shared.nics().contains_key(&address.0) && !self.own_ports.contains(sender_port(&message));
                }
                Some(Message::DelRoute(deleted)) => {
                    is_deletion |= decode::route(&deleted).is_some_and(|(index, route)| {
                        route.table != TABLE_MAIN || (route.dst.is_host() && self.own_links.contains(&index))
                    });
                }
                Some(Message::DelRule(deleted)) => is_deletion |= decode::rule(&deleted).is_some(),
                _ => {}
            }
        }
        if addresses_changed {
            self.publish_addresses();
        }
        if is_deletion {
            self.report_deletion();
        }
        true
    }

    fn resync(&mut self) -> Result<(), NetError> {
        let links = observe::links(&mut self.dumps)?;
        self.addresses = observe::addresses(&mut self.dumps)?.into_iter().collect();
        let present: BTreeSet<u32> = links.iter().map(|found| found.link.index).collect();
        let removed: Vec<u32> = self.shared.nics().keys().copied().filter(|index| !present.contains(index)).collect();
        removed.into_iter().for_each(|index| self.remove_nic(index));
        self.own_links.retain(|index| present.contains(index));
        self.service_links.retain(|index| present.contains(index));
        for found in links {
            self.update_service_link(&found);
            self.update_nic(found);
        }
        self.publish_addresses();
        Ok(())
    }

    fn report_deletion(&self) {
        self.shared.deletions.send_modify(|deletions| *deletions = deletions.wrapping_add(1));
    }

    /// Notes whether the addresses of a link are those of Services; true if that is new.
    fn update_service_link(&mut self, found: &NamedLink) -> bool {
        if observe::holds_service_addresses(found) {
            self.service_links.insert(found.link.index)
        } else {
            self.service_links.remove(&found.link.index)
        }
    }

    fn update_nic(&mut self, found: NamedLink) {
        if found.link.is_ours() {
            self.own_links.insert(found.link.index);
        } else {
            self.own_links.remove(&found.link.index);
        }
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
        let nets = observe::node_addresses(&self.addresses, &self.service_links);
        self.shared.addresses.send_if_modified(|old| {
            let modified = **old != nets;
            if modified {
                *old = Arc::new(nets);
            }
            modified
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monitor_restarts_after_panic_and_error_until_it_is_stopped() {
        let (stop, stop_signal) = UnixStream::pair().unwrap();
        let mut runs = 0;
        restart_on_failure(&stop_signal, || {
            runs += 1;
            match runs {
                1 => panic!("a test's panic"),
                2 => Err(NetError::Worker),
                _ => Ok(()),
            }
        });
        assert_eq!(runs, 3);
        drop(stop);
        let mut runs = 0;
        restart_on_failure(&stop_signal, || {
            runs += 1;
            Err(NetError::Worker)
        });
        assert_eq!(runs, 1, "nobody wants it any more");
    }
}
