//! The actions of the OpenAPI: checks, effect, reply.
//!
//! Conditions and codes: ECS 2014-05-26 and VPC 2016-04-28 API references, "Error codes" of each action. Parameters that would have an
//! effect which is not simulated (prefixes, chosen addresses, trunks) are refused, not ignored.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use serde_json::{Value, json};
use terway_core::cloud::{EniKind, EniStatus};
use terway_core::ident::EniId;

use super::describe;
use super::reply::{Parameters, Refusal};
use super::vpc::{EniRecord, Vpc};

/// `PrivateIpAddress.N`: N up to 10; counts likewise.
const PER_CALL: u32 = 10;
/// What an ENI can have while it is not attached (`AssignPrivateIpAddresses`, `AssignIpv6Addresses`).
const DETACHED_V4: u32 = 50;
const DETACHED_V6: u32 = 10;

/// What goes on after the reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Follow {
    Nothing,
    Attach(EniId, u64),
    Detach(EniId, u64),
    Delete(EniId),
}

pub(super) type Answer = Result<(Value, Follow), Refusal>;

/// Runs one call whose sender is known. `RequestId` is added by the caller.
pub(super) fn run(vpc: &mut Vpc, version: &str, action: &str, parameters: &Parameters) -> Answer {
    let region = parameters.need("RegionId")?;
    if region != vpc.config.region {
        return Err(Refusal::new(404, "InvalidRegionId.NotFound", "The specified RegionId does not exist."));
    }
    for name in [
        "Ipv4PrefixCount",
        "Ipv4Prefix.1",
        "Ipv6PrefixCount",
        "Ipv6Prefix.1",
        "TrunkNetworkInstanceId",
        "NetworkCardIndex",
        "PrimaryIpAddress",
        "VSwitchId.1",
    ] {
        if parameters.get(name).is_some() {
            return Err(Refusal::new(400, "UnsupportedParameter", format!("{name} is not simulated.")));
        }
    }
    match (version, action) {
        ("2014-05-26", "DescribeInstanceTypes") => describe::instance_types(vpc, parameters).map(still),
        ("2014-05-26", "DescribeNetworkInterfaces") => describe::network_interfaces(vpc, parameters).map(still),
        ("2016-04-28", "DescribeVSwitches") => describe::vswitches(vpc, parameters).map(still),
        ("2014-05-26", "CreateNetworkInterface") => once(vpc, action, parameters, create).map(still),
        ("2014-05-26", "AssignPrivateIpAddresses") => once(vpc, action, parameters, assign_v4).map(still),
        ("2014-05-26", "AssignIpv6Addresses") => once(vpc, action, parameters, assign_v6).map(still),
        ("2014-05-26", "UnassignPrivateIpAddresses") => unassign(vpc, parameters, "PrivateIpAddress").map(still),
        ("2014-05-26", "UnassignIpv6Addresses") => unassign(vpc, parameters, "Ipv6Address").map(still),
        ("2014-05-26", "AttachNetworkInterface") => attach(vpc, parameters),
        ("2014-05-26", "DetachNetworkInterface") => detach(vpc, parameters),
        ("2014-05-26", "DeleteNetworkInterface") => delete(vpc, parameters),
        _ => {
            let message = "Specified api is not found, please check your url and method.";
            Err(Refusal::new(404, "InvalidAction.NotFound", message))
        }
    }
}

fn still(reply: Value) -> (Value, Follow) {
    (reply, Follow::Nothing)
}

/// Answers a repeated `ClientToken` with the first answer ("Ensure idempotence", ECS API reference). Refused calls are not remembered.
fn once(
    vpc: &mut Vpc,
    action: &str,
    parameters: &Parameters,
    run: impl FnOnce(&mut Vpc, &Parameters) -> Result<Value, Refusal>,
) -> Result<Value, Refusal> {
    let Some(token) = parameters.get("ClientToken") else { return run(vpc, parameters) };
    if token.len() > 64 || !token.is_ascii() {
        return Err(Refusal::invalid("ClientToken", "at most 64 ASCII characters"));
    }
    let key = (action.to_owned(), token.to_owned());
    let asked = parameters.fingerprint();
    if let Some((before, answer)) = vpc.answered.get(&key) {
        return if *before == asked {
            Ok(answer.clone())
        } else {
            let message = "The request uses the same client token as a previous, but non-identical request.";
            Err(Refusal::new(400, "IdempotentParameterMismatch", message))
        };
    }
    let answer = run(vpc, parameters)?;
    vpc.answered.insert(key, (asked, answer.clone()));
    Ok(answer)
}

fn create(vpc: &mut Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let id = parameters.need("VSwitchId")?;
    let mut groups = parameters.list("SecurityGroupIds");
    groups.extend(parameters.get("SecurityGroupId"));
    if groups.is_empty() {
        return Err(Refusal::missing("SecurityGroupId"));
    }
    if let Some(unknown) = groups.iter().find(|group| !vpc.config.security_groups.iter().any(|known| known == *group)) {
        let message = format!("The specified security group {unknown} does not exist.");
        return Err(Refusal::new(404, "InvalidSecurityGroupId.NotFound", message));
    }
    if parameters.get("InstanceType").is_some_and(|kind| kind != "Secondary") {
        return Err(Refusal::new(400, "UnsupportedParameter", "Only InstanceType Secondary is simulated."));
    }
    let unknown = || Refusal::new(404, "InvalidVSwitchId.NotFound", format!("The VSwitch {id} does not exist."));
    let vswitch = vpc.vswitch(id).ok_or_else(unknown)?.clone();
    let secondary = parameters.number("SecondaryPrivateIpAddressCount")?.unwrap_or(0);
    let v6_count = parameters.number("Ipv6AddressCount")?.unwrap_or(0);
    if secondary >= DETACHED_V4 {
        return Err(Refusal::invalid("SecondaryPrivateIpAddressCount", "1 to 49"));
    }
    if v6_count > DETACHED_V6 {
        return Err(Refusal::invalid("Ipv6AddressCount", "1 to 10"));
    }
    let v6 = if v6_count == 0 { Vec::new() } else { vpc.take_v6(&vswitch, v6_count)? };
    let v4 = match vpc.take_v4(&vswitch, 1 + secondary) {
        Ok(v4) => v4,
        Err(refusal) => {
            vpc.give_back(v6.into_iter().map(IpAddr::V6));
            return Err(refusal);
        }
    };
    let mut eni = vpc.new_eni(id, EniKind::Secondary, v4, v6);
    eni.security_groups = groups.into_iter().map(str::to_owned).collect();
    eni.tags = parameters.tags();
    eni.description = parameters.get("Description").unwrap_or_default().to_owned();
    let reply = if vpc.config.terse_create { json!({"NetworkInterfaceId": eni.id}) } else { describe::eni(vpc, &eni) };
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(reply)
}

/// The ENI of a call, if it is in a state in which its addresses may change.
fn settled<'a>(vpc: &'a Vpc, parameters: &Parameters) -> Result<&'a EniRecord, Refusal> {
    let eni = vpc.eni(parameters.need("NetworkInterfaceId")?)?;
    match eni.status {
        EniStatus::Available | EniStatus::InUse => Ok(eni),
        other => Err(Refusal::eni_state(eni.id.as_str(), &format!("{other:?}"))),
    }
}

fn count(parameters: &Parameters, name: &str) -> Result<u32, Refusal> {
    match parameters.number(name)? {
        None => Err(Refusal::missing(name)),
        Some(count) if (1..=PER_CALL).contains(&count) => Ok(count),
        Some(_) => Err(Refusal::invalid(name, "1 to 10")),
    }
}

fn over(what: &str) -> String {
    format!("The maximum number of {what} addresses of the network interface is exceeded.")
}

fn assign_v4(vpc: &mut Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let eni = settled(vpc, parameters)?.clone();
    let count = count(parameters, "SecondaryPrivateIpAddressCount")?;
    let limit = vpc.limits(&eni).map_or(DETACHED_V4, |limits| limits.v4_per_adapter);
    if eni.v4.len() + count as usize > limit as usize {
        return Err(Refusal::new(403, "QuotaExceeded.PrivateIpAddress", over("private IP")));
    }
    let vswitch = vpc.vswitch(&eni.vswitch).ok_or_else(|| Refusal::missing("VSwitchId"))?.clone();
    let taken = vpc.take_v4(&vswitch, count)?;
    let eni = vpc.eni_mut(eni.id.as_str())?;
    eni.v4.extend(&taken);
    let eni = eni.clone();
    vpc.announce(&eni);
    Ok(json!({"AssignedPrivateIpAddressesSet": {
        "NetworkInterfaceId": eni.id, "PrivateIpSet": {"PrivateIpAddress": taken}, "Ipv4PrefixSet": {"Ipv4Prefixes": []}
    }}))
}

fn assign_v6(vpc: &mut Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
    let eni = settled(vpc, parameters)?.clone();
    let count = count(parameters, "Ipv6AddressCount")?;
    let limit = vpc.limits(&eni).map_or(DETACHED_V6, |limits| limits.v6_per_adapter);
    if eni.v6.len() + count as usize > limit as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv6CountExceeded", over("IPv6")));
    }
    let vswitch = vpc.vswitch(&eni.vswitch).ok_or_else(|| Refusal::missing("VSwitchId"))?.clone();
    let taken = vpc.take_v6(&vswitch, count)?;
    let eni = vpc.eni_mut(eni.id.as_str())?;
    eni.v6.extend(&taken);
    let eni = eni.clone();
    vpc.announce(&eni);
    Ok(json!({"NetworkInterfaceId": eni.id, "Ipv6Sets": {"Ipv6Address": taken}, "Ipv6PrefixSets": {"Ipv6Prefix": []}}))
}

fn unassign(vpc: &mut Vpc, parameters: &Parameters, name: &str) -> Result<Value, Refusal> {
    let eni = settled(vpc, parameters)?.clone();
    let texts = parameters.list(name);
    if texts.is_empty() {
        return Err(Refusal::missing(&format!("{name}.1")));
    }
    if texts.len() > PER_CALL as usize {
        return Err(Refusal::invalid(name, "1 to 10 addresses"));
    }
    let gone: BTreeSet<IpAddr> = texts
        .iter()
        .map(|text| IpAddr::from_str(text).map_err(|_parse| Refusal::invalid(name, "not an address")))
        .collect::<Result<_, _>>()?;
    let primary = eni.v4.first().copied().map(IpAddr::V4);
    if gone.iter().any(|address| Some(*address) == primary) {
        return Err(Refusal::invalid(name, "the primary address cannot be unassigned"));
    }
    let has = |address: &IpAddr| match address {
        IpAddr::V4(v4) => eni.v4.contains(v4),
        IpAddr::V6(v6) => eni.v6.contains(v6),
    };
    if let Some(absent) = gone.iter().find(|address| !has(address)) {
        let message = format!("The specified IP {absent} is not assigned to the network interface.");
        return Err(Refusal::new(400, "InvalidIp.IpUnassigned", message));
    }
    let eni = vpc.eni_mut(eni.id.as_str())?;
    eni.v4.retain(|address| !gone.contains(&IpAddr::V4(*address)));
    eni.v6.retain(|address| !gone.contains(&IpAddr::V6(*address)));
    let eni = eni.clone();
    vpc.give_back(gone);
    vpc.announce(&eni);
    Ok(json!({}))
}

fn attach(vpc: &mut Vpc, parameters: &Parameters) -> Answer {
    let eni = vpc.eni(parameters.need("NetworkInterfaceId")?)?;
    let id = parameters.need("InstanceId")?;
    let unknown = || Refusal::new(404, "InvalidEcsId.NotFound", format!("The specified instance {id} does not exist."));
    let instance = vpc.instance(id).ok_or_else(unknown)?.clone();
    if eni.status != EniStatus::Available {
        return Err(Refusal::eni_state(eni.id.as_str(), &format!("{:?}", eni.status)));
    }
    let zone = |vswitch: &str| vpc.vswitch(vswitch).map(|vswitch| vswitch.zone.clone());
    if zone(&eni.vswitch) != zone(&instance.vswitch) {
        let message = "The network interface and the instance are not in the same zone.";
        return Err(Refusal::new(403, "InvalidOperation.AvailabilityZoneMismatch", message));
    }
    let limits = vpc.instance_type(&instance.instance_type).ok_or_else(unknown)?;
    let attached = vpc.enis.values().filter(|other| other.instance.as_deref() == Some(id)).count();
    if attached >= limits.adapters as usize {
        let message = "The maximum number of network interfaces of the instance is exceeded.";
        return Err(Refusal::new(403, "EniPerInstanceLimitExceeded", message));
    }
    if eni.v4.len() > limits.v4_per_adapter as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv4CountExceeded", over("private IP")));
    }
    if eni.v6.len() > limits.v6_per_adapter as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv6CountExceeded", over("IPv6")));
    }
    let eni = vpc.eni_mut(parameters.need("NetworkInterfaceId")?)?;
    eni.status = EniStatus::Attaching;
    eni.instance = Some(instance.id);
    eni.node = Some(instance.node);
    eni.attachment += 1;
    Ok((json!({}), Follow::Attach(eni.id.clone(), eni.attachment)))
}

fn detach(vpc: &mut Vpc, parameters: &Parameters) -> Answer {
    let instance = parameters.need("InstanceId")?;
    let eni = vpc.eni_mut(parameters.need("NetworkInterfaceId")?)?;
    if eni.kind == EniKind::Primary {
        let message = "The primary network interface cannot be detached.";
        return Err(Refusal::new(403, "InvalidOperation.InvalidEniType", message));
    }
    if eni.status != EniStatus::InUse || eni.instance.as_deref() != Some(instance) {
        return Err(Refusal::eni_state(eni.id.as_str(), &format!("{:?}", eni.status)));
    }
    eni.status = EniStatus::Detaching;
    eni.attachment += 1;
    Ok((json!({}), Follow::Detach(eni.id.clone(), eni.attachment)))
}

fn delete(vpc: &mut Vpc, parameters: &Parameters) -> Answer {
    let eni = vpc.eni_mut(parameters.need("NetworkInterfaceId")?)?;
    if eni.status != EniStatus::Available {
        return Err(Refusal::eni_state(eni.id.as_str(), &format!("{:?}", eni.status)));
    }
    eni.status = EniStatus::Deleting;
    Ok((json!({}), Follow::Delete(eni.id.clone())))
}
