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
    /// A task of the daemon panicked.
    PANIC = "TW0108", "panic", 999,
        "A task of the terway daemon panicked: a bug in the daemon.",
        "Report it with the daemon's log. The daemon, or the task alone, starts again by itself; running pods keep their network meanwhile.";
    /// The HTTP server of metrics and probes cannot listen.
    HTTP_FAILED = "TW0109", "http-failed", 999,
        "Metrics and health probes are not served: the address of --listen cannot be bound.",
        "Free the port that the message names, or give terwayd another one by --listen. The daemon tries again by itself; pods are not affected.";
    /// Another network configuration goes before terway's.
    CONFLIST_SHADOWED = "TW0110", "conflist-shadowed", 999,
        "The container runtime uses another plugin's network configuration: it takes the first file of the folder by name, and that is not terway's.",
        "Remove the files that the message names from the folder, or start terwayd with --cni-exclusive, which renames them. New pods get the other plugin's network until then.";
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
    /// Nothing can be made because the operator said so.
    DEGRADED = "TW0208", "degraded", 11,
        "The degradation switch of eni-config forbids the cloud API call.",
        "Remove degradation from eni-config when the incident is over: l1 stops what releases something, l0 every call to the cloud.";
    /// `EniPerInstanceLimitExceeded`.
    ENI_SLOTS_FULL = "TW0209", "eni-slots-full", 11,
        "The instance carries as many ENIs as its type allows.",
        "Detach ENIs that the node does not use (terway-cli eni list shows them with the reason), or use an instance type that carries more.";
    /// `QuotaExceeded.PrivateIpAddress`, `InvalidOperation.Ipv4CountExceeded`, `InvalidOperation.Ipv6CountExceeded`.
    ENI_ADDRESSES_FULL = "TW0210", "eni-addresses-full", 11,
        "The ENI carries as many addresses as the instance type allows.",
        "Nothing to do while the node can get another ENI; if it cannot, move pods to other nodes or use an instance type with more addresses per ENI.";
    /// The account's or region's quota of ENIs.
    ACCOUNT_ENI_QUOTA = "TW0211", "account-eni-quota", 11,
        "The account has as many ENIs in this region as its quota allows.",
        "Delete unused ENIs in the ECS console (Network & Security, ENIs, status Available), or ask for a higher quota of ENIs in the quota centre.";
    /// `SecurityGroupInstanceLimitExceed`.
    SECURITY_GROUP_FULL = "TW0212", "security-group-full", 11,
        "A configured security group holds as many ENIs and private addresses as it can.",
        "Set security_groups in eni-config to an advanced security group (65536 addresses), or to further groups; new ENIs use them at once.";
    /// `InvalidSecurityGroupId.NotFound` and others.
    SECURITY_GROUP_INVALID = "TW0213", "security-group-invalid", 11,
        "A configured security group does not exist, is in another VPC than the node, or cannot be combined with the others.",
        "Correct security_groups in eni-config: all must exist in the node's VPC and be of one type (basic or advanced).";
    /// `InvalidVSwitchId.NotFound`.
    VSWITCH_UNKNOWN = "TW0214", "vswitch-unknown", 11,
        "A configured vSwitch does not exist in the node's region.",
        "Correct the vswitches of the node's zone in eni-config.";
    /// A vSwitch of another zone or VPC.
    VSWITCH_ELSEWHERE = "TW0215", "vswitch-elsewhere", 11,
        "A configured vSwitch is in another zone or VPC than the node, so its ENIs cannot be attached.",
        "List the vSwitch under its own zone in vswitches of eni-config, and give the node's zone a vSwitch of its own.";
    /// A vSwitch without an IPv6 block while pods want IPv6.
    VSWITCH_NO_IPV6 = "TW0216", "vswitch-no-ipv6", 11,
        "Pods shall have IPv6 addresses, but the vSwitch or the instance type has no IPv6.",
        "Enable IPv6 for the VPC and the vSwitch and choose an instance type with IPv6, or set ip_stack to ipv4 in eni-config.";
    /// No vSwitch is configured for the node's zone.
    VSWITCH_NONE = "TW0217", "vswitch-none", 11,
        "No vSwitch is configured for the node's zone.",
        "Add the node's zone with at least one vSwitch to vswitches in eni-config; it takes effect without a restart.";
    /// No contiguous block of addresses is left.
    PREFIX_FRAGMENTED = "TW0218", "prefix-fragmented", 11,
        "The vSwitch has addresses left, but no free block of sixteen for a prefix.",
        "Nothing to do: single addresses are used instead. To get prefixes, reserve a CIDR block in the vSwitch, or add an empty vSwitch to eni-config.";
    /// `InvalidAccessKeyId.*`, `SignatureDoesNotMatch`.
    CREDENTIALS_INVALID = "TW0219", "credentials-invalid", 11,
        "The cloud does not accept the access key: it is unknown or disabled, or its secret is wrong.",
        "Correct access_key and access_secret in eni-config, or remove both so that the node's RAM role is used.";
    /// `InvalidSecurityToken.*`.
    CREDENTIALS_EXPIRED = "TW0220", "credentials-expired", 11,
        "The temporary credentials (STS token) have expired and could not be renewed.",
        "Check that the RAM role is still attached to the instance and that the metadata service answers (terway-cli metadata), or renew the file of credential_path.";
    /// No source has credentials.
    CREDENTIALS_MISSING = "TW0221", "credentials-missing", 11,
        "No credentials for the cloud API: no access key is configured, and the instance has no RAM role.",
        "Attach a RAM role with the policy of docs/ram-policy.md to the instance, or set access_key and access_secret in eni-config.";
    /// `InvalidTimeStamp.*`.
    CLOCK_SKEW = "TW0222", "clock-skew", 11,
        "The cloud refuses the node's requests because the node's clock is wrong.",
        "Synchronise the clock: check chrony or ntpd on the node (timedatectl).";
    /// No answer of the metadata service.
    METADATA_UNREACHABLE = "TW0223", "metadata-unreachable", 11,
        "The metadata service (100.100.100.200) does not answer, or not sensibly.",
        "Check on the node: curl http://100.100.100.200/latest/meta-data/; no route, firewall rule or proxy may take this address. Running pods are not concerned.";
    /// No answer of the API.
    CLOUD_UNREACHABLE = "TW0224", "cloud-unreachable", 11,
        "The cloud API did not answer.",
        "Check the node's way to the endpoint that the message names: DNS, routes, security group, proxy; inside a VPC use the vpc endpoint. The daemon tries again.";
    /// `InternalError`, `ServiceUnavailable`.
    CLOUD_INTERNAL = "TW0225", "cloud-internal", 11,
        "The cloud API failed on its own side.",
        "Nothing to do: the daemon tries again. If it lasts, give the request id of the message to the cloud's support.";
    /// A request that the cloud refuses for a reason not in this table.
    CLOUD_REFUSED = "TW0226", "cloud-refused", 11,
        "The cloud refuses a request as wrong; repeating it does not help.",
        "The message holds the cloud's code, words and request id; look up the code in the API reference of the action, and report it if eni-config is right.";
    /// `IdempotentFailed` and its like.
    CLOUD_TOKEN_REFUSED = "TW0227", "cloud-token-refused", 11,
        "The cloud does not accept the repetition of a request under its ClientToken.",
        "Nothing to do: the daemon looks at what the first request did and asks again with a new token.";
    /// `InvalidOperation.InvalidEcsState`, `IncorrectInstanceStatus`.
    INSTANCE_STATE = "TW0228", "instance-state", 11,
        "The instance is in a state in which no ENI can be attached or detached (starting, stopping, locked).",
        "Wait until the instance is Running; if it is locked (financial or security reasons), unlock it in the ECS console.";
    /// `InvalidEcsId.NotFound`, `InvalidInstanceId.NotFound`.
    INSTANCE_UNKNOWN = "TW0229", "instance-unknown", 11,
        "The cloud does not know this instance.",
        "Check region and endpoint; if the node's disk was cloned from another instance, delete node.json in the state directory and restart the daemon.";
    /// The type carries no ENI, or the action is not for it.
    INSTANCE_TYPE = "TW0230", "instance-type", 11,
        "The instance type does not support what is asked: further ENIs, IPv6 or prefixes.",
        "Use an instance type that the ECS documentation lists with more than one ENI, or switch off the feature that the message names.";
    /// `InvalidOperation.InvalidEniState`, `Operation.Conflict`.
    ENI_STATE = "TW0231", "eni-state", 11,
        "The ENI is in a state that does not allow the operation now, or another operation on it is under way.",
        "Nothing to do: the daemon tries again. If it lasts, look at the ENI's status in the ECS console; an ENI stuck in Attaching or Detaching is for the cloud's support.";
    /// `InvalidEniId.NotFound`, outside of releases.
    ENI_UNKNOWN = "TW0232", "eni-unknown", 11,
        "The cloud does not know the ENI any more.",
        "Nothing to do: the daemon takes it off its books and gets another. Ask who deletes ENIs of nodes in use (console, scripts, another cluster).";
    /// An ENI with pods is gone.
    ENI_VANISHED = "TW0233", "eni-vanished", 11,
        "An ENI that carries pods was detached or deleted by somebody else; these pods have no network.",
        "Delete the pods that the message names, so that they get new addresses; find out in ActionTrail who removed the ENI.";
    /// An address of a pod is gone.
    ADDRESS_VANISHED = "TW0234", "address-vanished", 11,
        "An address of a running pod was taken off its ENI by somebody else; the pod has no network.",
        "Delete the pod that the message names, so that it gets a new address; find out in ActionTrail who unassigned it.";
    /// `InvalidIp.IpUnassigned`.
    ADDRESS_UNKNOWN = "TW0235", "address-unknown", 11,
        "The cloud does not know the address on this ENI.",
        "Nothing to do: the daemon takes it off its books.";
    /// An ENI that does not fit the configuration.
    ENI_MISMATCH = "TW0236", "eni-mismatch", 11,
        "ENIs of the instance do not match eni-config (vSwitch, security groups or tags), take no new pods, and are released once empty.",
        "Nothing to do if eni-config is as meant; pods on these ENIs keep their network until they end. terway-cli eni list shows the reason of each.";
    /// `ORDER.ARREARAGE`, `PAY.INSUFFICIENT_BALANCE`, `InvalidAccountStatus.NotEnoughBalance`.
    ACCOUNT_ARREARS = "TW0237", "account-arrears", 11,
        "The account has overdue payments or not enough balance for the operation.",
        "Pay or top up the account in the billing console; the daemon tries again by itself.";
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
    /// Changes of the kernel's state that nobody but the daemon should make.
    NET_DRIFT = "TW0304", "net-drift", 100,
        "Links, routes, rules or datapath entries of a running pod were changed or removed by something else on the node.",
        "The daemon repairs them every minute; find what else changes the node's network (NetworkManager, systemd-networkd, scripts) and exempt interfaces named cali*.";
    /// The BPF file system is the container's own.
    BPFFS_PRIVATE = "TW0305", "bpffs-private", 999,
        "The folder of --bpffs is not on the node's BPF file system, so programs and maps would end with the daemon's container.",
        "Mount the node's /sys/fs/bpf into the container by hostPath with mountPropagation HostToContainer, as manifests/base/daemonset.yaml does; on a node that has none there, mount -t bpf bpf /sys/fs/bpf.";
    /// Namespaces that the runtime makes later do not appear in the container.
    NETNS_UNPROPAGATED = "TW0306", "netns-unpropagated", 999,
        "Network namespaces of pods that start from now on cannot be seen in the daemon's container.",
        "Mount the node's /run/netns into the container by hostPath with mountPropagation HostToContainer, as manifests/base/daemonset.yaml does.";
    /// A configuration value is invalid.
    CONFIG_INVALID = "TW0401", "config-invalid", 7,
        "The eni-config configuration holds an invalid value.",
        "Correct the key that the message names.";
    /// An edit of the configuration that cannot be taken over.
    CONFIG_REFUSED = "TW0402", "config-refused", 7,
        "An edit of eni-config was refused; the daemon goes on with the last good configuration.",
        "Correct the keys that the message names; terway-cli config check FILE tells beforehand whether an edit will be taken.";
    /// The configuration file is missing or is no JSON.
    CONFIG_UNREADABLE = "TW0403", "config-unreadable", 7,
        "The files of the eni-config configuration cannot be read.",
        "Check that the ConfigMap eni-config is mounted where terwayd looks for it (--config); the message names the place.";
    /// A manifest that cannot be used.
    OBJECT_INVALID = "TW0501", "object-invalid", 100,
        "An object of the folder that --objects names cannot be used and is skipped; what it said before stays in force.",
        "Correct the document at the file and line that the message names.";
    /// A Service that is served otherwise than its author meant.
    SERVICE_PROBLEM = "TW0502", "service-problem", 100,
        "A Service, or a pod with host ports, asks for something that cannot be had as it stands.",
        "Correct the object that the message names: an annotation's value, or an address and port that two objects claim.";
    /// Services cannot be written into the kernel.
    SERVICES_FAILED = "TW0503", "services-failed", 100,
        "The kernel refuses to write a part of a Service: it keeps its previous state, everything else is programmed, and the daemon retries.",
        "The message names the map and the kernel's error; if a map is full, there are more Services or endpoints than it has room for.";
    /// The source of objects does not answer.
    OBJECTS_UNREADABLE = "TW0504", "objects-unreadable", 100,
        "The source of Kubernetes objects (--objects), or one kind of them, cannot be read; what was read before stays in force.",
        "A folder: create it, or correct the option. The API server: the message says whether its address, the credentials or a rule of the role is missing (docs/kubernetes.md). The daemon tries again by itself.";
    /// A pod was to start before the node's Services were known.
    SERVICES_UNSYNCED = "TW0505", "services-unsynced", 11,
        "The node does not know its Services yet, so a pod that started now could not reach them.",
        "Nothing to do if the daemon has just started: the runtime tries again by itself. Otherwise the message says what is in the way.";
    /// A health-check port that cannot be opened.
    HEALTH_PORT = "TW0506", "health-port", 100,
        "The health-check port of a Service with externalTrafficPolicy Local cannot be opened on this node, so load balancers take the node for unfit.",
        "Find who uses the port (ss -ltnp) and end it, or give the Service another healthCheckNodePort; the daemon tries again every ten seconds.";
    /// Network policies cannot be written into the kernel.
    POLICY_FAILED = "TW0507", "policy-failed", 11,
        "The kernel refuses to write a part of the network policies: pods whose policies are incomplete are denied, everything else is in force, and the daemon retries.",
        "The message names the map and the kernel's error; if a map is full, there are more policies or pods than it has room for.";
    /// Pods whose policies are not known.
    POLICY_INCOMPLETE = "TW0508", "policy-incomplete", 100,
        "Pods of this node are held back, because their labels are not known yet and a policy may restrict them.",
        "See that the source of objects (--objects) tells of the pods that the message names; they are let go as soon as it does.";
    /// A write to the API server that fails.
    KUBE_WRITE_FAILED = "TW0601", "kube-write-failed", 100,
        "The API server does not take what the daemon writes: events, conditions, annotations or taints.",
        "If it is forbidden, apply the role of manifests/base/rbac.yaml. The daemon tries again by itself; pods are not affected.";
    /// The node's own condition `NetworkUnavailable` is True.
    NETWORK_UNAVAILABLE = "TW0602", "network-unavailable", 100,
        "The Node has the condition NetworkUnavailable=True, so that no pods are scheduled to it: a cloud controller waits for a route that this network does not need.",
        "Run the cloud controller manager with --configure-cloud-routes=false, or terwayd with --clear-network-unavailable.";
    /// kubelet's limit of pods is above the number of addresses.
    MAX_PODS = "TW0603", "max-pods", 100,
        "The kubelet of this node takes more pods than the instance can have addresses for: the last ones would wait in ContainerCreating.",
        "Set maxPods of the kubelet to the number of addresses plus the number of pods in the host network, or use an instance type with more ENIs or addresses.";
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
        assert!(ALL.is_sorted_by_key(|code| code.id), "the table is read in order");
        for code in ALL {
            assert!(code.id.len() == 6 && code.id.starts_with("TW"), "{}", code.id);
            assert!(code.cause.ends_with('.') && code.remedy.ends_with('.'), "{}", code.id);
            assert_eq!(by_id(code.id), Some(*code));
        }
    }
}
