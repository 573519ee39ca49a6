//! The eBPF programs, in one object file: thin entry points of `terway_ebpf`. Each computes a verdict and ends in [`finish`].
//!
//! Each is inlined into the function that the macro makes of it: kernels before 6.7 count 32 bytes of the 512-byte stack for every frame
//! of a call chain (`check_max_stack_depth`, kernel/bpf/verifier.c).

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {
    // On the host there is nothing to run; `terway-ebpf/compile.rs` builds the programs.
}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier};
    use aya_ebpf::programs::{SockAddrContext, TcContext};
    use terway_abi::{Drop, MARK_CHECKED, PathCounter, Program};
    use terway_ebpf::family::{V4, V6};
    use terway_ebpf::frame::Frame as _;
    use terway_ebpf::kernel::exit::finish;
    use terway_ebpf::kernel::fast_path::{process, process_to_vpc};
    use terway_ebpf::kernel::hook::{FROM_POD, FROM_VPC, TO_POD};
    use terway_ebpf::kernel::neighbour::non_ip_from_pod;
    use terway_ebpf::kernel::skb::Skb;
    use terway_ebpf::kernel::socket::{
        Call, Sock, bind_v4, bind_v6, translate_destination_v4, translate_destination_v6, translate_source_v4,
        translate_source_v6,
    };
    use terway_ebpf::kernel::verdict::Verdict;
    use terway_ebpf::parse::ethertype;

    /// The licence that the kernel reads (`license_is_gpl_compatible`, include/linux/license.h): helpers that are for GPL-compatible programs
    /// only are used. These crates may be taken under GPL-2.0-only as well as under Apache-2.0 (LICENSE.md).
    #[unsafe(no_mangle)]
    #[unsafe(link_section = "license")]
    static LICENSE: [u8; 4] = *b"GPL\0";

    /// Ingress of the host end of a pod's veth: what the pod sends.
    #[classifier]
    #[inline(always)]
    pub(crate) fn from_pod(ctx: TcContext) -> i32 {
        let skb = Skb(ctx.skb.skb);
        let window = skb.window();
        let verdict = match window.ethertype() {
            _ if skb.has_vlan() => Verdict::drop(Drop::VlanTagged),
            Some(ethertype::IPV4) => process::<V4, FROM_POD>(skb, window),
            Some(ethertype::IPV6) => process::<V6, FROM_POD>(skb, window),
            _ => non_ip_from_pod(skb.0),
        };
        finish(skb, Program::FromPod, verdict)
    }

    /// Egress of the host end of a pod's veth: what the host stack sends to the pod.
    #[classifier]
    #[inline(always)]
    pub(crate) fn to_pod(ctx: TcContext) -> i32 {
        let skb = Skb(ctx.skb.skb);
        let window = skb.window();
        let verdict = match window.ethertype() {
            Some(ethertype::IPV4) => process::<V4, TO_POD>(skb, window),
            Some(ethertype::IPV6) => process::<V6, TO_POD>(skb, window),
            _ => Verdict::pass(PathCounter::Neighbour),
        };
        finish(skb, Program::ToPod, verdict)
    }

    /// Ingress of an ENI.
    #[classifier]
    #[inline(always)]
    pub(crate) fn from_vpc(ctx: TcContext) -> i32 {
        let skb = Skb(ctx.skb.skb);
        let window = skb.window();
        let verdict = match window.ethertype() {
            // Frames to another host (the NIC accepts them during a capture) and tagged frames are for no pod.
            _ if !skb.is_to_us() || skb.has_vlan() => Verdict::pass(PathCounter::VpcToHost),
            Some(ethertype::IPV4) => process::<V4, FROM_VPC>(skb, window),
            Some(ethertype::IPV6) => process::<V6, FROM_VPC>(skb, window),
            _ => Verdict::pass(PathCounter::VpcToHost),
        };
        finish(skb, Program::FromVpc, verdict)
    }

    /// Egress of an ENI.
    #[classifier]
    #[inline(always)]
    pub(crate) fn to_vpc(ctx: TcContext) -> i32 {
        let skb = Skb(ctx.skb.skb);
        if skb.mark() == MARK_CHECKED {
            // Checked and counted by `from_pod`. The mark is cleared before others read marks.
            skb.set_mark(0);
            return aya_ebpf::bindings::TC_ACT_UNSPEC;
        }
        let verdict = match skb.window().ethertype() {
            Some(ethertype::IPV4) => process_to_vpc::<V4>(skb),
            Some(ethertype::IPV6) => process_to_vpc::<V6>(skb),
            _ => Verdict::pass(PathCounter::HostToVpc),
        };
        finish(skb, Program::ToVpc, verdict)
    }

    macro_rules! socket_programs {
        ($($(#[$doc:meta])* $name:ident = $run:ident($($call:ident)?);)*) => { $(
            $(#[$doc])*
            #[cgroup_sock_addr($name)]
            pub(crate) fn $name(ctx: SockAddrContext) -> i32 {
                $run(Sock(ctx.sock_addr) $(, Call::$call)?)
            }
        )* };
    }

    socket_programs! {
        /// `connect` to an IPv4 address.
        connect4 = translate_destination_v4(Connect);
        /// `connect` to an IPv6 address.
        connect6 = translate_destination_v6(Connect);
        /// `sendto` and `sendmsg` with an IPv4 address.
        sendmsg4 = translate_destination_v4(Send);
        /// `sendto` and `sendmsg` with an IPv6 address.
        sendmsg6 = translate_destination_v6(Send);
        /// `recvfrom` and `recvmsg` of IPv4.
        recvmsg4 = translate_source_v4();
        /// `recvfrom` and `recvmsg` of IPv6.
        recvmsg6 = translate_source_v6();
        /// `getpeername` of IPv4.
        getpeername4 = translate_source_v4();
        /// `getpeername` of IPv6.
        getpeername6 = translate_source_v6();
        /// `bind` to an IPv4 address.
        bind4 = bind_v4();
        /// `bind` to an IPv6 address.
        bind6 = bind_v6();
    }
}
