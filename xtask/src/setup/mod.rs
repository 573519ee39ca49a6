//! `cargo xtask setup`: everything that building and testing need on a Debian machine, and nothing else.
//!
//! Each part looks first for the programs that it needs and gets only what is missing, so a second run takes a fraction of a second and
//! no rights. What is for guests is unpacked into the cache and leaves the machine as it is; the rest is installed by apt.

mod apt;
mod ebpf;
mod kube;
mod manifests;
mod private_apt;
mod unpacked;

use std::time::Instant;

use anyhow::{Context, Result};

pub(crate) use self::ebpf::compiler as bpf_compiler;
pub(crate) use self::manifests::ManifestTools;
pub(crate) use self::private_apt::PrivateApt;
pub(crate) use self::unpacked::Unpacked;
use crate::workspace::{Workspace, which};

/// What a chore may need of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Part {
    /// The compiler and linker of the eBPF programs.
    Ebpf,
    /// Programs that the suites in network namespaces call.
    Net,
    /// containerd and what it runs.
    Cri,
    /// kube-apiserver, etcd and kubectl.
    Kube,
    /// kustomize, Helm and promtool.
    Manifests,
    /// QEMU and what a guest is made of.
    Vm,
}

impl Part {
    /// Every part, in the order of installation.
    pub(crate) const ALL: [Self; 6] = [Self::Ebpf, Self::Net, Self::Cri, Self::Kube, Self::Manifests, Self::Vm];

    fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Net => "net",
            Self::Cri => "cri",
            Self::Kube => "kube",
            Self::Manifests => "manifests",
            Self::Vm => "vm",
        }
    }

    /// Programs that are enough for this part, whatever they came from.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Ebpf | Self::Kube | Self::Manifests => &[],
            Self::Net => &["ip", "iptables", "nft", "ping", "tc", "tcpdump"],
            // The reference plugins ptp and host-local are what the benchmark compares with.
            Self::Cri => &[
                "/usr/lib/cni/host-local",
                "/usr/lib/cni/loopback",
                "/usr/lib/cni/ptp",
                "busybox",
                "containerd",
                "containerd-shim-runc-v2",
                "ctr",
                "runc",
            ],
            // zstd, lz4, xz: kernels and modules come compressed by any of them.
            Self::Vm => &["bpftool", "busybox", "ip", "lz4", "nft", "ping", "qemu-system-x86_64", "tc", "xz", "zstd"],
        }
    }

    /// Debian packages of this part. Those of `Ebpf`, `Kube` and `Manifests` are chosen there.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Ebpf | Self::Kube | Self::Manifests => &[],
            Self::Net => &["iproute2", "iptables", "iputils-ping", "nftables", "tcpdump"],
            // containernetworking-plugins: ptp and host-local, which the benchmark compares with; busybox: the pod's image.
            Self::Cri => &["busybox-static", "containerd", "containernetworking-plugins", "runc"],
            Self::Vm => &[
                "bpftool",
                "busybox-static",
                "iproute2",
                "iputils-ping",
                "lz4",
                "nftables",
                "qemu-system-x86",
                "xz-utils",
                "zstd",
            ],
        }
    }
}

/// Where the programs are that guests are made and run by.
pub(crate) fn vm_programs(workspace: &Workspace) -> Unpacked {
    Unpacked::open(workspace, Part::Vm.name())
}

/// The verb: makes sure of `parts`, printing one line for each.
///
/// # Errors
/// A right or a package is missing and cannot be had; the message is one sentence that says what to do.
pub(crate) fn run(workspace: &Workspace, parts: &[Part]) -> Result<()> {
    steps(workspace, parts, true)
}

/// For other verbs: as [`run`], but silent where nothing is to do, and never on stdout.
///
/// # Errors
/// As [`run`].
pub(crate) fn ensure(workspace: &Workspace, parts: &[Part]) -> Result<()> {
    steps(workspace, parts, false)
}

fn steps(workspace: &Workspace, parts: &[Part], all: bool) -> Result<()> {
    for &part in parts {
        let started = Instant::now();
        let done = match part {
            Part::Ebpf => ebpf::ensure(workspace),
            Part::Kube => kube::ensure(workspace),
            Part::Manifests => {
                ManifestTools::ensure(workspace).map(|(_, is_new)| ("kubectl promtool helm".to_owned(), is_new))
            }
            Part::Vm => unpacked::ensure(&vm_programs(workspace), part.programs(), part.packages())
                .map(|fetched| (part.programs().join(" "), fetched)),
            Part::Net | Part::Cri if part.programs().iter().all(|program| which(program).is_some()) => {
                Ok((part.programs().join(" "), false))
            }
            Part::Net | Part::Cri => {
                apt::ensure(part.packages()).map(|installed| (part.packages().join(" "), installed))
            }
        };
        let (what, installed) = done.with_context(|| format!("setup of `{}`", part.name()))?;
        if installed {
            eprintln!("setup {:<4} installed in {:.0} s: {what}", part.name(), started.elapsed().as_secs_f32());
        } else if all {
            println!("setup {:<4} ok: {what}", part.name());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_debian_names_and_listed_once_in_their_part() {
        for part in Part::ALL {
            let programs = part.programs();
            assert!(programs.is_sorted() && programs.windows(2).all(|w| w[0] != w[1]), "{part:?}");
            let packages = part.packages();
            assert!(packages.is_sorted() && packages.windows(2).all(|w| w[0] != w[1]), "{part:?}");
            for name in packages {
                assert!(
                    name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c)),
                    "{name}"
                );
            }
        }
    }
}
