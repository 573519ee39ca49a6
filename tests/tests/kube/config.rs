//! The configuration from ConfigMaps of a real API server, as the daemon's service account with the shipped role.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use terway_core::objects::ObjectName;
use terway_daemon::config_source::{ConfigMetrics, ConfigSource, Input};
use terway_daemon::objects::{ApiClient, ConfigMapWatch};
use terway_sim::apiserver::DAEMON;
use tokio::sync::watch;

use super::rig::{NODE, PATIENCE, Rig};

fn config_map(name: &str, eni_conf: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "namespace": "kube-system", "name": name },
        "data": { "eni_conf": eni_conf.to_string() },
    })
}

fn eni_conf(max_idle: u32) -> Value {
    json!({ "vswitches": { "z": ["vsw-1"] }, "security_group": "sg-1", "max_pool_size": max_idle })
}

fn label(value: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE, "labels": { "terway-config": value } } })
}

/// The views of a new client, as a daemon that starts has them.
fn views(rig: &mut Rig) -> Result<Input> {
    let mut client: Option<Arc<ApiClient>> = None;
    rig.follow_with(DAEMON, 20, |api, _| {
        client = Some(api);
        Vec::new()
    })?;
    let cluster = ObjectName::new("kube-system", "eni-config");
    let watch = ConfigMapWatch {
        api: client.context("a client")?,
        cluster: cluster.clone(),
        node: NODE.to_owned(),
        time_scale: 20,
    };
    let (sender, views) = watch::channel(None);
    rig.runtime()?.spawn(watch.run(sender));
    let seen = views.clone();
    rig.poll("the first reading", || seen.borrow().is_some())?;
    Ok(Input::ConfigMaps { cluster, views, kept: Some(kept(rig)) })
}

fn kept(rig: &Rig) -> PathBuf {
    rig.folder().join("config.json")
}

fn source(rig: &mut Rig) -> Result<Arc<ConfigSource>> {
    let source =
        Arc::new(ConfigSource::open(views(rig)?, ConfigMetrics::default()).map_err(|e| anyhow::anyhow!("{e}"))?);
    rig.runtime()?.spawn(Arc::clone(&source).run());
    Ok(source)
}

#[test]
fn edits_of_the_config_maps_and_the_label_take_effect_and_survive_an_outage() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-config")? else { return Ok(()) };
    rig.apply_role()?;
    rig.server.apply(&[config_map("eni-config", &eni_conf(5))])?;
    let source = source(&mut rig)?;
    ensure!(source.config().max_idle == 5);

    // An edit.
    rig.server.apply(&[config_map("eni-config", &eni_conf(6))])?;
    let begun = Instant::now();
    rig.poll("the edit", || source.config().max_idle == 6)?;
    let took = begun.elapsed();
    println!("an edit took {took:?} from kubectl's end");
    ensure!(took < Duration::from_secs(1) * PATIENCE, "took {took:?}");

    // A bad edit is refused with its key.
    rig.server.apply(&[config_map("eni-config", &json!({ "vswitches": { "z": ["vsw-1"] }, "max_pool_size": -1 }))])?;
    let outcomes = source.outcomes();
    rig.poll("the refusal", || outcomes.borrow().reason() == "ConfigRefused")?;
    let message = outcomes.borrow().message();
    ensure!(message.contains("max_pool_size") && message.contains("kube-system/eni-config"), "{message}");
    ensure!(source.config().max_idle == 6);
    rig.server.apply(&[config_map("eni-config", &eni_conf(7))])?;
    rig.poll("the repair", || source.config().max_idle == 7 && outcomes.borrow().reason() == "ConfigAccepted")?;

    // The label names a ConfigMap that comes later: what is in force stays until then.
    rig.server.apply(&[label("fixed-cidr")])?;
    rig.poll("the missing ConfigMap", || outcomes.borrow().message().contains("kube-system/fixed-cidr"))?;
    ensure!(outcomes.borrow().reason() == "ConfigRefused" && source.config().max_idle == 7);
    let own = json!({ "vswitches": { "z": ["vsw-fixed"] }, "max_pool_size": null });
    rig.server.apply(&[config_map("fixed-cidr", &own)])?;
    let vswitch = || source.config().vswitches_of("z").iter().map(ToString::to_string).collect::<Vec<_>>();
    rig.poll("the node's own vSwitch", || vswitch() == ["vsw-fixed"])?;
    ensure!(source.config().max_idle == 5, "null stands for the default");
    rig.server.kubectl(&["label", "node", NODE, "terway-config-"], "")?;
    rig.poll("the cluster's vSwitch", || vswitch() == ["vsw-1"] && source.config().max_idle == 7)?;

    // Without the API, the last configuration stays, and a start takes it from disk.
    rig.server.kill()?;
    rig.poll("the outage", || source.problem().is_some())?;
    ensure!(source.config().max_idle == 7);
    let restarted = self::source(&mut rig)?;
    ensure!(restarted.config().max_idle == 7 && restarted.status().failure.is_some());
    rig.server.restart()?;
    rig.server.apply(&[config_map("eni-config", &eni_conf(8))])?;
    rig.poll("the edit after the outage", || {
        [&source, &restarted].iter().all(|source| source.config().max_idle == 8 && source.problem().is_none())
    })?;
    ensure!(restarted.status().failure.is_none());
    Ok(())
}

#[test]
fn each_verb_of_the_config_map_role_is_needed() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-config-rbac")? else { return Ok(()) };
    rig.apply_role()?;
    rig.server.apply(&[config_map("eni-config", &eni_conf(5))])?;
    for verb in ["list", "watch"] {
        let rest: Vec<_> = ["list", "watch"].into_iter().filter(|other| *other != verb).collect();
        rig.server.apply(&[json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": { "namespace": "kube-system", "name": "terway" },
            "rules": [{ "apiGroups": [""], "resources": ["configmaps"], "verbs": rest }],
        })])?;
        let Input::ConfigMaps { views, .. } = views(&mut rig)? else { continue };
        // Kind, verb and subject are named.
        let is_told =
            |text: &str| text.contains(&format!("cannot {verb} resource \"configmaps\"")) && text.contains(DAEMON.name);
        rig.poll(&format!("the refusal of {verb}"), || {
            let view = views.borrow().clone();
            view.is_some_and(|view| {
                view.documents.as_ref().err().is_some_and(|text| is_told(text))
                    || view.stale.as_deref().is_some_and(is_told)
            })
        })?;
    }
    Ok(())
}
