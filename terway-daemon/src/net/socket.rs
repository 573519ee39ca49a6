//! The synchronous netlink socket: requests in batches, replies matched by sequence number, dumps.
//!
//! rtnetlink and sock_diag work inside `sendmsg(2)`: when the call returns, every request of the datagram has been carried out and its reply
//! is queued in the socket. So a batch costs two system calls plus one per reply, and nothing here waits for an event. A failed request
//! does not stop those behind it in the batch; callers batch only requests that are independent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket,
    protocols::{NETLINK_ROUTE, NETLINK_SOCK_DIAG},
};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::NetError;

/// Size of the receive buffer for one datagram. Dumps come in parts of at most 32 KiB (net/netlink/af_netlink.c, `netlink_recvmsg`).
const DATAGRAM_BYTES: usize = 32 * 1024;
/// Requests per datagram: their acknowledgements must fit in the socket's receive queue (212 992 bytes, some 800 each with overhead).
const BATCH: usize = 64;
/// Attempts at a dump that the kernel reports as inconsistent (`NLM_F_DUMP_INTR`); the last one is taken as it is.
const DUMP_ATTEMPTS: u32 = 8;
/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the text of an extended acknowledgement.
const ATTR_MSG: u16 = 1;

/// A request: its body, and its flags besides `NLM_F_REQUEST | NLM_F_ACK`.
pub(crate) type Request<M = RouteNetlinkMessage> = (M, u16);

/// An error reply (`NLMSG_ERROR`).
#[derive(Debug)]
pub(crate) struct ErrorReply {
    /// Error number; 0 if the reply was lost.
    pub(crate) errno: i32,
    /// Text of the extended acknowledgement.
    pub(crate) extack: Option<String>,
}

impl ErrorReply {
    const LOST: Self = Self { errno: 0, extack: None };

    /// The error of the operation `op`.
    pub(crate) fn during(self, op: impl Into<String>) -> NetError {
        let op = op.into();
        if self.errno == 0 {
            return NetError::NoAnswer { op };
        }
        NetError::Kernel { op, source: io::Error::from_raw_os_error(self.errno), extack: self.extack }
    }
}

/// The reply to one request: the whole message with its header, if the request was a query.
pub(crate) type Reply = Result<Option<Vec<u8>>, ErrorReply>;

/// A netlink socket in the network namespace that its opener was in.
#[derive(Debug)]
pub(crate) struct NetlinkSocket {
    socket: Socket,
    /// Port id of the socket.
    port: u32,
    sequence: u32,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens an rtnetlink socket in the calling thread's network namespace.
    pub(crate) fn route() -> Result<Self, NetError> {
        let netlink = Self::open(NETLINK_ROUTE)?;
        // The kernel applies filters of dumps only with strict checking (Linux 4.20).
        netlink.socket.set_netlink_get_strict_chk(true).map_err(open_failed)?;
        Ok(netlink)
    }

    /// Opens a sock_diag socket in the calling thread's network namespace.
    pub(crate) fn sock_diag() -> Result<Self, NetError> {
        Self::open(NETLINK_SOCK_DIAG)
    }

    fn open(protocol: isize) -> Result<Self, NetError> {
        let mut socket = Socket::new(protocol).map_err(open_failed)?;
        let port = socket.bind_auto().map_err(open_failed)?.port_number();
        socket.set_ext_ack(true).map_err(open_failed)?;
        // Error replies without a copy of the request's body.
        socket.set_cap_ack(true).map_err(open_failed)?;
        // Replies are queued when a request has been sent. The time-out covers a kernel that breaks this, and lost replies.
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &TimeVal::seconds(2))
            .map_err(|errno| open_failed(errno.into()))?;
        Ok(Self { socket, port, sequence: 0, outgoing: Vec::new(), incoming: Vec::with_capacity(DATAGRAM_BYTES) })
    }

    /// The socket's port id, which events that its requests cause carry as `nlmsg_pid`.
    pub(crate) const fn port(&self) -> u32 {
        self.port
    }

    /// Joins a multicast group (`RTNLGRP_*`).
    pub(crate) fn subscribe(&mut self, group: u32) -> Result<(), NetError> {
        self.socket.add_membership(group).map_err(|source| NetError::io("subscribe to netlink events", source))
    }

    /// Sets the size of the receive queue in bytes, regardless of `net.core.rmem_max`.
    pub(crate) fn set_receive_buffer(&mut self, bytes: usize) -> Result<(), NetError> {
        setsockopt(&self.socket.as_fd(), sockopt::RcvBufForce, &bytes)
            .map_err(|errno| NetError::io("enlarge the netlink receive buffer", errno))
    }

    /// Executes all requests in order, and returns their replies in the same order.
    pub(crate) fn batch<M: NetlinkSerializable>(&mut self, requests: Vec<Request<M>>) -> Result<Vec<Reply>, NetError> {
        let mut replies = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        while requests.len() > 0 {
            self.exchange(requests.by_ref().take(BATCH), &mut replies)?;
        }
        Ok(replies)
    }

    /// Executes one request.
    pub(crate) fn request<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> Result<Reply, NetError> {
        let replies = self.batch(vec![(message, flags)])?;
        Ok(replies.into_iter().next().unwrap_or(Err(ErrorReply::LOST)))
    }

    /// Executes a dump request. Returns all messages whole, with their headers.
    pub(crate) fn dump<M: NetlinkSerializable + Clone>(
        &mut self,
        op: &str,
        message: M,
    ) -> Result<Vec<Vec<u8>>, NetError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut found = Vec::new();
            let sequence = self.sequence.wrapping_add(1);
            self.outgoing.clear();
            self.push(message.clone(), NLM_F_REQUEST | NLM_F_DUMP);
            self.send()?;
            let mut is_interrupted = false;
            // `None`: a part of the dump was lost.
            let end = loop {
                match self.receive() {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(libc::ENOBUFS) => break None,
                    Err(errno) => return Err(NetError::io(op, io::Error::from_raw_os_error(errno))),
                }
                let mut end = None;
                for bytes in messages(&self.incoming) {
                    let Some(header) = Header::of(bytes) else { continue };
                    if header.sequence != sequence {
                        continue;
                    }
                    is_interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                    match i32::from(header.kind) {
                        // A dump that fails half-way reports it in its last message.
                        libc::NLMSG_DONE => end = Some(done(bytes)),
                        libc::NLMSG_ERROR => end = Some(error_reply(bytes).map_or(Ok(()), Err)),
                        _ => found.push(bytes.to_vec()),
                    }
                }
                if end.is_some() {
                    break end;
                }
            };
            match end {
                Some(Err(error)) => return Err(error.during(op)),
                Some(Ok(())) if !is_interrupted || attempts >= DUMP_ATTEMPTS => return Ok(found),
                None if attempts >= DUMP_ATTEMPTS => return Err(NetError::NoAnswer { op: op.to_owned() }),
                _ => {}
            }
        }
    }

    /// Receives one datagram of events, on a socket that has subscribed. `Err` is the error number, `ENOBUFS` when events were lost.
    pub(crate) fn events(&mut self, mut each: impl FnMut(&[u8])) -> Result<(), i32> {
        if self.receive()? {
            messages(&self.incoming).for_each(&mut each);
        }
        Ok(())
    }

    fn exchange<M: NetlinkSerializable>(
        &mut self,
        requests: impl Iterator<Item = Request<M>>,
        replies: &mut Vec<Reply>,
    ) -> Result<(), NetError> {
        let first = self.sequence.wrapping_add(1);
        self.outgoing.clear();
        let mut count = 0;
        for (message, flags) in requests {
            self.push(message, NLM_F_REQUEST | NLM_F_ACK | flags);
            count += 1;
        }
        self.send()?;
        let mut contents: Vec<Option<Vec<u8>>> = vec![None; count];
        let mut received: Vec<Option<Reply>> = (0..count).map(|_| None).collect();
        while received.iter().any(Option::is_none) {
            match self.receive() {
                Ok(true) => {}
                Ok(false) => continue,
                Err(libc::ENOBUFS | libc::EAGAIN) => break,
                Err(errno) => return Err(NetError::io("read netlink replies", io::Error::from_raw_os_error(errno))),
            }
            for bytes in messages(&self.incoming) {
                let Some(header) = Header::of(bytes) else { continue };
                // Another sequence number is that of a late reply to a batch that timed out.
                let place = header.sequence.wrapping_sub(first) as usize;
                let (Some(content), Some(reply)) = (contents.get_mut(place), received.get_mut(place)) else { continue };
                if i32::from(header.kind) == libc::NLMSG_ERROR {
                    *reply = Some(error_reply(bytes).map_or_else(|| Ok(content.take()), Err));
                } else {
                    *content = Some(bytes.to_vec());
                }
            }
        }
        replies.extend(received.into_iter().map(|reply| reply.unwrap_or(Err(ErrorReply::LOST))));
        Ok(())
    }

    /// Appends a request to the outgoing datagram.
    fn push<M: NetlinkSerializable>(&mut self, message: M, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = self.outgoing.len();
        let end = start + message.buffer_len();
        self.outgoing.resize(end, 0);
        message.serialize(&mut self.outgoing[start..end]);
        self.outgoing.resize(end.next_multiple_of(4), 0);
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

    /// Receives one datagram; false if its sender is not the kernel.
    fn receive(&mut self) -> Result<bool, i32> {
        loop {
            self.incoming.clear();
            match self.socket.recv_from(&mut self.incoming, libc::MSG_TRUNC) {
                // Truncated: longer than any part of a dump, so messages were lost.
                Ok((length, _)) if length > self.incoming.len() => return Err(libc::ENOBUFS),
                Ok((_, from)) => return Ok(from.port_number() == 0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.raw_os_error().unwrap_or(Errno::EIO as i32)),
            }
        }
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn open_failed(source: io::Error) -> NetError {
    NetError::io("open a netlink socket", source)
}

/// The fields of `struct nlmsghdr` that are used here.
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

/// The type of a message.
pub(super) fn message_type(message: &[u8]) -> u16 {
    Header::of(message).map_or(0, |header| header.kind)
}

/// The port id of the socket whose request caused an event (`nlmsg_pid`); 0 if the kernel acted by itself or does not report it.
pub(super) fn sender_port(message: &[u8]) -> u32 {
    message.get(12..HEADER).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Parses an rtnetlink message. One that the library cannot parse, such as a newer kernel's, is `None`.
pub(crate) fn route_message(message: &[u8]) -> Option<RouteNetlinkMessage> {
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).map(|message| message.payload) {
        Ok(NetlinkPayload::InnerMessage(inner)) => Some(inner),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%error, "skipped a netlink message that cannot be parsed");
            None
        }
    }
}

/// The number at the beginning of `NLMSG_ERROR` and `NLMSG_DONE`: 0, or a negative error number.
fn code(message: &[u8]) -> i32 {
    message.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// Parses an `NLMSG_ERROR`; `None` is an acknowledgement.
fn error_reply(message: &[u8]) -> Option<ErrorReply> {
    match code(message) {
        0 => None,
        code => {
            // The attributes follow the error number, the request's header, and its body unless that is left out (NLM_F_CAPPED).
            let flags = Header::of(message)?.flags;
            let request = message.get(HEADER + 4..).unwrap_or_default();
            let echoed = match request.get(..4).and_then(|length| length.try_into().ok()) {
                Some(length) if flags & NLM_F_CAPPED == 0 => (u32::from_ne_bytes(length) as usize).next_multiple_of(4),
                _ => HEADER,
            };
            Some(ErrorReply { errno: code.saturating_neg(), extack: extack(flags, request.get(echoed..)) })
        }
    }
}

/// Parses an `NLMSG_DONE`. The attributes follow the error number.
fn done(message: &[u8]) -> Result<(), ErrorReply> {
    let flags = Header::of(message).map_or(0, |header| header.flags);
    match code(message) {
        code if code < 0 => {
            Err(ErrorReply { errno: code.saturating_neg(), extack: extack(flags, message.get(HEADER + 4..)) })
        }
        _ => Ok(()),
    }
}

/// The text of an extended acknowledgement.
fn extack(flags: u16, tlvs: Option<&[u8]>) -> Option<String> {
    let tlvs = tlvs.filter(|_| flags & NLM_F_ACK_TLVS != 0)?;
    attributes(tlvs).find(|(kind, _)| *kind == ATTR_MSG).map(|(_, value)| text(value))
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

#[cfg(test)]
mod tests {
    use netlink_packet_core::NLM_F_MULTIPART;
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    /// A message as the kernel sends it.
    fn message(kind: i32, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend((kind as u16).to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn extended_acks_are_found_behind_capped_and_whole_requests() {
        let request = message(libc::RTM_GETLINK.into(), 0, 7, &[0; 16]);
        let tlvs = [attribute(2, &[1, 0, 0, 0]), attribute(ATTR_MSG, b"no such link\0")].concat();
        let errno = (-libc::ENODEV).to_ne_bytes().to_vec();
        for (flags, echoed) in [(NLM_F_CAPPED, &request[..HEADER]), (0, &request[..])] {
            let body = [errno.as_slice(), echoed, &tlvs].concat();
            let reply = error_reply(&message(libc::NLMSG_ERROR, flags | NLM_F_ACK_TLVS, 7, &body)).unwrap();
            assert_eq!((reply.errno, reply.extack.as_deref()), (libc::ENODEV, Some("no such link")));
            // Without the flag the bytes are not attributes.
            let reply = error_reply(&message(libc::NLMSG_ERROR, flags, 7, &body)).unwrap();
            assert_eq!((reply.errno, reply.extack), (libc::ENODEV, None));
        }
        let body = [errno.as_slice(), &tlvs].concat();
        let error = done(&message(libc::NLMSG_DONE, NLM_F_MULTIPART | NLM_F_ACK_TLVS, 7, &body)).unwrap_err();
        assert_eq!((error.errno, error.extack.as_deref()), (libc::ENODEV, Some("no such link")));
        assert!(done(&message(libc::NLMSG_DONE, 0, 7, &[0; 4])).is_ok());
        assert!(error_reply(&message(libc::NLMSG_ERROR, NLM_F_CAPPED, 7, &[0; 20])).is_none());
    }

    #[test]
    fn truncated_messages_do_not_panic() {
        let whole = message(libc::NLMSG_ERROR, NLM_F_ACK_TLVS, 7, &[0xff; 40]);
        for length in 0..whole.len() {
            let part = &whole[..length];
            assert_eq!(messages(part).count(), 0);
            let _ = (error_reply(part), done(part), attributes(part).count(), route_message(part));
        }
    }

    #[test]
    fn late_replies_of_an_abandoned_batch_are_not_taken_for_those_of_the_next() {
        let mut netlink = NetlinkSocket::route().unwrap();
        let lookup = |name: &str| {
            let mut link = LinkMessage::default();
            link.attributes = vec![netlink_packet_route::link::LinkAttribute::IfName(name.to_owned())];
            RouteNetlinkMessage::GetLink(link)
        };
        // A batch whose replies nobody has read.
        netlink.outgoing.clear();
        netlink.push(lookup("lo"), NLM_F_REQUEST | NLM_F_ACK);
        netlink.push(lookup("lo"), NLM_F_REQUEST | NLM_F_ACK);
        netlink.send().unwrap();
        let replies = netlink.batch(vec![(lookup("no-such-link"), 0), (lookup("lo"), 0)]).unwrap();
        let [missing, lo] = replies.as_slice() else { panic!("{replies:?}") };
        assert_eq!(missing.as_ref().unwrap_err().errno, libc::ENODEV);
        assert!(matches!(route_message(lo.as_ref().unwrap().as_ref().unwrap()), Some(RouteNetlinkMessage::NewLink(_))));
    }
}
