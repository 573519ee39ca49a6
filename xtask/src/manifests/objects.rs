//! Sets of Kubernetes objects, and how two of them differ.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

/// Objects by kind, namespace and name.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_id: BTreeMap<String, Value>,
    /// Ids that more than one object has.
    pub(super) duplicates: BTreeSet<String>,
}

impl Objects {
    /// Parses YAML documents; empty ones are left out.
    ///
    /// # Errors
    /// One is not YAML, or no object.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut objects = Self::default();
        for document in format!("\n{text}").split("\n---") {
            let mut value: Value = yaml_serde::from_str(document).with_context(|| document.to_owned())?;
            if value.is_null() {
                continue;
            }
            let field = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let meta = &value["metadata"];
            let kind = value["kind"].as_str().with_context(|| format!("no object: {document}"))?;
            let id = format!("{kind} {}/{}", field(&meta["namespace"]), field(&meta["name"]));
            // Tells Helm, and nobody else, to keep an object.
            if let Some(meta) = value["metadata"].as_object_mut() {
                let keep = serde_json::json!({ "helm.sh/resource-policy": "keep" });
                meta.retain(|key, value| key != "annotations" || *value != keep);
            }
            if objects.by_id.insert(id.clone(), value).is_some() {
                objects.duplicates.insert(id);
            }
        }
        Ok(objects)
    }

    /// The object of a kind and name, in any namespace.
    pub(super) fn get(&self, kind: &str, name: &str) -> Option<&Value> {
        self.by_id.values().find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
    }

    /// What every workload must state, and does not.
    pub(super) fn security(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (id, object) in &self.by_id {
            let template = &object["spec"]["template"];
            let pod = &template["spec"];
            if pod.is_null() {
                continue;
            }
            let mut want = |what: &str, is_so: bool| {
                if !is_so {
                    found.push(format!("{id}: {what}"));
                }
            };
            want(
                "tolerations are not [{operator: Exists}]",
                pod["tolerations"] == serde_json::json!([{ "operator": "Exists" }]),
            );
            want("not system-node-critical", pod["priorityClassName"] == "system-node-critical");
            want(
                "no grace above the 5 s of a stop",
                pod["terminationGracePeriodSeconds"].as_u64().is_some_and(|s| s > 5),
            );
            want("a token without service account", pod["serviceAccountName"].is_string());
            let selector = &object["spec"]["selector"]["matchLabels"];
            let has_version = selector
                .as_object()
                .into_iter()
                .flatten()
                .any(|(key, _)| key.contains("version") || key.contains("chart"));
            want("the selector contains a version", !has_version);
            for list in ["initContainers", "containers"] {
                for container in pod[list].as_array().into_iter().flatten() {
                    let name = container["name"].as_str().unwrap_or_default();
                    let context = &container["securityContext"];
                    let profile = format!("container.apparmor.security.beta.kubernetes.io/{name}");
                    want(&format!("{name}: privileged"), context["privileged"] != true);
                    want(&format!("{name}: a root that can be written"), context["readOnlyRootFilesystem"] == true);
                    want(&format!("{name}: may gain privileges"), context["allowPrivilegeEscalation"] == false);
                    want(
                        &format!("{name}: keeps capabilities"),
                        context["capabilities"]["drop"] == serde_json::json!(["ALL"]),
                    );
                    want(&format!("{name}: no seccomp profile"), context["seccompProfile"]["type"].is_string());
                    want(&format!("{name}: no SELinux type"), context["seLinuxOptions"]["type"].is_string());
                    let app_armor = &template["metadata"]["annotations"][&profile];
                    // kubelet refuses runtime/default on a node without AppArmor.
                    let is_stated = context["capabilities"]["add"].is_null() || app_armor == "unconfined";
                    want(&format!("{name}: no AppArmor profile"), is_stated && app_armor != "runtime/default");
                    want(&format!("{name}: no requests"), container["resources"]["requests"]["memory"].is_string());
                    if list == "containers" {
                        want(
                            &format!("{name}: liveness is not /healthz"),
                            container["livenessProbe"]["httpGet"]["path"] == "/healthz",
                        );
                        want(
                            &format!("{name}: readiness is not /readyz"),
                            container["readinessProbe"]["httpGet"]["path"] == "/readyz",
                        );
                    }
                }
            }
        }
        found
    }
}

/// Says in what the second set differs from the first, field by field.
pub(super) fn differences(wanted: &Objects, present: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    for id in wanted.by_id.keys().chain(present.by_id.keys()).collect::<BTreeSet<_>>() {
        match (wanted.by_id.get(id), present.by_id.get(id)) {
            (Some(a), Some(b)) => compare(id, a, b, &mut found),
            (Some(_), None) => found.push(format!("{id} is missing")),
            (None, _) => found.push(format!("{id} is too much")),
        }
    }
    found
}

fn compare(at: &str, wanted: &Value, present: &Value, found: &mut Vec<String>) {
    match (wanted, present) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                compare(
                    &format!("{at}.{key}"),
                    a.get(key).unwrap_or(&Value::Null),
                    b.get(key).unwrap_or(&Value::Null),
                    found,
                );
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (number, (a, b)) in by_name(a).into_iter().zip(by_name(b)).enumerate() {
                compare(&format!("{at}[{number}]"), a, b, found);
            }
        }
        // A file's text may end in one newline or in none, and a JSON document may be indented otherwise.
        (Value::String(a), Value::String(b)) if a.trim_end() == b.trim_end() || is_same_json(a, b) => {}
        _ if wanted == present => {}
        _ => found.push(format!("{at}: {wanted} here, {present} in the chart")),
    }
}

/// A list whose items have names has no order: kustomize puts what it patches first.
fn by_name(items: &[Value]) -> Vec<&Value> {
    let mut sorted: Vec<_> = items.iter().collect();
    sorted.sort_by_key(|item| item["name"].as_str());
    sorted
}

fn is_same_json(a: &str, b: &str) -> bool {
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
    parse(a).is_some_and(|a| parse(b) == Some(a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_named_by_its_field() {
        let parse = |text| Objects::parse(text).unwrap();
        let a =
            parse("kind: A\nmetadata: {name: x}\nspec: {list: [1, 2], same: t}\n---\nkind: B\nmetadata: {name: y}\n");
        let b = parse(
            "---\nkind: A\nmetadata: {name: x}\nspec: {list: [1, 3], same: t}\n---\n\n---\nkind: C\nmetadata: {name: z}\n",
        );
        assert_eq!(
            differences(&a, &b),
            ["A /x.spec.list[1]: 2 here, 3 in the chart", "B /y is missing", "C /z is too much"]
        );
        assert!(differences(&a, &a).is_empty());
        assert_eq!(parse("kind: A\n---\nkind: A\n").duplicates.len(), 1);
    }

    #[test]
    fn a_container_must_state_its_rights() {
        let objects = Objects::parse(
            "kind: DaemonSet\nspec: {template: {spec: {containers: [{name: c, securityContext: {privileged: true, capabilities: {add: [NET_ADMIN]}}}]}}}\n",
        );
        let found = objects.unwrap().security().join("\n");
        for text in
            ["privileged", "SELinux", "AppArmor", "seccomp", "capabilities", "requests", "tolerations", "/healthz"]
        {
            assert!(found.contains(text), "{text}: {found}");
        }
    }
}
