//! A pod's veth pair: made, opened, closed, deleted; and whose it is when the name is taken.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::thread;
use std::time::{Duration, Instant};

use terway_core::route::{Link, NetOp, PodPlan};

use super::apply::{self, Sides};
use super::decode::NamedLink;
use super::host::{Links, owner};
use super::socket::{Netlink, Refusal, Request};
use super::{NetError, decode, encode};

/// How long a link may take from up to usable. The kernel's workers need RTNL for it, which a node that removes many pods holds for long; and
/// a pod whose ADD returned before is published while it does not take packets.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked at, after some looks in a row: a timer's slack alone is longer than what is mostly left to wait for.
const POLL: Duration = Duration::from_micros(100);
/// Looks without a pause.
const EAGER: u32 = 20;
/// How often a name may turn out to be taken by a leftover while we make room.
const TRIES: u32 = 3;

/// `PodPlan::create`; the calling thread is in the pod's namespace, whose descriptor is `pod_ns`, and each socket in the one it is named by.
pub(super) fn create(host: &mut Netlink, pod: &mut Netlink, plan: &PodPlan, pod_ns: RawFd) -> Result<Links, NetError> {
    let links = pair(host, pod, plan, pod_ns)?;
    let host_end = vec![(plan.inputs.host_ifname.clone(), links.host_ifindex)];
    let pod_end = vec![(plan.inputs.pod_ifname.clone(), links.pod_ifindex)];
    apply::run(&plan.create, &mut Sides::host(host, host_end).and_pod(pod, pod_end))?;
    Ok(links)
}

/// Makes the pair, or finds the one that an interrupted try for the same attachment has made.
fn pair(host: &mut Netlink, pod: &mut Netlink, plan: &PodPlan, pod_ns: RawFd) -> Result<Links, NetError> {
    let Some((veth, host_end, pod_end, mtu)) = plan.create.iter().find_map(|step| match &step.op {
        NetOp::AddVeth { host, pod, mtu, .. } => Some((&step.op, host, pod, *mtu)),
        _ => None,
    }) else {
        return Err(NetError::NoAnswer { op: "a plan without a veth".to_owned() });
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let answers =
            host.batch(vec![encode::add_veth(host_end, pod_end, mtu, pod_ns), encode::get_link(&host_end.name)])?;
        let Ok([made, found]) = <[_; 2]>::try_from(answers) else {
            return Err(NetError::NoAnswer { op: veth.to_string() });
        };
        let found = present(found, &host_end.name)?;
        match made {
            Ok(_) => {
                // Gone again at once: the pod's namespace died.
                let Some(NamedLink { link, .. }) = found else {
                    return Err(Refusal { errno: libc::ENODEV, extack: None }.during(veth.to_string()));
                };
                claim(host, &link, plan)?;
                return links(&link).ok_or_else(|| NetError::NoAnswer { op: veth.to_string() });
            }
            Err(refusal) if refusal.errno == libc::EEXIST && tries < TRIES => {
                if let Some(links) = make_room(host, pod, plan, found)? {
                    return Ok(links);
                }
            }
            Err(refusal) => return Err(refusal.during(veth.to_string())),
        }
    }
}

/// Resolves "file exists": returns our own pair if it is complete, clears away a leftover of ours, refuses to touch anything else.
fn make_room(
    host: &mut Netlink,
    pod: &mut Netlink,
    plan: &PodPlan,
    found: Option<NamedLink>,
) -> Result<Option<Links>, NetError> {
    let (message, flags) = encode::get_link(&plan.inputs.pod_ifname);
    let inside = present(pod.request(message, flags)?, &plan.inputs.pod_ifname)?.map(|found| found.link);
    let Some(NamedLink { name, link, .. }) = found else {
        // The name that is taken is the pod's; unless the link of ours that had it is gone since, when it is free now.
        return match inside {
            Some(_) => Err(NetError::IfnameTaken { ifname: plan.inputs.pod_ifname.clone() }),
            None => Ok(None),
        };
    };
    if !link.is_ours() {
        return Err(NetError::ForeignLink { name });
    }
    let whole = inside.is_some_and(|end| end.peer == Some(link.index) && link.peer == Some(end.index) && end.is_ours());
    if whole && is_of(&link, plan) {
        claim(host, &link, plan)?;
        return Ok(links(&link));
    }
    tracing::warn!(%name, alias = link.alias.as_deref(), "deleted a leftover link that has the name of a new pod's");
    remove(host, link.index, &name)?;
    Ok(None)
}

/// Writes the owner's alias. Until then the group says that the link is ours, and the MAC whose.
fn claim(host: &mut Netlink, link: &Link, plan: &PodPlan) -> Result<(), NetError> {
    let owner = owner(plan);
    if link.alias.as_ref() == Some(&owner) {
        return Ok(());
    }
    let (message, flags) = encode::set_alias(link.index, &owner);
    match host.request(message, flags)? {
        Ok(_) => Ok(()),
        Err(refusal) => Err(refusal.during(format!("set the alias of {}", plan.inputs.host_ifname))),
    }
}

fn links(host_end: &Link) -> Option<Links> {
    Some(Links { host_ifindex: host_end.index, pod_ifindex: host_end.peer? })
}

/// Whether this host end belongs to the plan's attachment: by its alias, or, before it had one, by its MAC.
fn is_of(link: &Link, plan: &PodPlan) -> bool {
    link.is_ours()
        && match &link.alias {
            Some(alias) => *alias == owner(plan),
            None => link.mac == Some(plan.inputs.host_mac),
        }
}

/// `PodPlan::enable`, as [`create`].
pub(super) fn enable(host: &mut Netlink, pod: &mut Netlink, plan: &PodPlan, links: Links) -> Result<(), NetError> {
    let host_end = vec![(plan.inputs.host_ifname.clone(), links.host_ifindex)];
    let pod_end = vec![(plan.inputs.pod_ifname.clone(), links.pod_ifindex)];
    apply::run(&plan.enable, &mut Sides::host(host, host_end).and_pod(pod, pod_end))?;
    let (host_name, pod_name) = (&plan.inputs.host_ifname, &plan.inputs.pod_ifname);
    operational(pod, links.pod_ifindex, pod_name)?;
    operational(host, links.host_ifindex, host_name)?;
    plan.inputs.addresses.v6.map_or(Ok(()), |address| own(pod, address.into(), pod_name))
}

/// Waits until a link that is up, and whose other end is too, passes packets.
///
/// That follows in a kernel worker (net/core/link_watch.c); till then the interface drops what it shall send. Since Linux 6.8, asking for the
/// link does the worker's work (`rtnl_getlink` calls `linkwatch_sync_dev`), so that this is one question; before, it is a matter of
/// microseconds.
fn operational(netlink: &mut Netlink, index: u32, name: &str) -> Result<(), NetError> {
    settle(netlink, name, "has no carrier", encode::get_link_at(index), |answer| {
        decode::link(answer).is_some_and(|found| found.operational)
    })
}

/// Waits until the pod takes packets to its IPv6 address.
///
/// Even without duplicate detection its local route is made by a worker (net/ipv6/addrconf.c, `addrconf_dad_start`); till then a
/// packet to the address is taken for one to be forwarded, and dropped.
fn own(pod: &mut Netlink, address: IpAddr, name: &str) -> Result<(), NetError> {
    settle(pod, name, "does not take packets to its IPv6 address yet", encode::get_route(address), decode::is_local)
}

/// Asks until the answer is the hoped-for. Gives up without an error: someone in the pod may have changed it again already.
fn settle(
    netlink: &mut Netlink,
    name: &str,
    otherwise: &str,
    (message, flags): Request,
    settled: impl Fn(&[u8]) -> bool,
) -> Result<(), NetError> {
    let deadline = Instant::now() + PATIENCE;
    let mut looks = 0;
    loop {
        looks += 1;
        match netlink.request(message.clone(), flags)? {
            Ok(answer) if answer.as_deref().is_some_and(&settled) => return Ok(()),
            Err(refusal) if refusal.errno == libc::ENODEV => {
                return Err(refusal.during(format!("look up interface {name}")));
            }
            // "No route" is an answer, too.
            _ if Instant::now() >= deadline => {
                tracing::warn!(name, "a pod's interface {otherwise}");
                return Ok(());
            }
            _ if looks < EAGER => thread::yield_now(),
            _ => thread::sleep(POLL),
        }
    }
}

/// The first part of `PodPlan::teardown`.
pub(super) fn detach(host: &mut Netlink, plan: &PodPlan) -> Result<(), NetError> {
    let name = &plan.inputs.host_ifname;
    let (message, flags) = encode::get_link(name);
    let link = present(host.request(message, flags)?, name)?.filter(|found| is_of(&found.link, plan));
    let down = plan.teardown();
    match link {
        Some(found) => apply::run(&down.detach, &mut Sides::host(host, vec![(name.clone(), found.link.index)])),
        // Routes and neighbours went with the link; those on a link of the same name are another pod's.
        None => {
            let rules = down.detach.iter().filter(|step| matches!(step.op, NetOp::DelRule(_)));
            apply::run(rules, &mut Sides::host(host, Vec::new()))
        }
    }
}

/// The second part of `PodPlan::teardown`, for any number of pods.
///
/// Deleting an interface holds RTNL for a grace period, in which no pod can be set up. The kernel deletes a whole group within one.
pub(super) fn delete(host: &mut Netlink, plans: &[PodPlan]) -> Result<(), NetError> {
    let names = || plans.iter().map(|plan| plan.inputs.host_ifname.as_str());
    let answers = host.batch(names().map(encode::get_link).collect())?;
    let mut doomed = Vec::new();
    for ((plan, name), answer) in plans.iter().zip(names()).zip(answers) {
        if let Some(found) = present(answer, name)?.filter(|found| is_of(&found.link, plan)) {
            doomed.push((found.link.index, name));
        }
    }
    match doomed.as_slice() {
        [] => return Ok(()),
        [(index, name)] => return remove(host, *index, name),
        _ => {}
    }
    let requests = doomed.iter().map(|(index, _)| encode::doom(*index)).chain([encode::delete_doomed()]).collect();
    match host.batch(requests)?.pop() {
        // ENODEV: all went by themselves meanwhile.
        Some(Err(refusal)) if refusal.errno != libc::ENODEV => {
            let names: Vec<_> = doomed.iter().map(|(_, name)| *name).collect();
            Err(refusal.during(format!("delete links {}", names.join(" "))))
        }
        _ => Ok(()),
    }
}

/// Deletes a leftover host end, if the link with this index still is one with this alias.
pub(super) fn delete_stale(host: &mut Netlink, index: u32, alias: Option<&str>) -> Result<(), NetError> {
    let (message, flags) = encode::get_link_at(index);
    match present(host.request(message, flags)?, "leftover")? {
        Some(found) if found.link.is_ours() && found.link.alias.as_deref() == alias => remove(host, index, &found.name),
        _ => Ok(()),
    }
}

fn remove(host: &mut Netlink, index: u32, name: &str) -> Result<(), NetError> {
    let (message, flags) = encode::delete_link(index);
    match host.request(message, flags)? {
        Err(refusal) if refusal.errno != libc::ENODEV => Err(refusal.during(format!("delete link {name}"))),
        _ => Ok(()),
    }
}

/// The link of an answer, `None` if there is none of that name.
fn present(answer: super::socket::Answer, name: &str) -> Result<Option<NamedLink>, NetError> {
    match answer {
        Ok(answer) => Ok(decode::link_of(answer)),
        Err(refusal) if refusal.errno == libc::ENODEV => Ok(None),
        Err(refusal) => Err(refusal.during(format!("look up interface {name}"))),
    }
}
