//! Services at the socket: `connect` and `sendmsg` go to a backend, and what the application asks afterwards is answered with the
//! Service's address. Packets then need no translation.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie};
use terway_abi::{Member, SocketKey, SocketValue};

use super::exit::now;
use super::maps::{HZ, Maps, SOCKETS};
use crate::decide::Tables;
use crate::family::{Family, V4, V6};
use crate::parse::{TCP, UDP};
use crate::service::{self, Asker, Outcome, Services};

/// What the kernel is told: go on with the system call.
const GO_ON: i32 = 1;
/// The system call fails with `EPERM`.
const REFUSE: i32 = 0;

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
fn socket_key(sock: Sock, address: [u32; 4], port: u32, version: u8) -> SocketKey {
    // SAFETY: valid context.
    let cookie = unsafe { bpf_get_socket_cookie(sock.0.cast()) };
    let [high, low, ..] = port.to_ne_bytes();
    let class = u32::from_ne_bytes([high, low, version, get!(sock, PROTOCOL) as u8]);
    SocketKey { cookie: [cookie as u32, (cookie >> 32) as u32], address, class, spare: 0 }
}

/// The backend that a socket's destination comes to: its number and life, address and port; and what the kernel is told.
#[inline(always)]
fn choose<F: Family>(sock: Sock, address: &F::Addr, loopback: bool) -> Result<Option<(Member, F::Addr, u32)>, i32>
where
    Maps: Tables<F> + Services<F>,
{
    let (protocol, port) = (get!(sock, PROTOCOL) as u8, get!(sock, PORT));
    if !matches!(protocol, TCP | UDP) || !Maps.may_serve(address) {
        return Ok(None);
    }
    // SAFETY: valid context; without one the helper speaks of the first network namespace, which is the node's.
    let (own, first) = unsafe { (bpf_get_netns_cookie(sock.0.cast()), bpf_get_netns_cookie(core::ptr::null_mut())) };
    let node = || if loopback { own == first } else { Maps.is_host(address) };
    let Some(frontend) = service::find::<F, _>(&Maps, address, port << 16, protocol, node) else { return Ok(None) };
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    let asker = Asker { client: [own as u32, (own >> 32) as u32, 0, 0], kind: 0, random, now: now(), hz: HZ.load() };
    match service::choose::<F, _>(&Maps, frontend, true, random, &asker) {
        Outcome::Chosen(member) => {
            let Some(backend) = Services::<F>::backend(&Maps, member.backend) else { return Ok(None) };
            let key = socket_key(sock, backend.address, u32::from(backend.port), F::VERSION);
            let value = SocketValue { address: F::widen(address), port, service: frontend.service, member };
            // If the table does not take it, the application is told the backend's address.
            let _full = SOCKETS.insert(&key, &value, 0);
            Ok(Some((member, F::narrow(&backend.address), u32::from(backend.port))))
        }
        // A pod's packet is answered where it leaves the pod, with the error that a closed port gives. The node's own would leave.
        Outcome::Refused { .. } if own == first => Err(REFUSE),
        _ => Ok(None),
    }
}

/// `connect` and `sendmsg` of an IPv4 socket.
#[inline(always)]
pub fn there_v4(sock: Sock) -> i32 {
    let address = get!(sock, IP4);
    let [first, ..] = address.to_ne_bytes();
    match choose::<V4>(sock, &address, first == 127) {
        Ok(Some((_, address, port))) => {
            set!(sock, IP4, address);
            set!(sock, PORT, port);
            GO_ON
        }
        Ok(None) => GO_ON,
        Err(answer) => answer,
    }
}

/// `connect` and `sendmsg` of an IPv6 socket, which may go to an IPv4 address.
#[inline(always)]
pub fn there_v6(sock: Sock) -> i32 {
    let address = V6::read(sock);
    if let Some(v4) = mapped(&address) {
        let [first, ..] = v4.to_ne_bytes();
        return match choose::<V4>(sock, &v4, first == 127) {
            Ok(Some((_, address, port))) => {
                set!(sock, IP6 + 12, address);
                set!(sock, PORT, port);
                GO_ON
            }
            Ok(None) => GO_ON,
            Err(answer) => answer,
        };
    }
    let [a, b, c, d] = address;
    match choose::<V6>(sock, &address, a | b | c == 0 && d == 1_u32.to_be()) {
        Ok(Some((_, address, port))) => {
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
    let key = socket_key(sock, [get!(sock, IP4), 0, 0, 0], get!(sock, PORT), 4);
    // SAFETY: read at once; a value that is reused meanwhile is of another socket, which is a race of microseconds.
    if let Some(value) = unsafe { SOCKETS.get(&key) } {
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
    let key = match v4 {
        Some(v4) => socket_key(sock, [v4, 0, 0, 0], get!(sock, PORT), 4),
        None => socket_key(sock, address, get!(sock, PORT), 6),
    };
    // SAFETY: as above.
    if let Some(value) = unsafe { SOCKETS.get(&key) } {
        let [first, ..] = value.address;
        match v4 {
            Some(_) => set!(sock, IP6 + 12, first),
            None => V6::write(sock, &value.address),
        }
        set!(sock, PORT, value.port);
    }
    GO_ON
}
