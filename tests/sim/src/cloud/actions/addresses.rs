//! ENIs come into being, and addresses and prefixes come and go.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde_json::{Value, json};
use terway_core::cloud::{EniKind, EniStatus};

use super::super::describe;
use super::super::reply::{Parameters, Refusal};
use super::super::vpc::{EniRecord, Vpc};

/// `PrivateIpAddress.N`, `Ipv4Prefix.N`: N up to 10; counts likewise.
const PER_CALL: u32 = 10;
/// What an ENI can have while it is not attached (`AssignPrivateIpAddresses`, `AssignIpv6Addresses`).
const DETACHED_V4: u32 = 50;
const DETACHED_V6: u32 = 10;

pub(super) fn create(vpc: &mut Vpc, parameters: &Parameters) -> Result<Value, Refusal> {
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
    let within = |name: &str, most: u32| match parameters.number(name)?.unwrap_or(0) {
        count if count <= most => Ok(count),
        _ => Err(Refusal::invalid(name, &format!("1 to {most}"))),
    };
    let secondary = within("SecondaryPrivateIpAddressCount", DETACHED_V4 - 1)?;
    let v6_count = within("Ipv6AddressCount", DETACHED_V6)?;
    let (v4_prefixes, v6_prefixes) = (within("Ipv4PrefixCount", PER_CALL)?, within("Ipv6PrefixCount", PER_CALL)?);
    if (secondary > 0 && v4_prefixes > 0) || (v6_count > 0 && v6_prefixes > 0) {
        let message = "A count of addresses and a count of prefixes cannot be set together.";
        return Err(Refusal::new(400, "InvalidParameter.Conflict", message));
    }
    if vpc.config.max_enis.is_some_and(|most| vpc.enis.len() >= most as usize) {
        let message = "The number of network interfaces exceeds the limit of the region.";
        return Err(Refusal::new(403, "MaxEniCountExceeded", message));
    }
    check_group_capacity(vpc, &groups, 1 + secondary + v4_prefixes)?;
    let mut eni = vpc.new_eni(id, EniKind::Secondary, Vec::new(), Vec::new());
    let taken = (|| {
        eni.v4 = vpc.addresses.take_v4(&vswitch, 1 + secondary)?;
        if v6_count > 0 {
            eni.v6 = vpc.addresses.take_v6(&vswitch, v6_count)?;
        }
        if v6_prefixes > 0 {
            eni.v6_prefixes = vpc.addresses.take_v6_prefixes(&vswitch, v6_prefixes)?;
        }
        if v4_prefixes > 0 {
            eni.v4_prefixes = vpc.addresses.take_v4_prefixes(&vswitch, v4_prefixes)?;
        }
        Ok(())
    })();
    if let Err(refusal) = taken {
        let singles = eni.v4.iter().copied().map(IpAddr::V4).chain(eni.v6.iter().copied().map(IpAddr::V6));
        vpc.addresses.give_back(singles);
        vpc.addresses.give_back_v6_prefixes(&eni.v6_prefixes);
        return Err(refusal);
    }
    eni.security_groups = groups.into_iter().map(str::to_owned).collect();
    eni.tags = parameters.tags();
    eni.description = parameters.get("Description").unwrap_or_default().to_owned();
    let reply = if vpc.config.terse_create { json!({"NetworkInterfaceId": eni.id}) } else { describe::eni(vpc, &eni) };
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(reply)
}

/// Whether `more` addresses fit into each of these security groups.
fn check_group_capacity<S: AsRef<str>>(vpc: &Vpc, groups: &[S], more: u32) -> Result<(), Refusal> {
    for group in groups.iter().map(AsRef::as_ref) {
        let Some(capacity) = vpc.config.security_group_capacity.get(group) else { continue };
        let members = vpc.enis.values().filter(|eni| eni.security_groups.iter().any(|own| own == group));
        if members.map(EniRecord::v4_count).sum::<usize>() + more as usize > *capacity as usize {
            let message = format!("The maximum number of addresses in the security group {group} is exceeded.");
            return Err(Refusal::new(403, "SecurityGroupInstanceLimitExceed", message));
        }
    }
    Ok(())
}

/// The ENI of a call, if it is in a state in which its addresses may change.
fn eni_in_stable_state<'a>(vpc: &'a Vpc, parameters: &Parameters) -> Result<&'a EniRecord, Refusal> {
    let eni = vpc.eni(parameters.need("NetworkInterfaceId")?)?;
    match eni.status {
        EniStatus::Available | EniStatus::InUse => Ok(eni),
        other => Err(Refusal::eni_state(eni.id.as_str(), &format!("{other:?}"))),
    }
}

/// How many of what: addresses or prefixes, 1 to 10 of one kind.
fn wanted(parameters: &Parameters, addresses: &str, prefixes: &str) -> Result<(u32, bool), Refusal> {
    let (count, of_prefixes, name) = match (parameters.number(addresses)?, parameters.number(prefixes)?) {
        (None, None) => return Err(Refusal::missing(addresses)),
        (Some(_), Some(_)) => return Err(Refusal::invalid(addresses, "not together with a count of prefixes")),
        (Some(count), None) => (count, false, addresses),
        (None, Some(count)) => (count, true, prefixes),
    };
    if (1..=PER_CALL).contains(&count) { Ok((count, of_prefixes)) } else { Err(Refusal::invalid(name, "1 to 10")) }
}

pub(super) fn over(what: &str) -> String {
    format!("The maximum number of {what} addresses of the network interface is exceeded.")
}

pub(super) fn assign_v4(vpc: &mut Vpc, parameters: &Parameters, most: u32) -> Result<Value, Refusal> {
    let mut eni = eni_in_stable_state(vpc, parameters)?.clone();
    let (count, of_prefixes) = wanted(parameters, "SecondaryPrivateIpAddressCount", "Ipv4PrefixCount")?;
    let limit = vpc.limits(&eni).map_or(DETACHED_V4, |limits| limits.v4_per_adapter);
    if eni.v4_count() + count as usize > limit as usize {
        return Err(Refusal::new(403, "QuotaExceeded.PrivateIpAddress", over("private IP")));
    }
    check_group_capacity(vpc, &eni.security_groups, count)?;
    let vswitch = vpc.vswitch(&eni.vswitch).ok_or_else(|| Refusal::missing("VSwitchId"))?.clone();
    let (mut taken, mut prefixes) = (Vec::new(), Vec::new());
    if of_prefixes {
        prefixes = vpc.addresses.take_v4_prefixes(&vswitch, count.min(most))?;
        eni.v4_prefixes.extend(&prefixes);
        vpc.push_prefixes(&eni);
    } else {
        taken = vpc.addresses.take_v4(&vswitch, count.min(most))?;
        eni.v4.extend(&taken);
        vpc.push_addresses(&eni);
    }
    let reply = json!({"AssignedPrivateIpAddressesSet": {
        "NetworkInterfaceId": eni.id,
        "PrivateIpSet": {"PrivateIpAddress": taken},
        "Ipv4PrefixSet": {"Ipv4Prefixes": prefixes},
    }});
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(reply)
}

pub(super) fn assign_v6(vpc: &mut Vpc, parameters: &Parameters, most: u32) -> Result<Value, Refusal> {
    let mut eni = eni_in_stable_state(vpc, parameters)?.clone();
    let (count, of_prefixes) = wanted(parameters, "Ipv6AddressCount", "Ipv6PrefixCount")?;
    let limit = vpc.limits(&eni).map_or(DETACHED_V6, |limits| limits.v6_per_adapter);
    if eni.v6_count() + count as usize > limit as usize {
        return Err(Refusal::new(403, "InvalidOperation.Ipv6CountExceeded", over("IPv6")));
    }
    let vswitch = vpc.vswitch(&eni.vswitch).ok_or_else(|| Refusal::missing("VSwitchId"))?.clone();
    let (mut taken, mut prefixes) = (Vec::new(), Vec::new());
    if of_prefixes {
        prefixes = vpc.addresses.take_v6_prefixes(&vswitch, count.min(most))?;
        eni.v6_prefixes.extend(&prefixes);
        vpc.push_prefixes(&eni);
    } else {
        taken = vpc.addresses.take_v6(&vswitch, count.min(most))?;
        eni.v6.extend(&taken);
        vpc.push_addresses(&eni);
    }
    let reply = json!({
        "NetworkInterfaceId": eni.id,
        "Ipv6Sets": {"Ipv6Address": taken},
        "Ipv6PrefixSets": {"Ipv6Prefix": prefixes},
    });
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(reply)
}

fn parsed<T: FromStr + Ord>(parameters: &Parameters, name: &str) -> Result<BTreeSet<T>, Refusal> {
    let texts = parameters.list(name);
    if texts.len() > PER_CALL as usize {
        return Err(Refusal::invalid(name, "1 to 10"));
    }
    texts.iter().map(|text| T::from_str(text).map_err(|_parse| Refusal::invalid(name, "malformed"))).collect()
}

pub(super) fn unassign(
    vpc: &mut Vpc,
    parameters: &Parameters,
    addresses: &str,
    prefixes: &str,
) -> Result<Value, Refusal> {
    let mut eni = eni_in_stable_state(vpc, parameters)?.clone();
    let gone: BTreeSet<IpAddr> = parsed(parameters, addresses)?;
    let gone_prefixes: BTreeSet<IpNetwork> = parsed(parameters, prefixes)?;
    if gone.is_empty() && gone_prefixes.is_empty() {
        return Err(Refusal::missing(&format!("{addresses}.1")));
    }
    let primary = eni.v4.first().copied().map(IpAddr::V4);
    if gone.iter().any(|address| Some(*address) == primary) {
        return Err(Refusal::invalid(addresses, "the primary address cannot be unassigned"));
    }
    let unassigned = |what: String| {
        let message = format!("The specified IP \"{what}\" is not assigned on this ENI.");
        Err(Refusal::new(403, "InvalidIp.IpUnassigned", message))
    };
    let has = |address: &IpAddr| match address {
        IpAddr::V4(v4) => eni.v4.contains(v4),
        IpAddr::V6(v6) => eni.v6.contains(v6),
    };
    let has_prefix = |prefix: &IpNetwork| match prefix {
        IpNetwork::V4(v4) => eni.v4_prefixes.contains(v4),
        IpNetwork::V6(v6) => eni.v6_prefixes.contains(v6),
    };
    if let Some(absent) = gone.iter().find(|address| !has(address)) {
        return unassigned(absent.to_string());
    }
    if let Some(absent) = gone_prefixes.iter().find(|prefix| !has_prefix(prefix)) {
        return unassigned(absent.to_string());
    }
    if !gone.is_empty() {
        eni.v4.retain(|address| !gone.contains(&IpAddr::V4(*address)));
        eni.v6.retain(|address| !gone.contains(&IpAddr::V6(*address)));
        vpc.push_addresses(&eni);
        vpc.addresses.give_back(gone);
    }
    if !gone_prefixes.is_empty() {
        let v4: Vec<Ipv4Network> =
            eni.v4_prefixes.extract_if(.., |own| gone_prefixes.contains(&IpNetwork::V4(*own))).collect();
        let v6: Vec<Ipv6Network> =
            eni.v6_prefixes.extract_if(.., |own| gone_prefixes.contains(&IpNetwork::V6(*own))).collect();
        vpc.push_prefixes(&eni);
        vpc.addresses.give_back_v4_prefixes(&v4);
        vpc.addresses.give_back_v6_prefixes(&v6);
    }
    vpc.enis.insert(eni.id.clone(), eni);
    Ok(json!({}))
}
