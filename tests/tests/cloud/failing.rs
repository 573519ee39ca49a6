//! The cloud is slow, silent, throttled, lossy or has another clock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terway_core::cloud::{EniKind, EniStatus, ErrorClass};
use terway_daemon::cloud::{Aliyun, Cloud, EcsConfig, EniFilter, ObservedCall};
use terway_sim::cloud::{CloudConfig, Fault, FaultKind};

use crate::{Rig, attached, eventually, is, one, request, world};

#[tokio::test]
async fn endpoint_unreachable() {
    let rig = Rig::new(world()).await;
    let config = rig.config();
    rig.server.abort();
    eventually("the port is closed", async || tokio::net::TcpStream::connect(&rig.address[7..]).await.is_err()).await;
    let cloud = Aliyun::new(&config).unwrap();
    is(cloud.describe_eni(&"eni-x".into()).await.unwrap_err(), ErrorClass::Unknown, "");
    is(cloud.node_identity().await.unwrap_err(), ErrorClass::Unknown, "");
}

#[tokio::test]
async fn lost_reply_is_retried() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    rig.sim.set_faults(
        ["CreateNetworkInterface", "AttachNetworkInterface", "AssignPrivateIpAddresses", "AssignIpv6Addresses"]
            .into_iter()
            .chain(["UnassignPrivateIpAddresses", "UnassignIpv6Addresses", "DetachNetworkInterface"])
            .chain(["DeleteNetworkInterface", "metadata"])
            .map(|action| Fault::next(action, 1, FaultKind::LoseReply))
            .collect(),
    );
    let eni = attached(&cloud, "t1", 2).await;
    assert_eq!(rig.sim.enis().len(), 3, "one ENI, not two");
    let v4 = cloud.assign_v4(&eni.id, 3, "t2").await.unwrap();
    let v6 = cloud.assign_v6(&eni.id, 3, "t3").await.unwrap();
    let now = cloud.describe_eni(&eni.id).await.unwrap();
    assert_eq!((now.v4[2..].to_vec(), now.v6), (v4.clone(), v6.clone()));
    cloud.unassign_v4(&eni.id, &v4[..2]).await.unwrap();
    cloud.unassign_v6(&eni.id, &v6).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().v4, [eni.v4[0], eni.v4[1], v4[2]]);
    // One of these is there, the other is not: the present one goes.
    cloud.unassign_v4(&eni.id, &v4[1..]).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().v4, eni.v4);
    cloud.subnet(eni.mac).await.unwrap();
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::Available, Duration::from_secs(5)).await.unwrap();
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.delete_eni(&eni.id).await.unwrap();
    cloud.delete_eni(&eni.id).await.unwrap();
    cloud.unassign_v4(&eni.id, &v4).await.unwrap();
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    assert_eq!(rig.sim.enis().len(), 2);
    let lost: u64 = rig.sim.calls().values().map(|calls| calls.lost).sum();
    assert_eq!(lost, 9, "every fault struck");
}

#[tokio::test]
async fn late_reply_has_one_effect() {
    let rig = Rig::new(world()).await;
    let cloud = Aliyun::new(&EcsConfig { timeout: Duration::from_millis(150), ..rig.config() }).unwrap();
    rig.sim.set_faults(vec![Fault::next("CreateNetworkInterface", 1, FaultKind::Delay { ms: 400 })]);
    let eni = cloud.create_eni(&request("t1", "vsw-a", 1)).await.unwrap();
    // The first request is still under way in the cloud, although its sender hung up.
    eventually("both requests have ended", async || rig.total("CreateNetworkInterface") == 2).await;
    let enis = cloud.enis(&EniFilter { kind: Some(EniKind::Secondary), ..EniFilter::default() }).await.unwrap();
    assert_eq!(enis, [eni]);
}

#[tokio::test]
async fn throttling_backs_off() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    rig.sim.set_faults(vec![Fault::refuse("AssignPrivateIpAddresses", 3, "Throttling.User", 400)]);
    let eni = cloud.create_eni(&request("t1", "vsw-a", 1)).await.unwrap();
    assert_eq!(cloud.assign_v4(&eni.id, 1, "t2").await.unwrap().len(), 1);
    assert_eq!(rig.refused("AssignPrivateIpAddresses"), BTreeMap::from([("Throttling.User".to_owned(), 3)]));
    rig.sim.set_faults(vec![Fault::refuse("AssignPrivateIpAddresses", 2, "Operation.Conflict", 409)]);
    assert_eq!(cloud.assign_v4(&eni.id, 1, "t3").await.unwrap().len(), 1);

    // The client's own limit: a minute's worth at once, then one every ten seconds.
    let limited = EcsConfig { rate_limits: BTreeMap::from([("DescribeInstanceTypes".into(), 6)]), ..rig.config() };
    let cloud = Aliyun::new(&limited).unwrap();
    for _ in 0..6 {
        cloud.instance_limits("ecs.test").await.unwrap();
    }
    let seventh = tokio::time::timeout(Duration::from_millis(200), cloud.instance_limits("ecs.test"));
    assert!(seventh.await.is_err(), "waits for its turn");
    assert_eq!(rig.total("DescribeInstanceTypes"), 6);
}

#[tokio::test]
async fn server_rate_limit_is_retried() {
    let rig = Rig::new(CloudConfig { rate_limits: BTreeMap::from([("DescribeVSwitches".into(), 1)]), ..world() }).await;
    let cloud = rig.client();
    cloud.vswitches(&["vsw-a".into()]).await.unwrap();
    is(cloud.vswitches(&["vsw-a".into()]).await.unwrap_err(), ErrorClass::Throttled, "Throttling.User");
    assert_eq!(rig.total("DescribeVSwitches"), 6);
    // Another action has its own bucket.
    cloud.enis(&EniFilter::default()).await.unwrap();
}

#[tokio::test]
async fn clock_skew_is_corrected() {
    for offset in [-3600, 3600, 86_400 * 400] {
        let rig = Rig::new(CloudConfig { clock_offset: offset, ..world() }).await;
        let cloud = rig.client();
        for _ in 0..3 {
            cloud.enis(&EniFilter::default()).await.unwrap();
        }
        assert_eq!(
            rig.refused("DescribeNetworkInterfaces"),
            BTreeMap::from([("InvalidTimeStamp.Expired".to_owned(), 1)]),
            "one refusal teaches the client, clock ahead by {offset} s"
        );
    }
}

#[tokio::test]
async fn metadata_outage_is_retried() {
    let rig = Rig::new(world()).await;
    rig.sim.set_faults(vec![Fault::refuse("metadata", 2, "", 503), Fault::refuse("metadata", 3, "", 429)]);
    rig.client().node_identity().await.unwrap();
    assert_eq!(rig.refused("metadata").len(), 2);
}

#[tokio::test]
async fn every_call_is_observed() {
    let rig = Rig::new(world()).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let observer = Arc::new(move |call: &ObservedCall<'_>| {
        assert!(!call.duration.is_zero());
        log.lock().unwrap().push(format!("{}:{}", call.api, call.error_label()));
    });
    let cloud = Aliyun::new(&EcsConfig { observer: Some(observer), ..rig.config() }).unwrap();
    rig.sim.set_faults(vec![
        Fault::refuse("DescribeVSwitches", 1, "ServiceUnavailable", 503),
        Fault::next("DescribeNetworkInterfaces", 1, FaultKind::LoseReply),
    ]);
    cloud.vswitches(&["vsw-a".into()]).await.unwrap();
    cloud.enis(&EniFilter::default()).await.unwrap();
    cloud.metadata().macs().await.unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        [
            "DescribeVSwitches:ServiceUnavailable",
            "DescribeVSwitches:",
            "DescribeNetworkInterfaces:Unknown",
            "DescribeNetworkInterfaces:",
            "metadata:",
            "metadata:"
        ]
    );
}

#[tokio::test]
async fn parallel_callers_share_one_failure() {
    let rig = Rig::new(world()).await;
    let cloud = Arc::new(Aliyun::new(&rig.by_role()).unwrap());
    rig.sim.set_faults(vec![Fault::refuse("metadata", 100_000, "", 503)]);
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let cloud = Arc::clone(&cloud);
        callers.spawn(async move { cloud.enis(&EniFilter::default()).await });
    }
    for result in callers.join_all().await {
        is(result.unwrap_err(), ErrorClass::Unknown, "503");
    }
    assert_eq!(rig.total("metadata"), 5, "one attempt with four repetitions, not one for each of twenty callers");
    rig.sim.set_faults(Vec::new());
    cloud.enis(&EniFilter::default()).await.unwrap();
}
