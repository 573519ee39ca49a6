//! Every call, done well and refused for its real reasons.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use terway_core::cloud::{EniKind, EniStatus, ErrorClass};
use terway_core::ident::{EniId, VSwitchId};
use terway_daemon::cloud::{Cloud, CreateEni, EniFilter, MAX_ADDRESSES_PER_CALL};
use terway_sim::cloud::{CloudConfig, Fault, FaultKind};

use crate::{Rig, attached, eventually, is, one, request, world};

#[tokio::test]
async fn instance_type_limits() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let me = cloud.node_identity().await.unwrap();
    assert_eq!((me.instance.as_str(), me.region.as_str(), me.zone.as_str()), ("i-one", "cn-sim", "zone-a"));
    let limits = cloud.instance_limits(&me.instance_type).await.unwrap();
    assert_eq!((limits.adapters, limits.v4_per_adapter, limits.v6_per_adapter), (3, 20, 20));
    is(cloud.instance_limits("ecs.none").await.unwrap_err(), ErrorClass::NotFound, "");

    let ids = ["vsw-b", "vsw-none", "vsw-a"].map(VSwitchId::from);
    let found = cloud.vswitches(&ids).await.unwrap();
    assert_eq!(found.iter().map(|vswitch| vswitch.id.as_str()).collect::<Vec<_>>(), ["vsw-b", "vsw-a"]);
    // 256 without the first and the last three; the two primary ENIs have theirs from vsw-a.
    assert_eq!(found[0].available, 252);
    assert_eq!(found[1].available, 65536 - 4 - 2);
    assert_eq!(found[1].cidr_v6, Some("fd00:a::/64".parse().unwrap()));

    let enis = cloud.enis(&EniFilter::of_instance(&me.instance)).await.unwrap();
    assert_eq!(enis.len(), 1);
    assert_eq!((enis[0].kind, enis[0].mac), (EniKind::Primary, me.primary_mac));
}

#[tokio::test]
async fn eni_lifecycle() {
    let rig = Rig::new(CloudConfig { attach_ms: 60, nic_delay_ms: 60, detach_ms: 60, ..world() }).await;
    let cloud = rig.client();
    let before = cloud.vswitches(&["vsw-a".into()]).await.unwrap();
    let tags = BTreeMap::from([("cluster".to_owned(), "c 1/2&=".to_owned()), ("empty".to_owned(), String::new())]);
    let wanted = CreateEni {
        security_groups: vec!["sg-1".into(), "sg-2".into()],
        v6_count: 2,
        tags: tags.clone(),
        ..request("t1", "vsw-a", 3)
    };
    let eni = cloud.create_eni(&wanted).await.unwrap();
    assert_eq!((eni.v4.len(), eni.v6.len(), eni.status), (3, 2, EniStatus::Available));
    assert_eq!((eni.primary_v4, &eni.tags, eni.security_groups.len()), (eni.v4[0], &tags, 2));
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap(), eni);
    let tagged = EniFilter { tags: tags.clone(), status: Some(EniStatus::Available), ..EniFilter::default() };
    assert_eq!(cloud.enis(&tagged).await.unwrap().len(), 1);

    cloud.attach_eni(&eni.id, &one()).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().status, EniStatus::Attaching);
    is(
        cloud.assign_v4(&eni.id, 1, "t2").await.unwrap_err(),
        ErrorClass::InvalidState,
        "InvalidOperation.InvalidEniState",
    );
    let in_use = cloud.wait_eni(&eni.id, EniStatus::InUse, Duration::from_secs(5)).await.unwrap();
    assert_eq!(in_use.instance, Some(one()));
    // The API says InUse before the NIC is there.
    is(cloud.subnet(eni.mac).await.unwrap_err(), ErrorClass::NotFound, "404");
    eventually("the NIC arrives", async || cloud.subnet(eni.mac).await.is_ok()).await;
    let subnet = cloud.subnet(eni.mac).await.unwrap();
    assert_eq!(subnet.cidr_v4, "10.0.0.0/16".parse().unwrap());
    assert_eq!(subnet.gateway_v4, Ipv4Addr::new(10, 0, 255, 253));
    assert_eq!(subnet.gateway_v6, Some("fd00:a::ffff:ffff:ffff:fffd".parse().unwrap()));
    assert_eq!(subnet.cidr_v6, Some("fd00:a::/64".parse().unwrap()));

    let v4 = cloud.assign_v4(&eni.id, MAX_ADDRESSES_PER_CALL, "t3").await.unwrap();
    let v6 = cloud.assign_v6(&eni.id, 3, "t4").await.unwrap();
    assert_eq!((v4.len(), v6.len()), (10, 3));
    let nic = cloud.metadata().nic(eni.mac).await.unwrap();
    assert_eq!((nic.id, nic.primary_v4, nic.v4.len(), nic.v6.len()), (eni.id.clone(), eni.primary_v4, 13, 5));
    assert_eq!(cloud.metadata().macs().await.unwrap().len(), 2);
    cloud.unassign_v4(&eni.id, &v4).await.unwrap();
    cloud.unassign_v6(&eni.id, &v6).await.unwrap();
    let now = cloud.describe_eni(&eni.id).await.unwrap();
    assert_eq!((now.v4, now.v6), (eni.v4.clone(), eni.v6.clone()));

    is(cloud.delete_eni(&eni.id).await.unwrap_err(), ErrorClass::InvalidState, "InvalidOperation.InvalidEniState");
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::Available, Duration::from_secs(5)).await.unwrap();
    is(cloud.subnet(eni.mac).await.unwrap_err(), ErrorClass::NotFound, "404");
    cloud.delete_eni(&eni.id).await.unwrap();
    eventually("gone", async || rig.sim.enis().len() == 2).await;
    is(cloud.describe_eni(&eni.id).await.unwrap_err(), ErrorClass::NotFound, "");
    assert_eq!(cloud.vswitches(&["vsw-a".into()]).await.unwrap(), before);
}

#[tokio::test]
async fn error_classes() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    // vsw-tiny has four addresses.
    is(
        cloud.create_eni(&request("a", "vsw-tiny", 5)).await.unwrap_err(),
        ErrorClass::VSwitchExhausted,
        "InvalidVSwitchId.IpNotEnough",
    );
    let tiny = cloud.create_eni(&request("b", "vsw-tiny", 4)).await.unwrap();
    is(
        cloud.assign_v4(&tiny.id, 1, "c").await.unwrap_err(),
        ErrorClass::VSwitchExhausted,
        "InvalidVSwitchId.IpNotEnough",
    );
    let full = attached(&cloud, "d", 20).await;
    is(cloud.assign_v4(&full.id, 1, "e").await.unwrap_err(), ErrorClass::Quota, "QuotaExceeded.PrivateIpAddress");
    cloud.assign_v6(&full.id, 10, "f").await.unwrap();
    cloud.assign_v6(&full.id, 10, "g").await.unwrap();
    is(cloud.assign_v6(&full.id, 1, "h").await.unwrap_err(), ErrorClass::Quota, "InvalidOperation.Ipv6CountExceeded");
    attached(&cloud, "i", 1).await;
    is(cloud.attach_eni(&tiny.id, &one()).await.unwrap_err(), ErrorClass::Quota, "EniPerInstanceLimitExceeded");
    is(cloud.attach_eni(&tiny.id, &"i-none".into()).await.unwrap_err(), ErrorClass::NotFound, "InvalidEcsId.NotFound");
    is(cloud.assign_v4(&"eni-none".into(), 1, "j").await.unwrap_err(), ErrorClass::NotFound, "InvalidEniId.NotFound");
    is(
        cloud.attach_eni(&full.id, &"i-two".into()).await.unwrap_err(),
        ErrorClass::InvalidState,
        "InvalidOperation.InvalidEniState",
    );
    let far = cloud.create_eni(&request("k", "vsw-b", 1)).await.unwrap();
    is(
        cloud.attach_eni(&far.id, &"i-two".into()).await.unwrap_err(),
        ErrorClass::Invalid,
        "InvalidOperation.AvailabilityZoneMismatch",
    );
    is(
        cloud.create_eni(&request("l", "vsw-none", 1)).await.unwrap_err(),
        ErrorClass::Invalid,
        "InvalidVSwitchId.NotFound",
    );
    is(cloud.assign_v6(&far.id, 1, "m").await.unwrap_err(), ErrorClass::Invalid, "InvalidVSwitch.IPv6NotTurnOn");
    let primary = rig.sim.enis()[0].clone();
    is(
        cloud.detach_eni(&primary.id, &one()).await.unwrap_err(),
        ErrorClass::Invalid,
        "InvalidOperation.InvalidEniType",
    );
    is(cloud.unassign_v4(&full.id, &[full.primary_v4]).await.unwrap_err(), ErrorClass::Invalid, "InvalidParameter");
    // Refused here already, without a call.
    rig.sim.forget_calls();
    is(cloud.assign_v4(&full.id, 11, "n").await.unwrap_err(), ErrorClass::Invalid, "");
    is(cloud.create_eni(&request("o", "vsw-a", 51)).await.unwrap_err(), ErrorClass::Invalid, "");
    is(cloud.unassign_v4(&full.id, &[Ipv4Addr::LOCALHOST; 11]).await.unwrap_err(), ErrorClass::Invalid, "");
    assert!(rig.sim.calls().is_empty());

    rig.sim.set_faults(vec![Fault::refuse("*", 1000, "InternalError", 500)]);
    is(cloud.assign_v4(&far.id, 1, "p").await.unwrap_err(), ErrorClass::Unknown, "InternalError");
    assert_eq!(rig.total("AssignPrivateIpAddresses"), 5, "the call and four repetitions");
    rig.sim.set_faults(vec![Fault::refuse("*", 1000, "SomethingNew", 503)]);
    is(cloud.assign_v4(&far.id, 1, "p").await.unwrap_err(), ErrorClass::Unknown, "SomethingNew");
    rig.sim.set_faults(vec![Fault::refuse("*", 1000, "Throttling.Api", 400)]);
    is(cloud.assign_v4(&far.id, 1, "p").await.unwrap_err(), ErrorClass::Throttled, "Throttling.Api");
    rig.sim.set_faults(vec![Fault::refuse("*", 1000, "Forbidden.RAM", 403)]);
    is(cloud.assign_v4(&far.id, 1, "p").await.unwrap_err(), ErrorClass::Forbidden, "Forbidden.RAM");
    rig.sim.set_faults(vec![Fault::next("*", 1000, FaultKind::Garble)]);
    let error = cloud.vswitches(&["vsw-a".into()]).await.unwrap_err();
    assert!(error.message.contains("malformed"), "{error}");
    assert!(!error.request_id.is_empty());
    is(error, ErrorClass::Unknown, "");
}

#[tokio::test]
async fn describe_reads_all_pages() {
    let rig = Rig::new(CloudConfig { page_limit: 7, ..world() }).await;
    let cloud = rig.client();
    for n in 0..25 {
        cloud.create_eni(&request(&format!("t{n}"), "vsw-a", 1)).await.unwrap();
    }
    let all = cloud.enis(&EniFilter::default()).await.unwrap();
    assert_eq!(all.len(), 27);
    assert!(all.is_sorted_by(|a, b| a.id < b.id));
    assert_eq!(rig.total("DescribeNetworkInterfaces"), 4);
    let some: Vec<EniId> = all.iter().skip(3).take(15).map(|eni| eni.id.clone()).collect();
    assert_eq!(cloud.enis(&EniFilter::ids(&some)).await.unwrap().len(), 15);
}

#[tokio::test]
async fn client_token_is_idempotent() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = cloud.create_eni(&request("t1", "vsw-a", 1)).await.unwrap();
    assert_eq!(cloud.create_eni(&request("t1", "vsw-a", 1)).await.unwrap(), eni);
    let first = cloud.assign_v4(&eni.id, 2, "t2").await.unwrap();
    assert_eq!(cloud.assign_v4(&eni.id, 2, "t2").await.unwrap(), first);
    is(cloud.assign_v4(&eni.id, 3, "t2").await.unwrap_err(), ErrorClass::Invalid, "IdempotentParameterMismatch");
    assert_ne!(cloud.assign_v4(&eni.id, 2, "t3").await.unwrap(), first);
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().v4.len(), 5);
}

#[tokio::test]
async fn create_reply_without_details() {
    let rig = Rig::new(CloudConfig { terse_create: true, ..world() }).await;
    let eni = rig.client().create_eni(&request("t1", "vsw-a", 2)).await.unwrap();
    assert_eq!(eni.v4.len(), 2);
    assert_eq!(rig.total("DescribeNetworkInterfaces"), 1);
}
