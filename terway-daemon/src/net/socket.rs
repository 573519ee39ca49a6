//! A synchronous rtnetlink client: one socket, requests in batches, acknowledgements matched by sequence number.
//!
//! rtnetlink works inside `sendmsg(2)`: when the call returns, every request of the datagram has been carried out and every answer waits
//! in the socket. So a batch costs two system calls plus one per answer, and nothing here ever waits for an event. A failing
//! request does not stop those behind it in the batch; callers put together only what is independent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::NetError;

/// Room for one answer. Dumps come in parts of at most 32 KiB (net/netlink/af_netlink.c, `netlink_recvmsg`).
const ANSWER_BYTES: usize = 32 * 1024;
/// Requests per datagram: their acknowledgements must fit in the receive buffer (212 992 bytes, some 800 each with overhead).
const BATCH: usize = 64;
/// How often a dump is repeated when the tables change meanwhile, before its last part is taken for good.
const DUMP_TRIES: u32 = 8;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the text of an extended acknowledgement.
const ATTR_MSG: u16 = 1;

/// One request: its body and flags beside `NLM_F_REQUEST | NLM_F_ACK`.
pub(super) type Request = (RouteNetlinkMessage, u16);

/// The kernel's no.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Error number; 0 if the answer got lost.
    pub(super) errno: i32,
    /// The kernel's explanation.
    pub(super) extack: Option<String>,
}

impl Refusal {
    pub(super) fn during(self, op: impl Into<String>) -> NetError {
        let op = op.into();
        if self.errno == 0 {
            return NetError::NoAnswer { op };
        }
        NetError::Kernel { op, source: io::Error::from_raw_os_error(self.errno), extack: self.extack }
    }
}

/// What came back for one request: the whole message with its header, if it was a question.
pub(super) type Answer = Result<Option<Vec<u8>>, Refusal>;

/// A socket bound to the network namespace that its opener was in.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NetError> {
        let failed = |source: io::Error| NetError::io("open a netlink socket", source);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed)?;
        socket.set_ext_ack(true).map_err(failed)?;
        // Without it the kernel sends the failed request back in whole.
        socket.set_cap_ack(true).map_err(failed)?;
        // Filters in dumps count only with strict checking (Linux 4.20).
        socket.set_netlink_get_strict_chk(true).map_err(failed)?;
        // Answers are there when a request has been sent; this is for a kernel that breaks that, not for waiting.
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &TimeVal::seconds(2))
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self { socket, sequence: 0, outgoing: Vec::new(), incoming: Vec::with_capacity(ANSWER_BYTES) })
    }

    /// Joins a multicast group (`RTNLGRP_*`).
    pub(super) fn subscribe(&mut self, group: u32) -> Result<(), NetError> {
        self.socket.add_membership(group).map_err(|source| NetError::io("subscribe to netlink events", source))
    }

    /// Makes the receive buffer hold this many bytes, whatever `net.core.rmem_max` says.
    pub(super) fn set_receive_buffer(&mut self, bytes: usize) -> Result<(), NetError> {
        setsockopt(&self.socket.as_fd(), sockopt::RcvBufForce, &bytes)
            .map_err(|errno| NetError::io("enlarge the netlink receive buffer", errno))
    }

    /// Carries out all requests, in order. The answers stand in the same order.
    pub(super) fn batch(&mut self, requests: Vec<Request>) -> Result<Vec<Answer>, NetError> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        while requests.len() > 0 {
            self.exchange(requests.by_ref().take(BATCH), &mut answers)?;
        }
        Ok(answers)
    }

    /// Carries out one request.
    pub(super) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Answer, NetError> {
        let answers = self.batch(vec![(message, flags)])?;
        Ok(answers.into_iter().next().unwrap_or(Err(Refusal { errno: 0, extack: None })))
    }

    /// Everything of a kind, each message whole and with its header; see [`inner`].
    pub(super) fn dump(&mut self, op: &str, message: RouteNetlinkMessage) -> Result<Vec<Vec<u8>>, NetError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut found = Vec::new();
            let sequence = self.sequence.wrapping_add(1);
            self.outgoing.clear();
            self.push(message.clone(), NLM_F_REQUEST | NLM_F_DUMP);
            self.send()?;
            let mut interrupted = false;
            let done = loop {
                match self.receive() {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(errno) if errno == libc::ENOBUFS => break None,
                    Err(errno) => return Err(NetError::io(op, io::Error::from_raw_os_error(errno))),
                }
                let mut end = None;
                for bytes in messages(&self.incoming) {
                    let Some(header) = Header::of(bytes) else { continue };
                    if header.sequence != sequence {
                        continue;
                    }
                    interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                    match i32::from(header.kind) {
                        // A dump that fails half-way says so in its last message.
                        libc::NLMSG_DONE => end = Some(code(bytes)),
                        libc::NLMSG_ERROR => {
                            let refusal = refusal(bytes).unwrap_or(Refusal { errno: 0, extack: None });
                            return Err(refusal.during(op));
                        }
                        _ => found.push(bytes.to_vec()),
                    }
                }
                if end.is_some() {
                    break end;
                }
            };
            match done {
                Some(code) if code < 0 => return Err(NetError::io(op, io::Error::from_raw_os_error(-code))),
                Some(_) if !interrupted || tries >= DUMP_TRIES => return Ok(found),
                None if tries >= DUMP_TRIES => return Err(NetError::NoAnswer { op: op.to_owned() }),
                _ => {}
            }
        }
    }

    /// Reads one datagram of events; for sockets that have subscribed. `Err` holds the error number, `ENOBUFS` when events got lost.
    pub(super) fn events(&mut self, mut each: impl FnMut(&[u8])) -> Result<(), i32> {
        if self.receive()? {
            messages(&self.incoming).for_each(&mut each);
        }
        Ok(())
    }

    fn exchange(&mut self, requests: impl Iterator<Item = Request>, answers: &mut Vec<Answer>) -> Result<(), NetError> {
        let first = self.sequence.wrapping_add(1);
        let base = answers.len();
        self.outgoing.clear();
        for (message, flags) in requests {
            self.push(message, NLM_F_REQUEST | NLM_F_ACK | flags);
            answers.push(Err(Refusal { errno: 0, extack: None }));
        }
        self.send()?;
        let mut content: Vec<Option<Vec<u8>>> = vec![None; answers.len() - base];
        let mut missing = content.len();
        while missing > 0 {
            match self.receive() {
                Ok(true) => {}
                Ok(false) => continue,
                // What was lost stays "no answer".
                Err(libc::ENOBUFS | libc::EAGAIN) => return Ok(()),
                Err(errno) => return Err(NetError::io("read netlink answers", io::Error::from_raw_os_error(errno))),
            }
            for bytes in messages(&self.incoming) {
                let Some(header) = Header::of(bytes) else { continue };
                let place = header.sequence.wrapping_sub(first) as usize;
                let Some(slot) = content.get_mut(place) else { continue };
                if i32::from(header.kind) == libc::NLMSG_ERROR {
                    missing -= 1;
                    answers[base + place] = match refusal(bytes) {
                        None => Ok(slot.take()),
                        Some(refusal) => Err(refusal),
                    };
                } else {
                    *slot = Some(bytes.to_vec());
                }
            }
        }
        Ok(())
    }

    /// Appends a request to the outgoing datagram.
    fn push(&mut self, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = self.outgoing.len();
        self.outgoing.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut self.outgoing[start..]);
    }

    fn send(&mut self) -> Result<(), NetError> {
        loop {
            match self.socket.send(&self.outgoing, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(NetError::io("send netlink requests", error)),
            }
        }
    }

    /// Reads one datagram; false if it is none of the kernel's.
    fn receive(&mut self) -> Result<bool, i32> {
        loop {
            self.incoming.clear();
            match self.socket.recv_from(&mut self.incoming, libc::MSG_TRUNC) {
                // Longer than any part of a dump: cut off, so that some message got lost.
                Ok((length, _)) if length > self.incoming.len() => return Err(libc::ENOBUFS),
                Ok((_, from)) => return Ok(from.port_number() == 0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.raw_os_error().unwrap_or(Errno::EIO as i32)),
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The fields of `struct nlmsghdr` that matter here.
struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Header {
    fn of(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?),
            flags: u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?),
            sequence: u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?),
        })
    }
}

/// The messages of a datagram, each with its header.
fn messages(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        if length < HEADER {
            return None;
        }
        let message = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Reads a message. What this program cannot read, such as a newer kernel's, is `None`.
pub(super) fn inner(message: &[u8]) -> Option<RouteNetlinkMessage> {
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).map(|message| message.payload) {
        Ok(NetlinkPayload::InnerMessage(inner)) => Some(inner),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%error, "skipped a netlink message");
            None
        }
    }
}

/// The number at the beginning of `NLMSG_ERROR` and `NLMSG_DONE`: 0, or an error number below zero.
fn code(message: &[u8]) -> i32 {
    message.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// Reads an `NLMSG_ERROR`: `None` is an acknowledgement.
fn refusal(message: &[u8]) -> Option<Refusal> {
    match code(message) {
        0 => None,
        code => Some(Refusal { errno: -code, extack: extack(message) }),
    }
}

/// The text behind the error code and the request's header (and body, unless the kernel capped it).
fn extack(message: &[u8]) -> Option<String> {
    let flags = Header::of(message)?.flags;
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let request = message.get(HEADER + 4..)?;
    let echoed = if flags & NLM_F_CAPPED != 0 {
        HEADER
    } else {
        (u32::from_ne_bytes(request.get(..4)?.try_into().ok()?) as usize).next_multiple_of(4)
    };
    attributes(request.get(echoed..)?).find(|(kind, _)| *kind == ATTR_MSG).map(|(_, value)| text(value))
}

/// The attributes in `bytes`, by kind and value.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The upper two bits are flags (include/uapi/linux/netlink.h: NLA_TYPE_MASK).
        Some((kind & 0x3fff, value))
    })
}

/// A string attribute without its terminating zero.
pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}
