//! The OpenAPI and metadata client against the simulated cloud, over real HTTP with real signatures.

#![allow(clippy::unwrap_used, reason = "in a suite, an unwrap is an assertion")]

mod access;
mod calls;
mod conditions;
mod failing;
mod keys;
mod prefixes;
mod server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::cloud::{CloudError, Eni, EniStatus, ErrorClass};
use terway_core::ident::{InstanceId, SecurityGroupId, VSwitchId};
use terway_daemon::cloud::{
    Aliyun, Cloud, CreateEni, CredentialSource, EcsConfig, EndpointNetwork, Retry, Secret, endpoint,
};
use terway_sim::cloud::{CloudConfig, CloudSim, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use terway_sim::fabric::{Fabric, NoFabric};
use tokio::net::TcpListener;

const KEY: &str = "LTAI-the-key-id";
const KEY_SECRET: &str = "the-secret-of-the-key";

fn world() -> CloudConfig {
    let vswitch = |id: &str, zone: &str, v4: &str, v6: Option<&str>| VSwitchConfig {
        id: id.into(),
        zone: zone.into(),
        cidr_v4: v4.parse().unwrap(),
        cidr_v6: v6.map(|block| block.parse().unwrap()),
    };
    let instance = |node: &str| InstanceConfig {
        node: node.into(),
        id: format!("i-{node}"),
        instance_type: "ecs.test".into(),
        vswitch: "vsw-a".into(),
        primary_v4: None,
        role: Some("NodeRole".into()),
    };
    CloudConfig {
        vswitches: vec![
            vswitch("vsw-a", "zone-a", "10.0.0.0/16", Some("fd00:a::/64")),
            vswitch("vsw-tiny", "zone-a", "10.1.0.0/29", None),
            vswitch("vsw-b", "zone-b", "10.2.0.0/24", None),
        ],
        security_groups: vec!["sg-1".into(), "sg-2".into()],
        instance_types: vec![InstanceTypeConfig {
            id: "ecs.test".into(),
            adapters: 3,
            v4_per_adapter: 20,
            v6_per_adapter: 20,
        }],
        instances: vec![instance("one"), instance("two")],
        access_keys: BTreeMap::from([(KEY.to_owned(), KEY_SECRET.to_owned())]),
        ..CloudConfig::default()
    }
}

struct Rig {
    sim: CloudSim,
    address: String,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Rig {
    async fn new(config: CloudConfig) -> Self {
        Self::with_fabric(config, Arc::new(NoFabric)).await
    }

    async fn with_fabric(config: CloudConfig, fabric: Arc<dyn Fabric>) -> Self {
        let sim = CloudSim::new(config, fabric).unwrap();
        // All callers come from 127.0.0.1 here.
        sim.set_caller_resolver(Arc::new(|_| Some("one".to_owned())));
        sim.power_on("one").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let serving = sim.clone();
        let server = tokio::spawn(async move { serving.serve(listener).await });
        Self { sim, address, server }
    }

    /// The address of an admin endpoint.
    async fn admin(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let serving = self.sim.clone();
        tokio::spawn(async move { serving.serve_admin(listener).await });
        address
    }

    fn config(&self) -> EcsConfig {
        let credentials = CredentialSource::AccessKey { id: Secret::new(KEY), secret: Secret::new(KEY_SECRET) };
        let at = endpoint(&self.address).unwrap();
        EcsConfig {
            ecs_endpoint: at.clone(),
            vpc_endpoint: at.clone(),
            metadata: at,
            retry: Retry {
                times: 4,
                first: Duration::from_millis(5),
                longest: Duration::from_millis(20),
                within: Duration::from_secs(10),
            },
            poll: Duration::from_millis(10),
            ..EcsConfig::for_region("cn-sim", EndpointNetwork::Vpc, credentials).unwrap()
        }
    }

    fn by_role(&self) -> EcsConfig {
        EcsConfig { credentials: CredentialSource::RamRole { role: None }, ..self.config() }
    }

    fn client(&self) -> Aliyun {
        Aliyun::new(&self.config()).unwrap()
    }

    fn total(&self, action: &str) -> u64 {
        self.sim.calls().get(action).map_or(0, |calls| calls.total)
    }

    fn refused(&self, action: &str) -> BTreeMap<String, u64> {
        self.sim.calls().remove(action).unwrap_or_default().refused
    }
}

fn request(token: &str, vswitch: &str, v4_count: u32) -> CreateEni {
    CreateEni {
        token: token.to_owned(),
        vswitch: VSwitchId::new(vswitch),
        security_groups: vec![SecurityGroupId::new("sg-1")],
        v4_count,
        v6_count: 0,
        v4_prefixes: 0,
        v6_prefixes: 0,
        tags: BTreeMap::new(),
        resource_group: None,
    }
}

fn one() -> InstanceId {
    InstanceId::new("i-one")
}

async fn attached(cloud: &Aliyun, token: &str, v4_count: u32) -> Eni {
    let eni = cloud.create_eni(&request(token, "vsw-a", v4_count)).await.unwrap();
    cloud.attach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::InUse, Duration::from_secs(5)).await.unwrap()
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(5), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn is(error: CloudError, class: ErrorClass, code: &str) {
    assert_eq!((error.class, error.code.as_str()), (class, code), "{error}");
}
