//! The shipped manifests, as `kubectl apply -k` renders and sends them, against a real API server.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::rig::Rig;

/// The kustomizations that users apply.
const KUSTOMIZATIONS: [&str; 6] =
    [".", "base", "overlays/datapathv2", "overlays/before-1.29", "overlays/no-policy", "overlays/beside-kube-proxy"];

fn folder(kustomization: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(kustomization)
}

fn rendered(kustomization: &str) -> Result<String> {
    let folder = folder(kustomization);
    let output = Command::new("kubectl").arg("kustomize").arg(&folder).output().context("run kubectl kustomize")?;
    ensure!(output.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The same for the server of the tests, which has flow control in its first beta version: two fields differ from v1.
fn for_this_server(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.contains("lendablePercent"));
    let lines: Vec<_> = lines
        .map(|line| {
            line.replace("flowcontrol.apiserver.k8s.io/v1", "flowcontrol.apiserver.k8s.io/v1beta1")
                .replace("nominalConcurrencyShares", "assuredConcurrencyShares")
        })
        .collect();
    lines.join("\n")
}

/// Fields of `sent` that are not in `kept`, or not the same.
fn lost(at: &str, sent: &Value, kept: &Value, found: &mut Vec<String>) {
    match (sent, kept) {
        (Value::Object(fields), Value::Object(_)) => {
            fields.iter().for_each(|(name, value)| lost(&format!("{at}.{name}"), value, &kept[name], found));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(number, (a, b))| lost(&format!("{at}[{number}]"), a, b, found));
        }
        _ if sent == kept => {}
        _ => found.push(format!("{at}: {sent} became {kept}")),
    }
}

#[test]
fn no_field_of_a_shipped_object_is_unknown_to_the_api_server() -> Result<()> {
    let Some(rig) = Rig::start("kube-manifests-fields")? else { return Ok(()) };
    for kustomization in [".", "overlays/monitoring"] {
        let text = for_this_server(&rendered(kustomization)?);
        let mut kinds = Vec::new();
        for document in text.split("\n---\n") {
            let sent: Value = yaml_serde::from_str(document)?;
            let kind = sent["kind"].as_str().context("no kind")?.to_owned();
            // The Prometheus operator's kinds: `cargo xtask manifests` has promtool check what is in them.
            if sent["apiVersion"] == "monitoring.coreos.com/v1" {
                continue;
            }
            // Not validated by kubectl, so that the server alone decides: it drops what it does not know.
            let reply = rig.server.kubectl(&["apply", "--validate=false", "-o", "json", "-f", "-"], document)?;
            let mut found = Vec::new();
            lost(&kind, &sent, &serde_json::from_str(&reply)?, &mut found);
            ensure!(found.is_empty(), "{kustomization}: {found:?}");
            kinds.push(kind);
        }
        for kind in ["ClusterRole", "ConfigMap", "DaemonSet", "FlowSchema", "PriorityLevelConfiguration"] {
            ensure!(kinds.iter().any(|k| k == kind), "{kustomization} has no {kind}: {kinds:?}");
        }
    }
    Ok(())
}

#[test]
fn manifests_are_valid_and_accepted_by_the_api_server() -> Result<()> {
    let Some(rig) = Rig::start("kube-manifests")? else { return Ok(()) };
    for kustomization in KUSTOMIZATIONS {
        // With the schema of the server: a field that it does not know is an error.
        let applied = rig
            .server
            .kubectl(&["apply", "--validate=true", "-f", "-"], &for_this_server(&rendered(kustomization)?))
            .with_context(|| format!("kustomization {kustomization}"))?;
        for object in ["serviceaccount/terway", "clusterrole", "configmap/eni-config", "daemonset.apps/terway"] {
            ensure!(applied.contains(object), "{kustomization}: {object} is not in {applied}");
        }
    }
    let shown = rig.server.kubectl(&["-n", "kube-system", "get", "daemonset", "terway", "-o", "json"], "")?;
    let daemonset: Value = serde_json::from_str(&shown)?;
    let pod = &daemonset["spec"]["template"]["spec"];
    // As the server understood it: whatever it did not know is gone.
    ensure!(pod["hostNetwork"] == true && pod["priorityClassName"] == "system-node-critical", "{pod}");
    ensure!(pod["tolerations"] == serde_json::json!([{"operator": "Exists"}]), "every taint is tolerated: {pod}");
    for container in ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().into_iter().flatten())
    {
        let security = &container["securityContext"];
        let holds = security["readOnlyRootFilesystem"] == true
            && security["allowPrivilegeEscalation"] == false
            && security["capabilities"]["drop"] == serde_json::json!(["ALL"])
            && security["privileged"].is_null();
        ensure!(holds, "{}: {security}", container["name"]);
    }
    ensure!(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "{pod}");
    let env = pod["containers"][0]["env"].as_array().context("no environment")?;
    let cgroup = env.iter().find(|variable| variable["name"] == "TERWAY_CGROUP").context("TERWAY_CGROUP")?;
    ensure!(cgroup["value"] == "none", "the last overlay leaves the node's own processes to kube-proxy: {cgroup}");
    // A selector cannot be changed later, so it has no version in it.
    let selector = &daemonset["spec"]["selector"]["matchLabels"];
    ensure!(*selector == serde_json::json!({"app": "terway"}), "{selector}");
    Ok(())
}
