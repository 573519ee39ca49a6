//! [`Cloud`] over the OpenAPI of ECS and VPC and the metadata service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::{Ipv4Network, Ipv6Network};
use terway_core::cloud::{
    CloudError, Eni, EniKind, EniStatus, ErrorClass, InstanceLimits, NodeIdentity, Subnet, VSwitch,
};
use terway_core::ident::{EniId, InstanceId, Mac, VSwitchId};
use tracing::warn;

use super::config::{CredentialSource, EcsConfig};
use super::credentials::Keyring;
use super::metadata::{Metadata, Nic};
use super::rpc::{Parameters, Rpc, Service, failure};
use super::wire::{
    AssignIpv6Addresses, AssignPrivateIpAddresses, DescribeInstanceTypes, DescribeNetworkInterfaces, DescribeVSwitches,
    Done, Unfit, WireEni, WireVSwitch,
};
use super::{Cloud, CreateEni, EniFilter, MAX_ADDRESSES_PER_CALL, MAX_PREFIXES_PER_CALL, MAX_V4_AT_CREATION, Result};

/// Entries a page (`DescribeNetworkInterfaces`, `MaxResults`: at most 500).
const ENIS_PER_PAGE: u32 = 500;
/// `DescribeNetworkInterfaces`: `NetworkInterfaceId.N`, N up to 100.
const IDS_PER_CALL: usize = 100;
/// How long a created ENI may be unknown to `DescribeNetworkInterfaces`.
const VISIBLE_WITHIN: Duration = Duration::from_secs(10);

/// The real cloud.
pub struct Aliyun {
    rpc: Rpc,
    metadata: Arc<Metadata>,
    poll: Duration,
}

impl Aliyun {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// When no HTTP client can be built.
    pub fn new(config: &EcsConfig) -> Result<Self> {
        let metadata = Arc::new(Metadata::new(
            config.metadata.clone(),
            config.timeout.min(Duration::from_secs(5)),
            config.retry,
            config.observer.clone(),
        )?);
        let keyring = Keyring::new(config.credentials.clone(), Arc::clone(&metadata));
        Ok(Self { rpc: Rpc::new(config, keyring)?, metadata, poll: config.poll })
    }

    /// Signs with keys from elsewhere from now on (live reload); calls under way end with those they have.
    pub fn set_credentials(&self, source: CredentialSource) {
        self.rpc.keyring().replace(source);
    }

    /// Replaces the client-side limits (live reload), as [`EcsConfig::rate_limits`] gives them.
    pub fn set_rate_limits(&self, per_minute: &BTreeMap<String, u32>) {
        self.rpc.limits().set(per_minute);
    }

    /// The metadata service, which works when the OpenAPI does not.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The present state of an ENI, for a caller whose request the cloud refused because of it; `None` if it is gone.
    async fn state(&self, eni: &EniId) -> Result<Option<Eni>> {
        match self.describe_eni(eni).await {
            Ok(eni) => Ok(Some(eni)),
            Err(error) if error.class == ErrorClass::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Unassigns; if the cloud says that an address is not there, once more with those that are.
    async fn unassign<A: Copy + Ord + ToString + Send + Sync>(
        &self,
        action: &'static str,
        name: &str,
        eni: &EniId,
        addresses: &[A],
        of: impl Fn(&Eni) -> &[A] + Send,
    ) -> Result<()> {
        let mut wanted: Vec<A> = addresses.to_vec();
        wanted.truncate(MAX_ADDRESSES_PER_CALL as usize);
        if wanted.len() != addresses.len() {
            return Err(too_many(action, addresses.len()));
        }
        for last in [false, true] {
            if wanted.is_empty() {
                return Ok(());
            }
            let mut parameters = id(eni);
            repeated(&mut parameters, name, &wanted);
            match self.rpc.call::<Done>(Service::Ecs, action, parameters).await {
                Ok(_) => return Ok(()),
                Err(error) if error.code == "InvalidEniId.NotFound" => return Ok(()),
                // Describe lags behind and may show what is gone: each on its own, the cloud's refusal is the truth.
                Err(error) if error.class == ErrorClass::NotFound && last && wanted.len() > 1 => {
                    for address in wanted {
                        let mut parameters = id(eni);
                        repeated(&mut parameters, name, &[address]);
                        match self.rpc.call::<Done>(Service::Ecs, action, parameters).await {
                            Err(error) if error.class != ErrorClass::NotFound => return Err(error),
                            _ => {}
                        }
                    }
                    return Ok(());
                }
                Err(error) if error.class == ErrorClass::NotFound && last => return Ok(()),
                Err(error) if error.class == ErrorClass::NotFound => match self.state(eni).await? {
                    None => return Ok(()),
                    Some(eni) => {
                        let present: BTreeSet<A> = of(&eni).iter().copied().collect();
                        wanted.retain(|address| present.contains(address));
                    }
                },
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn created(&self, eni: &EniId) -> Result<Eni> {
        let began = Instant::now();
        loop {
            match self.describe_eni(eni).await {
                Err(error) if error.class == ErrorClass::NotFound && began.elapsed() < VISIBLE_WITHIN => {
                    tokio::time::sleep(self.pause()).await;
                }
                result => return result,
            }
        }
    }

    async fn pages(&self, filter: &EniFilter, ids: &[EniId], enis: &mut Vec<Eni>) -> Result<()> {
        let action = "DescribeNetworkInterfaces";
        let mut parameters = vec![pair("MaxResults", ENIS_PER_PAGE.to_string())];
        repeated(&mut parameters, "NetworkInterfaceId", ids);
        parameters.extend(filter.instance.iter().map(|instance| pair("InstanceId", instance.as_str())));
        parameters.extend(filter.status.iter().map(|status| pair("Status", format!("{status:?}"))));
        parameters.extend(filter.kind.iter().map(|kind: &EniKind| pair("Type", format!("{kind:?}"))));
        tags(&mut parameters, &filter.tags);
        let mut seen = BTreeSet::new();
        let mut token: Option<String> = None;
        loop {
            let mut parameters = parameters.clone();
            parameters.extend(token.iter().map(|token| pair("NextToken", token)));
            let reply: DescribeNetworkInterfaces = self.rpc.call(Service::Ecs, action, parameters).await?;
            for eni in reply.network_interface_sets.network_interface_set {
                let name = eni.network_interface_id.clone();
                match eni.checked() {
                    Ok(eni) => enis.push(eni),
                    Err(Unfit::Unknown(what)) => warn!(eni = name, what, "an ENI of an unknown kind is left alone"),
                    Err(Unfit::Malformed(what)) => return Err(malformed(action, &format!("{name}: {what}"))),
                }
            }
            match reply.next_token.filter(|next| !next.is_empty()) {
                None => break,
                // A cloud that sends the same page for ever must not hang the daemon.
                Some(next) if !seen.insert(next.clone()) => return Err(malformed(action, "NextToken repeats")),
                next => token = next,
            }
        }
        Ok(())
    }

    fn pause(&self) -> Duration {
        // Half fixed, half random: nodes that attach at the same time do not ask at the same time.
        self.poll.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[async_trait]
impl Cloud for Aliyun {
    fn delayed(&self) -> Vec<CloudError> {
        self.rpc.delayed()
    }

    async fn node_identity(&self) -> Result<NodeIdentity> {
        self.metadata.node_identity().await
    }

    async fn instance_limits(&self, instance_type: &str) -> Result<InstanceLimits> {
        let action = "DescribeInstanceTypes";
        let parameters = vec![pair("InstanceTypes.1", instance_type)];
        // One type fits one page.
        let reply: DescribeInstanceTypes = self.rpc.call(Service::Ecs, action, parameters).await?;
        reply
            .instance_types
            .instance_type
            .iter()
            .find(|found| found.instance_type_id == instance_type)
            .map(super::wire::InstanceType::limits)
            .ok_or_else(|| failure(action, ErrorClass::NotFound, format!("no instance type `{instance_type}`")))
    }

    async fn vswitches(&self, ids: &[VSwitchId]) -> Result<Vec<VSwitch>> {
        let action = "DescribeVSwitches";
        // The action takes one id; without one it would page through the whole account.
        let calls = ids.iter().map(|id| async move {
            let parameters = vec![pair("VSwitchId", id.as_str())];
            let reply: DescribeVSwitches = self.rpc.call(Service::Vpc, action, parameters).await?;
            reply
                .v_switches
                .v_switch
                .into_iter()
                .next()
                .map(WireVSwitch::checked)
                .transpose()
                .map_err(|what| malformed(action, &format!("{id}: {what}")))
        });
        Ok(futures_util::future::try_join_all(calls).await?.into_iter().flatten().collect())
    }

    async fn enis(&self, filter: &EniFilter) -> Result<Vec<Eni>> {
        let mut enis = Vec::new();
        if filter.ids.is_empty() {
            self.pages(filter, &[], &mut enis).await?;
        }
        for ids in filter.ids.chunks(IDS_PER_CALL) {
            self.pages(filter, ids, &mut enis).await?;
        }
        // An ENI that appears between two pages can come twice.
        enis.sort_by(|a, b| a.id.cmp(&b.id));
        enis.dedup_by(|a, b| a.id == b.id);
        Ok(enis)
    }

    async fn create_eni(&self, request: &CreateEni) -> Result<Eni> {
        let action = "CreateNetworkInterface";
        let CreateEni { token, vswitch, security_groups, v4_count, v6_count, v4_prefixes, v6_prefixes, .. } = request;
        if !(1..=MAX_V4_AT_CREATION).contains(v4_count) || *v6_count > MAX_ADDRESSES_PER_CALL {
            return Err(failure(action, ErrorClass::Invalid, format!("{v4_count} IPv4 and {v6_count} IPv6 addresses")));
        }
        // "Cannot be set together" (ECS API reference, `CreateNetworkInterface`: `Ipv4PrefixCount`, `Ipv6PrefixCount`).
        if v4_prefixes.max(v6_prefixes) > &MAX_PREFIXES_PER_CALL
            || (*v4_prefixes > 0 && *v4_count > 1)
            || (*v6_prefixes > 0 && *v6_count > 0)
        {
            let message = format!(
                "{v4_prefixes} IPv4 and {v6_prefixes} IPv6 prefixes with {v4_count} IPv4 and {v6_count} IPv6 addresses"
            );
            return Err(failure(action, ErrorClass::Invalid, message));
        }
        let mut parameters = vec![
            pair("VSwitchId", vswitch.as_str()),
            pair("ClientToken", token),
            pair("InstanceType", "Secondary"),
            pair("Description", "pod addresses, by terwayd"),
            // The ENI goes with its instance, should the daemon not live to delete it.
            pair("DeleteOnRelease", "true"),
        ];
        repeated(&mut parameters, "SecurityGroupIds", security_groups);
        if *v4_count > 1 {
            parameters.push(pair("SecondaryPrivateIpAddressCount", (v4_count - 1).to_string()));
        }
        if *v6_count > 0 {
            parameters.push(pair("Ipv6AddressCount", v6_count.to_string()));
        }
        if *v4_prefixes > 0 {
            parameters.push(pair("Ipv4PrefixCount", v4_prefixes.to_string()));
        }
        if *v6_prefixes > 0 {
            parameters.push(pair("Ipv6PrefixCount", v6_prefixes.to_string()));
        }
        parameters.extend(request.resource_group.iter().map(|group| pair("ResourceGroupId", group)));
        tags(&mut parameters, &request.tags);
        let reply: WireEni = self.rpc.call(Service::Ecs, action, parameters).await?;
        let id = EniId::new(reply.network_interface_id.clone());
        match reply.checked() {
            Ok(eni) => Ok(eni),
            Err(_) => self.created(&id).await,
        }
    }

    async fn attach_eni(&self, eni: &EniId, instance: &InstanceId) -> Result<()> {
        let mut parameters = id(eni);
        parameters.push(pair("InstanceId", instance.as_str()));
        match self.rpc.call::<Done>(Service::Ecs, "AttachNetworkInterface", parameters).await {
            Err(error) if error.class == ErrorClass::InvalidState => match self.state(eni).await? {
                Some(now)
                    if now.instance.as_ref() == Some(instance)
                        && matches!(now.status, EniStatus::Attaching | EniStatus::InUse) =>
                {
                    Ok(())
                }
                _ => Err(error),
            },
            result => result.map(drop),
        }
    }

    async fn detach_eni(&self, eni: &EniId, instance: &InstanceId) -> Result<()> {
        let mut parameters = id(eni);
        parameters.push(pair("InstanceId", instance.as_str()));
        match self.rpc.call::<Done>(Service::Ecs, "DetachNetworkInterface", parameters).await {
            Err(error) if matches!(error.class, ErrorClass::InvalidState | ErrorClass::NotFound) => {
                match self.state(eni).await? {
                    None => Ok(()),
                    Some(now) if matches!(now.status, EniStatus::Attaching | EniStatus::InUse) => Err(error),
                    Some(_) => Ok(()),
                }
            }
            result => result.map(drop),
        }
    }

    async fn delete_eni(&self, eni: &EniId) -> Result<()> {
        match self.rpc.call::<Done>(Service::Ecs, "DeleteNetworkInterface", id(eni)).await {
            Err(error) if error.class == ErrorClass::NotFound => Ok(()),
            Err(error) if error.class == ErrorClass::InvalidState => match self.state(eni).await? {
                None => Ok(()),
                Some(now) if now.status == EniStatus::Deleting => Ok(()),
                Some(_) => Err(error),
            },
            result => result.map(drop),
        }
    }

    async fn assign_v4(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv4Addr>> {
        let action = "AssignPrivateIpAddresses";
        let parameters = assign(action, eni, "SecondaryPrivateIpAddressCount", count, token)?;
        let reply: AssignPrivateIpAddresses = self.rpc.call(Service::Ecs, action, parameters).await?;
        Ok(reply.assigned_private_ip_addresses_set.private_ip_set.private_ip_address)
    }

    async fn assign_v6(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv6Addr>> {
        let action = "AssignIpv6Addresses";
        let parameters = assign(action, eni, "Ipv6AddressCount", count, token)?;
        let reply: AssignIpv6Addresses = self.rpc.call(Service::Ecs, action, parameters).await?;
        Ok(reply.ipv6_sets.ipv6_address)
    }

    async fn unassign_v4(&self, eni: &EniId, addresses: &[Ipv4Addr]) -> Result<()> {
        self.unassign("UnassignPrivateIpAddresses", "PrivateIpAddress", eni, addresses, |eni| &eni.v4).await
    }

    async fn unassign_v6(&self, eni: &EniId, addresses: &[Ipv6Addr]) -> Result<()> {
        self.unassign("UnassignIpv6Addresses", "Ipv6Address", eni, addresses, |eni| &eni.v6).await
    }

    async fn assign_v4_prefixes(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv4Network>> {
        let action = "AssignPrivateIpAddresses";
        let parameters = assign(action, eni, "Ipv4PrefixCount", count, token)?;
        let reply: AssignPrivateIpAddresses = self.rpc.call(Service::Ecs, action, parameters).await?;
        Ok(reply.assigned_private_ip_addresses_set.ipv4_prefix_set.ipv4_prefixes)
    }

    async fn assign_v6_prefixes(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv6Network>> {
        let action = "AssignIpv6Addresses";
        let parameters = assign(action, eni, "Ipv6PrefixCount", count, token)?;
        let reply: AssignIpv6Addresses = self.rpc.call(Service::Ecs, action, parameters).await?;
        Ok(reply.ipv6_prefix_sets.ipv6_prefix)
    }

    async fn unassign_v4_prefixes(&self, eni: &EniId, prefixes: &[Ipv4Network]) -> Result<()> {
        self.unassign("UnassignPrivateIpAddresses", "Ipv4Prefix", eni, prefixes, |eni| &eni.v4_prefixes).await
    }

    async fn unassign_v6_prefixes(&self, eni: &EniId, prefixes: &[Ipv6Network]) -> Result<()> {
        self.unassign("UnassignIpv6Addresses", "Ipv6Prefix", eni, prefixes, |eni| &eni.v6_prefixes).await
    }

    async fn subnet(&self, mac: Mac) -> Result<Subnet> {
        self.metadata.subnet(mac).await
    }

    async fn nics(&self) -> Result<Vec<Nic>> {
        let mut nics = Vec::new();
        for mac in self.metadata.macs().await? {
            match self.metadata.nic(mac).await {
                Ok(nic) => nics.push(nic),
                // Unplugged since it was listed.
                Err(error) if error.class == ErrorClass::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(nics)
    }

    async fn describe_eni(&self, eni: &EniId) -> Result<Eni> {
        self.enis(&EniFilter::ids(std::slice::from_ref(eni))).await?.pop().ok_or_else(|| {
            failure("DescribeNetworkInterfaces", ErrorClass::NotFound, format!("no ENI {eni} that this daemon can use"))
        })
    }

    async fn wait_eni(&self, eni: &EniId, status: EniStatus, within: Duration) -> Result<Eni> {
        let began = Instant::now();
        loop {
            let now = match self.describe_eni(eni).await {
                Ok(now) if now.status == status => return Ok(now),
                Ok(now) => Some(now.status),
                // An ENI that was just made may not be shown yet.
                Err(error)
                    if error.class == ErrorClass::NotFound
                        && status == EniStatus::InUse
                        && began.elapsed() < VISIBLE_WITHIN =>
                {
                    None
                }
                Err(error) => return Err(error),
            };
            let pause = self.pause();
            if began.elapsed() + pause > within {
                let now = now.map_or_else(|| "not shown".to_owned(), |now| format!("{now:?}"));
                let message = format!("{eni} is {now}, not {status:?}, after {within:?}");
                return Err(failure("DescribeNetworkInterfaces", ErrorClass::InvalidState, message));
            }
            tokio::time::sleep(pause).await;
        }
    }
}

fn assign(action: &str, eni: &EniId, name: &str, count: u32, token: &str) -> Result<Parameters> {
    if !(1..=MAX_ADDRESSES_PER_CALL).contains(&count) {
        return Err(too_many(action, count as usize));
    }
    let mut parameters = id(eni);
    parameters.extend([pair(name, count.to_string()), pair("ClientToken", token)]);
    Ok(parameters)
}

fn too_many(action: &str, count: usize) -> CloudError {
    let message = format!("{count} addresses in a call, not 1 to {MAX_ADDRESSES_PER_CALL}");
    failure(action, ErrorClass::Invalid, message)
}

fn malformed(action: &str, what: &str) -> CloudError {
    failure(action, ErrorClass::Unknown, format!("{}: {what}", CloudError::MALFORMED))
}

fn pair(name: &str, value: impl Into<String>) -> (String, String) {
    (name.to_owned(), value.into())
}

fn id(eni: &EniId) -> Parameters {
    vec![pair("NetworkInterfaceId", eni.as_str())]
}

/// `Name.1=…&Name.2=…`: RPC-style lists count from 1.
fn repeated<T: ToString>(parameters: &mut Parameters, name: &str, values: &[T]) {
    parameters.extend((1..).zip(values).map(|(n, value)| (format!("{name}.{n}"), value.to_string())));
}

fn tags(parameters: &mut Parameters, tags: &BTreeMap<String, String>) {
    for (n, (key, value)) in (1..).zip(tags) {
        parameters.extend([(format!("Tag.{n}.Key"), key.clone()), (format!("Tag.{n}.Value"), value.clone())]);
    }
}
