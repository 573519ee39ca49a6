//! Executes the steps of plans: groups consecutive ones into netlink batches, and maps errors that mean "already done" to success.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use terway_core::route::{NetOp, Rule, Selector, Step, StepNetns};

use super::socket::{ErrorReply, NetlinkSocket, Request};
use super::{NetError, decode, messages};

/// A netlink socket in a network namespace, with the interface indices known there.
struct Netns<'a> {
    netlink: &'a mut NetlinkSocket,
    indices: Vec<(String, u32)>,
}

impl Netns<'_> {
    fn index_of(&mut self, dev: &str) -> Result<u32, ErrorReply> {
        if let Some((_, index)) = self.indices.iter().find(|(name, _)| name == dev) {
            return Ok(*index);
        }
        let no_device = || ErrorReply { errno: libc::ENODEV, extack: None };
        let (message, flags) = messages::get_link(dev);
        let lost = |error: NetError| ErrorReply { errno: error.errno().unwrap_or_default(), extack: None };
        let reply = self.netlink.request(message, flags).map_err(lost)??;
        let index = decode::link_of(reply).ok_or_else(no_device)?.link.index;
        self.indices.push((dev.to_owned(), index));
        Ok(index)
    }
}

/// The network namespaces in which steps are executed.
pub(super) struct StepContext<'a> {
    host: Netns<'a>,
    pod: Option<Netns<'a>>,
}

impl<'a> StepContext<'a> {
    /// The node's namespace, with known interface indices.
    pub(super) fn host(netlink: &'a mut NetlinkSocket, indices: Vec<(String, u32)>) -> Self {
        Self { host: Netns { netlink, indices }, pod: None }
    }

    /// Adds the pod's namespace. The calling thread must be in it.
    pub(super) fn and_pod(self, netlink: &'a mut NetlinkSocket, indices: Vec<(String, u32)>) -> Self {
        Self { pod: Some(Netns { netlink, indices }), ..self }
    }

    fn netns(&mut self, step_netns: StepNetns) -> Result<&mut Netns<'a>, NetError> {
        match step_netns {
            StepNetns::Host => Ok(&mut self.host),
            StepNetns::Pod => self.pod.as_mut().ok_or_else(|| NetError::Netns {
                path: "the pod".to_owned(),
                reason: "its network namespace is gone".to_owned(),
            }),
        }
    }
}

/// A request of the current batch and the operation it belongs to.
struct Pending<'a> {
    op: &'a NetOp,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Performs the operation.
    Operation,
    /// Deletes a conflicting rule; the request that adds ours follows.
    ConflictingRule,
}

/// Executes `steps` in order. Sysctls are written by the calling thread, which must be in their namespace.
pub(super) fn run<'s>(
    steps: impl IntoIterator<Item = &'s Step>,
    context: &mut StepContext<'_>,
) -> Result<(), NetError> {
    let mut batch: Vec<Request> = Vec::new();
    let mut pending: Vec<Pending<'s>> = Vec::new();
    let mut step_netns = StepNetns::Host;
    for step in steps {
        let op = &step.op;
        if step.netns != step_netns || matches!(op, NetOp::Sysctl { .. }) {
            flush(context.netns(step_netns)?, &mut batch, &mut pending)?;
            step_netns = step.netns;
        }
        let netns = context.netns(step_netns)?;
        if let NetOp::Sysctl { path, value } = op {
            write_sysctl(path, value).map_err(|source| NetError::io(step.to_string(), source))?;
            continue;
        }
        match requests(op, netns) {
            Ok(list) => {
                for (part, request) in list {
                    batch.push(request);
                    pending.push(Pending { op, part });
                }
            }
            Err(error) if already_done(op, error.errno) => {}
            Err(error) => return Err(error.during(step.to_string())),
        }
    }
    flush(context.netns(step_netns)?, &mut batch, &mut pending)
}

fn flush(netns: &mut Netns<'_>, batch: &mut Vec<Request>, pending: &mut Vec<Pending<'_>>) -> Result<(), NetError> {
    if batch.is_empty() {
        return Ok(());
    }
    let replies = netns.netlink.batch(std::mem::take(batch))?;
    let mut conflicting = Vec::new();
    let mut failure = None;
    for (Pending { op, part }, reply) in pending.drain(..).zip(replies) {
        match (part, reply) {
            (Part::Operation, Err(error)) if failure.is_none() && !already_done(op, error.errno) => {
                failure = Some(error.during(op.to_string()));
            }
            (Part::ConflictingRule, Ok(_)) => {
                if let NetOp::AddRule(rule) = op {
                    conflicting.push(rule);
                }
            }
            _ => {}
        }
    }
    for rule in conflicting {
        remove_conflicting_rules(netns.netlink, rule)?;
    }
    failure.map_or(Ok(()), Err)
}

/// Deletes all rules with this priority and selector, then adds ours again. Called after one such rule was found: others may precede ours.
fn remove_conflicting_rules(netlink: &mut NetlinkSocket, rule: &Rule) -> Result<(), NetError> {
    loop {
        let (message, flags) = messages::delete_conflicting_rule(rule);
        match netlink.request(message, flags)? {
            Ok(_) => {}
            Err(error) if error.errno == libc::ENOENT => break,
            Err(error) => return Err(error.during(format!("delete {rule}"))),
        }
    }
    let (message, flags) = messages::add_rule(rule);
    match netlink.request(message, flags)? {
        Err(error) if error.errno != libc::EEXIST => Err(error.during(format!("add {rule}"))),
        _ => Ok(()),
    }
}

/// The netlink requests of an operation. Links are created and deleted in `pod.rs`, which checks their owner.
fn requests(op: &NetOp, netns: &mut Netns<'_>) -> Result<Vec<(Part, Request)>, ErrorReply> {
    let request = match op {
        NetOp::SetMac { dev, mac } => messages::set_mac(netns.index_of(dev)?, *mac),
        NetOp::SetMtu { dev, mtu } => messages::set_mtu(netns.index_of(dev)?, *mtu),
        NetOp::NoAddrGen { dev } => messages::no_addr_gen(netns.index_of(dev)?),
        NetOp::SetUp { dev } => messages::set_up(netns.index_of(dev)?, true),
        NetOp::SetDown { dev } => messages::set_up(netns.index_of(dev)?, false),
        NetOp::AddAddress { dev, address } => messages::add_address(netns.index_of(dev)?, *address),
        NetOp::DelAddress { dev, address } => messages::delete_address(netns.index_of(dev)?, *address),
        NetOp::AddRoute(route) => messages::add_route(route, netns.index_of(&route.dev)?)?,
        NetOp::DelRoute(route) => messages::delete_route(route, netns.index_of(&route.dev)?)?,
        NetOp::AddRule(rule) => {
            let add = (Part::Operation, messages::add_rule(rule));
            // The first matching rule wins: a leftover rule to another ENI's table must not precede ours.
            return Ok(match rule.selector {
                Selector::From(_) => vec![(Part::ConflictingRule, messages::delete_conflicting_rule(rule)), add],
                Selector::To(_) => vec![add],
            });
        }
        NetOp::DelRule(rule) => messages::delete_rule(rule),
        NetOp::AddNeighbour(neighbour) => messages::add_neighbour(neighbour, netns.index_of(&neighbour.dev)?),
        NetOp::DelNeighbour(neighbour) => messages::delete_neighbour(neighbour, netns.index_of(&neighbour.dev)?),
        NetOp::AddVeth { .. } | NetOp::DelLink { .. } | NetOp::Sysctl { .. } => return Ok(Vec::new()),
    };
    Ok(vec![(Part::Operation, request)])
}

/// Whether this error for `op` means that its goal is reached already.
fn already_done(op: &NetOp, errno: i32) -> bool {
    match op {
        NetOp::AddRule(_) => errno == libc::EEXIST,
        // A kernel without IPv6 adds no link-local addresses.
        NetOp::NoAddrGen { .. } => matches!(errno, libc::EAFNOSUPPORT | libc::EOPNOTSUPP),
        NetOp::DelAddress { .. }
        | NetOp::DelRoute(_)
        | NetOp::DelRule(_)
        | NetOp::DelNeighbour(_)
        | NetOp::SetDown { .. } => {
            matches!(errno, libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENXIO)
        }
        _ => false,
    }
}

/// Where the kernel's sysctls are, unless [`set_sysctl_dir`] names another place.
const PROC_SYS: &str = "/proc/sys";

static SYSCTLS: OnceLock<PathBuf> = OnceLock::new();

/// Sets the folder of sysctls of this process, once and before any is used. A container's own `/proc/sys` is read-only; the node's `/proc/sys/net`
/// can be mounted elsewhere, and shows each thread the sysctls of its own network namespace (fs/proc/proc_sysctl.c, `net_ctl_header_lookup`).
pub fn set_sysctl_dir(dir: PathBuf) {
    let _set_before = SYSCTLS.set(dir);
}

/// Writes a sysctl in the calling thread's namespace, unless it already has the value.
fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    if read_sysctl(path).is_ok_and(|found| found == value) {
        return Ok(());
    }
    OpenOptions::new().write(true).open(sysctl_path(path)?)?.write_all(value.as_bytes())
}

/// Reads a sysctl in the calling thread's namespace.
pub(super) fn read_sysctl(path: &str) -> io::Result<String> {
    std::fs::read_to_string(sysctl_path(path)?).map(|text| text.trim_end().to_owned())
}

fn sysctl_path(path: &str) -> io::Result<PathBuf> {
    // The path contains an interface name, which others choose.
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the path of a sysctl"));
    }
    Ok(SYSCTLS.get().map_or(Path::new(PROC_SYS), PathBuf::as_path).join(path))
}
