//! Prefixes: blocks of addresses, given and taken like single ones.

use std::collections::BTreeSet;
use std::time::Duration;

use terway_core::cloud::{EniStatus, ErrorClass};
use terway_daemon::cloud::{Cloud, CreateEni, MAX_PREFIXES_PER_CALL};
use terway_sim::cloud::{AdminAction, Fault, FaultKind};

use crate::{Rig, attached, eventually, is, one, request, world};

#[tokio::test]
async fn prefixes_come_with_an_eni_and_later_and_go() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let before = cloud.vswitches(&["vsw-a".into()]).await.unwrap();
    let wanted = CreateEni { v4_prefixes: 2, v6_prefixes: 1, ..request("t1", "vsw-a", 1) };
    let eni = cloud.create_eni(&wanted).await.unwrap();
    assert_eq!((eni.v4.len(), eni.v6.len(), eni.v4_prefixes.len(), eni.v6_prefixes.len()), (1, 0, 2, 1));
    assert!(eni.v4_prefixes.iter().all(|prefix| prefix.prefix() == 28 && !prefix.contains(eni.primary_v4)));
    assert!(eni.v6_prefixes.iter().all(|prefix| prefix.prefix() == 80));
    assert_eq!(cloud.vswitches(&["vsw-a".into()]).await.unwrap()[0].available, before[0].available - 1 - 32);
    cloud.attach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::InUse, Duration::from_secs(5)).await.unwrap();

    // A lost reply, and the token says that it is the same request.
    rig.sim.set_faults(
        ["AssignPrivateIpAddresses", "AssignIpv6Addresses", "UnassignPrivateIpAddresses", "UnassignIpv6Addresses"]
            .map(|action| Fault::next(action, 1, FaultKind::LoseReply))
            .into(),
    );
    let v4 = cloud.assign_v4_prefixes(&eni.id, 3, "t2").await.unwrap();
    let v6 = cloud.assign_v6_prefixes(&eni.id, 2, "t3").await.unwrap();
    let now = cloud.describe_eni(&eni.id).await.unwrap();
    assert_eq!((&now.v4_prefixes[2..], &now.v6_prefixes[1..]), (&v4[..], &v6[..]));
    assert_eq!(now.v4_prefixes.iter().collect::<BTreeSet<_>>().len(), 5);
    eventually("the NIC arrives", async || cloud.subnet(eni.mac).await.is_ok()).await;
    let nic = cloud.metadata().nic(eni.mac).await.unwrap();
    assert_eq!((nic.v4_prefixes, nic.v6_prefixes), (now.v4_prefixes, now.v6_prefixes));

    cloud.unassign_v4_prefixes(&eni.id, &v4[..2]).await.unwrap();
    cloud.unassign_v4_prefixes(&eni.id, &v4).await.unwrap();
    cloud.unassign_v6_prefixes(&eni.id, &v6).await.unwrap();
    let now = cloud.describe_eni(&eni.id).await.unwrap();
    assert_eq!((&now.v4_prefixes, &now.v6_prefixes), (&eni.v4_prefixes, &eni.v6_prefixes));
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::Available, Duration::from_secs(5)).await.unwrap();
    cloud.delete_eni(&eni.id).await.unwrap();
    eventually("gone", async || rig.sim.enis().len() == 2).await;
    assert_eq!(cloud.vswitches(&["vsw-a".into()]).await.unwrap(), before);
}

#[tokio::test]
async fn fragmented_vswitch_of_sim() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = cloud.create_eni(&request("t1", "vsw-b", 1)).await.unwrap();
    rig.sim.apply(AdminAction::Fragment { vswitch: "vsw-b".into() }).unwrap();
    let code = "InvalidVSwitchId.IpNotEnough";
    is(cloud.assign_v4_prefixes(&eni.id, 1, "t2").await.unwrap_err(), ErrorClass::VSwitchExhausted, code);
    let wanted = CreateEni { v4_prefixes: 1, ..request("t3", "vsw-b", 1) };
    let free = cloud.vswitches(&["vsw-b".into()]).await.unwrap()[0].available;
    is(cloud.create_eni(&wanted).await.unwrap_err(), ErrorClass::VSwitchExhausted, code);
    assert_eq!(cloud.vswitches(&["vsw-b".into()]).await.unwrap()[0].available, free, "a refusal takes nothing");
    assert_eq!(cloud.assign_v4(&eni.id, 5, "t4").await.unwrap().len(), 5);
    rig.sim.apply(AdminAction::Vacate { vswitch: "vsw-b".into() }).unwrap();
    assert_eq!(cloud.assign_v4_prefixes(&eni.id, 1, "t5").await.unwrap().len(), 1);
}

#[tokio::test]
async fn prefix_counts_as_one_address() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = attached(&cloud, "t1", 1).await;
    cloud.assign_v4_prefixes(&eni.id, MAX_PREFIXES_PER_CALL, "t2").await.unwrap();
    cloud.assign_v4(&eni.id, 9, "t3").await.unwrap();
    let full = "QuotaExceeded.PrivateIpAddress";
    is(cloud.assign_v4_prefixes(&eni.id, 1, "t4").await.unwrap_err(), ErrorClass::Quota, full);
    is(cloud.assign_v4(&eni.id, 1, "t5").await.unwrap_err(), ErrorClass::Quota, full);
    // What the API does not take is refused here already, without a call.
    rig.sim.forget_calls();
    is(cloud.assign_v4_prefixes(&eni.id, 11, "t6").await.unwrap_err(), ErrorClass::Invalid, "");
    for wanted in [
        CreateEni { v4_prefixes: 1, ..request("t7", "vsw-a", 2) },
        CreateEni { v6_prefixes: 1, v6_count: 1, ..request("t7", "vsw-a", 1) },
        CreateEni { v4_prefixes: 11, ..request("t7", "vsw-a", 1) },
    ] {
        is(cloud.create_eni(&wanted).await.unwrap_err(), ErrorClass::Invalid, "");
    }
    assert!(rig.sim.calls().is_empty());
}
