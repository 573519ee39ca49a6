//! Service translation at the socket: `connect` and `sendmsg` get a backend's address, `recvmsg` and `getpeername` the frontend's. Packets
//! of such sockets need no NAT.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval};
use terway_abi::{BackendRef, SOCKET_DATAGRAM_BACKEND, SOCKET_REVERSE_NAT, SocketKey, SocketValue, frontend_flags};

use super::counters::jiffies;
use super::maps::{HOST_NETNS, HZ, Maps, SETS_ERRNO, SOCKET_NAT};
use crate::family::{Family, V4, V6};
use crate::parse::{TCP, UDP};
use crate::route::Tables;
use crate::service::{self, Client, Selection, Services};

/// Return value: proceed with the system call.
const PROCEED: i32 = 1;
/// Return value: the system call fails, with `EPERM` unless [`reject_call`] has set another errno.
const REJECT: i32 = 0;

/// Errno of a closed port (include/uapi/asm-generic/errno.h).
const ECONNREFUSED: i32 = 111;
/// Errno of a port that is already bound.
const EADDRINUSE: i32 = 98;

/// The third word of an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2).
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

/// Access to the address in the context, by family.
trait ContextAddress: Family {
    fn read(sock: Sock) -> Self::Addr;
    fn write(sock: Sock, address: &Self::Addr);
}

impl ContextAddress for V6 {
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

/// The IPv4 address of an IPv4-mapped IPv6 address.
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
fn netns_cookie(sock: Sock) -> u64 {
    // SAFETY: valid context.
    unsafe { bpf_get_netns_cookie(sock.0.cast()) }
}

/// Whether this is the cookie of the host's network namespace.
#[inline(always)]
fn is_host_netns(netns: u64) -> bool {
    let host = match HOST_NETNS.load() {
        // SAFETY: without a context the helper returns the cookie of the initial network namespace.
        0 => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
        cookie => cookie,
    };
    netns == host
}

/// Makes the system call fail with this errno; with `EPERM` on kernels without `bpf_set_retval`.
#[inline(always)]
fn reject_call(errno: i32) -> i32 {
    if SETS_ERRNO.load() != 0 {
        // SAFETY: the helper stores the number, which is a valid errno.
        unsafe { bpf_set_retval(-errno) };
    }
    REJECT
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

/// The system call that names an address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `connect`.
    Connect,
    /// `sendto` or `sendmsg` on an unconnected datagram socket.
    Send,
}

/// The backend (address and port) for a socket's destination, none if it is for no Service; or the return value of a rejected call.
#[inline(always)]
fn select_backend<F: Family>(
    sock: Sock,
    call: Call,
    address: &F::Addr,
    loopback: bool,
) -> Result<Option<(F::Addr, u32)>, i32>
where
    Maps: Tables<F> + Services<F>,
{
    let (protocol, port) = (get!(sock, PROTOCOL) as u8, get!(sock, PORT));
    if !matches!(protocol, TCP | UDP) {
        return Ok(None);
    }
    let own = netns_cookie(sock);
    let found = if loopback {
        // Only the host's loopback has NodePorts. Loopback addresses are not in the frontend filter.
        if !is_host_netns(own) {
            return Ok(None);
        }
        service::find_nodeport::<F, _>(&Maps, port << 16, protocol)
    } else {
        service::find_frontend::<F, _>(&Maps, address, port << 16, protocol, true, || Maps.is_host(address))
    };
    let Some(frontend) = found else { return Ok(None) };
    let is_host = is_host_netns(own);
    // Not for clients in the cluster. Or a pod's connection that needs the packet path, which counts active connections and hashes ports.
    let packet_path = frontend_flags::MAGLEV | frontend_flags::LEAST_CONNECTIONS;
    if frontend.flags & frontend_flags::EXTERNAL_ONLY != 0 || (!is_host && frontend.flags & packet_path != 0) {
        return Ok(None);
    }
    let cookie = socket_cookie(sock);
    let datagram_key =
        SocketKey { kind: SOCKET_DATAGRAM_BACKEND, ..socket_key(sock, cookie, F::to_words(address), port, F::VERSION) };
    let previous = previous_backend::<F>(call, &datagram_key, frontend.service);
    let selected = match previous {
        Some(backend_ref) => backend_ref,
        None => {
            // SAFETY: the helper has no preconditions.
            let random = unsafe { bpf_get_prandom_u32() };
            let client = Client {
                client: [own as u32, (own >> 32) as u32, 0, 0],
                kind: 0,
                random,
                now: jiffies(),
                hz: HZ.load(),
            };
            match service::select_backend::<F, _>(&Maps, frontend, true, random, &client) {
                Selection::Backend(backend_ref) => backend_ref,
                // A pod's packet is rejected by `from_pod`. Packets of the host do not pass a program that rejects them.
                Selection::NoBackend { .. } if is_host => return Err(reject_call(ECONNREFUSED)),
                _ => return Ok(None),
            }
        }
    };
    let Some(backend) = Services::<F>::backend(&Maps, selected.backend) else { return Ok(None) };
    let (target, target_port) = (backend.address, u32::from(backend.port));
    let key = socket_key(sock, cookie, target, target_port, F::VERSION);
    let value = SocketValue {
        address: F::to_words(address),
        port,
        service: frontend.service,
        backend_ref: selected,
        netns: words(own),
    };
    // If an insertion fails, the application sees the backend's address, or the next datagram may go to another backend.
    if !is_stored(&key, &value) {
        let _result = SOCKET_NAT.insert(&key, &value, 0);
    }
    if call == Call::Send && previous.is_none() {
        let _result = SOCKET_NAT.insert(&datagram_key, &SocketValue { address: target, port: target_port, ..value }, 0);
    }
    Ok(Some((F::from_words(&target), target_port)))
}

/// The backend of this socket's last datagram to this frontend, if it still exists: an exchange of several datagrams stays with one backend.
#[inline(always)]
fn previous_backend<F: Family>(call: Call, key: &SocketKey, service: u32) -> Option<BackendRef>
where
    Maps: Services<F>,
{
    if call != Call::Send {
        return None;
    }
    // SAFETY: read at once; a value that is reused meanwhile is of another socket, which is a race of microseconds.
    let value = unsafe { SOCKET_NAT.get(key) }?;
    let backend_ref = value.backend_ref;
    (value.service == service && service::current_backend::<F, _>(&Maps, backend_ref).is_some()).then_some(backend_ref)
}

/// Whether this reverse translation is stored already.
#[inline(always)]
fn is_stored(key: &SocketKey, value: &SocketValue) -> bool {
    // SAFETY: as above.
    let Some(known) = (unsafe { SOCKET_NAT.get(key) }) else { return false };
    let ([a, b, c, d], [e, f, g, h]) = (known.address, value.address);
    (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
        && known.port == value.port
        && known.backend_ref.backend == value.backend_ref.backend
        && known.backend_ref.generation == value.backend_ref.generation
}

/// Translates the destination of `connect`, `sendto` or `sendmsg` of an IPv4 socket.
#[inline(always)]
pub fn translate_destination_v4(sock: Sock, call: Call) -> i32 {
    let address = get!(sock, IP4);
    let [first, ..] = address.to_ne_bytes();
    match select_backend::<V4>(sock, call, &address, first == 127) {
        Ok(Some((address, port))) => {
            set!(sock, IP4, address);
            set!(sock, PORT, port);
            PROCEED
        }
        Ok(None) => PROCEED,
        Err(result) => result,
    }
}

/// Translates the destination of an IPv6 socket, which may be an IPv4-mapped address.
#[inline(always)]
pub fn translate_destination_v6(sock: Sock, call: Call) -> i32 {
    let address = V6::read(sock);
    if let Some(v4) = mapped(&address) {
        let [first, ..] = v4.to_ne_bytes();
        return match select_backend::<V4>(sock, call, &v4, first == 127) {
            Ok(Some((address, port))) => {
                set!(sock, IP6 + 12, address);
                set!(sock, PORT, port);
                PROCEED
            }
            Ok(None) => PROCEED,
            Err(result) => result,
        };
    }
    let [a, b, c, d] = address;
    match select_backend::<V6>(sock, call, &address, a | b | c == 0 && d == 1_u32.to_be()) {
        Ok(Some((address, port))) => {
            V6::write(sock, &address);
            set!(sock, PORT, port);
            PROCEED
        }
        Ok(None) => PROCEED,
        Err(result) => result,
    }
}

/// Translates the peer address in `recvmsg` and `getpeername` of an IPv4 socket back to the frontend's.
#[inline(always)]
pub fn translate_source_v4(sock: Sock) -> i32 {
    let key = socket_key(sock, socket_cookie(sock), [get!(sock, IP4), 0, 0, 0], get!(sock, PORT), 4);
    // SAFETY: read at once; a value that is reused meanwhile is of another socket, which is a race of microseconds.
    if let Some(value) = unsafe { SOCKET_NAT.get(&key) } {
        let [address, ..] = value.address;
        set!(sock, IP4, address);
        set!(sock, PORT, value.port);
    }
    PROCEED
}

/// Translates the peer address of an IPv6 socket back to the frontend's.
#[inline(always)]
pub fn translate_source_v6(sock: Sock) -> i32 {
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
    PROCEED
}

/// Whether the port is a NodePort: a listener there would never get a connection.
#[inline(always)]
fn is_node_port<F: Family>(sock: Sock) -> bool
where
    Maps: Services<F>,
{
    service::find_nodeport::<F, _>(&Maps, get!(sock, PORT) << 16, get!(sock, PROTOCOL) as u8).is_some()
}

/// Rejects `bind` of a host's IPv4 socket to a NodePort.
#[inline(always)]
pub fn bind_v4(sock: Sock) -> i32 {
    if get!(sock, PORT) != 0 && is_host_netns(netns_cookie(sock)) && is_node_port::<V4>(sock) {
        reject_call(EADDRINUSE)
    } else {
        PROCEED
    }
}

/// Rejects `bind` of a host's IPv6 socket to a NodePort. A socket bound to the unspecified address receives IPv4 too; `IPV6_V6ONLY` is not
/// visible here.
#[inline(always)]
pub fn bind_v6(sock: Sock) -> i32 {
    if get!(sock, PORT) == 0 || !is_host_netns(netns_cookie(sock)) {
        return PROCEED;
    }
    let address = V6::read(sock);
    let [a, b, c, d] = address;
    let v4 = a | b | c | d == 0 || mapped(&address).is_some();
    if (v4 && is_node_port::<V4>(sock)) || is_node_port::<V6>(sock) { reject_call(EADDRINUSE) } else { PROCEED }
}
