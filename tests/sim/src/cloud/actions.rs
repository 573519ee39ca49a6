//! The actions of the OpenAPI: checks, effect, reply.
//!
//! Conditions and codes: ECS 2014-05-26 and VPC 2016-04-28 API references, "Error codes" of each action. Parameters that would have an
//! effect which is not simulated (chosen addresses, trunks) are refused, not ignored.

mod addresses;

use serde_json::{Value, json};
use terway_core::cloud::{EniKind, EniStatus};
use terway_core::ident::EniId;

use super::describe;
use super::reply::{Parameters, Refusal};
use super::vpc::Vpc;

/// What goes on after the reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FollowUp {
    Nothing,
    Attach(EniId, u64),
    Detach(EniId, u64),
    Delete(EniId),
}

pub(super) type Answer = Result<(Value, FollowUp), Refusal>;

/// Runs one call whose sender is known. `RequestId` is added by the caller.
///
/// `most` bounds what an assign call gives.
pub(super) fn run(vpc: &mut Vpc, version: &str, action: &str, parameters: &Parameters, most: u32) -> Answer {
    let region = parameters.need("RegionId")?;
    if region != vpc.config.region {
        return Err(Refusal::new(404, "InvalidRegionId.NotFound", "The specified RegionId does not exist."));
    }
    for name in ["TrunkNetworkInstanceId", "NetworkCardIndex", "PrimaryIpAddress", "VSwitchId.1"] {
        if parameters.get(name).is_some() {
            return Err(Refusal::new(400, "UnsupportedParameter", format!("{name} is not simulated.")));
        }
    }
    match (version, action) {
        ("2014-05-26", "DescribeInstanceTypes") => describe::instance_types(vpc, parameters).map(without_follow_up),
        ("2014-05-26", "DescribeNetworkInterfaces") => {
            describe::network_interfaces(vpc, parameters).map(without_follow_up)
        }
        ("2016-04-28", "DescribeVSwitches") => describe::vswitches(vpc, parameters).map(without_follow_up),
        ("2014-05-26", "CreateNetworkInterface") => {
            once(vpc, action, parameters, addresses::create).map(without_follow_up)
        }
        ("2014-05-26", "AssignPrivateIpAddresses") => {
            once(vpc, action, parameters, |vpc, p| addresses::assign_v4(vpc, p, most)).map(without_follow_up)
        }
        ("2014-05-26", "AssignIpv6Addresses") => {
            once(vpc, action, parameters, |vpc, p| addresses::assign_v6(vpc, p, most)).map(without_follow_up)
        }
        ("2014-05-26", "UnassignPrivateIpAddresses") => {
            addresses::unassign(vpc, parameters, "PrivateIpAddress", "Ipv4Prefix").map(without_follow_up)
        }
        ("2014-05-26", "UnassignIpv6Addresses") => {
            addresses::unassign(vpc, parameters, "Ipv6Address", "Ipv6Prefix").map(without_follow_up)
        }
        ("2014-05-26", "AttachNetworkInterface") => attach(vpc, parameters),
        ("2014-05-26", "DetachNetworkInterface") => detach(vpc, parameters),
        ("2014-05-26", "DeleteNetworkInterface") => delete(vpc, parameters),
        _ => {
            let message = "Specified api is not found, please check your url and method.";
            Err(Refusal::new(404, "InvalidAction.NotFound", message))
        }
    }
}

fn without_follow_up(reply: Value) -> (Value, FollowUp) {
    (reply, FollowUp::Nothing)
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
        let message = format!("The maximum number of network interfaces of the instance {id} is exceeded.");
        return Err(Refusal::new(403, "EniPerInstanceLimitExceeded", message));
    }
    if eni.v4_count() > limits.v4_per_adapter as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv4CountExceeded", addresses::over("private IP")));
    }
    if eni.v6_count() > limits.v6_per_adapter as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv6CountExceeded", addresses::over("IPv6")));
    }
    let eni = vpc.eni_mut(parameters.need("NetworkInterfaceId")?)?;
    eni.status = EniStatus::Attaching;
    eni.instance = Some(instance.id);
    eni.node = Some(instance.node);
    eni.attachment += 1;
    Ok((json!({}), FollowUp::Attach(eni.id.clone(), eni.attachment)))
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
    Ok((json!({}), FollowUp::Detach(eni.id.clone(), eni.attachment)))
}

fn delete(vpc: &mut Vpc, parameters: &Parameters) -> Answer {
    let eni = vpc.eni_mut(parameters.need("NetworkInterfaceId")?)?;
    if eni.status != EniStatus::Available {
        return Err(Refusal::eni_state(eni.id.as_str(), &format!("{:?}", eni.status)));
    }
    eni.status = EniStatus::Deleting;
    Ok((json!({}), FollowUp::Delete(eni.id.clone())))
}
