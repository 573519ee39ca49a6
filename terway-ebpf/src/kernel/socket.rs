//! Services at the socket: `connect` and `sendmsg` go to a backend, and what the application asks afterwards is answered with the
//! Service's address. Packets then need no translation.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval};
use terway_abi::{BackendRef, SOCKET_DATAGRAM_BACKEND, SOCKET_REVERSE_NAT, SocketKey, SocketValue, frontend_flags};

use super::exit::now;
use super::maps::{HOST_NETNS, HZ, Maps, SETS_ERRNO, SOCKET_NAT};
use crate::route::Tables;
use crate::family::{Family, V4, V6};
use crate::parse::{TCP, UDP};
use crate::service::{self, Asker, Outcome, Services};

/// What the kernel is told: go on with the system call.
const GO_ON: i32 = 1;
/// The system call fails, with `EPERM` unless [`refuse`] has told another error.
const REFUSE: i32 = 0;

/// What a closed port gives (include/uapi/asm-generic/errno.h).
const ECONNREFUSED: i32 = 111;
/// What a port gives that somebody has bound already.
const EADDRINUSE: i32 = 98;

/// The second and third word of an IPv4 address in IPv6's clothes (RFC 4291 section 2.5.5.2).
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

/// The context of a socket-address program.
#[derive(Clone, Copy)]
pub struct Sock(pub *mut bpf_sock_addr);

/// Reads a field; see `field!` in `skb`.
macro_rules! get {
    ($sock:expr, $offset:expr) => {{
        let value: u64;
        // SAFETY: the kernel passes a valid context, and the field is readable for these programs.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({ctx} + {offset})",
                value = lateout(reg) value,
                ctx = in(reg) $sock.0,
                offset = const $offset,
                options(nostack, preserves_flags, readonly),
            );
        }
        value as u32
    }};
}

/// Writes a field.
macro_rules! set {
    ($sock:expr, $offset:expr, $value:expr) => {{
        // SAFETY: as for reading; the field is writable.
        unsafe {
            core::arch::asm!(
                "*(u32 *)({ctx} + {offset}) = {value}",
                value = in(reg) u64::from($value),
                ctx = in(reg) $sock.0,
                offset = const $offset,
                options(nostack, preserves_flags),
            );
        }
    }};
}

const IP4: usize = core::mem::offset_of!(bpf_sock_addr, user_ip4);
const IP6: usize = core::mem::offset_of!(bpf_sock_addr, user_ip6);
const PORT: usize = core::mem::offset_of!(bpf_sock_addr, user_port);
const PROTOCOL: usize = core::mem::offset_of!(bpf_sock_addr, protocol);

/// How an address stands in the context.
trait Stands: Family {
    fn read(sock: Sock) -> Self::Addr;
    fn write(sock: Sock, address: &Self::Addr);
}

impl Stands for V6 {
    #[inline(always)]
    fn read(sock: Sock) -> [u32; 4] {
        [get!(sock, IP6), get!(sock, IP6 + 4), get!(sock, IP6 + 8), get!(sock, IP6 + 12)]
    }

    #[inline(always)]
    fn write(sock: Sock, address: &[u32; 4]) {
        let [a, b, c, d] = *address;
        set!(sock, IP6, a);
        set!(sock, IP6 + 4, b);
        set!(sock, IP6 + 8, c);
        set!(sock, IP6 + 12, d);
    }
}

/// Whether the context of an IPv6 socket names an IPv4 address, and which.
#[inline(always)]
fn mapped(address: &[u32; 4]) -> Option<u32> {
    let [a, b, c, d] = *address;
    (a | b == 0 && c == MAPPED).then_some(d)
}

#[inline(always)]
fn socket_cookie(sock: Sock) -> u64 {
    // SAFETY: valid context.
    unsafe { bpf_get_socket_cookie(sock.0.cast()) }
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(super) fn netns(sock: Sock) -> u64 {
    // SAFETY: valid context.
    unsafe { bpf_get_netns_cookie(sock.0.cast()) }
}

/// Whether this is the cookie of the node's own network namespace.
#[inline(always)]
pub(super) fn is_node(netns: u64) -> bool {
    let host = match HOST_NETNS.load() {
        // SAFETY: without a context the helper speaks of the first network namespace.
        0 => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
        cookie => cookie,
    };
    netns == host
}

/// Has the system call fail with this error, or, where the kernel knows only one, with `EPERM`.
#[inline(always)]
pub(super) fn refuse(errno: i32) -> i32 {
    if SETS_ERRNO.load() != 0 {
        // SAFETY: the helper only notes the number, which is one of an error.
        unsafe { bpf_set_retval(-errno) };
    }
    REFUSE
}

#[inline(always)]
fn socket_key(sock: Sock, cookie: u64, address: [u32; 4], port: u32, version: u8) -> SocketKey {
    let [high, low, ..] = port.to_ne_bytes();
    let class = u32::from_ne_bytes([high, low, version, get!(sock, PROTOCOL) as u8]);
    SocketKey { cookie: words(cookie), address, class, kind: SOCKET_REVERSE_NAT }
}

#[inline(always)]
const fn words(cookie: u64) -> [u32; 2] {
    [cookie as u32, (cookie >> 32) as u32]
}

/// What a system call does with the address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `connect`: all that is sent goes there.
    Connect,
    /// `sendto` and `sendmsg` of a datagram on a socket that is not connected.
    Send,
}

/// The backend that a socket's destination comes to, its address and port; or what the kernel is told.
#[inline(always)]
fn choose<F: Family>(sock: Sock, call: Call, address: &F::Addr, loopback: bool) -> Result<Option<(F::Addr, u32)>, i32>
where
    Maps: Tables<F> + Services<F>,
{
    let (protocol, port) = (get!(sock, PROTOCOL) as u8, get!(sock, PORT));
    if !matches!(protocol, TCP | UDP) {
        return Ok(None);
    }
    let own = netns(sock);
    let found = if loopback {
        // A pod's loopback is its own. The node's has its ports of Services, and is in no filter.
        if !is_node(own) {
            return Ok(None);
        }
        service::at_node::<F, _>(&Maps, port << 16, protocol)
    } else {
        service::find::<F, _>(&Maps, address, port << 16, protocol, true, || Maps.is_host(address))
    };
    let Some(frontend) = found else { return Ok(None) };
    let node = is_node(own);
    // Not for clients in the cluster; or, of a pod, for the packets' path: it knows how many connections a backend has, and what the
    // hash is made of.
    let theirs = frontend_flags::MAGLEV | frontend_flags::LEAST_CONNECTIONS;
    if frontend.flags & frontend_flags::EXTERNAL_ONLY != 0 || (!node && frontend.flags & theirs != 0) {
        return Ok(None);
    }
    let cookie = socket_cookie(sock);
    let memory =
        SocketKey { kind: SOCKET_DATAGRAM_BACKEND, ..socket_key(sock, cookie, F::widen(address), port, F::VERSION) };
    let known = remembered::<F>(call, &memory, frontend.service);
    let member = match known {
        Some(member) => member,
        None => {
            // SAFETY: the helper has no preconditions.
            let random = unsafe { bpf_get_prandom_u32() };
            let asker =
                Asker { client: [own as u32, (own >> 32) as u32, 0, 0], kind: 0, random, now: now(), hz: HZ.load() };
            match service::choose::<F, _>(&Maps, frontend, true, random, &asker) {
                Outcome::Chosen(member) => member,
                // A pod's packet is answered where it leaves the pod, by a reset or an ICMP error. The node's own would leave.
                Outcome::Refused { .. } if node => return Err(refuse(ECONNREFUSED)),
                _ => return Ok(None),
            }
        }
    };
    let Some(backend) = Services::<F>::backend(&Maps, member.backend) else { return Ok(None) };
    let (target, target_port) = (backend.address, u32::from(backend.port));
    let key = socket_key(sock, cookie, target, target_port, F::VERSION);
    let value = SocketValue {
        address: F::widen(address),
        port,
        service: frontend.service,
        backend_ref: member,
        netns: words(own),
    };
    // If the table takes neither, the application is told the backend's address, and the next datagram may go elsewhere.
    if !is_known(&key, &value) {
        let _full = SOCKET_NAT.insert(&key, &value, 0);
    }
    if call == Call::Send && known.is_none() {
        let _full = SOCKET_NAT.insert(&memory, &SocketValue { address: target, port: target_port, ..value }, 0);
    }
    Ok(Some((F::narrow(&target), target_port)))
}

/// Where this socket's last datagram to this frontend went, if that backend lives: an exchange of several datagrams stays with whom
/// it began.
#[inline(always)]
fn remembered<F: Family>(call: Call, key: &SocketKey, service: u32) -> Option<BackendRef>
where
    Maps: Services<F>,
{
    if call != Call::Send {
        return None;
    }
    // SAFETY: read at once; a value that is reused meanwhile is of another socket, which is a race of microseconds.
    let value = unsafe { SOCKET_NAT.get(key) }?;
    let member = value.backend_ref;
    (value.service == service && service::life::<F, _>(&Maps, member).is_some()).then_some(member)
}

/// Whether the way back is in the table already.
#[inline(always)]
fn is_known(key: &SocketKey, value: &SocketValue) -> bool {
    // SAFETY: as above.
    let Some(known) = (unsafe { SOCKET_NAT.get(key) }) else { return false };
    let ([a, b, c, d], [e, f, g, h]) = (known.address, value.address);
    (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
        && known.port == value.port
        && known.backend_ref.backend == value.backend_ref.backend
        && known.backend_ref.generation == value.backend_ref.generation
}

/// `connect`, `sendto` or `sendmsg` of an IPv4 socket.
#[inline(always)]
pub fn there_v4(sock: Sock, call: Call) -> i32 {
    let address = get!(sock, IP4);
    let [first, ..] = address.to_ne_bytes();
    match choose::<V4>(sock, call, &address, first == 127) {
        Ok(Some((address, port))) => {
            set!(sock, IP4, address);
            set!(sock, PORT, port);
            GO_ON
        }
        Ok(None) => GO_ON,
        Err(answer) => answer,
    }
}

/// The same of an IPv6 socket, which may go to an IPv4 address.
#[inline(always)]
pub fn there_v6(sock: Sock, call: Call) -> i32 {
    let address = V6::read(sock);
    if let Some(v4) = mapped(&address) {
        let [first, ..] = v4.to_ne_bytes();
        return match choose::<V4>(sock, call, &v4, first == 127) {
            Ok(Some((address, port))) => {
                set!(sock, IP6 + 12, address);
                set!(sock, PORT, port);
                GO_ON
            }
            Ok(None) => GO_ON,
            Err(answer) => answer,
        };
    }
    let [a, b, c, d] = address;
    match choose::<V6>(sock, call, &address, a | b | c == 0 && d == 1_u32.to_be()) {
        Ok(Some((address, port))) => {
            V6::write(sock, &address);
            set!(sock, PORT, port);
            GO_ON
        }
        Ok(None) => GO_ON,
        Err(answer) => answer,
    }
}

/// `recvmsg` and `getpeername` of an IPv4 socket: whom it believes to talk to.
#[inline(always)]
pub fn back_v4(sock: Sock) -> i32 {
    let key = socket_key(sock, socket_cookie(sock), [get!(sock, IP4), 0, 0, 0], get!(sock, PORT), 4);
    // SAFETY: read at once; a value that is reused meanwhile is of another socket, which is a race of microseconds.
    if let Some(value) = unsafe { SOCKET_NAT.get(&key) } {
        let [address, ..] = value.address;
        set!(sock, IP4, address);
        set!(sock, PORT, value.port);
    }
    GO_ON
}

/// The same of an IPv6 socket.
#[inline(always)]
pub fn back_v6(sock: Sock) -> i32 {
    let address = V6::read(sock);
    let v4 = mapped(&address);
    let (cookie, port) = (socket_cookie(sock), get!(sock, PORT));
    let key = match v4 {
        Some(v4) => socket_key(sock, cookie, [v4, 0, 0, 0], port, 4),
        None => socket_key(sock, cookie, address, port, 6),
    };
    // SAFETY: as above.
    if let Some(value) = unsafe { SOCKET_NAT.get(&key) } {
        let [first, ..] = value.address;
        match v4 {
            Some(_) => set!(sock, IP6 + 12, first),
            None => V6::write(sock, &value.address),
        }
        set!(sock, PORT, value.port);
    }
    GO_ON
}

/// Whether this port of the node is a Service's: whoever listens there would never be asked.
#[inline(always)]
fn is_taken<F: Family>(sock: Sock) -> bool
where
    Maps: Services<F>,
{
    service::at_node::<F, _>(&Maps, get!(sock, PORT) << 16, get!(sock, PROTOCOL) as u8).is_some()
}

/// `bind` of an IPv4 socket. Pods have ports of their own.
#[inline(always)]
pub fn bind_v4(sock: Sock) -> i32 {
    if get!(sock, PORT) != 0 && is_node(netns(sock)) && is_taken::<V4>(sock) { refuse(EADDRINUSE) } else { GO_ON }
}

/// `bind` of an IPv6 socket. One that is bound to no address gets what comes to IPv4 addresses, too; that it may be told not to
/// (`IPV6_V6ONLY`) cannot be seen from here.
#[inline(always)]
pub fn bind_v6(sock: Sock) -> i32 {
    if get!(sock, PORT) == 0 || !is_node(netns(sock)) {
        return GO_ON;
    }
    let address = V6::read(sock);
    let [a, b, c, d] = address;
    let v4 = a | b | c | d == 0 || mapped(&address).is_some();
    if (v4 && is_taken::<V4>(sock)) || is_taken::<V6>(sock) { refuse(EADDRINUSE) } else { GO_ON }
}
