//! Quotas, lag, courses gone wrong, repeated and partial effects, other people's hands, scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use terway_core::cloud::{EniKind, EniStatus, ErrorClass};
use terway_daemon::cloud::{Cloud, CreateEni, EniFilter};
use terway_sim::cloud::{AdminAction, CloudConfig, Fault, FaultKind, Scenario, Step, Timing, Trigger};

use crate::{Rig, attached, eventually, is, one, request, world};

const WITHIN: Duration = Duration::from_secs(5);

#[tokio::test]
async fn quotas_of_account_and_security_group() {
    let capacity = BTreeMap::from([("sg-2".to_owned(), 4)]);
    let rig = Rig::new(CloudConfig { max_enis: Some(5), security_group_capacity: capacity, ..world() }).await;
    let cloud = rig.client();
    let second = |token: &str, v4| CreateEni { security_groups: vec!["sg-2".into()], ..request(token, "vsw-a", v4) };
    let full = "SecurityGroupInstanceLimitExceed";
    is(cloud.create_eni(&second("a", 5)).await.unwrap_err(), ErrorClass::Quota, full);
    let eni = cloud.create_eni(&second("b", 3)).await.unwrap();
    cloud.assign_v4(&eni.id, 1, "c").await.unwrap();
    is(cloud.assign_v4(&eni.id, 1, "d").await.unwrap_err(), ErrorClass::Quota, full);
    cloud.create_eni(&request("e", "vsw-a", 1)).await.unwrap();
    cloud.create_eni(&request("f", "vsw-a", 1)).await.unwrap();
    let error = cloud.create_eni(&request("g", "vsw-a", 1)).await.unwrap_err();
    assert_eq!(error.explain().code.name, "account-eni-quota");
    is(error, ErrorClass::Quota, "MaxEniCountExceeded");
    cloud.delete_eni(&eni.id).await.unwrap();
    eventually("room again", async || cloud.create_eni(&request("h", "vsw-a", 1)).await.is_ok()).await;
}

#[tokio::test]
async fn eventual_consistency_of_describe() {
    let lag = 400;
    let config = CloudConfig { describe_lag_ms: lag, metadata_lag_ms: lag, terse_create: true, ..world() };
    let rig = Rig::new(config).await;
    let cloud = rig.client();
    let began = Instant::now();
    let eni = cloud.create_eni(&request("t1", "vsw-a", 2)).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(lag), "the whole answer is there only once it is shown");
    // One that answers in full is not shown yet, which is no reason to take it for gone.
    rig.sim.apply(AdminAction::Timing(Timing { attach_ms: Some(0), ..Timing::default() })).unwrap();
    cloud.attach_eni(&eni.id, &one()).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().status, EniStatus::Available, "behind");
    cloud.wait_eni(&eni.id, EniStatus::InUse, WITHIN).await.unwrap();
    eventually("the NIC is in the metadata", async || cloud.subnet(eni.mac).await.is_ok()).await;
    let v4 = cloud.assign_v4(&eni.id, 3, "t2").await.unwrap();
    assert_eq!(cloud.metadata().nic(eni.mac).await.unwrap().v4.len(), 2, "behind");
    let all = cloud.describe_eni(&eni.id).await.unwrap().v4;
    assert_eq!(all.len(), 2, "behind");
    eventually("shown", async || cloud.describe_eni(&eni.id).await.unwrap().v4.len() == 5).await;
    // What was taken away is still shown: taking it away again must not be misled by that.
    cloud.unassign_v4(&eni.id, &v4[..1]).await.unwrap();
    cloud.unassign_v4(&eni.id, &v4).await.unwrap();
    eventually("shown", async || cloud.describe_eni(&eni.id).await.unwrap().v4.len() == 2).await;
}

#[tokio::test]
async fn attach_slow_failing_or_without_nic() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let attach = async |token: &str, kind: FaultKind, within: Duration| {
        rig.sim.set_faults(vec![Fault::next("AttachNetworkInterface", 1, kind)]);
        let eni = cloud.create_eni(&request(token, "vsw-a", 1)).await.unwrap();
        cloud.attach_eni(&eni.id, &one()).await.unwrap();
        let waited = cloud.wait_eni(&eni.id, EniStatus::InUse, within).await;
        (eni, waited)
    };
    let began = Instant::now();
    let (_, waited) = attach("a", FaultKind::SlowEnd { ms: 300 }, WITHIN).await;
    waited.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(300));
    let (eni, waited) = attach("b", FaultKind::FailEnd, Duration::from_millis(200)).await;
    let error = waited.unwrap_err();
    assert!(error.message.contains("Available"), "{error}");
    is(error, ErrorClass::InvalidState, "");
    // It can be attached after all.
    rig.sim.set_faults(vec![Fault::next("AttachNetworkInterface", 1, FaultKind::NoNic)]);
    cloud.attach_eni(&eni.id, &one()).await.unwrap();
    let eni = cloud.wait_eni(&eni.id, EniStatus::InUse, WITHIN).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    is(cloud.subnet(eni.mac).await.unwrap_err(), ErrorClass::NotFound, "404");
}

/// Each call arrives twice; nobody notices.
#[tokio::test]
async fn duplicate_request_has_one_effect() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    rig.sim.set_faults(vec![Fault {
        action: "*".into(),
        nth: None,
        probability: None,
        times: None,
        kind: FaultKind::Duplicate,
    }]);
    let eni = attached(&cloud, "a", 2).await;
    assert_eq!(rig.sim.enis().len(), 3);
    let v4 = cloud.assign_v4(&eni.id, 3, "b").await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().v4.len(), 5);
    cloud.unassign_v4(&eni.id, &v4).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().v4, eni.v4);
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::Available, WITHIN).await.unwrap();
    cloud.delete_eni(&eni.id).await.unwrap();
    eventually("gone", async || rig.sim.enis().len() == 2).await;
}

#[tokio::test]
async fn assign_partial_and_delayed() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = attached(&cloud, "a", 1).await;
    rig.sim.set_faults(vec![
        Fault::next("AssignPrivateIpAddresses", 1, FaultKind::Partial { most: 2 }),
        Fault::next("DetachNetworkInterface", 1, FaultKind::EffectLater { ms: 300 }),
    ]);
    let some = cloud.assign_v4(&eni.id, 5, "b").await.unwrap();
    assert_eq!(some.len(), 2);
    assert_eq!(cloud.assign_v4(&eni.id, 5, "b").await.unwrap(), some, "the same token, the same answer");
    assert_eq!(cloud.assign_v4(&eni.id, 5, "c").await.unwrap().len(), 5);
    let began = Instant::now();
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    assert_eq!(cloud.describe_eni(&eni.id).await.unwrap().status, EniStatus::InUse);
    cloud.wait_eni(&eni.id, EniStatus::Available, WITHIN).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(300));
}

/// The caller's token goes out with every repetition, and with nothing else.
#[tokio::test]
async fn retries_keep_client_token() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = cloud.create_eni(&request("create-1", "vsw-a", 1)).await.unwrap();
    rig.sim.forget_calls();
    rig.sim.set_faults(vec![
        Fault::next("CreateNetworkInterface", 1, FaultKind::LoseReply),
        Fault::refuse("AssignPrivateIpAddresses", 1, "InternalError", 500),
        Fault { nth: Some(2), ..Fault::next("AssignPrivateIpAddresses", 1, FaultKind::Garble) },
        Fault::refuse("AssignIpv6Addresses", 1, "LastTokenProcessing", 403),
    ]);
    cloud.create_eni(&request("create-2", "vsw-a", 1)).await.unwrap();
    cloud.assign_v4(&eni.id, 2, "assign-1").await.unwrap();
    cloud.assign_v6(&eni.id, 2, "assign-2").await.unwrap();
    let log = rig.sim.log();
    let of = |action: &str| -> Vec<(Option<&str>, &str, bool)> {
        let own = log.iter().filter(|record| record.action == action);
        own.map(|record| (record.token.as_deref(), record.code.as_str(), record.lost)).collect()
    };
    assert_eq!(of("CreateNetworkInterface"), [(Some("create-2"), "", true), (Some("create-2"), "", false)]);
    assert_eq!(
        of("AssignPrivateIpAddresses"),
        [(Some("assign-1"), "InternalError", false), (Some("assign-1"), "", true), (Some("assign-1"), "", false)]
    );
    assert_eq!(
        of("AssignIpv6Addresses"),
        [(Some("assign-2"), "LastTokenProcessing", false), (Some("assign-2"), "", false)]
    );
    let ids: BTreeSet<&str> = log.iter().map(|record| record.request_id.as_str()).collect();
    assert_eq!(ids.len(), log.len(), "each exchange has a request id of its own");
    let now = cloud.describe_eni(&eni.id).await.unwrap();
    assert_eq!((now.v4.len(), now.v6.len(), rig.sim.enis().len()), (3, 2, 4), "and one effect");
}

#[tokio::test]
async fn changes_by_others_are_visible() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let (a, b) = (attached(&cloud, "a", 3).await, attached(&cloud, "b", 1).await);
    rig.sim.apply(AdminAction::Unassign { eni: a.id.to_string(), address: a.v4[2].to_string() }).unwrap();
    assert_eq!(cloud.describe_eni(&a.id).await.unwrap().v4, a.v4[..2]);
    rig.sim.apply(AdminAction::DetachEni { eni: a.id.to_string() }).unwrap();
    let now = cloud.describe_eni(&a.id).await.unwrap();
    assert_eq!((now.status, now.instance), (EniStatus::Available, None));
    cloud.detach_eni(&a.id, &one()).await.unwrap();
    rig.sim.apply(AdminAction::RemoveEni { eni: "secondary:2".into() }).unwrap();
    is(cloud.describe_eni(&b.id).await.unwrap_err(), ErrorClass::NotFound, "");
    rig.sim.apply(AdminAction::Occupy { vswitch: "vsw-b".into(), leave: 2 }).unwrap();
    assert_eq!(cloud.vswitches(&["vsw-b".into()]).await.unwrap()[0].available, 2);
    is(
        cloud.create_eni(&request("c", "vsw-b", 3)).await.unwrap_err(),
        ErrorClass::VSwitchExhausted,
        "InvalidVSwitchId.IpNotEnough",
    );
}

#[tokio::test]
async fn scenario_at_times_and_calls() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    terway_daemon::cloud::tls::ready();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/scenario", rig.admin().await);
    let scenario = json!({
        "faults": [{"action": "CreateNetworkInterface", "times": 1, "kind": "lose_reply"}],
        "steps": [
            {"when": {"action": "CreateNetworkInterface", "calls": 3}, "do": [{"remove_eni": {"eni": "secondary:1"}}]},
            {"at_ms": 200, "do": [{"occupy": {"vswitch": "vsw-b", "leave": 0}}]}
        ]
    });
    http.put(&url).json(&scenario).send().await.unwrap().error_for_status().unwrap();
    let first = cloud.create_eni(&request("a", "vsw-a", 1)).await.unwrap();
    cloud.describe_eni(&first.id).await.unwrap();
    cloud.create_eni(&request("b", "vsw-a", 1)).await.unwrap();
    is(cloud.describe_eni(&first.id).await.unwrap_err(), ErrorClass::NotFound, "");
    eventually("all steps are taken", async || rig.sim.open_steps() == 0).await;
    assert_eq!(cloud.vswitches(&["vsw-b".into()]).await.unwrap()[0].available, 0);
    let open: Value = http.get(&url).send().await.unwrap().json().await.unwrap();
    assert_eq!(open, json!({"open": 0}));
    assert_eq!(http.put(&url).body("{\"step\": []}").send().await.unwrap().status(), 400);
    // A later scenario makes the steps of an earlier one void.
    let step =
        |at_ms, leave| Step { at_ms, when: None, orders: vec![AdminAction::Occupy { vswitch: "vsw-a".into(), leave }] };
    rig.sim.play(Scenario { faults: Vec::new(), steps: vec![step(50, 7)] });
    let waits = Step { when: Some(Trigger { action: "X".into(), calls: 1 }), ..step(0, 3) };
    rig.sim.play(Scenario { faults: Vec::new(), steps: vec![waits] });
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(cloud.vswitches(&["vsw-a".into()]).await.unwrap()[0].available > 1000);
    assert_eq!(rig.sim.open_steps(), 1);
}

/// The same seed and the same calls: the same faults, ids and addresses.
#[tokio::test]
async fn faults_repeat_by_seed() {
    let history = async |seed: u64| {
        let random = |action: &str, kind: FaultKind| Fault {
            action: action.into(),
            nth: None,
            probability: Some(0.3),
            times: None,
            kind,
        };
        let error = FaultKind::Error { code: "InternalError".into(), status: 500 };
        let faults = vec![random("*", error), random("AssignPrivateIpAddresses", FaultKind::LoseReply)];
        let rig = Rig::new(CloudConfig { seed, faults, ..world() }).await;
        let cloud = rig.client();
        for n in 0..10 {
            if let Ok(eni) = cloud.create_eni(&request(&format!("c{n}"), "vsw-a", 1)).await {
                let _maybe = cloud.assign_v4(&eni.id, 2, &format!("a{n}")).await;
            }
        }
        let log: Vec<_> = rig.sim.log().into_iter().map(|record| (record.action, record.code, record.lost)).collect();
        let addresses: Vec<_> = rig.sim.enis().into_iter().map(|eni| (eni.id, eni.v4)).collect();
        (log, addresses)
    };
    let (one, same, other) = (history(5).await, history(5).await, history(6).await);
    assert_eq!(one, same);
    assert_ne!(one.0, other.0);
    assert!(one.0.iter().any(|(_, code, _)| code == "InternalError") && one.0.iter().any(|(.., lost)| *lost));
}

#[tokio::test]
async fn describe_more_ids_than_one_call() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let mut ids = Vec::new();
    for n in 0..130 {
        ids.push(cloud.create_eni(&request(&format!("t{n}"), "vsw-a", 1)).await.unwrap().id);
    }
    rig.sim.forget_calls();
    let found = cloud.enis(&EniFilter { kind: Some(EniKind::Secondary), ..EniFilter::ids(&ids) }).await.unwrap();
    assert_eq!(found.len(), 130);
    assert!(found.is_sorted_by(|a, b| a.id < b.id));
    assert_eq!(rig.total("DescribeNetworkInterfaces"), 2);
}
