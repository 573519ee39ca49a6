//! Where keys come from, and that they can be replaced at any time.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use terway_core::cloud::ErrorClass;
use terway_daemon::cloud::{Aliyun, Cloud, CredentialSource, EcsConfig, EniFilter, Secret, SignatureMethod};
use terway_sim::cloud::{AdminAction, CloudConfig, Fault, FaultKind};

use crate::{KEY, KEY_SECRET, Rig, attached, eventually, is, request, world};

fn pair(id: &str, secret: &str) -> (Secret, Secret) {
    (Secret::new(id), Secret::new(secret))
}

fn write_pair(folder: &Path, id: &str, secret: &str) {
    std::fs::write(folder.join("access-key-id"), id).unwrap();
    std::fs::write(folder.join("access-key-secret"), secret).unwrap();
}

fn write_token(path: &Path, serial: u32, lifetime: Duration) {
    let expiration = humantime(SystemTime::now() + lifetime);
    let text = json!({
        "access_key_id": format!("STS.file-{serial}"), "access_key_secret": format!("file-secret-{serial}"),
        "security_token": format!("file-token-{serial}"), "expiration": expiration,
    });
    std::fs::write(path, text.to_string()).unwrap();
}

fn humantime(at: SystemTime) -> String {
    ::humantime::format_rfc3339_millis(at).to_string()
}

async fn works(config: EcsConfig, source: CredentialSource) -> Result<(), terway_core::cloud::CloudError> {
    let cloud = Aliyun::new(&EcsConfig { credentials: source, ..config }).unwrap();
    cloud.enis(&EniFilter::default()).await.map(drop)
}

/// Each link alone, and that an earlier one hides a later one that would work.
#[tokio::test]
async fn credential_chain_order() {
    let rig = Rig::new(world()).await;
    let dir = tempfile::tempdir().unwrap();
    let (folder, none, token) = (dir.path(), dir.path().join("none"), dir.path().join("token"));
    rig.sim.add_temporary_key("STS.file-1", "file-secret-1", "file-token-1", Duration::from_secs(600));
    let (good, bad) = (pair(KEY, KEY_SECRET), pair("LTAI-bad", "x"));
    let source = CredentialSource::chain;
    works(rig.config(), source(&none, Some(good.clone()), None)).await.unwrap();
    assert_eq!(rig.total("metadata"), 0);
    works(rig.config(), source(&none, None, Some(&token))).await.unwrap();
    assert_eq!(rig.total("metadata"), 3, "no token file yet: by the role");
    write_token(&token, 1, Duration::from_secs(600));
    works(rig.config(), source(&none, None, Some(&token))).await.unwrap();
    assert_eq!(rig.total("metadata"), 3);
    let hidden = works(rig.config(), source(&none, Some(bad.clone()), Some(&token))).await.unwrap_err();
    is(hidden, ErrorClass::Forbidden, "InvalidAccessKeyId.NotFound");
    write_pair(folder, KEY, KEY_SECRET);
    works(rig.config(), source(folder, Some(bad), Some(&token))).await.unwrap();
    write_pair(folder, "LTAI-bad", "x");
    let hidden = works(rig.config(), source(folder, Some(good), None)).await.unwrap_err();
    is(hidden, ErrorClass::Forbidden, "InvalidAccessKeyId.NotFound");
    // There and not usable: told, not passed over.
    std::fs::write(&token, r#"{"access.key.id":"Y2lwaGVy","access.key.secret":"c2VjcmV0","security.token":"dG9r","expiration":"x","keyring":"k"}"#)
        .unwrap();
    let error = works(rig.config(), source(&none, None, Some(&token))).await.unwrap_err();
    assert!(error.message.contains("encrypted") && !error.message.contains("Y2lwaGVy"), "{error}");
    assert_eq!(error.explain().code.name, "credentials-invalid");
}

#[tokio::test]
async fn missing_credentials_error() {
    let mut config = world();
    config.instances.iter_mut().for_each(|instance| instance.role = None);
    let rig = Rig::new(config).await;
    let error = works(rig.config(), CredentialSource::chain(Path::new("/none"), None, None)).await.unwrap_err();
    assert_eq!(error.explain().code.name, "credentials-missing", "{error}");
    assert_eq!(rig.total("DescribeNetworkInterfaces"), 0);
}

#[tokio::test]
async fn a_token_file_is_read_again_when_its_keys_are_refused_or_expire() {
    let rig = Rig::new(world()).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let lifetime = Duration::from_millis(1500);
    rig.sim.add_temporary_key("STS.file-1", "file-secret-1", "file-token-1", lifetime);
    write_token(&path, 1, lifetime);
    let credentials = CredentialSource::TokenFile { path: path.clone() };
    let cloud = Aliyun::new(&EcsConfig { credentials, ..rig.config() }).unwrap();
    cloud.enis(&EniFilter::default()).await.unwrap();
    // Refused ahead of its time, and a successor is in the file.
    rig.sim.apply(AdminAction::ExpireKeys).unwrap();
    rig.sim.add_temporary_key("STS.file-2", "file-secret-2", "file-token-2", lifetime);
    write_token(&path, 2, lifetime);
    cloud.enis(&EniFilter::default()).await.unwrap();
    assert_eq!(rig.refused("DescribeNetworkInterfaces")["InvalidSecurityToken.Expired"], 1);
    // Nobody replaces it: good until its end, then told by its name.
    tokio::time::sleep(lifetime + Duration::from_millis(100)).await;
    let error = cloud.enis(&EniFilter::default()).await.unwrap_err();
    assert_eq!(error.explain().code.name, "credentials-expired", "{error}");
    rig.sim.add_temporary_key("STS.file-3", "file-secret-3", "file-token-3", lifetime);
    write_token(&path, 3, lifetime);
    cloud.enis(&EniFilter::default()).await.unwrap();
    assert_eq!(rig.refused("DescribeNetworkInterfaces").len(), 1, "no call went out with keys known to be expired");
}

#[tokio::test]
async fn keys_and_limits_are_replaced_live() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    cloud.enis(&EniFilter::default()).await.unwrap();
    rig.sim.apply(AdminAction::RevokeKey { id: KEY.into() }).unwrap();
    rig.sim.apply(AdminAction::AddKey { id: "LTAI-new".into(), secret: "new".into() }).unwrap();
    let refused = cloud.enis(&EniFilter::default()).await.unwrap_err();
    is(refused, ErrorClass::Forbidden, "InvalidAccessKeyId.NotFound");
    let (id, secret) = pair("LTAI-new", "new");
    cloud.set_credentials(CredentialSource::AccessKey { id, secret });
    cloud.enis(&EniFilter::default()).await.unwrap();

    let soon = Duration::from_millis(300);
    cloud.set_rate_limits(&BTreeMap::from([("DescribeInstanceTypes".into(), 1)]));
    cloud.instance_limits("ecs.test").await.unwrap();
    assert!(tokio::time::timeout(soon, cloud.instance_limits("ecs.test")).await.is_err(), "waits for its turn");
    cloud.set_rate_limits(&BTreeMap::new());
    tokio::time::timeout(soon, cloud.instance_limits("ecs.test")).await.unwrap().unwrap();
}

/// The older signature does all that the newer does; the server was written from its page, not from this client.
#[tokio::test]
async fn hmac_sha1_signs_every_kind_of_call() {
    let rig = Rig::new(world()).await;
    for (n, config) in [rig.config(), rig.by_role()].into_iter().enumerate() {
        let cloud = Aliyun::new(&EcsConfig { signature: SignatureMethod::HmacSha1, ..config }).unwrap();
        let eni = attached(&cloud, &format!("t{n}"), 2).await;
        let tags = BTreeMap::from([("a b*~/+é=&".to_owned(), "c".to_owned())]);
        let tagged = terway_daemon::cloud::CreateEni { tags: tags.clone(), ..request(&format!("u{n}"), "vsw-a", 1) };
        assert_eq!(cloud.create_eni(&tagged).await.unwrap().tags, tags);
        let v4 = cloud.assign_v4(&eni.id, 2, &format!("v{n}")).await.unwrap();
        cloud.unassign_v4(&eni.id, &v4).await.unwrap();
        rig.sim.expire_role_keys();
        cloud.vswitches(&["vsw-a".into()]).await.unwrap();
    }
    let config = EcsConfig { signature: SignatureMethod::HmacSha1, ..rig.config() };
    let (id, secret) = pair(KEY, "wrong");
    let error = works(config.clone(), CredentialSource::AccessKey { id, secret }).await.unwrap_err();
    is(error, ErrorClass::Forbidden, "SignatureDoesNotMatch");
    rig.sim.set_clock_offset(7200);
    let cloud = Aliyun::new(&config).unwrap();
    cloud.enis(&EniFilter::default()).await.unwrap();
}

/// While the source of the keys is away, no call waits for it as long as there are good keys.
#[tokio::test]
async fn credential_source_outage() {
    let rig = Rig::new(CloudConfig { role_keys_ms: 4000, ..world() }).await;
    let cloud = Aliyun::new(&rig.by_role()).unwrap();
    cloud.enis(&EniFilter::default()).await.unwrap();
    let slow = Fault::next("metadata/ram", 1000, FaultKind::Delay { ms: 700 });
    let down = Fault::refuse("metadata/ram", 1000, "", 503);
    rig.sim.set_faults(vec![slow, down]);
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    while began.elapsed() < Duration::from_millis(3500) {
        let call = Instant::now();
        cloud.enis(&EniFilter::default()).await.unwrap();
        longest = longest.max(call.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(rig.refused("metadata").contains_key("503"), "it was asked meanwhile");
    assert!(longest < Duration::from_millis(600), "{longest:?}");
    // The other parts of the service answer all the while.
    cloud.node_identity().await.unwrap();
    rig.sim.set_faults(Vec::new());
    eventually("recovered", async || cloud.enis(&EniFilter::default()).await.is_ok()).await;
}
