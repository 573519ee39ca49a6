//! Life cycle of a pod's veth pair: create, enable, detach, delete; and who owns a link whose name is taken.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::thread;
use std::time::{Duration, Instant};

use terway_core::route::{Link, NetOp, PodPlan};

use super::apply::{self, StepContext};
use super::decode::NamedLink;
use super::host::{Links, owner_alias};
use super::socket::{ErrorReply, NetlinkSocket, Request};
use super::{NetError, decode, messages};

/// Time limit for a link to become usable after it was set up. The kernel's workers need RTNL for it, which a node that removes many pods holds
/// for long. If ADD returned earlier, the pod would be published before it receives packets.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Poll interval after the immediate polls. Timer slack alone is longer than the usual wait.
const POLL_INTERVAL: Duration = Duration::from_micros(100);
/// Number of polls without a pause.
const IMMEDIATE_POLLS: u32 = 20;
/// Attempts to create a pair while leftovers with the same name are found and deleted.
const CREATE_ATTEMPTS: u32 = 3;

/// Executes `PodPlan::create`. The calling thread is in the pod's namespace, whose descriptor is `pod_ns`; each socket is in the namespace that
/// it is named after.
pub(super) fn create(
    host: &mut NetlinkSocket,
    pod: &mut NetlinkSocket,
    plan: &PodPlan,
    pod_ns: RawFd,
) -> Result<Links, NetError> {
    let links = create_veth_pair(host, pod, plan, pod_ns)?;
    let host_end = vec![(plan.inputs.host_ifname.clone(), links.host_ifindex)];
    let pod_end = vec![(plan.inputs.pod_ifname.clone(), links.pod_ifindex)];
    apply::run(&plan.create, &mut StepContext::host(host, host_end).and_pod(pod, pod_end))?;
    Ok(links)
}

/// Creates the veth pair, or finds the one that an interrupted ADD of the same attachment has created.
fn create_veth_pair(
    host: &mut NetlinkSocket,
    pod: &mut NetlinkSocket,
    plan: &PodPlan,
    pod_ns: RawFd,
) -> Result<Links, NetError> {
    let Some((veth, host_end, pod_end, mtu)) = plan.create.iter().find_map(|step| match &step.op {
        NetOp::AddVeth { host, pod, mtu, .. } => Some((&step.op, host, pod, *mtu)),
        _ => None,
    }) else {
        return Err(NetError::NoAnswer { op: "a plan without a veth".to_owned() });
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let replies =
            host.batch(vec![messages::add_veth(host_end, pod_end, mtu, pod_ns), messages::get_link(&host_end.name)])?;
        let Ok([made, found]) = <[_; 2]>::try_from(replies) else {
            return Err(NetError::NoAnswer { op: veth.to_string() });
        };
        let found = existing_link(found, &host_end.name)?;
        match made {
            Ok(_) => {
                // Deleted again at once: the pod's namespace is gone.
                let Some(NamedLink { link, .. }) = found else {
                    return Err(ErrorReply { errno: libc::ENODEV, extack: None }.during(veth.to_string()));
                };
                set_owner_alias(host, &link, plan)?;
                return link_indices(&link).ok_or_else(|| NetError::NoAnswer { op: veth.to_string() });
            }
            Err(error) if error.errno == libc::EEXIST && tries < CREATE_ATTEMPTS => {
                if let Some(links) = resolve_name_conflict(host, pod, plan, found)? {
                    return Ok(links);
                }
            }
            Err(error) => return Err(error.during(veth.to_string())),
        }
    }
}

/// Resolves `EEXIST`: returns our own pair if it is complete, deletes a leftover of ours, and refuses to touch anything else.
fn resolve_name_conflict(
    host: &mut NetlinkSocket,
    pod: &mut NetlinkSocket,
    plan: &PodPlan,
    found: Option<NamedLink>,
) -> Result<Option<Links>, NetError> {
    let (message, flags) = messages::get_link(&plan.inputs.pod_ifname);
    let inside = existing_link(pod.request(message, flags)?, &plan.inputs.pod_ifname)?.map(|found| found.link);
    let Some(NamedLink { name, link, .. }) = found else {
        // The conflict is in the pod's namespace; or a link of ours had the name and has been deleted since.
        return match inside {
            Some(_) => Err(NetError::IfnameTaken { ifname: plan.inputs.pod_ifname.clone() }),
            None => Ok(None),
        };
    };
    if !link.is_ours() {
        return Err(NetError::ForeignLink { name });
    }
    let is_complete =
        inside.is_some_and(|end| end.peer == Some(link.index) && link.peer == Some(end.index) && end.is_ours());
    if is_complete && belongs_to(&link, plan) {
        set_owner_alias(host, &link, plan)?;
        return Ok(link_indices(&link));
    }
    tracing::warn!(%name, alias = link.alias.as_deref(), "deleted a leftover link that has the name of a new pod's");
    remove(host, link.index, &name)?;
    Ok(None)
}

/// Writes the owner's alias. Before that, the link group says that the link is ours, and the MAC address which attachment owns it.
fn set_owner_alias(host: &mut NetlinkSocket, link: &Link, plan: &PodPlan) -> Result<(), NetError> {
    let owner = owner_alias(plan);
    if link.alias.as_ref() == Some(&owner) {
        return Ok(());
    }
    let (message, flags) = messages::set_alias(link.index, &owner);
    match host.request(message, flags)? {
        Ok(_) => Ok(()),
        Err(error) => Err(error.during(format!("set the alias of {}", plan.inputs.host_ifname))),
    }
}

fn link_indices(host_end: &Link) -> Option<Links> {
    Some(Links { host_ifindex: host_end.index, pod_ifindex: host_end.peer? })
}

/// Whether this host end belongs to the plan's attachment, by its alias or, before that is written, by its MAC address.
fn belongs_to(link: &Link, plan: &PodPlan) -> bool {
    link.is_ours()
        && match &link.alias {
            Some(alias) => *alias == owner_alias(plan),
            None => link.mac == Some(plan.inputs.host_mac),
        }
}

/// Executes `PodPlan::enable`; sockets and thread as for [`create`].
pub(super) fn enable(
    host: &mut NetlinkSocket,
    pod: &mut NetlinkSocket,
    plan: &PodPlan,
    links: Links,
) -> Result<(), NetError> {
    let host_end = vec![(plan.inputs.host_ifname.clone(), links.host_ifindex)];
    let pod_end = vec![(plan.inputs.pod_ifname.clone(), links.pod_ifindex)];
    apply::run(&plan.enable, &mut StepContext::host(host, host_end).and_pod(pod, pod_end))?;
    let (host_name, pod_name) = (&plan.inputs.host_ifname, &plan.inputs.pod_ifname);
    wait_operational(pod, links.pod_ifindex, pod_name)?;
    wait_operational(host, links.host_ifindex, host_name)?;
    plan.inputs.addresses.v6.map_or(Ok(()), |address| wait_local_route(pod, address.into(), pod_name))
}

/// Waits until a link whose both ends are set up passes packets.
///
/// A kernel worker activates it (net/core/link_watch.c); until then the interface drops what it is to send. Since Linux 6.8, `RTM_GETLINK`
/// does the worker's task itself (`rtnl_getlink` calls `linkwatch_sync_dev`), so one request suffices; before, it takes microseconds.
fn wait_operational(netlink: &mut NetlinkSocket, index: u32, name: &str) -> Result<(), NetError> {
    poll_until(netlink, name, "has no carrier", messages::get_link_at(index), |reply| {
        decode::link(reply).is_some_and(|found| found.is_operational)
    })
}

/// Waits until the pod has the local route of its IPv6 address.
///
/// Even without duplicate address detection a kernel worker adds that route (net/ipv6/addrconf.c, `addrconf_dad_start`); until then packets
/// to the address are forwarded, and dropped.
fn wait_local_route(pod: &mut NetlinkSocket, address: IpAddr, name: &str) -> Result<(), NetError> {
    let request =
        messages::get_route(address).map_err(|error| error.during(format!("look up the route to {address}")))?;
    poll_until(pod, name, "does not receive packets to its IPv6 address yet", request, decode::is_local)
}

/// Repeats a request until `is_settled` accepts the reply. A time-out is no error: someone in the pod may have changed the state again.
fn poll_until(
    netlink: &mut NetlinkSocket,
    name: &str,
    otherwise: &str,
    (message, flags): Request,
    is_settled: impl Fn(&[u8]) -> bool,
) -> Result<(), NetError> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    let mut polls = 0;
    loop {
        polls += 1;
        match netlink.request(message.clone(), flags)? {
            Ok(reply) if reply.as_deref().is_some_and(&is_settled) => return Ok(()),
            Err(error) if error.errno == libc::ENODEV => {
                return Err(error.during(format!("look up interface {name}")));
            }
            // "No route" is a valid reply.
            _ if Instant::now() >= deadline => {
                tracing::warn!(name, "a pod's interface {otherwise}");
                return Ok(());
            }
            _ if polls < IMMEDIATE_POLLS => thread::yield_now(),
            _ => thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Executes the first part of `PodPlan::teardown`: removes rules, routes and neighbours.
pub(super) fn detach(host: &mut NetlinkSocket, plan: &PodPlan) -> Result<(), NetError> {
    let name = &plan.inputs.host_ifname;
    let (message, flags) = messages::get_link(name);
    let link = existing_link(host.request(message, flags)?, name)?.filter(|found| belongs_to(&found.link, plan));
    let down = plan.teardown();
    match link {
        Some(found) => apply::run(&down.detach, &mut StepContext::host(host, vec![(name.clone(), found.link.index)])),
        // Routes and neighbours were removed with the link; those on a link of the same name are another pod's.
        None => {
            let rules = down.detach.iter().filter(|step| matches!(step.op, NetOp::DelRule(_)));
            apply::run(rules, &mut StepContext::host(host, Vec::new()))
        }
    }
}

/// Executes the second part of `PodPlan::teardown` for any number of pods: deletes their links.
///
/// Deleting an interface holds RTNL for an RCU grace period, during which no pod can be set up. A link group is deleted within one.
pub(super) fn delete(host: &mut NetlinkSocket, plans: &[PodPlan]) -> Result<(), NetError> {
    let names = || plans.iter().map(|plan| plan.inputs.host_ifname.as_str());
    let replies = host.batch(names().map(messages::get_link).collect())?;
    let mut marked = Vec::new();
    for ((plan, name), reply) in plans.iter().zip(names()).zip(replies) {
        if let Some(found) = existing_link(reply, name)?.filter(|found| belongs_to(&found.link, plan)) {
            marked.push((found.link.index, name));
        }
    }
    match marked.as_slice() {
        [] => return Ok(()),
        [(index, name)] => return remove(host, *index, name),
        _ => {}
    }
    let requests = marked
        .iter()
        .map(|(index, _)| messages::mark_for_group_delete(*index))
        .chain([messages::delete_marked_group()])
        .collect();
    match host.batch(requests)?.pop() {
        // ENODEV: all have been deleted with their namespaces meanwhile.
        Some(Err(error)) if error.errno != libc::ENODEV => {
            let names: Vec<_> = marked.iter().map(|(_, name)| *name).collect();
            Err(error.during(format!("delete links {}", names.join(" "))))
        }
        _ => Ok(()),
    }
}

/// Deletes a leftover host end, if the link with this index still has this alias.
pub(super) fn delete_stale(host: &mut NetlinkSocket, index: u32, alias: Option<&str>) -> Result<(), NetError> {
    let (message, flags) = messages::get_link_at(index);
    match existing_link(host.request(message, flags)?, "leftover")? {
        Some(found) if found.link.is_ours() && found.link.alias.as_deref() == alias => remove(host, index, &found.name),
        _ => Ok(()),
    }
}

fn remove(host: &mut NetlinkSocket, index: u32, name: &str) -> Result<(), NetError> {
    let (message, flags) = messages::delete_link(index);
    match host.request(message, flags)? {
        Err(error) if error.errno != libc::ENODEV => Err(error.during(format!("delete link {name}"))),
        _ => Ok(()),
    }
}

/// The link in a reply; `None` if there is no such link.
fn existing_link(reply: super::socket::Reply, name: &str) -> Result<Option<NamedLink>, NetError> {
    match reply {
        Ok(reply) => Ok(decode::link_of(reply)),
        Err(error) if error.errno == libc::ENODEV => Ok(None),
        Err(error) => Err(error.during(format!("look up interface {name}"))),
    }
}
