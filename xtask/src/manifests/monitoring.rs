//! Alerts and dashboards: promtool parses every expression, every metric is one of the daemon's, every runbook exists.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;
use crate::setup::ManifestTools;
use crate::workspace::Workspace;

/// Types of panels that the dashboards use, and what Grafana (schema version 39) asks of them.
const PANELS: [&str; 3] = ["row", "stat", "timeseries"];
/// What the daemon's Prometheus encoder appends to a registered name.
const SUFFIXES: [&str; 7] = ["_bucket", "_sum", "_count", "_total", "_seconds", "_packets", "_bytes"];

/// Checks rules and dashboards; returns the findings.
///
/// # Errors
/// A file cannot be read, or promtool refuses one.
pub(super) fn check(tools: &ManifestTools, workspace: &Workspace) -> Result<Vec<String>> {
    let folder = workspace.root.join("manifests/monitoring");
    let mut found = Vec::new();
    process::output(tools.promtool()?.args(["check", "rules"]).arg(folder.join("rules.yaml")))?;
    process::output(tools.promtool()?.args(["test", "rules"]).arg(folder.join("tests.yaml")))?;

    let read = |name: &str| -> Result<Value> {
        let text = fs::read_to_string(folder.join(name)).with_context(|| name.to_owned())?;
        yaml_serde::from_str(&text).with_context(|| name.to_owned())
    };
    let rules = read("rules.yaml")?;
    if read("prometheusrule.yaml")?["spec"]["groups"] != rules["groups"] {
        found.push("prometheusrule.yaml differs from rules.yaml".to_owned());
    }
    let runbooks = fs::read_to_string(workspace.root.join("docs/runbooks.md")).context("docs/runbooks.md")?;
    let headings: BTreeSet<String> =
        runbooks.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_lowercase).collect();
    let known = registered(&workspace.root.join("terway-daemon/src"))?;
    let mut expressions = Vec::new();
    for rule in rules["groups"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|group| group["rules"].as_array().into_iter().flatten())
    {
        let name = rule["alert"].as_str().unwrap_or_default();
        expressions.push((name.to_owned(), rule["expr"].as_str().unwrap_or_default().to_owned()));
        let anchor = rule["annotations"]["runbook_url"].as_str().and_then(|url| url.strip_prefix("docs/runbooks.md#"));
        if !anchor.is_some_and(|anchor| headings.contains(anchor)) {
            found.push(format!("alert {name}: no section of docs/runbooks.md has its runbook_url"));
        }
    }
    let mut dashboards: Vec<_> = fs::read_dir(folder.join("dashboards"))?.collect::<Result<_, _>>()?;
    dashboards.sort_by_key(fs::DirEntry::file_name);
    for file in dashboards {
        let name = file.file_name().to_string_lossy().into_owned();
        let dashboard = serde_json::from_str(&fs::read_to_string(file.path())?).with_context(|| name.clone())?;
        found.extend(structure(&dashboard).into_iter().map(|finding| format!("{name}: {finding}")));
        for (panel, expression) in queries(&dashboard) {
            expressions.push((format!("{name}: {panel}"), expression));
        }
    }
    for (place, expression) in &expressions {
        for metric in metrics(expression).into_iter().filter(|metric| !is_known(metric, &known)) {
            found.push(format!("{place}: the daemon has no metric {metric}"));
        }
    }
    // promtool parses what stands in a rule.
    let mut text = String::from("groups:\n- name: g\n  rules:\n");
    for (number, (_, expression)) in expressions.iter().enumerate() {
        let expression = expression.replace("$__rate_interval", "5m").replace("$instance", "n1");
        let _infallible = writeln!(text, "  - {{ record: r{number}, expr: {} }}", Value::from(expression));
    }
    let file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    fs::write(file.path(), text)?;
    process::output(tools.promtool()?.args(["check", "rules"]).arg(file.path()))
        .context("an expression of a dashboard")?;
    Ok(found)
}

/// The panels of a dashboard with each of their queries.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().into_iter().flatten() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().unwrap_or_default().to_owned();
            queries.push((title, target["expr"].as_str().unwrap_or_default().to_owned()));
        }
    }
    queries
}

/// In what a dashboard is not what Grafana loads: ids, places, data sources and queries of its panels.
fn structure(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for key in ["uid", "title"] {
        if dashboard[key].as_str().is_none_or(str::is_empty) {
            found.push(format!("no {key}"));
        }
    }
    if dashboard["schemaVersion"] != 39
        || !dashboard["templating"]["list"].is_array()
        || !dashboard["time"]["from"].is_string()
    {
        found.push("not of schema version 39".to_owned());
    }
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    if panels.is_empty() {
        found.push("no panels".to_owned());
    }
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in &panels {
        let title = panel["title"].as_str().unwrap_or_default();
        let mut finding = |what: &str| found.push(format!("panel `{title}`: {what}"));
        let kind = panel["type"].as_str().unwrap_or_default();
        if title.is_empty() || !PANELS.contains(&kind) {
            finding("no title, or an unknown type");
        }
        if !panel["id"].as_u64().is_some_and(|id| ids.insert(id)) {
            finding("no id of its own");
        }
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap_or(u64::MAX >> 8));
        if w == 0 || h == 0 || h > 100 || x.saturating_add(w) > 24 {
            finding("outside of the 24 columns");
            continue;
        }
        if !(y..y + h).flat_map(|y| (x..x + w).map(move |x| (x, y))).all(|cell| cells.insert(cell)) {
            finding("overlaps another");
        }
        if kind == "row" {
            continue;
        }
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        let mut letters = BTreeSet::new();
        let is_query = |target: &Value| {
            target["expr"].as_str().is_some_and(|e| !e.is_empty()) && target["datasource"]["type"] == "prometheus"
        };
        if targets.is_empty() || !targets.iter().all(is_query) {
            finding("a target without data source or expr");
        }
        if !targets
            .iter()
            .all(|target| target["refId"].as_str().is_some_and(|letter| letters.insert(letter.to_owned())))
        {
            finding("a refId twice");
        }
        if panel["datasource"]["uid"] != "${datasource}" || !panel["fieldConfig"]["defaults"]["unit"].is_string() {
            finding("no data source or unit");
        }
    }
    found
}

/// The names of an expression that look like metrics of the daemon.
fn metrics(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("terway_") || word.starts_with("aliyun_")).map(str::to_owned).collect()
}

/// Whether the daemon registers a name that becomes this metric.
fn is_known(metric: &str, registered: &BTreeSet<String>) -> bool {
    registered.contains(metric)
        || SUFFIXES.iter().filter_map(|suffix| metric.strip_suffix(suffix)).any(|name| is_known(name, registered))
}

/// The names in `metrics.rs` files and others that register metrics.
fn registered(folder: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)?;
                if text.contains("registry.register") {
                    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
                    let strings = code.split('"').skip(1).step_by(2);
                    names.extend(
                        strings.filter(|s| s.starts_with("terway_") || s.starts_with("aliyun_")).map(str::to_owned),
                    );
                }
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_metric_is_known_by_what_is_registered() {
        let registered = BTreeSet::from(["terway_drop".to_owned(), "terway_pod_phase".to_owned()]);
        let expression = "rate(terway_drop_packets_total[5m]) / terway_pod_phase_seconds_bucket > terway_nosuch";
        let unknown: Vec<_> = metrics(expression).into_iter().filter(|metric| !is_known(metric, &registered)).collect();
        assert_eq!(unknown, ["terway_nosuch"]);
    }

    #[test]
    fn a_dashboard_without_queries_or_room_is_refused() {
        let panel = |id: u64, x: u64| {
            json!({
                "id": id, "type": "timeseries", "title": "t", "gridPos": { "x": x, "y": 0, "w": 12, "h": 8 },
                "datasource": { "uid": "${datasource}" }, "fieldConfig": { "defaults": { "unit": "s" } },
                "targets": [{ "refId": "A", "expr": "up", "datasource": { "type": "prometheus" } }],
            })
        };
        let dashboard = |panels: Value| json!({ "uid": "u", "title": "t", "schemaVersion": 39, "templating": { "list": [] }, "time": { "from": "now-1h" }, "panels": panels });
        assert!(structure(&dashboard(json!([panel(1, 0), panel(2, 12)]))).is_empty());
        assert!(structure(&dashboard(json!([panel(1, 0), panel(2, 11)])))[0].contains("overlaps"));
        assert!(structure(&dashboard(json!([panel(1, 0), panel(1, 12)])))[0].contains("no id"));
        assert!(structure(&dashboard(json!([panel(1, 13)])))[0].contains("24 columns"));
        let mut empty = panel(1, 0);
        empty["targets"] = json!([]);
        assert!(structure(&dashboard(json!([empty])))[0].contains("without data source"));
        assert!(!structure(&json!({})).is_empty());
    }
}
