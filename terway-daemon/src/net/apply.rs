//! Carries out steps: groups neighbouring ones into batches, and knows which refusals mean "it is so already".

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use terway_core::route::{NetOp, Place, Rule, Selector, Step};

use super::socket::{Netlink, Refusal, Request};
use super::{NetError, decode, encode};

/// A network namespace with the interface indices known in it.
struct Side<'a> {
    netlink: &'a mut Netlink,
    indices: Vec<(String, u32)>,
}

impl Side<'_> {
    fn index_of(&mut self, dev: &str) -> Result<u32, Refusal> {
        if let Some((_, index)) = self.indices.iter().find(|(name, _)| name == dev) {
            return Ok(*index);
        }
        let gone = || Refusal { errno: libc::ENODEV, extack: None };
        let (message, flags) = encode::get_link(dev);
        let lost = |error: NetError| Refusal { errno: error.errno().unwrap_or_default(), extack: None };
        let answer = self.netlink.request(message, flags).map_err(lost)??;
        let index = decode::link_of(answer).ok_or_else(gone)?.link.index;
        self.indices.push((dev.to_owned(), index));
        Ok(index)
    }
}

/// The namespaces that steps happen in.
pub(super) struct Sides<'a> {
    host: Side<'a>,
    pod: Option<Side<'a>>,
}

impl<'a> Sides<'a> {
    /// Only the node's, with interface indices that are known.
    pub(super) fn host(netlink: &'a mut Netlink, indices: Vec<(String, u32)>) -> Self {
        Self { host: Side { netlink, indices }, pod: None }
    }

    /// And the pod's. The calling thread must be in it.
    pub(super) fn and_pod(self, netlink: &'a mut Netlink, indices: Vec<(String, u32)>) -> Self {
        Self { pod: Some(Side { netlink, indices }), ..self }
    }

    fn at(&mut self, place: Place) -> Result<&mut Side<'a>, NetError> {
        match place {
            Place::Host => Ok(&mut self.host),
            Place::Pod => self.pod.as_mut().ok_or_else(|| NetError::Netns {
                path: "the pod".to_owned(),
                reason: "its network namespace is gone".to_owned(),
            }),
        }
    }
}

/// One request of a batch.
struct Pending<'a> {
    op: &'a NetOp,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Does the operation.
    Whole,
    /// Clears the way for the operation, which follows.
    Rival,
}

/// Carries out `steps` in order. Sysctls are written by the calling thread, which must be in the namespace they are meant for.
pub(super) fn run<'s>(steps: impl IntoIterator<Item = &'s Step>, sides: &mut Sides<'_>) -> Result<(), NetError> {
    let mut batch: Vec<Request> = Vec::new();
    let mut pending: Vec<Pending<'s>> = Vec::new();
    let mut place = Place::Host;
    for step in steps {
        let op = &step.op;
        if step.place != place || matches!(op, NetOp::Sysctl { .. }) {
            flush(sides.at(place)?, &mut batch, &mut pending)?;
            place = step.place;
        }
        let side = sides.at(place)?;
        if let NetOp::Sysctl { path, value } = op {
            write_sysctl(path, value).map_err(|source| NetError::io(step.to_string(), source))?;
            continue;
        }
        match requests(op, side) {
            Ok(list) => {
                for (kind, request) in list {
                    batch.push(request);
                    pending.push(Pending { op, kind });
                }
            }
            Err(refusal) if fine(op, refusal.errno) => {}
            Err(refusal) => return Err(refusal.during(step.to_string())),
        }
    }
    flush(sides.at(place)?, &mut batch, &mut pending)
}

fn flush(side: &mut Side<'_>, batch: &mut Vec<Request>, pending: &mut Vec<Pending<'_>>) -> Result<(), NetError> {
    if batch.is_empty() {
        return Ok(());
    }
    let answers = side.netlink.batch(std::mem::take(batch))?;
    let mut rivals = Vec::new();
    let mut failure = None;
    for (Pending { op, kind }, answer) in pending.drain(..).zip(answers) {
        match (kind, answer) {
            (Kind::Whole, Err(refusal)) if failure.is_none() && !fine(op, refusal.errno) => {
                failure = Some(refusal.during(op.to_string()));
            }
            (Kind::Rival, Ok(_)) => {
                if let NetOp::AddRule(rule) = op {
                    rivals.push(rule);
                }
            }
            _ => {}
        }
    }
    for rule in rivals {
        settle(side.netlink, rule)?;
    }
    failure.map_or(Ok(()), Err)
}

/// There was a rule with this priority and selector before, so there may be more, in front of ours: removes all, and adds ours again.
fn settle(netlink: &mut Netlink, rule: &Rule) -> Result<(), NetError> {
    loop {
        let (message, flags) = encode::delete_rival(rule);
        match netlink.request(message, flags)? {
            Ok(_) => {}
            Err(refusal) if refusal.errno == libc::ENOENT => break,
            Err(refusal) => return Err(refusal.during(format!("delete {rule}"))),
        }
    }
    let (message, flags) = encode::add_rule(rule);
    match netlink.request(message, flags)? {
        Err(refusal) if refusal.errno != libc::EEXIST => Err(refusal.during(format!("add {rule}"))),
        _ => Ok(()),
    }
}

/// The requests of an operation. Links are made and deleted elsewhere, with a look at their owner.
fn requests(op: &NetOp, side: &mut Side<'_>) -> Result<Vec<(Kind, Request)>, Refusal> {
    let request = match op {
        NetOp::SetMac { dev, mac } => encode::set_mac(side.index_of(dev)?, *mac),
        NetOp::SetMtu { dev, mtu } => encode::set_mtu(side.index_of(dev)?, *mtu),
        NetOp::NoAddrGen { dev } => encode::no_addr_gen(side.index_of(dev)?),
        NetOp::SetUp { dev } => encode::set_up(side.index_of(dev)?, true),
        NetOp::SetDown { dev } => encode::set_up(side.index_of(dev)?, false),
        NetOp::AddAddress { dev, address } => encode::add_address(side.index_of(dev)?, *address),
        NetOp::DelAddress { dev, address } => encode::delete_address(side.index_of(dev)?, *address),
        NetOp::AddRoute(route) => encode::add_route(route, side.index_of(&route.dev)?),
        NetOp::DelRoute(route) => encode::delete_route(route, side.index_of(&route.dev)?),
        NetOp::AddRule(rule) => {
            let add = (Kind::Whole, encode::add_rule(rule));
            // A packet takes the first rule that fits: one left over from another ENI must not stand before ours.
            return Ok(match rule.selector {
                Selector::From(_) => vec![(Kind::Rival, encode::delete_rival(rule)), add],
                Selector::To(_) => vec![add],
            });
        }
        NetOp::DelRule(rule) => encode::delete_rule(rule),
        NetOp::AddNeighbour(neighbour) => encode::add_neighbour(neighbour, side.index_of(&neighbour.dev)?),
        NetOp::DelNeighbour(neighbour) => encode::delete_neighbour(neighbour, side.index_of(&neighbour.dev)?),
        NetOp::AddVeth { .. } | NetOp::DelLink { .. } | NetOp::Sysctl { .. } => return Ok(Vec::new()),
    };
    Ok(vec![(Kind::Whole, request)])
}

/// Whether this refusal of `op` means that nothing is left to do.
fn fine(op: &NetOp, errno: i32) -> bool {
    match op {
        NetOp::AddRule(_) => errno == libc::EEXIST,
        // A kernel without IPv6 makes no link-local addresses.
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

/// Writes a sysctl in the calling thread's namespace, unless it has the value already.
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

fn sysctl_path(path: &str) -> io::Result<std::path::PathBuf> {
    // Interface names stand in paths.
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the path of a sysctl"));
    }
    Ok(Path::new("/proc/sys").join(path))
}
