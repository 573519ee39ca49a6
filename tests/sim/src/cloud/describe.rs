//! The actions that only read.

use std::collections::BTreeSet;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::reply::{Parameters, Refusal};
use super::vpc::{EniRecord, Vpc};

pub(super) fn instance_types(vpc: &Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let wanted = parameters.list("InstanceTypes");
    let types: Vec<Value> = vpc
        .config
        .instance_types
        .iter()
        .filter(|t| wanted.is_empty() || wanted.contains(&t.id.as_str()))
        .map(|t| {
            json!({
                "InstanceTypeId": t.id,
                "EniQuantity": t.adapters,
                "EniTotalQuantity": t.adapters,
                "EniPrivateIpAddressQuantity": t.v4_per_adapter,
                "EniIpv6AddressQuantity": t.v6_per_adapter,
                "EniTrunkSupported": false,
                "CpuCoreCount": 4,
                "MemorySize": 16.0,
            })
        })
        .collect();
    Ok(json!({"InstanceTypes": {"InstanceType": types}, "NextToken": ""}))
}

pub(super) fn vswitches(vpc: &Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let size = parameters.number("PageSize")?.unwrap_or(10);
    let number = parameters.number("PageNumber")?.unwrap_or(1);
    if !(1..=50).contains(&size) || number == 0 {
        return Err(Refusal::invalid("PageSize", "1 to 50"));
    }
    let is = |name: &str, value: &str| parameters.get(name).is_none_or(|wanted| wanted == value);
    let all: Vec<Value> = vpc
        .config
        .vswitches
        .iter()
        .filter(|vswitch| is("VSwitchId", &vswitch.id) && is("ZoneId", &vswitch.zone) && is("VpcId", &vpc.config.vpc))
        .map(|vswitch| {
            json!({
                "VSwitchId": vswitch.id,
                "VSwitchName": vswitch.id,
                "VpcId": vpc.config.vpc,
                "ZoneId": vswitch.zone,
                "Status": "Available",
                "CidrBlock": vswitch.cidr_v4,
                "Ipv6CidrBlock": vswitch.cidr_v6.map(|block| block.to_string()).unwrap_or_default(),
                "AvailableIpAddressCount": vpc.addresses.available(vswitch),
                "IsDefault": false,
            })
        })
        .collect();
    let page: Vec<&Value> = all.iter().skip((number - 1) as usize * size as usize).take(size as usize).collect();
    Ok(json!({"PageNumber": number, "PageSize": size, "TotalCount": all.len(), "VSwitches": {"VSwitch": page}}))
}

pub(super) fn network_interfaces(vpc: &Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let size = match parameters.number("MaxResults")? {
        None => 10,
        Some(size) if (10..=500).contains(&size) => size as usize,
        Some(_) => return Err(Refusal::invalid("MaxResults", "10 to 500")),
    };
    let ids: BTreeSet<&str> = parameters.list("NetworkInterfaceId").into_iter().collect();
    if ids.len() > 100 {
        return Err(Refusal::invalid("NetworkInterfaceId", "at most 100 ids"));
    }
    let tags = parameters.tags();
    let is = |name: &str, value: &str| parameters.get(name).is_none_or(|wanted| wanted == value);
    let after = parameters.get("NextToken");
    let seen = vpc.seen(vpc.config.describe_lag_ms);
    let mut matching = seen
        .values()
        .filter(|eni| ids.is_empty() || ids.contains(eni.id.as_str()))
        .filter(|eni| is("InstanceId", eni.instance.as_deref().unwrap_or_default()))
        .filter(|eni| is("Status", &format!("{:?}", eni.status)) && is("Type", &format!("{:?}", eni.kind)))
        .filter(|eni| is("VSwitchId", &eni.vswitch) && is("VpcId", &vpc.config.vpc))
        .filter(|eni| tags.iter().all(|(key, value)| eni.tags.get(key) == Some(value)))
        .filter(|eni| after.is_none_or(|after| eni.id.as_str() > after))
        .peekable();
    let page: Vec<&EniRecord> = matching.by_ref().take(size.min(vpc.config.page_limit)).collect();
    let next = match (matching.peek(), page.last()) {
        (Some(_), Some(last)) => last.id.as_str(),
        _ => "",
    };
    let page: Vec<Value> = page.into_iter().map(|found| eni(vpc, found)).collect();
    Ok(json!({"NextToken": next, "NetworkInterfaceSets": {"NetworkInterfaceSet": page}}))
}

/// One ENI, as `DescribeNetworkInterfaces` lists it and `CreateNetworkInterface` answers.
pub(super) fn eni(vpc: &Vpc, eni: &EniRecord) -> Value {
    let v4: Vec<Value> =
        eni.v4.iter().enumerate().map(|(n, address)| json!({"PrivateIpAddress": address, "Primary": n == 0})).collect();
    let v6: Vec<Value> = eni.v6.iter().map(|address| json!({"Ipv6Address": address})).collect();
    let v4_prefixes: Vec<Value> = eni.v4_prefixes.iter().map(|prefix| json!({"Ipv4Prefix": prefix})).collect();
    let v6_prefixes: Vec<Value> = eni.v6_prefixes.iter().map(|prefix| json!({"Ipv6Prefix": prefix})).collect();
    let tags: Vec<Value> = eni.tags.iter().map(|(key, value)| json!({"TagKey": key, "TagValue": value})).collect();
    json!({
        "NetworkInterfaceId": eni.id,
        "Status": format!("{:?}", eni.status),
        "Type": format!("{:?}", eni.kind),
        "VpcId": vpc.config.vpc,
        "VSwitchId": eni.vswitch,
        "ZoneId": vpc.vswitch(&eni.vswitch).map(|vswitch| vswitch.zone.as_str()),
        "MacAddress": eni.mac,
        "InstanceId": eni.instance.as_deref().unwrap_or_default(),
        "Description": eni.description,
        "CreationTime": rfc3339(eni.created),
        "PrivateIpAddress": eni.v4.first(),
        "PrivateIpSets": {"PrivateIpSet": v4},
        "Ipv6Sets": {"Ipv6Set": v6},
        "Ipv4PrefixSets": {"Ipv4PrefixSet": v4_prefixes},
        "Ipv6PrefixSets": {"Ipv6PrefixSet": v6_prefixes},
        "SecurityGroupIds": {"SecurityGroupId": eni.security_groups},
        "Tags": {"Tag": tags},
        "DeleteOnRelease": true,
    })
}

pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
