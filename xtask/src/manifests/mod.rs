//! `cargo xtask manifests`: renders the kustomize folders and the Helm chart with the real tools, compares them object by object, and checks alerts and
//! dashboards with promtool. Whether the API server takes the objects is checked in the rung `kube`.

mod monitoring;
mod objects;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use self::objects::{Objects, differences};
use crate::process;
use crate::setup::ManifestTools;
use crate::workspace::Workspace;

/// Values of the chart, and the kustomize folder that gives the same objects.
const PAIRS: [(&str, &str); 7] = [
    ("{}", "."),
    ("{}", "overlays/datapathv2"),
    (r#"{"kubeProxy": "beside"}"#, "overlays/beside-kube-proxy"),
    (r#"{"eniConfig": {"disableNetworkPolicy": true}}"#, "overlays/no-policy"),
    (r#"{"flowSchema": {"enabled": false}}"#, "base"),
    (r#"{"flowSchema": {"enabled": false}}"#, "overlays/before-1.29"),
    (r#"{"monitoring": {"enabled": true}}"#, "overlays/monitoring"),
];
/// Values that the chart's schema refuses.
const REFUSED: [&str; 5] = [
    r#"{"kubeProxy": "maybe"}"#,
    r#"{"apiServers": ["https://10.0.0.1:6443"]}"#,
    r#"{"eniConfig": {"create": true, "conf": {"vswitches": {"z": ["subnet-1"]}}}}"#,
    r#"{"maxUnavailable": "0%"}"#,
    r#"{"no_such_value": 1}"#,
];

/// Checks everything below `manifests`.
///
/// # Errors
/// A tool is missing or fails, or there are findings, which have been printed.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let (tools, _) = ManifestTools::ensure(workspace)?;
    let folder = workspace.root.join("manifests");
    let mut found = Vec::new();

    let mut folders = [".", "base", "flowschema", "monitoring"].map(str::to_owned).to_vec();
    for entry in fs::read_dir(folder.join("overlays"))? {
        folders.push(format!("overlays/{}", entry?.file_name().to_string_lossy()));
    }
    for name in &folders {
        let objects = kustomize(&tools, &folder.join(name))?;
        found.extend(objects.duplicates.iter().map(|id| format!("manifests/{name}: {id} twice")));
        found.extend(objects.security().into_iter().map(|finding| format!("manifests/{name}: {finding}")));
    }
    found.extend(chart(&tools, &folder)?);
    found.extend(monitoring::check(&tools, workspace)?);

    for finding in &found {
        println!("{finding}");
    }
    match found.len() {
        0 => {
            println!(
                "{} kustomize folders, {} sets of values: as they should be",
                folders.len(),
                PAIRS.len() + REFUSED.len() + 1
            );
            Ok(())
        }
        count => bail!("{count} findings in the manifests"),
    }
}

fn kustomize(tools: &ManifestTools, folder: &Path) -> Result<Objects> {
    let text = process::output(tools.kubectl().arg("kustomize").arg(folder))?;
    Objects::parse(&text).with_context(|| folder.display().to_string())
}

/// Renders the chart with each set of values.
fn chart(tools: &ManifestTools, folder: &Path) -> Result<Vec<String>> {
    let mut cases: Vec<Value> = Vec::new();
    for values in PAIRS.iter().map(|(values, _)| values).chain(&REFUSED) {
        cases.push(serde_json::from_str(values).with_context(|| (*values).to_owned())?);
    }
    cases.push(json!({ "apiServers": ["10.0.0.1:6443", "[2001:db8::1]:6443"], "log": "debug", "extraArgs": ["--cni-exclusive"] }));
    let reply = helm(tools, &json!({ "chart": folder.join("chart"), "cases": cases }))?;

    let mut found = Vec::new();
    for error in reply["lint"]["errors"].as_array().into_iter().flatten() {
        found.push(format!("helm lint: {error}"));
    }
    let mut results = reply["cases"].as_array().context("no cases in the reply")?.iter();
    let mut rendered = |values: &dyn std::fmt::Display| -> Result<Objects> {
        let result = results.next().context("a case without reply")?;
        let text = result["text"].as_str().with_context(|| format!("helm refuses {values}: {}", result["error"]))?;
        Objects::parse(text).with_context(|| format!("chart with {values}"))
    };
    for (values, name) in PAIRS {
        let wanted = kustomize(tools, &folder.join(name))?;
        let differences = differences(&wanted, &rendered(&values)?);
        found.extend(
            differences.into_iter().map(|difference| format!("chart with {values}, manifests/{name}: {difference}")),
        );
    }
    let base = kustomize(tools, &folder.join("base"))?;
    let mut results = reply["cases"].as_array().into_iter().flatten().skip(PAIRS.len());
    for values in REFUSED {
        if results.next().is_none_or(|result| result["error"].is_null()) {
            found.push(format!("chart: values.schema.json takes {values}"));
        }
    }
    let result = results.next().context("a case without reply")?;
    let text = result["text"].as_str().with_context(|| format!("helm refuses apiServers: {}", result["error"]))?;
    let with_servers = Objects::parse(text)?;
    let servers = with_servers.get("ConfigMap", "terway-settings").map(|map| map["data"]["api_servers"].clone());
    if servers != Some(json!("10.0.0.1:6443,[2001:db8::1]:6443")) {
        found.push(format!("chart: apiServers become {servers:?}"));
    }
    let arguments = |objects: &Objects| {
        let set = objects.get("DaemonSet", "terway").cloned().unwrap_or_default();
        set["spec"]["template"]["spec"]["containers"][0]["args"].as_array().cloned().unwrap_or_default()
    };
    let mut wanted = arguments(&base);
    wanted.extend([json!("--log"), json!("debug"), json!("--cni-exclusive")]);
    if arguments(&with_servers) != wanted {
        found.push(format!("chart: log and extraArgs become {:?}", arguments(&with_servers)));
    }
    Ok(found)
}

/// Asks Helm, which runs inside Python.
fn helm(tools: &ManifestTools, request: &Value) -> Result<Value> {
    let mut script = tempfile::NamedTempFile::new()?;
    script.write_all(include_bytes!("render.py"))?;
    let mut input = tempfile::NamedTempFile::new()?;
    input.write_all(&serde_json::to_vec(request)?)?;
    let text = process::output_as(tools.python().arg(script.path()).arg(input.path()), "helm")?;
    serde_json::from_str(&text).context("the reply of helm")
}
