//! Replies of the OpenAPI as they come over the wire, and what they mean.
//!
//! Fields: ECS 2014-05-26 and VPC 2016-04-28 API references, "Response parameters" of each action. Only what is used is read; what is
//! read must be there and well formed.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::Deserialize;
use terway_core::cidr;
use terway_core::cloud::{Eni, EniKind, EniStatus, InstanceLimits, VSwitch};
use terway_core::ident::{EniId, InstanceId, Mac, SecurityGroupId, VSwitchId};

/// The reply of an action of which only success matters.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Done {
    #[serde(rename = "RequestId")]
    _request_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DescribeInstanceTypes {
    pub(super) instance_types: InstanceTypes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InstanceTypes {
    pub(super) instance_type: Vec<InstanceType>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InstanceType {
    pub(super) instance_type_id: String,
    eni_quantity: u32,
    eni_private_ip_address_quantity: u32,
    #[serde(default)]
    eni_ipv6_address_quantity: u32,
}

impl InstanceType {
    pub(super) const fn limits(&self) -> InstanceLimits {
        InstanceLimits {
            adapters: self.eni_quantity,
            v4_per_adapter: self.eni_private_ip_address_quantity,
            v6_per_adapter: self.eni_ipv6_address_quantity,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DescribeVSwitches {
    pub(super) v_switches: VSwitches,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct VSwitches {
    pub(super) v_switch: Vec<WireVSwitch>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct WireVSwitch {
    v_switch_id: String,
    zone_id: String,
    #[serde(deserialize_with = "cidr::deserialize")]
    cidr_block: Ipv4Network,
    #[serde(default)]
    ipv6_cidr_block: String,
    available_ip_address_count: u32,
}

impl WireVSwitch {
    /// The error is what is wrong.
    pub(super) fn checked(self) -> Result<VSwitch, String> {
        let cidr_v6 = match self.ipv6_cidr_block.as_str() {
            "" => None,
            block => {
                Some(cidr::parse::<Ipv6Network>(block).map_err(|error| format!("Ipv6CidrBlock `{block}`: {error}"))?)
            }
        };
        Ok(VSwitch {
            id: VSwitchId::new(self.v_switch_id),
            zone: self.zone_id,
            available: self.available_ip_address_count,
            cidr_v4: self.cidr_block,
            cidr_v6,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DescribeNetworkInterfaces {
    pub(super) network_interface_sets: NetworkInterfaceSets,
    #[serde(default)]
    pub(super) next_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NetworkInterfaceSets {
    pub(super) network_interface_set: Vec<WireEni>,
}

/// An ENI, in the list of `DescribeNetworkInterfaces` and in the reply of `CreateNetworkInterface`, whose older form has the id only.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct WireEni {
    pub(super) network_interface_id: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    mac_address: String,
    #[serde(default)]
    v_switch_id: String,
    #[serde(default)]
    instance_id: String,
    #[serde(default)]
    private_ip_address: Option<Ipv4Addr>,
    #[serde(default)]
    private_ip_sets: PrivateIpSets,
    #[serde(default)]
    ipv6_sets: Ipv6Sets,
    #[serde(default)]
    ipv4_prefix_sets: Ipv4PrefixSets,
    #[serde(default)]
    ipv6_prefix_sets: Ipv6PrefixSets,
    #[serde(default)]
    security_group_ids: SecurityGroupIds,
    #[serde(default)]
    tags: Tags,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PrivateIpSets {
    #[serde(default)]
    private_ip_set: Vec<PrivateIp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PrivateIp {
    private_ip_address: Ipv4Addr,
    #[serde(default)]
    primary: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv6Sets {
    #[serde(default)]
    ipv6_set: Vec<Ipv6>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv6 {
    ipv6_address: Ipv6Addr,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv4PrefixSets {
    #[serde(default)]
    ipv4_prefix_set: Vec<Ipv4Prefix>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv4Prefix {
    #[serde(deserialize_with = "cidr::deserialize")]
    ipv4_prefix: Ipv4Network,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv6PrefixSets {
    #[serde(default)]
    ipv6_prefix_set: Vec<Ipv6Prefix>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ipv6Prefix {
    #[serde(deserialize_with = "cidr::deserialize")]
    ipv6_prefix: Ipv6Network,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SecurityGroupIds {
    #[serde(default)]
    security_group_id: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Tags {
    #[serde(default)]
    tag: Vec<Tag>,
}

#[derive(Deserialize)]
struct Tag {
    #[serde(rename = "TagKey", alias = "Key")]
    key: String,
    #[serde(rename = "TagValue", alias = "Value", default)]
    value: String,
}

/// Why a [`WireEni`] is no [`Eni`].
#[derive(Debug)]
pub(super) enum Unfit {
    /// A state or role that this daemon does not know: somebody else's ENI, or a newer cloud's.
    Unknown(String),
    /// A field is missing or malformed.
    Malformed(String),
}

impl WireEni {
    pub(super) fn checked(self) -> Result<Eni, Unfit> {
        let status = match self.status.as_str() {
            "Available" => EniStatus::Available,
            "Attaching" => EniStatus::Attaching,
            "InUse" => EniStatus::InUse,
            "Detaching" => EniStatus::Detaching,
            "Deleting" => EniStatus::Deleting,
            "" => return Err(Unfit::Malformed("Status is missing".to_owned())),
            other => return Err(Unfit::Unknown(format!("Status `{other}`"))),
        };
        let kind = match self.r#type.as_str() {
            "Primary" => EniKind::Primary,
            "Secondary" => EniKind::Secondary,
            "Trunk" => EniKind::Trunk,
            "Member" => EniKind::Member,
            "" => return Err(Unfit::Malformed("Type is missing".to_owned())),
            other => return Err(Unfit::Unknown(format!("Type `{other}`"))),
        };
        let mac: Mac = self.mac_address.parse().map_err(|error| Unfit::Malformed(format!("MacAddress: {error}")))?;
        if self.v_switch_id.is_empty() {
            return Err(Unfit::Malformed("VSwitchId is missing".to_owned()));
        }
        let (primary, others): (Vec<PrivateIp>, Vec<PrivateIp>) =
            self.private_ip_sets.private_ip_set.into_iter().partition(|ip| ip.primary);
        let primary_v4 = match primary.as_slice() {
            [one] => one.private_ip_address,
            [] => self.private_ip_address.ok_or_else(|| Unfit::Malformed("no primary private address".to_owned()))?,
            _ => return Err(Unfit::Malformed("several primary private addresses".to_owned())),
        };
        let others = others.into_iter().map(|ip| ip.private_ip_address).filter(|ip| *ip != primary_v4);
        Ok(Eni {
            id: EniId::new(self.network_interface_id),
            mac,
            vswitch: VSwitchId::new(self.v_switch_id),
            status,
            kind,
            instance: Some(self.instance_id).filter(|id| !id.is_empty()).map(InstanceId::new),
            primary_v4,
            v4: std::iter::once(primary_v4).chain(others).collect(),
            v6: self.ipv6_sets.ipv6_set.into_iter().map(|ip| ip.ipv6_address).collect(),
            v4_prefixes: self.ipv4_prefix_sets.ipv4_prefix_set.into_iter().map(|set| set.ipv4_prefix).collect(),
            v6_prefixes: self.ipv6_prefix_sets.ipv6_prefix_set.into_iter().map(|set| set.ipv6_prefix).collect(),
            security_groups: self.security_group_ids.security_group_id.into_iter().map(SecurityGroupId::new).collect(),
            tags: self.tags.tag.into_iter().map(|tag| (tag.key, tag.value)).collect::<BTreeMap<_, _>>(),
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignPrivateIpAddresses {
    pub(super) assigned_private_ip_addresses_set: AssignedSet,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignedSet {
    #[serde(default)]
    pub(super) private_ip_set: AssignedV4,
    #[serde(default)]
    pub(super) ipv4_prefix_set: AssignedV4Prefixes,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignedV4 {
    #[serde(default)]
    pub(super) private_ip_address: Vec<Ipv4Addr>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignedV4Prefixes {
    #[serde(default, deserialize_with = "cidr::deserialize_list")]
    pub(super) ipv4_prefixes: Vec<Ipv4Network>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignIpv6Addresses {
    #[serde(default)]
    pub(super) ipv6_sets: AssignedV6,
    #[serde(default)]
    pub(super) ipv6_prefix_sets: AssignedV6Prefixes,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignedV6 {
    #[serde(default)]
    pub(super) ipv6_address: Vec<Ipv6Addr>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct AssignedV6Prefixes {
    #[serde(default, deserialize_with = "cidr::deserialize_list")]
    pub(super) ipv6_prefix: Vec<Ipv6Network>,
}

/// Reads a reply as each action does; for fuzz targets.
#[cfg(feature = "test-api")]
pub(crate) fn fuzz_reply(body: &[u8]) {
    let _done = serde_json::from_slice::<Done>(body).is_ok();
    if let Ok(reply) = serde_json::from_slice::<DescribeInstanceTypes>(body) {
        let _limits: Vec<_> = reply.instance_types.instance_type.iter().map(InstanceType::limits).collect();
    }
    if let Ok(reply) = serde_json::from_slice::<DescribeVSwitches>(body) {
        let _checked: Vec<_> = reply.v_switches.v_switch.into_iter().map(WireVSwitch::checked).collect();
    }
    let listed = serde_json::from_slice::<DescribeNetworkInterfaces>(body).ok();
    let listed = listed.into_iter().flat_map(|reply| reply.network_interface_sets.network_interface_set);
    for eni in listed.chain(serde_json::from_slice::<WireEni>(body).ok()).filter_map(|eni| eni.checked().ok()) {
        assert_eq!(eni.v4.first(), Some(&eni.primary_v4), "the primary address comes first");
    }
    let _assigned = (
        serde_json::from_slice::<AssignPrivateIpAddresses>(body).is_ok(),
        serde_json::from_slice::<AssignIpv6Addresses>(body).is_ok(),
    );
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn eni() -> Value {
        json!({
            "NetworkInterfaceId": "eni-1", "Status": "InUse", "Type": "Secondary", "MacAddress": "00:16:3e:01:02:03",
            "VSwitchId": "vsw-1", "InstanceId": "i-1", "PrivateIpAddress": "10.0.0.5", "NewField": {"x": 1},
            "PrivateIpSets": {"PrivateIpSet": [
                {"PrivateIpAddress": "10.0.0.6", "Primary": false}, {"PrivateIpAddress": "10.0.0.5", "Primary": true}]},
            "Tags": {"Tag": [{"TagKey": "a", "TagValue": "b"}]}
        })
    }

    fn check(value: Value) -> Result<Eni, Unfit> {
        serde_json::from_value::<WireEni>(value).map_err(|e| Unfit::Malformed(e.to_string()))?.checked()
    }

    #[test]
    fn the_primary_address_comes_first() {
        let eni = check(eni()).unwrap();
        assert_eq!(eni.v4, [Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(10, 0, 0, 6)]);
        assert_eq!(eni.primary_v4, eni.v4[0]);
        assert_eq!(eni.tags["a"], "b");
        assert!(eni.v6.is_empty());
    }

    #[test]
    fn what_is_read_must_be_well_formed() {
        for (pointer, bad) in [
            ("/Status", json!("")),
            ("/Type", json!(7)),
            ("/MacAddress", json!("00:16")),
            ("/VSwitchId", json!("")),
            ("/PrivateIpSets/PrivateIpSet/0/PrivateIpAddress", json!("10.0.0")),
            ("/PrivateIpSets/PrivateIpSet/0/Primary", json!(true)),
        ] {
            let mut value = eni();
            *value.pointer_mut(pointer).unwrap() = bad;
            assert!(matches!(check(value), Err(Unfit::Malformed(_))), "{pointer}");
        }
        for pointer in ["/Status", "/Type"] {
            let mut value = eni();
            *value.pointer_mut(pointer).unwrap() = json!("Linked");
            assert!(matches!(check(value), Err(Unfit::Unknown(_))), "{pointer}");
        }
    }
}
