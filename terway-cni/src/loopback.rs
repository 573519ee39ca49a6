//! The CNI plugin `loopback`: sets `lo` of a pod's network namespace up. It never calls the daemon.
//!
//! Runtimes call a plugin of this name for every pod before the network's own (containerd: `setupPodNetwork`), and a node that has no
//! other CNI installation has none. The same binary serves it under this name, so that the image carries nothing foreign.

use std::fs::File;
use std::io;
use std::net::{Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use serde_json::Value;
use terway_core::cni::env::Target;
use terway_core::cni::result::{Attached, Interface, IpConfig};
use terway_core::cni::{Failure, NetConf, Request};
use terway_core::errors::{CHECK_FAILED, CNI_NETNS, Error};

use crate::netns;

/// The file name by which the runtime calls it.
pub(crate) const NAME: &str = "loopback";

/// Carries out `request` and returns the document for stdout, if it has one.
///
/// # Errors
/// The CNI error for the runtime.
pub(crate) fn run(request: &Request, conf: &NetConf) -> Result<Option<Value>, Failure> {
    match request {
        Request::Add(target) => add(target, conf).map(Some),
        Request::Check(target) => check(target).map(|()| None),
        // `lo` goes with its namespace; nothing else was made.
        Request::Del(_) | Request::Gc | Request::Status | Request::Version => Ok(None),
    }
}

fn add(target: &Target, conf: &NetConf) -> Result<Value, Failure> {
    let failed = |error: io::Error| Error::new(CNI_NETNS, format!("{}: lo cannot be set up: {error}.", target.netns));
    let previous = conf.options()?.previous;
    netns::check(&target.netns)?;
    let lo = Loopback::enter(target).map_err(failed)?;
    lo.set_up().map_err(failed)?;
    if let Some(previous) = previous {
        return Ok(previous.document(conf.version));
    }
    let ip =
        |text: &str| IpConfig { address: text.parse().expect("a constant address"), gateway: None, interface: None };
    let mut ips = vec![ip("127.0.0.1/8")];
    if UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        ips.push(ip("::1/128"));
    }
    let pod = Interface::new("lo", Some("00:00:00:00:00:00".parse().expect("a constant MAC")), 0, &target.netns);
    let attached = Attached { host: None, pod, ips, routes: Vec::new() };
    Ok(terway_core::cni::result::CniResult::default().attach(attached, None).document(conf.version))
}

fn check(target: &Target) -> Result<(), Failure> {
    netns::check(&target.netns)?;
    let is_up = Loopback::enter(target).and_then(|lo| lo.flags()).map(|flags| flags & IFF_UP != 0);
    match is_up {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::new(CHECK_FAILED, "lo is down.").into()),
        Err(error) => Err(Error::new(CNI_NETNS, format!("{}: lo cannot be read: {error}.", target.netns)).into()),
    }
}

/// `IFF_UP`, include/uapi/linux/if.h.
const IFF_UP: libc::c_short = 1;

/// A socket in the pod's network namespace, to read and set the flags of its `lo`.
struct Loopback(OwnedFd);

impl Loopback {
    /// Moves the only thread of this process into the namespace, for the rest of its life.
    fn enter(target: &Target) -> io::Result<Self> {
        let namespace = File::open(&target.netns)?;
        // SAFETY: the descriptor is open for the whole call.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(socket) }))
    }

    fn flags(&self) -> io::Result<libc::c_short> {
        let request = self.ioctl(libc::SIOCGIFFLAGS, 0)?;
        // SAFETY: the kernel has filled in this member of the union.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    fn set_up(&self) -> io::Result<()> {
        let flags = self.flags()?;
        self.ioctl(libc::SIOCSIFFLAGS, flags | IFF_UP).map(drop)
    }

    /// netdevice(7).
    fn ioctl(&self, number: libc::Ioctl, flags: libc::c_short) -> io::Result<libc::ifreq> {
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        let mut request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
        // SAFETY: the pointer is to a live `ifreq` whose name is terminated, which is what both requests read and write.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), number, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(request)
    }
}
