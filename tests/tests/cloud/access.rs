//! Keys, roles, metadata tokens, and that none of them is ever shown.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use terway_core::cloud::ErrorClass;
use terway_daemon::cloud::{Aliyun, Cloud, CredentialSource, EcsConfig, EniFilter, Secret, SignatureMethod};
use terway_sim::cloud::{CloudConfig, Fault, FaultKind};

use crate::{KEY, KEY_SECRET, Rig, eventually, is, world};

#[tokio::test]
async fn wrong_access_key_error() {
    let rig = Rig::new(world()).await;
    for (id, secret, code) in
        [(KEY, "wrong", "SignatureDoesNotMatch"), ("LTAI-none", KEY_SECRET, "InvalidAccessKeyId.NotFound")]
    {
        let credentials = CredentialSource::AccessKey { id: Secret::new(id), secret: Secret::new(secret) };
        let cloud = Aliyun::new(&EcsConfig { credentials, ..rig.config() }).unwrap();
        is(cloud.enis(&EniFilter::default()).await.unwrap_err(), ErrorClass::Forbidden, code);
    }
    let elsewhere = EcsConfig { region: "cn-other".into(), ..rig.config() };
    let error = Aliyun::new(&elsewhere).unwrap().enis(&EniFilter::default()).await.unwrap_err();
    is(error, ErrorClass::Invalid, "InvalidRegionId.NotFound");
}

#[tokio::test]
async fn role_keys_are_fetched_and_replaced_when_refused() {
    let rig = Rig::new(world()).await;
    let cloud = Arc::new(Aliyun::new(&rig.by_role()).unwrap());
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let cloud = Arc::clone(&cloud);
        callers.spawn(async move { cloud.enis(&EniFilter::default()).await });
    }
    for result in callers.join_all().await {
        result.unwrap();
    }
    // A token, the role's name, its keys: once for all eight callers.
    assert_eq!(rig.total("metadata"), 3);
    rig.sim.expire_role_keys();
    cloud.enis(&EniFilter::default()).await.unwrap();
    assert_eq!(rig.refused("DescribeNetworkInterfaces")["InvalidSecurityToken.Expired"], 1);
    assert_eq!(rig.total("metadata"), 5);

    rig.sim.forget_metadata_tokens();
    rig.sim.expire_role_keys();
    cloud.enis(&EniFilter::default()).await.unwrap();
    assert_eq!(rig.refused("metadata"), BTreeMap::from([("401".to_owned(), 1)]));
}

#[tokio::test]
async fn role_keys_are_renewed_before_they_expire() {
    let rig = Rig::new(CloudConfig { role_keys_ms: 3000, ..world() }).await;
    let cloud = Aliyun::new(&rig.by_role()).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(5000) {
        cloud.enis(&EniFilter::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(rig.refused("DescribeNetworkInterfaces"), BTreeMap::new(), "no call was signed with an expired key");
    let metadata = rig.total("metadata");
    assert!((1 + 2 * 3..40).contains(&metadata), "{metadata} requests for keys: renewed, but not at every call");
    // While the metadata service is away, keys that are good go on being used, and only then fail.
    rig.sim.set_faults(vec![Fault::refuse("metadata", 100_000, "", 503)]);
    cloud.enis(&EniFilter::default()).await.unwrap();
    eventually("the keys expire", async || cloud.enis(&EniFilter::default()).await.is_err()).await;
    rig.sim.set_faults(Vec::new());
    cloud.enis(&EniFilter::default()).await.unwrap();
}

#[tokio::test]
async fn metadata_v2_token() {
    let rig = Rig::new(world()).await;
    terway_daemon::cloud::tls::ready();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = |path: &str| format!("{}/latest/{path}", rig.address);
    let status = async |request: reqwest::RequestBuilder| request.send().await.unwrap().status().as_u16();
    assert_eq!(status(http.get(url("meta-data/instance-id"))).await, 403);
    let token = http.get(url("meta-data/instance-id")).header("x-aliyun-ecs-metadata-token", "guess");
    assert_eq!(status(token).await, 401);
    let ttl = http.put(url("api/token")).header("x-aliyun-ecs-metadata-token-ttl-seconds", "99999");
    assert_eq!(status(ttl).await, 400);
    let two = rig.sim.enis()[1].mac;
    is(rig.client().metadata().nic(two).await.unwrap_err(), ErrorClass::NotFound, "404");
    // The rule of the fabric: the address says who asks.
    rig.sim.set_caller_resolver(Arc::new(|from| {
        (from.ip() != IpAddr::from(Ipv4Addr::LOCALHOST)).then(|| "one".to_owned())
    }));
    is(rig.client().node_identity().await.unwrap_err(), ErrorClass::NotFound, "404");
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The log is the process's: what the tests running beside this one log is looked at as well.
#[tokio::test]
async fn no_secret_is_shown_anywhere() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let rig = Rig::new(world()).await;
    let mut shown = String::new();
    let hmac = |config| EcsConfig { signature: SignatureMethod::HmacSha1, ..config };
    for config in [rig.config(), rig.by_role(), hmac(rig.config()), hmac(rig.by_role())] {
        shown += &format!("{config:?} {:#?}", config.credentials);
        let cloud = Aliyun::new(&config).unwrap();
        cloud.enis(&EniFilter::default()).await.unwrap();
        rig.sim.expire_role_keys();
        rig.sim.forget_metadata_tokens();
        cloud.enis(&EniFilter::default()).await.unwrap();
        for kind in [
            FaultKind::LoseReply,
            FaultKind::Garble,
            FaultKind::Error { code: "SignatureDoesNotMatch".into(), status: 400 },
            FaultKind::Error { code: "InvalidSecurityToken.Expired".into(), status: 400 },
        ] {
            rig.sim.set_faults(vec![Fault::next("*", 100, kind)]);
            let error = cloud.enis(&EniFilter::default()).await.unwrap_err();
            shown += &format!("{error} {error:?}");
        }
        rig.sim.set_faults(Vec::new());
    }
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for wanted in
        ["cloud_call{api=\"DescribeNetworkInterfaces\"", "latency_ms=", "request_id=", "cloud call failed", "NodeRole"]
    {
        assert!(logged.contains(wanted), "the log is looked at at all: {wanted}");
    }
    for secret in [KEY_SECRET, KEY, "sts-secret", "sts-token", "STS.sim", "metadata-token-1", "Signature="] {
        assert!(!shown.contains(secret), "{secret} in an error or Debug");
        let line = logged.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} in the log: {line:?}");
    }
}
