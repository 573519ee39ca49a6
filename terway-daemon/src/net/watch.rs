//! News from the kernel about the node's NICs and addresses.
//!
//! One thread listens to rtnetlink's multicast groups. It subscribes first and reads everything afterwards, so that nothing falls in between;
//! when the kernel had to drop events (`ENOBUFS`), it reads everything again.

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
use super::socket::{Netlink, inner};
use super::{NetError, decode, observe};

/// Room for events while the thread is busy: some thousand links.
const RECEIVE_BYTES: usize = 4 << 20;
/// Events that a slow subscriber may lag behind before it is told so.
const EVENTS: usize = 256;
/// When reading everything failed, it is tried again after this long, in milliseconds.
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
    /// It is gone from the node.
    Gone(Nic),
}

/// The watching thread and what it has seen. Dropping it ends the thread.
pub struct Watch {
    shared: Arc<Shared>,
    /// The thread hangs up when this end closes.
    _stop: UnixStream,
}

struct Shared {
    nics: Mutex<BTreeMap<u32, Nic>>,
    /// Counts changes of `nics`.
    version: watch::Sender<u64>,
    events: broadcast::Sender<NicEvent>,
    addresses: watch::Sender<Arc<Vec<IpNetwork>>>,
}

impl Shared {
    fn nics(&self) -> MutexGuard<'_, BTreeMap<u32, Nic>> {
        // Nothing that can panic happens under the lock.
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// Starts the thread in the namespace `home`. When this returns, the present NICs and addresses are known.
    pub(super) fn start(home: &PodNetns) -> Result<Self, NetError> {
        let shared = Arc::new(Shared {
            nics: Mutex::default(),
            version: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENTS),
            addresses: watch::Sender::new(Arc::default()),
        });
        let (stop, hangup) = UnixStream::pair().map_err(|source| NetError::io("start the link watch", source))?;
        let (started, outcome) = std::sync::mpsc::sync_channel(1);
        let (home, seen) = (home.clone(), Arc::clone(&shared));
        let body = move || match Listener::open(&home, seen) {
            Ok(listener) => {
                let _ = started.send(Ok(()));
                listener.listen(&hangup);
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        };
        thread::Builder::new()
            .name("net-watch".to_owned())
            .stack_size(512 * 1024)
            .spawn(body)
            .map_err(|source| NetError::io("start the link watch", source))?;
        outcome.recv().unwrap_or(Err(NetError::Worker))?;
        Ok(Self { shared, _stop: stop })
    }

    /// Waits until a NIC with this address is there, or `deadline` has passed. Any number of callers may wait at once.
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

    /// The NICs that are there.
    #[must_use]
    pub fn nics(&self) -> Vec<Nic> {
        self.shared.nics().values().cloned().collect()
    }

    /// Changes from now on. A receiver that lags is told so, and should look at [`Watch::nics`].
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NicEvent> {
        self.shared.events.subscribe()
    }

    /// The node's addresses that others can reach, sorted; now and after every change.
    #[must_use]
    pub fn addresses(&self) -> watch::Receiver<Arc<Vec<IpNetwork>>> {
        self.shared.addresses.subscribe()
    }
}

/// The thread's side.
struct Listener {
    events: Netlink,
    dumps: Netlink,
    shared: Arc<Shared>,
    addresses: BTreeSet<(u32, IpNetwork)>,
}

impl Listener {
    fn open(home: &PodNetns, shared: Arc<Shared>) -> Result<Self, NetError> {
        if PodNetns::own()?.id() != home.id() {
            home.enter()?;
        }
        let mut events = Netlink::open()?;
        events.set_receive_buffer(RECEIVE_BYTES)?;
        for group in [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR] {
            events.subscribe(group)?;
        }
        let mut listener = Self { events, dumps: Netlink::open()?, shared, addresses: BTreeSet::new() };
        listener.read_everything()?;
        Ok(listener)
    }

    fn listen(mut self, hangup: &UnixStream) {
        let mut stale = false;
        loop {
            let mut ready =
                [PollFd::new(hangup.as_fd(), PollFlags::POLLIN), PollFd::new(self.events.as_fd(), PollFlags::POLLIN)];
            let timeout = if stale { PollTimeout::from(RETRY_MS) } else { PollTimeout::NONE };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the link watch ended");
                    return;
                }
            }
            let fired = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
            let (ended, news) = (fired(&ready[0]), fired(&ready[1]));
            if ended {
                return;
            }
            if news {
                stale |= !self.read_news();
            }
            if stale {
                match self.read_everything() {
                    Ok(()) => stale = false,
                    Err(error) => {
                        tracing::warn!(%error, "cannot list the node's links");
                        thread::sleep(Duration::from_millis(u64::from(RETRY_MS)));
                    }
                }
            }
        }
    }

    /// Reads one datagram; false if events got lost.
    fn read_news(&mut self) -> bool {
        let mut news = Vec::new();
        match self.events.events(|message| news.push(message.to_vec())) {
            Ok(()) => {}
            Err(libc::EAGAIN) => return true,
            Err(errno) => {
                tracing::debug!(errno, "link events got lost");
                return false;
            }
        }
        let mut moved = false;
        for message in news {
            if let Some(found) = decode::link(&message) {
                self.present(found);
                continue;
            }
            if let Some(index) = decode::deleted_link(&message) {
                self.gone(index);
                continue;
            }
            match inner(&message) {
                Some(Message::NewAddress(message)) => {
                    moved |= decode::address(&message).is_some_and(|address| self.addresses.insert(address));
                }
                Some(Message::DelAddress(message)) => {
                    moved |= decode::address(&message).is_some_and(|address| self.addresses.remove(&address));
                }
                _ => {}
            }
        }
        if moved {
            self.publish_addresses();
        }
        true
    }

    fn read_everything(&mut self) -> Result<(), NetError> {
        let links = observe::links(&mut self.dumps)?;
        self.addresses = observe::addresses(&mut self.dumps)?.into_iter().collect();
        let there: BTreeSet<u32> = links.iter().map(|found| found.link.index).collect();
        let vanished: Vec<u32> = self.shared.nics().keys().copied().filter(|index| !there.contains(index)).collect();
        vanished.into_iter().for_each(|index| self.gone(index));
        links.into_iter().for_each(|found| self.present(found));
        self.publish_addresses();
        Ok(())
    }

    fn present(&self, found: NamedLink) {
        // VLANs, IPvlan slaves and bridges bear the address of the NIC under them. (A veth stands for a NIC in the simulated cloud.)
        let device = matches!(found.link.kind.as_deref(), None | Some("veth"));
        let nic = match found.link.mac {
            Some(mac) if device && !found.loopback && !found.link.is_ours() => {
                Nic { ifindex: found.link.index, name: found.name, mac }
            }
            _ => return self.gone(found.link.index),
        };
        let old = self.shared.nics().insert(nic.ifindex, nic.clone());
        if old.as_ref() != Some(&nic) {
            self.changed(NicEvent::Present(nic));
        }
    }

    fn gone(&self, index: u32) {
        let old = self.shared.nics().remove(&index);
        if let Some(nic) = old {
            self.changed(NicEvent::Gone(nic));
        }
    }

    fn changed(&self, event: NicEvent) {
        // Nobody need be listening.
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
