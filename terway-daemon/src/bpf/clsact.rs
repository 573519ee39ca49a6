//! Programs on interfaces by a clsact qdisc and `cls_bpf` filters in direct-action mode, over raw netlink.
//!
//! Pods' interfaces are attached this way on every kernel: a TCX attachment waits for an RCU grace period while it holds the
//! rtnetlink lock, which is 16 ms for each hook of each pod, and this takes a tenth of a millisecond for both. Everything for an
//! interface goes to the kernel in one system call. A filter of the same priority and handle is replaced in place, so a packet
//! meets the old program or the new one, never none (`cls_bpf_change`, net/sched/cls_bpf.c).

use std::io;
use std::os::fd::RawFd;

use netlink_sys::{Socket as NetlinkSocket, SocketAddr, protocols::NETLINK_ROUTE};

use super::error::BpfError;

/// A filter's place: which program it is to be found by, and replaced by, at the next start. "tw".
const HANDLE: u32 = 0x7477;
const PRIORITY: u32 = 1;

/// include/uapi/linux/pkt_sched.h.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// include/uapi/linux/if_ether.h, in network byte order.
const ETH_P_ALL: u32 = 3_u16.to_be() as u32;

/// include/uapi/linux/rtnetlink.h and pkt_cls.h.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

const ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
const CREATE: u16 = ACK | libc::NLM_F_CREATE as u16;

/// A netlink socket in the namespace where it was opened.
#[derive(Debug)]
pub(super) struct Socket {
    socket: NetlinkSocket,
    sequence: u32,
}

impl Socket {
    pub(super) fn open() -> Result<Self, BpfError> {
        let failed = |source| BpfError::System { call: "netlink socket", source };
        let mut socket = NetlinkSocket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        // Without the request's copy in each acknowledgement.
        socket.set_cap_ack(true).map_err(failed)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Puts the two programs on the interface, in place of what stands there.
    pub(super) fn attach(&mut self, ifindex: u32, ingress: RawFd, egress: RawFd) -> Result<(), BpfError> {
        let mut batch = Batch::new(self.sequence);
        batch.message(
            libc::RTM_NEWQDISC,
            CREATE | libc::NLM_F_EXCL as u16,
            ifindex,
            CLSACT_HANDLE,
            CLSACT,
            0,
            |attributes| {
                attributes.string(TCA_KIND, "clsact");
            },
        );
        for (parent, fd, name) in [(INGRESS, ingress, "terway-in"), (EGRESS, egress, "terway-out")] {
            batch.message(
                libc::RTM_NEWTFILTER,
                CREATE,
                ifindex,
                HANDLE,
                parent,
                PRIORITY << 16 | ETH_P_ALL,
                |attributes| {
                    attributes.string(TCA_KIND, "bpf");
                    attributes.nested(TCA_OPTIONS, |options| {
                        options.number(TCA_BPF_FD, fd.cast_unsigned());
                        options.string(TCA_BPF_NAME, name);
                        options.number(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
                    });
                },
            );
        }
        let [qdisc, from, to] = self.exchange(&batch, ifindex)?;
        accept("add clsact", ifindex, qdisc, &[libc::EEXIST])?;
        accept("attach at ingress", ifindex, from, &[])?;
        accept("attach at egress", ifindex, to, &[])
    }

    /// Takes both programs off the interface. What is not there is no error.
    pub(super) fn detach(&mut self, ifindex: u32) -> Result<(), BpfError> {
        let mut batch = Batch::new(self.sequence);
        for parent in [INGRESS, EGRESS] {
            batch.message(
                libc::RTM_DELTFILTER,
                ACK,
                ifindex,
                HANDLE,
                parent,
                PRIORITY << 16 | ETH_P_ALL,
                |attributes| {
                    attributes.string(TCA_KIND, "bpf");
                },
            );
        }
        let absent = [libc::ENODEV, libc::ENOENT, libc::EINVAL, libc::EOPNOTSUPP];
        let [from, to] = self.exchange(&batch, ifindex)?;
        accept("detach from ingress", ifindex, from, &absent)?;
        accept("detach from egress", ifindex, to, &absent)
    }

    /// Whether both filters are there. The kernel answers a single get with the filter and an acknowledgement, or with an error.
    pub(super) fn is_attached(&mut self, ifindex: u32) -> Result<bool, BpfError> {
        let mut batch = Batch::new(self.sequence);
        for parent in [INGRESS, EGRESS] {
            batch.message(
                libc::RTM_GETTFILTER,
                ACK,
                ifindex,
                HANDLE,
                parent,
                PRIORITY << 16 | ETH_P_ALL,
                |attributes| {
                    attributes.string(TCA_KIND, "bpf");
                },
            );
        }
        let answers: [i32; 2] = self.exchange(&batch, ifindex)?;
        Ok(answers == [0, 0])
    }

    /// Sends a batch and returns the error number of each of its messages.
    fn exchange<const N: usize>(&mut self, batch: &Batch, ifindex: u32) -> Result<[i32; N], BpfError> {
        let first = self.sequence.wrapping_add(1);
        self.sequence = batch.sequence;
        let failed = |source| BpfError::Netlink { step: "netlink", ifindex, source };
        self.socket.send(&batch.bytes, 0).map_err(failed)?;
        let mut answers = [None; N];
        while answers.iter().any(Option::is_none) {
            let (datagram, _) = self.socket.recv_from_full().map_err(failed)?;
            for (sequence, errno) in acknowledgements(&datagram) {
                // Anything else is the late answer to a batch that was given up.
                if let Some(answer) = answers.get_mut(sequence.wrapping_sub(first) as usize) {
                    *answer = Some(errno);
                }
            }
        }
        Ok(answers.map(Option::unwrap_or_default))
    }
}

fn accept(step: &'static str, ifindex: u32, errno: i32, fine: &[i32]) -> Result<(), BpfError> {
    if errno == 0 || fine.contains(&errno) {
        return Ok(());
    }
    Err(BpfError::Netlink { step, ifindex, source: io::Error::from_raw_os_error(errno) })
}

/// Sequence numbers and error numbers of the acknowledgements in a datagram (`struct nlmsghdr`, `struct nlmsgerr`).
fn acknowledgements(datagram: &[u8]) -> impl Iterator<Item = (u32, i32)> + '_ {
    let word =
        |bytes: &[u8], at: usize| bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let mut rest = datagram;
    std::iter::from_fn(move || {
        while rest.len() >= 20 {
            let message = rest;
            let length = (word(message, 0) as usize).max(16);
            rest = message.get(length.next_multiple_of(4)..).unwrap_or_default();
            if word(message, 4) & 0xffff == libc::NLMSG_ERROR as u32 {
                return Some((word(message, 8), -word(message, 16).cast_signed()));
            }
        }
        None
    })
}

/// Messages that go to the kernel in one datagram.
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new(sequence: u32) -> Self {
        Self { bytes: Vec::with_capacity(320), sequence }
    }

    /// Appends a `struct nlmsghdr`, a `struct tcmsg` and attributes.
    #[expect(clippy::too_many_arguments, reason = "they are the fields of the two headers, in their order")]
    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        ifindex: u32,
        handle: u32,
        parent: u32,
        info: u32,
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.sequence = self.sequence.wrapping_add(1);
        let kinds = u32::from(kind) | u32::from(flags) << 16;
        for word in [0, kinds, self.sequence, 0, 0, ifindex, handle, parent, info] {
            self.bytes.extend(word.to_ne_bytes());
        }
        attributes(&mut Attributes(&mut self.bytes));
        let length = (self.bytes.len() - start) as u32;
        if let Some(field) = self.bytes.get_mut(start..start + 4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }
}

/// Appends `struct nlattr`s.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn raw(&mut self, kind: u16, value: &[u8]) {
        self.0.extend(((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn string(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.raw(kind, &bytes);
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.raw(kind, &value.to_ne_bytes());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let mut inner = Vec::with_capacity(64);
        fill(&mut Attributes(&mut inner));
        self.raw(kind, &inner);
    }
}
