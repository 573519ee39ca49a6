//! The catalogue of every error a user can see: a stable code, one sentence of cause, one of remedy.
//!
//! Codes never change meaning and are never reused. `docs/errors.md` is generated from [`ALL`] by `cargo xtask codegen`.

use std::fmt;

/// One kind of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Code {
    /// Stable identifier, `TW` and four digits.
    pub id: &'static str,
    /// A short name in kebab-case, used as a metric label.
    pub name: &'static str,
    /// What happened.
    pub cause: &'static str,
    /// What the reader can do.
    pub remedy: &'static str,
    /// The CNI error code it is reported under: spec codes below 100, plugin-specific from 100 on (CNI spec 1.1.0, "Error").
    pub cni: u32,
}

macro_rules! catalogue {
    ($($(#[$doc:meta])* $const:ident = $id:literal, $name:literal, $cni:literal, $cause:literal, $remedy:literal;)*) => {
        $(
            $(#[$doc])*
            pub const $const: Code = Code { id: $id, name: $name, cause: $cause, remedy: $remedy, cni: $cni };
        )*
        /// Every code, in the order of the table.
        pub const ALL: &[Code] = &[$($const),*];
    };
}

catalogue! {
    /// The runtime speaks a CNI version that this plugin does not.
    CNI_VERSION = "TW0001", "cni-version", 1,
        "The network configuration asks for a CNI version that this plugin does not speak, or for a verb that version does not have.",
        "Set cniVersion in the conflist to one of 0.3.0, 0.3.1, 0.4.0, 1.0.0 or 1.1.0.";
    /// A required environment variable is missing or malformed.
    CNI_ENV = "TW0002", "cni-environment", 4,
        "A CNI_ environment variable is missing or malformed.",
        "Check the container runtime's version; by hand, set the variables that the message names.";
    /// stdin is not JSON of the right shape.
    CNI_DECODE = "TW0003", "cni-decode", 6,
        "The network configuration on stdin cannot be decoded.",
        "Restart the terway daemon of this node: it writes the conflist anew.";
    /// The configuration decodes but makes no sense.
    CNI_CONFIG = "TW0004", "cni-config", 7,
        "The network configuration holds an invalid value.",
        "Correct the key that the message names in the conflist, or restart the terway daemon, which writes it anew.";
    /// The netns path does not exist or is no network namespace.
    CNI_NETNS = "TW0005", "cni-netns", 8,
        "CNI_NETNS does not name a network namespace of a pod.",
        "The pod's sandbox is gone; the runtime creates a new one. If this repeats, restart the container runtime.";
    /// The attachment that CHECK or DEL speaks of is unknown.
    UNKNOWN_ATTACHMENT = "TW0006", "unknown-attachment", 3,
        "The daemon knows no such attachment of this container.",
        "Delete the pod; its replacement gets a new attachment.";
    /// stdin cannot be read.
    CNI_IO = "TW0007", "cni-io", 5,
        "The network configuration cannot be read from stdin.",
        "Check the container runtime's log; the runtime tries again by itself.";
    /// The pod has an interface of the requested name that is not ours (CNI spec 1.1.0, "ADD": the plugin must refuse).
    IFNAME_TAKEN = "TW0008", "ifname-taken", 4,
        "The pod already has an interface of the name in CNI_IFNAME, and another plugin made it.",
        "Remove the other plugin from the conflist, or give one of the two another interface name.";
    /// The daemon's socket does not answer.
    DAEMON_UNREACHABLE = "TW0101", "daemon-unreachable", 11,
        "The terway daemon of this node does not answer on its socket.",
        "Look at the terway pod of this node: kubectl -n kube-system get pods -o wide, then its logs. The runtime tries again by itself.";
    /// The daemon answered too late.
    DEADLINE = "TW0102", "deadline", 11,
        "The operation did not finish within the runtime's time.",
        "The runtime tries again by itself; if it keeps happening, see the phase histograms of the daemon for the slow part.";
    /// The daemon is up but not ready to serve.
    NOT_READY = "TW0103", "not-ready", 50,
        "The terway daemon is starting, or its last attempt to read the node's interfaces failed.",
        "Wait; terway-cli status names what it waits for.";
    /// An error that should not happen.
    INTERNAL = "TW0104", "internal", 999,
        "The daemon met a condition that should be impossible.",
        "Report it with the daemon's log; the pod is retried by the runtime.";
    /// Another operation for the same attachment is under way.
    BUSY = "TW0105", "busy", 11,
        "Another operation for the same container and interface is under way.",
        "The runtime tries again by itself.";
    /// CHECK found something missing.
    CHECK_FAILED = "TW0106", "check-failed", 100,
        "The pod's network differs from what was set up.",
        "Delete the pod; its replacement gets a new network. The message names what differs.";
    /// GC without a list.
    GC_NO_LIST = "TW0107", "gc-no-list", 7,
        "GC was called without the list of valid attachments; taking that for an empty list would remove every pod's network.",
        "Call GC with cni.dev/valid-attachments in the configuration.";
    /// The node has no address left and cannot get more.
    NO_ADDRESS = "TW0201", "no-address", 11,
        "No address is idle on this node, and the node has reached its limit.",
        "Move pods to other nodes, use an instance type with more ENIs or addresses, or lower the node's max pods.";
    /// The vSwitch is exhausted.
    VSWITCH_EXHAUSTED = "TW0202", "vswitch-exhausted", 11,
        "A configured vSwitch has no address left (InvalidVSwitchId.IpNotEnough).",
        "Add a vSwitch with free addresses in the node's zone to vswitches in eni-config.";
    /// A quota is full.
    CLOUD_QUOTA = "TW0203", "cloud-quota", 11,
        "A quota of the ENI, the instance or the account is full.",
        "Raise the quota that the message names in the Alibaba Cloud quota centre, or move pods to other nodes.";
    /// Throttled by the cloud.
    CLOUD_THROTTLED = "TW0204", "cloud-throttled", 11,
        "The cloud API is throttling this account's calls.",
        "Nothing to do: the daemon slows down and tries again. If it lasts, ask for a higher API quota.";
    /// Not permitted by the cloud.
    CLOUD_FORBIDDEN = "TW0205", "cloud-forbidden", 11,
        "The node's credentials do not allow the cloud API call.",
        "Grant the RAM policy of docs/ram-policy.md to the node's RAM role or access key.";
    /// Any other failure of the cloud.
    CLOUD_FAILED = "TW0206", "cloud-failed", 11,
        "A cloud API call failed.",
        "The daemon tries again; the message holds the cloud's code and request id for its support.";
    /// The attached NIC does not show up.
    NIC_MISSING = "TW0207", "nic-missing", 11,
        "The cloud says that the ENI is attached, but no network interface with its MAC address has appeared in the node.",
        "Wait a minute; if it stays away, look in the kernel log for virtio or memory errors, and reboot the node.";
    /// An ENI that does not fit the configuration.
    ENI_MISMATCH = "TW0211", "eni-mismatch", 11,
        "An ENI does not fit the configuration, so it takes no new pods.",
        "Nothing to do: it is given back when its last pod is gone. If it is to stay in use, correct what the message names in eni-config.";
    /// The cloud took away the address of a running pod.
    ADDRESS_FENCED = "TW0212", "address-fenced", 11,
        "The cloud does not list the address of a running pod on its ENI any more, so the VPC drops the pod's packets.",
        "Delete the pod; its replacement gets another address. Find out who detached the ENI or unassigned the address: ActionTrail knows.";
    /// The operators asked for fewer cloud calls.
    DEGRADED = "TW0213", "degraded", 11,
        "The configuration forbids the daemon to call the cloud.",
        "Clear degradation in the configuration when the cloud can bear calls again.";
    /// Kernel refused a network operation.
    NET_FAILED = "TW0301", "net-failed", 11,
        "The kernel refused a step of the pod's network set-up.",
        "The message names the step and the kernel's error; the runtime tries again by itself.";
    /// Kernel refused a BPF operation.
    BPF_FAILED = "TW0302", "bpf-failed", 11,
        "The kernel refused a step of the eBPF datapath.",
        "The message names the step and the kernel's error; check that the kernel is 5.10 or newer and BPF is not disabled.";
    /// The state file failed.
    STORE_FAILED = "TW0303", "store-failed", 5,
        "The daemon cannot write its state file.",
        "Check free space and mount options of the state directory; the message names it.";
    /// A configuration value is invalid.
    CONFIG_INVALID = "TW0401", "config-invalid", 7,
        "The eni-config configuration holds an invalid value.",
        "Correct the key that the message names.";
}

/// An error on its way to a user: a code and the particulars.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind.
    pub code: Code,
    /// The particulars: names, addresses, the kernel's or cloud's words. No secret.
    pub detail: String,
}

impl Error {
    /// An error of kind `code` with its particulars.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.code.id, self.code.cause, self.detail)
    }
}

impl std::error::Error for Error {}

/// The code with this identifier.
#[must_use]
pub fn by_id(id: &str) -> Option<Code> {
    ALL.iter().copied().find(|code| code.id == id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_and_names_are_unique_and_sentences_end() {
        let ids: BTreeSet<_> = ALL.iter().map(|c| c.id).collect();
        let names: BTreeSet<_> = ALL.iter().map(|c| c.name).collect();
        assert_eq!((ids.len(), names.len()), (ALL.len(), ALL.len()));
        for code in ALL {
            assert!(code.id.len() == 6 && code.id.starts_with("TW"), "{}", code.id);
            assert!(code.cause.ends_with('.') && code.remedy.ends_with('.'), "{}", code.id);
            assert_eq!(by_id(code.id), Some(*code));
        }
    }
}
