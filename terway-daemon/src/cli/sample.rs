//! A fixed node for the tests of what is printed: one pod well, one not, an ENI of each role, a cloud that answers by half.

use terway_proto::v1;

use super::Output;
use super::table::Style;

/// All forms of one answer.
pub(super) fn all(render: impl Fn(Style) -> String) -> String {
    [("table", Output::Table), ("wide", Output::Wide), ("json", Output::Json)]
        .map(|(name, output)| format!("-o {name}\n{}", render(Style { output, headers: true })))
        .join("\n")
}

fn error(code: terway_core::errors::Code, particulars: &str) -> v1::ErrorDetail {
    crate::grpc::error_detail(&terway_core::errors::Error::new(code, particulars))
}

fn pod(name: &str) -> v1::Pod {
    v1::Pod { namespace: "default".into(), name: name.into(), uid: format!("uid-{name}") }
}

fn key(container: &str) -> v1::Attachment {
    v1::Attachment { network: "terway".into(), container_id: container.into(), ifname: "eth0".into() }
}

const NUMBERS: v1::Pool = v1::Pool { capacity: 20, idle: 1, bound: 2, cooling: 0, pending: 3 };

pub(super) fn status() -> v1::StatusResponse {
    v1::StatusResponse {
        ready: false,
        problems: vec![error(terway_core::errors::VSWITCH_EXHAUSTED, "vsw-2 in cn-test-1a.")],
        version: "0.1.0".into(),
        node: "n1".into(),
        pool: Some(NUMBERS),
        enis: vec![v1::EniState {
            id: "eni-b".into(),
            mac: "00:16:3e:00:00:02".into(),
            vswitch: "vsw-2".into(),
            state: "in-use".into(),
            ifname: "eth1".into(),
            addresses: 3,
            bound: 2,
        }],
        configuration: Some(v1::Configuration {
            generation: 3,
            applied_at: 1_767_225_600,
            failure: None,
            warnings: vec!["max_pool_sizes: is unknown; did you mean max_pool_size?".into()],
            pending_restart: vec![v1::ConfigChange {
                key: "ip_stack".into(),
                old: "ipv4".into(),
                new: "dual".into(),
                effect: "restart".into(),
            }],
            last_edit: Vec::new(),
        }),
        socket_path: Some(v1::SocketPath {
            cgroup: "/sys/fs/cgroup/unified".into(),
            programs: 10,
            reason: String::new(),
            ended: 3,
        }),
        datapath: Some(v1::Datapath {
            pod_hook: "clsact".into(),
            eni_hook: "tcx".into(),
            abi_version: 1,
            endpoints: 2,
            drops: [("policy".to_owned(), 0), ("spoofed_source".to_owned(), 7)].into(),
        }),
        policy: Some(v1::PolicyStatus {
            enforced: true,
            complete: true,
            policies: 4,
            pods: 9,
            endpoints: 2,
            identities: 12,
            held: vec!["default/web-1".into()],
        }),
    }
}

pub(super) fn pods() -> Vec<v1::PodState> {
    vec![
        v1::PodState {
            attachment: Some(key("c0")),
            pod: Some(pod("web-0")),
            phase: "ready".into(),
            addresses: vec!["10.0.2.10".into(), "fd00:2::10".into()],
            eni: "eni-b".into(),
            host_ifname: "cali0123456789a".into(),
        },
        v1::PodState {
            attachment: Some(key("by-hand")),
            pod: None,
            phase: "setting-up".into(),
            addresses: vec!["10.0.2.11".into()],
            eni: "eni-b".into(),
            host_ifname: "caliabcdef01234".into(),
        },
    ]
}

fn address(address: &str, state: &str, owner: Option<&str>) -> v1::EniAddress {
    v1::EniAddress { address: address.into(), state: state.into(), pod: owner.map(pod) }
}

pub(super) fn pool() -> v1::GetPoolResponse {
    let eni = |id: &str, role: &str, vswitch: &str| v1::Eni {
        id: id.into(),
        mac: "00:16:3e:00:00:01".into(),
        vswitch: vswitch.into(),
        role: role.into(),
        status: "InUse".into(),
        security_groups: vec!["sg-1".into()],
        ..Default::default()
    };
    v1::GetPoolResponse {
        pool: Some(NUMBERS),
        enis: vec![
            v1::Eni {
                ifname: "eth0".into(),
                addresses: vec![address("10.0.1.5", "other", None)],
                reason: "the instance's own".into(),
                ..eni("eni-a", "primary", "vsw-1")
            },
            v1::Eni {
                state: "in-use".into(),
                ifname: "eth1".into(),
                addresses: vec![
                    address("10.0.2.10", "bound", Some("web-0")),
                    address("10.0.2.11", "bound", Some("web-1")),
                    address("10.0.2.12", "idle", None),
                ],
                tags: [("creator".to_owned(), "terway".to_owned())].into(),
                error: Some(error(terway_core::errors::VSWITCH_EXHAUSTED, "vsw-2.")),
                ..eni("eni-b", "pods", "vsw-2")
            },
            v1::Eni {
                reason: "vsw-9 is not in vswitches of eni-config for this zone".into(),
                ..eni("eni-c", "foreign", "vsw-9")
            },
        ],
        vswitches: vec![
            v1::VSwitch { id: "vsw-1".into(), enis: 1, addresses: 1, ..Default::default() },
            v1::VSwitch {
                id: "vsw-2".into(),
                zone: "cn-test-1a".into(),
                cidr: "10.0.2.0/24".into(),
                available: Some(0),
                enis: 1,
                addresses: 3,
                bound: 2,
                blocked: Some(error(terway_core::errors::VSWITCH_EXHAUSTED, "vsw-2.")),
                configured: true,
                backoff_seconds: 540,
                fragmented: false,
            },
        ],
        problems: status().problems,
        cloud_error: None,
    }
}

pub(super) fn mapping() -> v1::GetMappingResponse {
    let row = |container: &str, name: &str, rule: &str, datapath: &str| v1::MappingRow {
        attachment: Some(key(container)),
        pod: Some(pod(name)),
        phase: "ready".into(),
        addresses: vec!["10.0.2.10".into()],
        eni: "eni-b".into(),
        eni_ifname: "eth1".into(),
        host_ifname: "cali0123456789a".into(),
        link: "ok".into(),
        route: "ok".into(),
        rule: rule.into(),
        datapath: datapath.into(),
        cloud: "unknown".into(),
    };
    v1::GetMappingResponse {
        pods: vec![row("c0", "web-0", "ok", "ok"), row("c1", "web-1", "wrong", "wrong")],
        findings: vec![
            v1::Finding {
                kind: "rule-missing".into(),
                attachment: Some(key("c1")),
                pod: Some(pod("web-1")),
                subject: "cali0123456789a".into(),
                evidence: "on the node, the rule 2048: from 10.0.2.11/32 lookup 1003 is missing".into(),
                action: "repair".into(),
                mismatch: true,
            },
            v1::Finding {
                kind: "address-unknown".into(),
                subject: "10.0.2.99".into(),
                evidence: "the cloud lists it on eni-b, and the pool does not know it yet".into(),
                action: "none".into(),
                ..Default::default()
            },
        ],
        sources: vec![
            v1::Source { name: "kernel".into(), error: None },
            v1::Source { name: "cloud".into(), error: Some(error(terway_core::errors::CLOUD_FAILED, "no answer.")) },
        ],
    }
}

pub(super) fn metadata() -> v1::GetMetadataResponse {
    v1::GetMetadataResponse {
        instance: "i-1".into(),
        instance_type: "ecs.g7.large".into(),
        region: "cn-test".into(),
        zone: "cn-test-1a".into(),
        primary_mac: "00:16:3e:00:00:01".into(),
        nics: vec![v1::MetadataNic {
            mac: "00:16:3e:00:00:01".into(),
            eni: "eni-a".into(),
            vswitch: "vsw-1".into(),
            primary_address: "10.0.1.5".into(),
            addresses: vec!["10.0.1.5".into(), "fd00:1::5".into()],
            cidr_v4: "10.0.1.0/24".into(),
            gateway_v4: "10.0.1.253".into(),
            cidr_v6: String::new(),
            gateway_v6: String::new(),
        }],
        errors: vec![error(terway_core::errors::METADATA_UNREACHABLE, "ipv6-gateway: 503.")],
    }
}

/// A policy that decided something, together with another one, and a cluster's that decided nothing here.
pub(super) fn policies() -> v1::ListPoliciesResponse {
    let count = |reason: &str, allowed, packets, bytes| v1::PolicyCount {
        direction: "ingress".into(),
        reason: reason.into(),
        allowed,
        packets,
        bytes,
    };
    let guard = v1::Policy { kind: "ClusterNetworkPolicy".into(), name: "guard".into(), ..Default::default() };
    let web = v1::Policy {
        kind: "NetworkPolicy".into(),
        namespace: "default".into(),
        name: "web".into(),
        pods: vec![pod("web-1"), pod("web-2")],
        allowed: 1200,
        denied: 7,
        denied_bytes: 518,
        problems: vec!["entry of set 7 for identity 0x40000003: POLICY_PEERS: no space left on device".into()],
        counts: vec![
            count("NetworkPolicy default/web, ingress rule 0: Accept", true, 1200, 88_800),
            count("isolated in ingress by NetworkPolicy default/web, none of whose rules allows it", false, 7, 518),
        ],
    };
    v1::ListPoliciesResponse { policies: vec![guard, web], complete: true, enforced: true }
}
