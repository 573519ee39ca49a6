//! The shipped manifests, as `kubectl apply -k` renders and sends them, against a real API server.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::rig::Rig;

/// The kustomizations that users apply.
const KUSTOMIZATIONS: [&str; 3] = [".", "overlays/no-policy", "overlays/beside-kube-proxy"];

fn folder(kustomization: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(kustomization)
}

fn rendered(kustomization: &str) -> Result<String> {
    let folder = folder(kustomization);
    let output = Command::new("kubectl").arg("kustomize").arg(&folder).output().context("run kubectl kustomize")?;
    ensure!(output.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn manifests_are_valid_and_accepted_by_the_api_server() -> Result<()> {
    let Some(rig) = Rig::start("kube-manifests")? else { return Ok(()) };
    for kustomization in KUSTOMIZATIONS {
        // With the schema of the server: a field that it does not know is an error.
        let applied = rig
            .server
            .kubectl(&["apply", "--validate=true", "-f", "-"], &rendered(kustomization)?)
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
