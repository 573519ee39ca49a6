//! Attaches programs by a clsact qdisc and `cls_bpf` filters in direct-action mode.
//!
//! Pods' interfaces are attached this way on every kernel: a TCX attachment waits for an RCU grace period while it holds the
//! rtnetlink lock, which is 16 ms for each hook of each pod, and this takes a tenth of a millisecond for both. Everything for an
//! interface goes to the kernel in one system call. A filter of the same priority and handle is replaced in place, so a packet
//! meets the old program or the new one, never none (`cls_bpf_change`, net/sched/cls_bpf.c).

use std::os::fd::RawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};

use super::error::BpfError;
use crate::net::socket::{NetlinkSocket, Reply, Request};

/// Handle of our filters, by which the next start finds and replaces them: "tw".
const HANDLE: u32 = 0x7477;
/// Priority (upper half) and protocol of our filters: 1, and `ETH_P_ALL` in network byte order (include/uapi/linux/if_ether.h).
const PRIORITY_AND_PROTOCOL: u32 = 1 << 16 | 3_u16.to_be() as u32;

const CLSACT: &str = "clsact";
const CLSACT_HANDLE: TcHandle = TcHandle { major: 0xffff, minor: 0 };
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
const EGRESS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_EGRESS };

/// Errors of a deletion that mean that there is no such filter, qdisc or interface.
const ABSENT: [i32; 4] = [libc::ENODEV, libc::ENOENT, libc::EINVAL, libc::EOPNOTSUPP];

/// An rtnetlink socket for qdiscs and filters, in the network namespace where it was opened.
#[derive(Debug)]
pub(super) struct Socket(NetlinkSocket);

impl Socket {
    pub(super) fn open() -> Result<Self, BpfError> {
        NetlinkSocket::route().map(Self).map_err(|source| BpfError::Netlink { ifindex: 0, source })
    }

    /// Attaches the two programs to the interface, replacing those of an earlier call.
    pub(super) fn attach(&mut self, ifindex: u32, ingress: RawFd, egress: RawFd) -> Result<(), BpfError> {
        let mut qdisc = message(ifindex, CLSACT_HANDLE, TcHandle::CLSACT, 0);
        qdisc.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
        let requests = vec![
            (Message::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL),
            add_filter(ifindex, INGRESS, ingress, "terway-in"),
            add_filter(ifindex, EGRESS, egress, "terway-out"),
        ];
        let [qdisc, from, to] = self.exchange(ifindex, requests)?;
        accept("add the clsact qdisc", ifindex, qdisc, &[libc::EEXIST])?;
        accept("attach at ingress", ifindex, from, &[])?;
        accept("attach at egress", ifindex, to, &[])
    }

    /// Detaches both programs from the interface. What is absent is no error.
    pub(super) fn detach(&mut self, ifindex: u32) -> Result<(), BpfError> {
        let requests = vec![
            (Message::DelTrafficFilter(filter(ifindex, INGRESS)), 0),
            (Message::DelTrafficFilter(filter(ifindex, EGRESS)), 0),
        ];
        let [from, to] = self.exchange(ifindex, requests)?;
        accept("detach from ingress", ifindex, from, &ABSENT)?;
        accept("detach from egress", ifindex, to, &ABSENT)
    }

    /// Whether both filters are present.
    pub(super) fn is_attached(&mut self, ifindex: u32) -> Result<bool, BpfError> {
        let requests = vec![
            (Message::GetTrafficFilter(filter(ifindex, INGRESS)), 0),
            (Message::GetTrafficFilter(filter(ifindex, EGRESS)), 0),
        ];
        let replies: [Reply; 2] = self.exchange(ifindex, requests)?;
        let mut is_attached = true;
        for reply in replies {
            is_attached &= reply.is_ok();
            accept("look up the filters", ifindex, reply, &ABSENT)?;
        }
        Ok(is_attached)
    }

    fn exchange<const N: usize>(&mut self, ifindex: u32, requests: Vec<Request>) -> Result<[Reply; N], BpfError> {
        let replies = self.0.batch(requests).map_err(|source| BpfError::Netlink { ifindex, source })?;
        // There is one reply to each request.
        <[Reply; N]>::try_from(replies).map_err(|replies| BpfError::Netlink {
            ifindex,
            source: crate::net::NetError::NoAnswer { op: format!("{N} requests, {} replies", replies.len()) },
        })
    }
}

fn message(ifindex: u32, handle: TcHandle, parent: TcHandle, info: u32) -> TcMessage {
    let header = TcHeader { index: ifindex.cast_signed(), handle, parent, info, ..TcHeader::default() };
    TcMessage::from_parts(header, Vec::new())
}

/// The filter of ours at a hook.
fn filter(ifindex: u32, hook: TcHandle) -> TcMessage {
    let mut filter = message(ifindex, HANDLE.into(), hook, PRIORITY_AND_PROTOCOL);
    filter.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    filter
}

fn add_filter(ifindex: u32, hook: TcHandle, program: RawFd, name: &str) -> Request {
    let options = [
        TcFilterBpfOption::ProgFd(program.cast_unsigned()),
        TcFilterBpfOption::ProgName(name.to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let mut filter = filter(ifindex, hook);
    filter.attributes.push(TcAttribute::Options(options.map(TcOption::Bpf).into()));
    (Message::NewTrafficFilter(filter), NLM_F_CREATE)
}

/// Maps the error numbers in `accepted` to success.
fn accept(step: &'static str, ifindex: u32, reply: Reply, accepted: &[i32]) -> Result<(), BpfError> {
    match reply {
        Err(error) if !accepted.contains(&error.errno) => {
            Err(BpfError::Netlink { ifindex, source: error.during(step) })
        }
        _ => Ok(()),
    }
}
