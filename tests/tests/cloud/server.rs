//! The simulated cloud itself: what its fabric hears and what its admin endpoint does.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde_json::{Value, json};
use terway_core::cloud::{EniStatus, ErrorClass};
use terway_core::ident::{EniId, Mac};
use terway_daemon::cloud::Cloud;
use terway_sim::cloud::CloudConfig;
use terway_sim::fabric::{Fabric, FabricEni};

use crate::{Rig, attached, eventually, is, one, world};

/// Writes down what a fabric is told.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Fabric for Recorder {
    fn hotplug(&self, node: &str, eni: &FabricEni) -> anyhow::Result<()> {
        let text =
            format!("plug {node} {} {}+{}", if eni.primary { "primary" } else { "eni" }, eni.v4.len(), eni.v6.len());
        self.0.lock().unwrap().push(text);
        Ok(())
    }

    fn hot_unplug(&self, node: &str, _eni: &EniId, _mac: Mac) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(format!("unplug {node}"));
        Ok(())
    }

    fn set_prefixes(&self, _eni: &EniId, v4: &[Ipv4Network], v6: &[Ipv6Network]) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(format!("prefixes {}+{}", v4.len(), v6.len()));
        Ok(())
    }

    fn set_addresses(&self, _eni: &EniId, v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(format!("addresses {}+{}", v4.len(), v6.len()));
        Ok(())
    }
}

#[tokio::test]
async fn fabric_events_in_order() {
    let recorder = Arc::new(Recorder::default());
    let fabric = Arc::clone(&recorder);
    let rig = Rig::with_fabric(CloudConfig { nic_delay_ms: 50, ..world() }, fabric).await;
    let cloud = rig.client();
    let eni = attached(&cloud, "t1", 2).await;
    // Before the NIC is there: part of the plug, not an event.
    cloud.assign_v4(&eni.id, 1, "t2").await.unwrap();
    eventually("the NIC arrives", async || cloud.subnet(eni.mac).await.is_ok()).await;
    let v4 = cloud.assign_v4(&eni.id, 2, "t3").await.unwrap();
    cloud.assign_v6(&eni.id, 1, "t4").await.unwrap();
    cloud.unassign_v4(&eni.id, &v4).await.unwrap();
    let prefixes = cloud.assign_v4_prefixes(&eni.id, 2, "t6").await.unwrap();
    cloud.unassign_v4_prefixes(&eni.id, &prefixes[..1]).await.unwrap();
    cloud.detach_eni(&eni.id, &one()).await.unwrap();
    cloud.wait_eni(&eni.id, EniStatus::Available, Duration::from_secs(5)).await.unwrap();
    cloud.delete_eni(&eni.id).await.unwrap();
    // An ENI that an administrator takes away while it is in use.
    let other = attached(&cloud, "t5", 1).await;
    eventually("the NIC arrives", async || cloud.subnet(other.mac).await.is_ok()).await;
    rig.sim.remove_eni(&other.id).unwrap();
    rig.sim.wait_until_idle().await.unwrap();
    assert_eq!(
        *recorder.0.lock().unwrap(),
        [
            "plug one primary 1+1",
            "plug one eni 3+0",
            "addresses 5+0",
            "addresses 5+1",
            "addresses 3+1",
            "prefixes 2+0",
            "prefixes 1+0",
            "unplug one",
            "plug one eni 1+0",
            "unplug one"
        ]
    );
}

#[tokio::test]
async fn the_admin_endpoint_shows_state_and_sets_faults() {
    let rig = Rig::new(world()).await;
    let cloud = rig.client();
    let eni = attached(&cloud, "t1", 2).await;
    terway_daemon::cloud::tls::ready();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let admin = rig.admin().await;
    let url = |item: &str| format!("{admin}/{item}");
    let state: Value = http.get(url("state")).send().await.unwrap().json().await.unwrap();
    let shown = state["enis"].as_array().unwrap().iter().find(|shown| shown["id"] == eni.id.as_str()).unwrap();
    assert_eq!((&shown["status"], &shown["v4"]), (&json!("InUse"), &json!(eni.v4)));
    let calls: Value = http.get(url("calls")).send().await.unwrap().json().await.unwrap();
    assert_eq!(calls["CreateNetworkInterface"]["total"], 1);
    let fault = json!([{"action": "AssignPrivateIpAddresses", "nth": 2, "kind": {"error": {"code": "Forbidden.RAM", "status": 403}}}]);
    http.put(url("faults")).json(&fault).send().await.unwrap().error_for_status().unwrap();
    cloud.assign_v4(&eni.id, 1, "t2").await.unwrap();
    is(cloud.assign_v4(&eni.id, 1, "t3").await.unwrap_err(), ErrorClass::Forbidden, "Forbidden.RAM");
    cloud.assign_v4(&eni.id, 1, "t3").await.unwrap();
    assert_eq!(http.put(url("faults")).body("[{}]").send().await.unwrap().status(), 400);
    let log: Value = http.get(url("log?after=2")).send().await.unwrap().json().await.unwrap();
    assert_eq!((&log[0]["number"], log.as_array().unwrap().last().unwrap()["token"].as_str()), (&json!(3), Some("t3")));
    let calls: Value = http.get(url("calls")).send().await.unwrap().json().await.unwrap();
    let assigns = &calls["AssignPrivateIpAddresses"];
    assert_eq!((&assigns["total"], &assigns["failed"], &assigns["throttled"]), (&json!(3), &json!(1), &json!(0)));
    http.delete(url("calls")).send().await.unwrap().error_for_status().unwrap();
    assert!(rig.sim.calls().is_empty());
    let order = json!([{"unassign": {"eni": "secondary:1", "address": eni.v4[1]}}, "expire_keys"]);
    http.post(url("orders")).json(&order).send().await.unwrap().error_for_status().unwrap();
    assert!(!cloud.describe_eni(&eni.id).await.unwrap().v4.contains(&eni.v4[1]));
    for bad in [json!({"unassign": {"eni": "secondary:1", "address": eni.v4[0]}}), json!({"remove_eni": {"eni": "x"}})]
    {
        assert_eq!(http.post(url("orders")).json(&bad).send().await.unwrap().status(), 400, "{bad}");
    }
    // Where the daemon calls there is no such thing.
    assert_eq!(http.get(format!("{}/state", rig.address)).send().await.unwrap().status(), 400);
}
