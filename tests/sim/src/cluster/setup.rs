//! What the cloud of a cluster consists of: addresses, vSwitches, instances, keys, and where its servers listen.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnetwork::{Ipv4Network, Ipv6Network};
use serde_json::{Value, json};
use terway_core::cidr;
use terway_core::config::merge;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::Options;
use crate::cloud::{CloudConfig, CloudSim, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use crate::fabric::Fabric;
use crate::fabric::vpc::Vpc;
use crate::node::Node;

/// Where every instance finds the metadata service.
const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

/// Where the ECS and VPC endpoint is: in the range that every VPC routes to the cloud's own services.
const ENDPOINT: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 201);
pub(super) const ENDPOINT_URL: &str = "http://100.100.100.201";

/// The blocks of the pods' vSwitch.
pub(super) const PODS_V4: Ipv4Network = cidr::v4(Ipv4Addr::new(10, 0, 4, 0), 22);
pub(super) const PODS_V6: Ipv6Network = cidr::v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 4, 0, 0, 0, 0), 64);

/// The blocks of the nodes' vSwitch.
const NODES_V4: Ipv4Network = cidr::v4(Ipv4Addr::new(10, 0, 0, 0), 24);
const NODES_V6: Ipv6Network = cidr::v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 64);

/// The host of the VPC that is no node.
pub(super) const EXTERNAL_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 5);
pub(super) const EXTERNAL_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0x99, 0, 0, 0, 5);

const ZONE: &str = "cn-sim-a";
const INSTANCE_TYPE: &str = "ecs.sim.large";
const KEY: &str = "LTAI-sim";
const SECRET: &str = "a secret of nobody";

/// The cloud and its servers; they end on drop.
pub struct CloudHandle {
    sim: CloudSim,
    servers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for CloudHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudHandle").finish_non_exhaustive()
    }
}

impl Deref for CloudHandle {
    type Target = CloudSim;

    fn deref(&self) -> &CloudSim {
        &self.sim
    }
}

impl Drop for CloudHandle {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
    }
}

/// The document `eni_conf` of every node.
pub(super) fn eni_conf(options: &Options) -> Value {
    let (min, max) = options.pool;
    let mut document = json!({
        "version": "1",
        "ip_stack": options.ip_stack,
        "vswitches": {ZONE: ["vsw-pods"]},
        "security_group": "sg-sim",
        "min_pool_size": min,
        "max_pool_size": max,
        "service_cidr": "172.16.0.0/16",
        "access_key": KEY,
        "access_secret": SECRET,
    });
    if !options.conf.is_null() {
        merge(&mut document, options.conf.clone());
    }
    document
}

/// Starts the cloud's servers inside the VPC and powers the instances on.
pub(super) fn start_cloud(options: &Options, nodes: &[Node], vpc: &Arc<Vpc>, runtime: &Runtime) -> Result<CloudHandle> {
    let vswitch = |id: &str, cidr_v4, cidr_v6| VSwitchConfig {
        id: id.to_owned(),
        zone: ZONE.to_owned(),
        cidr_v4,
        cidr_v6: Some(cidr_v6),
    };
    let (attach, nic_delay) = options.attach;
    let mut config = CloudConfig {
        vpc_cidr: cidr::v4(Ipv4Addr::new(10, 0, 0, 0), 8),
        vswitches: vec![vswitch("vsw-nodes", NODES_V4, NODES_V6), vswitch("vsw-pods", PODS_V4, PODS_V6)],
        security_groups: vec!["sg-sim".to_owned()],
        instance_types: vec![InstanceTypeConfig {
            id: INSTANCE_TYPE.to_owned(),
            adapters: options.adapters,
            v4_per_adapter: options.addresses_per_adapter,
            v6_per_adapter: options.addresses_per_adapter,
        }],
        instances: nodes
            .iter()
            .map(|node| InstanceConfig {
                node: node.name().to_owned(),
                id: format!("i-{}", node.name()),
                instance_type: INSTANCE_TYPE.to_owned(),
                vswitch: "vsw-nodes".to_owned(),
                primary_v4: None,
                role: None,
            })
            .collect(),
        access_keys: BTreeMap::from([(KEY.to_owned(), SECRET.to_owned())]),
        attach_ms: u64::try_from(attach.as_millis())?,
        nic_delay_ms: u64::try_from(nic_delay.as_millis())?,
        ..CloudConfig::default()
    };
    (options.cloud)(&mut config);
    let sim = CloudSim::new(config, Arc::clone(vpc) as Arc<dyn Fabric>)?;
    let mut servers = Vec::new();
    for address in [METADATA, ENDPOINT] {
        // Bound inside the VPC's namespace; a socket stays in the namespace it was made in.
        let listener = vpc.listen((address, 80).into())?;
        listener.set_nonblocking(true)?;
        let _context = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let sim = sim.clone();
        servers.push(runtime.spawn(async move {
            if let Err(error) = sim.serve(listener).await {
                tracing::error!(%error, "the cloud's server at {address} ended");
            }
        }));
    }
    let handle = CloudHandle { sim, servers };
    runtime.block_on(async {
        for node in nodes {
            handle.power_on(node.name()).await.with_context(|| format!("power {} on", node.name()))?;
        }
        anyhow::Ok(())
    })?;
    Ok(handle)
}
