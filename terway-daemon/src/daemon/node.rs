//! Phase "node": who this node is, the client of its cloud, and the kernel settings that forwarding needs.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use terway_core::cloud::NodeIdentity;
use terway_core::config::Config;
use terway_core::errors::{self, Error};
use terway_core::ident::Addresses;
use terway_core::machine::{self, Validity};
use terway_core::route::{NodeInputs, NodePlan};
use terway_core::service;
use tracing::{error, info, warn};

use super::failed;
use crate::cloud::{Aliyun, CallObserver, Cloud as _, EcsConfig, Metadata, Retry, endpoint};
use crate::engine::NodeInfo;
use crate::identity::{self, Node};
use crate::metrics::Metrics;
use crate::net::{Host, NetMonitor};
use crate::options::Options;
use crate::reload;

/// How long a NIC may stay away once its ENI is attached: hot-plugging takes up to some ten seconds.
const NIC_WITHIN: Duration = Duration::from_secs(20);

/// How long a start with a kept identity waits for the metadata service.
const CHECK_WITHIN: Duration = Duration::from_secs(1);

/// The sysctl with the ports that the kernel gives to clients of the host.
const LOCAL_PORTS: &str = "net/ipv4/ip_local_port_range";

/// The node and the client of its cloud.
pub(super) struct Identified {
    pub(super) node: Node,
    pub(super) cloud: Arc<Aliyun>,
    /// The kept identity was another instance's, and so is the rest of the state folder.
    pub(super) is_other_instance: bool,
}

/// Finds out which instance this is, from what is kept or from the metadata service, and makes the client of its cloud.
pub(super) async fn identify(
    options: &Options,
    config: &Config,
    monitor: &NetMonitor,
    metrics: &Metrics,
) -> Result<Identified, Error> {
    let observer: CallObserver = {
        let metrics = metrics.clone();
        Arc::new(move |call| metrics.cloud_call(call.api, &call.error_label(), call.duration))
    };
    let url = endpoint(&options.metadata).map_err(|error| failed(errors::CONFIG_INVALID, "metadata", &error))?;
    let metadata = Metadata::new(url, Duration::from_secs(5), Retry::default(), Some(Arc::clone(&observer)))
        .map_err(|error| failed(errors::CLOUD_FAILED, "metadata", &error))?;

    let kept = identity::load(&options.node_path());
    let dmi = identity::read_dmi(&options.dmi_dir);
    let (identity, is_other_instance) = match &kept {
        None => (ask_metadata(&metadata).await, false),
        Some(kept) => check_kept(kept, &dmi, monitor, &metadata).await,
    };
    let cloud = Arc::new(cloud_client(options, config, &identity, observer)?);

    // An instance keeps its id when its type is changed.
    let kept = kept.filter(|_| !is_other_instance);
    let node = match kept {
        Some(kept) if kept.identity.instance_type == identity.instance_type => Node { identity, dmi, ..kept },
        kept => {
            let ask = || cloud.instance_limits(&identity.instance_type);
            let limits = identity::retry_forever("limits of the instance type (ECS)", ask).await;
            let token_seed = match kept {
                Some(kept) => kept.token_seed,
                None => {
                    identity::token_seed(&identity).map_err(|error| failed(errors::INTERNAL, "/dev/urandom", &error))?
                }
            };
            Node { identity, limits, token_seed, dmi }
        }
    };
    identity::save(&options.node_path(), &node)
        .map_err(|error| failed(errors::STORE_FAILED, &options.node_path().display().to_string(), &error))?;
    let identity = &node.identity;
    info!(instance = %identity.instance, kind = identity.instance_type, zone = identity.zone, "node identified");
    Ok(Identified { node, cloud, is_other_instance })
}

async fn ask_metadata(metadata: &Metadata) -> NodeIdentity {
    identity::retry_forever("identity of the node (metadata service)", || metadata.node_identity()).await
}

/// Checks the kept identity against the machine and, if it answers, the metadata service. Returns the identity that holds, and whether
/// that is another instance than the kept one.
async fn check_kept(
    kept: &Node,
    dmi: &machine::Dmi,
    monitor: &NetMonitor,
    metadata: &Metadata,
) -> (NodeIdentity, bool) {
    let macs: BTreeSet<_> = monitor.nics().into_iter().map(|nic| nic.mac).collect();
    let mut answer = tokio::time::timeout(CHECK_WITHIN, metadata.node_identity()).await.ok().and_then(Result::ok);
    loop {
        match machine::check((&kept.identity, &kept.dmi), &macs, dmi, answer.as_ref()) {
            Validity::Valid => return (answer.unwrap_or_else(|| kept.identity.clone()), false),
            Validity::Suspect(reason) => {
                warn!(reason, "the kept identity may be another machine's; waiting for the metadata service");
                answer = Some(ask_metadata(metadata).await);
            }
            Validity::OtherInstance(reason) => {
                error!(reason, "the state folder is another instance's (a cloned disk?); starting without it");
                return (answer.unwrap_or_else(|| kept.identity.clone()), true);
            }
        }
    }
}

fn cloud_client(
    options: &Options,
    config: &Config,
    identity: &NodeIdentity,
    observer: CallObserver,
) -> Result<Aliyun, Error> {
    let bad = |error: &dyn std::error::Error| failed(errors::CONFIG_INVALID, "endpoint", error);
    let region = config.region.as_deref().unwrap_or(&identity.region);
    let mut ecs = EcsConfig::for_region(region, options.endpoint_network(), reload::credentials(options, config))
        .map_err(|error| bad(&error))?;
    // An endpoint that is given has its scheme in it.
    ecs = ecs.with_scheme(options.endpoint_scheme());
    ecs.signature = options.signature();
    ecs.rate_limits.clone_from(&config.rate_limits);
    ecs.metadata = endpoint(&options.metadata).map_err(|error| bad(&error))?;
    ecs.observer = Some(observer);
    for (url, given) in [(&mut ecs.ecs_endpoint, &options.ecs_endpoint), (&mut ecs.vpc_endpoint, &options.vpc_endpoint)]
    {
        if let Some(given) = given {
            *url = endpoint(given).map_err(|error| bad(&error))?;
        }
    }
    Aliyun::new(&ecs).map_err(|error| failed(errors::CLOUD_FAILED, "client", &error))
}

/// Switches forwarding on, and collects the facts that plans depend on.
pub(super) async fn prepare(
    options: &Options,
    config: &Config,
    identified: &Identified,
    host: &Host,
) -> Result<NodeInfo, Error> {
    let identity = &identified.node.identity;
    let inputs = NodeInputs { v4: config.ip_stack.v4(), v6: config.ip_stack.v6(), ra_links: host.ra_links().await? };
    host.ensure_node(&NodePlan::forwarding(&inputs)).await?;
    let state = host.observe(BTreeSet::from([LOCAL_PORTS.to_owned()])).await?;
    let has_primary_mac = |mac| mac == Some(identity.primary_mac);
    let primary = state.links.iter().find(|(_, link)| has_primary_mac(link.mac) && link.kind.is_none());
    let primary = primary.or_else(|| state.links.iter().find(|(_, link)| has_primary_mac(link.mac)));
    let mut addresses = Addresses::default();
    let mut nic_mtu = 1500;
    match primary {
        Some((name, link)) => {
            nic_mtu = link.mtu;
            for (_, net) in state.addresses.iter().filter(|(dev, _)| dev == name) {
                match net.ip() {
                    std::net::IpAddr::V4(v4) if config.ip_stack.v4() => addresses.v4 = addresses.v4.or(Some(v4)),
                    std::net::IpAddr::V6(v6) if config.ip_stack.v6() && !v6.is_unicast_link_local() => {
                        addresses.v6 = addresses.v6.or(Some(v6));
                    }
                    _ => {}
                }
            }
        }
        None => warn!(mac = %identity.primary_mac, "no interface has the primary ENI's MAC address"),
    }
    Ok(NodeInfo {
        node: options.node_name(),
        identity: identity.clone(),
        stack: config.ip_stack,
        addresses,
        nic_mtu,
        subnets: options.subnets_path(),
        services: options.objects.is_some(),
        own_ports: own_ports(state.sysctls.get(LOCAL_PORTS).map(String::as_str)),
        nic_within: NIC_WITHIN / options.time_scale,
    })
}

/// The source ports for connections that are masqueraded, given those of the host's clients (`LOCAL_PORTS`).
fn own_ports(local: Option<&str>) -> RangeInclusive<u16> {
    let mut numbers = local.into_iter().flat_map(str::split_whitespace).map_while(|text| text.parse().ok());
    // Without IPv4 there is no such sysctl, and the kernel's default holds (net/ipv4/af_inet.c, inet_init_net).
    let local = numbers.next().unwrap_or(32_768)..=numbers.next().unwrap_or(60_999);
    let (ports, ours) = service::snat_port_range(&local);
    if !ours {
        warn!(
            ?local,
            ?ports,
            "{LOCAL_PORTS} leaves no ports over: masqueraded connections share these with the host's"
        );
    }
    ports
}
